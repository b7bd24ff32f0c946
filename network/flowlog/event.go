package flowlog

import (
	"cmp"
	"encoding/json"
	"fmt"
	"net/netip"
	"strconv"
	"strings"
	"time"
)

// Event is something that a guest tried.
type Event struct {
	Time    time.Time `json:"time"`
	VM      string    `json:"vm,omitempty"`     // its id
	Name    string    `json:"vmName,omitempty"` // its name
	Network string    `json:"network,omitempty"`
	Reason
	// Protocol is tcp, udp, icmp, icmpv6, another's number, or dns, if it asked for a name.
	Protocol    string     `json:"protocol,omitempty"`
	Destination netip.Addr `json:"destination,omitzero"`
	Port        uint16     `json:"port,omitempty"` // of TCP and UDP
	// Host is the name that the guest asked for, or the last that it was told Destination has. It is
	// the guest's, or a stranger's: any bytes.
	Host string `json:"host,omitempty"`
	Type string `json:"type,omitempty"` // of records that it asked for
	// Lost: of how many at least nothing is known; else of how many, since Since, this is the last
	Count uint64 `json:"count,omitempty"`
	// Since is when the event was of which this is a repetition, and was logged last.
	Since time.Time `json:"since,omitzero"`
}

// Unlogged says that what guests of a network begin is not logged, as the kernel cannot.
func Unlogged(network string) Event {
	return Event{
		Time: time.Now().UTC(), Network: network,
		Reason: Reason{Verdict: None, Rule: "the kernel has no nft_log or nfnetlink_log: only names are logged"},
	}
}

// maxEvent bounds one as a line of JSON, in bytes.
const maxEvent = 4 << 10

// parse reads a line.
func parse(line []byte) (e Event, ok bool) {
	if len(line) > maxEvent || json.Unmarshal(line, &e) != nil {
		return Event{}, false
	}
	return e, true
}

// String is an event as a line for people, safe for terminals.
func (e Event) String() string {
	text := fmt.Sprintf("%s %-12s %-7s", e.Time.Format("2006-01-02T15:04:05.000Z07:00"),
		printable(cmp.Or(e.Name, e.VM, "-")), printable(string(e.Verdict)))
	if e.Verdict == Lost {
		return fmt.Sprintf("%s at least %d more, too fast for the log", text, e.Count)
	}
	if e.Verdict == None {
		return fmt.Sprintf("%s %s", text, printable(e.Rule))
	}
	to := printable(e.Host)
	switch {
	case e.Protocol == dns:
		to += " " + printable(e.Type)
	case e.Destination.IsValid():
		to = e.Destination.String()
		if e.Port != 0 {
			to = netip.AddrPortFrom(e.Destination, e.Port).String()
		}
		if e.Host != "" {
			to += " (" + printable(e.Host) + ")"
		}
	}
	why := map[string]string{OfNetwork: " of network " + printable(e.Network), OfVM: " of the VM"}[e.Policy]
	again := ""
	if e.Count > 0 {
		again = fmt.Sprintf(" (%d more in %s)", e.Count, e.Time.Sub(e.Since).Round(100*time.Millisecond))
	}
	return fmt.Sprintf("%s %s %s: %s%s%s", text, printable(e.Protocol), to, printable(e.Rule), why, again)
}

// printable escapes what a terminal would not show as it is.
func printable(s string) string {
	quoted := strconv.QuoteToASCII(s)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}
