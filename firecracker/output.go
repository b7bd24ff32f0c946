package firecracker

import (
	"context"
	"net/http"
)

// EntropyDevice is a virtio-rng device; its zero value is one without limits.
type EntropyDevice struct {
	RateLimiter *RateLimiter `json:"rate_limiter,omitempty"`
}

// PutEntropy creates or replaces the entropy device before boot.
func (c *Client) PutEntropy(ctx context.Context, e EntropyDevice) error {
	return c.send(ctx, http.MethodPut, "/entropy", e)
}

// SerialDevice says where the guest's serial port goes. Firecracker >= 1.14.
type SerialDevice struct {
	SerialOutPath string `json:"serial_out_path,omitempty"` // file or FIFO; absent: the VMM's stdout
	// in bytes, what exceeds it is dropped; Firecracker >= 1.16
	RateLimiter *TokenBucket `json:"rate_limiter,omitempty" since:"1.16.0"`
}

// PutSerial redirects the serial port before boot or before a snapshot is loaded; snapshots do not
// keep it. Firecracker >= 1.14.
func (c *Client) PutSerial(ctx context.Context, s SerialDevice) error {
	return c.send(ctx, http.MethodPut, "/serial", s)
}

// LogLevel is the least severe level that the VMM logs.
type LogLevel string

// The levels, from quiet to loud.
const (
	LogOff   LogLevel = "Off"
	LogError LogLevel = "Error"
	LogWarn  LogLevel = "Warn"
	LogInfo  LogLevel = "Info" // the default
	LogDebug LogLevel = "Debug"
	LogTrace LogLevel = "Trace"
)

// Logger configures the VMM's log.
type Logger struct {
	// must exist before 1.14; written over from its start, not appended to
	LogPath       string   `json:"log_path,omitempty"`
	Level         LogLevel `json:"level,omitempty"` // absent: back to LogInfo
	ShowLevel     bool     `json:"show_level,omitempty"`
	ShowLogOrigin bool     `json:"show_log_origin,omitempty"`
	Module        string   `json:"module,omitempty"` // logs only modules whose path begins so
}

// PutLogger configures the log before boot; it may be repeated.
func (c *Client) PutLogger(ctx context.Context, l Logger) error {
	return c.send(ctx, http.MethodPut, "/logger", l)
}

// Metrics says where metrics go.
type Metrics struct {
	MetricsPath string `json:"metrics_path"` // file or FIFO; must exist before 1.14
	// each line has the VMM's --id as "id"; Firecracker >= 1.17
	EmitID bool `json:"emit_id,omitempty" since:"1.17.0"`
	// each line has them as "properties"; Firecracker >= 1.17
	Properties map[string]string `json:"properties,omitempty" since:"1.17.0"`
}

// PutMetrics configures metrics before boot, once in a process's life.
func (c *Client) PutMetrics(ctx context.Context, m Metrics) error {
	return c.send(ctx, http.MethodPut, "/metrics", m)
}
