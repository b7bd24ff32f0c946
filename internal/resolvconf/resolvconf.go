// Package resolvconf reads which DNS servers a host asks (resolv.conf(5)).
package resolvconf

import (
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// Path is the host's own file. Stub is one that systemd-resolved keeps beside it, of the servers
// that it asks itself.
const (
	Path = "/etc/resolv.conf"
	Stub = "/run/systemd/resolve/resolv.conf"
)

// maxServers is how many resolvers read.
const maxServers = 3

// Servers are those of a file, none where it does not read.
func Servers(path string) (all []netip.Addr) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 2 || f[0] != "nameserver" || len(all) == maxServers {
			continue
		}
		if a, err := netip.ParseAddr(f[1]); err == nil && !slices.Contains(all, a) {
			all = append(all, a)
		}
	}
	return all
}

// File is such a file, read again when it has changed. It is safe for concurrent use.
type File struct {
	Path string

	mu      sync.Mutex
	changed time.Time
	size    int64
	servers []netip.Addr
}

// Servers are those that it has now.
func (f *File) Servers() []netip.Addr {
	f.mu.Lock()
	defer f.mu.Unlock()
	info, err := os.Stat(f.Path)
	if err != nil {
		return nil
	}
	if f.servers == nil || !info.ModTime().Equal(f.changed) || info.Size() != f.size {
		f.servers, f.changed, f.size = Servers(f.Path), info.ModTime(), info.Size()
	}
	return f.servers
}
