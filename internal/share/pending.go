package share

import (
	"errors"
	"io/fs"
	"os"
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

// Failed notes in its file that a try ended with an error.
func (p *Pending) Failed(path string, why error) error {
	p.Tries, p.Tried, p.Error = p.Tries+1, time.Now(), why.Error()
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
