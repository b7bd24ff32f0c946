package server

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/treetar"
)

// read sends a file or a tree.
func (s *Server) read(ss *session) error {
	path := filepath.Clean(ss.req.Path)
	if !filepath.IsAbs(path) {
		return fmt.Errorf("%q is not absolute", ss.req.Path)
	}
	source, err := treetar.Source(ss.req.Path, ss.req.Follow)
	if err != nil {
		return err
	}
	if err := ss.reply(agentproto.Reply{}); err != nil {
		return nil
	}
	ss.listen(nil)
	top := filepath.Base(path)
	if ss.req.Contents || top == "/" {
		top = "."
	}
	out := ss.conn.Writer(agentproto.KindStdout)
	buffered := bufio.NewWriterSize(out, agentproto.MaxData)
	var left treetar.LeftOut
	o := treetar.PackOptions{Left: left.Add}
	if path == guest.ChangesDir { // for a host of this version: what its guest left as holes is not worth the time
		o = treetar.PackOptions{Sparse: true}
	}
	err = errors.Join(treetar.Pack(buffered, source, top, o), buffered.Flush(), out.Close())
	ss.exit(errors.Join(err, left.Err()))
	return nil
}

// write unpacks what the host sends: in the directory at the path, or beside it under its name.
func (s *Server) write(ss *session) error {
	if !filepath.IsAbs(ss.req.Path) {
		return fmt.Errorf("%q is not absolute", ss.req.Path)
	}
	dir, top, err := treetar.Target(ss.req.Path)
	if err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := ss.reply(agentproto.Reply{IsDir: top == ""}); err != nil {
		return nil
	}
	ss.listen(nil)
	var left treetar.LeftOut
	err = treetar.Unpack(bufio.NewReaderSize(ss.stdin, agentproto.MaxData), root,
		treetar.Options{Top: top, Owners: ss.req.Archive, Left: left.Add})
	if errors.Is(err, treetar.ErrEmpty) {
		err = nil // the host knows what it has left out
	}
	if err == nil {
		ss.stdin.Discard()
	}
	ss.exit(errors.Join(err, left.Err()))
	return nil
}

// exit is the end of a request that is no program's.
func (ss *session) exit(err error) {
	e := agentproto.Exit{}
	if err != nil {
		e = agentproto.Exit{Code: 1, Error: strings.ReplaceAll(err.Error(), "\n", "; ")}
	}
	_ = ss.conn.SendJSON(agentproto.KindExit, e)
}

// minSkew is what a clock may be wrong by.
const minSkew = 500 * time.Millisecond

// welcome sets the clock if it is wrong, stirs in what the host has drawn, and returns by how much
// the clock was wrong.
func (s *Server) welcome(req agentproto.Request) (skew time.Duration) {
	stir(req.Entropy)
	if req.Now.IsZero() {
		return 0
	}
	skew = time.Since(req.Now.Round(0)).Round(time.Millisecond)
	if skew.Abs() < minSkew {
		return 0
	}
	if err := s.SetClock(req.Now); err != nil {
		return 0
	}
	return skew
}

// clock sets the clock and nothing else, so that the host soon knows how late that was heard.
func (s *Server) clock(ss *session) error {
	skew := s.welcome(ss.req)
	s.update(func() {
		if skew != 0 {
			s.skew = skew
		}
	})
	return ss.reply(agentproto.Reply{Skew: skew})
}

// setClock sets that of this machine.
func setClock(to time.Time) error {
	ts := unix.NsecToTimespec(to.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// stir adds to the kernel's random numbers, and has them drawn anew.
func stir(data []byte) {
	if len(data) == 0 || len(data) > 512 {
		return
	}
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer f.Close()
	info := struct {
		bits, size int32
		data       [512]byte
	}{bits: int32(len(data)) * 8, size: int32(len(data))}
	copy(info.data[:], data)
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDADDENTROPY, uintptr(unsafe.Pointer(&info)))
	_, _, _ = unix.Syscall(unix.SYS_IOCTL, f.Fd(), unix.RNDRESEEDCRNG, 0)
	runtime.KeepAlive(&info)
}

// ticks is how the kernel counts CPU time for programs, per second.
const ticks = 100

// stats tells how the guest is.
func stats(ss *session) error {
	st := &guest.Stats{}
	var si unix.Sysinfo_t
	if err := unix.Sysinfo(&si); err != nil {
		return err
	}
	st.Uptime, st.Processes = time.Duration(si.Uptime)*time.Second, int(si.Procs)
	unit := uint64(si.Unit)
	st.Memory, st.MemoryUsed = uint64(si.Totalram)*unit, uint64(si.Totalram-si.Freeram)*unit
	if data, err := os.ReadFile("/proc/meminfo"); err == nil {
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			if len(f) > 1 && f[0] == "MemAvailable:" {
				if free, err := strconv.ParseUint(f[1], 10, 54); err == nil && free<<10 <= st.Memory {
					st.MemoryUsed = st.Memory - free<<10
				}
			}
		}
	}
	if data, err := os.ReadFile("/proc/stat"); err == nil {
		for line := range strings.Lines(string(data)) {
			f := strings.Fields(line)
			switch {
			case len(f) > 8 && f[0] == "cpu":
				for i, text := range f[1:9] {
					// All but idle and waiting.
					if n, err := strconv.ParseInt(text, 10, 54); err == nil && i != 3 && i != 4 {
						st.CPU += time.Duration(n) * time.Second / ticks
					}
				}
			case len(f) > 0 && strings.HasPrefix(f[0], "cpu"):
				st.CPUs++
			}
		}
	}
	var vfs unix.Statfs_t
	if err := unix.Statfs("/", &vfs); err == nil {
		block := uint64(vfs.Bsize) //nolint:gosec // never negative
		st.Disk, st.DiskUsed = vfs.Blocks*block, (vfs.Blocks-vfs.Bfree)*block
	}
	st.DiskRead, st.DiskWritten = transferred()
	return ss.reply(agentproto.Reply{Stats: st})
}
