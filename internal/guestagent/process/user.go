package process

import (
	"bufio"
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
	maxAccounts = 64 << 20  // bytes of passwd or group that are read
	maxLine     = 1 << 20   // bytes; a longer one is left out
	maxNames    = 1 << 16   // that Names returns
	maxGroups   = 1 << 16   // supplementary ones, as the kernel has it
	maxID       = 1<<31 - 1 // what container runtimes allow
)

// User is whom a command runs as.
type User struct {
	UID, GID uint32
	Groups   []uint32 // supplementary
	Home     string
}

// accounts gives each the entries of passwd or group, split at colons, until it returns false. An
// error says that there may be more.
type accounts func(each func(entry []string) bool) error

// accountsOf reads a file anew each time, for it may be long. There need not be such a file.
func accountsOf(path string) accounts {
	return func(each func([]string) bool) error {
		// Nonblocking, for it could be a FIFO.
		f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		defer f.Close()
		if fi, err := f.Stat(); err != nil || !fi.Mode().IsRegular() {
			return errors.Join(err, fmt.Errorf("read %s: not a regular file", path))
		}
		limited := &io.LimitedReader{R: f, N: maxAccounts + 1}
		if err := readAccounts(limited, each); err != nil {
			return fmt.Errorf("read %s: %w", path, err)
		}
		if limited.N == 0 {
			return fmt.Errorf("read %s: more than %d bytes", path, maxAccounts)
		}
		return nil
	}
}

// readAccounts leaves out what has too few fields for its name and its number.
func readAccounts(r io.Reader, each func([]string) bool) error {
	lines := bufio.NewReaderSize(r, 16<<10)
	var line []byte
	for {
		piece, more, err := lines.ReadLine()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if len(line) <= maxLine {
			line = append(line, piece...)
		}
		if more {
			continue
		}
		if len(line) <= maxLine {
			if entry := strings.Split(strings.TrimRight(string(line), "\r"), ":"); len(entry) > 2 && entry[fieldName] != "" &&
				!each(entry) {
				return nil
			}
		}
		line = line[:0]
	}
}

// Fields of passwd and group.
const (
	fieldName    = 0
	fieldNumber  = 2
	fieldGroup   = 3 // of passwd: its primary group
	fieldMembers = 3 // of group
	fieldHome    = 5
)

// lookUp returns the first entry of that name, else of that number, and the number. A number needs
// no entry, nor a file that can be read.
func lookUp(all accounts, name string) (entry []string, id uint32, err error) {
	var named, numbered []string
	readErr := all(func(e []string) bool {
		if e[fieldName] == name {
			named = e
		}
		if numbered == nil && e[fieldNumber] == name {
			numbered = e
		}
		return named == nil
	})
	if entry = named; entry == nil {
		entry = numbered
	}
	if entry != nil {
		id, err = parseID(entry[fieldNumber])
		return entry, id, err
	}
	if id, err = parseID(name); err == nil {
		return nil, id, nil
	}
	return nil, 0, cmp.Or(readErr, fmt.Errorf("the image has no %q", name))
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
	_ = accountsOf("/etc/passwd")(func(e []string) bool { // what cannot be read has no names
		if id, err := parseID(e[fieldNumber]); err == nil && names[id] == "" {
			names[id] = e[fieldName]
		}
		return len(names) < maxNames
	})
	return names
}

// Find finds a user of the image: "name", "uid", "name:group", "uid:gid" or a mix; "" is root.
func Find(spec string) (User, error) {
	return resolve(spec, accountsOf("/etc/passwd"), accountsOf("/etc/group"))
}

// resolve finds a user as Find does. Without a group it is in all that the image has it in, like
// after a login. An empty one is none.
func resolve(spec string, passwd, group accounts) (User, error) {
	name, groupName, _ := strings.Cut(spec, ":")
	entry, uid, err := lookUp(passwd, cmp.Or(name, "0"))
	if err != nil {
		return User{}, fmt.Errorf("find user %q: %w", spec, err)
	}
	u := User{UID: uid, Home: "/"}
	if len(entry) > fieldHome && strings.HasPrefix(entry[fieldHome], "/") {
		u.Home = entry[fieldHome]
	}
	if groupName != "" {
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
	_ = group(func(e []string) bool { // what cannot be read gives no rights
		id, err := parseID(e[fieldNumber])
		if err == nil && len(e) > fieldMembers && slices.Contains(strings.Split(e[fieldMembers], ","), entry[fieldName]) {
			u.Groups = append(u.Groups, id)
		}
		return len(u.Groups) < maxGroups
	})
	return u, nil
}
