package download

import (
	"errors"
	"fmt"
	"net/http"
	"net/url"
)

var (
	// ErrRedirect says that a server sent us round in circles, or from https to something less.
	ErrRedirect = errors.New("bad redirect")
	// ErrStalled says that a server sent nothing for too long.
	ErrStalled = errors.New("the server sends nothing")
	// ErrOffline says that something would have to be fetched, and must not: for packages that have
	// such a switch.
	ErrOffline = errors.New("offline")
)

// StatusError is an answer that is no success.
type StatusError struct {
	URL  string // without credentials and query, as in all errors here
	Code int
}

func (e *StatusError) Error() string {
	return fmt.Sprintf("get %s: %d %s", e.URL, e.Code, http.StatusText(e.Code))
}

// DigestError says that a file has not the content that it should have. What came was removed.
type DigestError struct {
	URL       string
	Want, Got string // SHA-256, in hexadecimal
}

func (e *DigestError) Error() string {
	return fmt.Sprintf("get %s: its sha256 is %s, not %s", e.URL, e.Got, e.Want)
}

// SizeError says that something is longer or shorter than it should be. What came was removed.
type SizeError struct {
	URL  string
	Want int64 // bytes
	Got  int64 // bytes; -1: more than Want
}

func (e *SizeError) Error() string {
	if e.Got < 0 {
		return fmt.Sprintf("get %s: it is longer than %d bytes", e.URL, e.Want)
	}
	return fmt.Sprintf("get %s: it has %d bytes, not %d", e.URL, e.Got, e.Want)
}

// brokenError says that content broke off: another try may bring the rest.
type brokenError struct {
	name string
	err  error
}

func (e *brokenError) Error() string { return fmt.Sprintf("get %s: %v", e.name, e.err) }
func (e *brokenError) Unwrap() error { return e.err }

// redact takes from a URL what may be secret.
func redact(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "a URL that makes no sense"
	}
	u.User, u.RawQuery, u.ForceQuery, u.Fragment = nil, "", false, ""
	return u.String()
}
