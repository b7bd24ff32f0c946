package atomicfile

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"push.rocks/smartvm/spec"
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

// VersionError says that a record was written by another version of smartvm. It is spec.ErrNotSupported.
type VersionError struct {
	Path            string
	Version, Newest int // that it has, and the newest that can be read
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("read %s: it has version %d, this smartvm reads version %d", e.Path, e.Version, e.Newest)
}

// Is tells what it is.
func (e *VersionError) Is(target error) bool { return target == spec.ErrNotSupported }

// ReadJSON reads a record that WriteJSON wrote, maybe that of another smartvm: VMs outlive upgrades and downgrades. Fields that
// T does not have are passed over, so what must not be read without them has a new version. Newest is the newest that the
// caller reads, of a field "version"; 0 stands for records without one. A file of more than limit bytes is refused. Returns
// *VersionError.
func ReadJSON[T any](path string, limit int64, newest int) (T, error) {
	var v, none T
	data, err := Read(path, limit)
	if err != nil {
		return none, err
	}
	if int64(len(data)) > limit {
		return none, fmt.Errorf("read %s: it has more than %d bytes", path, limit)
	}
	var head struct {
		Version int `json:"version"`
	}
	if newest > 0 {
		err = json.Unmarshal(data, &head)
	}
	if err == nil && head.Version > newest {
		return none, &VersionError{Path: path, Version: head.Version, Newest: newest}
	}
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	if err != nil {
		return none, fmt.Errorf("read %s: %w", path, err)
	}
	return v, nil
}
