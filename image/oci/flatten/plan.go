package flatten

import (
	"archive/tar"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

// plan unpacks layers in memory, the lowest first, without their files' content. It is the exact rule of what an image
// is; shadow comes to the same where it does not give up.
type plan struct {
	root   *node
	layer  int
	number int               // of the entry, in its layer
	steps  int               // of resolve, through symbolic links
	aufs   map[string]*inode // of the layer: what hard links alone may lead to
	places map[[2]int]*inode // by layer and entry: what survives of them
	dirs   []string          // that survive, parents before what they hold
}

// node is a name.
type node struct {
	*inode
	children map[string]*node // of a directory
	layer    int              // that named it last, or something below it
}

// inode is what names lead to.
type inode struct {
	place [2]int // of the entry that describes it; zero: a directory that none describes
	names []string
	link  string // where a symbolic link leads
	bad   string // why there can be no such file
}

func newPlan() *plan {
	return &plan{root: newDir(), places: map[[2]int]*inode{}}
}

func newDir() *node { return &node{inode: &inode{}, children: map[string]*node{}} }

func (p *plan) begin(layer int) error {
	p.layer, p.number = layer, 0
	p.aufs = map[string]*inode{}
	return nil
}

func (p *plan) entry(e entry, _ io.Reader) error {
	p.number++
	switch e.kind {
	case kindWhiteout, kindOpaque:
		return p.remove(e)
	}
	dir, base, err := p.parent(e.name)
	if err != nil {
		return err
	}
	i := &inode{place: [2]int{p.layer, p.number}}
	if e.kind == kindDir {
		p.dir(path.Join(dir, base)).inode = i
		return nil
	}
	if e.kind == kindLink {
		if i, err = p.target(e.target, i); err != nil {
			return err
		}
	} else if e.header.Typeflag == tar.TypeSymlink {
		i.link = e.header.Linkname
	}
	if e.aufs {
		p.aufs[e.name] = i
		return nil
	}
	p.dir(dir).children[base] = &node{inode: i, layer: p.layer}
	return nil
}

// target is the inode that a hard link leads to, or i, which then is bad.
func (p *plan) target(name string, i *inode) (*inode, error) {
	if kept := p.aufs[name]; kept != nil {
		return kept, nil
	}
	dir, base, err := p.parent(name)
	if err != nil {
		return nil, err
	}
	if t := p.find(path.Join(dir, base)); t != nil && t.children == nil {
		return t.inode, nil
	}
	i.bad = "a hard link to what is not there, or is a directory"
	return i, nil
}

// parent is where a name is: symbolic links on the way there are followed, within the root.
func (p *plan) parent(name string) (dir, base string, err error) {
	i := strings.LastIndexByte(name, '/')
	dir, err = p.resolve(name[:max(i, 0)])
	return dir, name[i+1:], err
}

// resolve follows the symbolic links in a name, within the root. What is not there, or is no directory, is taken as it is named,
// so that what comes out has no links in it.
func (p *plan) resolve(name string) (string, error) {
	var way []*node // nil: not there
	parts := make([]string, 0, 8)
	hops := 0
	for rest := name; rest != ""; {
		var part string
		part, rest, _ = strings.Cut(rest, "/")
		if hops > 0 {
			if p.steps++; p.steps > maxSteps {
				return "", &LimitError{What: "parts of names that symbolic links lead through", Limit: maxSteps}
			}
		}
		switch part {
		case "", ".":
			continue
		case "..":
			way, parts = way[:max(len(way)-1, 0)], parts[:max(len(parts)-1, 0)]
			continue
		}
		at := p.root
		if len(way) > 0 {
			at = way[len(way)-1]
		}
		var next *node
		if at != nil {
			next = at.children[part]
		}
		if next == nil || next.link == "" {
			way, parts = append(way, next), append(parts, part)
			continue
		}
		if hops++; hops > maxHops {
			return "", &EntryError{Name: short(name), Reason: fmt.Sprintf("leads through more than %d symbolic links", maxHops)}
		}
		if next.link[0] == '/' {
			way, parts = way[:0], parts[:0]
		}
		rest = next.link + "/" + rest
	}
	whole := strings.Join(parts, "/")
	if len(whole) > maxPath || slices.ContainsFunc(parts, func(part string) bool { return len(part) > maxName }) {
		return "", &EntryError{Name: short(name), Reason: fmt.Sprintf("leads to a name of %d bytes", len(whole))}
	}
	return whole, nil
}

// dir finds or makes a directory, whose name has been resolved. What is in its way gives way.
func (p *plan) dir(name string) *node {
	n := p.root
	for part := range strings.SplitSeq(name, "/") {
		if part == "" {
			break
		}
		next := n.children[part]
		if next == nil || next.children == nil {
			next = newDir()
			n.children[part] = next
		}
		next.layer = p.layer
		n = next
	}
	return n
}

func (p *plan) find(name string) *node {
	n := p.root
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || n == nil {
			break
		}
		n = n.children[part]
	}
	return n
}

// remove takes away what lower layers have.
func (p *plan) remove(e entry) error {
	if e.kind == kindOpaque {
		name, err := p.resolve(e.name)
		if n := p.find(name); err == nil && n != nil {
			p.purge(n)
		}
		return err
	}
	name, base, err := p.parent(e.name)
	dir := p.find(name)
	if err != nil || dir == nil || dir.children[base] == nil {
		return err
	}
	if n := dir.children[base]; n.layer < p.layer {
		delete(dir.children, base)
	} else {
		p.purge(n)
		n.describe(p.layer)
	}
	return nil
}

// purge takes away what lower layers have below a directory.
func (p *plan) purge(n *node) {
	for name, c := range n.children {
		if c.layer < p.layer {
			delete(n.children, name)
			continue
		}
		p.purge(c)
		c.describe(p.layer)
	}
}

// describe forgets a directory's metadata if they are of a lower layer.
func (n *node) describe(layer int) {
	if n.children != nil && n.place[0] < layer {
		n.inode = &inode{}
	}
}

// finish finds out what survived.
func (p *plan) finish() { p.walk("", p.root) }

func (p *plan) walk(name string, n *node) {
	if n.children != nil {
		p.dirs = append(p.dirs, name)
	}
	if n.place != [2]int{} {
		n.names = append(n.names, name)
		p.places[n.place] = n.inode
	}
	for _, base := range slices.Sorted(maps.Keys(n.children)) {
		p.walk(strings.TrimPrefix(name+"/"+base, "/"), n.children[base])
	}
}

// planned writes what a plan says, layers in any order.
type planned struct {
	*plan
	*writer
}

func (p *planned) begin(layer int) error {
	p.layer, p.number = layer, 0
	for _, dir := range p.dirs {
		if dir == "" {
			continue
		}
		if err := p.implied(dir); err != nil {
			return err
		}
	}
	p.dirs = nil // they are there now
	return nil
}

func (p *planned) entry(e entry, content io.Reader) error {
	p.number++
	i := p.places[[2]int{p.layer, p.number}]
	if i == nil {
		return nil
	}
	if i.bad != "" {
		return &EntryError{Name: short(e.name), Reason: i.bad}
	}
	e.header.Name = i.names[0]
	if e.kind == kindDir && e.header.Name == "" {
		e.header.Name = "."
	}
	if e.kind == kindDir {
		e.header.Name += "/"
	}
	if err := p.put(e.header, content); err != nil {
		return err
	}
	for _, name := range i.names[1:] {
		if err := p.link(name, i.names[0]); err != nil {
			return err
		}
	}
	return nil
}
