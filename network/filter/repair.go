package filter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/internal/nft"
)

// Repair puts the guest's part in place again where somebody has removed or changed some of it, and
// says whether it did; connections that are not allowed end. It looks for what is the guest's
// alone, however many others there are. Returns what Apply does.
func (g *Guest) Repair(ctx context.Context) (done bool, err error) {
	complete, _, err := g.look()
	if complete || err != nil {
		return false, err
	}
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		return false, err
	}
	defer closeLater()
	if err := clear(conn, []*Guest{g}); err != nil && !errors.Is(err, unix.ENOENT) {
		return false, fmt.Errorf("change guest %s in table %s: %w", g.Tap, g.Table, err)
	}
	return true, g.Replace(ctx)
}

// clear removes elements that are other than the guests add them: these would be refused.
func clear(conn *nftables.Conn, guests []*Guest) error {
	for _, g := range guests {
		_, wrong, err := g.look()
		if err != nil {
			return err
		}
		for _, m := range wrong {
			if err := conn.SetDeleteElements(m.set, m.elements); err != nil {
				return err
			}
		}
	}
	return conn.Flush()
}

// look says whether all that the guest adds is there, and no more under its own keys, and what is
// there with other data. A chain is told by its rules' comments.
func (g *Guest) look() (complete bool, wrong []member, err error) {
	l := newLayout(g.Table)
	members, err := g.members(l)
	if err != nil {
		return false, nil, err
	}
	members = append(members, g.published(l)...)
	var all []nft.Elements
	for _, m := range members {
		all = append(all, nft.Elements{Set: m.set, Elements: m.elements})
	}
	held, err := nft.Look(all)
	if err != nil {
		return false, nil, err
	}
	compiled, err := g.compile()
	if err != nil {
		return false, nil, err
	}
	complete = true
	if own := g.chains(l, compiled); len(own) > 0 {
		is, err := nft.Comments(&own[0].Chain)
		if err != nil {
			return false, nil, err
		}
		complete = slices.Equal(is[0], own[0].Comments())
	}
	rules := complete
	for i, m := range members {
		for n, h := range held[i] {
			complete = complete && h == map[bool]nft.Held{true: nft.Missing, false: nft.Same}[m.absent]
			if h == nft.Differs || h == nft.Same && m.set == l.policies && !rules { // see remove
				wrong = append(wrong, member{set: m.set, elements: m.elements[n : n+1]})
			}
		}
	}
	return complete, wrong, nil
}
