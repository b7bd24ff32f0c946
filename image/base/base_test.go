package base_test

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/internal/download"
)

const id116 = "v1.16-x86_64-vmlinux-6.1.141-ubuntu-24.04.squashfs"

func TestEnsure(t *testing.T) {
	b := newBucket(t, merge(train("v1.16"), train("v1.7")))
	o := options(t, b, "v1.16.1")
	s := open(t, o)
	got := ensure(t, s, base.Latest)
	dir := filepath.Join(o.Dir, id116)
	kernel, rootfs := []byte("kernel v1.16"), squashfs("rootfs v1.16")
	want := &base.Bundle{
		Version: 1, ID: id116, Name: "Firecracker CI v1.16, ubuntu-24.04", Arch: "x86_64", FirecrackerVersion: "v1.16.1",
		RootfsType: "squashfs", RootfsIsReadOnly: true, Dir: dir,
		KernelPath: filepath.Join(dir, "vmlinux-6.1.141"), RootfsPath: filepath.Join(dir, "ubuntu-24.04.squashfs"),
		Kernel: base.File{
			FileName: "vmlinux-6.1.141", SHA256: digest(kernel), Size: 12,
			Source: b.URL + "/bucket/firecracker-ci/v1.16/x86_64/vmlinux-6.1.141",
		},
		Rootfs: base.File{
			FileName: "ubuntu-24.04.squashfs", SHA256: digest(rootfs), Size: 16,
			Source: b.URL + "/bucket/firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs",
		},
	}
	ignore := cmp.Options{cmpopts.IgnoreFields(base.File{}, "Seen"), cmpopts.IgnoreFields(base.Bundle{}, "LastAccessedAt")}
	if diff := cmp.Diff(want, got, ignore); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	wantFile(t, got.KernelPath, kernel)
	wantFile(t, got.RootfsPath, rootfs)
	if fi, err := os.Stat(filepath.Join(dir, "users")); err != nil || fi.Mode().Perm() != 0o700 {
		t.Errorf("users: %v, %v", fi, err)
	}
	if diff := cmp.Diff([]string{"vmlinux-6.1.141", "ubuntu-24.04.squashfs"}, b.gets()); diff != "" {
		t.Errorf("fetched, -want +got:\n%s", diff)
	}

	// The second time nothing is fetched, and it is known when it was used.
	again := ensure(t, s, base.Latest)
	if fetched := b.gets(); len(fetched) > 0 || !again.LastAccessedAt.After(got.LastAccessedAt) {
		t.Errorf("fetched %v, used at %v, before at %v", fetched, again.LastAccessedAt, got.LastAccessedAt)
	}

	lts := ensure(t, s, base.LTS)
	if lts.FirecrackerVersion != "v1.7.0" || !strings.HasPrefix(lts.ID, "v1.7-") {
		t.Errorf("%+v", lts)
	}
	wantIDs(t, s, lts.ID, id116)
	if entries, err := os.ReadDir(filepath.Join(o.Dir, ".work")); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if opened, err := s.Open(t.Context(), id116); err != nil || opened.KernelPath != got.KernelPath {
		t.Errorf("%+v, %v", opened, err)
	}
	wantIDs(t, s, id116, lts.ID)
}

func TestEnsure_Trains(t *testing.T) {
	half := train("v1.15")
	for key := range half {
		if strings.Contains(key, "ubuntu") {
			delete(half, key)
		}
	}
	onlyExt4 := train("v1.14")
	for key := range onlyExt4 {
		if strings.HasSuffix(key, "squashfs") {
			delete(onlyExt4, key)
		}
	}
	dated := merge(train("20250101-aaa"), train("20260612-bbb"))
	for _, tt := range []struct {
		name, version string
		objects       map[string][]byte
		want          string // beginning of the id
	}{
		{"its own", "v1.16.0", merge(train("v1.16"), dated), "v1.16-x86_64-vmlinux-6.1.141-ubuntu-24.04.squashfs"},
		{
			"no train of the version", "v1.17.0", merge(train("v1.16"), dated),
			"20260612-bbb-x86_64-vmlinux-6.1.141-ubuntu-24.04.squashfs",
		},
		{"a train without a rootfs", "v1.15.2", merge(half, dated), "20260612-bbb-"},
		{"ext4", "1.14.0", onlyExt4, "v1.14-x86_64-vmlinux-6.1.141-ubuntu-22.04.ext4"},
		{
			"the newest date is not whole yet", "v1.17.0",
			merge(dated, map[string][]byte{"firecracker-ci/20260701-c/x86_64/vmlinux-6.1.1": {1}}), "20260612-bbb-",
		},
		{"nothing", "v1.17.0", map[string][]byte{}, ""},
		{"another architecture", "v1.16.0", map[string][]byte{"firecracker-ci/v1.16/aarch64/vmlinux-6.1.1": {1}}, ""},
		{"names of no date", "v1.17.0", merge(train("v1.16"), train("2026-x"), train("20260101")), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			o := options(t, newBucket(t, tt.objects), tt.version)
			b, err := open(t, o).Ensure(t.Context(), base.Latest)
			if tt.want == "" {
				var coded interface{ Code() string }
				if !errors.As(err, &coded) || coded.Code() != "BASE_IMAGE_RESOLVE_FAILED" {
					t.Errorf("%+v, %v", b, err)
				}
				wantNothing(t, o.Dir)
				return
			}
			if err != nil || !strings.HasPrefix(b.ID, tt.want) || b.FirecrackerVersion != "v"+
				strings.TrimPrefix(tt.version, "v") {
				t.Errorf("%+v, %v", b, err)
			}
			if err == nil && b.RootfsIsReadOnly != (b.RootfsType == "squashfs") {
				t.Errorf("%+v", b)
			}
		})
	}
}

func TestEnsure_NoSuchPreset(t *testing.T) {
	s := open(t, options(t, newBucket(t, nil), "v1.16.0"))
	for _, preset := range []string{"", "newest", "../lts", base.Hosted} { // there is no manifest
		if _, err := s.Ensure(t.Context(), preset); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%q: %v", preset, err)
		}
	}
	for _, version := range []string{"", "v1", "v1.x.0", "../.."} {
		s := open(t, options(t, newBucket(t, nil), version))
		if _, err := s.Ensure(t.Context(), base.Latest); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("version %q: %v", version, err)
		}
	}
}

func TestOpen_Invalid(t *testing.T) {
	for name, o := range map[string]base.Options{
		"arch": {Arch: "amd64"}, "kept": {MaxStored: -1}, "manifests": {ManifestPath: "a", ManifestURL: "http://b"},
	} {
		o.Dir = filepath.Join(t.TempDir(), "base")
		if _, err := base.Open(o); !errors.Is(err, fs.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	s := open(t, options(t, newBucket(t, nil), "v1.16.0"))
	for _, id := range []string{"", ".", "..", ".work", "a/b", "../x", strings.Repeat("x", 129), "x\x00"} {
		_, openErr := s.Open(t.Context(), id)
		_, holdErr := s.Hold(t.Context(), id)
		for _, err := range []error{openErr, holdErr, s.Verify(t.Context(), id), s.Remove(t.Context(), id)} {
			if !errors.Is(err, fs.ErrInvalid) {
				t.Errorf("%q: %v", id, err)
			}
		}
	}
	_, openErr := s.Open(t.Context(), "none")
	_, holdErr := s.Hold(t.Context(), "none")
	for _, err := range []error{openErr, holdErr, s.Verify(t.Context(), "none"), s.Remove(t.Context(), "none")} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("none: %v", err)
		}
	}
}

func TestOffline(t *testing.T) {
	b := newBucket(t, merge(train("v1.16"), train("v1.7")))
	o := options(t, b, "v1.16.1")
	ensure(t, open(t, o), base.Latest)
	b.Close()
	o.Offline = true
	s := open(t, o)
	if got := ensure(t, s, base.Latest); got.ID != id116 {
		t.Errorf("%+v", got)
	}
	for _, preset := range []string{base.LTS, base.Hosted} {
		if _, err := s.Ensure(t.Context(), preset); !errors.Is(err, base.ErrOffline) {
			t.Errorf("%s: %v, want ErrOffline", preset, err)
		}
	}
	if err := s.Remove(t.Context(), id116); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Ensure(t.Context(), base.Latest); !errors.Is(err, base.ErrOffline) {
		t.Errorf("removed: %v, want ErrOffline", err)
	}
}

// What has changed on disk is noticed, and fetched anew where that can be.
func TestUse_Corrupt(t *testing.T) {
	b := newBucket(t, train("v1.16"))
	o := options(t, b, "v1.16.1")
	log := &warnings{}
	o.Log = log.logger()
	used := false
	o.InUse = func(string) bool { return used }
	s := open(t, o)
	got := ensure(t, s, base.Latest)
	rewrite := func(path, text string) func() error {
		return func() error { return errors.Join(os.Remove(path), os.WriteFile(path, []byte(text), 0o444)) }
	}
	for name, damage := range map[string]func() error{
		"another kernel":  rewrite(got.KernelPath, "kernel v1.17"),
		"a longer rootfs": rewrite(got.RootfsPath, "hsqsrootfs v1.16+"),
		"no rootfs":       func() error { return os.Remove(got.RootfsPath) },
		"a link": func() error {
			return errors.Join(os.Remove(got.KernelPath), os.Symlink("/bin/sh", got.KernelPath))
		},
		"no description":    func() error { return os.Remove(filepath.Join(got.Dir, "bundle.json")) },
		"half of one":       rewrite(filepath.Join(got.Dir, "bundle.json"), `{"version": 1,`),
		"of another bundle": rewrite(filepath.Join(got.Dir, "bundle.json"), `{"version": 1, "bundleId": "x"}`),
		"a way out": rewrite(filepath.Join(got.Dir, "bundle.json"),
			`{"version": 1, "bundleId": "`+id116+`", "kernel": {"fileName": "../../x"}, "rootfs": {"fileName": "y"}}`),
	} {
		if err := damage(); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Open(t.Context(), id116); !errors.Is(err, base.ErrCorrupt) {
			t.Errorf("%s: open: %v, want ErrCorrupt", name, err)
		}
		if err := s.Verify(t.Context(), id116); !errors.Is(err, base.ErrCorrupt) {
			t.Errorf("%s: verify: %v, want ErrCorrupt", name, err)
		}
		used = true
		if _, err := s.Ensure(t.Context(), base.Latest); !errors.Is(err, base.ErrCorrupt) || !errors.Is(err, base.ErrInUse) {
			t.Errorf("%s, in use: %v", name, err)
		}
		used, log.texts = false, nil
		again := ensure(t, s, base.Latest)
		wantFile(t, again.KernelPath, []byte("kernel v1.16"))
		wantFile(t, again.RootfsPath, squashfs("rootfs v1.16"))
		if len(log.texts) != 1 || !strings.Contains(log.texts[0], "corrupt") {
			t.Errorf("%s: warned %q", name, log.texts)
		}
	}
}

// The digest is looked at again when the file has been touched, and then not until it is again;
// Verify always looks.
func TestUse_Cached(t *testing.T) {
	o := options(t, newBucket(t, train("v1.16")), "v1.16.1")
	verified := 0
	o.Progress = func(step string, done, _ int64) {
		if step == "verify" && done > 0 {
			verified++
		}
	}
	s := open(t, o)
	b := ensure(t, s, base.Latest)
	use := func(want bool, how string) {
		t.Helper()
		verified = 0
		if _, err := s.Open(t.Context(), b.ID); err != nil || verified > 0 != want {
			t.Errorf("%s: %v, verified: %v", how, err, verified > 0)
		}
	}
	use(false, "at first")
	later := b.LastAccessedAt.Add(1000)
	if err := os.Chtimes(b.RootfsPath, later, later); err != nil {
		t.Fatal(err)
	}
	use(true, "touched")
	use(false, "afterwards")
	verified = 0
	if err := s.Verify(t.Context(), b.ID); err != nil || verified == 0 {
		t.Errorf("verify: %v, %d", err, verified)
	}
	// Same size, time and inode: only Verify sees that.
	fi, err := os.Stat(b.KernelPath)
	if err == nil {
		err = errors.Join(os.Chmod(b.KernelPath, 0o644), os.WriteFile(b.KernelPath, []byte("KERNEL v1.16"), 0o644),
			os.Chtimes(b.KernelPath, fi.ModTime(), fi.ModTime()))
	}
	if err != nil {
		t.Fatal(err)
	}
	use(false, "in secret")
	if err := s.Verify(t.Context(), b.ID); !errors.Is(err, base.ErrCorrupt) {
		t.Errorf("verify: %v, want ErrCorrupt", err)
	}
}

// What was first fetched under a name is what it must be from then on, evicted meanwhile or not.
func TestTrustOnFirstUse(t *testing.T) {
	b := newBucket(t, merge(train("v1.16"), train("v1.7")))
	o := options(t, b, "v1.16.1")
	o.MaxStored = 1
	s := open(t, o)
	ensure(t, s, base.Latest)
	lts := ensure(t, s, base.LTS)
	wantIDs(t, s, lts.ID)
	ensure(t, s, base.Latest) // the same comes back
	ensure(t, s, base.LTS)
	b.put("firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs", squashfs("another"))
	_, err := s.Ensure(t.Context(), base.Latest)
	if !errors.As(err, new(*download.DigestError)) {
		t.Errorf("%v, want a *download.DigestError", err)
	}
	wantIDs(t, s, lts.ID)
	// Who removes it means it.
	b.put("firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs", squashfs("rootfs v1.16"))
	ensure(t, s, base.Latest)
	if err := s.Remove(t.Context(), id116); err != nil {
		t.Fatal(err)
	}
	b.put("firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs", squashfs("another"))
	wantFile(t, ensure(t, s, base.Latest).RootfsPath, squashfs("another"))
}

func TestEvict(t *testing.T) {
	b := newBucket(t, merge(train("v1.1"), train("v1.2"), train("v1.3"), train("v1.4"), train("v1.5")))
	o := options(t, b, "")
	log := &warnings{}
	o.Log = log.logger()
	version, used := "", map[string]bool{}
	o.ReleaseLatest = func(context.Context) (string, error) { return version, nil }
	var dirs []string
	o.InUse = func(dir string) bool {
		// It is told while the bundle is there.
		if _, err := os.Stat(filepath.Join(dir, "bundle.json")); err != nil {
			t.Error(err)
		}
		dirs = append(dirs, dir)
		return used[filepath.Base(dir)]
	}
	s := open(t, o)
	at := func(v string) string {
		t.Helper()
		version = v + ".0"
		return ensure(t, s, base.Latest).ID
	}
	one, two := at("v1.1"), at("v1.2")
	wantIDs(t, s, two, one)
	if len(log.texts)+len(dirs) > 0 {
		t.Errorf("warned %q, asked for %q", log.texts, dirs)
	}
	at("v1.1") // used again: the other is older now
	three := at("v1.3")
	wantIDs(t, s, three, one)
	if len(log.texts) != 1 || !strings.Contains(log.texts[0], "level=WARN") || !strings.Contains(log.texts[0], two) {
		t.Errorf("warned %q", log.texts)
	}
	used[one] = true
	four := at("v1.4")
	wantIDs(t, s, four, one)
	used[four] = true
	five := at("v1.5")
	wantIDs(t, s, five, four, one) // all but the new one are used
	if err := s.Remove(t.Context(), one); !errors.Is(err, base.ErrInUse) {
		t.Errorf("remove: %v, want ErrInUse", err)
	}
	clear(used)
	// A hold is as good as a VM.
	release, err := s.Hold(t.Context(), one)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Remove(t.Context(), one); !errors.Is(err, base.ErrInUse) {
		t.Errorf("remove: %v, want ErrInUse", err)
	}
	two = at("v1.2")
	wantIDs(t, s, two, one)
	if err := release(); err != nil {
		t.Error(err)
	}
	if err := s.Remove(t.Context(), one); err != nil {
		t.Error(err)
	}
	wantIDs(t, s, two)
}

func TestEnsure_BadServer(t *testing.T) {
	const rootfs = "/bucket/firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs"
	isList := func(r *http.Request) bool { return r.URL.Query().Has("list-type") }
	write := func(text string) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if isList(r) {
				_, _ = w.Write([]byte(text))
			}
			return isList(r)
		}
	}
	code := func(path string, code int) func(w http.ResponseWriter, r *http.Request) bool {
		return func(w http.ResponseWriter, r *http.Request) bool {
			if path == "list" && isList(r) || path == r.URL.Path {
				w.WriteHeader(code)
				return true
			}
			return false
		}
	}
	const head = `<ListBucketResult>`
	for name, tt := range map[string]struct {
		answer func(w http.ResponseWriter, r *http.Request) bool
		want   any
	}{
		"no listing": {code("list", 403), new(*download.StatusError)},
		"busy":       {code("list", 503), new(*download.StatusError)},
		"no object":  {code(rootfs, 404), new(*download.StatusError)},
		"no XML":     {write("hello"), new(*base.ResolveError)},
		"an error":   {write("<Error><Code>AccessDenied</Code></Error>"), new(*base.ResolveError)},
		"cut short":  {write(head + "<Contents><Key>a"), new(*base.ResolveError)},
		"no token":   {write(head + "<IsTruncated>true</IsTruncated></ListBucketResult>"), new(*base.ResolveError)},
		"without end": {
			write(head +
				"<IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken></ListBucketResult>"),
			new(*base.ResolveError),
		},
		"too long":          {write(head + strings.Repeat(" ", 9<<20)), new(*download.SizeError)},
		"a huge rootfs":     {write(listed("ubuntu-1.squashfs", "99999999999999")), new(*download.SizeError)},
		"a size that lies":  {write(listed("ubuntu-24.04.squashfs", "5")), new(*download.SizeError)},
		"a name with a way": {write(listed("../../ubuntu-24.04.squashfs", "16")), new(*base.ResolveError)},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBucket(t, train("v1.16"))
			b.answer = tt.answer
			o := options(t, b, "v1.16.0")
			_, err := open(t, o).Ensure(t.Context(), base.Latest)
			if err == nil || !errors.As(err, tt.want) {
				t.Errorf("%v, want %T", err, tt.want)
			}
			if list, err := open(t, o).List(); err != nil || len(list) > 0 {
				t.Errorf("%v, %v", list, err)
			}
			b.set(nil)
			ensure(t, open(t, o), base.Latest)
		})
	}
}

func listed(rootfs, size string) string {
	const at = "firecracker-ci/v1.16/x86_64/"
	return "<ListBucketResult><Contents><Key>" + at + "vmlinux-6.1.141</Key><Size>12</Size></Contents><Contents><Key>" +
		at + rootfs +
		"</Key><Size>" + size + "</Size></Contents></ListBucketResult>"
}

// A file system that is not what its name says is refused.
func TestEnsure_AnotherFileSystem(t *testing.T) {
	for name, data := range map[string][]byte{"ext4": ext4(""), "something else": []byte("PK\x03\x04"), "nothing": {0}} {
		b := newBucket(t, train("v1.16"))
		b.put("firecracker-ci/v1.16/x86_64/ubuntu-24.04.squashfs", data)
		_, err := open(t, options(t, b, "v1.16.0")).Ensure(t.Context(), base.Latest)
		if !errors.Is(err, fs.ErrInvalid) || !strings.Contains(err.Error(), "not squashfs") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The description is for other programs too.
func TestBundle_JSON(t *testing.T) {
	o := options(t, newBucket(t, train("v1.16")), "v1.16.0")
	b := ensure(t, open(t, o), base.Latest)
	data, err := os.ReadFile(filepath.Join(b.Dir, "bundle.json"))
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(data, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"bundleId", "arch", "firecrackerVersion", "rootfsType", "rootfsIsReadOnly",
		"lastAccessedAt",
	} {
		if _, ok := fields[name]; !ok {
			t.Errorf("%s is missing: %s", name, data)
		}
	}
}
