package uffd

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// chunk is how much a fault brings at most: pages that are neighbours are mostly wanted soon, and
// each fault costs a VM two changes of context and a system call of ours.
const chunk = 256 << 10 // bytes

const (
	batch      = 64                    // events that are read at a time
	stepSize   = 512 << 10             // bytes that are prefetched between two looks for faults
	againPause = 20 * time.Microsecond // until a thread of the VMM has seen that its event was read
	againMost  = 5 * time.Millisecond  // if it takes longer
)

// serving is what a session's goroutine has while it serves.
type serving struct {
	s        *Session
	f        *os.File // to wait for events
	fd       int      // the same, for all else: File.Fd would make it block
	regions  []region
	pageSize int64
	pages    int64 // of the file

	present bitmap   // pages that are there, as far as we know: not brought again with others
	removed bitmap   // pages that the VM has given back: they are zeros from then on
	plan    []Range  // what is still to be prefetched
	faults  []uint64 // addresses, pages that threads wait for
	events  []byte
}

// newServing is for what the VMM has sent.
func (s *Session) newServing(h *handshake, guarded bool) *serving {
	pageSize := h.pageSize
	v := &serving{
		s: s, f: h.file, fd: h.fd, regions: h.regions, pageSize: pageSize, pages: int64(len(s.memory.data)) / pageSize,
		events: make([]byte, batch*eventSize),
	}
	v.present, v.removed = newBitmap(v.pages), newBitmap(v.pages)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.touched, s.pages, s.size, s.guarded = newBitmap(v.pages), v.pages, pageSize, guarded
	if set := s.o.Prefetch; set != nil && (set.PageSize != pageSize || set.Size != v.pages*pageSize) {
		s.server.log.Warn("pages to prefetch are of other memory", "have", set.Size, "want", v.pages*pageSize)
	} else if set != nil {
		v.plan = slices.Clone(set.Ranges)
	}
	return v
}

// serve serves the VM until it is gone or an error.
func (v *serving) serve() error {
	ready := false
	pause := againPause
	for {
		idle := len(v.plan) == 0 && len(v.faults) == 0
		if idle && !ready {
			close(v.s.ready)
			ready = true
		}
		if err := v.read(idle); err != nil {
			return err
		}
		again, err := v.answer()
		if err == nil && !again && len(v.plan) > 0 {
			again, err = v.prefetch()
		}
		switch {
		case errors.Is(err, unix.ESRCH):
			return nil // the VMM's memory is gone, and soon it will be
		case err != nil:
			return err
		case !again:
			pause = againPause
			continue
		}
		// An event of removal has to be read, or its sender to see that it was.
		v.s.again.Add(1)
		time.Sleep(pause)
		pause = min(2*pause, againMost)
	}
}

// read takes in the events that there are, and waits for some if it shall.
func (v *serving) read(wait bool) error {
	raw, err := v.f.SyscallConn()
	if err != nil {
		return err
	}
	for {
		var n int
		var rerr error
		err := raw.Read(func(fd uintptr) bool {
			n, rerr = unix.Read(int(fd), v.events)
			return !wait || rerr != unix.EAGAIN
		})
		switch {
		case err != nil:
			return err
		case rerr == unix.EAGAIN:
			return nil
		case rerr == unix.EINTR:
			continue
		case rerr != nil:
			return fmt.Errorf("read events: %w", rerr)
		case n == 0 || n%eventSize != 0:
			return fmt.Errorf("read events: %d bytes", n)
		}
		for at := 0; at < n; at += eventSize {
			if err := v.take(parseEvent(v.events[at:])); err != nil {
				return err
			}
		}
		wait = false
		if n < len(v.events) {
			return nil
		}
	}
}

// take notes an event. Faults are answered when all that there is has been read, so that removals
// come first.
func (v *serving) take(e event) error {
	switch e.kind {
	case eventPagefault:
		v.s.faults.Add(1)
		v.faults = append(v.faults, e.start&^uint64(v.pageSize-1))
		return nil
	case eventRemove:
		// Some of it may be outside of what we serve: whatever else the VMM has there.
		for _, r := range v.regions {
			from, to := max(e.start, r.base), min(e.end, r.base+r.size)
			for at := from; at < to; at += uint64(v.pageSize) {
				i := v.index(r, at)
				v.present.drop(i)
				v.removed.add(i)
				v.s.removed.Add(1)
			}
		}
		return nil
	}
	return fmt.Errorf("event %#x", e.kind)
}

func (v *serving) index(r region, at uint64) int64 { return int64(r.offset+at-r.base) / v.pageSize }

// answer serves the faults. Again says that one has to wait until more events are read; it is kept.
func (v *serving) answer() (again bool, err error) {
	for len(v.faults) > 0 {
		if again, err = v.fault(v.faults[0]); again || err != nil {
			return again, err
		}
		v.faults = v.faults[1:]
	}
	v.faults = nil
	return false, nil
}

// fault serves one, with what is missing around it.
func (v *serving) fault(at uint64) (again bool, err error) {
	for _, r := range v.regions {
		if at < r.base || at-r.base >= r.size {
			continue
		}
		page := v.index(r, at)
		if v.removed.has(page) {
			return v.zero(at, page)
		}
		first, last := page, page+1 // of what is brought
		low := max(int64(r.offset), int64(page*v.pageSize)/chunk*chunk) / v.pageSize
		high := min(int64(r.offset+r.size), (int64(page*v.pageSize)/chunk+1)*chunk) / v.pageSize
		for first > low && v.wanted(first-1) {
			first--
		}
		for last < high && v.wanted(last) {
			last++
		}
		return v.bring(r, Range{first, last - first}, page)
	}
	return false, fmt.Errorf("fault at %#x, where the VM has no memory", at)
}

// wanted says whether a page can be brought although nobody waits for it.
func (v *serving) wanted(page int64) bool { return !v.present.has(page) && !v.removed.has(page) }

// zero serves a page that was given back.
func (v *serving) zero(at uint64, page int64) (again bool, err error) {
	err = zeroPages(v.fd, at, uint64(v.pageSize))
	if errors.Is(err, unix.EINVAL) && v.pageSize > 4096 {
		_, err = copyPages(v.fd, at, address(hugeZero[:]), uint64(v.pageSize))
	}
	switch {
	case errors.Is(err, unix.EAGAIN):
		return true, nil
	case errors.Is(err, unix.EEXIST):
		return false, wake(v.fd, at, uint64(v.pageSize))
	case err != nil:
		return false, fmt.Errorf("give a page of zeros: %w", err)
	}
	v.present.add(page)
	v.s.zeroed.Add(1)
	return false, nil
}

// hugeZero is only read, and so takes no memory.
var hugeZero [2 << 20]byte

func address(b []byte) uint64 { return uint64(uintptr(unsafe.Pointer(unsafe.SliceData(b)))) }

// bring copies pages from the file. Needed is one that a thread waits for, or -1.
func (v *serving) bring(r region, pages Range, needed int64) (again bool, err error) {
	at := func(page int64) uint64 { return r.base + uint64(page*v.pageSize) - r.offset }
	// All of the source at once, from disk too; and what the file has no longer is found here.
	source := v.s.memory.data[pages.First*v.pageSize : (pages.First+pages.Pages)*v.pageSize]
	if err := unix.Madvise(source, unix.MADV_POPULATE_READ); err != nil && !errors.Is(err, unix.EINVAL) {
		return false, fmt.Errorf("read memory file: %w", err)
	}
	for page, end := pages.First, pages.First+pages.Pages; page < end; {
		n := uint64(end-page) * uint64(v.pageSize)
		done, err := copyPages(v.fd, at(page), address(source[(page-pages.First)*v.pageSize:]), n)
		v.brought(page, int64(done)/v.pageSize)
		page += int64(done) / v.pageSize
		switch {
		case err == nil, errors.Is(err, unix.EAGAIN) && done > 0:
		case errors.Is(err, unix.EAGAIN):
			// The rest can wait if nobody needs it.
			return needed >= page, nil
		case errors.Is(err, unix.EEXIST):
			v.present.add(page)
			if page == needed {
				if err := wake(v.fd, at(page), uint64(v.pageSize)); err != nil {
					return false, fmt.Errorf("wake VM: %w", err)
				}
			}
			page++
		case errors.Is(err, unix.EFAULT):
			return false, fmt.Errorf("read memory file: it became shorter: %w", err)
		default:
			return false, fmt.Errorf("give pages of the file: %w", err)
		}
	}
	return false, nil
}

// brought notes that pages are there.
func (v *serving) brought(first, n int64) {
	v.s.copied.Add(n)
	v.s.mu.Lock()
	defer v.s.mu.Unlock()
	for page := first; page < first+n; page++ {
		v.present.add(page)
		v.s.touched.add(page)
	}
}

// prefetch brings the next of what is planned and not there. Again is as for answer.
func (v *serving) prefetch() (again bool, err error) {
	for len(v.plan) > 0 {
		next := &v.plan[0]
		for next.Pages > 0 && !v.wanted(next.First) {
			next.First, next.Pages = next.First+1, next.Pages-1
		}
		if next.Pages == 0 {
			v.plan = v.plan[1:]
			continue
		}
		r, end := v.regionOf(next.First)
		run := Range{next.First, 1}
		for run.Pages < min(next.Pages, stepSize/v.pageSize, end-next.First) && v.wanted(next.First+run.Pages) {
			run.Pages++
		}
		before := v.s.copied.Load()
		again, err = v.bring(r, run, run.First+run.Pages-1)
		v.s.prefetched.Add(v.s.copied.Load() - before)
		return again, err // what is there now is found so at the next turn
	}
	return false, nil
}

// regionOf finds the region that a page of the file is in, and where it ends. All of the file is in
// one.
func (v *serving) regionOf(page int64) (r region, end int64) {
	for _, r = range v.regions {
		if end = int64(r.offset+r.size) / v.pageSize; page >= int64(r.offset)/v.pageSize && page < end {
			break
		}
	}
	return r, end
}
