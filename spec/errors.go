package spec

import (
	"errors"
	"fmt"
)

// ErrNotSupported says that a field asks for something that smartvm, or the VMM in use, cannot do.
var ErrNotSupported = errors.New("not supported")

// FieldError is one thing wrong with a Spec.
type FieldError struct {
	Path   string // JSON path, "drives[0].pathOnHost"
	Value  any    // as given; nil when the field is missing
	Reason string
	Err    error // what is behind it, if anything
}

func (e *FieldError) Unwrap() error { return e.Err }

func (e *FieldError) Error() string {
	switch v := e.Value.(type) {
	case nil:
		return e.Path + ": " + e.Reason
	case string:
		return fmt.Sprintf("%s: %s (got %q)", e.Path, e.Reason, v)
	default:
		return fmt.Sprintf("%s: %s (got %v)", e.Path, e.Reason, v)
	}
}
