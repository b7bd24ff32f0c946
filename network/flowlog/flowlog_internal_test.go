package flowlog

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/nftables"
	"github.com/mdlayher/netlink"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/internal/nft"
)

func all(t *testing.T, path string, since time.Time) (events []Event) {
	t.Helper()
	r, err := Open(path, since)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for {
		e, err := r.Next()
		if errors.Is(err, io.EOF) {
			return events
		}
		if err != nil {
			t.Fatal(err)
		}
		events = append(events, e)
	}
}

// A flood of one kind is counted, and hides no other; the file stays small.
func TestLog(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	l, err := Create(path)
	if err != nil {
		t.Fatal(err)
	}
	to := netip.MustParseAddr("192.0.2.1")
	l.Answered("one.example", []netip.Addr{to})
	const flood = 2000
	for i := range flood {
		l.Add(Event{
			Time: time.Now(), Network: "lan", Reason: Reason{Verdict: Denied, Rule: "r"}, Protocol: "tcp",
			Destination: to, Port: uint16(i),
		})
		l.Refused("lan", OfVM, strings.Repeat("\xff", 250)+strconv.Itoa(i), "A")
	}
	l.Add(Event{
		Time: time.Now(), Network: "lan", Reason: Reason{Verdict: Allowed, Rule: "r"}, Protocol: "tcp",
		Destination: to,
	})
	for i := range 3 * maxNames { // no more is known than that
		l.Answered("other.example", []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i >> 8), byte(i)})})
	}
	if len(l.names) != maxNames || len(l.repeats) != maxRepeats {
		t.Errorf("%d names are known, and %d events that may come again", len(l.names), len(l.repeats))
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l.Add(Event{}) // it is closed
	kinds := map[Verdict]int{}
	var lost uint64
	for _, e := range all(t, path, time.Time{}) {
		kinds[e.Verdict]++
		lost += e.Count
		if e.Protocol == "tcp" && e.Host != "one.example" || e.Network != "lan" {
			t.Fatalf("%+v", e)
		}
	}
	if kinds[Allowed] != 1 || kinds[Denied] < 2*burst || kinds[Denied]+int(lost) != 2*flood {
		t.Errorf("%v, and %d lost", kinds, lost)
	}
	if got := all(t, path, time.Now().Add(time.Hour)); len(got) != 0 {
		t.Errorf("of the future there are %d", len(got))
	}
}

// What comes again and again is an event when it begins, and then one every few seconds that says
// how often; what is another is one of its own.
func TestLog_Repeats(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	synctest.Test(t, func(t *testing.T) {
		l, err := Create(path)
		if err != nil {
			t.Fatal(err)
		}
		try := func(port uint16) {
			l.Add(Event{
				Time: time.Now().UTC(), Reason: Reason{Denied, OfVM, "default deny"}, Protocol: "tcp",
				Destination: netip.MustParseAddr("192.0.2.1"), Port: port,
			})
		}
		try(443)
		for range 400 {
			try(80)
			time.Sleep(10 * time.Millisecond)
		}
		time.Sleep(20 * time.Second) // then it is as new
		for range 3 {
			try(80)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	})
	var got []string
	for _, e := range all(t, path, time.Time{}) {
		_, text, _ := strings.Cut(e.String(), "denied  ")
		got = append(got, text)
	}
	const rest = ": default deny of the VM"
	want := []string{
		"tcp 192.0.2.1:443" + rest, "tcp 192.0.2.1:80" + rest, "tcp 192.0.2.1:80" + rest + " (399 more in 4s)",
		"tcp 192.0.2.1:80" + rest, "tcp 192.0.2.1:80" + rest + " (2 more in 0s)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

// What is in the file is not ours to trust.
func TestReader_Strange(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	text := "{}\n" + strings.Repeat("x", 5*maxEvent) + "\n{\"verdict\":1}\n\x00\n{\"verdict\":\"denied\"}\nwithout an end"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := all(t, path, time.Time{}); len(got) != 2 || got[1].Verdict != Denied {
		t.Errorf("got %+v", got)
	}
}

func TestEvent_String(t *testing.T) {
	e := Event{
		Time: time.Unix(0, 0).UTC(), Name: "a\x1b[2J", Reason: Reason{Denied, OfVM, "r\r"}, Protocol: dns,
		Host: "\x9b\n\u202e", Type: "A",
	}
	got := e.String()
	if strings.ContainsFunc(got, func(r rune) bool {
		return r < ' ' || r > '~'
	}) || !strings.Contains(got, `\x9b\n\u202e`) {
		t.Errorf("got %q", got)
	}
}

func message(prefix string, packet []byte) []byte {
	attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: attrPrefix, Data: append([]byte(prefix), 0)},
		{Type: attrSender, Data: []byte{0, 6, 0, 0, 2, 0, 0, 0, 0, 1, 0, 0}},
		{Type: attrPayload, Data: packet},
	})
	if err != nil {
		panic(err)
	}
	return append(make([]byte, 4), attributes...)
}

func TestParseMessage(t *testing.T) {
	ip4 := append([]byte{0x46, 0, 0, 40, 0, 0, 0, 0, 64, unix.IPPROTO_TCP, 0, 0, 10, 0, 0, 2, 192, 0, 2, 1, 1, 1, 1, 1},
		0x80, 0, 0, 22)
	fragment := bytes.Clone(ip4)
	fragment[7] = 1
	ip6 := func(next byte, rest ...byte) []byte {
		p := append(make([]byte, 24), netip.MustParseAddr("2001:db8::1").AsSlice()...)
		p[0], p[6] = 0x60, next
		return append(p, rest...)
	}
	hop := []byte{unix.IPPROTO_UDP, 0, 1, 4, 0, 0, 0, 0}
	for name, c := range map[string]struct {
		prefix string
		packet []byte
		want   string // "": none
	}{
		"options":        {"denied|vm|deny 1.2.3.4|5", ip4, "tcp 192.0.2.1:22: deny 1.2.3.4|5 of the VM"},
		"later fragment": {"denied||r", fragment, "tcp 192.0.2.1: r"},
		"extension":      {"over||r", ip6(unix.IPPROTO_HOPOPTS, append(hop, 0, 1, 0, 53)...), "udp [2001:db8::1]:53: r"},
		"cut extension": {
			"denied||r", ip6(unix.IPPROTO_HOPOPTS, unix.IPPROTO_UDP, 255, 1, 4, 0, 0, 0, 0),
			"udp 2001:db8::1: r",
		},
		"other":     {"allowed||r", ip6(132), "132 2001:db8::1: r"},
		"no packet": {"allowed||r", nil, " : r"},
		"of others": {"IN=eth0", ip4, ""},
		"verdict":   {"lost||r", ip4, ""},
	} {
		sender, e, ok := parseMessage(message(c.prefix, c.packet))
		if ok != (c.want != "") {
			t.Errorf("%s: %v", name, ok)
		}
		if ok && (!strings.HasSuffix(e.String(), " "+c.want) || sender != "02:00:00:00:00:01") {
			t.Errorf("%s: got %q of %s, want %q", name, e, sender, c.want)
		}
	}
}

func FuzzParseMessage(f *testing.F) {
	f.Add(message("denied||r", binary.BigEndian.AppendUint64(make([]byte, 40), 1)))
	f.Fuzz(func(t *testing.T, data []byte) {
		_, e, ok := parseMessage(data)
		if !ok {
			return
		}
		line := encode([]Event{e})
		if _, ok := parse(bytes.TrimSuffix(line, []byte("\n"))); !ok && len(line) <= maxEvent {
			t.Errorf("%q is no event", line)
		}
	})
}

// lineWriter passes on what is written.
type lineWriter chan string

func (w lineWriter) Write(p []byte) (int, error) {
	w <- string(p)
	return len(p), nil
}

// One process listens; where it was killed, or says that it ends, another does.
func TestFollow(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	const table, mac = "smartvm-test", "00:00:00:00:00:00" // of the loopback
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	made := conn.AddTable(&nftables.Table{Name: table, Family: nftables.TableFamilyINet})
	chain := nft.Base(made, "input", nftables.ChainHookInput, nftables.ChainPriorityFilter)
	rule := nft.Join(nft.L4(unix.IPPROTO_UDP), nft.Log(Group(table), Reason{Denied, OfVM, "r"}.Prefix()), nft.Drop())
	if err := nft.AddChains(conn, []nft.Ruled{nft.Chain(chain, nft.Plain(rule))}); err != nil {
		t.Fatal(err)
	}
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	first, err := listen(Group(table))
	if err != nil {
		t.Fatal(err)
	}
	if second, err := listen(Group(table)); !errors.Is(err, errTaken) {
		t.Fatal(second, err)
	}
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 100), "log") // longer than a socket's name may be
	if err := os.Mkdir(filepath.Dir(dir), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, mac), nil, 0o600); err != nil { // of a process that was killed
		t.Fatal(err)
	}
	heard, lines := make(chan Event, 100), make(lineWriter, 100)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		ended <- Follow(ctx, Config{Dir: dir, Table: table, MAC: mac, Event: func(e Event) {
			heard <- e
		}, Log: slog.New(slog.NewTextHandler(lines, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	}()
	if line := <-lines; !strings.Contains(line, errTaken.Error()) {
		t.Fatal(line)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("udp", "127.0.0.1:9")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	deadline := time.After(testenv.Patience(3 * retry))
	for got := false; !got; {
		if _, err := c.Write([]byte("?")); err != nil {
			t.Fatal(err)
		}
		select {
		case e := <-heard:
			if got = true; e.Port != 9 || e.Rule != "r" {
				t.Errorf("heard %+v", e)
			}
		case <-deadline:
			t.Fatal("nobody took the place of who listened")
		case <-time.After(50 * time.Millisecond):
		}
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
