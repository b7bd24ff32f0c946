// Package kerneltest makes kernels and modules for tests: as small as what reads them allows.
package kerneltest

import (
	"encoding/binary"
	"strings"
)

// Module returns a relocatable ELF with a .modinfo section that holds fields, NAME=VALUE each.
func Module(fields ...string) []byte {
	le := binary.LittleEndian
	info := strings.Join(fields, "\x00") + "\x00"
	names := "\x00.modinfo\x00.shstrtab\x00"
	b := make([]byte, 64)
	copy(b, "\x7fELF\x02\x01\x01")
	le.PutUint16(b[16:], 1)  // ET_REL
	le.PutUint16(b[18:], 62) // x86-64
	le.PutUint32(b[20:], 1)
	le.PutUint16(b[52:], 64)
	le.PutUint64(b[40:], uint64(64+len(info)+len(names))) // section headers
	le.PutUint16(b[58:], 64)
	le.PutUint16(b[60:], 3)
	le.PutUint16(b[62:], 2)
	b = append(b, info+names...)
	section := func(name, kind uint32, off, size int) {
		h := make([]byte, 64)
		le.PutUint32(h, name)
		le.PutUint32(h[4:], kind)
		le.PutUint64(h[24:], uint64(off))
		le.PutUint64(h[32:], uint64(size))
		b = append(b, h...)
	}
	section(0, 0, 0, 0)
	section(1, 1, 64, len(info))
	section(10, 3, 64+len(info), len(names))
	return b
}

// BzImage returns a bzImage of an uncompressed vmlinux, which says of itself that it is of a
// release.
func BzImage(vmlinux []byte, release string) []byte {
	const sector, sectors, version = 512, 3, 0x300
	b := make([]byte, sector*sectors)
	le := binary.LittleEndian
	b[0x1f1] = sectors - 1
	le.PutUint16(b[0x1fe:], 0xaa55)
	copy(b[0x202:], "HdrS")
	le.PutUint16(b[0x206:], 0x020f)
	le.PutUint16(b[0x20e:], version-0x200)
	copy(b[version:], release+" (x@y) #1 SMP")
	le.PutUint16(b[0x236:], 1)
	le.PutUint32(b[0x24c:], uint32(len(vmlinux)+4))
	return le.AppendUint32(append(b, vmlinux...), uint32(len(vmlinux)))
}
