package attach_test

import (
	"errors"
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/attach"
	"push.rocks/smartvm/spec"
)

// What an image exposes is published at free ports, but for what is published anyhow; where it
// exposes nothing that is said.
func TestExpose(t *testing.T) {
	var log strings.Builder
	logger := slog.New(slog.NewTextHandler(&log, nil))
	local := netip.MustParseAddr("127.0.0.1")
	given := []spec.Port{{HostIP: local, HostPort: 8080, GuestPort: 80}, {HostPort: 53, GuestPort: 53, Protocol: "udp"}}
	s := &spec.Spec{Ports: given, PublishAll: true}
	if err := attach.Expose(s, []string{"53/tcp", "53/udp", "80/tcp", "443/tcp"}, logger); err != nil {
		t.Fatal(err)
	}
	want := append(slices.Clone(given), spec.Port{GuestPort: 53, Protocol: "tcp"},
		spec.Port{GuestPort: 443, Protocol: "tcp"})
	if !slices.Equal(s.Ports, want) || log.Len() > 0 {
		t.Errorf("got %v, want %v; logged %s", s.Ports, want, &log)
	}
	s = &spec.Spec{Ports: given}
	if err := attach.Expose(s, []string{"443/tcp"}, logger); err != nil || !slices.Equal(s.Ports, given) {
		t.Errorf("nobody asked for it: %v, %v", s.Ports, err)
	}
	s = &spec.Spec{PublishAll: true, Image: "quiet"}
	if err := attach.Expose(s, nil, logger); err != nil || len(s.Ports) > 0 ||
		!strings.Contains(log.String(), "exposes no port") {
		t.Errorf("got %v, %v; logged %s", s.Ports, err, &log)
	}
	var many []string
	for i := range spec.MaxPorts + 1 {
		many = append(many, fmt.Sprintf("%d/tcp", i+1))
	}
	var field *spec.FieldError
	if err := attach.Expose(&spec.Spec{PublishAll: true}, many, logger); !errors.As(err, &field) || field.Path != "ports" {
		t.Errorf("got %v", err)
	}
}
