package dnsproxy_test

import (
	"bytes"
	"slices"
	"testing"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/network/dnsproxy"
)

const (
	typeRRSIG = dnsmessage.Type(46)
	typeNSEC  = dnsmessage.Type(47)
)

// signedZone has an address for www.example.com and nothing else. It says that it has validated all
// of it, and signs it for who asks so.
func signedZone(t *testing.T) func(dnsmessage.Message, bool) []byte {
	return func(m dnsmessage.Message, _ bool) []byte {
		q := m.Questions[0]
		a := dnsmessage.Message{
			Header:    dnsmessage.Header{ID: m.ID, Response: true, AuthenticData: true, CheckingDisabled: m.CheckingDisabled},
			Questions: m.Questions, Additionals: m.Additionals,
		}
		signed := len(m.Additionals) == 1 && m.Additionals[0].Header.DNSSECAllowed()
		add := func(section *[]dnsmessage.Resource, name string, ttl uint32, body dnsmessage.ResourceBody) {
			h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(name), Class: dnsmessage.ClassINET, TTL: ttl}
			*section = append(*section, dnsmessage.Resource{Header: h, Body: body})
			if signed {
				*section = append(*section,
					dnsmessage.Resource{Header: h, Body: &dnsmessage.UnknownResource{Type: typeRRSIG, Data: []byte("of " + name)}})
			}
		}
		name := q.Name.String()
		switch {
		case name == "www.example.com." && q.Type == dnsmessage.TypeA:
			add(&a.Answers, name, 300, &dnsmessage.AResource{A: [4]byte{192, 0, 2, 1}})
		default:
			if name != "www.example.com." {
				a.RCode = dnsmessage.RCodeNameError
			}
			add(&a.Authorities, "example.com.", 3600, &dnsmessage.SOAResource{
				NS: dnsmessage.MustNewName("ns.example.com."), MBox: dnsmessage.MustNewName("x.y.example.com."), MinTTL: 900,
			})
			if signed {
				add(&a.Authorities, "example.com.", 900, &dnsmessage.UnknownResource{Type: typeNSEC, Data: []byte("gap")})
			}
		}
		packed, err := a.Pack()
		if err != nil {
			t.Error(err)
		}
		if name == "odd.example.com." { // x\.y is one label
			packed = bytes.Replace(packed, []byte("\x01x\x01y"), []byte("\x03x.y"), 1)
		}
		return packed
	}
}

// kinds are the types of the records of a section.
func kinds(t *testing.T, section []dnsmessage.Resource) (all []dnsmessage.Type) {
	t.Helper()
	for _, r := range section {
		if r.Header.TTL > 60 {
			t.Errorf("the guest may keep %v for %d seconds", r.Header.Type, r.Header.TTL)
		}
		all = append(all, r.Header.Type)
	}
	return all
}

// A guest that validates gets signatures, and proofs that a name is not there; one that does not
// gets what lets it keep an answer. For names that a rule is about there are none, since records
// may be left out. The proxy never says that it has validated what it hands on.
func TestServe_Signed(t *testing.T) {
	const a, soa = dnsmessage.TypeA, dnsmessage.TypeSOA
	up := server(t, signedZone(t))
	open := serve(t, func(c *dnsproxy.Config) { c.Names = nil }, up)
	ruled := serve(t, func(c *dnsproxy.Config) {
		c.Names()[0].Domains, c.Names()[0].Closed = []string{"www.example.com"}, false
	}, up)
	for _, tt := range []struct {
		name                 string
		guest                *guest
		ask                  string
		kind                 dnsmessage.Type
		edns, signed         bool
		code                 dnsmessage.RCode
		answers, authorities []dnsmessage.Type
	}{
		{"Plain", open, "www.example.com.", a, false, false, yes, []dnsmessage.Type{a}, nil},
		{"EDNS", open, "www.example.com.", a, true, false, yes, []dnsmessage.Type{a}, nil},
		{"Signed", open, "www.example.com.", a, true, true, yes, []dnsmessage.Type{a, typeRRSIG}, nil},
		{"NoName", open, "no.example.com.", a, false, false, no, nil, []dnsmessage.Type{soa}},
		{
			"NoNameSigned", open, "no.example.com.", a, true, true, no, nil,
			[]dnsmessage.Type{soa, typeRRSIG, typeNSEC, typeRRSIG},
		},
		{
			"NoData", open, "www.example.com.", dnsmessage.TypeAAAA, true, true, yes, nil,
			[]dnsmessage.Type{soa, typeRRSIG, typeNSEC, typeRRSIG},
		},
		{"OddName", open, "odd.example.com.", a, false, false, no, nil, nil},
		{"Ruled", ruled, "www.example.com.", a, true, true, yes, []dnsmessage.Type{a}, nil},
		{
			"BesideRule", ruled, "no.example.com.", a, true, true, no, nil,
			[]dnsmessage.Type{soa, typeRRSIG, typeNSEC, typeRRSIG},
		},
	} {
		t.Run(tt.name, func(t *testing.T) {
			q := question(tt.ask, tt.kind)
			q.CheckingDisabled = tt.signed
			if tt.edns {
				q.Additionals = edns(t, tt.signed)
			}
			m := tt.guest.exchange("udp", q)
			if m.RCode != tt.code || m.AuthenticData || m.CheckingDisabled != q.CheckingDisabled {
				t.Errorf("got %+v, want %v", m.Header, tt.code)
			}
			if got := kinds(t, m.Answers); !slices.Equal(got, tt.answers) {
				t.Errorf("answers %v, want %v", got, tt.answers)
			}
			if got := kinds(t, m.Authorities); !slices.Equal(got, tt.authorities) {
				t.Errorf("authorities %v, want %v", got, tt.authorities)
			}
			if tt.edns && (len(m.Additionals) != 1 || m.Additionals[0].Header.DNSSECAllowed() != tt.signed) || !tt.edns &&
				len(m.Additionals) != 0 {
				t.Errorf("additional records %+v", m.Additionals)
			}
		})
	}
}

// A server that knows nothing of EDNS is asked without.
func TestServe_NoEDNS(t *testing.T) {
	zone := signedZone(t)
	old := server(t, func(m dnsmessage.Message, stream bool) []byte {
		if len(m.Additionals) == 0 {
			return zone(m, stream)
		}
		header := dnsmessage.Header{ID: m.ID, Response: true, RCode: dnsmessage.RCodeFormatError}
		packed, err := (&dnsmessage.Message{Header: header}).Pack()
		if err != nil {
			t.Error(err)
		}
		return packed
	})
	g := serve(t, func(c *dnsproxy.Config) { c.Names = nil }, old)
	q := question("www.example.com.", dnsmessage.TypeA)
	q.Additionals = edns(t, true)
	if m := g.exchange("udp", q); m.RCode != yes || len(m.Answers) != 1 {
		t.Errorf("got %+v, want an address", m)
	}
}
