// Package policy says what guests may reach: egress rules as people write them, in JSON and on a
// command line, and as tables of a kernel need them. It does nothing to a host.
package policy

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/net/idna"

	"push.rocks/smartvm/internal/strictjson"
)

// Action is what a rule does with what matches it.
type Action string

// The actions.
const (
	Allow Action = "allow"
	Deny  Action = "deny"
)

// Policy is an ordered list of rules: the first that matches decides, else DefaultAction.
type Policy struct {
	DefaultAction Action `json:"defaultAction,omitempty"` // Allow, which it is if empty, or Deny
	Rules         []Rule `json:"rules,omitempty"`
	// Egress is EgressPublic or empty: of what no rule is about, only what can be a host of the
	// internet's is allowed (Public).
	Egress string `json:"egress,omitempty"`
	// AllowHost lets guests reach the host's own addresses, AllowMetadata those behind which clouds
	// keep credentials (Metadata). Rules are not consulted for the host's addresses; they still apply
	// to metadata addresses.
	AllowHost     bool `json:"allowHost,omitempty"`
	AllowMetadata bool `json:"allowMetadata,omitempty"`
}

// EgressPublic keeps a guest from private networks, the host's LAN and others', and from what
// clouds have for their machines alone.
const EgressPublic = "public"

// Rule matches what a guest sends by all that it names.
type Rule struct {
	Action      Action `json:"action"`
	Protocol    string `json:"protocol,omitempty"`    // "tcp", "udp", "icmp" (of either IP version); empty: any
	Destination string `json:"destination,omitempty"` // an address or CIDR of either version; empty: any
	// Domain is a name, or "*." and the name that others end with. Only Allow can have one: a name
	// that is denied has addresses all the same. In place of Destination.
	Domain string `json:"domain,omitempty"`
	Ports  Ports  `json:"ports,omitempty"` // of TCP and UDP; empty: all
}

// Ports are ranges of ports. In JSON they are a number, a text "80,8000-8080", or a list of those.
type Ports []PortRange

// PortRange is the ports from First to Last.
type PortRange struct{ First, Last uint16 }

// Bounds of a policy.
const (
	maxRules   = 256
	maxDomains = 64
	maxRanges  = 64
	maxPolicy  = 1 << 20 // bytes of JSON
)

// FieldError is one thing that is wrong.
type FieldError struct {
	Path   string // in the policy's JSON: rules[0].domain
	Value  any
	Reason string
}

func (e *FieldError) Error() string { return e.Path + ": " + e.Reason }

// Load reads a policy in JSON and validates it. All that is wrong is reported at once, joined.
func Load(r io.Reader) (*Policy, error) {
	data, err := io.ReadAll(io.LimitReader(r, maxPolicy+1))
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	p, err := strictjson.Unmarshal[Policy](data, maxPolicy)
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", err)
	}
	var errs []error
	for _, e := range p.Validate() {
		errs = append(errs, e)
	}
	return &p, errors.Join(errs...)
}

// LoadFile is Load of a file.
func LoadFile(path string) (*Policy, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("read policy: %w", errors.Unwrap(err))
	}
	p, err := Load(f)
	return p, errors.Join(err, f.Close())
}

// Validate returns all that is wrong, in order.
func (p *Policy) Validate() []*FieldError {
	_, wrong := p.compile()
	return wrong
}

// Names says whether a policy, which may be nil, allows names, so that their addresses must be
// known.
func (p *Policy) Names() bool {
	return p != nil && slices.ContainsFunc(p.Rules, func(r Rule) bool { return r.Domain != "" })
}

// Compiled is a rule ready for use.
type Compiled struct {
	Allow     bool
	Protocols []uint8        // IP protocol numbers; empty: any
	Prefix    netip.Prefix   // zero: any
	Prefixes  []netip.Prefix // in place of Prefix: one of them
	Ports     []PortRange    // sorted, apart; empty: any. Only with Protocols of TCP and UDP
	Domain    string         // lower-case, without a final dot; "*." before it: what ends with it
	Text      string         // the rule as Rule.String has it
}

// Compile returns the rules in order, for IP addresses and names alike. It errs where Validate
// does.
func (p *Policy) Compile() ([]Compiled, error) {
	all, wrong := p.compile()
	if len(wrong) > 0 {
		return nil, fmt.Errorf("policy: %w", wrong[0])
	}
	return all, nil
}

func (p *Policy) compile() (all []Compiled, wrong []*FieldError) {
	add := func(path string, value any, format string, args ...any) {
		wrong = append(wrong, &FieldError{path, value, fmt.Sprintf(format, args...)})
	}
	if p.DefaultAction != "" && p.DefaultAction != Allow && p.DefaultAction != Deny {
		add("defaultAction", string(p.DefaultAction), "must be allow or deny")
	}
	if len(p.Rules) > maxRules {
		add("rules", len(p.Rules), "must be at most %d", maxRules)
		return nil, wrong
	}
	domains := 0
	for i, r := range p.Rules {
		at := fmt.Sprintf("rules[%d].", i)
		c := Compiled{Allow: r.Action == Allow, Text: r.String()}
		if r.Action != Allow && r.Action != Deny {
			add(at+"action", string(r.Action), "must be allow or deny")
		}
		protocols, known := map[string][]uint8{"": nil, "tcp": {6}, "udp": {17}, "icmp": {1, 58}}[r.Protocol]
		if c.Protocols = protocols; !known {
			add(at+"protocol", r.Protocol, "must be tcp, udp or icmp")
		}
		if r.Destination != "" {
			var err error
			if c.Prefix, err = parseDestination(r.Destination); err != nil {
				add(at+"destination", r.Destination, "%v", err)
			}
		}
		if r.Domain != "" {
			domains++
			c.Domain = ascii(r.Domain)
			switch reason := wrongDomain(c.Domain); {
			case reason != "":
				add(at+"domain", r.Domain, "%s", reason)
			case r.Destination != "":
				add(at+"domain", r.Domain, "must not be there beside destination")
			case r.Action != Allow:
				add(at+"domain", r.Domain,
					"only allow can have a name: what is denied has addresses all the same; deny by default, and allow the others")
			}
		}
		switch {
		case len(r.Ports) > maxRanges:
			add(at+"ports", len(r.Ports), "must be at most %d ranges", maxRanges)
		case len(r.Ports) > 0 && r.Protocol == "icmp":
			add(at+"ports", r.Ports.String(), "must not be there beside icmp, which has none")
		case len(r.Ports) > 0:
			c.Ports = merge(r.Ports)
			if c.Protocols == nil {
				c.Protocols = []uint8{6, 17}
			}
		}
		all = append(all, c)
	}
	switch p.Egress {
	case "":
	case EgressPublic:
		all = append(all, Compiled{Prefixes: slices.Concat(special, Metadata), Text: "egress public"})
	default:
		add("egress", p.Egress, "must be %s, or not be there", EgressPublic)
	}
	if domains > maxDomains {
		add("rules", domains, "must be at most %d with a domain", maxDomains)
	}
	return all, wrong
}

func parseDestination(text string) (netip.Prefix, error) {
	if a, err := netip.ParseAddr(text); err == nil && a.Zone() == "" && !a.Is4In6() {
		return netip.PrefixFrom(a, a.BitLen()), nil
	}
	p, err := netip.ParsePrefix(text)
	switch {
	case err != nil || p.Addr().Is4In6():
		return p, errors.New("must be an IP address or CIDR, such as 10.0.0.0/8 or 2001:db8::/32")
	case p != p.Masked():
		return p, fmt.Errorf("has host bits: %s is meant?", p.Masked())
	}
	return p, nil
}

// ascii is a name as DNS has it, without a final dot: names in other scripts become what IDNA makes
// of them (xn--). What is none stays for wrongDomain.
func ascii(name string) string {
	rest, wild := strings.CutPrefix(strings.TrimSuffix(name, "."), "*.")
	if strings.ContainsFunc(rest, func(r rune) bool { return r > unicode.MaxASCII }) {
		if a, err := idna.Lookup.ToASCII(rest); err == nil {
			rest = a
		}
	}
	if wild {
		rest = "*." + rest
	}
	return strings.ToLower(rest)
}

// wrongDomain says what is wrong with a name.
func wrongDomain(name string) string {
	rest := strings.TrimPrefix(name, "*.")
	if len(name) > 253 || rest == "" {
		return "must be a name of 1 to 253 bytes"
	}
	if _, err := netip.ParseAddr(rest); err == nil {
		return "is an address: that is for destination"
	}
	for label := range strings.SplitSeq(rest, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' ||
			strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return "must be like example.com or *.example.com"
		}
	}
	// As for a URL: what ends with a number is meant for an address.
	if last := rest[strings.LastIndex(rest, ".")+1:]; strings.Trim(last, "0123456789") == "" {
		hint := "an address has four numbers, as 10.0.0.1, a network a length too, as 10.0.0.0/8"
		if last == rest {
			hint = "a port goes behind a destination, as in tcp:*:" + rest
		}
		return "no name ends with a number: " + hint
	}
	return ""
}

// MatchDomain says whether a name is meant by a rule's Domain, as Compiled has it.
func MatchDomain(domain, name string) bool {
	name = strings.ToLower(strings.TrimSuffix(name, "."))
	if suffix, ok := strings.CutPrefix(domain, "*"); ok {
		return len(name) > len(suffix) && strings.HasSuffix(name, suffix)
	}
	return name == domain
}

// merge returns the same ports in order, and apart.
func merge(ports Ports) []PortRange {
	sorted := slices.SortedFunc(slices.Values(ports), func(a, b PortRange) int { return cmp.Compare(a.First, b.First) })
	merged := sorted[:1]
	for _, r := range sorted[1:] {
		last := &merged[len(merged)-1]
		if int(r.First) > int(last.Last)+1 {
			merged = append(merged, r)
			continue
		}
		last.Last = max(last.Last, r.Last)
	}
	return merged
}

func (p Ports) String() string {
	var parts []string
	for _, r := range p {
		part := strconv.Itoa(int(r.First))
		if r.Last != r.First {
			part += "-" + strconv.Itoa(int(r.Last))
		}
		parts = append(parts, part)
	}
	return strings.Join(parts, ",")
}

// ParsePorts takes "80", "1000-2000", and those joined by commas.
func ParsePorts(text string) (ports Ports, err error) {
	for part := range strings.SplitSeq(text, ",") {
		first, last, ranged := strings.Cut(part, "-")
		if !ranged {
			last = first
		}
		from, errFrom := strconv.ParseUint(first, 10, 16)
		to, errTo := strconv.ParseUint(last, 10, 16)
		if errFrom != nil || errTo != nil || from == 0 || from > to || len(ports) > maxRanges {
			return nil, fmt.Errorf("ports %.100q: want like 80, 1000-2000 or 80,443, from 1 to 65535, at most %d",
				text, maxRanges)
		}
		ports = append(ports, PortRange{uint16(from), uint16(to)})
	}
	return ports, nil
}

// MarshalJSON writes a text.
func (p Ports) MarshalJSON() ([]byte, error) { return json.Marshal(p.String()) }

// UnmarshalJSON takes a number, a text, or a list of those.
func (p *Ports) UnmarshalJSON(data []byte) error {
	var list []json.RawMessage
	if json.Unmarshal(data, &list) != nil {
		list = []json.RawMessage{data}
	}
	*p = nil
	for _, item := range list {
		text := string(item)
		if strings.HasPrefix(text, `"`) {
			if err := json.Unmarshal(item, &text); err != nil {
				return err
			}
		}
		ports, err := ParsePorts(text)
		if err != nil {
			return err
		}
		if *p = append(*p, ports...); len(*p) > maxRanges {
			return fmt.Errorf("more than %d ranges of ports", maxRanges)
		}
	}
	return nil
}

// ParseRule takes what --allow and --deny do: [PROTOCOL:]DESTINATION[:PORTS], where a protocol is
// tcp, udp or icmp, and a destination an address, a CIDR, a name or "*"; one of IPv6 is in brackets
// if ports follow, or a protocol goes before it.
func ParseRule(action Action, text string) (Rule, error) {
	r := Rule{Action: action}
	rest := text
	for _, proto := range []string{"tcp", "udp", "icmp"} {
		if after, ok := strings.CutPrefix(rest, proto+":"); ok {
			r.Protocol, rest = proto, after
			break
		}
	}
	where, ports := rest, ""
	if bracketed, ok := strings.CutPrefix(rest, "["); ok {
		inside, after, closed := strings.Cut(bracketed, "]")
		if ports, ok = strings.CutPrefix(after, ":"); !closed || after != "" && !ok {
			return r, ruleError(text)
		}
		where = inside
	} else if _, err := parseDestination(rest); err != nil {
		where, ports, ok = strings.Cut(rest, ":")
		if ok && ports == "" {
			return r, ruleError(text)
		}
	}
	if ports != "" {
		var err error
		if r.Ports, err = ParsePorts(ports); err != nil {
			return r, err
		}
	}
	if _, err := parseDestination(where); err == nil {
		r.Destination = where
	} else if where != "*" {
		r.Domain = where
	}
	if where == "" {
		return r, ruleError(text)
	}
	if wrong := (&Policy{Rules: []Rule{r}}).Validate(); len(wrong) > 0 {
		return r, fmt.Errorf("rule %.200q: %s", text, wrong[0].Reason)
	}
	return r, nil
}

func ruleError(text string) error {
	return fmt.Errorf(
		"rule %.200q: want [PROTOCOL:]DESTINATION[:PORTS], such as tcp:example.com:443, 10.0.0.0/8 or udp:[fd00::/8]:53",
		text)
}

// String is the rule as ParseRule takes it, with its action before it.
func (r Rule) String() string {
	where := cmp.Or(r.Destination, r.Domain, "*")
	if strings.Contains(where, ":") {
		where = "[" + where + "]"
	}
	text := string(r.Action) + " "
	if r.Protocol != "" {
		text += r.Protocol + ":"
	}
	text += where
	if len(r.Ports) > 0 {
		text += ":" + r.Ports.String()
	}
	return text
}
