package ext4

import (
	"encoding/binary"
	"io"
)

// What the kernel's journal (https://docs.kernel.org/filesystems/ext4/journal.html) is made of.
const (
	journalInode = 8
	journalMagic = 0xc03b3998

	kindDescriptor = 1
	kindCommit     = 2
	kindRevoke     = 5

	journal64Bits    = 0x2
	journalChecksum2 = 0x8
	journalChecksum3 = 0x10
	// journalReadable are revoked blocks, wide numbers, commits without a wait, and checksums, which
	// are not looked at: nothing is trusted.
	journalReadable = 0x1 | journal64Bits | 0x4 | journalChecksum2 | journalChecksum3

	tagEscaped, tagSameUUID, tagLast = 1, 2, 8
	// maxJournal is how many blocks a journal may have, and of how many it may tell.
	maxJournal = 1 << 20
)

// journal is one whose blocks are found, but not read.
type journal struct {
	fs                *FS
	at                []uint64 // of each block
	first, start      uint32
	sequence          uint32
	features, tagSize uint32
	// newest is where what a block of the file system has now is in the journal; last is the
	// transaction that revoked one.
	newest map[uint64]replacement
	last   map[uint64]uint32
}

type replacement struct {
	at      uint64 // a block of the file system
	escaped bool   // it begins with the journal's own mark, which is left out there
}

// recovered is a file system as it would be when its journal has been replayed. Nothing is written.
type recovered struct {
	io.ReaderAt
	block  int64
	blocks map[uint64]replacement
}

func (r *recovered) ReadAt(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		at := off + int64(n)
		within := at % r.block
		part := p[n:min(len(p), n+int(r.block-within))]
		from, there := r.blocks[uint64(at/r.block)]
		if there {
			at = int64(from.at)*r.block + within
		}
		m, err := r.ReaderAt.ReadAt(part, at)
		if there && from.escaped && within < 4 {
			var mark [4]byte
			binary.BigEndian.PutUint32(mark[:], journalMagic)
			copy(part, mark[within:])
		}
		if n += m; err != nil {
			return n, err
		}
	}
	return n, nil
}

// recover has f read as if its journal had been replayed.
func (f *FS) recover() error {
	i, err := f.inode(journalInode)
	if err != nil {
		return err
	}
	all, err := f.extents(i)
	if err != nil {
		return err
	}
	j := &journal{fs: f, newest: map[uint64]replacement{}, last: map[uint64]uint32{}}
	for _, e := range all {
		if e.at == 0 || e.first != uint64(len(j.at)) || uint64(len(j.at))+e.count > maxJournal {
			return malformed("its journal has holes, or more than %d blocks", maxJournal)
		}
		for n := range e.count {
			j.at = append(j.at, e.at+n)
		}
	}
	if err := j.open(); err != nil || j.start == 0 {
		return err
	}
	end, err := j.walk(j.sequence+maxJournal, j.skip) // revoked is only what was committed
	if err == nil {
		_, err = j.walk(end, j.revoke)
	}
	if err == nil {
		_, err = j.walk(end, j.replace)
	}
	if err != nil {
		return err
	}
	f.r = &recovered{f.r, f.block, j.newest}
	return nil
}

func (j *journal) open() error {
	b, err := j.block(0)
	if err != nil {
		return err
	}
	be := binary.BigEndian
	kind := be.Uint32(b[4:])
	if be.Uint32(b) != journalMagic || kind != 3 && kind != 4 || int64(be.Uint32(b[12:])) != j.fs.block ||
		be.Uint32(b[16:]) > uint32(len(j.at)) {
		return malformed("its journal")
	}
	j.at = j.at[:be.Uint32(b[16:])]
	if j.first, j.sequence, j.start = be.Uint32(b[20:]), be.Uint32(b[24:]), be.Uint32(b[28:]); kind == 4 {
		j.features = be.Uint32(b[40:])
	}
	if unknown := j.features &^ journalReadable; unknown != 0 {
		return malformed("its journal has features %#x", unknown)
	}
	if j.first == 0 || int(j.first) >= len(j.at) || int(j.start) >= len(j.at) {
		return malformed("its journal begins at block %d of %d", j.start, len(j.at))
	}
	switch {
	case j.features&journalChecksum3 != 0:
		j.tagSize = 16
	default:
		j.tagSize = 8
		if j.features&journalChecksum2 != 0 {
			j.tagSize += 2
		}
		if j.features&journal64Bits != 0 {
			j.tagSize += 4
		}
	}
	return nil
}

func (j *journal) block(n uint32) ([]byte, error) {
	if int(n) >= len(j.at) {
		return nil, malformed("block %d of its journal", n)
	}
	return j.fs.blockAt(j.at[n])
}

func (j *journal) next(n uint32) uint32 {
	if n++; int(n) == len(j.at) {
		return j.first
	}
	return n
}

// walk calls see for what committed transactions before end have, and returns the first that was
// not committed.
func (j *journal) walk(end uint32,
	see func(transaction uint32, kind uint32, b []byte, at uint32) (data uint32, err error),
) (uint32, error) {
	be := binary.BigEndian
	sequence, n := j.sequence, j.start
	for seen := 0; seen <= len(j.at) && sequence != end; {
		b, err := j.block(n)
		if err != nil {
			return 0, err
		}
		kind := be.Uint32(b[4:])
		if be.Uint32(b) != journalMagic || be.Uint32(b[8:]) != sequence {
			break
		}
		if n = j.next(n); kind == kindCommit {
			sequence++
		} else if kind != kindDescriptor && kind != kindRevoke {
			break
		}
		data, err := see(sequence, kind, b, n)
		if err != nil {
			return 0, err
		}
		for range data {
			n = j.next(n)
		}
		seen += int(data) + 1
	}
	return sequence, nil
}

// tags calls see for each block that a descriptor tells of, and returns how many there are.
func (j *journal) tags(b []byte, see func(block uint64, flags uint32)) (count uint32, err error) {
	be := binary.BigEndian
	limit := len(b)
	if j.features&(journalChecksum2|journalChecksum3) != 0 {
		limit -= 4
	}
	for off := 12; off+int(j.tagSize) <= limit; count++ {
		tag := b[off:]
		block, flags := uint64(be.Uint32(tag)), uint32(be.Uint16(tag[6:]))
		if j.features&journalChecksum3 != 0 {
			flags = be.Uint32(tag[4:])
		}
		if j.features&journal64Bits != 0 {
			block |= uint64(be.Uint32(tag[8:])) << 32
		}
		if off += int(j.tagSize); flags&tagSameUUID == 0 {
			off += 16
		}
		if block >= j.fs.blocks {
			return 0, malformed("its journal has block %d of %d", block, j.fs.blocks)
		}
		if see(block, flags); flags&tagLast != 0 {
			return count + 1, nil
		}
	}
	return count, nil
}

func (j *journal) skip(_, kind uint32, b []byte, _ uint32) (uint32, error) {
	if kind != kindDescriptor {
		return 0, nil
	}
	return j.tags(b, func(uint64, uint32) {})
}

// revoke notes which blocks transactions have revoked.
func (j *journal) revoke(transaction, kind uint32, b []byte, _ uint32) (uint32, error) {
	if kind != kindRevoke {
		return j.skip(transaction, kind, b, 0)
	}
	size := 4
	if j.features&journal64Bits != 0 {
		size = 8
	}
	count := int(binary.BigEndian.Uint32(b[12:]))
	if count > len(b) {
		return 0, malformed("its journal revokes %d bytes", count)
	}
	for off := 16; off+size <= count; off += size {
		block := uint64(binary.BigEndian.Uint32(b[off:]))
		if size == 8 {
			block = binary.BigEndian.Uint64(b[off:])
		}
		if j.last[block] = transaction; len(j.last) > maxJournal {
			return 0, malformed("its journal revokes too many blocks")
		}
	}
	return 0, nil
}

// replace notes where what blocks have now is.
func (j *journal) replace(transaction, kind uint32, b []byte, at uint32) (uint32, error) {
	if kind != kindDescriptor {
		return 0, nil
	}
	return j.tags(b, func(block uint64, flags uint32) {
		if last, ok := j.last[block]; !ok || int32(transaction-last) > 0 {
			j.newest[block] = replacement{j.at[at], flags&tagEscaped != 0}
		}
		at = j.next(at)
	})
}
