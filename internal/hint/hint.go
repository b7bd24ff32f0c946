// Package hint adds advice to errors without making it part of what they say.
package hint

import "fmt"

type hinted struct {
	error
	hint string
}

func (e *hinted) Unwrap() error { return e.error }
func (e *hinted) Hint() string  { return e.hint }

// Add returns err with advice on what to do about it, as fmt.Sprintf makes it, in a method Hint.
func Add(err error, format string, args ...any) error {
	return &hinted{err, fmt.Sprintf(format, args...)}
}
