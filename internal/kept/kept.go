// Package kept has what stores of files that never change have in common: which VMs use them, and
// whether they are what was stored.
package kept

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"syscall"
)

// UsersDir is in a stored directory. In it a VM says that it uses what is there, by a symbolic link
// to its own directory. When that is gone, so is its claim.
const UsersDir = "users"

// Users returns the directories of the VMs that use what is in dirs, each once. Links of VMs that
// are gone are taken away, if alone says that nobody is making a VM now.
func Users(alone bool, dirs ...string) ([]string, error) {
	var all []string
	for _, dir := range dirs {
		entries, err := os.ReadDir(filepath.Join(dir, UsersDir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, syscall.ENOTDIR) {
			return nil, fmt.Errorf("look for VMs: %w", err)
		}
		for _, e := range entries {
			link := filepath.Join(dir, UsersDir, e.Name())
			target, err := os.Readlink(link)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.EINVAL) {
				continue // the VM has gone meanwhile, or it is no link
			}
			if err != nil {
				return nil, fmt.Errorf("look for VMs: %w", err)
			}
			switch _, err := os.Lstat(target); {
			case err == nil:
				all = append(all, target)
			case alone && errors.Is(err, fs.ErrNotExist):
				if err := os.Remove(link); err != nil {
					return nil, fmt.Errorf("look for VMs: %w", err)
				}
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// Stamp changes when the file at path does. That is for noticing accidents: who can write here can
// do as he likes. The time of the inode's last change is not part of it, since a hard link, as into
// a VM's jail, changes that.
func Stamp(path string) (string, error) {
	fi, err := os.Lstat(path)
	if err != nil {
		return "", err
	}
	if !fi.Mode().IsRegular() {
		return "", fmt.Errorf("%s: %w: no regular file", path, fs.ErrInvalid)
	}
	return fmt.Sprint(fi.Sys().(*syscall.Stat_t).Ino, " ", fi.Size(), " ", fi.ModTime().UnixNano()), nil
}

// Usage is how many bytes a file or directory takes of its disk, holes not counted. Returns
// fs.ErrNotExist.
func Usage(path string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(path, func(below string, d fs.DirEntry, err error) error {
		var fi fs.FileInfo
		if err == nil {
			fi, err = d.Info()
		}
		if below != path && errors.Is(err, fs.ErrNotExist) {
			return nil // it has gone meanwhile
		}
		if err != nil {
			return err
		}
		sum += fi.Sys().(*syscall.Stat_t).Blocks * 512
		return nil
	})
	return sum, err
}
