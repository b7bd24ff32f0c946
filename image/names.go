package image

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/image/internal/layers"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/hint"
	"push.rocks/smartvm/internal/imagename"
	"push.rocks/smartvm/internal/objects"
)

const (
	maxRef = 1024 // bytes of what is looked up
	minID  = 6    // digits that an id can be cut to
)

// ValidName says whether an image can be given a name.
func ValidName(name string) error { return imagename.Valid(name) }

// OwnName says whether people can give an image a name: those with a digest are for what has it.
func OwnName(name string) error {
	err := imagename.Own(name)
	if name == HostKernel {
		err = errors.Join(err, invalid("image name %q: it stands for this machine's kernel", name))
	}
	return err
}

// has says whether an image is what a digest names, in a registry or here.
func (i *Image) has(digest string) bool {
	return digest != "" && (i.Digest == digest || i.Index == digest || "sha256:"+i.ID == digest ||
		// Images of before do not say of which index they are.
		i.Index == "" && !oci.Local(i.Source) && i.Source != ImportSource && strings.HasSuffix(i.Source, "@"+digest))
}

// identify fills in the id of an image that has none of its own: what is kept of it.
func (i *Image) identify() {
	if i.ID == "" {
		parts := []string{i.Root, i.Kernel, i.Initrd, i.Bundle, i.BootArgs}
		if runs, err := json.Marshal(i.Config); err == nil && string(runs) != "{}" {
			parts = append(parts, string(runs))
		}
		sum := sha256.Sum256([]byte(strings.Join(parts, "\n")))
		i.ID = hex.EncodeToString(sum[:])
	}
}

// unreadableError says that an image's description cannot be read.
type unreadableError struct {
	name string
	error
}

func (e *unreadableError) Unwrap() error { return e.error }

// nameFile is where an image of a name is described. Any name gives a file name, and different ones
// different files.
func (s *Store) nameFile(name string) string {
	return s.path(namesDir, base64.RawURLEncoding.EncodeToString([]byte(name))+".json")
}

// read returns the image that has exactly a name. Errors are fs.ErrNotExist and *unreadableError.
func (s *Store) read(name string) (*Image, error) {
	i, err := objects.ReadJSON[Image](s.nameFile(name), maxImage)
	if isNotExist(err) {
		return nil, err
	}
	if err == nil && i.Version > imageVersion {
		err = &atomicfile.VersionError{Path: s.nameFile(name), Version: i.Version, Newest: imageVersion}
	}
	if err == nil && (i.Version < 1 || i.Name != name) {
		err = fmt.Errorf("its description has version %d and name %q: %w", i.Version, i.Name, ErrCorrupt)
	}
	if err != nil {
		return nil, &unreadableError{name, hint.Add(fmt.Errorf("image %s: %w", name, err),
			"a later smartvm may have written it; smartvm image rm %s removes it", name)}
	}
	i.identify()
	return &i, nil
}

// Find returns the image that a reference names: "debian", "debian:12" and
// "docker.io/library/debian:12" as they were pulled or imported (":latest" is added if there is
// none without), "debian:12@sha256:..." and "sha256:..." what has that digest under whatever name,
// and the first digits of an id. Returns ErrNotFound, ErrCorrupt and, for an id that several images
// begin with, fs.ErrInvalid.
func (s *Store) Find(ref string) (*Image, error) {
	all, err := s.find(ref)
	if err != nil {
		return nil, err
	}
	return all[0], nil
}

// find returns an image; by id or digest once for each name that it has.
func (s *Store) find(ref string) ([]*Image, error) {
	missing := fmt.Errorf("image %.300s: %w", ref, ErrNotFound)
	if ref == "" || len(ref) > maxRef {
		return nil, missing
	}
	repository, digest, pinned := imagename.CutDigest(ref)
	names := []string{ref, ref + ":latest", imagename.Familiar(ref), imagename.Familiar(ref) + ":latest"}
	if pinned {
		names = []string{ref, imagename.Familiar(repository) + "@" + digest}
	}
	for _, name := range names {
		i, err := s.read(name)
		switch {
		case isNotExist(err), errors.Is(err, syscall.ENAMETOOLONG):
		case err != nil:
			return nil, err
		case !pinned || i.has(digest):
			return []*Image{i}, nil
		}
	}
	digits, whole := strings.CutPrefix(ref, "sha256:")
	if !pinned && (len(digits) < minID || strings.Trim(digits, "0123456789abcdef") != "") {
		return nil, missing
	}
	all, _, err := s.list()
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(i *Image) bool {
		return !i.has(digest) && (pinned || !strings.HasPrefix(i.ID, digits) && !(whole && i.has(ref)))
	})
	if len(all) == 0 {
		return nil, missing
	}
	for _, i := range all {
		if i.ID != all[0].ID && !pinned && !whole {
			return nil, invalid("image id %q is ambiguous: it matches %s (%s) and %s (%s)", ref, all[0].ID[:2*minID],
				all[0].Name, i.ID[:2*minID], i.Name)
		}
	}
	slices.SortStableFunc(all, func(a, b *Image) int { // those of the repository first
		return strings.Compare(strconv.FormatBool(!imagename.Of(a.Name, repository)),
			strconv.FormatBool(!imagename.Of(b.Name, repository)))
	})
	return all, nil
}

// List returns all images, by name. What cannot be read is left out, and in the error.
func (s *Store) List() ([]*Image, error) {
	all, bad, err := s.list()
	return all, errors.Join(append(bad, err)...)
}

// list returns all images, by name, and an *unreadableError for each that cannot be read.
func (s *Store) list() (all []*Image, bad []error, err error) {
	entries, err := os.ReadDir(s.path(namesDir))
	if err != nil {
		return nil, nil, fmt.Errorf("list images: %w", err)
	}
	for _, e := range entries {
		encoded, ok := strings.CutSuffix(e.Name(), ".json")
		name, err := base64.RawURLEncoding.DecodeString(encoded)
		if !ok || err != nil {
			continue // an unfinished one
		}
		i, err := s.read(string(name))
		switch {
		case isNotExist(err):
		case err != nil:
			bad = append(bad, err)
		default:
			all = append(all, i)
		}
	}
	slices.SortFunc(all, func(a, b *Image) int { return strings.Compare(a.Name, b.Name) })
	return all, bad, nil
}

// mentioned is what a description names, whatever else it says.
var mentioned = regexp.MustCompile(`[a-z0-9]+-[0-9a-f]{64}|sha256:[0-9a-f]{64}`)

// needs are the names of all files and directories of objects and layers that images have, as list
// returns them. What cannot be read as an image needs what it mentions; unsure says that something
// cannot be read at all.
func (s *Store) needs(all []*Image, bad []error) (needed map[string]bool, unsure bool) {
	needed = map[string]bool{}
	for _, i := range all {
		for _, id := range i.objects() {
			needed[id] = true
		}
		for _, l := range append([]string{i.Digest, "sha256:" + i.ID}, i.Layers...) {
			needed[layers.Path("", l)] = true
		}
	}
	for _, e := range bad {
		s.log.Warn("image cannot be read", "err", e)
		var u *unreadableError
		if !errors.As(e, &u) {
			continue
		}
		text, err := atomicfile.Read(s.nameFile(u.name), maxImage)
		unsure = unsure || err != nil && !isNotExist(err)
		for _, m := range mentioned.FindAll(text, -1) {
			needed[layers.Path("", string(m))] = true
		}
	}
	return needed, unsure
}

// Bundles says whether images of a store have a base image's bundle, without opening the store.
// When in doubt they do.
func Bundles(dir string) func(id string) bool {
	return func(id string) bool {
		s := &Store{opts: Options{Dir: dir}}
		all, bad, err := s.list()
		if isNotExist(err) {
			return false
		}
		return err != nil || len(bad) > 0 || slices.ContainsFunc(all, func(i *Image) bool { return i.Bundle == id })
	}
}

// name gives i its name, in place of what had it. The caller holds the store.
func (s *Store) name(ctx context.Context, i *Image) error {
	i.Version = imageVersion
	i.identify()
	release, err := s.locks.One(ctx, oneName, i.Name, "another smartvm that makes the same image")
	if err != nil {
		return err
	}
	old, err := s.read(i.Name)
	same := err == nil && old.ID == i.ID
	switch {
	case err == nil && !same:
		i.Replaced = old
	case same && i.Created.IsZero():
		i.Created = old.Created
	}
	if i.Created.IsZero() {
		i.Created = time.Now().UTC().Truncate(time.Second)
	}
	err = atomicfile.WriteJSON(s.nameFile(i.Name), i)
	if err == nil && !same {
		s.opts.Changed("tag", i.Name)
	}
	return errors.Join(err, release())
}

// Tag gives an image one more name, in place of what had it. Returns what Find does, and
// fs.ErrInvalid.
func (s *Store) Tag(ctx context.Context, ref, name string) (*Image, error) {
	if err := OwnName(name); err != nil {
		return nil, err
	}
	release, err := s.Hold(ctx)
	if err != nil {
		return nil, err
	}
	i, err := s.Find(ref)
	if err == nil {
		i.Name = imagename.Familiar(name)
		err = s.name(ctx, i)
	}
	return i, errors.Join(err, release())
}

func invalid(format string, args ...any) error { return imagename.Invalid(format, args...) }
