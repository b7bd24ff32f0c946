package guestagent

import (
	"bufio"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// A program that keeps answers for names is told to forget them if it waits for that; one that
// would end by it, and one that is another, are not.
func TestForgetNames(t *testing.T) {
	shell, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	const handler = `trap "echo forgot" USR2; exec 3<&0; echo there; cat <&3 & wait; wait; echo over`
	for _, tt := range []struct {
		name, program, script, want string
	}{
		{"Handler", "resolved", handler, "forgot\nover\n"},
		{"NoHandler", "resolved", "echo there; read line; echo over", "over\n"},
		{"Other", "other", handler, "over\n"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			program := filepath.Join(dir, tt.program)
			if err := os.WriteFile(program, shell, 0o700); err != nil {
				t.Fatal(err)
			}
			c := exec.CommandContext(t.Context(), program, "-c", tt.script)
			in, err := c.StdinPipe()
			if err != nil {
				t.Fatal(err)
			}
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(out)
			if got, err := lines.ReadString('\n'); err != nil || got != "there\n" {
				t.Fatalf("got %q, %v", got, err)
			}
			forgetNames(filepath.Join(dir, "resolved"))
			if err := in.Close(); err != nil {
				t.Error(err)
			}
			if got, err := io.ReadAll(lines); err != nil || string(got) != tt.want {
				t.Errorf("got %q, %v, want %q", got, err, tt.want)
			}
			_ = c.Wait() // what it ended with does not matter
		})
	}
}
