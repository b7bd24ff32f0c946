package secret_test

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/secret"
	"push.rocks/smartvm/spec"
)

func write(t *testing.T, dir, name string, data []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func lookup(name string) (string, bool) {
	return map[string]string{"CALLER": "value of the caller", "EMPTY": ""}[name], name == "CALLER" || name == "EMPTY"
}

func TestParse(t *testing.T) {
	got, err := secret.Parse(
		[]byte("\ufeff# comment\n\n  A=1\nB=two words # no comment \nC=\"quoted\"\nCALLER\n EMPTY \nNOBODY\n\t#\nD=\nE=a=b\r\nno_newline=x"), lookup)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{
		"A=1", "B=two words # no comment ", "C=\"quoted\"", "CALLER=value of the caller", "EMPTY=", "D=",
		"E=a=b", "no_newline=x",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if got, err := secret.Parse([]byte("CALLER\nA=1"), nil); err != nil || len(got) != 1 {
		t.Errorf("nobody to ask: %q, %v", got, err)
	}
	_, err = secret.Parse([]byte("GOOD=secret\n=secret\nA B=secret\nC=\xff secret\nD=sec\x00ret\nA B"), lookup)
	want = []string{
		"line 2 has no name before =", "line 3 has blanks in its name", "line 4 is no text",
		"line 5 is no text", "line 6 has blanks in its name",
	}
	if err == nil || err.Error() != strings.Join(want, "\n") {
		t.Errorf("got %v", err)
	}
	if _, err := secret.Parse(bytes.Repeat([]byte("x"), secret.MaxEnv+10), nil); err == nil {
		t.Error("a line without end is none")
	}
}

func TestParse_Joined(t *testing.T) {
	got, err := secret.Parse([]byte("\ufeffA=1\r\n\ufeffB=\ufeff2\n\ufeff# comment\n\ufeff\n"), nil)
	if diff := cmp.Diff([]string{"A=1", "B=\ufeff2"}, got); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
}

func TestVariables(t *testing.T) {
	got, err := secret.Variables([]string{"A=1", "CALLER", "EMPTY", "NOBODY", "B==", "C=", "D=two words"}, lookup)
	want := []string{"A=1", "CALLER=value of the caller", "EMPTY=", "B==", "C=", "D=two words"}
	if diff := cmp.Diff(want, got); diff != "" || err != nil {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	if got, err := secret.Variables([]string{"CALLER"}, nil); len(got) != 0 || err != nil {
		t.Errorf("nobody to ask: %q, %v", got, err)
	}
	_, err = secret.Variables([]string{"A=1", "=secret", "", "B=\xff secret", "C=sec\x00ret"}, lookup)
	for _, want := range []string{
		"-e: variable 2 has no name before =", "-e: variable 3 has no name",
		"-e B: its value is no text", "-e C: its value is no text",
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("got %v, want %q", err, want)
		}
	}
	if err != nil && strings.Contains(err.Error(), "secret") {
		t.Errorf("it shows a value: %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("A=1\nCALLER\n#"))
	f.Fuzz(func(t *testing.T, data []byte) {
		env, _ := secret.Parse(data, lookup)
		for _, e := range env {
			if name, _, ok := strings.Cut(e, "="); !ok || name == "" || strings.Contains(e, "\x00") {
				t.Errorf("%q", e)
			}
		}
	})
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	key, env := write(t, dir, "key", []byte("\x00key\n")), write(t, dir, "env", []byte("A=file\nB=file\nCALLER\n"))
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	// What is written stays while somebody has it open, as a shell has.
	open, err := os.OpenFile(fifo, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	w, err := os.OpenFile(fifo, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	s := &spec.Spec{
		Env: []string{"B=flag"}, EnvFiles: []string{env, "/dev/null", write(t, dir, "env2", []byte("A=later"))},
		Secrets: []spec.Secret{{Name: "key", Path: key}, {Name: "nothing", Path: "/dev/null"}, {Name: "piped", Path: fifo}},
	}
	go func() {
		_, _ = w.WriteString("by a pipe")
		_ = w.Close()
	}()
	got, err := secret.Load(s, secret.Options{LookupEnv: lookup})
	if err != nil {
		t.Fatal(err)
	}
	want := &guest.Secrets{
		Files: map[string][]byte{"key": []byte("\x00key\n"), "nothing": {}, "piped": []byte("by a pipe")},
		Env:   []string{"A=file", "CALLER=value of the caller", "A=later"},
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if none, err := secret.Load(&spec.Spec{Env: []string{"A=1"}}, secret.Options{}); none != nil || err != nil {
		t.Error(none, err)
	}
	var log bytes.Buffer
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "secrets", got)
	slog.New(slog.NewTextHandler(&log, nil)).Info("x", "secrets", got)
	slog.New(slog.NewJSONHandler(&log, nil)).Info("x", "secrets", *got)
	if text := fmt.Sprintf("%v %+v %#v %v %+v %#v %s", got, got, got, *got, *got, *got, &log); strings.Contains(text,
		"file") || strings.Contains(text, "key") {
		t.Errorf("printed: %s", text)
	}
}

// All that is wrong is said at once, and nothing that is secret.
func TestLoad_Errors(t *testing.T) {
	dir := t.TempDir()
	large := write(t, dir, "large", bytes.Repeat([]byte("secret"), secret.MaxFile/6+1))
	half := write(t, dir, "half", bytes.Repeat([]byte("s"), secret.MaxFile))
	s := &spec.Spec{
		EnvFiles: []string{dir, "/no/such", write(t, dir, "env", []byte("A=secret\nB C=secret\n")), "/dev/zero"},
	}
	for i, path := range []string{dir + "/none", large, dir, "/dev/zero", half, half, half, half, half} {
		s.Secrets = append(s.Secrets, spec.Secret{Name: fmt.Sprint("s", i), Path: path})
	}
	set, err := secret.Load(s, secret.Options{})
	if set != nil || err == nil {
		t.Fatalf("got %v, %v", set, err)
	}
	want := []string{
		`secrets[0].path: no such file or directory`, `secrets[1].path: has more than 524288 bytes`,
		`secrets[2].path: is a directory`,
		`secrets[3].path: has more than 524288 bytes`, `secrets[8].path: has more than 2097152 bytes together`,
		`envFiles[0]: is a directory`, `envFiles[1]: no such file or directory`, `envFiles[2]: line 2 has blanks in its name`,
		`envFiles[3]: has more than 131072 bytes`,
	}
	var field *spec.FieldError
	lines := strings.Split(err.Error(), "\n")
	if !errors.As(err, &field) || len(lines) != len(want) || strings.Contains(err.Error(), "=secret") {
		t.Errorf("got %v", err)
	}
	for i, line := range lines {
		if i < len(want) && !strings.HasPrefix(line, want[i]) {
			t.Errorf("got %q, want %q", line, want[i])
		}
	}
}
