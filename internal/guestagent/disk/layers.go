package disk

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"

	"push.rocks/smartvm/guest"
)

// Layers makes the directories that overlayfs wants. Its root is the upper one: that is to look as
// the lower.
func Layers(lower, dir string) (upper string, err error) {
	fi, err := os.Stat(lower)
	if err != nil {
		return "", err
	}
	upper = filepath.Join(dir, guest.UpperDir)
	for _, d := range []string{upper, filepath.Join(dir, "work")} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	st := fi.Sys().(*syscall.Stat_t)
	return upper,
		errors.Join(os.Chown(upper, int(st.Uid), int(st.Gid)),
			os.Chmod(upper, fi.Mode().Perm()|fi.Mode()&(fs.ModeSticky|fs.ModeSetgid)))
}

// Touch makes a file to mount over, where there is none.
func Touch(name string) error {
	if _, err := os.Stat(name); err == nil {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
	if err != nil {
		return err
	}
	return f.Close()
}
