package image

import (
	"context"
	"fmt"
	"io"
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

func (s *Store) objectDir(id string) string        { return s.objects.Dir(id) }
func (s *Store) file(o *Object) string             { return s.objects.File(o) }
func (s *Store) object(id string) (*Object, error) { return s.objects.Get(id) }

type draft = objects.Draft

// use checks that an object's files are what was stored: see objects.Store.Use.
func (s *Store) use(ctx context.Context, id string, full bool) (*Object, error) {
	return s.objects.Use(ctx, id, full)
}

// draft makes an object. The caller closes it.
func (s *Store) draft(ctx context.Context, fill func(dir string) (*Object, error)) (*draft, error) {
	return s.objects.Draft(ctx, fill)
}

// build stores an object. The caller holds the store.
func (s *Store) build(ctx context.Context, fill func(dir string) (*Object, error)) (*Object, error) {
	return s.objects.Build(ctx, fill)
}

// watch is a reader that tells how far it is and ends with its context. It seeks where r does.
func (s *Store) watch(ctx context.Context, r io.Reader, step string, total int64) io.Reader {
	return s.objects.Watch(ctx, r, step, total)
}

// InUse says whether VMs use what is in a directory that Boot has named as one of those that they do. When in doubt they do.
func InUse(dir string) bool {
	all, err := kept.Users(false, dir)
	return err != nil || len(all) > 0
}
