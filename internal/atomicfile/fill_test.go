package atomicfile_test

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/atomicfile"
)

// Fill replaces what is there when all is written, and leaves it and nothing else when it is not.
func TestFill(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "file")
	fill := func(text string, failed error) error {
		return atomicfile.Fill(path, 0o640, func(f *os.File) error {
			_, err := io.WriteString(f, text)
			return errors.Join(err, failed)
		})
	}
	want := func(text string) {
		t.Helper()
		got, err := os.ReadFile(path)
		if err != nil || string(got) != text {
			t.Errorf("%q, %v, want %q", got, err, text)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 {
			t.Errorf("left behind: %v, %v", entries, err)
		}
	}
	failed := errors.New("failed")
	if err := atomicfile.Fill(path, 0o640, func(*os.File) error { return failed }); !errors.Is(err, failed) {
		t.Error(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
	if err := atomicfile.Fill(path, 0o640, func(f *os.File) error {
		_, err := f.WriteString("first")
		if entries, rerr := os.ReadDir(dir); rerr != nil || len(entries) > 0 {
			t.Errorf("there is something before all is: %v, %v", entries, rerr)
		}
		return err
	}); err != nil {
		t.Fatal(err)
	}
	want("first")
	if err := fill("second", nil); err != nil {
		t.Fatal(err)
	}
	want("second")
	// What a process left that was killed before it could rename it.
	if err := os.WriteFile(filepath.Join(dir, ".file"+atomicfile.TempSuffix), []byte("left"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := fill("second again", nil); err != nil {
		t.Fatal(err)
	}
	want("second again")
	if err := fill("second", nil); err != nil {
		t.Fatal(err)
	}
	if err := fill("third", failed); !errors.Is(err, failed) || !strings.Contains(err.Error(), path) {
		t.Error(err)
	}
	want("second")
	if err := atomicfile.Fill(filepath.Join(dir, "no", "file"), 0o600, func(*os.File) error { return nil }); err == nil {
		t.Error("a file in a directory that is not there")
	}
}

// A FIFO stays one, and a symbolic link leads on.
func TestFill_Special(t *testing.T) {
	dir := t.TempDir()
	fifo, link, file := filepath.Join(dir, "fifo"), filepath.Join(dir, "link"), filepath.Join(dir, "file")
	if err := errors.Join(unix.Mkfifo(fifo, 0o600), os.Symlink("file", link),
		os.WriteFile(file, []byte("old"), 0o600)); err != nil {
		t.Fatal(err)
	}
	got := make(chan string, 1)
	go func() {
		text, err := os.ReadFile(fifo)
		got <- string(text) + errText(err)
	}()
	hello := func(f *os.File) error { _, err := f.WriteString("hello"); return err }
	if err := errors.Join(atomicfile.Fill(fifo, 0o600, hello), atomicfile.Fill(link, 0o600, hello)); err != nil {
		t.Fatal(err)
	}
	if text := <-got; text != "hello" {
		t.Errorf("by the FIFO came %q", text)
	}
	if to, err := os.Readlink(link); err != nil || to != "file" {
		t.Errorf("the link leads to %q, %v", to, err)
	}
	if text, err := os.ReadFile(file); err != nil || string(text) != "hello" {
		t.Errorf("%q, %v", text, err)
	}
}

func errText(err error) string {
	if err != nil {
		return err.Error()
	}
	return ""
}
