package mkfs

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Inode is a file of any kind.
type Inode struct {
	Mode         uint16 // with the kind, as in Linux's st_mode
	UID, GID     uint32
	ModTime      time.Time // before 1901 and after 2310 the nearest that e2fsck believes
	Target       string    // of a symbolic link; at most 4,095 bytes
	Major, Minor uint32    // of a device
	Content      Content   // of a regular file
	Attributes   Attributes

	number, links uint32
}

const (
	inodeSize = 256
	oldInode  = 128 // bytes of it that ext2 knows
	newInode  = 32  // bytes of it that ext4 adds; what is left is for extended attributes

	shortTarget = 60 // a symbolic link to a shorter name has it in its inode
	maxTarget   = blockSize - 1
	maxLinks    = 65000

	hasExtents = 0x80000
	hasIndex   = 0x1000
)

func (i *Inode) kind() uint16 { return i.Mode & unix.S_IFMT }

func (i *Inode) isDir() bool { return i.kind() == unix.S_IFDIR }

// add gives an inode its number, and writes what it has no room for.
func (w *Writer) add(i *Inode) error {
	w.inodes = append(w.inodes, i)
	i.number = uint32(len(w.inodes))
	if i.kind() == unix.S_IFLNK {
		if len(i.Target) == 0 || len(i.Target) > maxTarget {
			return fmt.Errorf("a symbolic link to a name of %d bytes", len(i.Target))
		}
		i.Content = Content{size: int64(len(i.Target))}
		if len(i.Target) >= shortTarget {
			b := zeros
			copy(b[:], i.Target)
			w.put(&i.Content, 0, b[:])
		}
	}
	w.shorten(&i.Content)
	return nil
}

// What a block and an inode have room for, besides a header that is as large as an extent.
const (
	extentSize   = 12
	nodeExtents  = blockSize/extentSize - 1
	inodeExtents = 4
)

// shorten makes a tree of extents that an inode has no room for.
func (w *Writer) shorten(c *Content) {
	for len(c.extents) > inodeExtents {
		var nodes []extent
		for part := range slices.Chunk(c.extents, nodeExtents) {
			var b [blockSize]byte
			putExtents(b[:], part, c.depth)
			nodes = append(nodes, extent{first: part[0].first, at: w.append(b[:])})
		}
		c.blocks += uint32(len(nodes))
		c.extents, c.depth = nodes, c.depth+1
	}
}

// putExtents fills a node of a tree.
func putExtents(b []byte, all []extent, depth uint16) {
	le.PutUint16(b, 0xf30a)
	le.PutUint16(b[2:], uint16(len(all)))
	le.PutUint16(b[4:], uint16(len(b)/extentSize-1))
	le.PutUint16(b[6:], depth)
	for _, e := range all {
		b = b[extentSize:]
		le.PutUint32(b, e.first)
		if depth == 0 {
			le.PutUint16(b[4:], uint16(e.count))
			le.PutUint32(b[8:], e.at)
		} else {
			le.PutUint32(b[4:], e.at)
		}
	}
}

// encode fills an inode.
func (i *Inode) encode(b []byte) {
	blocks := int64(i.Content.blocks)
	if i.Attributes.block != 0 {
		blocks++
	}
	blocks *= blockSize / 512
	seconds := min(max(i.ModTime.Unix(), math.MinInt32), math.MaxInt32+2<<32)
	more := uint32(i.ModTime.Nanosecond())<<2 | uint32((seconds-int64(int32(seconds)))>>32)&3
	le.PutUint16(b, i.Mode)
	le.PutUint16(b[0x2:], uint16(i.UID))
	le.PutUint32(b[0x4:], uint32(i.Content.size))
	le.PutUint32(b[0x10:], uint32(seconds))
	le.PutUint16(b[0x18:], uint16(i.GID))
	le.PutUint16(b[0x1a:], uint16(i.links))
	le.PutUint32(b[0x1c:], uint32(blocks))
	le.PutUint32(b[0x68:], i.Attributes.block)
	le.PutUint32(b[0x6c:], uint32(i.Content.size>>32))
	le.PutUint16(b[0x74:], uint16(blocks>>32))
	le.PutUint16(b[0x78:], uint16(i.UID>>16))
	le.PutUint16(b[0x7a:], uint16(i.GID>>16))
	le.PutUint16(b[0x80:], newInode)
	le.PutUint32(b[0x88:], more)
	le.PutUint32(b[0x90:], uint32(seconds)) // when it was made
	le.PutUint32(b[0x94:], more)
	le.PutUint32(b[0x20:], i.place(b[0x28:0x64]))
	if all := i.Attributes.inode; all != nil {
		copy(b[oldInode+newInode:], all[:])
	}
}

// place says where a file's content is, and returns the inode's flags.
func (i *Inode) place(b []byte) uint32 {
	flags := uint32(0)
	switch i.kind() {
	case unix.S_IFLNK:
		if len(i.Target) < shortTarget {
			copy(b, i.Target)
			return 0
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if i.Major < 256 && i.Minor < 256 {
			le.PutUint32(b, i.Major<<8|i.Minor)
		} else {
			le.PutUint32(b[4:], i.Minor&0xff|i.Major<<8|i.Minor>>8<<20)
		}
		return 0
	case unix.S_IFDIR:
		if i.Content.blocks > 1 {
			flags = hasIndex
		}
	case unix.S_IFREG:
	default:
		return 0
	}
	putExtents(b, i.Content.extents, i.Content.depth)
	return flags | hasExtents
}

const (
	attributesMagic = 0xea020000
	attributesHead  = 32 // bytes that a block of them begins with
	attributeSize   = 16 // bytes of one without its name and value
	inodeAttributes = inodeSize - oldInode - newInode - 4
	blockAttributes = blockSize - attributesHead
)

// attribute is an extended attribute.
type attribute struct {
	space       byte
	name, value string
}

// sorted are extended attributes in the order in which the kernel looks for them.
func sorted(xattrs map[string]string) (all []attribute, err error) {
	spaces := map[string]byte{"user": 1, "trusted": 4, "security": 6}
	for full, value := range xattrs {
		space, name, _ := strings.Cut(full, ".")
		if spaces[space] == 0 || name == "" || len(name) > maxName {
			return nil, fmt.Errorf("an extended attribute %q", full)
		}
		all = append(all, attribute{spaces[space], name, value})
	}
	slices.SortFunc(all, func(a, b attribute) int {
		return cmp.Or(cmp.Compare(a.space, b.space), cmp.Compare(len(a.name), len(b.name)), strings.Compare(a.name, b.name))
	})
	return all, nil
}

// Attributes are where the extended attributes of a file are. The zero value is that of none.
type Attributes struct {
	inode *[4 + inodeAttributes]byte // nil: the inode has none
	block uint32                     // that has all of them; 0: none has
}

// Attributes writes the extended attributes of a file, by their full names: user, trusted and
// security ones, and no more than fit into a block. An error says what is wrong with them.
func (w *Writer) Attributes(xattrs map[string]string) (a Attributes, err error) {
	if len(xattrs) == 0 {
		return a, nil
	}
	all, err := sorted(xattrs)
	size := 4 // of zeros, which mark the end
	for _, x := range all {
		size += attributeSize + roundUp(len(x.name), 4) + roundUp(len(x.value), 4)
	}
	switch {
	case err != nil:
		return a, err
	case size > blockAttributes:
		return a, fmt.Errorf("%d bytes of extended attributes, where there is room for %d", size, blockAttributes)
	case size > inodeAttributes:
		var b [blockSize]byte
		le.PutUint32(b[:], attributesMagic)
		le.PutUint32(b[4:], 1) // file that has them
		le.PutUint32(b[8:], 1) // block
		putAttributes(b[attributesHead:], attributesHead, all)
		a.block = w.append(b[:])
		return a, w.err
	}
	a.inode = new([4 + inodeAttributes]byte)
	le.PutUint32(a.inode[:], attributesMagic)
	putAttributes(a.inode[4:], 0, all)
	return a, nil
}

// putAttributes puts attributes at the beginning of b and their values at its end. Offsets count
// from shift bytes before b.
func putAttributes(b []byte, shift int, all []attribute) {
	end := len(b)
	for at := 0; len(all) > 0; all = all[1:] {
		a := &all[0]
		e := b[at:]
		e[0], e[1] = byte(len(a.name)), a.space
		if len(a.value) > 0 {
			end -= roundUp(len(a.value), 4)
			le.PutUint16(e[2:], uint16(end+shift))
			copy(b[end:], a.value)
		}
		le.PutUint32(e[8:], uint32(len(a.value)))
		copy(e[attributeSize:], a.name)
		le.PutUint32(e[12:], a.hash(b[end:end+roundUp(len(a.value), 4)]))
		at += attributeSize + roundUp(len(a.name), 4)
	}
}

// hash is what the kernel and e2fsck compute of an attribute and its value, with zeros behind it.
func (a *attribute) hash(value []byte) (h uint32) {
	for k := range len(a.name) {
		h = h<<5 ^ h>>27 ^ uint32(a.name[k])
	}
	for ; len(value) > 0; value = value[4:] {
		h = h<<16 ^ h>>16 ^ le.Uint32(value)
	}
	return h
}
