package firecracker_test

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
)

var errDialed = errors.New("dialled")

func noDial(context.Context) (net.Conn, error) { return nil, errDialed }

func parse(t *testing.T, text string) firecracker.Version {
	t.Helper()
	v, err := firecracker.ParseVersion(text)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestCheckVersion(t *testing.T) {
	const transparent = firecracker.HugePagesTransparent
	// Each row holds one thing that is not in every version.
	for _, row := range []struct {
		name         string
		body         any
		has, hasNot  string // versions, blank-separated
		need         string // what the last of hasNot must become
		field, where string // the field may have "=" and the value that is too new
	}{
		{
			"mtu",
			firecracker.NetworkInterface{MTU: 1500},
			"1.16.0 1.17.0 2.0.0", "1.7.0 1.15.1", "1.16.0", "mtu",
			"PUT /network-interfaces",
		},
		{"discard", firecracker.Drive{Discard: true}, "1.17.0 2.0.0", "1.7.0 1.16.1", "1.17.0", "discard", "PUT /drives"},
		{"pmem", firecracker.Pmem{}, "1.14.0 1.16.0", "1.7.0 1.13.2", "1.14.0", "", "PUT /pmem"},
		{
			"pmem limiter",
			firecracker.Pmem{RateLimiter: limits},
			"1.16.0", "1.14.0 1.15.1", "1.16.0",
			"rate_limiter", "PUT /pmem",
		},
		{"pmem update", firecracker.PartialPmem{}, "1.16.0", "1.14.0 1.15.1", "1.16.0", "", "PATCH /pmem"},
		{"serial", firecracker.SerialDevice{}, "1.14.0", "1.7.0 1.13.2", "1.14.0", "", "PUT /serial"},
		{
			"serial limiter",
			firecracker.SerialDevice{RateLimiter: &firecracker.TokenBucket{}},
			"1.16.0", "1.15.1", "1.16.0",
			"rate_limiter", "PUT /serial",
		},
		{"hotplug memory", firecracker.MemoryHotplugConfig{}, "1.14.0", "1.13.2", "1.14.0", "", "PUT /hotplug/memory"},
		{
			"hinting",
			firecracker.Balloon{FreePageHinting: true},
			"1.14.0", "1.13.2", "1.14.0", "free_page_hinting",
			"PUT /balloon",
		},
		{
			"reporting",
			firecracker.Balloon{FreePageReporting: true},
			"1.14.0", "1.13.2", "1.14.0", "free_page_reporting",
			"PUT /balloon",
		},
		{"imds", firecracker.MMDSConfig{IMDSCompat: true}, "1.13.0", "1.12.1", "1.13.0", "imds_compat", "PUT /mmds/config"},
		{
			"track",
			firecracker.SnapshotLoadParams{TrackDirtyPages: true},
			"1.13.0", "1.12.1", "1.13.0", "track_dirty_pages",
			"PUT /snapshot/load",
		},
		{
			"taps",
			firecracker.SnapshotLoadParams{NetworkOverrides: make([]firecracker.NetworkOverride, 1)},
			"1.12.0", "1.11.0",
			"1.12.0", "network_overrides", "PUT /snapshot/load",
		},
		{
			"vsock",
			firecracker.SnapshotLoadParams{VsockOverride: &firecracker.VsockOverride{}},
			"1.16.0", "1.15.1", "1.16.0",
			"vsock_override", "PUT /snapshot/load",
		},
		{
			"clock",
			firecracker.SnapshotLoadParams{ClockRealtime: true},
			"1.14.4 1.14.5 1.15.1 1.16.0", "1.7.0 1.14.3",
			"1.14.4", "clock_realtime", "PUT /snapshot/load",
		},
		{
			"clock on 1.15",
			firecracker.SnapshotLoadParams{ClockRealtime: true},
			"1.14.4", "1.15.0", "1.15.1", "clock_realtime",
			"PUT /snapshot/load",
		},
		{"pointer", &firecracker.NetworkInterface{MTU: 1500}, "1.16.0", "1.15.1", "1.16.0", "mtu", "PUT /network-interfaces"},
		{
			"huge pages",
			firecracker.MachineConfiguration{HugePages: transparent},
			"1.17.0 2.0.0", "1.7.0 1.16.1", "1.17.0",
			"huge_pages=Transparent", "PUT /machine-config",
		},
		{
			"huge pages later",
			firecracker.PartialMachineConfiguration{HugePages: transparent},
			"1.17.0", "1.16.1", "1.17.0",
			"huge_pages=Transparent", "PATCH /machine-config",
		},
		{
			"huge pages in file",
			firecracker.FullVMConfiguration{MachineConfig: &firecracker.MachineConfiguration{HugePages: transparent}},
			"1.17.0",
			"1.12.1", "1.17.0", "machine-config.huge_pages=Transparent", "",
		},
		{
			"huge pages loaded",
			firecracker.SnapshotLoadParams{HugePages: firecracker.HugePagesNone},
			"1.17.0", "1.16.1",
			"1.17.0", "huge_pages", "PUT /snapshot/load",
		},
		{"metrics id", firecracker.Metrics{EmitID: true}, "1.17.0", "1.7.0 1.16.1", "1.17.0", "emit_id", "PUT /metrics"},
		{
			"metrics properties",
			firecracker.Metrics{Properties: map[string]string{"a": "b"}},
			"1.17.0", "1.16.1", "1.17.0",
			"properties", "PUT /metrics",
		},
		{
			"snapshot sync",
			firecracker.SnapshotCreateParams{SyncSnapshotFiles: new(bool)},
			"1.17.0", "1.16.1", "1.17.0",
			"sync_snapshot_files", "PUT /snapshot/create",
		},
		{
			"file",
			firecracker.FullVMConfiguration{Pmem: make([]firecracker.Pmem, 1)},
			"1.14.0", "1.13.2",
			"1.14.0", "pmem", "",
		},
		{
			"in file",
			firecracker.FullVMConfiguration{NetworkInterfaces: []firecracker.NetworkInterface{{}, {MTU: 68}}},
			"1.16.0", "1.12.1", "1.16.0", "network-interfaces.mtu", "",
		},
		{
			"in file by pointer",
			firecracker.FullVMConfiguration{Balloon: &firecracker.Balloon{FreePageHinting: true}},
			"1.14.0", "1.12.1", "1.14.0", "balloon.free_page_hinting", "",
		},
	} {
		t.Run(row.name, func(t *testing.T) {
			for text := range strings.FieldsSeq(row.has) {
				if err := firecracker.CheckVersion(parse(t, text), row.body); err != nil {
					t.Errorf("%s: %v", text, err)
				}
			}
			var got *firecracker.VersionError
			var have firecracker.Version
			for text := range strings.FieldsSeq(row.hasNot) {
				have = parse(t, text)
				err := firecracker.CheckVersion(have, row.body)
				if !errors.As(err, &got) || !errors.Is(err, firecracker.ErrNotSupported) {
					t.Fatalf("%s: %v, want a VersionError", text, err)
				}
			}
			field, value, _ := strings.Cut(row.field, "=")
			want := &firecracker.VersionError{
				Endpoint: row.where, Field: field, Value: value,
				Need: parse(t, row.need), Have: have,
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestCheckVersion_old(t *testing.T) {
	// What every supported version has passes the oldest.
	for _, body := range []any{
		firecracker.BootSource{KernelImagePath: "k", InitrdPath: "i", BootArgs: "a"},
		firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: 1, HugePages: firecracker.HugePages2M},
		firecracker.Drive{DriveID: "d", RateLimiter: limits, IOEngine: firecracker.IOEngineAsync},
		firecracker.NetworkInterface{IfaceID: "e", RxRateLimiter: limits},
		firecracker.Balloon{AmountMiB: 1, StatsIntervalS: 1},
		firecracker.SnapshotLoadParams{SnapshotPath: "s", EnableDiffSnapshots: true, ResumeVM: true},
		firecracker.FullVMConfiguration{BootSource: &firecracker.BootSource{}, Drives: make([]firecracker.Drive, 1)},
		map[string]any{"mtu": 1},
		nil,
	} {
		if err := firecracker.CheckVersion(firecracker.MinVersion, body); err != nil {
			t.Errorf("%T: %v", body, err)
		}
	}
}

func TestCheckVersion_all(t *testing.T) {
	err := firecracker.CheckVersion(v1_12_1,
		firecracker.SnapshotLoadParams{VsockOverride: &firecracker.VsockOverride{}, ClockRealtime: true})
	const want = "PUT /snapshot/load: field vsock_override needs Firecracker 1.16.0 or newer, this is 1.12.1\n" +
		"PUT /snapshot/load: field clock_realtime needs Firecracker 1.14.4 or newer, this is 1.12.1"
	if err == nil || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}

// TestClient_gates sends every request to VMMs on both sides of the version that first serves its
// endpoint.
func TestClient_gates(t *testing.T) {
	since := readFacts(t).endpoints
	for _, call := range calls() {
		method, rest, _ := strings.Cut(call.want, " ")
		path, _, _ := strings.Cut(rest, " ")
		endpoint := objectID.ReplaceAllString(method+" "+path, "$1/{id}")
		var before []string
		switch since[endpoint] {
		case "1.14.0":
			before = []string{"1.7.0", "1.13.2"}
		case "1.16.0":
			before = []string{"1.7.0", "1.15.1"}
		case "":
		default:
			t.Errorf("%s: since %s is not tested", endpoint, since[endpoint])
		}
		for _, text := range before {
			err := call.do(firecracker.New(noDial, parse(t, text)), t.Context())
			var version *firecracker.VersionError
			if !errors.As(err, &version) || version.Need.String() != since[endpoint] || version.Field != "" ||
				version.Endpoint != method+" "+path {
				t.Errorf("%s on %s: %v, want a VersionError of %s", call.name, text, err, since[endpoint])
			}
		}
		if err := call.do(firecracker.New(noDial, v1_16_1), t.Context()); !errors.Is(err, errDialed) {
			t.Errorf("%s on %v: %v, want it sent", call.name, v1_16_1, err)
		}
	}
}

func TestClient_asksForVersion(t *testing.T) {
	var sent []string
	dial, _ := listen(t, answering(func(method, path, _ string) string {
		sent = append(sent, method+" "+path)
		if path == "/version" {
			return answer(200, `{"firecracker_version":"1.14.0-dev"}`)
		}
		return answer(204, "")
	}))
	c := newClient(t, dial, firecracker.Version{})
	if err := c.PutBootSource(t.Context(), firecracker.BootSource{}); err != nil {
		t.Error(err)
	}
	if err := c.PutSerial(t.Context(), firecracker.SerialDevice{}); err != nil {
		t.Error(err)
	}
	if err := c.PutNetworkInterface(t.Context(), firecracker.NetworkInterface{IfaceID: "e", MTU: 1500}); !errors.Is(err,
		firecracker.ErrNotSupported) {
		t.Errorf("mtu: %v, want ErrNotSupported", err)
	}
	want := []string{"PUT /boot-source", "GET /version", "PUT /serial"}
	if diff := cmp.Diff(want, sent); diff != "" {
		t.Errorf("sent (-want +got):\n%s", diff)
	}
}

func TestClient_versionUnknowable(t *testing.T) {
	dial, _ := listen(t, always(answer(200, `{"firecracker_version":"soon"}`)))
	c := newClient(t, dial, firecracker.Version{})
	err := c.PutSerial(t.Context(), firecracker.SerialDevice{})
	if err == nil || err.Error() != `learn version: parse version "soon": want MAJOR.MINOR.PATCH` {
		t.Errorf("got %v", err)
	}
}
