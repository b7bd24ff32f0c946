package oci_test

import (
	"context"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/ocitest"
)

// BenchmarkPull compares fetching and flattening an image with tar's unpacking of the same layers
// onto the same disk.
func BenchmarkPull(b *testing.B) {
	layout := b.TempDir()
	var layers []ocitest.Layer
	for n := range 10 {
		layers = append(layers, ocitest.Mixed(30<<20, uint64(n)))
	}
	d, err := ocitest.Add(layout, "amd64", layers...)
	if err == nil {
		err = ocitest.Tag(layout, "1", d)
	}
	if err != nil {
		b.Fatal(err)
	}
	srv := httptest.NewServer(ocitest.Registry(layout))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/bench:1"
	var ours, theirs time.Duration
	var grown int64
	for b.Loop() {
		debug.FreeOSMemory() // what was there before is not ours
		peak := watchRSS(b.Context())
		start := time.Now()
		dir := pullAll(b, ref)
		ours += time.Since(start)
		grown = max(grown, peak())
		start = time.Now()
		untar(b, dir)
		theirs += time.Since(start)
		os.RemoveAll(dir)
	}
	b.ReportMetric(theirs.Seconds()/ours.Seconds(), "rate/tar")
	b.ReportMetric(float64(grown)/(1<<20), "rss-MiB")
	b.ReportMetric(ours.Seconds()/float64(b.N), "pull-s")
	b.ReportMetric(theirs.Seconds()/float64(b.N), "tar-s")
}

func pullAll(b *testing.B, ref string) (dir string) {
	dir, err := os.MkdirTemp(b.TempDir(), "")
	if err != nil {
		b.Fatal(err)
	}
	i, err := oci.Resolve(b.Context(), ref, oci.Options{})
	if err != nil {
		b.Fatal(err)
	}
	defer i.Close()
	f, err := os.Create(filepath.Join(dir, "root.ext4"))
	if err != nil {
		b.Fatal(err)
	}
	defer f.Close()
	if _, err := i.Flatten(b.Context(), dir, f, nil); err != nil {
		b.Fatal(err)
	}
	return dir
}

// untar unpacks the layers in dir, in any order: none hides anything of another.
func untar(b *testing.B, dir string) {
	layers, err := filepath.Glob(filepath.Join(dir, "sha256-*"))
	if err != nil || len(layers) != 10 {
		b.Fatalf("%d layers: %v", len(layers), err)
	}
	to := filepath.Join(dir, "root")
	if err := os.Mkdir(to, 0o700); err != nil {
		b.Fatal(err)
	}
	for _, l := range layers {
		if out, err := exec.CommandContext(b.Context(), "tar", "xzf", l, "-C", to).CombinedOutput(); err != nil {
			b.Fatalf("tar: %v: %s", err, out)
		}
	}
}

// watchRSS returns a function that says by how many bytes this process grew at most since.
func watchRSS(ctx context.Context) func() int64 {
	first := rss()
	var peak atomic.Int64
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		tick := time.NewTicker(2 * time.Millisecond)
		defer tick.Stop()
		for {
			peak.Store(max(peak.Load(), rss()-first))
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
		}
	}()
	return func() int64 {
		cancel()
		<-done
		return peak.Load()
	}
}

func rss() int64 {
	text, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0
	}
	pages, _ := strconv.ParseInt(strings.Fields(string(text))[1], 10, 64)
	return pages * int64(os.Getpagesize())
}
