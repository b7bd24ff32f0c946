package kernel

import (
	"debug/elf"
	"encoding/binary"
	"fmt"
	"io"
)

const (
	elfHeaderSize  = 64
	progHeaderSize = 56
	maxProgHeaders = 128
)

// checkELF verifies the headers of an ELF file of the given size: 64-bit
// x86-64, executable, with at least one loadable segment and every segment
// within the file. debug/elf is not used as it insists on sections too, which
// may lie beyond what r holds.
func checkELF(r io.ReaderAt, size int64) error {
	var h [elfHeaderSize]byte
	if err := readAt(r, h[:], 0); err != nil {
		return err
	}
	u16 := func(b []byte) uint64 { return uint64(binary.LittleEndian.Uint16(b)) }
	u64 := binary.LittleEndian.Uint64
	if string(h[:4]) != elf.ELFMAG || elf.Class(h[elf.EI_CLASS]) != elf.ELFCLASS64 ||
		elf.Data(h[elf.EI_DATA]) != elf.ELFDATA2LSB {
		return fmt.Errorf("%w: not a 64-bit little-endian ELF", ErrFormat)
	}
	if m := elf.Machine(u16(h[18:])); m != elf.EM_X86_64 {
		return fmt.Errorf("%w: ELF for %v", ErrFormat, m)
	}
	if t := elf.Type(u16(h[16:])); t != elf.ET_EXEC && t != elf.ET_DYN {
		return fmt.Errorf("%w: ELF of type %v is not executable", ErrFormat, t)
	}
	phoff, phentsize, phnum := u64(h[32:]), u16(h[54:]), u16(h[56:])
	if phentsize != progHeaderSize || phnum == 0 || phnum > maxProgHeaders ||
		phoff > uint64(size) || phoff+phnum*progHeaderSize > uint64(size) {
		return fmt.Errorf("ELF of %d bytes with %d program headers of %d bytes at %d: %w", size, phnum, phentsize,
			phoff, ErrCorrupt)
	}
	table := make([]byte, phnum*progHeaderSize)
	if err := readAt(r, table, int64(phoff)); err != nil {
		return err
	}
	loadable := false
	for p := table; len(p) > 0; p = p[progHeaderSize:] {
		off, filesz, memsz := u64(p[8:]), u64(p[32:]), u64(p[40:])
		load := elf.ProgType(binary.LittleEndian.Uint32(p)) == elf.PT_LOAD
		if off > uint64(size) || filesz > uint64(size)-off || load && filesz > memsz {
			return fmt.Errorf("ELF of %d bytes with a segment of %d bytes at %d: %w", size, filesz, off, ErrCorrupt)
		}
		loadable = loadable || load
	}
	if !loadable {
		return fmt.Errorf("ELF without a loadable segment: %w", ErrCorrupt)
	}
	return nil
}
