package share

import (
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"strings"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
)

// Pending says that a VM may have changes that are not yet copied back.
type Pending struct {
	Taken time.Time `json:"taken"` // when the copies were begun
	Tries int       `json:"tries,omitempty"`
	Tried time.Time `json:"tried,omitzero"`  // when the last try failed
	Error string    `json:"error,omitempty"` // of the last try
}

// Bounds of how long nobody tries again who was not asked to: it doubles with each try.
const (
	firstPause = time.Minute
	lastPause  = time.Hour
)

// Due is when it is to be tried again by who was not asked to.
func (p *Pending) Due() time.Time {
	if p.Tries == 0 {
		return time.Time{}
	}
	pause := firstPause
	for range p.Tries - 1 {
		if pause *= 2; pause >= lastPause {
			pause = lastPause
			break
		}
	}
	return p.Tried.Add(pause)
}

// maxPending is of its file, in bytes.
const maxPending = 1 << 20

// ReadPending returns nil if there is no such file.
func ReadPending(path string) (*Pending, error) {
	p, err := atomicfile.ReadJSON[Pending](path, maxPending, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	return &p, nil
}

// PutOff says whether copying back has failed, and whether it is not to be tried yet by a process
// that was not asked to, which log is told then.
func PutOff(path string, log *slog.Logger) (failed, later bool) {
	p, err := ReadPending(path)
	if p == nil || err != nil || p.Tries == 0 {
		return false, false
	}
	wait := time.Until(p.Due())
	if wait > 0 && wait <= lastPause { // a clock that was set back puts nothing off
		log.Warn("not copied back yet: smartvm stop tries it now", "again in", wait.Round(time.Second), "err", p.Error)
		later = true
	}
	return true, later
}

// maxError is what is kept of an error, in bytes.
const maxError = 4096

// Failed notes in its file that a try ended with an error.
func (p *Pending) Failed(path string, why error) error {
	p.Tries, p.Tried, p.Error = p.Tries+1, time.Now(),
		strings.ToValidUTF8(why.Error()[:min(len(why.Error()), maxError)], "?")
	return errors.Join(why, atomicfile.WriteJSON(path, p))
}

// Forget removes what says that something is to be copied back.
func Forget(pending, copied string) error {
	for _, path := range []string{copied, pending} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
