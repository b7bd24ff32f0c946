package image

import (
	"fmt"
	"regexp"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/kept"
	"push.rocks/smartvm/internal/objects"
)

// Kinds of objects; an object's id is its kind, a dash and 64 hexadecimal digits.
const (
	kindRoot    = "rootfs" // the digits are the file's SHA-256
	kindChain   = "chain"  // and a version: the digits are the layers' chain ID, which says nothing of the file
	kindKernel  = "kernel"
	kindInitrd  = "initrd"
	kindModules = "modules" // all of a kernel's: the same ones are stored once, whatever an initramfs has of them
)

// chainID is the id of what the layers of a chain make, as package flatten makes it now.
func chainID(chain string) string { return fmt.Sprint(kindChain, flatten.Version, "-", chain) }

// objectID is what ids look like. "root-" was both kinds once, and is only read.
var objectID = regexp.MustCompile(`^(root|rootfs|chain[0-9]{1,4}|kernel|initrd|modules)-[0-9a-f]{64}$`)

type (
	file   = objects.File
	object = objects.Object
)

// Object is an immutable directory of the store.
type Object struct {
	ID      string `json:"id"`
	Type    string `json:"type,omitempty"`    // of a root: "ext4", "squashfs" or "erofs"
	Release string `json:"release,omitempty"` // of a kernel, as uname -r says it; empty if unknown
	Modules bool   `json:"modules,omitempty"` // of a kernel: a guest gets those that it needs to find its root
	Files   []File `json:"files"`             // the first is the object's own
}

// File is a stored file and what it holds.
type File struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
	// Seen is the file's inode, size and time when its digest was last found right. While they stay,
	// it is.
	Seen string `json:"seen"`
}

func asObject(o *object) Object {
	public := Object{ID: o.ID, Type: o.Type, Release: o.Release, Modules: o.Modules}
	for _, f := range o.Files {
		public.Files = append(public.Files, File(f))
	}
	return public
}

// Names of files in objects.
const (
	kernelFile  = "vmlinux"
	modulesFile = "modules.cpio" // the modules that a guest needs to find its root
	modulesDisk = "modules.ext4"
	initrdFile  = "initrd"
)

// InUse says whether VMs use what is in a directory that Boot has named as one of those that they
// do. When in doubt they do.
func InUse(dir string) bool {
	all, err := kept.Users(false, dir)
	return err != nil || len(all) > 0
}
