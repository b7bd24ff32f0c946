package testenv_test

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/testenv"
)

// recorder is a test that notes how it ends instead of ending ours.
type recorder struct {
	testing.TB
	name            string
	skipped, failed string
	cleanups        []func()
}

// Name is that of a test of real Linux guests, unless another is set.
func (r *recorder) Name() string { return cmp.Or(r.name, "TestLinux") }

func (r *recorder) Fatal(args ...any) {
	r.failed += fmt.Sprintln(args...)
	runtime.Goexit()
}

func (r *recorder) Fatalf(format string, args ...any) { r.Fatal(fmt.Sprintf(format, args...)) }

func (r *recorder) Error(args ...any) { r.failed += fmt.Sprintln(args...) }

func (r *recorder) Errorf(format string, args ...any) { r.Error(fmt.Sprintf(format, args...)) }

func (r *recorder) Skipf(format string, args ...any) {
	r.skipped += fmt.Sprintf(format, args...)
	runtime.Goexit()
}

func (r *recorder) Cleanup(f func()) { r.cleanups = append(r.cleanups, f) }

// record runs a test to its end, cleanups included.
func record(t *testing.T, test func(testing.TB)) *recorder {
	return (&recorder{TB: t}).run(test)
}

func (r *recorder) run(test func(testing.TB)) *recorder {
	done := make(chan struct{})
	go func() {
		defer close(done)
		test(r)
	}()
	<-done
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		r.cleanups[i]()
	}
	return r
}

func TestRequire(t *testing.T) {
	tests := []struct {
		name         string
		capability   testenv.Capability
		env          map[string]string
		skip, failed string
	}{
		{"LabInLab", testenv.Lab, map[string]string{"SMARTVM_IN_LAB": "1"}, "lab is missing: this is the lab", ""},
		{
			"LabWithoutFixtures", testenv.Lab,
			map[string]string{"SMARTVM_FIXTURES": "/nonexistent"},
			"go run ./internal/tools/fixtures lab-kernel", "",
		},
		{
			"LabRequired", testenv.Lab,
			map[string]string{"SMARTVM_IN_LAB": "1", "SMARTVM_REQUIRE": "kvm, lab"},
			"",
			"SMARTVM_REQUIRE asks for it: this is the lab",
		},
		{"LinuxInLab", testenv.LinuxGuest, map[string]string{"SMARTVM_IN_LAB": "1"}, "", ""},
		{
			"LinuxNotHere", testenv.LinuxGuest,
			map[string]string{"SMARTVM_LAB": "always", "SMARTVM_REQUIRE": "kvm,lab"},
			"linux is missing", "",
		},
		{"LinuxByDecree", testenv.LinuxGuest, map[string]string{"SMARTVM_LAB": "never"}, "", ""},
		{"BadMode", testenv.LinuxGuest, map[string]string{"SMARTVM_LAB": "perhaps"}, `SMARTVM_LAB is "perhaps"`, ""},
		{
			"UnknownRequired", testenv.Lab,
			map[string]string{"SMARTVM_IN_LAB": "1", "SMARTVM_REQUIRE": "kvn"},
			"",
			`"kvn" is unknown`,
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			for _, name := range []string{"SMARTVM_IN_LAB", "SMARTVM_REQUIRE", "SMARTVM_LAB"} {
				t.Setenv(name, tt.env[name])
			}
			if dir, ok := tt.env["SMARTVM_FIXTURES"]; ok {
				t.Setenv("SMARTVM_FIXTURES", dir)
			}
			got := record(t, func(t testing.TB) { testenv.Require(t, tt.capability) })
			check(t, "skip", got.skipped, tt.skip)
			check(t, "failure", got.failed, tt.failed)
		})
	}
}

// check wants a part of what was said, or that nothing was.
func check(t *testing.T, what, got, want string) {
	t.Helper()
	if !strings.Contains(got, want) || (got == "") != (want == "") {
		t.Errorf("%s: got %q, want %q", what, got, want)
	}
}

// A test of real Linux guests that testrun does not know as one would run nowhere.
func TestRequire_Name(t *testing.T) {
	t.Setenv("SMARTVM_LAB", "always")
	t.Setenv("SMARTVM_IN_LAB", "")
	r := &recorder{TB: t, name: "TestGuest"}
	r.run(func(t testing.TB) { testenv.Require(t, testenv.LinuxGuest) })
	check(t, "failure", r.failed, "must begin with TestLinux")
	check(t, "skip", r.skipped, "")
}

func TestRequire_Root(t *testing.T) {
	t.Setenv("SMARTVM_REQUIRE", "")
	got := record(t, func(t testing.TB) { testenv.Require(t, testenv.Root) })
	if os.Geteuid() == 0 {
		check(t, "skip", got.skipped, "")
	} else {
		check(t, "skip", got.skipped, "root is missing: we are user")
	}
}

func TestFirecracker(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("SMARTVM_FIXTURES", dir)
	t.Setenv("SMARTVM_FIRECRACKER", "")
	t.Setenv("PATH", "/nonexistent")
	for require, to := range map[string]string{"": "skip", "root": "skip", "kvm": "fail"} {
		t.Setenv("SMARTVM_REQUIRE", require)
		got := record(t, func(t testing.TB) { testenv.Firecracker(t) })
		said := map[string]string{"skip": got.skipped, "fail": got.failed}
		if !strings.Contains(said[to], "go run ./internal/tools/fixtures firecracker") {
			t.Errorf("required %q: got %+v", require, said)
		}
	}
	program := filepath.Join(dir, "firecracker")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho Firecracker v1.13.0\n"), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("SMARTVM_FIRECRACKER", program)
	if got := testenv.Firecracker(t); got != program {
		t.Errorf("got %s", got)
	}
}

func TestNoLeaks(t *testing.T) {
	defer testenv.SetSettleTime(100 * time.Millisecond)()
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	leave := func() {
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Error(err)
		}
	}
	got := record(t, func(t testing.TB) {
		testenv.NoLeaks(t, dir)
		leave()
	})
	check(t, "a file left", got.failed, "left behind: file "+file)
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	got = record(t, func(t testing.TB) {
		testenv.NoLeaks(t, dir)
		testenv.NoLeaks(t, dir) // they nest
		leave()
		t.Cleanup(func() { _ = os.Remove(file) })
	})
	check(t, "a file removed", got.failed, "")
}

// turnVariable makes a copy of the test binary wait for its turn.
const turnVariable = "SMARTVM_TEST_TURN"

// TestNoLeaks_Turns starts another process that watches: it must wait for us.
func TestNoLeaks_Turns(t *testing.T) {
	if os.Getenv(turnVariable) != "" {
		fmt.Println("starting")
		testenv.NoLeaks(t)
		fmt.Println("its turn")
		return
	}
	out, theirs, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env, cmd.Stdout = append(os.Environ(), turnVariable+"=1"), theirs
	said := bufio.NewReader(out)
	defer testenv.SetSettleTime(100 * time.Millisecond)()
	record(t, func(r testing.TB) {
		testenv.NoLeaks(r)
		if err := errors.Join(cmd.Start(), theirs.Close()); err != nil {
			t.Error(err)
		}
		if line, err := said.ReadString('\n'); line != "starting\n" {
			t.Errorf("read %q, error %v", line, err)
		}
		// However long that is, nothing may come; the longer, the surer.
		if err := out.SetReadDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Error(err)
		}
		if line, err := said.ReadString('\n'); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("while it is our turn: read %q, error %v", line, err)
		}
		// The child is a leak here; what matters is that the turn ends.
	})
	if err := out.SetReadDeadline(time.Time{}); err != nil {
		t.Error(err)
	}
	if line, err := said.ReadString('\n'); line != "its turn\n" {
		t.Errorf("read %q, error %v", line, err)
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
}

// TestTurn_Fair has another process wait while we take one turn after another, as packages with
// many such tests do: it comes before our next ones.
func TestTurn_Fair(t *testing.T) {
	if os.Getenv(turnVariable) != "" {
		fmt.Println("starting")
		testenv.Turn(t)
		fmt.Println("its turn")
		return
	}
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), turnVariable+"=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	said := make(chan string, 10)
	turns, first := 0, true
	for came := false; !came; {
		record(t, func(r testing.TB) {
			testenv.Turn(r)
			if first {
				first = false
				if err := cmd.Start(); err != nil {
					t.Error(err)
				}
				go func() {
					defer close(said)
					for lines := bufio.NewScanner(out); lines.Scan(); {
						said <- lines.Text()
					}
				}()
				if line := <-said; line != "starting" {
					t.Errorf("read %q", line)
				}
			}
			turns++
			select { // something that takes its time
			case line := <-said:
				came = true
				if line != "its turn" {
					t.Errorf("read %q", line)
				}
			case <-time.After(3 * time.Millisecond):
			}
		})
		if turns > 100 {
			t.Fatalf("%d turns of ours while it waited", turns)
		}
	}
	for range said { // the rest of what it says
	}
	if err := cmd.Wait(); err != nil {
		t.Error(err)
	}
	t.Logf("%d turns of ours while it waited", turns)
}

func TestLinux_Hello(t *testing.T) {
	testenv.Require(t, testenv.LinuxGuest)
	testenv.Require(t, testenv.KVM)
	testenv.NoLeaks(t)
	if !testenv.InLab() && os.Getenv("SMARTVM_LAB") == "always" {
		t.Error("this is not the lab")
	}
}
