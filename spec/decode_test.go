package spec_test

import (
	"encoding/json"
	"errors"
	"net/netip"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	vmspec "push.rocks/smartvm/spec"
)

// originalSpec holds every field of the original package's machine configuration, fullSpec ours on
// top.
const originalSpec = `{
  "id": "my-vm-1",
  "bootSource": {
    "kernelImagePath": "/srv/vmlinux", "initrdPath": "/srv/initrd.img", "bootArgs": "console=ttyS0 reboot=k panic=1 pci=off"
  },
  "machineConfig": {
    "vcpuCount": 2, "memSizeMib": 256, "smt": true, "cpuTemplate": "T2", "trackDirtyPages": true, "hugePages": "2M"
  },
  "drives": [
    {
      "driveId": "rootfs", "pathOnHost": "/srv/rootfs.ext4", "isRootDevice": true, "isReadOnly": true,
      "partuuid": "0eaa91a0-01", "cacheType": "Unsafe", "ioEngine": "Sync", "ephemeral": true,
      "rateLimiter": {
        "bandwidth": {"size": 1048576, "oneTimeBurst": 4096, "refillTime": 100},
        "ops": {"size": 1000, "oneTimeBurst": 10, "refillTime": 1000}
      }
    },
    {"driveId": "data_2", "pathOnHost": "data.img", "isRootDevice": false, "cacheType": "Writeback", "ioEngine": "Async", "ephemeral": false}
  ],
  "networkInterfaces": [
    {
      "ifaceId": "eth0", "hostDevName": "tap0", "guestMac": "06:00:AC:10:00:02",
      "rxRateLimiter": {"bandwidth": {"size": 1048576, "refillTime": 100}},
      "txRateLimiter": {"ops": {"size": 1000, "refillTime": 1000}}
    }
  ],
  "vsock": {"guestCid": 3, "udsPath": "/tmp/vsock.sock"},
  "balloon": {"amountMib": 64, "deflateOnOom": true, "statsPollingIntervalS": 5},
  "mmds": {"version": "V2", "networkInterfaces": ["eth0"], "ipv4Address": "169.254.169.254"},
  "logger": {"logPath": "/tmp/vm.log", "level": "Info", "showLevel": true, "showLogOrigin": true},
  "metrics": {"metricsPath": "/tmp/metrics.fifo"}
}`

const oursSpec = `{
  "id": "my-vm-2", "name": "web.1", "labels": {"team": "a", "empty": ""},
  "bootSource": {"kernelImagePath": "vmlinux"},
  "machineConfig": {"vcpuCount": 1, "memSizeMib": 128},
  "networkInterfaces": [{"ifaceId": "eth0", "hostDevName": "tap0", "mtu": 1400}, {"ifaceId": "eth1", "network": "lan", "ip": "10.77.0.5"}],
  "ports": [{"hostIp": "127.0.0.1", "hostPort": 8080, "guestPort": 80, "protocol": "udp"}],
  "policy": {"defaultAction": "deny", "rules": [{"action": "allow", "protocol": "tcp", "destination": "10.0.0.0/8"}], "allowHost": true, "egress": "public"},
  "dns": ["1.1.1.1", "fd00::53"],
  "drives": [{"driveId": "data", "pathOnHost": "data.img", "isRootDevice": false, "discard": false}],
  "balloon": {"amountMib": 128, "deflateOnOom": false, "freePageHinting": true, "freePageReporting": true},
  "mmds": {"networkInterfaces": ["eth0"], "imdsCompat": true},
  "metrics": {"metricsPath": "/srv/metrics", "emitId": true, "properties": {"customer": "1234"}},
  "entropy": {"rateLimiter": {"bandwidth": {"size": 1, "refillTime": 1}}},
  "serial": {"rateLimiter": {"size": 65536, "refillTime": 1000}},
  "pmem": [{
    "id": "pmem0", "pathOnHost": "/srv/pmem.img", "isRootDevice": true, "isReadOnly": true, "ephemeral": true,
    "rateLimiter": {"ops": {"size": 1, "refillTime": 1}}
  }],
  "memoryHotplug": {"totalSizeMib": 1024, "slotSizeMib": 256, "blockSizeMib": 4},
  "cpuConfig": {"kvm_capabilities": ["!121"]},
  "pci": true
}`

const imageSpec = `{
  "networkInterfaces": [{"ifaceId": "eth0", "namespace": true}],
  "bootSource": {}, "machineConfig": {"vcpuCount": 1, "memSizeMib": 512},
  "ports": [{"hostPort": 0, "guestPort": 443}], "publishAll": true,
  "image": "debian:12", "kernel": "host", "scratch": {"sizeMib": 512, "keep": "db"}, "hostname": "web", "dnsSearch": ["a.example", "b.example"],
  "extraHosts": [{"name": "db.example", "ip": "fd00::7"}, {"name": "host", "hostGateway": true}],
  "entrypoint": ["/bin/sh", "-c"], "command": ["id"], "env": ["A=b"], "user": "nobody", "workingDir": "/tmp", "systemd": "always",
  "envFiles": ["/srv/env"], "secrets": [{"name": "key", "path": "/srv/key"}],
  "volumes": [{"source": "/srv/www", "target": "/www", "readOnly": true}, {"source": "/srv/src", "target": "/src", "sync": true}],
  "namedVolumes": [{"name": "db", "target": "/data", "sizeMib": 64, "readOnly": true}]
}`

// An empty entrypoint is not none.
const clearedSpec = `{"image": "a", "bootSource": {}, "machineConfig": {"vcpuCount": 1, "memSizeMib": 128}, "entrypoint": [], "command": ["id"]}`

func TestParseSpec_RoundTrip(t *testing.T) {
	for name, in := range map[string]string{
		"original": originalSpec, "ours": oursSpec, "image": imageSpec,
		"cleared": clearedSpec,
	} {
		t.Run(name, func(t *testing.T) {
			spec, err := vmspec.Parse([]byte(in))
			if err != nil {
				t.Fatal(err)
			}
			if err := spec.Validate(); err != nil {
				t.Errorf("validate: %v", err)
			}
			out, err := json.Marshal(spec)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(decodeAny(t, []byte(in)), decodeAny(t, out)); diff != "" {
				t.Errorf("-in +out:\n%s", diff)
			}
		})
	}
}

// TestParseSpec_SamplesAreWhole sees to it that a field added to Spec is added to the samples
// above.
func TestParseSpec_SamplesAreWhole(t *testing.T) {
	source, err := os.ReadFile("spec.go")
	if err != nil {
		t.Fatal(err)
	}
	tags := strings.Split(string(source), "`json:\"")[1:]
	if len(tags) < 60 {
		t.Fatalf("found %d JSON fields in spec.go, expected more", len(tags))
	}
	for _, tag := range tags {
		name, _, _ := strings.Cut(tag[:strings.IndexByte(tag, '"')], ",")
		if !strings.Contains(originalSpec+oursSpec+imageSpec, `"`+name+`":`) {
			t.Errorf("no sample has the field %q", name)
		}
	}
}

func TestParseSpec_NullIsAbsence(t *testing.T) {
	in := `{"labels":null,"drives":null,"vsock":null,"cpuConfig":null,"networkInterfaces":[{"ifaceId":"a","rxRateLimiter":null}]}`
	got, err := vmspec.Parse([]byte(in))
	if err != nil {
		t.Fatal(err)
	}
	want := vmspec.Spec{NetworkInterfaces: []vmspec.NetworkInterface{{IfaceID: "a"}}}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

func TestParseSpec_Refuses(t *testing.T) {
	tests := []struct {
		name, in string
		want     []vmspec.FieldError
	}{
		{"empty", "", []vmspec.FieldError{{Path: "$", Reason: "is empty"}}},
		{
			"syntax", "{\n  \"id\": \"a\",\n}",
			[]vmspec.FieldError{
				{Path: "$", Reason: "line 3, column 1: invalid character '}' looking for beginning of object key string"},
			},
		},
		{
			"too long", `{"id":"` + strings.Repeat("a", vmspec.MaxBytes) + `"}`,
			[]vmspec.FieldError{{Path: "$", Reason: "is 1048585 bytes long, more than the 1048576 allowed"}},
		},
		{
			"everything at once",
			`{"ID":"a","bootSource":{"kernel_image_path":"k"},"machineConfig":{"vcpuCount":"2","memSizeMib":1.5,"smt":null},
			  "drives":[{"driveId":"a","driveId":"b"},{"socket":"/s"}],"balloon":{"amountMib":-1},"vsock":{"guestCid":4294967296}}`,
			[]vmspec.FieldError{
				{Path: "ID", Reason: `unknown field, did you mean "id"?`},
				{Path: "bootSource.kernel_image_path", Reason: `unknown field, did you mean "kernelImagePath"?`},
				{Path: "machineConfig.vcpuCount", Value: "2", Reason: "must be a number, not a string"},
				{
					Path: "machineConfig.memSizeMib", Value: json.Number("1.5"),
					Reason: "must be a whole number from -9223372036854775808 to 9223372036854775807",
				},
				{Path: "machineConfig.smt", Reason: "must be a boolean, not null"},
				{Path: "drives[0].driveId", Reason: "is given more than once"},
				{Path: "drives[1].socket", Reason: "unknown field"},
				{Path: "balloon.amountMib", Value: json.Number("-1"), Reason: "must be a whole number from 0 to 4294967295"},
				{Path: "vsock.guestCid", Value: json.Number("4294967296"), Reason: "must be a whole number from 0 to 4294967295"},
			},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			spec, err := vmspec.Parse([]byte(tt.in))
			if diff := cmp.Diff(vmspec.Spec{}, spec, cmpopts.EquateComparable(netip.Addr{})); diff != "" {
				t.Errorf("an error came with a value:\n%s", diff)
			}
			if diff := cmp.Diff(tt.want, fieldErrors(t, err)); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func FuzzParse(f *testing.F) {
	for _, seed := range []string{
		originalSpec, oursSpec, `{}`, `{"cpuConfig":null}`,
		`{"memoryHotplug":{"slotSizeMib":-1,"blockSizeMib":-9223372036854775808}}`,
		`{"networkInterfaces":[{"guestMac":"01:00:5e-00:00:01"}],"mmds":{"ipv4Address":"::ffff:169.254.1.1"}}`,
		`{"labels":{"\ud800":"\u0000"},"name":"é","cpuConfig":{"<":1}}`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		spec, err := vmspec.Parse(data)
		if err != nil {
			fieldErrors(t, err)
			return
		}
		valid := spec.Validate()
		if valid != nil {
			fieldErrors(t, valid)
		}
		first, err := json.Marshal(spec)
		if err != nil {
			t.Fatal(err)
		}
		again, err := vmspec.Parse(first)
		if len(first) > vmspec.MaxBytes && err != nil {
			return // escapes may lengthen it
		}
		if err != nil {
			t.Fatalf("refused its own output %s: %v", first, err)
		}
		second, err := json.Marshal(again)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(first), string(second)); diff != "" {
			t.Errorf("-first +second:\n%s", diff)
		}
		if (valid == nil) != (again.Validate() == nil) {
			t.Errorf("validity changed on the way: %v, %v", valid, again.Validate())
		}
	})
}

// fieldErrors takes an error apart and fails the test where it is not made of complete
// *FieldErrors.
func fieldErrors(t *testing.T, err error) []vmspec.FieldError {
	t.Helper()
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		t.Fatalf("not joined errors: %v", err)
	}
	var all []vmspec.FieldError
	for _, err := range joined.Unwrap() {
		var e *vmspec.FieldError
		if !errors.As(err, &e) || e.Path == "" || e.Reason == "" {
			t.Fatalf("not a complete problem: %#v", err)
		}
		all = append(all, *e)
	}
	return all
}

func decodeAny(t *testing.T, data []byte) (v any) {
	t.Helper()
	if err := json.Unmarshal(data, &v); err != nil {
		t.Fatal(err)
	}
	return v
}
