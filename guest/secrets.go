package guest

import "log/slog"

// Secrets are files and variables that only a guest may see. Printed or logged, they show nothing.
type Secrets struct {
	Files map[string][]byte `json:"files,omitempty"` // by name
	Env   []string          `json:"env,omitempty"`   // NAME=VALUE
}

// String keeps values out of what is printed.
func (Secrets) String() string { return "(secret)" }

// GoString does so for %#v.
func (Secrets) GoString() string { return "(secret)" }

// LogValue does so for logs.
func (Secrets) LogValue() slog.Value { return slog.StringValue("(secret)") }
