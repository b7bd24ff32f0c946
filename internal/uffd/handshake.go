package uffd

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"golang.org/x/sys/unix"
)

// Limits of what a VMM may send.
const (
	maxMessage    = 64 << 10 // bytes
	maxRegions    = 64
	maxHandshake  = 10 * time.Second // from connecting to the whole message
	maxConnection = 16               // of others than the VMM
)

// ErrProtocol says that a VMM sent something else than it should.
var ErrProtocol = errors.New("unexpected message of the VMM")

// region is a part of the VMM's memory and where it is in the file.
type region struct {
	base, size, offset uint64 // bytes
}

// message is an element of what the VMM sends. Firecracker until 1.11 has page_size_kib only, in
// bytes all the same.
type message struct {
	Base        uint64 `json:"base_host_virt_addr"`
	Size        uint64 `json:"size"`
	Offset      uint64 `json:"offset"`
	PageSize    uint64 `json:"page_size"`
	PageSizeKiB uint64 `json:"page_size_kib"`
}

// handshake is what the VMM has sent.
type handshake struct {
	fd       int
	file     *os.File // the userfaultfd, which the caller closes
	regions  []region
	pageSize int64 // bytes
}

// receive reads what the VMM sends about a memory file of that size.
func receive(conn *net.UnixConn, size int64) (h *handshake, err error) {
	var fds []int
	defer func() {
		if err != nil {
			closeAll(fds)
		}
	}()
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(8*4))
	for have := 0; ; {
		n, oobn, flags, _, err := conn.ReadMsgUnix(buf[have:], oob)
		got, cerr := controlFiles(oob[:oobn])
		fds = append(fds, got...)
		if err = errors.Join(err, cerr); err != nil {
			return nil, err
		}
		have += n
		if len(fds) > 1 || flags&(unix.MSG_CTRUNC|unix.MSG_TRUNC) != 0 {
			return nil, fmt.Errorf("%w: %d descriptors", ErrProtocol, len(fds))
		}
		// The parts may come apart: they are on a stream.
		if len(fds) == 1 && json.Valid(buf[:have]) {
			h = &handshake{fd: fds[0]}
			if h.regions, h.pageSize, err = parseRegions(buf[:have], size); err == nil {
				h.file, err = userfaultfd(h.fd)
			}
			return h, err
		}
		if have == len(buf) {
			return nil, fmt.Errorf("%w: more than %d bytes", ErrProtocol, maxMessage)
		}
	}
}

// controlFiles returns the descriptors in a control message. They are close-on-exec.
func controlFiles(oob []byte) (fds []int, err error) {
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	for _, m := range messages {
		got, err := unix.ParseUnixRights(&m)
		if err != nil {
			continue // credentials, say
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		_ = unix.Close(fd)
	}
}

// userfaultfd makes a file of a descriptor that somebody has sent, if it is a userfaultfd. Reads of
// it must not block, and do so under the runtime's poller.
func userfaultfd(fd int) (*os.File, error) {
	name, err := os.Readlink(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		return nil, err
	}
	if name != "anon_inode:[userfaultfd]" {
		return nil, fmt.Errorf("%w: its descriptor is a %q", ErrProtocol, name)
	}
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "userfaultfd"), nil
}

// parseRegions reads the VMM's message about a memory file of that size.
func parseRegions(data []byte, size int64) (regions []region, pageSize int64, err error) {
	var all []message
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, 0, fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if len(all) == 0 || len(all) > maxRegions {
		return nil, 0, fmt.Errorf("%w: %d regions", ErrProtocol, len(all))
	}
	var sum uint64
	for _, m := range all {
		page := m.PageSize
		if page == 0 {
			page = m.PageSizeKiB
		}
		if pageSize == 0 && validPageSize(int64(page)) {
			pageSize = int64(page)
		}
		if int64(page) != pageSize || pageSize == 0 {
			return nil, 0, fmt.Errorf("%w: pages of %d bytes", ErrProtocol, page)
		}
		r := region{base: m.Base, size: m.Size, offset: m.Offset}
		if r.size == 0 || (r.base|r.size|r.offset)%page != 0 || r.base+r.size < r.base || r.offset > uint64(size) ||
			r.size > uint64(size)-r.offset {
			return nil, 0,
				fmt.Errorf("%w: %d bytes at %#x, from %d of a file of %d", ErrProtocol, r.size, r.base, r.offset, size)
		}
		regions = append(regions, r)
		sum += r.size
	}
	if overlap(regions, func(r region) uint64 {
		return r.base
	}) || overlap(regions, func(r region) uint64 { return r.offset }) {
		return nil, 0, fmt.Errorf("%w: regions overlap", ErrProtocol)
	}
	if sum != uint64(size) {
		return nil, 0, fmt.Errorf("%w: %d bytes of memory, the file has %d", ErrProtocol, sum, size)
	}
	return regions, pageSize, nil
}

// overlap says whether two of the regions do, by where they start.
func overlap(regions []region, start func(region) uint64) bool {
	sorted := slices.SortedFunc(slices.Values(regions), func(a, b region) int { return cmp.Compare(start(a), start(b)) })
	for i := 1; i < len(sorted); i++ {
		if start(sorted[i-1])+sorted[i-1].size > start(sorted[i]) {
			return true
		}
	}
	return false
}
