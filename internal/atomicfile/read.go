package atomicfile

import (
	"io"
	"os"
)

// Read reads a file that may be larger than it should be: of that, limit bytes and one more, so that it shows.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}
