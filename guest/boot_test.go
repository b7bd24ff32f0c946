package guest_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/iotest"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/guest"
)

// addresses makes addresses comparable.
var addresses = cmpopts.EquateComparable(netip.Addr{}, netip.Prefix{})

func full() *guest.Boot {
	return &guest.Boot{
		RootDevice: "/dev/vda", RootType: guest.Squashfs, ScratchDevice: "/dev/vdb", ModulesDevice: "/dev/vdd",
		Hostname: "web-1.example",
		Command:  []string{"/bin/sh", "-c", "echo '<&>' ü\n"}, Env: []string{"A=1", "B="},
		User: "web:1000", WorkingDir: "/srv", Init: true, Directories: []string{"/data", "/srv/db"}, StopSignal: "SIGRTMIN+3",
		Interfaces: []guest.Interface{{
			MAC: "06:00:ac:10:00:02", Name: "eth0", MTU: 1400,
			Addresses: []netip.Prefix{netip.MustParsePrefix("172.30.0.2/24"), netip.MustParsePrefix("fd00::2/64")},
			Gateways:  []netip.Addr{netip.MustParseAddr("172.30.0.1"), netip.MustParseAddr("fd00::1")},
		}},
		Disks: []guest.Disk{{Device: "/dev/vdc", Target: "/data"}, {Device: "/dev/vdd", Target: "/srv/web", ReadOnly: true}},
		DNS:   []netip.Addr{netip.MustParseAddr("172.30.0.1")}, Search: []string{"example.com"},
		Hosts: []guest.Host{{Name: "db.example", Address: netip.MustParseAddr("fd00::7")}},
	}
}

func encode(t testing.TB, b *guest.Boot) []byte {
	t.Helper()
	data, err := b.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func TestEncode(t *testing.T) {
	for name, want := range map[string]*guest.Boot{
		"full":  full(),
		"least": {RootDevice: "/dev/vda", RootType: guest.Ext4},
		"long":  {RootDevice: "/dev/vda", RootType: guest.Erofs, Command: []string{strings.Repeat("x", 200<<10)}},
	} {
		data := encode(t, want)
		if len(data)%4096 != 0 || len(data) > guest.MaxSize {
			t.Errorf("%s: %d bytes", name, len(data))
		}
		// What follows on a drive does not matter.
		got, err := guest.Decode(io.MultiReader(bytes.NewReader(data), strings.NewReader("rest")))
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if diff := cmp.Diff(want, got, addresses); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}

func TestEncode_Invalid(t *testing.T) {
	for name, change := range map[string]func(*guest.Boot){
		"NoRoot":          func(b *guest.Boot) { b.RootDevice = "" },
		"RootElsewhere":   func(b *guest.Boot) { b.RootDevice = "/dev/../etc/passwd" },
		"RootType":        func(b *guest.Boot) { b.RootType = "overlay" },
		"Modules":         func(b *guest.Boot) { b.ModulesDevice = "/dev/../sda" },
		"Scratch":         func(b *guest.Boot) { b.ScratchDevice = "vdb" },
		"DiskElsewhere":   func(b *guest.Boot) { b.Disks[0].Device = "/etc/passwd" },
		"DiskOnRoot":      func(b *guest.Boot) { b.Disks[1].Target = "/" },
		"DiskAbove":       func(b *guest.Boot) { b.Disks[1].Target = "/srv/../etc" },
		"ScratchIsRoot":   func(b *guest.Boot) { b.ScratchDevice = b.RootDevice },
		"HostnameLong":    func(b *guest.Boot) { b.Hostname = strings.Repeat("h", 65) },
		"HostnameLines":   func(b *guest.Boot) { b.Hostname = "a\nb" },
		"CommandUnnamed":  func(b *guest.Boot) { b.Command = []string{"", "x"} },
		"CommandNUL":      func(b *guest.Boot) { b.Command = []string{"a\x00b"} },
		"CommandNotUTF8":  func(b *guest.Boot) { b.Command = []string{"a\xff"} },
		"EnvWithoutValue": func(b *guest.Boot) { b.Env = []string{"A"} },
		"EnvWithoutName":  func(b *guest.Boot) { b.Env = []string{"=A"} },
		"UserNUL":         func(b *guest.Boot) { b.User = "\x00" },
		"Directory":       func(b *guest.Boot) { b.Directories = []string{"/data/"} },
		"DirectoryRoot":   func(b *guest.Boot) { b.Directories = []string{"/"} },
		"Directories":     func(b *guest.Boot) { b.Directories = slices.Repeat([]string{"/a"}, guest.MaxDirectories+1) },
		"WorkingDir":      func(b *guest.Boot) { b.WorkingDir = "srv" },
		"MAC":             func(b *guest.Boot) { b.Interfaces[0].MAC = "06:00:AC:10:00:02" },
		"InterfaceName":   func(b *guest.Boot) { b.Interfaces[0].Name = "../eth0" },
		"MTU":             func(b *guest.Boot) { b.Interfaces[0].MTU = 67 },
		"Address":         func(b *guest.Boot) { b.Interfaces[0].Addresses[0] = netip.Prefix{} },
		"Gateways":        func(b *guest.Boot) { b.Interfaces[0].Gateways[1] = b.Interfaces[0].Gateways[0] },
		"DNS":             func(b *guest.Boot) { b.DNS = make([]netip.Addr, 4) },
		"Search":          func(b *guest.Boot) { b.Search = []string{"a\nnameserver"} },
		"HostName":        func(b *guest.Boot) { b.Hosts[0].Name = "db\n127.0.0.1 bank.example" },
		"HostAddress":     func(b *guest.Boot) { b.Hosts[0].Address = netip.Addr{} },
		"Hosts":           func(b *guest.Boot) { b.Hosts = slices.Repeat(b.Hosts, 129) },
		"StopSignal":      func(b *guest.Boot) { b.StopSignal = "SIGSTOPPED" },
	} {
		b := full()
		change(b)
		if _, err := b.Encode(); !errors.Is(err, guest.ErrInvalid) {
			t.Errorf("%s: got error %v, want %v", name, err, guest.ErrInvalid)
		}
	}
	b := full()
	b.Env = []string{"A=" + strings.Repeat("x", guest.MaxSize)}
	if _, err := b.Encode(); !errors.Is(err, guest.ErrTooLarge) {
		t.Errorf("got error %v, want %v", err, guest.ErrTooLarge)
	}
}

func TestDecode_Invalid(t *testing.T) {
	block := func(doc string) string { return fmt.Sprintf("smartvm-boot 1 %d\n%s", len(doc), doc) }
	const least = `{"rootDevice":"/dev/vda","rootType":"ext4"}`
	if _, err := guest.Decode(strings.NewReader(block(least))); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]error{
		"":                                      guest.ErrNoBoot,
		"smartvm-boo":                           guest.ErrNoBoot,
		" " + block(least):                      guest.ErrNoBoot,
		strings.Repeat("\x00", 8192):            guest.ErrNoBoot,
		"smartvm-boot ":                         guest.ErrInvalid,
		"smartvm-boot 1":                        guest.ErrInvalid,
		"smartvm-boot 1 \n":                     guest.ErrInvalid,
		"smartvm-boot 1 -1\n" + least:           guest.ErrInvalid,
		"smartvm-boot 1 99999999999999999999\n": guest.ErrInvalid,
		strings.Replace(block(least), " 1 ", " 2 ", 1): guest.ErrInvalid,
		block(least)[:40]:    guest.ErrInvalid,
		block(least + least): guest.ErrInvalid,
		block(`{}`):          guest.ErrInvalid,
		block(`null`):        guest.ErrInvalid,
		block(`{"rootDevice":"/dev/vda","rootType":"ext4","init":"/x"}`): guest.ErrInvalid,
		block(`{"rootDevice":"/dev/vda","rootType":1}`):                  guest.ErrInvalid,
		block(strings.Repeat("[", 200<<10)):                              guest.ErrInvalid,
	} {
		if _, err := guest.Decode(strings.NewReader(text)); !errors.Is(err, want) {
			t.Errorf("%.60q: got error %v, want %v", text, err, want)
		}
	}
	if _, err := guest.Decode(iotest.ErrReader(io.ErrClosedPipe)); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("got error %v, want that of the reader", err)
	}
}

// endless is a drive without an end.
type endless struct{ read int }

func (e *endless) Read(p []byte) (int, error) {
	e.read += len(p)
	return len(p), nil
}

func TestDecode_Bounded(t *testing.T) {
	var e endless
	_, err := guest.Decode(io.MultiReader(strings.NewReader("smartvm-boot 1 2147483647\n"), &e))
	if !errors.Is(err, guest.ErrInvalid) || e.read > guest.MaxSize {
		t.Errorf("read %d bytes: %v", e.read, err)
	}
}

func TestParseSignal(t *testing.T) {
	for text, want := range map[string]syscall.Signal{
		"SIGTERM": syscall.SIGTERM, "term": syscall.SIGTERM, "sigquit": syscall.SIGQUIT, "9": syscall.SIGKILL, "64": 64,
		"SIGRTMIN": 34, "RTMIN+3": 37, "SIGRTMAX-1": 63, "SIGRTMAX": 64,
		"": 0, "0": 0, "65": 0, "-1": 0, "+15": 0, "SIG": 0, "SIG15": 0, "SIGRTMIN-1": 0, "SIGRTMIN+31": 0,
		"SIGRTMAX+1": 0, "RTMIN3": 0,
		"RTMAX-99": 0, "RTMIN+999999999999": 0, "TERMINATE": 0,
	} {
		got, err := guest.ParseSignal(text)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: got %d, %v, want %d", text, got, err, want)
		}
	}
}

// FuzzDecode: what is accepted comes back the same when it is encoded again.
func FuzzDecode(f *testing.F) {
	data := encode(f, full())
	f.Add(data)
	f.Add(data[:30])
	f.Add([]byte("smartvm-boot 1 2\n{}"))
	f.Add([]byte("smartvm-boot 1 0\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		want, err := guest.Decode(bytes.NewReader(data))
		if err != nil {
			return
		}
		data, err = want.Encode()
		if errors.Is(err, guest.ErrTooLarge) {
			return // escapes may be longer than what they stand for
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := guest.Decode(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got, addresses, cmpopts.EquateEmpty()); diff != "" {
			t.Error(diff)
		}
	})
}

// Drives are called as Linux does (virtblk_name_format in drivers/block/virtio_blk.c).
func TestDriveDevice(t *testing.T) {
	for n, want := range map[int]string{
		1: "/dev/vda", 26: "/dev/vdz", 27: "/dev/vdaa", 52: "/dev/vdaz", 53: "/dev/vdba",
		702: "/dev/vdzz", 703: "/dev/vdaaa",
	} {
		if got := guest.DriveDevice(n); got != want {
			t.Errorf("drive %d: %s, want %s", n, got, want)
		}
	}
}
