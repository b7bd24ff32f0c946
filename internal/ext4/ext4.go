// Package ext4 reads ext4 file systems that nobody has mounted, and trusts nothing in them. What it
// knows of the format is from https://docs.kernel.org/filesystems/ext4/
package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

// ErrFormat says that a file system is damaged, or has features that this package does not read.
var ErrFormat = errors.New("not an ext4 that can be read here")

func malformed(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// Features without which a file system cannot be read, as far as it makes a difference here.
const (
	needsRecovery = 0x4 // its journal has to be replayed
	has64Bits     = 0x80
	// Types of files in directories, extents, MMP, flexible groups, seeds of checksums, large
	// directories.
	readable = has64Bits | 0x2 | 0x40 | 0x100 | 0x200 | 0x2000 | 0x4000
)

const (
	superblock = 1024
	rootInode  = 2
	oldInode   = 128 // bytes of it without what came later
	maxDepth   = 5   // of extents' trees
)

var le = binary.LittleEndian

// FS is a file system. It is not safe for concurrent use.
type FS struct {
	r                         io.ReaderAt
	block                     int64 // bytes
	blocks                    uint64
	inodes, perGroup          uint32
	inodeSize, descriptorSize int64
	descriptors               int64 // where they begin
}

// Open reads what describes the file system, and its journal, if that has to be replayed, which is
// done in memory. Errors are ErrFormat and those of r.
func Open(r io.ReaderAt) (*FS, error) {
	b := make([]byte, 1024)
	if _, err := r.ReadAt(b, superblock); err != nil {
		return nil, fmt.Errorf("read ext4: %w", err)
	}
	if le.Uint16(b[0x38:]) != 0xef53 {
		return nil, malformed("it has no superblock")
	}
	features := le.Uint32(b[0x60:])
	if unknown := features &^ (readable | needsRecovery); unknown != 0 {
		return nil, malformed("it has features %#x", unknown)
	}
	if shift := le.Uint32(b[0x18:]); shift > 6 {
		return nil, malformed("blocks of 2^%d KiB", shift)
	}
	f := &FS{
		r: r, block: 1024 << le.Uint32(b[0x18:]), blocks: uint64(le.Uint32(b[4:])), inodes: le.Uint32(b),
		perGroup:  le.Uint32(b[0x28:]),
		inodeSize: oldInode, descriptorSize: 32,
	}
	if le.Uint32(b[0x4c:]) > 0 {
		f.inodeSize = int64(le.Uint16(b[0x58:]))
	}
	if features&has64Bits != 0 {
		f.descriptorSize = int64(le.Uint16(b[0xfe:]))
		f.blocks |= uint64(le.Uint32(b[0x150:])) << 32
	}
	f.descriptors = (int64(le.Uint32(b[0x14:])) + 1) * f.block
	switch {
	case f.inodeSize < oldInode || f.inodeSize > f.block:
		return nil, malformed("inodes of %d bytes", f.inodeSize)
	case f.descriptorSize < 32 || f.descriptorSize > 1024:
		return nil, malformed("group descriptors of %d bytes", f.descriptorSize)
	case f.perGroup == 0 || f.blocks == 0 || f.blocks > 1<<44/uint64(f.block):
		return nil, malformed("%d blocks, %d inodes in a group", f.blocks, f.perGroup)
	}
	if features&needsRecovery != 0 {
		if err := f.recover(); err != nil {
			return nil, err
		}
	}
	return f, nil
}

// inode is a file of any kind.
type inode struct {
	number      uint32
	mode        uint16
	links       uint16
	uid, gid    int
	size        int64
	modified    time.Time
	flags       uint32
	place       []byte // 60 bytes: where its content is, or the content of a short link
	attributes  []byte // within the inode
	moreInBlock uint64 // attributes; 0: none
}

const hasExtents = 0x80000

// inode reads one.
func (f *FS) inode(number uint32) (*inode, error) {
	if number == 0 || number > f.inodes {
		return nil, malformed("inode %d of %d", number, f.inodes)
	}
	group, index := (number-1)/f.perGroup, (number-1)%f.perGroup
	d := make([]byte, f.descriptorSize)
	if _, err := f.r.ReadAt(d, f.descriptors+int64(group)*f.descriptorSize); err != nil {
		return nil, fmt.Errorf("read ext4: %w", err)
	}
	table := uint64(le.Uint32(d[8:]))
	if len(d) >= 64 {
		table |= uint64(le.Uint32(d[0x28:])) << 32
	}
	if table >= f.blocks {
		return nil, malformed("group %d has its inodes at block %d", group, table)
	}
	b := make([]byte, f.inodeSize)
	if _, err := f.r.ReadAt(b, int64(table)*f.block+int64(index)*f.inodeSize); err != nil {
		return nil, fmt.Errorf("read ext4: %w", err)
	}
	i := &inode{
		number: number, mode: le.Uint16(b), links: le.Uint16(b[0x1a:]), flags: le.Uint32(b[0x20:]), place: b[0x28:0x64],
		uid:         int(le.Uint16(b[2:])) | int(le.Uint16(b[0x78:]))<<16,
		gid:         int(le.Uint16(b[0x18:])) | int(le.Uint16(b[0x7a:]))<<16,
		size:        int64(le.Uint32(b[4:])) | int64(le.Uint32(b[0x6c:]))<<32,
		moreInBlock: uint64(le.Uint32(b[0x68:])) | uint64(le.Uint16(b[0x76:]))<<32,
	}
	seconds, nanoseconds := int64(int32(le.Uint32(b[0x10:]))), int64(0)
	if len(b) > oldInode+2 {
		extra := int64(le.Uint16(b[0x80:]))
		if extra > f.inodeSize-oldInode {
			return nil, malformed("inode %d has %d bytes more", number, extra)
		}
		if extra >= 12 {
			more := le.Uint32(b[0x88:])
			seconds, nanoseconds = seconds+int64(more&3)<<32, int64(more>>2)
		}
		i.attributes = b[oldInode+extra:]
	}
	i.modified = time.Unix(seconds, nanoseconds)
	if i.size < 0 {
		return nil, malformed("inode %d has a size of %d", number, i.size)
	}
	return i, nil
}

// extent is a run of blocks.
type extent struct {
	first, count uint64 // of the file's blocks
	at           uint64 // of the file system's; 0: zeros
}

// maxExtents is how many runs of blocks a file may have, and how many blocks may say where they
// are.
const maxExtents = 1 << 20

// mapping finds out where a file's content is.
type mapping struct {
	fs    *FS
	all   []extent
	nodes int
}

// extents are where the content of a file or directory is, in order.
func (f *FS) extents(i *inode) (all []extent, err error) {
	m := &mapping{fs: f}
	if i.flags&hasExtents != 0 {
		err = m.tree(i.place, maxDepth)
	} else {
		err = m.maps(i)
	}
	end := uint64(0)
	for _, e := range m.all {
		if e.first < end || e.at >= f.blocks || e.count > f.blocks-e.at {
			return nil, malformed("inode %d has block %d at %d", i.number, e.first, e.at)
		}
		end = e.first + e.count
	}
	return m.all, err
}

func (m *mapping) add(e extent) error {
	if n := len(m.all) - 1; n >= 0 && e.at != 0 && m.all[n].at != 0 && m.all[n].first+m.all[n].count == e.first &&
		m.all[n].at+m.all[n].count == e.at {
		m.all[n].count += e.count
		return nil
	}
	m.all = append(m.all, e)
	if len(m.all) > maxExtents {
		return malformed("a file in more than %d pieces", maxExtents)
	}
	return nil
}

// node reads a block that says where others are.
func (m *mapping) node(at uint64) ([]byte, error) {
	if m.nodes++; m.nodes > maxExtents {
		return nil, malformed("a file in more than %d pieces", maxExtents)
	}
	return m.fs.blockAt(at)
}

// tree reads a node of a tree of extents, which may be depth deep.
func (m *mapping) tree(node []byte, depth int) error {
	n, deep := int(le.Uint16(node[2:])), int(le.Uint16(node[6:]))
	if le.Uint16(node) != 0xf30a || deep > depth || 12*(n+1) > len(node) {
		return malformed("a tree of extents")
	}
	for k := range n {
		e := node[12*(k+1):]
		if deep == 0 {
			x := extent{
				first: uint64(le.Uint32(e)), count: uint64(le.Uint16(e[4:])),
				at: uint64(le.Uint16(e[6:]))<<32 | uint64(le.Uint32(e[8:])),
			}
			if x.count > 1<<15 { // room that was never written
				x.count, x.at = x.count-1<<15, 0
			}
			if err := m.add(x); err != nil {
				return err
			}
			continue
		}
		child, err := m.node(uint64(le.Uint32(e[4:])) | uint64(le.Uint16(e[8:]))<<32)
		if err == nil {
			err = m.tree(child, deep-1)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// maps reads where blocks are as ext2 has it: twelve, and three trees.
func (m *mapping) maps(i *inode) error {
	next, end := uint64(0), uint64(i.size/m.fs.block)+1
	var add func(at uint64, depth int) error
	add = func(at uint64, depth int) error {
		span := uint64(1)
		for range depth {
			span *= uint64(m.fs.block / 4)
		}
		if at == 0 || next >= end || depth == 0 {
			next += span
			if at == 0 || next > end {
				return nil
			}
			return m.add(extent{next - span, 1, at})
		}
		b, err := m.node(at)
		for ; err == nil && len(b) > 0; b = b[4:] {
			err = add(uint64(le.Uint32(b)), depth-1)
		}
		return err
	}
	for k := range 15 {
		if err := add(uint64(le.Uint32(i.place[4*k:])), max(0, k-11)); err != nil {
			return err
		}
	}
	return nil
}

func (f *FS) blockAt(n uint64) ([]byte, error) {
	if n == 0 || n >= f.blocks {
		return nil, malformed("block %d of %d", n, f.blocks)
	}
	b := make([]byte, f.block)
	if _, err := f.r.ReadAt(b, int64(n)*f.block); err != nil {
		return nil, fmt.Errorf("read ext4: %w", err)
	}
	return b, nil
}

// content reads what a file has.
type content struct {
	fs   *FS
	i    *inode
	all  []extent
	done int64
}

func (f *FS) content(i *inode) (*content, error) {
	all, err := f.extents(i)
	return &content{fs: f, i: i, all: all}, err
}

func (c *content) Read(p []byte) (int, error) {
	if c.done >= c.i.size {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), c.i.size-c.done)]
	at := uint64(c.done / c.fs.block)
	for len(c.all) > 0 && c.all[0].first+c.all[0].count <= at {
		c.all = c.all[1:]
	}
	hole, source := c.i.size-c.done, int64(0)
	if len(c.all) > 0 {
		e := c.all[0]
		if begin := int64(e.first) * c.fs.block; begin > c.done {
			hole = begin - c.done
		} else {
			left := int64(e.first+e.count)*c.fs.block - c.done
			p = p[:min(int64(len(p)), left)]
			hole = 0
			if e.at == 0 {
				hole = left
			}
			source = int64(e.at)*c.fs.block + c.done - begin
		}
	}
	if hole > 0 {
		p = p[:min(int64(len(p)), hole)]
		clear(p)
	} else if _, err := c.fs.r.ReadAt(p, source); err != nil {
		return 0, fmt.Errorf("read ext4: %w", err)
	}
	c.done += int64(len(p))
	return len(p), nil
}
