package agentbin_test

import (
	"bytes"
	"debug/elf"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"push.rocks/smartvm/internal/agentbin"
)

// maxSize is what each VM of an image has of it in its initramfs, at most.
const maxSize = 4 << 20

// Each architecture has a small static agent of its own, and this program that of its own.
func TestAgent(t *testing.T) {
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		data, err := os.ReadFile(filepath.Join("bin", arch, "smartvm-agent"))
		if errors.Is(err, fs.ErrNotExist) {
			t.Skip("needs: the agents, which make agent builds")
		}
		if err != nil {
			t.Fatal(err)
		}
		if len(data) > maxSize {
			t.Errorf("%s: %d bytes, at most %d", arch, len(data), maxSize)
		}
		f, err := elf.NewFile(bytes.NewReader(data))
		if err != nil {
			t.Fatal(err)
		}
		if f.Machine != machine {
			t.Errorf("%s: it is for %v", arch, f.Machine)
		}
		for _, p := range f.Progs {
			if p.Type == elf.PT_INTERP {
				t.Errorf("%s: it is not static", arch)
			}
		}
		if arch == runtime.GOARCH && !bytes.Equal(agentbin.Agent(), data) {
			t.Errorf("this program has another one: %d bytes", len(agentbin.Agent()))
		}
	}
}
