// Package tinyguest emits guests of a few dozen instructions for tests and
// benchmarks that need a real Firecracker but no operating system in it.
//
// A guest is an ELF64 x86-64 executable with one PT_LOAD segment at 16 MiB and
// its entry there. It is entered in 64-bit mode by the Linux boot protocol,
// with interrupts off and the first GiB mapped one to one; it has no PVH note,
// which Firecracker 1.12 and later would follow instead. It needs 64 MiB of
// memory at most (more with [Guest.Pages]), one vCPU, no drive and no boot
// arguments, and runs on hosts whose KVM boots no Linux (PVM).
//
// It writes to the serial port without polling, as Firecracker's never fills.
// Firecracker sends both the serial port and, by default, its own log to
// stdout, interleaved within words: look for one unusual byte, or give the log
// a file of its own.
package tinyguest

import (
	"bytes"
	"encoding/binary"
	"slices"
)

// Then is what a guest does once its pages and its message are written.
type Then int

const (
	// Reboot resets the machine through the i8042 controller: Firecracker
	// exits with status 0.
	Reboot Then = iota
	// Idle halts for good. It uses no CPU time and ignores Ctrl-Alt-Del.
	Idle
	// Spin busies its vCPU for good.
	Spin
	// Count prints a counter that starts at 0, as eight hexadecimal digits and
	// a newline, about a hundred times a second for good; it busies its vCPU.
	// A guest restored from a snapshot goes on where it was.
	Count
	// AwaitKey reboots when the keyboard controller holds a byte, as it does
	// after Firecracker's SendCtrlAltDel; until then it busies its vCPU.
	AwaitKey
	// Echo writes what comes by the serial port back to it; until something does
	// it busies its vCPU.
	Echo
	// TripleFault shuts the CPU down: Firecracker exits, 1.12 with status 0 and
	// later versions with 1.
	TripleFault
	// Crash runs code where there is no memory, which KVM gives up on:
	// Firecracker exits with status 1. The guest must have less than 1 GiB.
	//
	// Firecracker signals a vCPU's end before it stores the vCPU's status, so
	// status 0 is seen now and then; its log always names the KVM exit.
	Crash
	// Flood prints printable lines as fast as it can, for good.
	Flood
	// Sweep looks at the pages of [Guest.Pages], of which there must be some, and
	// writes to each, again and again for good. After each time it prints a dot,
	// and waits for as long as Count does. When a page does not hold what it
	// should, it prints an exclamation mark and halts.
	Sweep
)

// DirtyBase is the guest physical address of the first page that
// [Guest.Pages] writes.
const DirtyBase = 32 << 20

// PageSize is the size in bytes of a page that [Guest.Pages] counts.
const PageSize = 4096

// Guest describes a guest. The zero value reboots at once.
type Guest struct {
	// Pages is how many pages the guest writes from DirtyBase on, before it
	// prints: each begins with its own address, eight bytes, little endian.
	// They must lie within the guest's memory and below 1 GiB.
	Pages uint32
	// Message is printed once on the serial port.
	Message string
	// Then is what follows.
	Then Then
}

const (
	loadAddr   = 16 << 20
	headerSize = 64 // Elf64_Ehdr
	phdrSize   = 56 // Elf64_Phdr
	codeOffset = PageSize
)

// Image returns the guest as an ELF file. It panics when g.Then is none of the
// constants of this package.
func Image(g Guest) []byte {
	end, ok := endings[g.Then]
	if !ok {
		panic("tinyguest: unknown ending")
	}
	if g.Then == Sweep {
		end = patch(end, DirtyBase, g.Pages)
	}
	var code []byte
	if g.Pages > 0 {
		code = append(code, patch(dirty, DirtyBase, g.Pages)...)
	}
	if g.Message != "" {
		// The message follows all code.
		at := loadAddr + len(code) + len(printMessage) + len(end)
		code = append(code, patch(printMessage, uint32(at), uint32(len(g.Message)))...)
	}
	code = append(code, end...)
	code = append(code, g.Message...)
	return elf(code)
}

// patch returns a copy of a fragment that begins with two five-byte
// "mov r32, imm32" instructions, with their operands set.
func patch(fragment []byte, first, second uint32) []byte {
	f := slices.Clone(fragment)
	binary.LittleEndian.PutUint32(f[1:], first)
	binary.LittleEndian.PutUint32(f[6:], second)
	return f
}

// elf wraps code into an executable that is loaded and entered at loadAddr.
// The fields are those of the ELF-64 object file format, in file order.
func elf(code []byte) []byte {
	var b bytes.Buffer
	b.WriteString("\x7fELF\x02\x01\x01") // 64-bit, little endian, version 1
	b.Write(make([]byte, 9))             // System V ABI, padding
	put := func(v any) { _ = binary.Write(&b, binary.LittleEndian, v) }
	put([]uint16{2, 62})                                          // e_type ET_EXEC, e_machine EM_X86_64
	put(uint32(1))                                                // e_version
	put([]uint64{loadAddr, headerSize, 0})                        // e_entry, e_phoff, e_shoff
	put(uint32(0))                                                // e_flags
	put([]uint16{headerSize, phdrSize, 1, 64, 0, 0})              // e_ehsize, e_phentsize, e_phnum, e_sh*
	put([]uint32{1, 5})                                           // p_type PT_LOAD, p_flags R+X
	put([]uint64{codeOffset, loadAddr, loadAddr})                 // p_offset, p_vaddr, p_paddr
	put([]uint64{uint64(len(code)), uint64(len(code)), PageSize}) // p_filesz, p_memsz, p_align
	b.Write(make([]byte, codeOffset-b.Len()))
	b.Write(code)
	return b.Bytes()
}
