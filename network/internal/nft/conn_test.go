package nft_test

import (
	"encoding/binary"
	"errors"
	"slices"
	"strconv"
	"testing"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/internal/nft"
)

// What the kernel answers in many parts is read whole, and what it answers nothing to was done.
func TestConn_Large(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const most = 5000
	table := &nftables.Table{Name: "large", Family: nftables.TableFamilyINet}
	chain := nft.Chain(nftables.Chain{Table: table, Name: "chain"}, nil)
	for i := range most {
		chain.Rules = append(chain.Rules, nft.Rule{Exprs: nft.Drop(), Text: strconv.Itoa(i)})
	}
	set := &nftables.Set{Table: table, Name: "set", KeyType: nftables.TypeIPAddr}
	var elements []nftables.SetElement
	for i := range most {
		elements = append(elements, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, uint32(i+1))})
	}
	conn, closeLater, err := nft.OpenOnce()
	if err != nil {
		t.Fatal(err)
	}
	defer closeLater()
	conn.AddTable(table)
	if err := errors.Join(conn.AddSet(set, nil), nft.AddChains(conn, []nft.Ruled{chain})); err != nil {
		t.Fatal(err)
	}
	for some := range slices.Chunk(elements, nft.MaxElements) {
		if err := conn.SetAddElements(set, some); err != nil {
			t.Fatal(err)
		}
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	rules, err := conn.GetRules(table, &chain.Chain)
	if err != nil || len(rules) != most {
		t.Errorf("got %d rules of %d: %v", len(rules), most, err)
	}
	there, err := conn.GetSetElements(set)
	if err != nil || len(there) != most {
		t.Errorf("got %d elements of %d: %v", len(there), most, err)
	}
	all, err := nft.Comments(&chain.Chain, &nftables.Chain{Table: table, Name: "another"},
		&nftables.Chain{Table: &nftables.Table{Name: "none"}, Name: "chain"})
	if err != nil || len(all) != 3 || len(all[1]) != 0 || len(all[2]) != 0 {
		t.Fatalf("got comments of %d chains, %v", len(all), err)
	}
	if len(all[0]) != most {
		t.Fatalf("got %d comments of %d", len(all[0]), most)
	}
	for i, text := range all[0] {
		if text != strconv.Itoa(i) {
			t.Fatalf("comment %d is %q", i, text)
		}
	}
}

// A change of which a part fails is none, and says why, however much that part is; the connection
// goes on.
func TestConn_Failed(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	table := &nftables.Table{Name: "failed", Family: nftables.TableFamilyINet}
	set := &nftables.Set{Table: table, Name: "set", KeyType: nftables.TypeIPAddr}
	var elements []nftables.SetElement
	for i := range 1000 {
		elements = append(elements, nftables.SetElement{Key: binary.BigEndian.AppendUint32(nil, uint32(i+1))})
	}
	var lasting nft.Lasting
	defer lasting.Close()
	once, err := nft.Open()
	if err != nil {
		t.Fatal(err)
	}
	for name, do := range map[string]func(func(*nftables.Conn) error) error{
		"lasting": lasting.Do, "once": func(f func(*nftables.Conn) error) error { return f(once) },
	} {
		if err := do(func(conn *nftables.Conn) error {
			conn.AddTable(table)
			return errors.Join(conn.SetAddElements(set, elements), conn.Flush())
		}); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s: elements of a set that is not there: got %v", name, err)
		}
		if err := do(func(conn *nftables.Conn) error {
			for range 3000 { // more than a socket takes answers
				conn.AddChain(&nftables.Chain{Table: table, Name: "chain"})
			}
			return conn.Flush()
		}); !errors.Is(err, unix.ENOENT) || len(err.Error()) > 1000 {
			t.Errorf("%s: thousands of chains in a table that is not there: got %.1000v", name, err)
		}
		if err := do(func(conn *nftables.Conn) error {
			_, err := conn.GetSetByName(table, set.Name)
			return err
		}); !errors.Is(err, unix.ENOENT) {
			t.Errorf("%s: a set that is not there: got %v", name, err)
		}
		if err := do(func(conn *nftables.Conn) error {
			conn.CreateTable(table)
			return conn.Flush()
		}); err != nil {
			t.Errorf("%s: the table was made by what failed: %v", name, err)
		}
		if err := do(func(conn *nftables.Conn) error {
			conn.CreateTable(table)
			return conn.Flush()
		}); !errors.Is(err, unix.EEXIST) {
			t.Errorf("%s: a table that is there: got %v", name, err)
		}
		if err := do(func(conn *nftables.Conn) error {
			conn.DelTable(table)
			return conn.Flush()
		}); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}
