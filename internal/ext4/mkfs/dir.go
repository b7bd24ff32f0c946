package mkfs

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const maxName = 255 // bytes

// dirent is a name in a directory.
type dirent struct {
	name   string
	node   Node
	number uint32
	kind   byte
	hash   uint32 // of the name, in a directory with an index
}

func (d *dirent) size() int { return roundUp(8+len(d.name), 4) }

// kinds are those of directory entries, by those of inodes.
var kinds = [16]byte{
	unix.S_IFREG >> 12: 1, unix.S_IFDIR >> 12: 2, unix.S_IFCHR >> 12: 3, unix.S_IFBLK >> 12: 4, unix.S_IFIFO >> 12: 5,
	unix.S_IFLNK >> 12: 7,
}

// names writes the blocks of a directory. Those that need more than one have an index, by which the
// kernel finds a name in a block or two.
func (w *Writer) names(dir *Inode, parent uint32, all []dirent) error {
	dots := []dirent{{name: ".", number: dir.number, kind: 2}, {name: "..", number: parent, kind: 2}}
	size := 0
	for k := range all {
		size += all[k].size()
	}
	c := &dir.Content
	if size+dots[0].size()+dots[1].size() <= blockSize {
		w.put(c, 0, leaf(append(dots, all...)))
		c.size = blockSize
		return nil
	}
	for k := range all {
		all[k].hash = hash(all[k].name)
	}
	slices.SortFunc(all, func(a, b dirent) int {
		return cmp.Or(cmp.Compare(a.hash, b.hash), strings.Compare(a.name, b.name))
	})
	leaves, hashes := split(all)
	root := make([]pointer, len(leaves))
	for k := range root {
		root[k] = pointer{hashes[k], uint32(1 + k)}
	}
	var nodes [][]pointer
	if len(root) > rootPointers {
		nodes = slices.Collect(slices.Chunk(root, nodePointers))
		root = make([]pointer, len(nodes))
		for k := range root {
			root[k] = pointer{nodes[k][0].hash, uint32(1 + len(leaves) + k)}
		}
	}
	if len(root) > rootPointers {
		return fmt.Errorf("a directory of %d blocks, where %d can have an index", len(leaves), rootPointers*nodePointers)
	}
	b := leaf(dots) // whose last entry is as long as the block, so that the index is within it
	b[rootHead-3], b[rootHead-4] = 8, hashTEA
	b[rootHead-2] = byte(min(len(nodes), 1)) // levels of nodes
	putPointers(b[rootHead:], root)
	w.put(c, 0, b)
	for _, l := range leaves {
		w.put(c, c.blocks, leaf(l))
	}
	for _, n := range nodes {
		b := leaf([]dirent{{}}) // an entry of nothing, as long as the block
		putPointers(b[nodeHead:], n)
		w.put(c, c.blocks, b)
	}
	c.size = int64(c.blocks) * blockSize
	w.shorten(c)
	return nil
}

// leaf is a block with names. The last takes what is left.
func leaf(all []dirent) []byte {
	block := make([]byte, blockSize)
	b := block
	for k := range all {
		d := &all[k]
		size := d.size()
		if k == len(all)-1 {
			size = len(b)
		}
		le.PutUint32(b, d.number)
		le.PutUint16(b[4:], uint16(size))
		b[6], b[7] = byte(len(d.name)), d.kind
		copy(b[8:], d.name)
		b = b[size:]
	}
	return block
}

// split shares names that are ordered by their hash out to blocks, and returns the hash that each
// begins with; its lowest bit says that the block before ends with the same one.
func split(all []dirent) (leaves [][]dirent, hashes []uint32) {
	for len(all) > 0 {
		n, left := 0, blockSize
		for n < len(all) && all[n].size() <= left {
			left -= all[n].size()
			n++
		}
		first := all[0].hash
		if len(leaves) > 0 {
			before := leaves[len(leaves)-1]
			if before[len(before)-1].hash == first {
				first |= 1
			}
		}
		leaves, hashes, all = append(leaves, all[:n]), append(hashes, first), all[n:]
	}
	return leaves, hashes
}

// pointer leads from a node of the index to another or to a block of names, all of whose hashes are
// at least as large.
type pointer struct{ hash, block uint32 }

// What a directory's first block and the other nodes of its index have before their pointers, and
// how many of these there can be.
const (
	rootHead, nodeHead = 32, 8
	rootPointers       = (blockSize - rootHead) / 8
	nodePointers       = (blockSize - nodeHead) / 8
)

// putPointers fills a node. The first pointer's hash is not needed: the counts are in its place.
func putPointers(b []byte, all []pointer) {
	limit := len(b) / 8
	for k, p := range all {
		le.PutUint32(b[8*k:], p.hash)
		le.PutUint32(b[8*k+4:], p.block)
	}
	le.PutUint16(b, uint16(limit))
	le.PutUint16(b[2:], uint16(len(all)))
}

// hashTEA is the number of the hash below, and hashSeed what it begins with.
const hashTEA = 2

var hashSeed = [4]uint32{0x67452301, 0xefcdab89, 0x98badcfe, 0x10325476}

// hash is a name's place in a directory: the Tiny Encryption Algorithm with 16 bytes of the name at
// a time as its key, as the kernel's fs/ext4/hash.c has it for unsigned characters.
func hash(name string) uint32 {
	x, y := hashSeed[0], hashSeed[1]
	for len(name) > 0 {
		var key [4]uint32
		for k := range key {
			key[k] = uint32(len(name)) * 0x01010101
		}
		n := min(len(name), 16)
		for k := range n {
			key[k/4] = key[k/4]<<8 + uint32(name[k])
		}
		name = name[n:]
		a, b, sum := x, y, uint32(0)
		for range 16 {
			sum += 0x9e3779b9
			a += (b<<4 + key[0]) ^ (b + sum) ^ (b>>5 + key[1])
			b += (a<<4 + key[2]) ^ (a + sum) ^ (a>>5 + key[3])
		}
		x, y = x+a, y+b
	}
	// The lowest bit has a meaning of its own, and the largest hash is the end of a directory.
	return min(x&^1, 0xfffffffc)
}
