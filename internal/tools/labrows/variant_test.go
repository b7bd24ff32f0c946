package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A variant changes what it sets in QEMU's arguments, and nothing else.
func TestVariant_Wrapper(t *testing.T) {
	dir := t.TempDir()
	// It prints each of its arguments in brackets.
	qemu := filepath.Join(dir, "it's qemu")
	if err := os.WriteFile(qemu, []byte("#!/bin/sh\nprintf '[%s]' \"$@\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]string{
		"default":                            "[-cpu][EPYC,-npt][-accel][tcg][-append][console=ttyS0 quiet ][-m][1]",
		"cpu=EPYC accel=tcg,thread=single":   "[-cpu][EPYC][-accel][tcg,thread=single][-append][console=ttyS0 quiet ][-m][1]",
		"kernel=nohz=off kernel=highres=off": "[-cpu][EPYC,-npt][-accel][tcg][-append][console=ttyS0 quiet nohz=off highres=off][-m][1]",
	} {
		v, err := parseVariant(text)
		if err != nil {
			t.Fatal(err)
		}
		wrapper := filepath.Join(dir, "wrapper")
		if err := os.WriteFile(wrapper, v.wrapper(qemu, filepath.Join(dir, "pid")), 0o755); err != nil {
			t.Fatal(err)
		}
		got, err := exec.Command(wrapper, "-cpu", "EPYC,-npt", "-accel", "tcg", "-append", "console=ttyS0 quiet", "-m",
			"1").CombinedOutput()
		if err != nil || string(got) != want {
			t.Errorf("%s: got %s, %v; want %s", text, got, err, want)
		}
	}
}

func TestParseVariant(t *testing.T) {
	for _, text := range []string{"cpus=1 guest=quiet guest=lpj=1", "device=vsock device=rng", "default", "no-serial"} {
		if _, err := parseVariant(text); err != nil {
			t.Error(err)
		}
	}
	for _, text := range []string{"processors=1", "cpus=1 device=disk", "single"} {
		if v, err := parseVariant(text); err == nil {
			t.Errorf("%q is taken as %v", text, v)
		}
	}
}
