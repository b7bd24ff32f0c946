// Package journal is an intent log: what is about to be done to the host is on disk before it
// happens, so that it can be undone after a crash at any moment.
//
// A journal is a file of JSON lines. Do appends an effect, makes it durable, then applies it.
// Revert undoes the effects newest first and removes the file last. Reverting is what ends a VM in
// good order and what cleans up after a crash: there is one way down.
package journal

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/spec"
)

// Effect is one side effect on the host, described by its exported fields.
//
// Apply brings it about; it never takes over what is there already but returns an error that is
// fs.ErrExist, having done nothing. Revert undoes it, whole or half done; that nothing is there is
// success, and what is not the effect's own is left alone.
type Effect interface {
	Apply(context.Context) error
	Revert(context.Context) error
}

// Barrier is an effect that what was recorded before it serves, as a process has files open: while
// it cannot be undone, nothing older is.
type Barrier interface {
	Effect
	Barrier()
}

// Kinds names every kind of effect a journal may hold. The value makes an empty effect, a pointer
// to a struct, for JSON to fill.
type Kinds map[string]func() Effect

// Name returns the kind that e is of.
func (k Kinds) Name(e Effect) (string, error) {
	for name, make := range k {
		if reflect.TypeOf(make()) == reflect.TypeOf(e) {
			return name, nil
		}
	}
	return "", fmt.Errorf("effect %T: kind is not registered", e)
}

// Step is a moment in a journal's life that a Trace sees.
type Step struct {
	Op   string // "append", "apply", "applied", "revert", "reverted", "unlink"
	Kind string // "" for unlink
}

// Trace is called at every step, before the next one. It may be nil.
type Trace func(Step)

// Bounds of what Open reads. A journal holds a handful of short records, but for those that have
// policies of hundreds of rules.
const (
	maxBytes = 16 << 20
	maxLine  = 1 << 20
)

// RevertTimeout bounds one Revert of a whole journal.
const RevertTimeout = 60 * time.Second

// ErrCorrupt says that a journal's file was changed by somebody else: a record that is not the last
// one does not read. Nothing is reverted then.
var ErrCorrupt = errors.New("corrupt journal")

var errSum = errors.New("checksum differs")

// A Journal is not safe for concurrent use; its file must be held by one process (see store.Lock).
type Journal struct {
	path    string
	kinds   Kinds
	trace   Trace
	f       *os.File
	effects []entry
}

type entry struct {
	kind   string
	effect Effect
}

// version is that of the lines that are written here, which say it unless it is 0. Raise it when an
// effect is to be undone in another way although it has the same fields: a new field, or a new kind
// of effect, is refused by older programs anyway.
const version = 0

// record is a line of the file: an effect, or the number of one (counted from 1) that was struck
// out.
type record struct {
	Version int `json:"version,omitempty"`

	Kind   string          `json:"kind,omitempty"`
	Effect json.RawMessage `json:"effect,omitempty"`
	Strike int             `json:"strike,omitempty"`
}

// Create makes an empty journal at path, which must not exist.
func Create(path string, kinds Kinds, trace Trace) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create journal: %w", err)
	}
	if err := atomicfile.SyncDir(filepath.Dir(path)); err != nil {
		return nil, errors.Join(err, f.Close(), os.Remove(path))
	}
	return &Journal{path: path, kinds: kinds, trace: trace, f: f}, nil
}

// Open reads the journal at path. A torn last record is cut off: its effect was not begun. Returns
// an error that is fs.ErrNotExist if there is no journal, ErrCorrupt if it cannot be trusted,
// spec.ErrNotSupported if another version of smartvm has written what is unknown here, which then
// nothing here can undo.
func Open(path string, kinds Kinds, trace Trace) (*Journal, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_APPEND, 0)
	if err != nil {
		return nil, fmt.Errorf("open journal: %w", err)
	}
	j := &Journal{path: path, kinds: kinds, trace: trace, f: f}
	if err := j.load(); err != nil {
		return nil, errors.Join(fmt.Errorf("open journal %s: %w", path, err), f.Close())
	}
	return j, nil
}

// Check says what keeps Open from reading the journal at path. It changes nothing, so another
// process may have the journal open. That there is none is no error.
func Check(path string, kinds Kinds) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("check journal: %w", err)
	}
	j := &Journal{path: path, kinds: kinds, f: f}
	if _, err = j.read(); err != nil {
		err = fmt.Errorf("check journal %s: %w", path, err)
	}
	return errors.Join(err, j.Close())
}

func (j *Journal) load() error {
	whole, err := j.read()
	if err != nil {
		return err
	}
	return j.f.Truncate(whole)
}

// read returns how many bytes of the file are whole lines.
func (j *Journal) read() (int64, error) {
	data, err := io.ReadAll(io.LimitReader(j.f, maxBytes+1))
	if err != nil {
		return 0, err
	}
	if len(data) > maxBytes {
		return 0, fmt.Errorf("%w: over %d bytes", ErrCorrupt, maxBytes)
	}
	whole := 0
	for n := 1; whole < len(data); n++ {
		line, rest, terminated := bytes.Cut(data[whole:], []byte("\n"))
		if !terminated {
			break // cut short by a crash: its effect was not begun
		}
		err := j.add(line)
		switch {
		case errors.Is(err, errSum) && len(rest) == 0:
			return int64(whole), nil
		case errors.Is(err, spec.ErrNotSupported):
			return 0, hint.Add(fmt.Errorf("line %d: %w", n, err), "use the smartvm that wrote it, or a newer one")
		case err != nil:
			return 0, fmt.Errorf("%w: line %d: %w", ErrCorrupt, n, err)
		}
		whole += len(line) + 1
	}
	return int64(whole), nil
}

// add parses one line, "crc32 json". What is whole and cannot be read is of another version:
// spec.ErrNotSupported.
func (j *Journal) add(line []byte) error {
	sum, body, ok := bytes.Cut(line, []byte(" "))
	if !ok || string(sum) != checksum(body) {
		return errSum
	}
	var head struct {
		Version int `json:"version"`
	}
	err := json.Unmarshal(body, &head)
	if err == nil && head.Version > version {
		err = fmt.Errorf("it has version %d, this smartvm reads version %d", head.Version, version)
	}
	var r record
	if err == nil {
		err = unmarshal(body, &r)
	}
	if err != nil {
		return fmt.Errorf("%w: %w", spec.ErrNotSupported, err)
	}
	if r.Strike > 0 {
		if r.Strike > len(j.effects) {
			return fmt.Errorf("strikes out effect %d of %d", r.Strike, len(j.effects))
		}
		j.effects[r.Strike-1].effect = nil
		return nil
	}
	make, ok := j.kinds[r.Kind]
	if !ok {
		return fmt.Errorf("%w: unknown kind of effect %q", spec.ErrNotSupported, r.Kind)
	}
	e := make()
	if err := unmarshal(r.Effect, e); err != nil {
		return fmt.Errorf("%w: effect %s: %w", spec.ErrNotSupported, r.Kind, err)
	}
	j.effects = append(j.effects, entry{r.Kind, e})
	return nil
}

// unmarshal refuses unknown fields: an effect that is undone without them may be undone wrongly.
func unmarshal(data []byte, v any) error {
	dec := json.NewDecoder(bytes.NewReader(data))
	dec.DisallowUnknownFields()
	return dec.Decode(v)
}

func checksum(b []byte) string { return fmt.Sprintf("%08x", crc32.ChecksumIEEE(b)) }

// Do records e durably, then applies it. When e's place is taken (fs.ErrExist) the record is struck
// out, so that what stands there is never reverted. After any other error the effect may be half
// done: Revert the journal.
func (j *Journal) Do(ctx context.Context, e Effect) error {
	kind, err := j.kinds.Name(e)
	if err != nil {
		return err
	}
	body, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("record %s: %w", kind, err)
	}
	j.step("append", kind)
	if err := j.write(record{Version: version, Kind: kind, Effect: body}); err != nil {
		return fmt.Errorf("record %s: %w", kind, err)
	}
	j.effects = append(j.effects, entry{kind, e})
	j.step("apply", kind)
	if err := e.Apply(ctx); err != nil {
		if errors.Is(err, fs.ErrExist) {
			j.effects[len(j.effects)-1].effect = nil
			err = errors.Join(err, j.write(record{Version: version, Strike: len(j.effects)}))
		}
		return err
	}
	j.step("applied", kind)
	return nil
}

func (j *Journal) write(r record) error {
	body, err := json.Marshal(r)
	if err != nil {
		return err
	}
	if len(body) > maxLine {
		return fmt.Errorf("over %d bytes", maxLine)
	}
	_, err = fmt.Fprintf(j.f, "%s %s\n", checksum(body), body)
	return errors.Join(err, j.f.Sync())
}

// Effects lists what stands in the journal, oldest first, without what was struck out.
func (j *Journal) Effects() []Effect {
	var all []Effect
	for _, e := range j.effects {
		if e.effect != nil {
			all = append(all, e.effect)
		}
	}
	return all
}

// Revert undoes every effect, newest first, and removes the journal. After an error it keeps the
// journal, so that it can be tried again, and goes on, but not past a Barrier. The context's values
// serve; its end does not stop the way down.
func (j *Journal) Revert(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), RevertTimeout)
	defer cancel()
	var errs []error
	for i := len(j.effects) - 1; i >= 0; i-- {
		e := j.effects[i]
		if e.effect == nil {
			continue
		}
		j.step("revert", e.kind)
		if err := e.effect.Revert(ctx); err != nil {
			errs = append(errs, fmt.Errorf("revert %s: %w", e.kind, err))
			if _, ok := e.effect.(Barrier); ok {
				break
			}
			continue
		}
		j.step("reverted", e.kind)
	}
	if errs != nil {
		return errors.Join(errs...)
	}
	j.step("unlink", "")
	if err := os.Remove(j.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("revert: %w", err)
	}
	return j.Close()
}

// Close lets go of the file and leaves it as it is.
func (j *Journal) Close() error {
	if err := j.f.Close(); err != nil && !errors.Is(err, fs.ErrClosed) {
		return fmt.Errorf("close journal: %w", err)
	}
	return nil
}

func (j *Journal) step(op, kind string) {
	if j.trace != nil {
		j.trace(Step{op, kind})
	}
}
