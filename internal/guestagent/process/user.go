package process

import (
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

const (
	maxAccounts = 1 << 20   // bytes of passwd or group
	maxID       = 1<<31 - 1 // what container runtimes allow
)

// User is whom a command runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
	Home     string
}

// readAccounts returns the lines of passwd or group, split at colons. There need not be such a file.
func readAccounts(path string) ([][]string, error) {
	// Nonblocking, for it could be a FIFO.
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
		return nil, errors.Join(err, fmt.Errorf("read %s: not a regular file", path))
	}
	data, err := io.ReadAll(io.LimitReader(f, maxAccounts+1))
	if err != nil {
		return nil, err
	}
	if len(data) > maxAccounts {
		return nil, fmt.Errorf("read %s: more than %d bytes", path, maxAccounts)
	}
	return parseAccounts(data), nil
}

// parseAccounts leaves out what has too few fields for its name and its number.
func parseAccounts(data []byte) (entries [][]string) {
	for line := range bytes.Lines(data) {
		if fields := strings.Split(strings.TrimRight(string(line), "\r\n"), ":"); len(fields) > 2 && fields[0] != "" {
			entries = append(entries, fields)
		}
	}
	return entries
}

// Fields of passwd and group.
const (
	fieldName    = 0
	fieldNumber  = 2
	fieldGroup   = 3 // of passwd: its primary group
	fieldMembers = 3 // of group
	fieldHome    = 5
)

// lookUp returns the first entry of that name, else of that number, and the number. A number needs no entry.
func lookUp(entries [][]string, name string) (entry []string, id uint32, err error) {
	for _, field := range []int{fieldName, fieldNumber} {
		i := slices.IndexFunc(entries, func(e []string) bool { return e[field] == name })
		if i >= 0 {
			id, err = parseID(entries[i][fieldNumber])
			return entries[i], id, err
		}
	}
	if id, err = parseID(name); err != nil {
		return nil, 0, fmt.Errorf("the image has no %q", name)
	}
	return nil, id, nil
}

func parseID(s string) (uint32, error) {
	id, err := strconv.ParseUint(s, 10, 32)
	if err != nil || id > maxID {
		return 0, fmt.Errorf("%q is not a number up to %d", s, maxID)
	}
	return uint32(id), nil
}

// Names are those of the image's users, by number; the first of a number counts.
func Names() map[uint32]string {
	names := map[uint32]string{}
	entries, _ := readAccounts("/etc/passwd") // without it they have none
	for _, e := range entries {
		if id, err := parseID(e[fieldNumber]); err == nil && names[id] == "" {
			names[id] = e[fieldName]
		}
	}
	return names
}

// Find finds a user of the image: "name", "uid", "name:group", "uid:gid" or a mix; "" is root.
func Find(spec string) (User, error) {
	passwd, err := readAccounts("/etc/passwd")
	if err != nil {
		return User{}, err
	}
	group, err := readAccounts("/etc/group")
	if err != nil {
		return User{}, err
	}
	return resolve(spec, passwd, group)
}

// resolve finds a user as Find does. Without a group it is in all that the image has it in, like after a login.
func resolve(spec string, passwd, group [][]string) (User, error) {
	name, groupName, explicit := strings.Cut(spec, ":")
	entry, uid, err := lookUp(passwd, cmp.Or(name, "0"))
	if err != nil {
		return User{}, fmt.Errorf("find user %q: %w", spec, err)
	}
	u := User{UID: uid, Home: "/"}
	if len(entry) > fieldHome && strings.HasPrefix(entry[fieldHome], "/") {
		u.Home = entry[fieldHome]
	}
	if explicit {
		if _, u.GID, err = lookUp(group, groupName); err != nil {
			return User{}, fmt.Errorf("find group of user %q: %w", spec, err)
		}
		return u, nil
	}
	if len(entry) <= fieldGroup {
		return u, nil
	}
	if u.GID, err = parseID(entry[fieldGroup]); err != nil {
		return User{}, fmt.Errorf("find group of user %q: %w", spec, err)
	}
	for _, e := range group {
		id, err := parseID(e[fieldNumber])
		if err == nil && len(e) > fieldMembers && slices.Contains(strings.Split(e[fieldMembers], ","), entry[fieldName]) {
			u.Groups = append(u.Groups, id)
		}
	}
	return u, nil
}
