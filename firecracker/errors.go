package firecracker

import (
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// ErrNotSupported says that the Firecracker in use is too old for what was asked. Every
// [*VersionError] is one.
var ErrNotSupported = errors.New("not supported by this Firecracker")

// maxFault bounds the text kept of an error answer, in bytes.
const maxFault = 4096

// APIError is an answer of the VMM other than success.
type APIError struct {
	Method string // "PUT"
	Path   string // "/drives/rootfs"
	Status int    // HTTP status: 400 for nearly everything, 413, 500, 503
	Fault  string // what the VMM said: on one line, non-printable bytes escaped, bounded in length
}

// Error returns request, status and fault on one line.
func (e *APIError) Error() string {
	if e.Fault == "" {
		return fmt.Sprintf("%s %s: status %d", e.Method, e.Path, e.Status)
	}
	return fmt.Sprintf("%s %s: status %d: %s", e.Method, e.Path, e.Status, e.Fault)
}

// VersionError says that a request was not sent because the VMM in use would not know the endpoint,
// the field or its value. It matches [ErrNotSupported].
type VersionError struct {
	Endpoint string  // "PUT /network-interfaces"; empty for a configuration file
	Field    string  // JSON path in the body, "rate_limiter"; empty when the endpoint itself is too new
	Value    string  // of the field, "Transparent"; empty when the field itself is too new
	Need     Version // the oldest version not older than Have that has it
	Have     Version
}

// Error names the endpoint, field or value and both versions.
func (e *VersionError) Error() string {
	what := e.Endpoint
	if e.Field != "" {
		what = strings.TrimPrefix(e.Endpoint+": field "+e.Field, ": ")
	}
	if e.Value != "" {
		what += fmt.Sprintf(" with value %q", e.Value)
	}
	return fmt.Sprintf("%s needs Firecracker %v or newer, this is %v", what, e.Need, e.Have)
}

// Is reports whether target is [ErrNotSupported].
func (e *VersionError) Is(target error) bool { return target == ErrNotSupported }

// decodeFault extracts the message of an error answer. Structured is false when the body is not the
// VMM's regular JSON: then its HTTP parser gave up, and the connection is not to be used again.
func decodeFault(body []byte) (fault string, structured bool) {
	var regular struct {
		FaultMessage *string `json:"fault_message"`
	}
	if err := json.Unmarshal(body, &regular); err == nil && regular.FaultMessage != nil {
		return printable(*regular.FaultMessage), true
	}
	// The HTTP layer writes { "error": "..." } with raw newlines inside the string, which is no JSON.
	// What it quotes is not escaped either, so the string ends at the last quote.
	text := strings.TrimSpace(string(body))
	if inner, ok := strings.CutPrefix(text, "{"); ok {
		inner = strings.TrimSpace(strings.TrimSuffix(inner, "}"))
		if value, ok := strings.CutPrefix(inner, `"error":`); ok {
			value = strings.TrimSpace(value)
			value = strings.TrimPrefix(value, `"`)
			value = strings.TrimSuffix(value, `"`)
			text = strings.TrimSpace(value)
		}
	}
	return printable(text), false
}

// printable makes text of the VMM (which may quote a guest's or attacker's bytes) safe for
// terminals and logs: one line, every non-printable rune escaped as Go would, at most maxFault
// bytes.
func printable(s string) string {
	const ellipsis = "..."
	var b strings.Builder
	for len(s) > 0 {
		r, size := utf8.DecodeRuneInString(s)
		chunk := s[:size]
		if r == utf8.RuneError && size == 1 || !strconv.IsPrint(r) {
			quoted := strconv.Quote(chunk)
			chunk = quoted[1 : len(quoted)-1]
		}
		if b.Len()+len(chunk) > maxFault-len(ellipsis) {
			return b.String() + ellipsis
		}
		b.WriteString(chunk)
		s = s[size:]
	}
	return b.String()
}
