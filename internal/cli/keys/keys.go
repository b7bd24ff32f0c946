// Package keys finds the keys in what is typed that leave what it is typed for.
package keys

import (
	"errors"
	"fmt"
	"io"
	"strings"
)

// Default are docker's.
const Default = "ctrl-p,ctrl-q"

// Parse reads keys as docker has them: "a", "ctrl-a", "ctrl-@", with commas between. Nothing is
// none.
func Parse(text string) (keys []byte, err error) {
	if text == "" {
		return nil, nil
	}
	for name := range strings.SplitSeq(text, ",") {
		key, ctrl := strings.CutPrefix(strings.ToLower(name), "ctrl-")
		switch {
		case len(key) != 1:
			return nil, fmt.Errorf("--detach-keys %q: %q is no key: want a letter, or ctrl- and one of a-z @ [ \\ ] ^ _", text,
				name)
		case !ctrl:
			keys = append(keys, name[0])
		case key[0] >= 'a' && key[0] <= 'z' || strings.Contains("@[\\]^_", key):
			keys = append(keys, strings.ToUpper(key)[0]&0x1f)
		default:
			return nil, fmt.Errorf("--detach-keys %q: %q is no key", text, name)
		}
	}
	return keys, nil
}

// ErrDetach ends what is typed.
var ErrDetach = errors.New("detach keys")

// Reader passes on what is typed until keys come, one after the other. The first of them are held
// back until it is known.
type Reader struct {
	From   io.Reader
	Keys   []byte // len >= 1
	Detach func() // called once

	seen  int    // of keys
	ready []byte // to be passed on
	ended error
	buf   [4096]byte
}

func (d *Reader) Read(p []byte) (int, error) {
	for len(d.ready) == 0 {
		if d.ended != nil {
			return 0, d.ended
		}
		n, err := d.From.Read(d.buf[:])
		d.take(d.buf[:n])
		if err != nil && d.ended == nil {
			d.ended = err
			d.ready, d.seen = append(d.ready, d.Keys[:d.seen]...), 0
		}
	}
	n := copy(p, d.ready)
	d.ready = d.ready[n:]
	return n, nil
}

func (d *Reader) take(typed []byte) {
	d.ready = nil
	for _, b := range typed {
		if b == d.Keys[d.seen] {
			if d.seen++; d.seen == len(d.Keys) {
				d.ended = ErrDetach
				d.Detach()
				return
			}
			continue
		}
		// What was held back may hold a beginning of its own: of "aab" after "aa", the second.
		held := append(append([]byte(nil), d.Keys[:d.seen]...), b)
		for d.seen = 0; len(held) > 0; held = held[1:] {
			if n := len(held); n < len(d.Keys) && string(d.Keys[:n]) == string(held) {
				d.seen = n
				break
			}
			d.ready = append(d.ready, held[0])
		}
	}
}
