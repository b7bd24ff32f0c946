package configure_test

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

// A build of what is to become 1.17 may not know discard yet: then a drive has none, unless its
// spec wants it.
func TestCalls_DiscardUnknown(t *testing.T) {
	path := testenv.Socket(t, filepath.Join(t.TempDir(), "s"))
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		discard := strings.Contains(string(body), `"discard":true`)
		got = append(got, map[bool]string{true: "discard", false: "none"}[discard])
		w.Header().Set("Content-Type", "application/json")
		if !discard {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.WriteHeader(http.StatusBadRequest) // as serde has it
		_, _ = io.WriteString(w,
			"{\"fault_message\":\"An error occurred when deserializing the json body of a request: unknown field `discard`, expected one of `drive_id`, `partuuid` at line 1 column 99.\"}")
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	v := firecracker.Version{Major: 1, Minor: 17}
	c := firecracker.New(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}, v)
	defer c.Close()
	for name, tt := range map[string]struct {
		drive spec.Drive
		want  []string
		ok    bool
	}{
		"nothing said":  {spec.Drive{DriveID: "d"}, []string{"discard", "none"}, true},
		"not wanted":    {spec.Drive{DriveID: "d", Discard: new(bool)}, []string{"none"}, true},
		"wanted":        {spec.Drive{DriveID: "d", Discard: new(true)}, []string{"discard"}, false},
		"not to offer":  {spec.Drive{DriveID: "d", IsReadOnly: true}, []string{"none"}, true},
		"nor this, too": {spec.Drive{DriveID: "d", IOEngine: "Async"}, []string{"none"}, true},
	} {
		got = nil
		for _, call := range configure.Calls(&spec.Spec{Drives: []spec.Drive{tt.drive}}, v) {
			if !strings.HasPrefix(call.Path, "/drives/") {
				continue
			}
			if err := call.Send(t.Context(), c); (err == nil) != tt.ok {
				t.Errorf("%s: %v", name, err)
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

var newest = firecracker.Version{Major: 1, Minor: 16}

// whole is a spec with everything in it.
func whole() *spec.Spec {
	bucket := func(n uint64) *spec.TokenBucket {
		return &spec.TokenBucket{Size: n, OneTimeBurst: n + 1, RefillTime: n + 2}
	}
	limit := func(n uint64) *spec.RateLimiter { return &spec.RateLimiter{Bandwidth: bucket(n), Ops: bucket(n + 10)} }
	return &spec.Spec{
		BootSource: spec.BootSource{KernelImagePath: "/images/vmlinux", InitrdPath: "/images/initrd", BootArgs: "quiet"},
		MachineConfig: spec.MachineConfig{
			VCPUCount: 2, MemSizeMiB: 256, SMT: true, TrackDirtyPages: true, HugePages: "2M",
			CPUTemplate: "T2",
		},
		CPUConfig: json.RawMessage(`{"kvm_capabilities":["!171"]}`),
		Drives: []spec.Drive{
			{
				DriveID: "root", PathOnHost: "/images/root", IsRootDevice: true, IsReadOnly: true, PartUUID: "0eaa91a0-01",
				CacheType: "Writeback", IOEngine: "Async",
			},
			{DriveID: "data", PathOnHost: "/disks/data", RateLimiter: limit(1)},
		},
		Pmem: []spec.Pmem{{ID: "pmem0", PathOnHost: "/disks/pmem", IsReadOnly: true}},
		NetworkInterfaces: []spec.NetworkInterface{
			{
				IfaceID: "eth0", HostDevName: "tap0", GuestMAC: "06:00:00:00:00:01", MTU: 1400, RxRateLimiter: limit(20),
				TxRateLimiter: limit(40),
			},
		},
		MMDS:          &spec.MMDS{NetworkInterfaces: []string{"eth0"}, IPv4Address: "169.254.169.254"},
		Vsock:         &spec.Vsock{GuestCID: 3, UDSPath: "/somewhere/vsock"},
		Balloon:       &spec.Balloon{AmountMiB: 8, DeflateOnOOM: true, StatsPollingIntervalS: 1},
		Entropy:       &spec.Entropy{RateLimiter: limit(60)},
		Serial:        &spec.Serial{RateLimiter: bucket(80)},
		MemoryHotplug: &spec.MemoryHotplug{TotalSizeMiB: 1024, SlotSizeMiB: 128, BlockSizeMiB: 2},
		Metrics:       &spec.Metrics{MetricsPath: "/somewhere/metrics"},
	}
}

// lines are requests as text, one a line.
func lines(t *testing.T, calls []configure.Call) string {
	t.Helper()
	var all strings.Builder
	for _, c := range calls {
		body, err := json.Marshal(c.Body)
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&all, "%s %s\n", c.Path, body)
	}
	return all.String()
}

func golden(t *testing.T, name, got string) {
	t.Helper()
	want, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("-%s +got:\n%s", name, diff)
	}
}

func TestCalls(t *testing.T) {
	golden(t, "whole.txt", lines(t, configure.Calls(whole(), newest)))
	golden(t, "least.txt",
		lines(t, configure.Calls(&spec.Spec{MachineConfig: spec.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}}, newest)))
}

// What is shown is what is sent, in that order, and a VMM of that version takes all of it.
func TestCalls_Sent(t *testing.T) {
	for name, calls := range map[string][]configure.Call{
		"new":      configure.Calls(whole(), newest),
		"restored": configure.RestoreCalls(whole(), restored(), newest),
	} {
		var sent strings.Builder
		c := recorder(t, newest, func(path string, body []byte) { fmt.Fprintf(&sent, "%s %s\n", path, body) })
		for _, call := range calls {
			if err := call.Send(t.Context(), c); err != nil {
				t.Errorf("%s: %s: %v", name, call.Path, err)
			}
		}
		// The balloon's new size is the one request whose body is more than is shown.
		want := strings.Replace(lines(t, calls), "/balloon 5\n", "/balloon {\"amount_mib\":5}\n", 1)
		if diff := cmp.Diff(want, sent.String()); diff != "" {
			t.Errorf("%s: -shown +sent:\n%s", name, diff)
		}
	}
}

// recorder is a client of a VMM that takes everything.
func recorder(t *testing.T, v firecracker.Version, record func(path string, body []byte)) *firecracker.Client {
	t.Helper()
	path := testenv.Socket(t, filepath.Join(t.TempDir(), "s"))
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		record(r.URL.Path, body)
		w.WriteHeader(http.StatusNoContent)
	})}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	c := firecracker.New(func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", path)
	}, v)
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func restored() *configure.Restored {
	return &configure.Restored{
		Taps: map[string]string{"eth1": "tap8", "eth0": "tap7"}, Metadata: json.RawMessage(`{"a":1}`), Paused: true,
		MemorySocket: "memory.socket", Balloon: new(uint32(5)),
	}
}

func TestRestoreCalls(t *testing.T) {
	golden(t, "restored.txt", lines(t, configure.RestoreCalls(whole(), restored(), newest)))
	golden(t, "restored-1.12.txt",
		lines(t, configure.RestoreCalls(whole(), restored(), firecracker.Version{Major: 1, Minor: 12})))
	golden(t, "restored-least.txt", lines(t, configure.RestoreCalls(&spec.Spec{}, &configure.Restored{}, newest)))
}

// Metrics name their VM and have its properties, be it started anew or restored.
func TestCalls_Metrics(t *testing.T) {
	s := &spec.Spec{
		Metrics: &spec.Metrics{MetricsPath: "/m", EmitID: true, Properties: map[string]string{"b": "2", "a": "1"}},
	}
	const want = `/metrics {"metrics_path":"metrics.fifo","emit_id":true,"properties":{"a":"1","b":"2"}}` + "\n"
	for name, calls := range map[string][]configure.Call{
		"started": configure.Calls(s, newest), "restored": configure.RestoreCalls(s, &configure.Restored{}, newest),
	} {
		if got := lines(t, calls); !strings.Contains(got, want) {
			t.Errorf("%s: want %s in %s", name, want, got)
		}
	}
}

// What a guest does with memory that is plugged in is said on its command line, unless its
// configuration says it.
func TestCalls_HotplugState(t *testing.T) {
	for args, want := range map[string]string{
		"quiet":                             "quiet memhp_default_state=online_movable",
		"memhp_default_state=offline quiet": "memhp_default_state=offline quiet",
	} {
		for hotplug, want := range map[*spec.MemoryHotplug]string{{TotalSizeMiB: 128}: want, nil: args} {
			calls := configure.Calls(&spec.Spec{BootSource: spec.BootSource{BootArgs: args}, MemoryHotplug: hotplug}, newest)
			if got := lines(t, calls); !strings.Contains(got, fmt.Sprintf(`"boot_args":%q`, want)) {
				t.Errorf("%q with %+v: want %q in %s", args, hotplug, want, got)
			}
		}
	}
}
