package mkfs

import (
	"cmp"
	"errors"
	"fmt"
	"iter"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Node is a name of a file.
type Node interface {
	// Inode is the file. It is the same for all names of a file, and a directory has one name.
	Inode() *Inode
	// Children are what a directory holds, in any order.
	Children() iter.Seq2[string, Node]
}

// FileError says which file ext4 cannot hold.
type FileError struct {
	Name   string // relative to the root; "." is that itself
	Reason string
}

func (e *FileError) Error() string { return fmt.Sprintf("%q: %s", e.Name, e.Reason) }

const (
	rootNumber     = 2
	reservedInodes = 10
	lostAndFound   = "lost+found"
)

// Finish writes a tree of names and all else. The Writer is of no use afterwards. Errors are
// *FileError and those of dst.
func (w *Writer) Finish(root Node) error {
	i := root.Inode()
	if !i.isDir() {
		return &FileError{".", "must be a directory"}
	}
	w.inodes = append(make([]*Inode, 0, 1<<10), nil)
	err := w.add(i)
	w.inodes = append(w.inodes, make([]*Inode, reservedInodes-len(w.inodes))...)
	if err != nil {
		return &FileError{".", err.Error()}
	}
	if err := w.directory(root, rootNumber, "."); err != nil {
		return err
	}
	w.groups()
	return w.err
}

// directory numbers what a directory holds, writes its names, and goes on with the directories in
// it. The order of all is that of the names, so that the same tree gives the same bytes.
func (w *Writer) directory(n Node, parent uint32, name string) error {
	dir := n.Inode()
	var all []dirent
	for name, child := range n.Children() {
		all = append(all, dirent{name: name, node: child})
	}
	if name == "." {
		all = withLostAndFound(all)
	}
	slices.SortFunc(all, func(a, b dirent) int { return strings.Compare(a.name, b.name) })
	var dirs []dirent
	for k := range all {
		d := &all[k]
		i := d.node.Inode()
		err := w.name(d, i)
		if err == nil && name == "." && d.name == lostAndFound && !i.isDir() {
			err = errors.New("must be a directory")
		}
		if err != nil {
			return &FileError{path.Join(name, d.name), err.Error()}
		}
		if i.isDir() {
			dirs = append(dirs, *d)
		}
	}
	dir.links = uint32(len(dirs) + 2)
	if dir.links > maxLinks {
		dir.links = 1 // which says that nobody has counted
	}
	if err := w.names(dir, parent, all); err != nil {
		return &FileError{name, err.Error()}
	}
	if w.err != nil {
		return w.err
	}
	for _, d := range dirs {
		if err := w.directory(d.node, dir.number, path.Join(name, d.name)); err != nil {
			return err
		}
	}
	return nil
}

// name counts a name of a file, which is added with its first.
func (w *Writer) name(d *dirent, i *Inode) error {
	if d.name == "" || len(d.name) > maxName {
		return fmt.Errorf("a name of %d bytes", len(d.name))
	}
	if d.kind = kinds[i.Mode>>12]; d.kind == 0 {
		return fmt.Errorf("mode %#o", i.Mode)
	}
	if i.number == 0 {
		if err := w.add(i); err != nil {
			return err
		}
	}
	d.number = i.number
	if i.links++; i.links > maxLinks {
		return fmt.Errorf("more than %d hard links to one file, which ext4 cannot have: "+
			"make some of them copies, or leave some out", maxLinks)
	}
	return nil
}

// empty is a directory with nothing in it.
type empty struct{ inode Inode }

func (e *empty) Inode() *Inode                     { return &e.inode }
func (e *empty) Children() iter.Seq2[string, Node] { return func(func(string, Node) bool) {} }

// withLostAndFound adds the directory that e2fsck wants the root to have.
func withLostAndFound(all []dirent) []dirent {
	if slices.ContainsFunc(all, func(d dirent) bool { return d.name == lostAndFound }) {
		return all
	}
	dir := &empty{Inode{Mode: unix.S_IFDIR | 0o700, ModTime: time.Unix(0, 0)}}
	return append(all, dirent{name: lostAndFound, node: dir})
}

// Groups of blocks: what describes each is found by its descriptor, wherever it is (flex_bg).
const (
	maxGroup       = 8 * blockSize      // blocks of a group, and inodes: a bitmap of each is a block
	maxGroups      = 1<<32/maxGroup - 1 // blocks have numbers of 32 bits
	descriptorSize = 32
	inodesInBlock  = blockSize / inodeSize
)

// layout is where groups have what describes them: behind all contents come the inodes of all
// groups and then two bitmaps of each.
type layout struct {
	groups, group   int64 // how many there are, and of how many blocks
	inodes          int64 // of a group
	tables, bitmaps int64 // the first block of each
	end, size       int64 // blocks that are in use, and all
}

func layOut(tables, inodes int64) (l layout) {
	l = layout{tables: tables, group: maxGroup, groups: ceil(inodes, maxGroup)}
	for need := int64(0); ; l.groups = need {
		l.inodes = roundUp(ceil(inodes, l.groups), inodesInBlock)
		l.bitmaps = tables + l.groups*l.inodes/inodesInBlock
		l.end = l.bitmaps + 2*l.groups
		if need = ceil(l.end, maxGroup); need == l.groups {
			break
		}
		if need < l.groups {
			// Inodes need more groups than blocks do, so that groups are smaller.
			l.group = roundUp(ceil(l.end, l.groups), 8)
			break
		}
	}
	l.size = max(l.end, (l.groups-1)*l.group+1)
	return l
}

// groups writes inodes, bitmaps, descriptors and, at last, the superblock.
func (w *Writer) groups() {
	l := layOut(w.next(), int64(len(w.inodes)))
	if l.groups > w.max/maxGroup && w.err == nil {
		w.err = fmt.Errorf("write ext4: it has %d groups of blocks, more than %d", l.groups, w.max/maxGroup)
	}
	if w.err != nil {
		return
	}
	descriptors := make([]byte, l.groups*descriptorSize)
	w.writeInodes(l, descriptors)
	w.flush()
	w.at = l.bitmaps
	// Descriptors that are not needed are free, and so is what a last group has too much.
	used := 1 + ceil(int64(len(descriptors)), blockSize)
	w.free = append(w.free, extent{at: uint32(used), count: uint32(1 + w.descriptors - used)},
		extent{at: uint32(l.end), count: uint32(l.size - l.end)})
	slices.SortFunc(w.free, func(a, b extent) int { return cmp.Compare(a.at, b.at) })
	free := int64(0)
	for g := range l.groups {
		d := descriptors[g*descriptorSize:]
		blocks, freeBlocks := w.blockBitmap(l, g)
		inodes, freeInodes := w.inodeBitmap(l, g)
		free += freeBlocks
		le.PutUint32(d, w.append(blocks))
		le.PutUint32(d[0x4:], w.append(inodes))
		le.PutUint32(d[0x8:], uint32(l.tables+g*l.inodes/inodesInBlock))
		le.PutUint16(d[0xc:], uint16(freeBlocks))
		le.PutUint16(d[0xe:], uint16(freeInodes))
	}
	w.flush()
	w.write(descriptors, blockSize)
	w.superblock(l, free)
	if w.err != nil {
		return
	}
	if err := w.dst.Truncate(l.size * blockSize); err != nil {
		w.err = fmt.Errorf("write ext4: %w", err)
	}
}

// writeInodes writes the tables of inodes, and counts the directories of each group.
func (w *Writer) writeInodes(l layout, descriptors []byte) {
	block := make([]byte, blockSize)
	for first := 0; first < len(w.inodes); first += inodesInBlock {
		clear(block)
		for k, i := range w.inodes[first:min(first+inodesInBlock, len(w.inodes))] {
			if i == nil {
				continue
			}
			i.encode(block[k*inodeSize : (k+1)*inodeSize])
			if i.isDir() {
				count := descriptors[int64(first+k)/l.inodes*descriptorSize+0x10:]
				le.PutUint16(count, le.Uint16(count)+1)
			}
		}
		w.append(block)
	}
}

// blockBitmap makes that of a group. Blocks are in use but for those that are known to be free.
func (w *Writer) blockBitmap(l layout, g int64) (bitmap []byte, free int64) {
	bitmap = allOnes()
	first, end := g*l.group, min((g+1)*l.group, l.size)
	for ; len(w.free) > 0 && int64(w.free[0].at) < end; w.free = w.free[1:] {
		e := w.free[0]
		begin := max(int64(e.at), first)
		last := min(int64(e.at)+int64(e.count), end)
		zeroBits(bitmap, begin-first, last-first)
		free += last - begin
		if int64(e.at)+int64(e.count) > end {
			break // it goes on in the next group
		}
	}
	return bitmap, free
}

func (w *Writer) inodeBitmap(l layout, g int64) (bitmap []byte, free int64) {
	bitmap = allOnes()
	used := min(max(int64(len(w.inodes))-g*l.inodes, 0), l.inodes)
	zeroBits(bitmap, used, l.inodes)
	return bitmap, l.inodes - used
}

// allOnes is a bitmap in which also what is beyond a group's end is in use, as e2fsck wants it.
func allOnes() []byte {
	b := make([]byte, blockSize)
	for k := range b {
		b[k] = 0xff
	}
	return b
}

func zeroBits(b []byte, from, to int64) {
	for ; from < to; from++ {
		b[from/8] &^= 1 << (from % 8)
	}
}

// superblock writes the first block. It has no times, and no UUID or label.
func (w *Writer) superblock(l layout, free int64) {
	const (
		// Extended attributes, indexes of directories, no backups of the superblock (sparse_super2).
		compatible = 0x8 | 0x20 | 0x200
		// Kinds in directories, extents, groups that are described anywhere.
		incompatible = 0x2 | 0x40 | 0x200
		// Large and huge files, any number of directories, large inodes, and no process may write.
		readOnly = 0x2 | 0x8 | 0x20 | 0x40 | 0x1000
	)
	b := make([]byte, 1024)
	inodes := uint32(l.groups * l.inodes)
	for at, v := range map[int]uint32{
		0x0: inodes, 0x4: uint32(l.size), 0xc: uint32(free), 0x10: inodes - uint32(len(w.inodes)),
		0x18: 2, 0x1c: 2, // blocks of 1 KiB << 2
		0x20: uint32(l.group), 0x24: uint32(l.group), 0x28: uint32(l.inodes),
		0x4c: 1, 0x54: reservedInodes + 1,
		0x5c: compatible, 0x60: incompatible, 0x64: readOnly,
		0xec: hashSeed[0], 0xf0: hashSeed[1], 0xf4: hashSeed[2], 0xf8: hashSeed[3],
		0x160: 2, // hashes are of unsigned characters
	} {
		le.PutUint32(b[at:], v)
	}
	for at, v := range map[int]uint16{
		0x38: 0xef53,
		0x3a: 1, // it is sound
		0x3c: 1, // go on after an error
		0x58: inodeSize, 0x15c: newInode, 0x15e: newInode,
	} {
		le.PutUint16(b[at:], v)
	}
	b[0xfc] = hashTEA
	b[0x174] = 4 // 16 groups share an area, for a kernel that writes
	w.write(b, 1024)
}
