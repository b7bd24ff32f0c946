package kept_test

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"push.rocks/smartvm/internal/kept"
)

// plain is the digest by its definition.
func plain(data []byte) string {
	all := sha256.New()
	for piece := range slices.Chunk(data, 1<<20) {
		sum := sha256.Sum256(piece)
		all.Write(sum[:])
	}
	return hex.EncodeToString(all.Sum(nil))
}

func write(t *testing.T, path string, data []byte, at int64, size int64) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(data, at)
	if err := errors.Join(err, f.Truncate(size), f.Close()); err != nil {
		t.Fatal(err)
	}
}

func TestDigest(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	random := make([]byte, 3<<20)
	_, _ = rand.NewChaCha8([32]byte{1}).Read(random)
	seen := map[string]string{}
	for name, c := range map[string]struct {
		data     []byte
		at, size int64
	}{
		"Empty": {nil, 0, 0}, "Byte": {[]byte{1}, 0, 1}, "Piece": {random[:1<<20], 0, 1 << 20},
		"PieceAndByte": {random[:1<<20+1], 0, 1<<20 + 1},
		"Zeros":        {make([]byte, 1<<20+5), 0, 1<<20 + 5}, "Hole": {nil, 0, 5 << 20}, "OddHole": {nil, 0, 5<<20 + 3},
		"DataInHole": {random, 7<<20 + 12345, 20 << 20}, "DataAtEnd": {random[:3], 9<<20 - 3, 9 << 20},
		"Random":     {random, 0, 3 << 20},
		"ManyPieces": {random[:10], 4097 << 20, 4099 << 20},
	} {
		write(t, path, c.data, c.at, c.size)
		var last, total int64
		got, size, err := kept.Digest(t.Context(), path, func(done, of int64) {
			if done < last {
				t.Errorf("%s: %d bytes after %d", name, done, last)
			}
			last, total = done, of
		})
		if err != nil || size != c.size || last != c.size || total != c.size {
			t.Fatalf("%s: size %d, told %d of %d, want %d; %v", name, size, last, total, c.size, err)
		}
		if !kept.ValidDigest(got) {
			t.Errorf("%s: %q", name, got)
		}
		if other := seen[got]; other != "" {
			t.Errorf("%s has the digest of %s", name, other)
		}
		seen[got] = name
		if c.size > 1<<30 {
			continue // too much to hold
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if want := plain(data); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
		// Written out, zeros are the same as a hole.
		if err := errors.Join(os.Remove(path), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
		if full, _, err := kept.Digest(t.Context(), path, nil); err != nil || full != got {
			t.Errorf("%s without holes: %s, %v, want %s", name, full, err, got)
		}
	}
}

func TestDigest_Fails(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write(t, path, []byte{1}, 5<<20, 6<<20)
	ctx, cancel := context.WithCancel(t.Context())
	if _, _, err := kept.Digest(ctx, path, func(int64, int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
	if _, _, err := kept.Digest(t.Context(), filepath.Join(dir, "none"), nil); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if err := os.Symlink(path, filepath.Join(dir, "link")); err != nil {
		t.Fatal(err)
	}
	if _, _, err := kept.Digest(t.Context(), filepath.Join(dir, "link"), nil); err == nil {
		t.Error("a link was followed")
	}
}

func TestStamp(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	write(t, path, []byte("a"), 0, 1)
	stamp := func() string {
		t.Helper()
		s, err := kept.Stamp(path)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	first := stamp()
	if err := errors.Join(os.Link(path, filepath.Join(dir, "jail")), os.Chmod(path, 0o444)); err != nil {
		t.Fatal(err)
	}
	if now := stamp(); now != first {
		t.Errorf("of a link and a mode it became %q, was %q", now, first)
	}
	write(t, path, []byte("b"), 0, 1)
	if stamp() == first {
		t.Error("written, it is the same")
	}
	if _, err := kept.Stamp(dir); !errors.Is(err, fs.ErrInvalid) {
		t.Errorf("of a directory: %v", err)
	}
}

func TestUsers(t *testing.T) {
	dir, vms := t.TempDir(), t.TempDir()
	links := filepath.Join(dir, kept.UsersDir)
	if users, err := kept.Users(true, dir, "/dev/null"); err != nil || len(users) > 0 {
		t.Errorf("%q, %v", users, err)
	}
	vm := filepath.Join(vms, "vm")
	if err := errors.Join(os.Mkdir(links, 0o700), os.Mkdir(vm, 0o700), os.Symlink(vm, filepath.Join(links, "vm")),
		os.Symlink(filepath.Join(vms, "gone"), filepath.Join(links, "gone"))); err != nil {
		t.Fatal(err)
	}
	for _, alone := range []bool{false, true} {
		users, err := kept.Users(alone, dir, dir)
		if err != nil || !slices.Equal(users, []string{vm}) {
			t.Errorf("alone %v: %q, %v", alone, users, err)
		}
		_, err = os.Lstat(filepath.Join(links, "gone"))
		if stays := err == nil; stays == alone {
			t.Errorf("alone %v: the link of a VM that is gone stays: %v", alone, stays)
		}
	}
}
