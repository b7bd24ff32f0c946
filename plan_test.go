package smartvm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/fakefc"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

var update = flag.Bool("update", false, "write the golden files anew")

// sampleSpec is the original package's sample, every field of it, with paths of a site.
const sampleSpec = `{
  "id": "my-vm-1",
  "bootSource": {"kernelImagePath": "$DIR/kernel", "initrdPath": "$DIR/disk", "bootArgs": "console=ttyS0 reboot=k panic=1 pci=off"},
  "machineConfig": {
    "vcpuCount": 2, "memSizeMib": 256, "smt": true, "cpuTemplate": "T2", "trackDirtyPages": true, "hugePages": "2M"
  },
  "drives": [
    {
      "driveId": "rootfs", "pathOnHost": "$DIR/disk", "isRootDevice": true, "isReadOnly": true,
      "partuuid": "0eaa91a0-01", "cacheType": "Unsafe", "ioEngine": "Sync",
      "rateLimiter": {
        "bandwidth": {"size": 1048576, "oneTimeBurst": 4096, "refillTime": 100},
        "ops": {"size": 1000, "oneTimeBurst": 10, "refillTime": 1000}
      }
    },
    {"driveId": "data_2", "pathOnHost": "$DIR/disk", "isRootDevice": false, "cacheType": "Writeback", "ioEngine": "Async"}
  ],
  "networkInterfaces": [
    {
      "ifaceId": "eth0", "hostDevName": "tap0", "guestMac": "06:00:AC:10:00:02",
      "rxRateLimiter": {"bandwidth": {"size": 1048576, "refillTime": 100}},
      "txRateLimiter": {"ops": {"size": 1000, "refillTime": 1000}}
    }
  ],
  "vsock": {"guestCid": 3, "udsPath": "$DIR/vsock.sock"},
  "balloon": {"amountMib": 64, "deflateOnOom": true, "statsPollingIntervalS": 5},
  "mmds": {"version": "V2", "networkInterfaces": ["eth0"], "ipv4Address": "169.254.169.254"},
  "logger": {"logPath": "$DIR/vm.log", "level": "Info", "showLevel": true, "showLogOrigin": true},
  "metrics": {"metricsPath": "$DIR/metrics"}
}`

func TestPlan(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	no, yes := false, true
	for _, tt := range []struct {
		name  string
		setUp func(t *testing.T, site *faultSite)
	}{
		{"minimal", func(_ *testing.T, s *faultSite) { s.spec.Drives = nil }},
		{"sample", func(t *testing.T, s *faultSite) {
			var err error
			if s.spec, err = spec.Parse([]byte(strings.ReplaceAll(sampleSpec, "$DIR", s.dir))); err != nil {
				t.Fatal(err)
			}
			s.spec.Vsock.UDSPath = filepath.Join(shortDir(t), filepath.Base(s.spec.Vsock.UDSPath))
		}},
		{"jailed", func(t *testing.T, s *faultSite) {
			s.options.Launcher, s.options.JailerBinary = smartvm.LaunchJailed, filepath.Join(s.dir, "jailer")
			if err := os.WriteFile(s.options.JailerBinary, nil, 0o755); err != nil {
				t.Fatal(err)
			}
			s.spec.Name = "named"
			s.spec.Drives = append(s.spec.Drives,
				smartvm.Drive{DriveID: "inplace", PathOnHost: filepath.Join(s.dir, "disk"), Ephemeral: &no})
		}},
		{"inplace", func(_ *testing.T, s *faultSite) { s.spec.Drives[0].Ephemeral = &no }},
		{"nocgroup", func(_ *testing.T, s *faultSite) { s.options = smartvm.WithoutCgroups(s.options) }},
		{"noephemeral", func(_ *testing.T, s *faultSite) { // the host's switch, and drives with their own mind
			s.options.EphemeralWritableDrives = &no
			path := filepath.Join(s.dir, "disk")
			s.spec.Drives = append(s.spec.Drives,
				smartvm.Drive{DriveID: "wants_one", PathOnHost: path, Ephemeral: &yes},
				smartvm.Drive{DriveID: "readonly", PathOnHost: path, IsReadOnly: true},
				smartvm.Drive{DriveID: "readonly_wants_one", PathOnHost: path, IsReadOnly: true, Ephemeral: &yes})
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if tt.name != "nocgroup" {
				testenv.Require(t, testenv.Root) // who can make control groups anywhere
			}
			site := newFaultSite(t, fakefc.Script{})
			tt.setUp(t, site)
			h := site.open(t)
			testenv.NoLeaks(t, site.dir) // planning has no effects
			first := normalPlan(t, h, site)
			if second := normalPlan(t, h, site); !bytes.Equal(first, second) {
				t.Errorf("two plans differ:\n%s", cmp.Diff(string(first), string(second)))
			}
			golden(t, filepath.Join("testdata", "plan", tt.name+".golden.json"), first)
		})
	}
}

// normalPlan is the plan with what differs from run to run replaced.
func normalPlan(t *testing.T, h *smartvm.Host, site *faultSite) []byte {
	t.Helper()
	plan, err := h.Plan(t.Context(), site.spec)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := json.Indent(&out, plan, "", "  "); err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(out.String(), site.dir, "$DIR")
	if v := site.spec.Vsock; v != nil {
		text = strings.ReplaceAll(text, filepath.Dir(v.UDSPath), "$DIR")
	}
	for _, r := range []struct{ pattern, with string }{
		{`"[^"]*/smartvm/` + site.spec.ID + `-[0-9a-f]{8}"`, `"$$CGROUPS/` + site.spec.ID + `-$$NONCE"`},
		{`smartvm/` + site.spec.ID + `-[0-9a-f]{8}/`, `$$PARENT/` + site.spec.ID + `-$$NONCE/`},
		{site.spec.ID + `-[0-9a-f]{8}`, site.spec.ID + `-$$NONCE`},
		{`"?\b(19|20)\d{8}\b"?`, `"$$UID"`}, // chosen by the runtime directory's path
		{`"(name|file)": "[0-9a-f]+:[0-9a-f]+"`, `"$1": "$$INODE"`},
	} {
		text = regexp.MustCompile(r.pattern).ReplaceAllString(text, r.with)
	}
	return append([]byte(text), '\n')
}

// golden compares with a file, or with -update writes it.
func golden(t *testing.T, path string, got []byte) {
	t.Helper()
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("%s: -want +got:\n%s", path, diff)
	}
}

// A guest can trim what it writes where the VMM offers that, unless its drive says otherwise; an
// older VMM is not asked, but by a drive that wants it.
func TestPlan_Discard(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	no, yes := false, true
	for version, want := range map[string]string{"1.16.1": "-----", "1.17.0": "yy---"} {
		site := newFaultSite(t, fakefc.Script{Version: version})
		path := site.spec.Drives[0].PathOnHost
		site.spec.Drives = []smartvm.Drive{
			{DriveID: "copy", PathOnHost: path},
			{DriveID: "inplace", PathOnHost: path, Ephemeral: &no},
			{DriveID: "not", PathOnHost: path, Discard: &no},
			{DriveID: "readonly", PathOnHost: path, IsReadOnly: true},
			{DriveID: "async", PathOnHost: path, IOEngine: "Async"},
		}
		h := site.open(t)
		if got := discards(t, h, site.spec); got != want {
			t.Errorf("%s: the drives have %s, want %s", version, got, want)
		}
		site.spec.Drives[4] = smartvm.Drive{DriveID: "wanted", PathOnHost: path, Discard: &yes}
		if version == "1.17.0" {
			if got := discards(t, h, site.spec); got != "yy--y" {
				t.Errorf("%s: with one that wants it the drives have %s", version, got)
			}
		} else if _, err := h.Plan(t.Context(), site.spec); !errors.Is(err, smartvm.ErrNotSupported) ||
			!strings.Contains(err.Error(), "discard") || !strings.Contains(err.Error(), "1.17.0") {
			t.Errorf("%s: one that wants it: %v", version, err)
		}
	}
}

// discards says of each drive whether the VMM is told to offer discard.
func discards(t *testing.T, h *smartvm.Host, s smartvm.Spec) (got string) {
	t.Helper()
	text, err := h.Plan(t.Context(), s)
	var plan struct {
		Calls []struct {
			Path string
			Body struct{ Discard bool }
		}
	}
	if err = errors.Join(err, json.Unmarshal(text, &plan)); err != nil {
		t.Fatal(err)
	}
	for _, c := range plan.Calls {
		switch {
		case !strings.HasPrefix(c.Path, "/drives/"):
		case c.Body.Discard:
			got += "y"
		default:
			got += "-"
		}
	}
	return got
}
