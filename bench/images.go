package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/ocitest"
	"push.rocks/smartvm/image/volume"
)

const (
	imageSize  = 1 << 30   // of the image that is staged, as its guest sees it
	imageData  = 900 << 20 // of it
	imageVMs   = 20
	layers     = 10
	layerSize  = 30 << 20 // unpacked
	pullRounds = 5
)

// staging measures what a VM of an image costs before it starts, and what a copy of the image
// would.
func (b *bench) staging(ctx context.Context) error {
	root := filepath.Join(b.Disk, "root.ext4")
	if err := makeRoot(ctx, root); err != nil {
		return err
	}
	o := smartvm.Options{
		RuntimeDir: b.runtimeDir(), DataDir: filepath.Join(b.Disk, "data"),
		FirecrackerBinary: b.Firecracker, JailerBinary: b.Jailer,
	}
	o.Images.Agent = []byte("not started here")
	h, err := smartvm.Open(o)
	if err != nil {
		return err
	}
	defer h.Close()
	images, err := h.Images()
	if err != nil {
		return err
	}
	if _, err := images.Import(ctx, image.ImportOptions{Name: "large", Kernel: b.idle, Rootfs: root}); err != nil {
		return err
	}
	before, err := used(b.runtimeDir(), o.DataDir)
	if err != nil {
		return err
	}
	spec := smartvm.Spec{Image: "large", MachineConfig: smartvm.MachineConfig{VCPUCount: 1, MemSizeMiB: 128}}
	var all []*smartvm.Machine
	for round := range warmup + b.Rounds {
		b.samples.counting = round >= warmup
		begun := time.Now()
		m, err := h.Create(ctx, spec)
		if err != nil {
			return err
		}
		b.samples.time("stage", time.Since(begun))
		in, err := m.Inspect(ctx)
		if err != nil {
			return err
		}
		copied := 0.0
		if in.Staged["rootfs"].Method != "overlay" {
			copied = imageData
		}
		b.samples.add("stage-copied", "bytes", copied)
		all = append(all, m)
		if len(all) == imageVMs {
			after, err := used(b.runtimeDir(), o.DataDir)
			if err != nil {
				return err
			}
			b.samples.add("20-vms-of-image", "%", 100*float64(after-before)/imageSize)
		}
		if len(all) > imageVMs {
			if err := m.Remove(ctx); err != nil {
				return err
			}
		}
	}
	b.samples.counting = true
	for _, m := range all[:imageVMs] {
		if err := m.Remove(ctx); err != nil {
			return err
		}
	}
	for range 3 {
		begun := time.Now()
		if err := exec.CommandContext(ctx, "cp", "--reflink=never", root, root+".copy").Run(); err != nil {
			return fmt.Errorf("cp: %w", err)
		}
		b.samples.time("cp", time.Since(begun))
		if err := os.Remove(root + ".copy"); err != nil {
			return err
		}
	}
	return nil
}

// makeRoot makes an image that looks like a file system and is full of what does not pack.
func makeRoot(ctx context.Context, path string) error {
	if err := volume.Blank(ctx, path, "ext4", imageSize); err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	chunk, r := make([]byte, 1<<20), rand.NewChaCha8([32]byte{})
	for off := int64(imageSize - imageData); off < imageSize && err == nil; off += int64(len(chunk)) {
		_, _ = r.Read(chunk) // never fails
		_, err = f.WriteAt(chunk, off)
	}
	return errors.Join(err, f.Close())
}

// used is how many bytes directories take.
func used(dirs ...string) (sum int64, err error) {
	for _, dir := range dirs {
		err = errors.Join(err, filepath.WalkDir(dir, func(_ string, d fs.DirEntry, err error) error {
			if err != nil {
				return err
			}
			fi, err := d.Info()
			if err == nil {
				sum += fi.Sys().(*syscall.Stat_t).Blocks * 512
			}
			return err
		}))
	}
	return sum, err
}

// pulls measures smartvm image pull from a registry in this process over a bounded link, and what
// curl and tar do with the same.
func (b *bench) pulls(ctx context.Context) error {
	layout := filepath.Join(b.Disk, "layout")
	var list []ocitest.Layer
	for i := range layers {
		list = append(list, ocitest.Mixed(layerSize, uint64(i)))
	}
	made, err := ocitest.Add(layout, "amd64", list...)
	if err != nil {
		return err
	}
	if err := ocitest.Tag(layout, "latest", made); err != nil {
		return err
	}
	server := httptest.NewServer(new(link).limit(ocitest.Registry(layout)))
	defer server.Close()
	ref := strings.TrimPrefix(server.URL, "http://") + "/bench:latest"
	blobs, err := layerBlobs(layout)
	if err != nil {
		return err
	}
	for round := range pullRounds + 1 {
		b.samples.counting = round > 0 // the first brings all into the page cache
		data := filepath.Join(b.Disk, "data")
		begun := time.Now()
		cmd := exec.CommandContext(ctx, b.SmartVM, "image", "pull", "--data-dir", data, "--runtime-dir", b.cliDir(), ref)
		if out, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("%v: %w\n%s", cmd.Args, err, out)
		}
		pull := time.Since(begun)
		b.samples.time("pull", pull)
		b.samples.add("pull-memory", "MiB", float64(cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss)/1024)
		if err := os.RemoveAll(data); err != nil {
			return err
		}
		for _, piped := range []bool{false, true} {
			tar, err := b.untar(ctx, server.URL, blobs, piped)
			if err != nil {
				return err
			}
			if piped {
				b.samples.time("tar-piped", tar)
				continue
			}
			b.samples.time("tar", tar)
			b.samples.add("pull/tar", "", float64(tar)/float64(pull))
		}
	}
	return nil
}

// untar fetches layers and unpacks them when all are there or, piped, each as it arrives. It
// returns how long that took.
func (b *bench) untar(ctx context.Context, url string, blobs []string, piped bool) (took time.Duration, err error) {
	fetched, unpacked := filepath.Join(b.Disk, "fetched"), filepath.Join(b.Disk, "unpacked")
	defer func() { err = errors.Join(err, os.RemoveAll(fetched), os.RemoveAll(unpacked)) }()
	if err := errors.Join(os.Mkdir(fetched, 0o700), os.Mkdir(unpacked, 0o755)); err != nil {
		return 0, err
	}
	const fetch, unpack = `for l; do curl -sSfo "$0/${l##*:}" "$l"; done; `,
		`for l; do tar -xzf "$0/${l##*:}" -C "$0/../unpacked"; done`
	script := "set -e; " + fetch + unpack
	if piped {
		script = `set -e -o pipefail; for l; do curl -sSf "$l" | tar -xzC "$0/../unpacked"; done`
	}
	args := []string{"-c", script, fetched}
	for _, blob := range blobs {
		args = append(args, url+"/v2/bench/blobs/sha256:"+filepath.Base(blob))
	}
	begun := time.Now()
	if out, err := exec.CommandContext(ctx, "bash", args...).CombinedOutput(); err != nil {
		return 0, fmt.Errorf("curl and tar: %w\n%s", err, out)
	}
	return time.Since(begun), nil
}

const (
	// linkRate is how many bytes the registry sends in a second, whoever asks: a gigabit link.
	linkRate = 1e9 / 8
	// linkBurst is what it may be late by, as timers are, and yet make up for.
	linkBurst = 50 * time.Millisecond
)

// link is what all answers go through.
type link struct {
	mu   sync.Mutex
	free time.Time // when all that it has been given will be through
}

func (l *link) limit(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { h.ServeHTTP(&limited{w, l}, r) })
}

type limited struct {
	http.ResponseWriter
	link *link
}

func (w *limited) Write(p []byte) (int, error) {
	l := w.link
	l.mu.Lock()
	if late := time.Now().Add(-linkBurst); l.free.Before(late) {
		l.free = late
	}
	l.free = l.free.Add(time.Duration(float64(len(p)) / linkRate * float64(time.Second)))
	wait := time.Until(l.free)
	l.mu.Unlock()
	time.Sleep(wait)
	return w.ResponseWriter.Write(p)
}

// layerBlobs are a layout's layers: what is large.
func layerBlobs(layout string) (paths []string, err error) {
	all, err := filepath.Glob(filepath.Join(layout, "blobs/sha256/*"))
	for _, path := range all {
		if fi, statErr := os.Stat(path); statErr == nil && fi.Size() > 1<<20 {
			paths = append(paths, path)
		}
	}
	if err == nil && len(paths) != layers {
		err = fmt.Errorf("%s has %d layers, want %d", layout, len(paths), layers)
	}
	return paths, err
}
