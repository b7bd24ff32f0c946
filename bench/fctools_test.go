package main

import (
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// peer is a program that answers steps as bench-fctools does.
func peer(t *testing.T, script string) *bench {
	t.Helper()
	path := filepath.Join(t.TempDir(), "peer")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+script), 0o700); err != nil {
		t.Fatal(err)
	}
	return &bench{FCTools: path, Dir: t.TempDir()}
}

func TestFCTools(t *testing.T) {
	f, err := peer(t, "for took in 1 20 3 1 40 3; do read -r step; echo $took; done; read -r end").startFCTools(
		t.Context(), "start")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []int64{20, 40} {
		if took, err := f.start(t.Context(), 0); err != nil || took.Nanoseconds() != want {
			t.Errorf("a start takes %d ns, error %v; want that of the second step, %d", took.Nanoseconds(), err, want)
		}
	}
	_ = f.end() // read fails at the end of its input
	if _, err := os.Stat(f.cmd.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory after the end: %v", err)
	}
}

func TestFCTools_Fails(t *testing.T) {
	f, err := peer(t, "read -r step; echo 1; read -r step; exit 3").startFCTools(t.Context(), "start")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.start(t.Context(), 0); !errors.Is(err, io.EOF) {
		t.Errorf("a start that fails: %v", err)
	}
	if err := f.end(); err == nil {
		t.Error("the process has failed, and its end is without an error")
	}
}

func TestBuildFCTools_NoCargo(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	if path, err := buildFCTools(t.Context()); !errors.Is(err, exec.ErrNotFound) {
		t.Errorf("without cargo: %q, %v", path, err)
	}
}
