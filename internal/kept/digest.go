package kept

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

// Digest returns the digest of a file and its size: the SHA-256, in hexadecimal, of the SHA-256
// sums of its pieces of 1 MiB, the last of which may be shorter. So several pieces are hashed at a
// time, and those that hold only zeros, most of a young disk or guest, cost next to nothing; holes
// are not read. Progress may be nil.
func Digest(ctx context.Context, path string, progress func(done, total int64)) (digest string, size int64, err error) {
	f, err := OpenPlain(path)
	if err != nil {
		return "", 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	size = fi.Size()
	data, err := stage.Extents(f, size)
	if err != nil {
		return "", 0, err
	}
	h := &hasher{f: f, size: size, data: data, progress: progress}
	all := sha256.New()
	for h.next*piece < size {
		sums, err := h.batch(ctx)
		if err != nil {
			return "", 0, err
		}
		for i := range sums {
			all.Write(sums[i][:])
		}
	}
	return hex.EncodeToString(all.Sum(nil)), size, nil
}

// hasher hashes the pieces of a file, some thousand at a time.
type hasher struct {
	f        *os.File
	size     int64
	progress func(done, total int64)

	mu   sync.Mutex
	data []stage.Extent // mu protects it: runs of data from next on
	next int64          // mu protects it: the piece that nobody has taken
	err  error          // mu protects it
}

type sum = [sha256.Size]byte

const batchSize = 4096 // pieces

// batch returns the sums of the next pieces.
func (h *hasher) batch(ctx context.Context) ([]sum, error) {
	first := h.next
	sums := make([]sum, min(batchSize, (h.size+piece-1)/piece-first))
	var wg sync.WaitGroup
	for range min(runtime.GOMAXPROCS(0), 4, len(sums)) {
		wg.Go(func() {
			buf := make([]byte, piece)
			for {
				i, hole := h.take(ctx, first+int64(len(sums)))
				if i < 0 {
					return
				}
				s, err := h.sum(buf[:min(piece, h.size-i*piece)], i*piece, hole)
				if err != nil {
					h.fail(err)
					return
				}
				sums[i-first] = s
			}
		})
	}
	wg.Wait()
	return sums, h.err
}

// sum hashes what is at an offset, by way of buf.
func (h *hasher) sum(buf []byte, off int64, hole bool) (sum, error) {
	if !hole {
		if _, err := h.f.ReadAt(buf, off); err != nil {
			return sum{}, err
		}
		if !bytes.Equal(buf, zeros[:len(buf)]) {
			return sha256.Sum256(buf), nil
		}
	}
	if len(buf) == piece {
		return zeroSum, nil
	}
	return sha256.Sum256(zeros[:len(buf)]), nil
}

var (
	zeros   [piece]byte
	zeroSum = sha256.Sum256(zeros[:])
)

// take returns the next piece before end and whether it lies in a hole; -1 when there is none, or
// an error.
func (h *hasher) take(ctx context.Context, end int64) (i int64, hole bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if ctx.Err() != nil && h.err == nil {
		h.err = context.Cause(ctx)
	}
	if h.err != nil || h.next == end {
		return -1, false
	}
	i = h.next
	h.next++
	from, to := i*piece, min((i+1)*piece, h.size)
	for len(h.data) > 0 && h.data[0].Off+h.data[0].Len <= from {
		h.data = h.data[1:]
	}
	if h.progress != nil {
		h.progress(to, h.size)
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

// OpenPlain opens a file of ours to read: no link is followed, and no device or FIFO waited for.
func OpenPlain(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
}

// ValidDigest says whether s is a digest, as far as that can be seen.
func ValidDigest(s string) bool {
	return len(s) == 2*sha256.Size && strings.Trim(s, "0123456789abcdef") == ""
}
