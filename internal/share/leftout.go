package share

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"

	"push.rocks/smartvm/spec"
)

// Reasons why something is not copied, beside what the host says.
var (
	errOther      = errors.New("another file system is mounted there")
	errSpecial    = errors.New("neither a file, a directory nor a link")
	errName       = errors.New("a name that the copies cannot have")
	errAttributes = errors.New("more than the file system of the copies can hold")
)

// maxLeftOut bounds what is told by name.
const maxLeftOut = 5

// leftOut is what is not copied of a volume.
type leftOut struct {
	named []string // at most maxLeftOut, with the reasons
	all   int
	first error
}

func (l *leftOut) add(name string, err error) {
	if errors.Is(err, fs.ErrNotExist) {
		return // it was there a moment ago
	}
	if pe, ok := errors.AsType[*fs.PathError](err); ok { // its path is the name
		err = pe.Err
	}
	if l.all++; l.all == 1 {
		l.first = err
	}
	if len(l.named) < maxLeftOut {
		l.named = append(l.named, fmt.Sprintf("%s: %v", name, err))
	}
}

// attribute is for an extended attribute, or all of a file's if attr is "".
func (l *leftOut) attribute(name, attr string, err error) {
	if attr == "" {
		attr = "all"
	}
	l.add(name, fmt.Errorf("extended attributes (%s): %w", attr, err))
}

// warn tells it, in one line.
func (l *leftOut) warn(log *slog.Logger, v *spec.Volume) {
	if l.all == 0 || log == nil {
		return
	}
	todo := "the guest goes without; give -v a directory that has none"
	switch {
	case errors.Is(l.first, fs.ErrPermission):
		todo = "make it readable for this user, or run smartvm as root"
	case errors.Is(l.first, errOther):
		todo = "give that its own -v"
	case errors.Is(l.first, errAttributes):
		todo = "the file is copied without; setfattr -x removes it"
	case errors.Is(l.first, errSpecial):
		todo = "the guest can make its own"
	}
	log.Warn("left out of the copy", "volume", "-v "+v.Source+":"+v.Target, "paths", l.named, "count", l.all, "do", todo)
}
