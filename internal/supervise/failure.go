package supervise

import (
	"context"
	"errors"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/trust"
)

// Failure is an error that goes from one process to another, or to a program that reads JSON.
type Failure struct {
	Message string `json:"message"`
	// Code is the error's kind: the original package's name for it where it has one, else one of the
	// codes below.
	Code   string  `json:"code"`
	Text   string  `json:"hint,omitempty"`   // what to do about it
	Fields []Field `json:"fields,omitempty"` // what is wrong with a machine configuration
}

// Field is one thing wrong with a machine configuration.
type Field struct {
	Path   string `json:"path"` // "drives[0].pathOnHost"
	Reason string `json:"reason"`
}

// The codes of errors that the original has no name for.
const (
	CodeInvalid      = "INVALID_SPEC"
	CodeNotFound     = "NOT_FOUND"
	CodeExists       = "ALREADY_EXISTS"
	CodeState        = "INVALID_STATE"
	CodeNotSupported = "NOT_SUPPORTED"
	CodeInterrupted  = "INTERRUPTED"
	CodeInUse        = "IN_USE"
	CodeOffline      = "OFFLINE"
	CodeNotAllowed   = "NOT_ALLOWED" // by a policy of images
	CodeFailed       = "FAILED"
)

func (f *Failure) Error() string { return f.Message }

// sentinels are the errors that a code stands for. Of those that have none, the type tells more
// than another process learns.
var sentinels = map[string]error{
	CodeNotFound:     smartvm.ErrNotFound,
	CodeExists:       smartvm.ErrExists,
	CodeState:        smartvm.ErrState,
	codeNoClient:     smartvm.ErrState,
	CodeNotSupported: smartvm.ErrNotSupported,
	CodeInterrupted:  context.Canceled,
	CodeOffline:      image.ErrOffline,
}

// codeNoClient is the original's name of the state in which there is no VMM to talk to: see
// smartvm.StateError.
const codeNoClient = "NO_CLIENT"

// Is says whether target is what the code stands for: errors.Is serves in the process that reads a
// Failure, too.
func (f *Failure) Is(target error) bool {
	sentinel, ok := sentinels[f.Code]
	return ok && target == sentinel
}

// Hint is advice: see smartvm.Hint.
func (f *Failure) Hint() string { return f.Text }

// Describe turns any error into a Failure.
func Describe(err error) *Failure {
	if f, ok := errors.AsType[*Failure](err); ok && f.Message == err.Error() {
		return f
	}
	f := &Failure{Message: err.Error(), Code: smartvm.Code(err), Text: smartvm.Hint(err)}
	for _, e := range FieldErrors(err) {
		f.Fields = append(f.Fields, Field{Path: e.Path, Reason: e.Reason})
	}
	if f.Code == "" {
		f.Code = code(err, len(f.Fields) > 0)
	}
	return f
}

func code(err error, fields bool) string {
	switch {
	case fields:
		return CodeInvalid
	case errors.Is(err, context.Canceled):
		return CodeInterrupted
	case errors.Is(err, smartvm.ErrNotFound), errors.Is(err, image.ErrNotFound):
		return CodeNotFound
	case errors.As(err, new(*image.InUseError)):
		return CodeInUse
	case errors.Is(err, image.ErrOffline):
		return CodeOffline
	case errors.As(err, new(*trust.RejectedError)):
		return CodeNotAllowed
	case errors.Is(err, smartvm.ErrExists):
		return CodeExists
	case errors.Is(err, smartvm.ErrState):
		return CodeState
	case errors.Is(err, smartvm.ErrNotSupported):
		return CodeNotSupported
	}
	return CodeFailed
}

// FieldErrors lists every *smartvm.FieldError in err's tree.
func FieldErrors(err error) []*smartvm.FieldError {
	if e, ok := err.(*smartvm.FieldError); ok { //nolint:errorlint // the tree is walked by hand
		return []*smartvm.FieldError{e}
	}
	var all []*smartvm.FieldError
	switch e := err.(type) { //nolint:errorlint // likewise
	case interface{ Unwrap() []error }:
		for _, err := range e.Unwrap() {
			all = append(all, FieldErrors(err)...)
		}
	case interface{ Unwrap() error }:
		if inner := e.Unwrap(); inner != nil {
			all = FieldErrors(inner)
		}
	}
	return all
}
