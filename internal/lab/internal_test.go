package lab

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func FuzzUntilMarker(f *testing.F) {
	f.Add([]byte("abc"), []byte{}, 1)
	f.Add([]byte("\x00MARK\x00MARKE"), []byte("\x00MARKER"), 3)
	f.Add([]byte{0, 0, 0}, []byte("after"), 2)
	f.Fuzz(func(t *testing.T, data, after []byte, step int) {
		marker := []byte("\x00MARKER")
		if bytes.Contains(data, marker) {
			t.Skip()
		}
		stream := bytes.Join([][]byte{data, marker, after}, nil)
		// What a marker's start at the end of the data makes of it is as good.
		want := stream[:bytes.Index(stream, marker)]
		step = max(1, min(step, len(stream)))
		m := untilMarker{marker: marker}
		var got []byte
		for len(stream) > 0 {
			n := min(step, len(stream))
			out, end := m.next(stream[:n])
			got = append(got, out...)
			if end {
				if !bytes.Equal(got, want) {
					t.Errorf("got %q, want %q", got, want)
				}
				return
			}
			if len(m.held) >= len(marker) {
				t.Fatalf("%q is held back", m.held)
			}
			stream = stream[n:]
		}
		t.Error("the marker was not seen")
	})
}

func TestTail(t *testing.T) {
	var tl tail
	for range 3 {
		if _, err := tl.Write(bytes.Repeat([]byte("x"), maxTail-1)); err != nil {
			t.Fatal(err)
		}
		if _, err := tl.Write([]byte("end")); err != nil {
			t.Fatal(err)
		}
	}
	if got := tl.String(); len(got) != maxTail || !strings.HasSuffix(got, "xend") {
		t.Errorf("got %d bytes, %q", len(got), got[len(got)-10:])
	}
}

func TestQuote(t *testing.T) {
	for _, want := range []string{"", "'", "''", "a b", "$x `y` \\", "\n", "-n", "ü\xff"} {
		got, err := exec.CommandContext(t.Context(), "sh", "-c", "printf %s "+quote(want)).Output()
		if err != nil || string(got) != want {
			t.Errorf("got %q, error %v; want %q", got, err, want)
		}
	}
}

func TestDecide(t *testing.T) {
	dir := t.TempDir()
	missing := filepath.Join(dir, "missing")
	tests := []struct {
		mode        Mode
		device, pvm string
		lab         bool
		reason      string
	}{
		{Always, missing, missing, true, "SMARTVM_LAB=always"},
		{Never, missing, dir, false, "SMARTVM_LAB=never"},
		{Auto, missing, missing, true, "there is no " + missing},
		{"", "/dev/null", missing, true, "/dev/null is not KVM"},
		{"", dir, missing, true, "is a directory"},
	}
	for _, tt := range tests {
		got, err := decide(tt.mode, tt.device, tt.pvm)
		if err != nil || got.Lab != tt.lab || !strings.Contains(got.Reason, tt.reason) {
			t.Errorf("%+v: got %+v, error %v", tt, got, err)
		}
	}
	if _, err := decide("perhaps", missing, missing); err == nil {
		t.Error("no error for an unknown mode")
	}
}

func TestDecide_KVM(t *testing.T) {
	if err := CheckKVM(); err != nil {
		t.Skip(err)
	}
	dir := t.TempDir()
	for pvm, want := range map[string]bool{dir: true, filepath.Join(dir, "missing"): false} {
		if got, err := decide(Auto, "/dev/kvm", pvm); err != nil || got.Lab != want || got.Reason == "" {
			t.Errorf("got %+v, error %v; want %v", got, err, want)
		}
	}
}

func TestCheckKVM_Missing(t *testing.T) {
	if err := checkKVM(filepath.Join(t.TempDir(), "kvm")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("got %v", err)
	}
}
