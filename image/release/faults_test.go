package release_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/release"
	"push.rocks/smartvm/internal/download"
	"push.rocks/smartvm/internal/testenv"
)

const version = "v1.12.1"

// bomb is an archive that is small and unpacks to that many bytes before the programs come.
func bomb(t *testing.T, size int64) []byte {
	t.Helper()
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(z)
	err = w.WriteHeader(&tar.Header{Name: dir(version) + "/zeros", Typeflag: tar.TypeReg, Size: size, Mode: 0o644})
	zeros := make([]byte, 1<<20)
	for n := int64(0); n < size && err == nil; n += int64(len(zeros)) {
		_, err = w.Write(zeros)
	}
	for _, m := range []member{program(version, "firecracker"), program(version, "jailer")} {
		if err == nil {
			err = w.WriteHeader(&tar.Header{Name: m.name, Typeflag: tar.TypeReg, Size: int64(len(m.data)), Mode: 0o755})
		}
		if err == nil {
			_, err = w.Write([]byte(m.data))
		}
	}
	if err = errors.Join(err, w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestInstall_BadArchive(t *testing.T) {
	fc, jailer := program(version, "firecracker"), program(version, "jailer")
	with := func(m member, change func(m *member)) member { change(&m); return m }
	many := make([]member, 10_001)
	for i := range many {
		many[i].name = fmt.Sprint(dir(version), "/", i)
	}
	for what, data := range map[string][]byte{
		"no archive":         []byte("<html>"),
		"empty":              {0},
		"cut short":          whole(t, version)[:150],
		"only one":           archive(t, fc),
		"of another version": whole(t, "v1.12.0"),
		"elsewhere in it":    archive(t, with(fc, func(m *member) { m.name = "x/" + m.name }), jailer),
		"a way out":          archive(t, member{name: "../evil", data: "x"}, fc, jailer),
		"a way out below":    archive(t, member{name: dir(version) + "/../../evil", data: "x"}, fc, jailer),
		"an absolute name":   archive(t, member{name: "/evil", data: "x"}, fc, jailer),
		"a symbolic link": archive(t, with(fc, func(m *member) {
			m.kind, m.data, m.link = tar.TypeSymlink, "", "/bin/sh"
		}), jailer),
		"a hard link": archive(t, with(fc, func(m *member) {
			m.kind, m.data, m.link = tar.TypeLink, "", "../../secret"
		}), jailer),
		"a device":           archive(t, with(fc, func(m *member) { m.kind, m.data = tar.TypeChar, "" }), jailer),
		"a FIFO":             archive(t, with(fc, func(m *member) { m.kind, m.data = tar.TypeFifo, "" }), jailer),
		"of an unknown type": archive(t, with(fc, func(m *member) { m.kind = 'Z' }), jailer),
		"a directory":        archive(t, with(fc, func(m *member) { m.kind, m.data = tar.TypeDir, "" }), jailer),
		"an empty program":   archive(t, with(fc, func(m *member) { m.data = "" }), jailer),
		"a huge program": append(archive(t, jailer), archiveHead(t, with(fc, func(m *member) {
			m.data, m.size = "", 1<<40
		}))...),
		"many files":           archive(t, append(many, fc, jailer)...),
		"a bomb before":        bomb(t, 20<<20),
		"nothing in it at all": archive(t),
	} {
		t.Run(what, func(t *testing.T) {
			s := serve(t)
			s.put(version, data)
			store, d := open(t, s)
			store.SetUnpackLimit(16 << 20)
			_, err := store.Install(t.Context(), version)
			var bad *release.ArchiveError
			if !errors.As(err, &bad) {
				t.Errorf("%v, want an *ArchiveError", err)
			}
			t.Log(err)
			wantTree(t, d)
			wantNoEvil(t, d)
			s.put(version, whole(t, version))
			if _, err := store.Install(t.Context(), version); err != nil {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}

// archiveHead is a header without what it announces.
func archiveHead(t *testing.T, m member) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	if err := errors.Join(w.WriteHeader(&tar.Header{Name: m.name, Typeflag: tar.TypeReg, Size: m.size}),
		z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func wantNoEvil(t *testing.T, d string) {
	t.Helper()
	for _, path := range []string{filepath.Dir(d), d, filepath.Join(d, ".work"), "/"} {
		if _, err := os.Lstat(filepath.Join(path, "evil")); err == nil {
			t.Errorf("%s/evil was written", path)
		}
	}
}

func TestInstall_BadServer(t *testing.T) {
	for what, tt := range map[string]struct {
		change func(s *server)
		ok     func(err error) bool
	}{
		"no such release": {func(s *server) { clear(s.files) }, status(http.StatusNotFound)},
		"no archive":      {func(s *server) { delete(s.files, version+"/"+name(version)) }, status(http.StatusNotFound)},
		"another digest": {func(s *server) { s.files[version+"/"+name(version)] = whole(t, "v1.0.0") }, func(err error) bool {
			return errors.As(err, new(*download.DigestError))
		}},
		"no digest": {func(s *server) {
			s.files[version+"/"+name(version)+".sha256.txt"] = []byte("<html>\n")
		}, func(err error) bool {
			return errors.As(err, new(*release.ArchiveError))
		}},
		"a long digest": {func(s *server) {
			s.files[version+"/"+name(version)+".sha256.txt"] = make([]byte, 1<<20)
		}, func(err error) bool {
			return errors.As(err, new(*download.SizeError))
		}},
		"round in circles": {func(s *server) {
			s.answer = func(w http.ResponseWriter, r *http.Request) bool {
				http.Redirect(w, r, r.URL.Path, http.StatusFound)
				return true
			}
		}, func(err error) bool { return errors.Is(err, download.ErrRedirect) }},
		"too many requests": {func(s *server) {
			s.answer = func(w http.ResponseWriter, _ *http.Request) bool {
				w.WriteHeader(http.StatusTooManyRequests)
				return true
			}
		}, status(http.StatusTooManyRequests)},
	} {
		t.Run(what, func(t *testing.T) {
			s := serve(t, version)
			tt.change(s)
			store, d := open(t, s)
			_, err := store.Install(t.Context(), version)
			if err == nil || !tt.ok(err) || strings.Contains(err.Error(), "secret") {
				t.Errorf("%v", err)
			}
			wantTree(t, d)
		})
	}
}

func status(code int) func(err error) bool {
	return func(err error) bool {
		var s *download.StatusError
		return errors.As(err, &s) && s.Code == code
	}
}

func FuzzFindDigest(f *testing.F) {
	good := strings.Repeat("0a", 32)
	for _, seed := range []string{
		good + "  a.tgz\n", good + " *a.tgz\r\n", good + "  ./a.tgz",
		good + "  b.tgz\n" + strings.Repeat("0b", 32) + "  a.tgz\n",
		good, good + "\n", " a.tgz", good[1:] + "  a.tgz", strings.Repeat("zz", 32) + "  a.tgz", good + "  dir/", "",
	} {
		f.Add([]byte(seed), "a.tgz")
	}
	f.Fuzz(func(t *testing.T, sums []byte, name string) {
		digest, err := release.FindDigest(sums, name)
		if err != nil {
			return
		}
		if len(digest) != 64 || strings.Trim(digest, "0123456789abcdef") != "" ||
			!bytes.Contains(bytes.ToLower(sums), []byte(digest)) {
			t.Errorf("digest %q of %q", digest, sums)
		}
	})
}

func TestFindDigest(t *testing.T) {
	a, b := strings.Repeat("0a", 32), strings.Repeat("0B", 32)
	for sums, want := range map[string]string{
		a + "  a.tgz\n":                      a,
		a + " *a.tgz\r\n":                    a,
		b + "  a.tgz":                        strings.ToLower(b),
		a + "  b.tgz\n" + b + "  ./a.tgz\n":  strings.ToLower(b),
		a + "  a.tgz.debug\n":                "",
		a[2:] + "  a.tgz\n":                  "",
		a:                                    "",
		strings.Repeat("0g", 32) + "  a.tgz": "",
		"":                                   "",
	} {
		got, err := release.FindDigest([]byte(sums), "a.tgz")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", sums, got, err)
		}
	}
}

// The test program installs, if it is told to, into a directory from a URL.
const childVariable = "SMARTVM_TEST_INSTALL"

func TestMain(m *testing.M) {
	testenv.OthersOut()
	d, url, child := strings.Cut(os.Getenv(childVariable), "\n")
	if !child {
		os.Exit(m.Run())
	}
	store, err := release.Open(release.Options{Dir: d, URL: url, Arch: arch})
	if err == nil {
		_, err = store.Install(context.Background(), version)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(0)
}

func child(t *testing.T, d, url string) *exec.Cmd {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), childVariable+"="+d+"\n"+url, "GORACE=atexit_sleep_ms=0")
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	return cmd
}

// half answers the first request for the archive with half of it, tells so and stops.
func half(s *server, told chan<- struct{}, goOn <-chan struct{}) {
	data := s.files[version+"/"+name(version)]
	first := true
	s.mu.Lock()
	defer s.mu.Unlock()
	s.answer = func(w http.ResponseWriter, r *http.Request) bool {
		if !strings.HasPrefix(r.URL.Path, "/assets/") || !strings.HasSuffix(r.URL.Path, ".tgz") || !first {
			return false
		}
		first = false
		w.Header().Set("Content-Length", fmt.Sprint(len(data)))
		_, _ = w.Write(data[:len(data)/2])
		_ = http.NewResponseController(w).Flush()
		close(told)
		select {
		case <-goOn:
			_, _ = w.Write(data[len(data)/2:])
		case <-r.Context().Done():
		}
		return true
	}
}

func TestInstall_Killed(t *testing.T) {
	s := serve(t, version)
	store, d := open(t, s)
	told := make(chan struct{})
	half(s, told, nil)
	cmd := child(t, d, s.URL+"/releases")
	<-told
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if _, err := store.Find(version); err == nil {
		t.Error("it is installed")
	}
	// What others left that were killed at other moments.
	work := filepath.Join(d, ".work")
	err := errors.Join(os.MkdirAll(filepath.Join(work, version), 0o700),
		os.MkdirAll(filepath.Join(work, "gone-1/v1.0.0"), 0o700),
		os.WriteFile(filepath.Join(work, version, "firecracker"), []byte("half"), 0o600),
		os.WriteFile(filepath.Join(work, name("v1.0.0")), []byte("x"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Install(t.Context(), version); err != nil {
		t.Fatal(err)
	}
	wantTree(t, d, version)
}

func TestInstall_TwoProcesses(t *testing.T) {
	s := serve(t, version)
	_, d := open(t, s)
	told, goOn := make(chan struct{}), make(chan struct{})
	half(s, told, goOn)
	cmd := child(t, d, s.URL+"/releases")
	<-told
	waits := 0
	store, err := release.Open(quick(release.Options{
		Dir: d, URL: s.URL + "/releases", Arch: arch, Waiting: func(string) { waits++; close(goOn) },
	}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Install(t.Context(), version); err != nil {
		t.Error(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	wantTree(t, d, version)
	// and the digest
	if n := strings.Count(strings.Join(s.requests, "\n"), "/assets/"+version+"/"+name(version)); n != 2 || waits != 1 {
		t.Errorf("fetched %d files, waited %d times", n, waits)
	}
}

func TestInstall_Cancelled(t *testing.T) {
	s := serve(t, version)
	_, d := open(t, s)
	ctx, cancel := context.WithCancelCause(t.Context())
	reason := errors.New("enough")
	store, err := release.Open(quick(release.Options{
		Dir: d, URL: s.URL + "/releases", Arch: arch, Progress: func(step string, _, _ int64) {
			if step == "unpack" {
				cancel(reason)
			}
		},
	}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Install(ctx, version); !errors.Is(err, reason) {
		t.Errorf("%v", err)
	}
	if _, err := store.Find(version); err == nil {
		t.Error("it is installed")
	}
}

// The archive fits, what is in it does not.
func TestInstall_DiskFull(t *testing.T) {
	if !testenv.Apart(t) {
		return
	}
	d := filepath.Join(t.TempDir(), "bin")
	if err := errors.Join(os.Mkdir(d, 0o700), unix.Mount("none", d, "tmpfs", 0, "size=1m,mode=0700")); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(d, 0); err != nil {
			t.Error(err)
		}
	})
	s := serve(t)
	fc := program(version, "firecracker")
	fc.data = strings.Repeat("x", 4<<20)
	s.put(version, archive(t, fc, program(version, "jailer")))
	store, err := release.Open(quick(release.Options{Dir: d, URL: s.URL + "/releases", Arch: arch}))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := store.Install(t.Context(), version); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("%v, want ENOSPC", err)
	}
	wantTree(t, d)
}
