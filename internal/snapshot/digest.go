package snapshot

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"io"
	"os"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/stage"
)

// piece is how much of a file has one digest of its own.
const piece = 1 << 20 // bytes

// Digest returns the digest of a file and its size: the SHA-256, in hexadecimal, of the SHA-256 sums of its pieces of
// 1 MiB, the last of which may be shorter. So several pieces are hashed at a time, and those that hold only zeros, most
// of a young disk or guest, cost next to nothing; holes are not read. Progress may be nil.
func Digest(ctx context.Context, f *os.File, progress func(done, total int64)) (digest string, size int64, err error) {
	fi, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	size = fi.Size()
	data, err := stage.Extents(f, size)
	if err != nil {
		return "", 0, err
	}
	h := &hasher{f: f, size: size, data: data, progress: progress, sums: make([][sha256.Size]byte, (size+piece-1)/piece)}
	if err := h.run(ctx); err != nil {
		return "", 0, err
	}
	all := sha256.New()
	for _, sum := range h.sums {
		all.Write(sum[:])
	}
	return hex.EncodeToString(all.Sum(nil)), size, nil
}

// hasher hashes the pieces of a file.
type hasher struct {
	f        *os.File
	size     int64
	sums     [][sha256.Size]byte // each worker writes those that it has taken
	progress func(done, total int64)

	mu   sync.Mutex
	data []stage.Extent // mu protects it: runs of data from next on
	next int            // mu protects it: the piece that nobody has taken
	done int64          // mu protects it
	err  error          // mu protects it
}

func (h *hasher) run(ctx context.Context) error {
	zero := sha256.Sum256(zeros[:])
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 4, max(1, len(h.sums))) {
		wg.Go(func() {
			buf := make([]byte, piece)
			for {
				i, hole := h.take(ctx)
				if i < 0 {
					return
				}
				n := min(piece, h.size-int64(i)*piece)
				if !hole {
					if _, err := h.f.ReadAt(buf[:n], int64(i)*piece); err != nil {
						h.fail(err)
						return
					}
					hole = bytes.Equal(buf[:n], zeros[:n])
				}
				switch {
				case hole && n == piece:
					h.sums[i] = zero
				case hole:
					h.sums[i] = sha256.Sum256(zeros[:n])
				default:
					h.sums[i] = sha256.Sum256(buf[:n])
				}
			}
		})
	}
	wg.Wait()
	return h.err
}

var zeros [piece]byte

// take returns the next piece and whether it lies in a hole; -1 when there is none, or an error.
func (h *hasher) take(ctx context.Context) (i int, hole bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ctx.Err() != nil && h.err == nil {
		h.err = context.Cause(ctx)
	}
	if h.err != nil || h.next == len(h.sums) {
		return -1, false
	}
	i = h.next
	h.next++
	from, to := int64(i)*piece, min(int64(i+1)*piece, h.size)
	for len(h.data) > 0 && h.data[0].Off+h.data[0].Len <= from {
		h.data = h.data[1:]
	}
	h.done = to
	if h.progress != nil {
		h.progress(h.done, h.size)
	}
	return i, len(h.data) == 0 || h.data[0].Off >= to
}

func (h *hasher) fail(err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF // it has become shorter
	}
	if h.err == nil {
		h.err = err
	}
}

func digestFile(ctx context.Context, path string, progress func(done, total int64)) (string, int64, error) {
	f, err := openPlain(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	return Digest(ctx, f, progress)
}

// openPlain opens a file of ours: no link is followed, and no device or FIFO waited for.
func openPlain(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

func validDigest(s string) bool {
	return len(s) == 2*sha256.Size && strings.Trim(s, "0123456789abcdef") == ""
}
