package base_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/xml"
	"fmt"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/base"
	"push.rocks/smartvm/internal/download"
)

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func squashfs(text string) []byte { return []byte("hsqs" + text) }

func ext4(text string) []byte {
	data := make([]byte, 4096)
	data[0x438], data[0x439] = 0x53, 0xef
	copy(data[2048:], text)
	return data
}

// bucket has the recorded shape of the CI's: a listing in XML, in pages of two, and objects.
type bucket struct {
	*httptest.Server
	mu      sync.Mutex
	objects map[string][]byte
	// of objects, with the range, and of listings' prefixes
	requests []string
	answer   func(w http.ResponseWriter, r *http.Request) (done bool) // set before anybody asks
}

const page = 2

func newBucket(t *testing.T, objects map[string][]byte) *bucket {
	b := &bucket{objects: objects}
	b.Server = httptest.NewServer(http.HandlerFunc(b.serve))
	t.Cleanup(b.Close)
	return b
}

func (b *bucket) set(answer func(w http.ResponseWriter, r *http.Request) bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.answer = answer
}

func (b *bucket) serve(w http.ResponseWriter, r *http.Request) {
	b.mu.Lock()
	q, key := r.URL.Query(), strings.TrimPrefix(r.URL.Path, "/bucket/")
	if q.Get("list-type") == "2" {
		b.requests = append(b.requests, "list "+q.Get("prefix"))
	} else {
		b.requests = append(b.requests, strings.TrimSpace("get "+key+" "+r.Header.Get("Range")))
	}
	answer, data := b.answer, b.objects[key]
	b.mu.Unlock()
	switch {
	case answer != nil && answer(w, r):
	case q.Get("list-type") == "2" && r.URL.Path == "/bucket/":
		fmt.Fprint(w, b.list(q.Get("prefix"), q.Get("delimiter"), q.Get("continuation-token")))
	case data != nil:
		w.Header().Set("ETag", etag(data))
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(data))
	default:
		w.WriteHeader(http.StatusNotFound)
		fmt.Fprint(w, `<?xml version="1.0" encoding="UTF-8"?><Error><Code>NoSuchKey</Code></Error>`)
	}
}

func etag(data []byte) string { return `"` + digest(data)[:32] + `"` }

func (b *bucket) list(prefix, delimiter, token string) string {
	b.mu.Lock()
	defer b.mu.Unlock()
	var items []string
	for key, data := range b.objects {
		rest, ok := strings.CutPrefix(key, prefix)
		switch dir, _, isDir := strings.Cut(rest, "/"); {
		case !ok:
		case delimiter != "" && isDir:
			items = append(items, "<CommonPrefixes><Prefix>"+prefix+dir+"/</Prefix></CommonPrefixes>")
		default:
			var tag bytes.Buffer
			_ = xml.EscapeText(&tag, []byte(etag(data)))
			items = append(items, fmt.Sprintf("<Contents><Key>%s</Key><LastModified>2025-06-12T09:30:00.000Z</LastModified>"+
				"<ETag>%s</ETag><Size>%d</Size><StorageClass>STANDARD</StorageClass></Contents>", key, tag.String(), len(data)))
		}
	}
	slices.Sort(items)
	items = slices.Compact(items)
	from := 0
	_, _ = fmt.Sscan(token, &from)
	to, more := min(from+page, len(items)), ""
	if to < len(items) {
		more = fmt.Sprintf("<NextContinuationToken>%d</NextContinuationToken>", to)
	}
	return fmt.Sprintf(`<?xml version="1.0" encoding="UTF-8"?>
<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><Name>spec.ccfc.min</Name><Prefix>%s</Prefix>%s<KeyCount>%d</KeyCount>`+
		`<MaxKeys>%d</MaxKeys><IsTruncated>%v</IsTruncated>%s</ListBucketResult>`, prefix, more, to-from, page, more != "",
		strings.Join(items[from:to], ""))
}

func (b *bucket) put(key string, data []byte) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.objects[key] = data
}

// gets returns the names of the objects that were asked for since it was last called.
func (b *bucket) gets() (all []string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, r := range b.requests {
		if key, ok := strings.CutPrefix(r, "get "); ok {
			all = append(all, filepath.Base(key))
		}
	}
	b.requests = nil
	return all
}

// train is what the CI has of a version.
func train(name string) map[string][]byte {
	at := "firecracker-ci/" + name + "/x86_64/"
	return map[string][]byte{
		at + "vmlinux-5.10.239":             []byte("old kernel " + name),
		at + "vmlinux-6.1.141":              []byte("kernel " + name),
		at + "vmlinux-6.1.141.config":       []byte("config"),
		at + "vmlinux-6.1.9":                []byte("older kernel"),
		at + "vmlinux-6.1.141-no-acpi":      []byte("special kernel"),
		at + "debug/vmlinux-6.1.999":        []byte("debug kernel"),
		at + "ubuntu-22.04.ext4":            ext4("old " + name),
		at + "ubuntu-24.04.squashfs":        squashfs("rootfs " + name),
		at + "ubuntu-24.04.squashfs.tar":    []byte("x"),
		at + "ubuntu-24.04.manifest":        []byte("x"),
		at + "ubuntu-9.10.squashfs":         squashfs("ancient"),
		"firecracker-ci/" + name + "/notes": []byte("x"),
	}
}

func merge(all ...map[string][]byte) map[string][]byte {
	merged := map[string][]byte{}
	for _, m := range all {
		for k, v := range m {
			merged[k] = v
		}
	}
	return merged
}

// options are those of a store of a test's own.
func options(t *testing.T, b *bucket, latest string) base.Options {
	return base.WithClient(base.Options{
		Dir: filepath.Join(t.TempDir(), "base"), BucketURL: b.URL + "/bucket/", Arch: "x86_64",
		ReleaseLatest: func(context.Context) (string, error) { return latest, nil },
	}, &download.Client{Transport: download.Transport{Pause: func(context.Context, time.Duration) error { return nil }}})
}

func open(t *testing.T, o base.Options) *base.Store {
	t.Helper()
	s, err := base.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ensure(t *testing.T, s *base.Store, preset string) *base.Bundle {
	t.Helper()
	b, err := s.Ensure(t.Context(), preset)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func wantFile(t *testing.T, path string, want []byte) {
	t.Helper()
	if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
		t.Errorf("%s: %.80q, %v, want %.80q", path, got, err, want)
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o444 {
		t.Errorf("%s: %v, %v", path, fi.Mode(), err)
	}
}

func ids(t *testing.T, s *base.Store) (all []string) {
	t.Helper()
	list, err := s.List()
	if err != nil {
		t.Fatal(err)
	}
	for _, b := range list {
		all = append(all, b.ID)
	}
	return all
}

func wantIDs(t *testing.T, s *base.Store, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, ids(t, s)); diff != "" {
		t.Errorf("bundles, -want +got:\n%s", diff)
	}
}

// wantNothing checks that no bundle is there, nor the beginning of one that is of no use.
func wantNothing(t *testing.T, dir string) {
	t.Helper()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && filepath.Base(path) != ".lock" {
			t.Errorf("there is %s", strings.TrimPrefix(path, dir))
		}
		return err
	})
	if err != nil {
		t.Error(err)
	}
}

// warnings is a log that keeps those.
type warnings struct {
	mu    sync.Mutex
	texts []string
}

func (w *warnings) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(w, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

func (w *warnings) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.texts = append(w.texts, string(p))
	return len(p), nil
}
