package snapshot

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc64"
	"io"
	"os"
	"regexp"

	"push.rocks/smartvm/internal/kept"
)

// State is what the beginning of a state file says. Its form is Firecracker's, src/vmm/src/snapshot there.
type State struct {
	Arch   string // as Go spells it
	Format string // version of the rest, "6.0.0"; empty where its place is not known
}

// What begins a state file, and how large the VMM lets one be.
const (
	magicX86 = 0x0710_1984_8664_0000
	magicARM = 0x0710_1984_AAAA_0000
	maxState = 10 << 20 // bytes
)

// jones is the polynomial of the crc64 crate, bits reversed.
const jones = 0x95ac9329ac4bc9b5

// checksum is the crate's, which neither begins nor ends with an inversion; the standard library does both.
func checksum(data []byte) uint64 { return ^crc64.Update(^uint64(0), crc64.MakeTable(jones), data) }

var formatPattern = regexp.MustCompile(`^[0-9]{1,5}\.[0-9]{1,5}\.[0-9]{1,5}$`)

// ReadState checks a state file as the VMM would: its checksum is right and it begins as one does. What is between is the
// VMM's own, and only that can tell what is wrong with it.
func ReadState(path string) (*State, error) {
	f, err := kept.OpenPlain(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxState+1))
	if err != nil {
		return nil, err
	}
	return parseState(data)
}

func parseState(data []byte) (*State, error) {
	switch {
	case len(data) > maxState:
		return nil, fmt.Errorf("is larger than any state: over %d bytes", maxState)
	case len(data) < 24:
		return nil, fmt.Errorf("is too short for a state: %d bytes", len(data))
	}
	s := &State{}
	switch magic := binary.LittleEndian.Uint64(data); magic {
	case magicX86:
		s.Arch = "amd64"
	case magicARM:
		s.Arch = "arm64"
	default:
		return nil, fmt.Errorf("does not begin as a state does: %#x", magic)
	}
	n := len(data) - crc64.Size
	if sum, want := checksum(data[:n]), binary.LittleEndian.Uint64(data[n:]); sum != want {
		return nil, fmt.Errorf("has checksum %016x, not %016x", sum, want)
	}
	s.Format = format(data[8:n])
	return s, nil
}

// format reads a version, after its length: eight bytes until Firecracker 1.14 (bincode), one since (bitcode).
func format(data []byte) string {
	n, text := uint64(data[0]), data[1:]
	if long := binary.LittleEndian.Uint64(data); long < 256 {
		n, text = long, data[8:]
	}
	if n > uint64(len(text)) || !formatPattern.Match(text[:n]) {
		return ""
	}
	return string(text[:n])
}

// checkState says what is wrong with a snapshot's state file.
func (m *Manifest) checkState(path string) error {
	s, err := ReadState(path)
	if err != nil {
		return m.stateError(err)
	}
	return m.compareState(s)
}

// stateError is damage, unless it is the file system that is to blame.
func (m *Manifest) stateError(err error) error {
	var fault *os.PathError
	if errors.As(err, &fault) && !isNotExist(err) {
		return fmt.Errorf("read state of snapshot %s: %w", m.ID, err)
	}
	return &DamagedError{ID: m.ID, File: StateFile, Reason: err.Error()}
}

// compareState compares a state with what the manifest says of it, if it does.
func (m *Manifest) compareState(s *State) error {
	reason := ""
	switch {
	case m.Arch != "" && s.Arch != m.Arch:
		reason = fmt.Sprintf("is of a %s machine, not %s", s.Arch, m.Arch)
	case m.Format != "" && s.Format != m.Format:
		reason = fmt.Sprintf("has format %q, not %q", s.Format, m.Format)
	default:
		return nil
	}
	return &DamagedError{ID: m.ID, File: StateFile, Reason: reason}
}
