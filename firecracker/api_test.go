package firecracker_test

import (
	"context"
	"encoding/json"
	"net/netip"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
)

type call struct {
	name string // of the method
	do   func(*firecracker.Client, context.Context) error
	want string // method, path and body as sent
}

func discard[T any](get func(*firecracker.Client, context.Context) (T, error)) func(*firecracker.Client,
	context.Context) error {
	return func(c *firecracker.Client, ctx context.Context) error {
		_, err := get(c, ctx)
		return err
	}
}

// with binds the argument of a method that takes one.
func with[T any](send func(*firecracker.Client, context.Context, T) error, arg T) func(*firecracker.Client,
	context.Context) error {
	return func(c *firecracker.Client, ctx context.Context) error { return send(c, ctx, arg) }
}

var (
	limits = &firecracker.RateLimiter{
		Bandwidth: &firecracker.TokenBucket{Size: 1 << 20, OneTimeBurst: 5, RefillTimeMs: 100},
	}
	unlimited = &firecracker.RateLimiter{Ops: &firecracker.TokenBucket{}}
)

const (
	limitsJSON    = `{"bandwidth":{"size":1048576,"one_time_burst":5,"refill_time":100}}`
	unlimitedJSON = `{"ops":{"size":0,"refill_time":0}}`
)

// calls has every method with a full body, and with the smallest where fields may be left out.
func calls() []call {
	type client = firecracker.Client
	two, yes := 2, true
	return []call{
		{"GetInstanceInfo", discard((*client).GetInstanceInfo), `GET / `},
		{"GetVersion", discard((*client).GetVersion), `GET /version `},
		{"GetVMConfig", discard((*client).GetVMConfig), `GET /vm/config `},
		{"InstanceStart", (*client).InstanceStart, `PUT /actions {"action_type":"InstanceStart"}`},
		{"FlushMetrics", (*client).FlushMetrics, `PUT /actions {"action_type":"FlushMetrics"}`},
		{"SendCtrlAltDel", (*client).SendCtrlAltDel, `PUT /actions {"action_type":"SendCtrlAltDel"}`},
		{"Pause", (*client).Pause, `PATCH /vm {"state":"Paused"}`},
		{"Resume", (*client).Resume, `PATCH /vm {"state":"Resumed"}`},

		{
			"PutBootSource",
			with((*client).PutBootSource,
				firecracker.BootSource{KernelImagePath: "vmlinux", InitrdPath: "initrd", BootArgs: "console=ttyS0 a=<&>"}),
			`PUT /boot-source {"kernel_image_path":"vmlinux","initrd_path":"initrd","boot_args":"console=ttyS0 a=<&>"}`,
		},
		{
			"PutBootSource", with((*client).PutBootSource, firecracker.BootSource{}),
			`PUT /boot-source {"kernel_image_path":""}`,
		},
		{"GetMachineConfig", discard((*client).GetMachineConfig), `GET /machine-config `},
		{
			"PutMachineConfig",
			with((*client).PutMachineConfig, firecracker.MachineConfiguration{
				VCPUCount: 2, MemSizeMiB: 512, SMT: true, TrackDirtyPages: true,
				HugePages: firecracker.HugePages2M, CPUTemplate: firecracker.CPUTemplateT2,
			}),
			`PUT /machine-config {"vcpu_count":2,"mem_size_mib":512,"smt":true,"track_dirty_pages":true,"huge_pages":"2M","cpu_template":"T2"}`,
		},
		{
			"PutMachineConfig", with((*client).PutMachineConfig, firecracker.MachineConfiguration{}),
			`PUT /machine-config {"vcpu_count":0,"mem_size_mib":0}`,
		},
		{
			"PatchMachineConfig",
			with((*client).PatchMachineConfig,
				firecracker.PartialMachineConfiguration{VCPUCount: &two, MemSizeMiB: &two, SMT: new(bool), TrackDirtyPages: &yes}),
			`PATCH /machine-config {"vcpu_count":2,"mem_size_mib":2,"smt":false,"track_dirty_pages":true}`,
		},
		{
			"PatchMachineConfig",
			with((*client).PatchMachineConfig,
				firecracker.PartialMachineConfiguration{
					HugePages:   firecracker.HugePagesNone,
					CPUTemplate: firecracker.CPUTemplateNone,
				}),
			`PATCH /machine-config {"huge_pages":"None","cpu_template":"None"}`,
		},
		{
			"PutCPUConfig",
			with((*client).PutCPUConfig, firecracker.CPUConfig{
				KVMCapabilities: []string{"!121"},
				CPUIDModifiers: []firecracker.CPUIDLeaf{{
					Leaf: "0x1", Subleaf: "0x0",
					Modifiers: []firecracker.CPUIDModifier{{Register: "eax", Bitmap: "0b1x"}},
				}},
				MSRModifiers: []firecracker.RegisterModifier{{Addr: "0x10a", Bitmap: "0b0"}},
				RegModifiers: []firecracker.RegisterModifier{{Addr: "0x1", Bitmap: "0b1"}},
				VCPUFeatures: []firecracker.VCPUFeature{{Index: 0, Bitmap: "0b1"}},
			}),
			`PUT /cpu-config {"kvm_capabilities":["!121"],` +
				`"cpuid_modifiers":[{"leaf":"0x1","subleaf":"0x0","flags":0,"modifiers":[{"register":"eax","bitmap":"0b1x"}]}],` +
				`"msr_modifiers":[{"addr":"0x10a","bitmap":"0b0"}],"reg_modifiers":[{"addr":"0x1","bitmap":"0b1"}],` +
				`"vcpu_features":[{"index":0,"bitmap":"0b1"}]}`,
		},

		{
			"PutDrive",
			with((*client).PutDrive, firecracker.Drive{
				DriveID: "root_1", IsRootDevice: true, PartUUID: "0eaa91a0-01", CacheType: firecracker.CacheWriteback,
				IsReadOnly: true,
				PathOnHost: "root.ext4", RateLimiter: limits, IOEngine: firecracker.IOEngineAsync,
			}),
			`PUT /drives/root_1 {"drive_id":"root_1","is_root_device":true,"partuuid":"0eaa91a0-01","cache_type":"Writeback",` +
				`"is_read_only":true,"path_on_host":"root.ext4","rate_limiter":` + limitsJSON + `,"io_engine":"Async"}`,
		},
		{
			"PutDrive",
			with((*client).PutDrive, firecracker.Drive{DriveID: "d", Socket: "v.sock"}),
			`PUT /drives/d {"drive_id":"d","is_root_device":false,"socket":"v.sock"}`,
		},
		{
			"PatchDrive",
			with((*client).PatchDrive, firecracker.PartialDrive{DriveID: "d", PathOnHost: "new", RateLimiter: unlimited}),
			`PATCH /drives/d {"drive_id":"d","path_on_host":"new","rate_limiter":` + unlimitedJSON + `}`,
		},
		{"DeleteDrive", with((*client).DeleteDrive, "d"), `DELETE /drives/d `},
		{
			"PutPmem",
			with((*client).PutPmem,
				firecracker.Pmem{ID: "p", PathOnHost: "f", RootDevice: true, ReadOnly: true, RateLimiter: limits}),
			`PUT /pmem/p {"id":"p","path_on_host":"f","root_device":true,"read_only":true,"rate_limiter":` + limitsJSON + `}`,
		},
		{
			"PatchPmem", with((*client).PatchPmem, firecracker.PartialPmem{ID: "p", RateLimiter: unlimited}),
			`PATCH /pmem/p {"id":"p","rate_limiter":` + unlimitedJSON + `}`,
		},
		{"DeletePmem", with((*client).DeletePmem, "p"), `DELETE /pmem/p `},

		{
			"PutNetworkInterface",
			with((*client).PutNetworkInterface, firecracker.NetworkInterface{
				IfaceID: "eth0", HostDevName: "tap0", GuestMAC: "06:00:c0:00:02:01", MTU: 1400, RxRateLimiter: limits,
				TxRateLimiter: unlimited,
			}),
			`PUT /network-interfaces/eth0 {"iface_id":"eth0","host_dev_name":"tap0","guest_mac":"06:00:c0:00:02:01","mtu":1400,` +
				`"rx_rate_limiter":` + limitsJSON + `,"tx_rate_limiter":` + unlimitedJSON + `}`,
		},
		{
			"PatchNetworkInterface",
			with((*client).PatchNetworkInterface, firecracker.PartialNetworkInterface{IfaceID: "eth0", TxRateLimiter: limits}),
			`PATCH /network-interfaces/eth0 {"iface_id":"eth0","tx_rate_limiter":` + limitsJSON + `}`,
		},
		{"DeleteNetworkInterface", with((*client).DeleteNetworkInterface, "eth0"), `DELETE /network-interfaces/eth0 `},
		{
			"PutVsock", with((*client).PutVsock, firecracker.Vsock{GuestCID: 3, UDSPath: "v.sock"}),
			`PUT /vsock {"guest_cid":3,"uds_path":"v.sock"}`,
		},
		{
			"PutMMDSConfig",
			with((*client).PutMMDSConfig, firecracker.MMDSConfig{
				NetworkInterfaces: []string{"eth0"}, Version: firecracker.MMDSV2, IPv4Address: netip.MustParseAddr("169.254.170.2"),
				IMDSCompat: true,
			}),
			`PUT /mmds/config {"network_interfaces":["eth0"],"version":"V2","ipv4_address":"169.254.170.2","imds_compat":true}`,
		},
		{
			"PutMMDSConfig", with((*client).PutMMDSConfig, firecracker.MMDSConfig{NetworkInterfaces: []string{"eth0"}}),
			`PUT /mmds/config {"network_interfaces":["eth0"]}`,
		},
		{"PutMMDS", with((*client).PutMMDS, any(map[string]any{"a": "<b>"})), `PUT /mmds {"a":"<b>"}`},
		{"PatchMMDS", with((*client).PatchMMDS, any(json.RawMessage(`{"a":null}`))), `PATCH /mmds {"a":null}`},
		{"GetMMDS", discard((*client).GetMMDS), `GET /mmds `},

		{"GetBalloon", discard((*client).GetBalloon), `GET /balloon `},
		{
			"PutBalloon",
			with((*client).PutBalloon,
				firecracker.Balloon{
					AmountMiB: 64, DeflateOnOOM: true, StatsIntervalS: 5, FreePageHinting: true,
					FreePageReporting: true,
				}),
			`PUT /balloon {"amount_mib":64,"deflate_on_oom":true,"stats_polling_interval_s":5,"free_page_hinting":true,"free_page_reporting":true}`,
		},
		{
			"PutBalloon", with((*client).PutBalloon, firecracker.Balloon{}),
			`PUT /balloon {"amount_mib":0,"deflate_on_oom":false}`,
		},
		{"PatchBalloon", with((*client).PatchBalloon, uint32(0)), `PATCH /balloon {"amount_mib":0}`},
		{"GetBalloonStats", discard((*client).GetBalloonStats), `GET /balloon/statistics `},
		{
			"PatchBalloonStats", with((*client).PatchBalloonStats, uint16(9)),
			`PATCH /balloon/statistics {"stats_polling_interval_s":9}`,
		},
		{
			"StartBalloonHinting", with((*client).StartBalloonHinting, false),
			`PATCH /balloon/hinting/start {"acknowledge_on_stop":false}`,
		},
		{"GetBalloonHinting", discard((*client).GetBalloonHinting), `GET /balloon/hinting/status `},
		{"StopBalloonHinting", (*client).StopBalloonHinting, `PATCH /balloon/hinting/stop `},
		{
			"PutMemoryHotplug",
			with((*client).PutMemoryHotplug,
				firecracker.MemoryHotplugConfig{TotalSizeMiB: 1024, SlotSizeMiB: 256, BlockSizeMiB: 4}),
			`PUT /hotplug/memory {"total_size_mib":1024,"slot_size_mib":256,"block_size_mib":4}`,
		},
		{"GetMemoryHotplug", discard((*client).GetMemoryHotplug), `GET /hotplug/memory `},
		{
			"PatchMemoryHotplug", with((*client).PatchMemoryHotplug, uint64(512)),
			`PATCH /hotplug/memory {"requested_size_mib":512}`,
		},

		{"PutEntropy", with((*client).PutEntropy, firecracker.EntropyDevice{}), `PUT /entropy {}`},
		{
			"PutEntropy", with((*client).PutEntropy, firecracker.EntropyDevice{RateLimiter: limits}),
			`PUT /entropy {"rate_limiter":` + limitsJSON + `}`,
		},
		{
			"PutSerial",
			with((*client).PutSerial,
				firecracker.SerialDevice{
					SerialOutPath: "console",
					RateLimiter:   &firecracker.TokenBucket{Size: 9, RefillTimeMs: 1},
				}),
			`PUT /serial {"serial_out_path":"console","rate_limiter":{"size":9,"refill_time":1}}`,
		},
		{
			"PutLogger",
			with((*client).PutLogger,
				firecracker.Logger{
					LogPath: "log", Level: firecracker.LogDebug, ShowLevel: true, ShowLogOrigin: true,
					Module: "vmm",
				}),
			`PUT /logger {"log_path":"log","level":"Debug","show_level":true,"show_log_origin":true,"module":"vmm"}`,
		},
		{
			"PutMetrics", with((*client).PutMetrics, firecracker.Metrics{MetricsPath: "m"}),
			`PUT /metrics {"metrics_path":"m"}`,
		},

		{
			"CreateSnapshot",
			with((*client).CreateSnapshot,
				firecracker.SnapshotCreateParams{SnapshotPath: "s", MemFilePath: "m", SnapshotType: firecracker.SnapshotDiff}),
			`PUT /snapshot/create {"snapshot_path":"s","mem_file_path":"m","snapshot_type":"Diff"}`,
		},
		{
			"LoadSnapshot",
			with((*client).LoadSnapshot, firecracker.SnapshotLoadParams{
				SnapshotPath: "s", MemBackend: &firecracker.MemBackend{BackendType: firecracker.MemBackendUffd, BackendPath: "u"},
				TrackDirtyPages: true, ResumeVM: true,
				NetworkOverrides: []firecracker.NetworkOverride{{IfaceID: "eth0", HostDevName: "tap1"}},
				VsockOverride:    &firecracker.VsockOverride{UDSPath: "v2.sock"}, ClockRealtime: true,
			}),
			`PUT /snapshot/load {"snapshot_path":"s","mem_backend":{"backend_type":"Uffd","backend_path":"u"},"track_dirty_pages":true,` +
				`"resume_vm":true,"network_overrides":[{"iface_id":"eth0","host_dev_name":"tap1"}],"vsock_override":{"uds_path":"v2.sock"},"clock_realtime":true}`,
		},
		{
			"LoadSnapshot",
			with((*client).LoadSnapshot,
				firecracker.SnapshotLoadParams{SnapshotPath: "s", MemFilePath: "m", EnableDiffSnapshots: true}),
			`PUT /snapshot/load {"snapshot_path":"s","mem_file_path":"m","enable_diff_snapshots":true}`,
		},
	}
}

func TestClient_requests(t *testing.T) {
	var sent string
	dial, dials := listen(t, answering(func(method, path, body string) string {
		sent = method + " " + path + " " + body
		if method == "GET" {
			return answer(200, `{"firecracker_version":"1.16.1"}`)
		}
		return answer(204, "")
	}))
	c := newClient(t, dial, v1_16_1)
	tested := map[string]bool{"Close": true}
	for _, call := range calls() {
		tested[call.name] = true
		if err := call.do(c, t.Context()); err != nil {
			t.Errorf("%s: %v", call.name, err)
		}
		if diff := cmp.Diff(call.want, sent); diff != "" {
			t.Errorf("%s sent (-want +got):\n%s", call.name, diff)
		}
	}
	for method := range reflect.TypeFor[*firecracker.Client]().Methods() {
		if !tested[method.Name] {
			t.Errorf("no test of %s", method.Name)
		}
	}
	if n := dials.Load(); n != 1 {
		t.Errorf("%d connections, want 1", n)
	}
}

// facts is testdata/api-1.16.txt.
type facts struct {
	endpoints map[string]string // "PUT /drives/{id}" to when it came, "" for always
	fields    map[string]string // "Drive.drive_id" to "!", since, or both
}

func readFacts(t *testing.T) facts {
	t.Helper()
	text, err := os.ReadFile("testdata/api-1.16.txt")
	if err != nil {
		t.Fatal(err)
	}
	f := facts{endpoints: map[string]string{}, fields: map[string]string{}}
	var typeName string
	for line := range strings.Lines(string(text)) {
		words := strings.Fields(line)
		switch {
		case len(words) == 0 || words[0] == "#" || strings.HasPrefix(line, "#"):
		case words[0] == "type" || words[0] == "answer":
			typeName = words[1]
		case typeName != "":
			f.fields[typeName+"."+words[0]] = strings.Join(words[1:], " ")
		default:
			var since string
			if i := slices.Index(words, "since"); i >= 0 {
				since = words[i+1]
			}
			f.endpoints[words[0]+" "+words[1]] = since
		}
	}
	return f
}

var objectID = regexp.MustCompile(`^(\w+ /(?:drives|pmem|network-interfaces))/\w+$`)

func TestClient_endpointsAreThePublished(t *testing.T) {
	want := readFacts(t).endpoints
	got := map[string]string{}
	for _, call := range calls() {
		method, rest, _ := strings.Cut(call.want, " ")
		path, _, _ := strings.Cut(rest, " ")
		endpoint := objectID.ReplaceAllString(method+" "+path, "$1/{id}")
		got[endpoint] = want[endpoint]
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("endpoints (-published +ours):\n%s", diff)
	}
}

func TestTypes_fieldsAreThePublished(t *testing.T) {
	want := readFacts(t).fields
	got := map[string]string{}
	for typ, isAnswer := range types() {
		for field := range typ.Fields() {
			name, options, _ := strings.Cut(field.Tag.Get("json"), ",")
			var words []string
			if options == "" && !isAnswer {
				words = append(words, "!")
			}
			if since := field.Tag.Get("since"); since != "" {
				words = append(words, "since", since)
			}
			got[typ.Name()+"."+name] = strings.Join(words, " ")
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("fields (-published +ours):\n%s", diff)
	}
}

// types lists the exported types of bodies, true for those that are only received.
func types() map[reflect.Type]bool {
	return map[reflect.Type]bool{
		reflect.TypeFor[firecracker.BootSource]():                  false,
		reflect.TypeFor[firecracker.MachineConfiguration]():        false,
		reflect.TypeFor[firecracker.PartialMachineConfiguration](): false,
		reflect.TypeFor[firecracker.CPUConfig]():                   false,
		reflect.TypeFor[firecracker.CPUIDLeaf]():                   false,
		reflect.TypeFor[firecracker.CPUIDModifier]():               false,
		reflect.TypeFor[firecracker.RegisterModifier]():            false,
		reflect.TypeFor[firecracker.VCPUFeature]():                 false,
		reflect.TypeFor[firecracker.Drive]():                       false,
		reflect.TypeFor[firecracker.PartialDrive]():                false,
		reflect.TypeFor[firecracker.RateLimiter]():                 false,
		reflect.TypeFor[firecracker.TokenBucket]():                 false,
		reflect.TypeFor[firecracker.NetworkInterface]():            false,
		reflect.TypeFor[firecracker.PartialNetworkInterface]():     false,
		reflect.TypeFor[firecracker.Pmem]():                        false,
		reflect.TypeFor[firecracker.PartialPmem]():                 false,
		reflect.TypeFor[firecracker.Vsock]():                       false,
		reflect.TypeFor[firecracker.EntropyDevice]():               false,
		reflect.TypeFor[firecracker.SerialDevice]():                false,
		reflect.TypeFor[firecracker.Balloon]():                     false,
		reflect.TypeFor[firecracker.MemoryHotplugConfig]():         false,
		reflect.TypeFor[firecracker.MMDSConfig]():                  false,
		reflect.TypeFor[firecracker.Logger]():                      false,
		reflect.TypeFor[firecracker.Metrics]():                     false,
		reflect.TypeFor[firecracker.SnapshotCreateParams]():        false,
		reflect.TypeFor[firecracker.SnapshotLoadParams]():          false,
		reflect.TypeFor[firecracker.MemBackend]():                  false,
		reflect.TypeFor[firecracker.NetworkOverride]():             false,
		reflect.TypeFor[firecracker.VsockOverride]():               false,
		reflect.TypeFor[firecracker.FullVMConfiguration]():         false,
		reflect.TypeFor[firecracker.InstanceInfo]():                true,
		reflect.TypeFor[firecracker.BalloonStats]():                true,
		reflect.TypeFor[firecracker.BalloonHinting]():              true,
		reflect.TypeFor[firecracker.MemoryHotplugStatus]():         true,
	}
}

// TestClient_lenient decodes an answer of a VMM newer than us.
func TestClient_lenient(t *testing.T) {
	dial, _ := listen(t, answering(func(_, path, _ string) string {
		return answer(200, map[string]string{
			"/":               `{"app_name":"Firecracker","id":"vm","state":"Hibernated","vmm_version":"2.0.0","mood":["good"]}`,
			"/machine-config": `{"vcpu_count":1,"mem_size_mib":128,"smt":false,"huge_pages":"Transparent","cpu_template":null,"x":{}}`,
			"/vm/config": `{"balloon":null,"drives":[{"drive_id":"d","partuuid":null,"is_root_device":false,"rate_limiter":null}],
				"boot-source":null,"cpu-config":null,"mmds-config":{"version":"V2","network_interfaces":["eth0"],"ipv4_address":null},"quantum":1}`,
			"/balloon/statistics":     `{"target_pages":1,"actual_pages":2,"target_mib":3,"actual_mib":4,"free_memory":0,"total_memory":null,"new":1}`,
			"/balloon/hinting/status": `{"host_cmd":4294967295,"guest_cmd":null}`,
		}[path])
	}))
	c := newClient(t, dial, v1_16_1)
	info, err := c.GetInstanceInfo(t.Context())
	check(t, err, firecracker.InstanceInfo{ID: "vm", State: "Hibernated", VMMVersion: "2.0.0", AppName: "Firecracker"},
		info)
	machine, err := c.GetMachineConfig(t.Context())
	check(t, err, firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: 128, HugePages: "Transparent"}, machine)
	config, err := c.GetVMConfig(t.Context())
	check(t, err, firecracker.FullVMConfiguration{
		Drives:     []firecracker.Drive{{DriveID: "d"}},
		MMDSConfig: &firecracker.MMDSConfig{Version: firecracker.MMDSV2, NetworkInterfaces: []string{"eth0"}},
	}, config)
	stats, err := c.GetBalloonStats(t.Context())
	check(t, err,
		firecracker.BalloonStats{TargetPages: 1, ActualPages: 2, TargetMiB: 3, ActualMiB: 4, FreeMemory: new(uint64)}, stats)
	hinting, err := c.GetBalloonHinting(t.Context())
	check(t, err, firecracker.BalloonHinting{HostCommand: 4294967295}, hinting)
}

func check[T any](t *testing.T, err error, want, got T) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(want, got, cmp.Comparer(func(a, b netip.Addr) bool { return a == b })); diff != "" {
		t.Errorf("answer (-want +got):\n%s", diff)
	}
}

func TestFullVMConfiguration(t *testing.T) {
	document, err := json.Marshal(firecracker.FullVMConfiguration{
		BootSource:    &firecracker.BootSource{KernelImagePath: "kernel"},
		Drives:        []firecracker.Drive{},
		MachineConfig: &firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: 64},
		Balloon:       &firecracker.Balloon{},
		Entropy:       &firecracker.EntropyDevice{RateLimiter: limits},
	})
	if err != nil {
		t.Fatal(err)
	}
	const want = `{"boot-source":{"kernel_image_path":"kernel"},"drives":[],"machine-config":{"vcpu_count":1,"mem_size_mib":64},` +
		`"balloon":{"amount_mib":0,"deflate_on_oom":false},"entropy":{"rate_limiter":` + limitsJSON + `}}`
	if diff := cmp.Diff(want, string(document)); diff != "" {
		t.Errorf("document (-want +got):\n%s", diff)
	}
}
