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

// File is a stored file and what it holds. Object is an immutable directory.
type (
	File   = objects.File
	Object = objects.Object
)

// Names of files in objects.
const (
	kernelFile  = "vmlinux"
	modulesFile = "modules.cpio" // the modules that a guest needs to find its root
	modulesDisk = "modules.ext4"
	initrdFile  = "initrd"
)

// InUse says whether VMs use what is in a directory that Boot has named as one of those that they do. When in doubt they do.
func InUse(dir string) bool {
	all, err := kept.Users(false, dir)
	return err != nil || len(all) > 0
}
