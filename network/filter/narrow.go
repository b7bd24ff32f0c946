package filter

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

	"push.rocks/smartvm/network/internal/nft"
)

// Group is the interface group that the bridges of all networks are in, of this host and others of ours beside it: by it rules tell them from
// the host's other interfaces.
const Group = 0x5356

// Narrow says where the host forwards only for guests: what comes in there, and goes to no network of ours, is dropped.
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
	elsewhere := nft.MetaIsNot(expr.MetaKeyOIFGROUP, binaryutil.NativeEndian.PutUint32(Group))
	for _, text := range n.texts() {
		protocol, name, _ := strings.Cut(text, " ")
		from := nft.Iif(name)
		if name == "" {
			from = nft.MetaIsNot(expr.MetaKeyIIFGROUP, binaryutil.NativeEndian.PutUint32(Group))
		}
		family := map[string]byte{"ipv4": unix.NFPROTO_IPV4, "ipv6": unix.NFPROTO_IPV6}[protocol]
		all = append(all, nft.Rule{Exprs: nft.Join(nft.Nfproto(family), from, elsewhere, nft.Drop()), Text: text})
	}
	return all
}

// Narrow sets it. Returns an error that is fs.ErrNotExist where the tables are gone.
func (t *Tables) Narrow(n Narrow) error {
	conn, err := nft.Open()
	if err != nil {
		return err
	}
	chain := nftables.Chain{Table: newLayout(t.Name).inet, Name: narrow}
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
		return fmt.Errorf("narrow forwarding in table %s: %w", t.Name, fs.ErrNotExist)
	}
	if err != nil {
		return fmt.Errorf("narrow forwarding in table %s: %w", t.Name, err)
	}
	return nil
}
