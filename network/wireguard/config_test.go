package wireguard_test

import (
	"errors"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"push.rocks/smartvm/network/wireguard"
)

// Keys of tests, good for nothing else.
const (
	privateKey = "yAnz5TF+lXXJte14tji3zlMNq+hd2rYUIgJBgB3fBmk="
	publicKey  = "xTIBA5rboUvnH4htodjb6e697QjLERt1NAB4mZqp8Dg="
	otherKey   = "TrMvSoP4jYQlY6RIzBgbssQqY3vxI2Pi+y71lOWWXX0="
)

const sample = `# a comment
[Interface]
PrivateKey = ` + privateKey + `
Address = 10.7.0.2/32, fd07::2
MTU = 1380
DNS = 10.7.0.1 # kept from nobody

[Peer]
PublicKey=` + publicKey + `
PresharedKey = ` + otherKey + `
AllowedIPs = 0.0.0.0/0
AllowedIPs = ::/0
Endpoint = vpn.example.com:51820
PersistentKeepalive = 25

[peer]
PublicKey = ` + otherKey + `
AllowedIPs = 10.8.1.2/16
Endpoint = [2001:db8::1]:51820
`

func TestParse(t *testing.T) {
	got, err := wireguard.Parse(strings.NewReader(sample))
	if err != nil {
		t.Fatal(err)
	}
	prefix := netip.MustParsePrefix
	want := &wireguard.Config{
		Addresses: []netip.Prefix{prefix("10.7.0.2/32"), prefix("fd07::2/128")}, MTU: 1380,
		DNS: []netip.Addr{netip.MustParseAddr("10.7.0.1")},
		Peers: []wireguard.Peer{
			{
				Allowed: []netip.Prefix{prefix("0.0.0.0/0"), prefix("::/0")}, Endpoint: "vpn.example.com:51820",
				Keepalive: 25 * time.Second,
			},
			{Allowed: []netip.Prefix{prefix("10.8.0.0/16")}, Endpoint: "[2001:db8::1]:51820"},
		},
	}
	if diff := cmp.Diff(want, got, cmpopts.EquateComparable(netip.Prefix{}, netip.Addr{}),
		cmpopts.IgnoreUnexported(wireguard.Config{}, wireguard.Peer{})); diff != "" {
		t.Error(diff)
	}
}

// What generators of files write, and wg and wg-quick take.
func TestParse_Generated(t *testing.T) {
	const head = "[Interface]\nPrivateKey = " + privateKey + "\nAddress = 10.7.0.2/32\n"
	many := "AllowedIPs = " + strings.TrimSuffix(strings.Repeat("10.7.0.0/24, ", 300), ", ") + "\n"
	peer := func(lines string) string { return head + "[Peer]\nPublicKey = " + publicKey + "\n" + lines }
	for name, in := range map[string]string{
		"no resolver":           head + "DNS =\n",
		"not to be saved":       head + "SaveConfig = false\n",
		"byte order mark":       "\ufeff" + head,
		"any port":              head + "ListenPort = 0\n",
		"no keepalive":          peer("PersistentKeepalive = Off\n"),
		"many prefixes":         peer(many),
		"preshared key of none": peer("PresharedKey = " + strings.Repeat("A", 43) + "=\n"),
		"ends of lines":         strings.ReplaceAll(head, "\n", "\r\n"),
		"mark and table":        head + "FwMark = off\nTable = 0x1\n",
		"no end of line":        strings.TrimSpace(head),
	} {
		c, err := wireguard.Parse(strings.NewReader(in))
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		if c.Addresses[0] != netip.MustParsePrefix("10.7.0.2/32") || len(c.DNS) > 0 || c.ListenPort != 0 {
			t.Errorf("%s: got %+v", name, c)
		}
		if want := strings.Count(in, "10.7.0.0/24"); len(c.Peers) > 0 &&
			(len(c.Peers[0].Allowed) != want || c.Peers[0].Keepalive != 0) {
			t.Errorf("%s: got %+v, want %d prefixes", name, c.Peers[0], want)
		}
	}
}

func TestParse_Wrong(t *testing.T) {
	const head = "[Interface]\nPrivateKey = " + privateKey + "\nAddress = 10.7.0.2/32\n"
	peer := func(lines string) string { return head + "[Peer]\nPublicKey = " + publicKey + "\n" + lines }
	for in, want := range map[string]string{
		"":                                  "line 0: there is no [Interface]",
		"[Peer]\nPublicKey = " + publicKey:  "there is no [Interface]",
		"MTU = 1400\n" + head:               "line 1: stands before any section",
		"[Interface]\nAddress = 10.0.0.1\n": "has no PrivateKey",
		"[Interface]\nPrivateKey = " + privateKey + "\n": "has no Address",
		head + head:                               "line 4: a second [Interface]",
		head + "[Peer]\n":                         "[Peer] has no PublicKey",
		head + "PostUp = rm -rf /\n":              "line 4: postup is refused",
		head + "SaveConfig = true\n":              "want false: the file is not written here",
		head + "MTU = 9\n":                        "from 576 to 65535",
		head + "MTU\n":                            "want NAME = VALUE",
		head + "MTU =\n":                          "want NAME = VALUE",
		head + "ListenPort = 70000\n":             "from 0 to 65535",
		head + "ListenPort = 1\nListenPort = 2\n": "listenport was there in line 4",
		head + "Colour = red\n":                   "unknown setting \"colour\"",
		head + "Address = 10.0.0.1/33\n":          "want addresses",
		peer("AllowedIPs = all\n"):                "want addresses",
		peer("Endpoint = host\n"):                 "want HOST:PORT",
		peer("Endpoint = host:0\n"):               "want HOST:PORT",
		peer("PersistentKeepalive = -1\n"):        "from 0 to 65535",
		peer("[Peer]\nPublicKey = " + publicKey):  "another peer has this PublicKey",
		peer("PresharedKey = c2hvcnQ=\n"):         "want a key",
		head + strings.Repeat("[Peer]\n", 65):     "more than 64 peers",
		head + strings.Repeat("#\n", 40<<10):      "is over 65536 bytes",
	} {
		_, err := wireguard.Parse(strings.NewReader(in))
		if !errors.Is(err, wireguard.ErrConfig) || !strings.Contains(err.Error(), want) {
			t.Errorf("%.60q: got %v, want %q", in, err, want)
		}
	}
	// All at once, and no keys.
	_, err := wireguard.Parse(strings.NewReader("[Interface]\nPrivateKey = " + privateKey + "x\nMTU = 1\nPreUp = x\n"))
	if err == nil || strings.Count(err.Error(), "\n") != 3 || strings.Contains(err.Error(), privateKey[:8]) {
		t.Errorf("got %v", err)
	}
}

func FuzzParse(f *testing.F) {
	f.Add(sample)
	f.Add("[Interface]\n[Peer]\n[Interface]\n= =\n")
	f.Fuzz(func(t *testing.T, in string) {
		c, err := wireguard.Parse(strings.NewReader(in))
		if err == nil && (len(c.Addresses) == 0 || len(c.Peers) > 64) {
			t.Errorf("%+v", c)
		}
	})
}
