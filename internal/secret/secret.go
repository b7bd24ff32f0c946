// Package secret reads what a guest is told that nobody else is to see: files, and variables for
// its command. What was read is in memory alone; printed or logged, a guest.Secrets says nothing.
package secret

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/spec"
)

// Bounds of what is read, in bytes.
const (
	MaxFile  = 512 << 10 // of one secret
	MaxFiles = 2 << 20   // of all secrets of a VM
	MaxEnv   = 128 << 10 // of all env files of a VM, and of one line
)

// patience is how long what is no plain file, like a pipe, may take to give all it has.
const patience = 10 * time.Second

// Options say how files are read.
type Options struct {
	// LookupEnv finds the value of a name that stands in an env file without one. Nil: it finds none.
	LookupEnv func(name string) (value string, ok bool)
	// Plain leaves out what is no plain file: a pipe, say, whose content comes once.
	Plain bool
}

// Check finds what Load would find wrong, as far as that can be known without reading what can be
// read once.
func Check(s spec.Spec) error {
	err := Absolute(&s)
	if err == nil {
		_, err = Load(&s, Options{Plain: true})
	}
	return err
}

// Absolute makes the paths in a spec absolute. Links in them stay: they may lead elsewhere next
// time.
func Absolute(s *spec.Spec) error {
	s.EnvFiles, s.Secrets = slices.Clone(s.EnvFiles), slices.Clone(s.Secrets)
	var errs []error
	abs := func(path *string) {
		full, err := filepath.Abs(*path)
		errs, *path = append(errs, err), full
	}
	for i := range s.EnvFiles {
		abs(&s.EnvFiles[i])
	}
	for i := range s.Secrets {
		abs(&s.Secrets[i].Path)
	}
	return errors.Join(errs...)
}

// Load reads what a spec names, nil if that is nothing. Of a variable that Env of the spec has too,
// that one counts. All that is wrong is reported at once, as joined *spec.FieldErrors.
func Load(s *spec.Spec, o Options) (*guest.Secrets, error) {
	if len(s.Secrets)+len(s.EnvFiles) == 0 {
		return nil, nil
	}
	set := &guest.Secrets{Files: map[string][]byte{}}
	var errs []error
	add := func(path, value string, err error) {
		reason := err
		if pe, ok := errors.AsType[*fs.PathError](err); ok { // its path is the value
			reason = pe.Err
		}
		errs = append(errs, &spec.FieldError{Path: path, Value: value, Reason: reason.Error(), Err: err})
	}
	total := 0
	for i, file := range s.Secrets {
		data, err := o.read(file.Path, MaxFile)
		if total += len(data); err == nil && total > MaxFiles {
			err = fmt.Errorf("has more than %d bytes together with those before", MaxFiles)
		}
		if err != nil {
			add(fmt.Sprintf("secrets[%d].path", i), file.Path, err)
		}
		set.Files[file.Name] = data
	}
	own := func(env string) bool {
		name, _, _ := strings.Cut(env, "=")
		return slices.ContainsFunc(s.Env, func(e string) bool { return strings.HasPrefix(e, name+"=") })
	}
	total = 0
	for i, path := range s.EnvFiles {
		data, err := o.read(path, MaxEnv)
		var env []string
		if err == nil {
			env, err = Parse(data, o.LookupEnv)
		}
		if total += len(data); err == nil && total > MaxEnv {
			err = fmt.Errorf("has more than %d bytes together with those before", MaxEnv)
		}
		if err != nil {
			add(fmt.Sprintf("envFiles[%d]", i), path, err)
		}
		set.Env = append(set.Env, slices.DeleteFunc(env, own)...)
	}
	if len(errs) > 0 {
		return nil, errors.Join(errs...)
	}
	return set, nil
}

// read reads a file, a pipe too, of at most limit bytes.
func (o Options) read(path string, limit int64) ([]byte, error) {
	// Nonblocking, so that a FIFO without a writer is empty and keeps nobody.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil {
		return nil, err
	} else if fi.IsDir() {
		return nil, errors.New("is a directory")
	} else if o.Plain && !fi.Mode().IsRegular() {
		return nil, nil
	}
	_ = f.SetReadDeadline(time.Now().Add(patience)) // a plain file has none, and needs none
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	switch {
	case errors.Is(err, os.ErrDeadlineExceeded):
		return nil, fmt.Errorf("does not come to its end within %s", patience)
	case err != nil:
		return nil, err
	case int64(len(data)) > limit:
		return nil, fmt.Errorf("has more than %d bytes", limit)
	}
	return data, nil
}

// ReadEnv reads env files for a program, in their order. All that is wrong is reported at once.
func ReadEnv(paths []string, o Options) (env []string, err error) {
	var errs []error
	for _, path := range paths {
		data, err := o.read(path, MaxEnv)
		var more []string
		if err == nil {
			more, err = Parse(data, o.LookupEnv)
			if err != nil {
				err = fmt.Errorf("%s: %w", path, err)
			}
		}
		errs = append(errs, err)
		env = append(env, more...)
	}
	return env, errors.Join(errs...)
}

// Variables reads what -e was given, as docker does: NAME=VALUE, or NAME alone for the value that
// lookup finds; it is left out where that finds none. Errors show no values.
func Variables(texts []string, lookup func(string) (string, bool)) (env []string, err error) {
	var errs []error
	for n, text := range texts {
		name, _, given := strings.Cut(text, "=")
		if name == "" {
			errs = append(errs,
				fmt.Errorf("-e: variable %d has no name before =: want NAME=VALUE, or NAME for the value that it has here", n+1))
			continue
		}
		if !given && lookup != nil {
			value, found := lookup(name)
			text, given = name+"="+value, found
		}
		switch {
		case !utf8.ValidString(text) || strings.Contains(text, "\x00"):
			errs = append(errs, fmt.Errorf("-e %s: its value is no text", strings.ToValidUTF8(name, "\ufffd")))
		case given:
			env = append(env, text)
		}
	}
	return env, errors.Join(errs...)
}

// Parse reads an env file as docker does: NAME=VALUE a line, the value as it stands, quotes too;
// NAME alone has the value that lookup finds, and is left out where that finds none; empty lines
// and those that begin with # are nothing. So is a byte order mark, also where files were joined.
// Errors tell lines, not what is in them.
func Parse(data []byte, lookup func(string) (string, bool)) (env []string, err error) {
	var errs []error
	lines := bufio.NewScanner(bytes.NewReader(data))
	lines.Buffer(nil, MaxEnv+1)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimLeftFunc(lines.Text(), func(r rune) bool { return r == '\ufeff' || unicode.IsSpace(r) })
		if line == "" || line[0] == '#' {
			continue
		}
		name, value, found := strings.Cut(line, "=")
		if !found {
			name = strings.TrimRightFunc(name, unicode.IsSpace)
		}
		switch {
		case !utf8.ValidString(line) || strings.Contains(line, "\x00"):
			errs = append(errs, fmt.Errorf("line %d is no text", n))
			continue
		case name == "":
			errs = append(errs, fmt.Errorf("line %d has no name before =", n))
			continue
		case strings.ContainsFunc(name, unicode.IsSpace):
			errs = append(errs, fmt.Errorf("line %d has blanks in its name", n))
			continue
		case !found && lookup != nil:
			value, found = lookup(name)
		}
		if found {
			env = append(env, name+"="+value)
		}
	}
	return env, errors.Join(append(errs, lines.Err())...)
}
