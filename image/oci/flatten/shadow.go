package flatten

import (
	"archive/tar"
	"hash/maphash"
	"io"
	"strings"
)

// shadow writes what is visible of layers that come from the top down, in one pass, or ends with errPlan.
type shadow struct {
	w     *writer
	layer uint16
	seeds [2]maphash.Seed
	marks map[key]mark
	way   string // the directory by way of which the last name went
}

// key stands for a name in less memory: two of a million names share one with a probability of 2^-88.
type key [2]uint64

// mark is what is known of a name from the layers read so far. Layers are numbered from 1; 0 is none.
type mark struct {
	is       isWhat
	explicit bool   // a directory's metadata is written
	layer    uint16 // that made it what it is
	last     uint16 // that named it last
	below    uint16 // that had something visible below it last
	through  bool   // something was named by way of it
	link     uint16 // layer in which it is a symbolic link, or may be one
	opaque   uint16 // layers below this one have nothing visible below the name
	gone     uint16 // layers below this one do not have the name itself either
}

type isWhat uint8

const (
	isUnknown isWhat = iota
	isDir
	isOther
	isWhiteout // no lower layer has it
)

func newShadow(w *writer) *shadow {
	return &shadow{
		w: w, seeds: [2]maphash.Seed{maphash.MakeSeed(), maphash.MakeSeed()},
		marks: map[key]mark{},
	}
}

func (s *shadow) key(name string) key {
	return key{maphash.String(s.seeds[0], name), maphash.String(s.seeds[1], name)}
}

func (s *shadow) begin(layer int) error {
	s.layer, s.way = uint16(layer), ""
	// The root is there in any case, and must be before all else.
	k := s.key("")
	m := s.marks[k]
	m.is = isDir
	s.marks[k] = m
	return nil
}

// parents calls f for each directory that a name is in, from the root down, until it returns false.
func parents(name string, f func(dir string) bool) {
	if name == "" || !f("") {
		return
	}
	for i := range len(name) {
		if name[i] == '/' && !f(name[:i]) {
			return
		}
	}
}

// above goes through the directories that a name is in. hidden says that an upper layer hides all that this one has below
// one of them; blocked, that this layer has something else than a directory there. With imply, those that this layer
// has, if only by having something in them, are made where they are not there yet.
func (s *shadow) above(name string, imply bool) (hidden, blocked bool, err error) {
	parents(name, func(dir string) bool {
		k := s.key(dir)
		m := s.marks[k]
		hidden = (m.is == isOther || m.is == isWhiteout) && m.layer > s.layer
		blocked = m.is == isOther && m.layer == s.layer
		if hidden || blocked {
			return false
		}
		hidden = m.opaque > s.layer
		if imply && m.gone <= s.layer {
			if m.is != isDir {
				err = s.w.implied(dir)
				m = m.become(kindDir, s.layer)
				m.explicit = false
			}
			m.below = s.layer
			s.marks[k] = m
		}
		return !hidden && err == nil
	})
	return hidden, blocked, err
}

// follow ends with errPlan if a name goes through what is or may be a symbolic link, of this layer or of a lower one: where it
// leads is not known here.
func (s *shadow) follow(e entry) error {
	if e.aufs {
		return errPlan
	}
	way := e.name
	if e.kind != kindOpaque {
		way = e.name[:max(strings.LastIndexByte(e.name, '/'), 0)]
	}
	if way != s.way {
		for i := range len(way) + 1 {
			if i < len(way) && way[i] != '/' {
				continue
			}
			k := s.key(way[:i])
			m := s.marks[k]
			if m.link == s.layer {
				return errPlan
			}
			if !m.through {
				m.through = true
				s.marks[k] = m
			}
		}
		s.way = way
	}
	if e.kind == kindLink || e.kind == kindOther && e.header.Typeflag == tar.TypeSymlink {
		k := s.key(e.name)
		m := s.marks[k]
		if m.through {
			return errPlan
		}
		m.link = s.layer
		s.marks[k] = m
	}
	return nil
}

func (s *shadow) entry(e entry, content io.Reader) error {
	if err := s.follow(e); err != nil {
		return err
	}
	removal := e.kind == kindWhiteout || e.kind == kindOpaque
	hidden, blocked, err := s.above(e.name, !removal)
	if hidden || err != nil || removal && blocked {
		return err
	}
	k := s.key(e.name)
	m := s.marks[k]
	if removal {
		s.marks[k] = m.remove(e.kind, s.layer)
		return nil
	}
	if blocked || m.last == s.layer {
		return errPlan
	}
	m.last = s.layer
	visible := false
	switch m.is {
	case isDir:
		switch {
		case e.kind == kindDir:
			visible = !m.explicit && m.gone <= s.layer
			m.explicit = m.explicit || visible
		case m.below == s.layer:
			return errPlan // it was a directory in this layer, and is none any more
		default:
			m.gone, m.opaque = max(m.gone, s.layer), max(m.opaque, s.layer)
		}
	case isUnknown:
		visible = true
	default:
		visible = m.layer <= s.layer
	}
	if !visible {
		s.marks[k] = m
		return nil
	}
	m = m.become(e.kind, s.layer)
	s.marks[k] = m
	return s.write(e, content)
}

// remove notes that a layer removes what lower ones have under a name, or below it.
func (m mark) remove(what kind, layer uint16) mark {
	switch {
	case m.is == isOther || m.is == isWhiteout:
	case what == kindOpaque:
		m.opaque = max(m.opaque, layer)
	case m.is == isDir:
		m.gone, m.opaque = max(m.gone, layer), max(m.opaque, layer)
	default:
		m.is, m.layer = isWhiteout, layer
	}
	return m
}

// become notes that a layer has a name that was not there yet, or which the layer itself has removed from those below.
func (m mark) become(what kind, layer uint16) mark {
	if m.is == isWhiteout {
		m.gone, m.opaque = layer, layer
	}
	if what != kindDir {
		m.is, m.layer = isOther, layer
		return m
	}
	if m.is != isDir {
		m.is, m.layer = isDir, layer
	}
	m.explicit = true
	return m
}

func (s *shadow) write(e entry, content io.Reader) error {
	if e.kind != kindLink {
		return s.w.put(e.header, content)
	}
	if t := s.marks[s.key(e.target)]; t.is != isOther || t.layer != s.layer || e.target == e.name {
		return errPlan // it is hidden, of a lower layer, or not there
	}
	return s.w.link(e.name, e.target)
}
