package share

import (
	"bufio"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"syscall"
)

// stamp tells whether a file is still what it was. Nobody can set a file's time of change, and it
// is compared with itself only: no two clocks need agree.
type stamp struct {
	Inode         uint64
	Changed, Size int64 // nanoseconds since 1970, bytes
}

func stampOf(fi fs.FileInfo) stamp {
	st := fi.Sys().(*syscall.Stat_t)
	return stamp{st.Ino, st.Ctim.Nano(), st.Size}
}

// fileKey stands for a file's volume and its name there.
type fileKey [16]byte

func keyOf(volume int, name string) fileKey {
	sum := sha256.Sum256([]byte(strconv.Itoa(volume) + "/" + name))
	return fileKey(sum[:16])
}

// stamps are those of the files that were copied, as they were then.
type stamps map[fileKey]stamp

// A file of stamps is stampsMagic and records of stampSize bytes: a key, and the stamp's numbers as
// they stand in it, little-endian.
const (
	stampsMagic = "smartvm copied 1\n"
	stampSize   = 40
)

// readStamps reads what a stampWriter wrote. If it is not there, or ends early, it has noted the
// less: then more of the host's files count as changed.
func readStamps(path string) (stamps, error) {
	all := stamps{}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) || path == "" {
		return all, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r := bufio.NewReader(f)
	magic := make([]byte, len(stampsMagic))
	if _, err := io.ReadFull(r, magic); ignoreEnd(err) != nil {
		return nil, err
	} else if err == nil && string(magic) != stampsMagic {
		return nil, fmt.Errorf("read %s: it is of another version", path)
	}
	buf := make([]byte, stampSize)
	for {
		if _, err := io.ReadFull(r, buf); err != nil {
			return all, ignoreEnd(err)
		}
		all[fileKey(buf[:16])] = stamp{
			binary.LittleEndian.Uint64(buf[16:]), int64(binary.LittleEndian.Uint64(buf[24:])),
			int64(binary.LittleEndian.Uint64(buf[32:])),
		}
	}
}

// stampWriter notes files as they are copied. If nil, nothing is noted.
type stampWriter struct {
	f *os.File
	w *bufio.Writer
}

func newStampWriter(path string) (*stampWriter, error) {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	s := &stampWriter{f, bufio.NewWriter(f)}
	_, err = s.w.WriteString(stampsMagic) // the first of all: there is room for it in the buffer
	return s, err
}

func (s *stampWriter) note(volume int, name string, fi fs.FileInfo) error {
	st, key := stampOf(fi), keyOf(volume, name)
	b := binary.LittleEndian.AppendUint64(key[:], st.Inode)
	b = binary.LittleEndian.AppendUint64(b, uint64(st.Changed))
	_, err := s.w.Write(binary.LittleEndian.AppendUint64(b, uint64(st.Size)))
	return err
}

func (s *stampWriter) close() error {
	return errors.Join(s.w.Flush(), s.f.Sync(), s.f.Close())
}
