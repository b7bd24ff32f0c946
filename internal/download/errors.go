package download

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"syscall"
	"time"
)

var (
	// ErrRedirect says that a server sent us round in circles, or from https to something less.
	ErrRedirect = errors.New("bad redirect")
	// ErrStalled says that a server sent nothing for too long.
	ErrStalled = errors.New("the server sends nothing")
	// ErrOffline says that something would have to be fetched, and must not: for packages that have such a switch.
	ErrOffline = errors.New("offline")
)

// StatusError is an answer that is no success.
type StatusError struct {
	URL        string // without credentials and query, as in all errors here
	Code       int
	RetryAfter time.Duration // how long the server wants us to wait before another try; 0: it does not say
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

// transportError is trouble on the way to the server or back.
type transportError struct {
	url string
	err error
}

func (e *transportError) Error() string { return fmt.Sprintf("get %s: %v", e.url, e.err) }
func (e *transportError) Unwrap() error { return e.err }

// transient says whether another try may go better.
func transient(err error) bool {
	var status *StatusError
	if errors.As(err, &status) {
		return status.Code == http.StatusTooManyRequests || status.Code == http.StatusRequestTimeout || status.Code >= 500
	}
	var dns *net.DNSError
	if errors.As(err, new(*tls.CertificateVerificationError)) || errors.Is(err, ErrRedirect) || errors.As(err, &dns) && dns.IsNotFound {
		return false
	}
	return errors.As(err, new(*transportError))
}

// Dropped says whether an error is a connection's end.
func Dropped(err error) bool {
	for _, e := range []error{io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, ErrStalled} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// redact takes from a URL what may be secret.
func redact(raw string) string {
	u, err := url.Parse(raw)
	if err != nil {
		return "a URL that makes no sense"
	}
	u.User, u.RawQuery, u.ForceQuery, u.Fragment = nil, "", false, ""
	return u.String()
}
