package logfile_test

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"push.rocks/smartvm/internal/logfile"
)

// readSince returns what a log has from a time on.
func readSince(t *testing.T, path string, at time.Time) string {
	t.Helper()
	r, err := logfile.OpenSince(path, at)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	data, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func timed(t *testing.T, path string, limit int64) *logfile.Writer {
	t.Helper()
	w, err := logfile.CreateTimed(path, limit)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = w.Close() })
	return w
}

func TestOpenSince(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(dir, "log")
		w := timed(t, path, 400)
		begun := time.Now()
		for i := range 60 { // some three times what is kept
			fmt.Fprintf(w, "line %02d at %d s\n", i, i*10)
			time.Sleep(10 * time.Second)
			if i == 55 { // another process goes on
				_ = w.Close()
				w = timed(t, path, 400)
			}
		}
		all := readSince(t, path, begun)
		if n := strings.Count(all, "\n"); n < 12 || n > 25 || !strings.HasSuffix(all, "line 59 at 590 s\n") {
			t.Fatalf("%d lines are kept: %q", n, all)
		}
		for _, i := range []int{50, 55, 56, 59} {
			at := begun.Add(time.Duration(i*10) * time.Second)
			if got := readSince(t, path, at); got != all[strings.Index(all, fmt.Sprintf("line %02d", i)):] {
				t.Errorf("since line %d: %q", i, got)
			}
			// What came a moment before may be told too, nothing else.
			if got := readSince(t, path, at.Add(time.Second)); i < 59 &&
				!strings.HasPrefix(got, fmt.Sprintf("line %02d", i+1)) || i == 59 && got != "" {
				t.Errorf("after line %d: %q", i, got)
			}
		}
		// A line is told whole.
		fmt.Fprint(w, "half a ")
		time.Sleep(time.Minute)
		fmt.Fprint(w, "line\nlast\n")
		if got := readSince(t, path, time.Now()); got != "half a line\nlast\n" {
			t.Errorf("got %q", got)
		}
		if got := readSince(t, path, time.Now().Add(time.Hour)); got != "" {
			t.Errorf("in the future there is %q", got)
		}
	})
}

// However long a log is written, and however little at a time, its times take some room and no
// more.
func TestOpenSince_Bounds(t *testing.T) {
	dir := t.TempDir()
	synctest.Test(t, func(t *testing.T) {
		path := filepath.Join(dir, "log")
		w := timed(t, path, 2<<20)
		begun := time.Now()
		for i := range 30000 {
			fmt.Fprintf(w, "%05d\n", i)
			time.Sleep(time.Second)
		}
		if fi, err := os.Stat(path + logfile.TimesSuffix); err != nil || fi.Size() > 64<<10 {
			t.Errorf("%v, %v", fi, err)
		}
		for _, i := range []int{0, 10, 15000, 29990} {
			got := readSince(t, path, begun.Add(time.Duration(i)*time.Second))
			var first int
			if _, err := fmt.Sscanf(got, "%05d", &first); err != nil || first > i || i-first > 40 {
				t.Errorf("since %d: begins with %d, %v", i, first, err)
			}
		}
	})
}

// Without times, or with others' in their place, all of a log is told.
func TestOpenSince_None(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	w := create(t, path, 1000)
	write(t, w, "text\n")
	if got := readSince(t, path, time.Now().Add(time.Hour)); got != "text\n" {
		t.Errorf("got %q", got)
	}
	if err := os.WriteFile(path+logfile.TimesSuffix, []byte(strings.Repeat("\xff", 160)), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := readSince(t, path, time.Now()); got != "text\n" {
		t.Errorf("got %q", got)
	}
	if err := logfile.Remove(filepath.Dir(path), filepath.Base(path)); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
