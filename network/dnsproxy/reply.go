package dnsproxy

import (
	"net/netip"
	"slices"
	"strings"
	"time"

	"golang.org/x/net/dns/dnsmessage"

	"push.rocks/smartvm/network/policy"
)

// reason is a policy with rules about a name.
type reason struct {
	Names
	domains []int
}

// known are the types whose records are understood.
func known(t dnsmessage.Type) bool {
	switch t {
	case dnsmessage.TypeA, dnsmessage.TypeAAAA, dnsmessage.TypeCNAME, dnsmessage.TypeMX, dnsmessage.TypeNS,
		dnsmessage.TypePTR,
		dnsmessage.TypeSOA, dnsmessage.TypeSRV, dnsmessage.TypeTXT:
		return true
	}
	return false
}

// choose returns the records that answer the question: what its name has, and what the names have
// that it stands for. Of those the addresses, and for how long they hold. What a policy lets nobody
// choose that allows the name is left out.
func choose(q dnsmessage.Question, all []dnsmessage.Resource, because []reason) (records []dnsmessage.Resource,
	addresses []netip.Addr, ttl time.Duration,
) {
	ttl = maxTTL
	name := q.Name.String()
	for range maxChain {
		next := ""
		for _, r := range all {
			if !strings.EqualFold(r.Header.Name.String(), name) || r.Header.Type != q.Type &&
				r.Header.Type != dnsmessage.TypeCNAME {
				continue
			}
			switch body := r.Body.(type) {
			case *dnsmessage.AResource:
				a := netip.AddrFrom4(body.A)
				if unreachable(a, because) {
					continue
				}
				addresses = append(addresses, a)
			case *dnsmessage.AAAAResource:
				a := netip.AddrFrom16(body.AAAA)
				if a.Is4In6() || unreachable(a, because) {
					continue
				}
				addresses = append(addresses, a)
			case *dnsmessage.CNAMEResource:
				next = body.CNAME.String()
			}
			of := min(max(time.Duration(r.Header.TTL)*time.Second, minTTL), maxTTL)
			ttl = min(ttl, of)
			r.Header.TTL = uint32(min(of, guestTTL) / time.Second)
			records = append(records, r)
		}
		if next == "" || q.Type == dnsmessage.TypeCNAME || strings.EqualFold(next, name) {
			break
		}
		name = next
	}
	return records, addresses, ttl
}

func unreachable(a netip.Addr, because []reason) bool {
	if policy.Public(a) {
		return false
	}
	return slices.ContainsFunc(because, func(r reason) bool { return r.Local == nil || !r.Local(a) })
}

// reply is what is answered.
type reply struct {
	code dnsmessage.RCode
	// authorities say for how long a name is not there (SOA, RFC 2308), and prove it (NSEC, RFC 4035).
	answers, authorities []dnsmessage.Resource
}

// capped is a reply that a guest keeps no longer than it may.
func (r reply) capped() reply {
	for _, section := range [][]dnsmessage.Resource{r.answers, r.authorities} {
		for i := range section {
			section[i].Header.TTL = min(section[i].Header.TTL, uint32(guestTTL/time.Second))
		}
	}
	return r
}

// reply packs an answer. One that is too long says so in place of its records: the guest asks again
// by TCP.
func (q query) reply(r reply) []byte {
	m := dnsmessage.Message{
		Header: dnsmessage.Header{
			ID: q.id, Response: true, RecursionDesired: q.desired, RecursionAvailable: true, CheckingDisabled: q.unchecked,
			RCode: r.code,
		},
		Answers: r.answers, Authorities: r.authorities,
	}
	if q.question.Name.Length > 0 {
		m.Questions = []dnsmessage.Question{q.question}
	}
	if q.edns {
		m.Additionals = []dnsmessage.Resource{edns(q.signed)}
	}
	packed, err := m.Pack()
	if err == nil && len(packed) <= q.size {
		return packed
	}
	m.Answers, m.Authorities, m.Truncated = nil, nil, true
	if packed, err = m.Pack(); err != nil {
		return nil
	}
	return packed
}

// edns is the record by which either side says what it takes.
func edns(signed bool) dnsmessage.Resource {
	h := dnsmessage.ResourceHeader{Name: dnsmessage.MustNewName(".")}
	_ = h.SetEDNS0(maxUDP, dnsmessage.RCodeSuccess, signed) // it errs for no code
	return dnsmessage.Resource{Header: h, Body: &dnsmessage.OPTResource{}}
}
