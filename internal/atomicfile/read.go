package atomicfile

import (
	"encoding/json"
	"fmt"
	"io"
	"os"

	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/strictjson"
	"push.rocks/smartvm/spec"
)

// Read reads a file that may be larger than it should be: of that, limit bytes and one more, so
// that it shows.
func Read(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, limit+1))
}

// VersionError says that a record was written by another version of smartvm. It is
// spec.ErrNotSupported.
type VersionError struct {
	Path            string
	Version, Newest int // that it has, and the newest that can be read
}

func (e *VersionError) Error() string {
	return fmt.Sprintf("read %s: it has version %d, this smartvm reads version %d", e.Path, e.Version, e.Newest)
}

// Is tells what it is.
func (e *VersionError) Is(target error) bool { return target == spec.ErrNotSupported }

// otherVersion is what to do about what another version of smartvm has written.
const otherVersion = "use the smartvm that wrote it, or a newer one"

// ReadJSON reads a record that WriteJSON wrote, maybe that of another smartvm: VMs outlive upgrades
// and downgrades. Fields that T does not have are passed over, so what must not be read without
// them has a new version. Newest is the newest that the caller reads, of a field "version"; 0
// stands for records without one. A file of more than limit bytes is refused. Returns
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
		return none, hint.Add(&VersionError{Path: path, Version: head.Version, Newest: newest}, "%s", otherVersion)
	}
	if err == nil {
		err = json.Unmarshal(data, &v)
	}
	if err != nil {
		return none, fmt.Errorf("read %s: %w", path, err)
	}
	return v, nil
}

// ReadStrict is ReadJSON for a record of which nothing may be passed over, as what is unknown may
// be a limit on what guests may do, or something that is to be undone. Returns ErrNotSupported for
// one that has more fields.
func ReadStrict[T any](path string, limit int) (T, error) {
	data, err := Read(path, int64(limit))
	if err != nil {
		return *new(T), err
	}
	v, err := DecodeStrict[T](data, limit)
	if err != nil {
		err = fmt.Errorf("read %s: %w", path, err)
	}
	return v, err
}

// DecodeStrict decodes what ReadStrict reads.
func DecodeStrict[T any](data []byte, limit int) (T, error) {
	v, err := strictjson.Unmarshal[T](data, limit)
	if err != nil && len(data) <= limit && json.Unmarshal(data, new(T)) == nil {
		err = hint.Add(fmt.Errorf("%w: it has what this version of smartvm does not know: %w", spec.ErrNotSupported, err),
			"%s", otherVersion)
	}
	return v, err
}
