package flatten

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/ext4/mkfs"
)

// tree is what an image holds, as its entries have it up to now; those of lower layers come first.
// What is in files is written when it comes. A file that loses its last name gives that room back.
type tree struct {
	w     *mkfs.Writer
	root  *node
	layer int32
	steps int               // of resolve, through symbolic links
	aufs  map[string]*inode // of the layer: what hard links alone may lead to
	bad   []badLink

	maxEntries int64
	dirs       int64 // that were made
	targets    int64 // bytes of symbolic links

	// What resolve has found: a name's parts, without links, and the nodes of those that are there.
	parts []string
	way   []*node
}

// node is a name.
type node struct {
	*inode
	children map[string]*node // of a directory
	layer    int32            // that named it last, or something below it
	purged   int32            // layer that has taken away last what is below
}

// inode is what names lead to.
type inode struct {
	mkfs.Inode
	described int32 // layer whose entry describes a directory; 0: none does
	names     int32 // of anything else
}

// badLink is a hard link that leads nowhere. It is no error where it is overridden.
type badLink struct {
	*inode
	err error
}

func newTree(dst *os.File, l limits) (*tree, error) {
	// A file may take a block that is not full, one of attributes, an inode and a name; and there may
	// be as many directories besides.
	const perEntry = 3*4096 + 2*1024
	// The tree of a file's extents and the bitmaps take far less than a thousandth.
	w, err := mkfs.New(dst, l.maxBytes+l.maxBytes>>10+l.maxEntries*perEntry+1<<20)
	return &tree{w: w, root: newDir(), maxEntries: l.maxEntries}, err
}

func newDir() *node { return &node{inode: implied(), children: map[string]*node{}} }

// implied is a directory that no entry describes.
func implied() *inode {
	return &inode{Inode: mkfs.Inode{Mode: unix.S_IFDIR | 0o755, ModTime: time.Unix(0, 0)}}
}

func (n *node) Inode() *mkfs.Inode { return &n.inode.Inode }

func (n *node) Children() iter.Seq2[string, mkfs.Node] {
	return func(yield func(string, mkfs.Node) bool) {
		for name, c := range n.children {
			if !yield(name, c) {
				return
			}
		}
	}
}

// begin comes before a layer's entries.
func (t *tree) begin() {
	for _, i := range t.aufs {
		t.unlink(i)
	}
	t.layer++
	t.aufs = map[string]*inode{}
}

func (t *tree) entry(ctx context.Context, e entry, content io.Reader) (err error) {
	if e.kind == kindWhiteout || e.kind == kindOpaque {
		return t.remove(e)
	}
	i := &inode{Inode: e.inode, described: t.layer}
	if e.kind == kindLink {
		i, err = t.target(e)
	} else {
		err = t.write(ctx, i, e, content)
	}
	if err != nil {
		return err
	}
	i.names++ // before another name of it may go
	if e.aufs {
		if old := t.aufs[e.name]; old != nil {
			t.unlink(old)
		}
		t.aufs[e.name] = i
		return nil
	}
	base, err := t.parent(e.name)
	if err != nil {
		return err
	}
	dir := t.root
	for _, part := range t.parts {
		dir = t.subdir(dir, part)
	}
	if e.kind == kindDir {
		if base != "" {
			dir = t.subdir(dir, base)
		}
		t.describe(dir, i)
		return t.withinLimits()
	}
	if old := dir.children[base]; old != nil {
		t.drop(old)
	}
	dir.children[base] = &node{inode: i, layer: t.layer}
	return t.withinLimits()
}

// write writes what a file has, but for its names.
func (t *tree) write(ctx context.Context, i *inode, e entry, content io.Reader) (err error) {
	if i.Mode&unix.S_IFMT == unix.S_IFREG {
		i.Content, err = t.w.Content(ctx, content)
	}
	if err == nil {
		i.Attributes, err = t.w.Attributes(e.xattrs)
	}
	t.targets += int64(len(i.Target))
	return err
}

// withinLimits bounds what takes memory besides entries: a name may imply 2,047 directories, and a
// symbolic link have 4,095 bytes.
func (t *tree) withinLimits() error {
	const perEntry = 256
	switch {
	case t.dirs > t.maxEntries:
		return &LimitError{"directories", t.maxEntries, "MaxEntries"}
	case t.targets > t.maxEntries*perEntry:
		return &LimitError{
			fmt.Sprintf("times %d bytes in the targets of symbolic links", perEntry),
			t.maxEntries, "MaxEntries",
		}
	}
	return nil
}

// describe says what a directory's owner, mode and all else are.
func (t *tree) describe(n *node, i *inode) {
	t.w.Free(&n.inode.Inode)
	n.inode = i
}

// target is what a hard link leads to.
func (t *tree) target(e entry) (*inode, error) {
	if kept := t.aufs[e.target]; kept != nil {
		return kept, nil
	}
	base, err := t.parent(e.target)
	if err != nil {
		return nil, err
	}
	if dir := t.found(); dir != nil {
		if n := dir.children[base]; n != nil && n.children == nil {
			return n.inode, nil
		}
	}
	i := &inode{}
	const reason = "a hard link to what is not there, or is a directory"
	t.bad = append(t.bad, badLink{i, &EntryError{Name: short(e.name), Reason: reason}})
	return i, nil
}

// parent resolves the directory that a name is in, and returns the name's last part.
func (t *tree) parent(name string) (base string, err error) {
	i := strings.LastIndexByte(name, '/')
	return name[i+1:], t.resolve(name[:max(i, 0)])
}

// resolve follows the symbolic links in a name, within the root. What is not there, or is no
// directory, is taken as it is named.
func (t *tree) resolve(name string) error {
	t.cut(0)
	hops := 0
	for rest := name; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		if hops > 0 {
			if t.steps++; t.steps > maxSteps {
				return &LimitError{What: "parts of names that symbolic links lead through", Limit: maxSteps}
			}
		}
		switch part {
		case "", ".":
			continue
		case "..":
			t.cut(max(len(t.parts)-1, 0))
			continue
		}
		var next *node
		if at := t.found(); at != nil {
			next = at.children[part]
		}
		if next == nil || next.Target == "" {
			t.way, t.parts = append(t.way, next), append(t.parts, part)
			continue
		}
		if hops++; hops > maxHops {
			return &EntryError{Name: short(name), Reason: fmt.Sprintf("leads through more than %d symbolic links", maxHops)}
		}
		if next.Target[0] == '/' {
			t.cut(0)
		}
		rest = next.Target + "/" + rest
	}
	size, longest := len(t.parts)-1, 0
	for _, part := range t.parts {
		size, longest = size+len(part), max(longest, len(part))
	}
	if size > maxPath || longest > maxName {
		return &EntryError{Name: short(name), Reason: fmt.Sprintf("leads to a name of %d bytes", size)}
	}
	return nil
}

// cut leaves so many parts of what resolve has found.
func (t *tree) cut(n int) { t.way, t.parts = t.way[:n], t.parts[:n] }

// found is what resolve has found; nil if it is not there.
func (t *tree) found() *node {
	if len(t.way) == 0 {
		return t.root
	}
	return t.way[len(t.way)-1]
}

// subdir finds or makes a directory. What is in its way gives way.
func (t *tree) subdir(dir *node, name string) *node {
	n := dir.children[name]
	if n == nil || n.children == nil {
		if n != nil {
			t.drop(n)
		}
		t.dirs++
		n = newDir()
		dir.children[name] = n
	}
	n.layer = t.layer
	return n
}

// drop takes away a name that is no more in its directory, and all that is below it.
func (t *tree) drop(n *node) {
	if n.children == nil {
		t.unlink(n.inode)
		return
	}
	for _, c := range n.children {
		t.drop(c)
	}
	t.w.Free(&n.inode.Inode)
}

func (t *tree) unlink(i *inode) {
	if i.names--; i.names == 0 {
		t.w.Free(&i.Inode)
	}
}

// remove takes away what lower layers have.
func (t *tree) remove(e entry) error {
	if e.kind == kindOpaque {
		err := t.resolve(e.name)
		if n := t.found(); err == nil && n != nil {
			t.purge(n)
		}
		return err
	}
	base, err := t.parent(e.name)
	if dir := t.found(); err == nil && dir != nil && dir.children[base] != nil {
		t.hide(dir, base)
	}
	return err
}

// purge takes away what lower layers have below a directory. What its own layer adds later is not
// looked at again: marks could be as many as names.
func (t *tree) purge(dir *node) {
	if dir.purged == t.layer {
		return
	}
	dir.purged = t.layer
	for name := range dir.children {
		t.hide(dir, name)
	}
}

// hide takes away what lower layers have of a name in a directory: all of it, or what is below it
// and what they say of it.
func (t *tree) hide(dir *node, name string) {
	n := dir.children[name]
	if n.layer < t.layer {
		delete(dir.children, name)
		t.drop(n)
		return
	}
	t.purge(n)
	if n.children != nil && n.described < t.layer {
		t.describe(n, implied())
	}
}

// finish writes what has survived.
func (t *tree) finish() error {
	t.begin() // which ends the last layer
	for _, b := range t.bad {
		if b.names > 0 {
			return b.err
		}
	}
	err := t.w.Finish(t.root)
	if wrong := (*mkfs.FileError)(nil); errors.As(err, &wrong) {
		return &EntryError{Name: short(wrong.Name), Reason: wrong.Reason}
	}
	return err
}
