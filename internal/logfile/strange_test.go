package logfile_test

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/logfile"
)

// A log that goes to /dev/null must not move that aside when it is long.
func TestWriter_Device(t *testing.T) {
	path := filepath.Join(t.TempDir(), "null")
	if err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))); err != nil {
		t.Skipf("no device node can be made here: %v", err)
	}
	w, err := logfile.Create(path, 100)
	if errors.Is(err, unix.EACCES) {
		t.Skipf("device nodes do not work here: %v", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	for range 10 {
		write(t, w, strings.Repeat("x", 90))
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode()&os.ModeCharDevice == 0 {
		t.Errorf("the device is now %v, %v", fi, err)
	}
	if _, err := os.Lstat(path + logfile.Suffix); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it was moved aside: %v", err)
	}
}

// What is neither a file nor a device is refused, not waited for.
func TestStrangeFiles(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	refused := func(what, path string) {
		t.Helper()
		if w, err := logfile.Create(path, 100); err == nil {
			w.Close()
			t.Errorf("the log goes to %s", what)
		}
		if got := logfile.Tail(path, 10); got != "" {
			t.Errorf("tail of %s: %q", what, got)
		}
	}
	refused("a FIFO that nobody reads", fifo)
	reader, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	refused("a FIFO that is read", fifo)
	refused("a directory", dir)
}
