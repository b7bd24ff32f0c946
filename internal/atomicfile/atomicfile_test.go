package atomicfile_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
)

func TestWrite_Replaces(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	for _, text := range []string{"first", "", "a second, longer one", "3"} {
		if err := atomicfile.Write(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != text {
			t.Errorf("%q, %v, want %q", got, err, text)
		}
	}
	if fi, err := os.Stat(path); err != nil || fi.Mode() != 0o600 {
		t.Errorf("%v: %v", fi.Mode(), err)
	}
	alone(t, path)
}

// alone checks that nothing is beside path.
func alone(t *testing.T, path string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != filepath.Base(path) {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

// Whoever reads meanwhile sees one version whole.
func TestWrite_ReadersSeeWholeFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	versions := [][]byte{bytes.Repeat([]byte("a"), 100_000), bytes.Repeat([]byte("b"), 50_000)}
	if err := atomicfile.Write(path, versions[0], 0o600); err != nil {
		t.Fatal(err)
	}
	written := make(chan error, 1)
	go func() {
		for i := range 200 {
			if err := atomicfile.Write(path, versions[i%2], 0o600); err != nil {
				written <- err
				return
			}
		}
		written <- nil
	}()
	for {
		got, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, versions[0]) && !bytes.Equal(got, versions[1]) {
			t.Fatalf("read %d bytes of neither version", len(got))
		}
		select {
		case err := <-written:
			if err != nil {
				t.Fatal(err)
			}
			return
		default:
		}
	}
}

func TestWrite_LeavesTheOldOnError(t *testing.T) {
	t.Run("it cannot be replaced", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "directory")
		if err := os.MkdirAll(filepath.Join(path, "content"), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.Write(path, []byte("new"), 0o600); err == nil {
			t.Error("a directory was replaced")
		}
		if _, err := os.Stat(filepath.Join(path, "content")); err != nil {
			t.Error(err)
		}
		alone(t, path)
	})
	t.Run("it is no file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "fifo")
		if err := unix.Mkfifo(path, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.Write(path, []byte("new"), 0o600); err == nil {
			t.Error("a FIFO was replaced")
		}
		if fi, err := os.Lstat(path); err != nil || fi.Mode()&fs.ModeNamedPipe == 0 {
			t.Errorf("it is %v now: %v", fi, err)
		}
		alone(t, path)
	})
	t.Run("there is no directory", func(t *testing.T) {
		if err := atomicfile.Write(filepath.Join(t.TempDir(), "none", "file"), nil, 0o600); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%v, want fs.ErrNotExist", err)
		}
	})
	t.Run("the disk is full", func(t *testing.T) {
		if _, err := os.Stat("/dev/full"); err != nil {
			t.Skip("needs: /dev/full")
		}
		path := filepath.Join(t.TempDir(), "file")
		// Every write to the temporary file fails as on a full disk.
		if err := errors.Join(os.WriteFile(path, []byte("old"), 0o600),
			os.Symlink("/dev/full", path+atomicfile.TempSuffix)); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.Write(path, []byte("new"), 0o600); err == nil {
			t.Error("it was written")
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "old" {
			t.Errorf("%q, %v, want the old content", got, err)
		}
		alone(t, path)
	})
	t.Run("a crash left a temporary file", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(path+atomicfile.TempSuffix, []byte("half of a longer one"), 0o600); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.Write(path, []byte("new"), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != "new" {
			t.Errorf("%q, %v", got, err)
		}
		alone(t, path)
	})
}

// Of a file that is too large so much is read that it shows, and no more.
func TestRead(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("12345"), 0o600); err != nil {
		t.Fatal(err)
	}
	for limit, want := range map[int64]string{0: "1", 3: "1234", 5: "12345", 9: "12345"} {
		if got, err := atomicfile.Read(path, limit); err != nil || string(got) != want {
			t.Errorf("limit %d: %q, %v, want %q", limit, got, err, want)
		}
	}
	if _, err := atomicfile.Read(path+"x", 1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
