// Package wireguard lets the guests of a network leave by a WireGuard interface alone: one that it
// makes of a configuration as wg-quick has it, or one that is there.
//
// Needs Linux ≥ 5.6 with WireGuard.
package wireguard

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.zx2c4.com/wireguard/wgctrl/wgtypes"
)

// Config is an interface and its peers. It holds keys: it is not for journals, logs or errors.
type Config struct {
	privateKey wgtypes.Key
	Addresses  []netip.Prefix
	MTU        int // 0: chosen
	ListenPort int // 0: chosen
	DNS        []netip.Addr
	Peers      []Peer
}

// Peer is another end.
type Peer struct {
	publicKey wgtypes.Key
	preshared *wgtypes.Key
	Allowed   []netip.Prefix // what is sent to it, and taken from it
	Endpoint  string         // "host:port"; "": it comes to us
	Keepalive time.Duration  // 0: none
}

// Bounds of a configuration.
const (
	maxConfig = 64 << 10 // bytes
	maxPeers  = 64
	maxDNS    = 3
)

// Load is Parse of a file.
func Load(path string) (*Config, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read WireGuard configuration: %w", err)
	}
	c, err := Parse(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return c, nil
}

// ErrConfig means that a configuration does not read.
var ErrConfig = errors.New("invalid WireGuard configuration")

// hooks are what wg-quick would run: a file from elsewhere must not run programs here.
var hooks = []string{"preup", "postup", "predown", "postdown"}

// Parse reads a configuration. Returns all that is wrong, joined, each an ErrConfig with its line;
// no key is in it.
func Parse(r io.Reader) (*Config, error) {
	p := parser{config: new(Config), seen: map[string]int{}}
	lines := bufio.NewScanner(io.LimitReader(r, maxConfig+1))
	size := 0
	for lines.Scan() {
		p.number++
		if size += len(lines.Bytes()) + 1; size > maxConfig {
			p.fail("is over %d bytes", maxConfig)
			break
		}
		p.line(lines.Text())
	}
	if err := lines.Err(); err != nil {
		p.fail("%v", err)
	}
	p.finish()
	if p.interfaces == 0 {
		p.fail("there is no [Interface]")
	}
	return p.config, errors.Join(p.errs...)
}

type parser struct {
	config  *Config
	peer    *Peer // that the section is
	section string
	seen    map[string]int // keys of the section, and their lines
	number  int            // of the line

	interfaces int
	errs       []error
}

func (p *parser) fail(format string, args ...any) {
	p.errs = append(p.errs, fmt.Errorf("%w: line %d: %s", ErrConfig, p.number, fmt.Sprintf(format, args...)))
}

func (p *parser) line(text string) {
	if p.number == 1 {
		text = strings.TrimPrefix(text, "\ufeff") // a byte order mark
	}
	text, _, _ = strings.Cut(text, "#")
	text = strings.TrimSpace(text)
	switch {
	case text == "":
		return
	case strings.EqualFold(text, "[Interface]") || strings.EqualFold(text, "[Peer]"):
		p.begin(strings.ToLower(strings.Trim(text, "[]")))
		return
	}
	key, value, ok := strings.Cut(text, "=")
	key, value = strings.ToLower(strings.TrimSpace(key)), strings.TrimSpace(value)
	lists := key == "address" || key == "allowedips" || key == "dns"
	switch {
	case !ok || value == "" && key != "dns":
		p.fail("want NAME = VALUE")
	case p.section == "":
		p.fail("stands before any section")
	case p.seen[key] > 0 && !lists:
		p.fail("%s was there in line %d", key, p.seen[key])
	case slices.Contains(hooks, key):
		p.fail("%s is refused: a configuration runs no programs here", key)
	default:
		p.seen[key] = p.number
		p.set(p.section+" "+key, value)
	}
}

func (p *parser) begin(section string) {
	p.finish()
	p.section, p.peer, p.seen = section, nil, map[string]int{}
	if section == "interface" {
		if p.interfaces++; p.interfaces > 1 {
			p.fail("a second [Interface]")
		}
		return
	}
	if len(p.config.Peers) == maxPeers {
		p.fail("more than %d peers", maxPeers)
		p.config.Peers = p.config.Peers[:0]
	}
	p.config.Peers = append(p.config.Peers, Peer{})
	p.peer = &p.config.Peers[len(p.config.Peers)-1]
}

// finish checks a section that ends.
func (p *parser) finish() {
	switch {
	case p.section == "interface" && p.seen["privatekey"] == 0:
		p.fail("[Interface] has no PrivateKey")
	case p.section == "interface" && p.seen["address"] == 0:
		p.fail("[Interface] has no Address")
	case p.section == "peer" && p.seen["publickey"] == 0:
		p.fail("[Peer] has no PublicKey")
	}
}

func (p *parser) set(key, value string) {
	var err error
	switch key {
	case "interface privatekey":
		p.config.privateKey, err = parseKey(value, false)
	case "interface address":
		p.config.Addresses, err = p.prefixes(p.config.Addresses, value, false)
	case "interface mtu":
		p.config.MTU, err = parseNumber(value, 576, 65535)
	case "interface listenport":
		p.config.ListenPort, err = parseNumber(value, 0, 65535)
	case "interface dns":
		for text := range strings.SplitSeq(value, ",") {
			// What is no address is a search domain, as for wg-quick.
			if a, err := netip.ParseAddr(strings.TrimSpace(text)); err == nil && len(p.config.DNS) < maxDNS {
				p.config.DNS = append(p.config.DNS, a)
			}
		}
	case "interface saveconfig":
		if value != "false" {
			err = errors.New("want false: the file is not written here")
		}
	case "interface table", "interface fwmark":
		// Where guests go is their network's affair.
	case "peer publickey":
		p.peer.publicKey, err = parseKey(value, false)
		for _, other := range p.config.Peers[:len(p.config.Peers)-1] {
			if err == nil && other.publicKey == p.peer.publicKey {
				err = errors.New("another peer has this PublicKey")
			}
		}
	case "peer presharedkey":
		var k wgtypes.Key
		if k, err = parseKey(value, true); k != (wgtypes.Key{}) {
			p.peer.preshared = &k
		}
	case "peer allowedips":
		p.peer.Allowed, err = p.prefixes(p.peer.Allowed, value, true)
	case "peer endpoint":
		p.peer.Endpoint, err = value, checkEndpoint(value)
	case "peer persistentkeepalive":
		var seconds int
		if !strings.EqualFold(value, "off") {
			seconds, err = parseNumber(value, 0, 65535)
		}
		p.peer.Keepalive = time.Duration(seconds) * time.Second
	default:
		_, name, _ := strings.Cut(key, " ")
		err = fmt.Errorf("unknown setting %.40q", name)
	}
	if err != nil {
		p.fail("%v", err)
	}
}

// parseKey tells nothing of what it was given. Where it may be none, a key of zeros is none, as for
// wg.
func parseKey(text string, none bool) (wgtypes.Key, error) {
	k, err := wgtypes.ParseKey(text)
	if err != nil || !none && k == (wgtypes.Key{}) {
		return k, errors.New("want a key: 32 bytes in base64")
	}
	return k, nil
}

func parseNumber(text string, least, most int) (int, error) {
	n, err := strconv.Atoi(text)
	if err != nil || n < least || n > most {
		return 0, fmt.Errorf("%.40q: want a number from %d to %d", text, least, most)
	}
	return n, nil
}

func (p *parser) prefixes(list []netip.Prefix, text string, masked bool) ([]netip.Prefix, error) {
	for part := range strings.SplitSeq(text, ",") {
		part = strings.TrimSpace(part)
		prefix, err := netip.ParsePrefix(part)
		if err != nil {
			var a netip.Addr
			if a, err = netip.ParseAddr(part); err == nil && a.Zone() == "" {
				prefix = netip.PrefixFrom(a, a.BitLen())
			}
		}
		if err != nil || !prefix.IsValid() || prefix.Addr().Is4In6() {
			return list, fmt.Errorf("%.60q: want addresses with their lengths, such as 10.7.0.2/32", part)
		}
		if masked {
			prefix = prefix.Masked()
		}
		list = append(list, prefix)
	}
	return list, nil
}

func checkEndpoint(text string) error {
	host, port, err := net.SplitHostPort(text)
	if err == nil {
		_, err = parseNumber(port, 1, 65535)
	}
	if err != nil || host == "" || len(host) > 253 {
		return fmt.Errorf("endpoint %.60q: want HOST:PORT", text)
	}
	return nil
}
