package fakefc

import (
	"bytes"
	"encoding/json"
	"os"

	"push.rocks/smartvm/firecracker"
)

// The fake's state is a form of its own, of which nothing is like any VMM's but that other versions
// cannot read it: the snapshot format, a newline, and a saved as JSON with its bits inverted.

type saved struct {
	VM         firecracker.FullVMConfiguration
	PluggedMiB uint64
}

func invert(b []byte) []byte {
	for i := range b {
		b[i] = ^b[i]
	}
	return b
}

// save writes a snapshot: the memory is zeros where the file has nothing.
func (s *Server) save(body []byte) error {
	var p firecracker.SnapshotCreateParams
	if err := decode(s.version, body, &p); err != nil {
		return err
	}
	if s.state != firecracker.StatePaused {
		return faultNotPaused
	}
	// The state is saved, by which the guest's vsock is reset, before the file is opened.
	s.reset = true
	config, err := json.Marshal(saved{s.vm, s.pluggedMiB})
	if err != nil {
		return err
	}
	if err := os.WriteFile(p.SnapshotPath, append([]byte(s.config.Format+"\n"), invert(config)...), 0o600); err != nil {
		return faultNoFile
	}
	memory, err := os.OpenFile(p.MemFilePath, os.O_WRONLY|os.O_CREATE, 0o600)
	if err != nil {
		return faultNoFile
	}
	defer memory.Close()
	size := int64(s.vm.MachineConfig.MemSizeMiB)
	if h := s.vm.MemoryHotplug; h != nil { // all of it is there, as holes
		size += int64(h.TotalSizeMiB)
	}
	return memory.Truncate(size << 20)
}

// load takes over what save has written.
func (s *Server) load(body []byte) error {
	var p firecracker.SnapshotLoadParams
	if err := decode(s.version, body, &p); err != nil {
		return err
	}
	if err := s.need(false); err != nil {
		return err
	}
	state, err := os.ReadFile(p.SnapshotPath)
	if err != nil {
		return err
	}
	config, ok := bytes.CutPrefix(state, []byte(s.config.Format+"\n"))
	var was saved
	if !ok || json.Unmarshal(invert(config), &was) != nil {
		return faultNoState
	}
	s.vm, s.pluggedMiB = was.VM, was.PluggedMiB
	if p.HugePages != "" && p.HugePages != firecracker.HugePagesSnapshot {
		s.vm.MachineConfig.HugePages = p.HugePages
	}
	if s.state = firecracker.StatePaused; p.ResumeVM {
		s.state = firecracker.StateRunning
	}
	return nil
}
