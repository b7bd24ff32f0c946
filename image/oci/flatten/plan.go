package flatten

import (
	"io"
	"maps"
	"slices"
	"strings"
)

// plan unpacks layers in memory, the lowest first, without their files' content. It is the exact rule of what an image
// is; shadow comes to the same where it does not give up.
type plan struct {
	root   *node
	layer  int
	number int               // of the entry, in its layer
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
	bad   string // why there can be no such file
}

func newPlan() *plan {
	return &plan{root: newDir(), places: map[[2]int]*inode{}}
}

func newDir() *node { return &node{inode: &inode{}, children: map[string]*node{}} }

func (p *plan) begin(layer int) error {
	p.layer, p.number = layer, 0
	return nil
}

func (p *plan) entry(e entry, _ io.Reader) error {
	p.number++
	switch e.kind {
	case kindWhiteout, kindOpaque:
		p.remove(e)
		return nil
	case kindDir:
		n := p.dir(e.name)
		n.inode = &inode{place: [2]int{p.layer, p.number}}
		return nil
	}
	i := &inode{place: [2]int{p.layer, p.number}}
	if e.kind == kindLink {
		if t := p.find(e.target); t == nil || t.children != nil {
			i.bad = "a hard link to what is not there, or is a directory"
		} else {
			i = t.inode
		}
	}
	dir, base := p.parent(e.name)
	dir.children[base] = &node{inode: i, layer: p.layer}
	return nil
}

// dir finds or makes a directory. What is in its way gives way.
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

func (p *plan) parent(name string) (dir *node, base string) {
	i := strings.LastIndexByte(name, '/')
	return p.dir(name[:max(i, 0)]), name[i+1:]
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
func (p *plan) remove(e entry) {
	n := p.find(e.name)
	switch {
	case n == nil:
	case e.kind == kindOpaque || n == p.root:
		p.purge(n)
	case n.layer < p.layer:
		i := strings.LastIndexByte(e.name, '/')
		delete(p.find(e.name[:max(i, 0)]).children, e.name[i+1:])
	default:
		p.purge(n)
		n.describe(p.layer)
	}
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
	if e.kind != kindDir {
		e.header.Name = i.names[0]
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
