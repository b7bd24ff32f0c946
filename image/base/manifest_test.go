package base_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/strictjson"
)

type object = map[string]any

// manifest is a good one, but for what change does to it.
func manifest(t testing.TB, change func(m object)) []byte {
	t.Helper()
	m := object{
		"schemaVersion": 1, "bundleId": "alpine-3.22", "name": "Alpine", "arch": "x86_64", "firecrackerVersion": "v1.12.1",
		"rootfsType": "ext4", "rootfsIsReadOnly": false, "bootArgs": "console=ttyS0 quiet",
		"kernel": object{"path": "boot/vmlinux", "fileName": "kernel.bin"},
		"rootfs": object{"path": "root.ext4", "sha256": strings.ToUpper(digest(ext4("alpine"))), "sizeBytes": 4096},
	}
	if change != nil {
		change(m)
	}
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// hosted writes a manifest, and the files that it names beside it.
func hosted(t *testing.T, change func(m object)) base.Options {
	t.Helper()
	dir := t.TempDir()
	err := errors.Join(os.Mkdir(filepath.Join(dir, "boot"), 0o700),
		os.WriteFile(filepath.Join(dir, "boot/vmlinux"), []byte("kernel"), 0o600),
		os.WriteFile(filepath.Join(dir, "root.ext4"), ext4("alpine"), 0o600),
		os.WriteFile(filepath.Join(dir, "manifest.json"), manifest(t, change), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	return base.Options{Dir: filepath.Join(dir, "base"), Arch: "x86_64", ManifestPath: filepath.Join(dir, "manifest.json")}
}

func TestHosted_Path(t *testing.T) {
	o := hosted(t, nil)
	s := open(t, o)
	b := ensure(t, s, base.Hosted)
	if b.ID != "alpine-3.22" || b.Name != "Alpine" || b.FirecrackerVersion != "v1.12.1" || b.RootfsIsReadOnly ||
		b.BootArgs != "console=ttyS0 quiet" ||
		filepath.Base(b.KernelPath) != "kernel.bin" || filepath.Base(b.RootfsPath) != "rootfs.ext4" ||
		b.Kernel.SHA256 != digest([]byte("kernel")) {
		t.Errorf("%+v", b)
	}
	wantFile(t, b.KernelPath, []byte("kernel"))
	wantFile(t, b.RootfsPath, ext4("alpine"))
	// The bundle is a copy: what it was made of may change or go. No network is needed.
	o.Offline = true
	if err := os.RemoveAll(filepath.Join(filepath.Dir(o.ManifestPath), "boot")); err != nil {
		t.Fatal(err)
	}
	wantFile(t, ensure(t, open(t, o), base.Hosted).KernelPath, []byte("kernel"))
}

func TestHosted_URL(t *testing.T) {
	b := newBucket(t, map[string][]byte{
		"images/vmlinux": []byte("kernel"), "files/root.squashfs": squashfs("root"),
	})
	b.put("images/manifest.json", manifest(t, func(m object) {
		delete(m, "rootfsIsReadOnly")
		m["rootfsType"] = "squashfs"
		m["kernel"] = object{"path": "vmlinux", "sha256": digest([]byte("kernel"))} // beside the manifest
		m["rootfs"] = object{
			"url": b.URL + "/bucket/files/root.squashfs?token=secret", "sha256": digest(squashfs("root")),
			"sizeBytes": 8,
		}
	}))
	o := options(t, b, "")
	o.ManifestURL = b.URL + "/bucket/images/manifest.json?token=secret"
	s := open(t, o)
	got := ensure(t, s, base.Hosted)
	wantFile(t, got.KernelPath, []byte("kernel"))
	wantFile(t, got.RootfsPath, squashfs("root"))
	if !got.RootfsIsReadOnly {
		t.Error("a squashfs is said to be writable")
	}
	b.gets()
	ensure(t, s, base.Hosted)
	if diff := cmp.Diff([]string{"manifest.json"}, b.gets()); diff != "" {
		t.Errorf("fetched, -want +got:\n%s", diff)
	}
	// Offline it is what it was.
	b.Close()
	o.Offline = true
	if again := ensure(t, open(t, o), base.Hosted); again.ID != got.ID {
		t.Errorf("%+v", again)
	}
}

func TestHosted_BadFiles(t *testing.T) {
	in := func(part string, change func(f object)) func(m object) {
		return func(m object) { change(m[part].(object)) }
	}
	for name, tt := range map[string]struct {
		change func(m object)
		want   any
	}{
		"another digest": {in("rootfs", func(f object) { f["sha256"] = digest(nil) }), new(*download.DigestError)},
		"another size":   {in("rootfs", func(f object) { f["sizeBytes"] = 4097 }), new(*download.SizeError)},
		"no file":        {in("kernel", func(f object) { f["path"] = "none" }), new(*fs.PathError)},
		"no digest":      {in("kernel", func(f object) { f["sha256"] = digest(nil) }), new(*download.DigestError)},
		"another type":   {func(m object) { m["rootfsType"], m["rootfsIsReadOnly"] = "squashfs", true }, nil},
		"a directory":    {in("kernel", func(f object) { f["path"] = "boot" }), nil},
		"a device":       {in("kernel", func(f object) { f["path"] = "/dev/zero" }), nil},
		"a FIFO":         {in("kernel", func(f object) { f["path"] = "fifo" }), nil},
	} {
		t.Run(name, func(t *testing.T) {
			o := hosted(t, tt.change)
			if err := unix.Mkfifo(filepath.Join(filepath.Dir(o.ManifestPath), "fifo"), 0o600); err != nil {
				t.Fatal(err)
			}
			s := open(t, o)
			_, err := s.Ensure(t.Context(), base.Hosted)
			if tt.want != nil && !errors.As(err, tt.want) || tt.want == nil && !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%v, want %T", err, tt.want)
			}
			wantIDs(t, s)
		})
	}
}

func TestHosted_BadManifest(t *testing.T) {
	in := func(part, key string, value any) func(m object) {
		return func(m object) {
			if m[part].(object)[key] = value; value == nil {
				delete(m[part].(object), key)
			}
		}
	}
	set := func(key string, value any) func(m object) { return func(m object) { m[key] = value } }
	for _, tt := range []struct {
		path   string // of the problem
		change func(m object)
	}{
		{"schemaVersion", set("schemaVersion", 2)},
		{"schemaVersion", set("schemaVersion", 0)},
		{"schemaVersion", func(m object) { delete(m, "schemaVersion") }},
		{"schemaVersion", set("schemaVersion", "1")},
		{"bundleId", set("bundleId", "")},
		{"bundleId", set("bundleId", "..")},
		{"bundleId", set("bundleId", ".work")},
		{"bundleId", set("bundleId", "a/b")},
		{"bundleId", set("bundleId", "ä")},
		{"bundleId", set("bundleId", strings.Repeat("a", 129))},
		{"name", set("name", "a\nb")},
		{"arch", set("arch", "aarch64")},
		{"arch", set("arch", "")},
		{"firecrackerVersion", set("firecrackerVersion", "newest")},
		{"rootfsType", set("rootfsType", "erofs")},
		{"rootfsType", func(m object) { delete(m, "rootfsType") }},
		{"rootfsIsReadOnly", set("rootfsType", "squashfs")}, // false is said
		{"bootArgs", set("bootArgs", strings.Repeat("a", 2048))},
		{"bootArgs", set("bootArgs", "a\nb")},
		{"kernel", set("kernel", nil)},
		{"kernel", func(m object) { delete(m, "kernel") }},
		{"kernel", set("kernel", object{})},
		{"rootfs", set("rootfs", "root.ext4")},
		{"rootfs", in("rootfs", "url", "https://host/both")},
		{"kernel.url", set("kernel", object{"url": "ftp://host/x", "sha256": digest(nil)})},
		{"kernel.url", set("kernel", object{"url": "/x", "sha256": digest(nil)})},
		{"kernel.url", set("kernel", object{"url": "https:///x", "sha256": digest(nil)})},
		{"kernel.sha256", set("kernel", object{"url": "https://host/x"})},
		{"kernel.sha256", set("kernel", object{"url": "https://host/x", "sha256": ""})},
		{"rootfs.sha256", in("rootfs", "sha256", "abc")},
		{"rootfs.sha256", in("rootfs", "sha256", strings.Repeat("zz", 32))},
		{"rootfs.sizeBytes", in("rootfs", "sizeBytes", -1)},
		{"kernel.path", in("kernel", "path", "a\x00b")},
		{"kernel.fileName", in("kernel", "fileName", "a/b")},
		{"kernel.fileName", in("kernel", "fileName", `a\b`)},
		{"kernel.fileName", in("kernel", "fileName", "..")},
		{"kernel.fileName", in("kernel", "fileName", ".hidden")},
		{"kernel.fileName", in("kernel", "fileName", "a\nb")},
		{"kernel.fileName", in("kernel", "fileName", "bundle.json")},
		{"kernel.fileName", in("kernel", "fileName", "bundle.json.tmp")},
		{"kernel.fileName", in("kernel", "fileName", "users")},
		{"kernel.fileName", in("kernel", "fileName", "rootfs.ext4.partial")},
		{"rootfs.fileName", in("kernel", "fileName", "rootfs.ext4")},
		{"hooks", set("hooks", []string{"rm"})},
		{"kernel.mode", in("kernel", "mode", 1)},
	} {
		s := open(t, hosted(t, tt.change))
		_, err := s.Ensure(t.Context(), base.Hosted)
		var bad *base.ManifestError
		var field *strictjson.Error
		if !errors.As(err, &bad) || !errors.As(err, &field) || field.Path != tt.path {
			t.Errorf("%s: %v", tt.path, err)
		}
		wantIDs(t, s)
	}
}

func TestHosted_NoManifest(t *testing.T) {
	for name, data := range map[string]string{
		"no JSON": "hello", "empty": "",
		"too long": strings.Repeat(" ", 1<<20) + "{}", "an array": "[]",
	} {
		o := hosted(t, nil)
		if err := os.WriteFile(o.ManifestPath, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := open(t, o).Ensure(t.Context(), base.Hosted); !errors.As(err, new(*base.ManifestError)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	o := hosted(t, nil)
	if err := os.Remove(o.ManifestPath); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, o).Ensure(t.Context(), base.Hosted); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if err := unix.Mkfifo(o.ManifestPath, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := open(t, o).Ensure(t.Context(), base.Hosted); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("a FIFO: %v", err)
	}
}

// A manifest from elsewhere gets nothing of this machine.
func TestHosted_URLNamesAFile(t *testing.T) {
	b := newBucket(t, map[string][]byte{})
	b.put("m.json", manifest(t, func(m object) { m["kernel"] = object{"path": "/etc/shadow", "sha256": digest(nil)} }))
	o := options(t, b, "")
	o.ManifestURL = b.URL + "/bucket/m.json?token=secret"
	_, err := open(t, o).Ensure(t.Context(), base.Hosted)
	var field *strictjson.Error
	if !errors.As(err, &field) || field.Path != "kernel.path" || strings.Contains(err.Error(), "secret") {
		t.Errorf("%v", err)
	}
	b.set(func(w http.ResponseWriter, _ *http.Request) bool { w.WriteHeader(http.StatusNotFound); return true })
	if _, err := open(t, o).Ensure(t.Context(), base.Hosted); !errors.As(err, new(*download.StatusError)) ||
		strings.Contains(err.Error(), "secret") {
		t.Errorf("%v", err)
	}
}

// Another content under an id that is there is not taken for it, nor put in its place.
func TestHosted_Conflict(t *testing.T) {
	o := hosted(t, nil)
	s := open(t, o)
	ensure(t, s, base.Hosted)
	other := manifest(t, func(m object) { m["rootfs"].(object)["sha256"] = digest([]byte("other")) })
	if err := os.WriteFile(o.ManifestPath, other, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := s.Ensure(t.Context(), base.Hosted)
	var hint interface{ Hint() string }
	if !errors.Is(err, base.ErrConflict) || !errors.As(err, &hint) {
		t.Errorf("%v", err)
	}
	b := newBucket(t, train("v1.16"))
	ci := options(t, b, "v1.16.0")
	ci.Dir = o.Dir
	ensure(t, open(t, ci), base.Latest)
	if err := os.WriteFile(o.ManifestPath, manifest(t, func(m object) {
		m["bundleId"] = id116
		delete(m["rootfs"].(object), "sha256")
	}), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ensure(t.Context(), base.Hosted); !errors.Is(err, base.ErrConflict) {
		t.Errorf("%v", err)
	}
}

func FuzzManifest(f *testing.F) {
	good := manifest(f, nil)
	f.Add(good, false)
	f.Add(manifest(f, func(m object) {
		m["kernel"] = object{"url": "https://h/k", "sha256": digest(nil), "fileName": "../x"}
	}), true)
	f.Add(manifest(f, func(m object) {
		m["kernel"] = object{"path": "../../x", "sha256": digest(nil)}
		m["bundleId"] = ".."
	}), true)
	f.Add([]byte(`{"schemaVersion":1}`), false)
	f.Fuzz(func(t *testing.T, data []byte, remote bool) {
		var from *url.URL
		if remote {
			from = &url.URL{Scheme: "https", Host: "host", Path: "/dir/manifest.json"}
		}
		id, names, sources, digests, err := base.ParseManifest(data, from)
		if err != nil {
			return
		}
		if id == "" || id[0] == '.' || filepath.Base(id) != id || len(id) > 128 || names[0] == names[1] {
			t.Errorf("id %q, names %q", id, names)
		}
		for i, name := range names {
			if filepath.Base(name) != name || name[0] == '.' || strings.ContainsAny(name, "/\\\x00\n") {
				t.Errorf("name %q", name)
			}
			isURL := strings.HasPrefix(sources[i], "http://") || strings.HasPrefix(sources[i], "https://") ||
				strings.HasPrefix(strings.ToLower(sources[i]), "http")
			if !isURL && (remote || !filepath.IsAbs(sources[i])) {
				t.Errorf("source %q", sources[i])
			}
			if isURL && len(digests[i]) != 64 {
				t.Errorf("digest %q of %q", digests[i], sources[i])
			}
		}
	})
}

func FuzzListing(f *testing.F) {
	b := &bucket{objects: train("v1.16")}
	f.Add([]byte(b.list("firecracker-ci/v1.16/", "", "")))
	f.Add([]byte(b.list("firecracker-ci/", "/", "")))
	f.Add([]byte(
		"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>a</NextContinuationToken></ListBucketResult>"))
	f.Add([]byte(
		`<!DOCTYPE x [<!ENTITY a "b">]><ListBucketResult><Contents><Key>&a;</Key><Size>x</Size></Contents></ListBucketResult>`))
	f.Add([]byte(listed("ubuntu-24.04.squashfs", "-1")))
	f.Fuzz(func(t *testing.T, data []byte) {
		keys, prefixes, next, err := base.ParseListing(data)
		if err != nil && len(keys)+len(prefixes)+len(next) > 0 {
			t.Errorf("%v, with %q %q %q", err, keys, prefixes, next)
		}
		kernel, rootfs := base.Choose(keys, "firecracker-ci/v1.16/x86_64/")
		if strings.ContainsAny(kernel+rootfs, "/\\ \n\x00") || len(kernel) > 22 || len(rootfs) > 60 {
			t.Errorf("%q, %q", kernel, rootfs)
		}
	})
}

func TestNatural(t *testing.T) {
	sorted := []string{"", "a", "a1", "a1b", "a2", "a09", "a10", "a10.2", "a10.10", "b"}
	for i, a := range sorted {
		for j, b := range sorted {
			got := base.Natural(a, b)
			if (got < 0) != (i < j) || (got > 0) != (i > j) {
				t.Errorf("%q and %q: %d", a, b, got)
			}
		}
	}
}

func TestChoose(t *testing.T) {
	for _, tt := range []struct{ keys, kernel, rootfs string }{
		{"vmlinux-5.10.9 vmlinux-5.10.10 vmlinux-5.9.99", "vmlinux-5.10.10", ""},
		{"vmlinux-6.1 vmlinux-6.1.5-no-acpi vmlinux-6.1.5.config vmlinux-6.1.2.bin vmlinux", "vmlinux-6.1", ""},
		{"ubuntu-22.04.ext4 ubuntu-18.04.squashfs", "", "ubuntu-18.04.squashfs"},
		{"ubuntu-22.04.ext4 ubuntu-24.04.ext4 ubuntu-9.04.ext4 ubuntu-24.04.id_rsa", "", "ubuntu-24.04.ext4"},
		{"sub/vmlinux-6.1.1 sub/ubuntu-24.04.ext4 debian-12.ext4 ubuntu-.ext4", "", ""},
	} {
		var keys []string
		for key := range strings.FieldsSeq(tt.keys) {
			keys = append(keys, "p/"+key)
		}
		if kernel, rootfs := base.Choose(append(keys, "elsewhere/vmlinux-9.9.9"), "p/"); kernel != tt.kernel ||
			rootfs != tt.rootfs {
			t.Errorf("%s: %q, %q", tt.keys, kernel, rootfs)
		}
	}
}
