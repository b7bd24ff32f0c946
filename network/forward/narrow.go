package forward

import (
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/internal/nft"
)

// Narrow says where the host forwards only for guests: what comes in there, and goes to no network
// of ours, is dropped.
type Narrow struct {
	IP4, IP6 []string // by what interfaces it comes in
	AllIP6   bool     // or IPv6 by any that is no network of ours
}

// String names them.
func (n Narrow) String() string { return strings.Join(n.texts(), ", ") }

func (n Narrow) texts() (all []string) {
	for _, name := range n.IP4 {
		all = append(all, "ipv4 "+name)
	}
	for _, name := range n.IP6 {
		all = append(all, "ipv6 "+name)
	}
	if n.AllIP6 {
		all = append(all, "ipv6")
	}
	return all
}

func (n Narrow) rules() (all []nft.Rule) {
	elsewhere := nft.MetaIsNot(expr.MetaKeyOIFGROUP, binaryutil.NativeEndian.PutUint32(filter.Group))
	for _, text := range n.texts() {
		protocol, name, _ := strings.Cut(text, " ")
		from := nft.Iif(name)
		if name == "" {
			from = nft.MetaIsNot(expr.MetaKeyIIFGROUP, binaryutil.NativeEndian.PutUint32(filter.Group))
		}
		family := map[string]byte{"ipv4": unix.NFPROTO_IPV4, "ipv6": unix.NFPROTO_IPV6}[protocol]
		all = append(all, nft.Rule{Exprs: nft.Join(nft.Nfproto(family), from, elsewhere, nft.Drop()), Text: text})
	}
	return all
}

// set has a network's table do so. Returns an error that is fs.ErrNotExist where the table is gone.
func (n Narrow) set(table string) error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	chain := nftables.Chain{Table: &nftables.Table{Name: table, Family: nftables.TableFamilyINet}, Name: filter.Narrow}
	rules, err := conn.GetRules(chain.Table, &chain)
	var now []string
	for _, r := range rules {
		text, _ := userdata.GetString(r.UserData, userdata.TypeComment)
		now = append(now, text)
	}
	if err == nil && !slices.Equal(now, n.texts()) {
		conn.FlushChain(&chain)
		err = (&nft.Ruled{Chain: chain, Rules: n.rules()}).AddRules(conn)
		if err == nil {
			err = conn.Flush()
		}
	}
	if errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("narrow forwarding in table %s: %w", table, fs.ErrNotExist)
	}
	if err != nil {
		return fmt.Errorf("narrow forwarding in table %s: %w", table, err)
	}
	return nil
}
