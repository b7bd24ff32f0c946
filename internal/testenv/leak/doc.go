// Package leak is an oracle: it compares a host with what it was before and
// lists what was left behind, or taken away.
//
// It knows processes and zombies (but init's), cgroups, network links, named
// network namespaces, routes, nftables tables, mounts, loop devices, bound unix
// sockets, files of every kind below given roots (FIFOs, sockets, device nodes
// and leases are files) and, of its own process, open descriptors and
// goroutines.
//
// A process belongs to whoever asks when it descends from the process that
// asks; or its program, arguments, environment, working or root directory lie
// below one of the roots; or it is in a cgroup of ours; or it is a Firecracker,
// jailer or smartvm that was orphaned to one of the asking process's
// ancestors. Cgroups of ours have names that begin with one of two prefixes.
// Anyone else who makes such things meanwhile is blamed on the one who asks.
package leak

import (
	"cmp"
	"context"
	"fmt"
	"path/filepath"
	"slices"
	"time"
)

// Scope says where to look.
type Scope struct {
	// Roots are directories, absolute, which need not exist.
	Roots []string
	// Self includes this process's open descriptors and goroutines.
	Self bool
}

// Snapshot is what was there at one time.
type Snapshot struct {
	scope Scope
	items map[item]int
}

// item is one thing; those of equal key are counted.
type item struct {
	kind kind
	key  string
}

type kind int

const (
	process kind = iota
	cgroup
	link
	netns
	route
	table
	mount
	loop
	socket
	file
	descriptor
	goroutine
)

func (k kind) String() string {
	return [...]string{
		process: "process", cgroup: "cgroup", link: "network link", netns: "network namespace", route: "route",
		table: "nftables table",
		mount: "mount", loop: "loop device", socket: "unix socket", file: "file", descriptor: "file descriptor",
		goroutine: "goroutine",
	}[k]
}

// missed says whether things of a kind may not vanish either: ours to make and
// unmake are all others. Loop devices are no business of ours, and others come and go.
func (k kind) missed() bool {
	return k == link || k == netns || k == route || k == table || k == mount || k == file
}

// Take looks at the host. What comes or goes while it does may or may not be
// seen. It errs where the host keeps us from looking.
func Take(scope Scope) (*Snapshot, error) {
	s := &Snapshot{scope: Scope{Self: scope.Self}, items: map[item]int{}}
	for _, root := range scope.Roots {
		if !filepath.IsAbs(root) {
			return nil, fmt.Errorf("look for leaks: root %q is not absolute", root)
		}
		s.scope.Roots = append(s.scope.Roots, filepath.Clean(root))
	}
	looks := []func() error{
		s.addProcesses, s.addMounts, s.addLinks, s.addNamespaces, s.addRoutes, s.addTables, s.addLoops,
		s.addSockets, s.addFiles,
	}
	if scope.Self {
		looks = append(looks, s.addDescriptors, s.addGoroutines)
	}
	for _, look := range looks {
		if err := look(); err != nil {
			return nil, fmt.Errorf("look for leaks: %w", err)
		}
	}
	return s, nil
}

func (s *Snapshot) add(k kind, key string) { s.items[item{k, key}]++ }

// Diff lists in words what after has that s has not, and what it lacks of what
// must stay. It is empty when nothing was left behind.
func (s *Snapshot) Diff(after *Snapshot) []string {
	type change struct {
		item
		verb string
	}
	var changes []change
	for i, n := range after.items {
		for range n - s.items[i] {
			changes = append(changes, change{i, "left behind"})
		}
	}
	for i, n := range s.items {
		if i.kind.missed() {
			for range n - after.items[i] {
				changes = append(changes, change{i, "gone"})
			}
		}
	}
	slices.SortFunc(changes, func(a, b change) int {
		return cmp.Or(cmp.Compare(a.kind, b.kind), cmp.Compare(a.key, b.key), cmp.Compare(a.verb, b.verb))
	})
	words := make([]string, len(changes))
	for i, c := range changes {
		words[i] = fmt.Sprintf("%s: %v %s", c.verb, c.kind, c.key)
	}
	return words
}

// settleEvery is how often Settle looks.
const settleEvery = 25 * time.Millisecond

// Settle looks at the host until it is as it was at the time of s, and returns
// nil then. When ctx ends first, it returns what differs. Things take their
// time to go: the kernel frees links and cgroups, goroutines end.
func (s *Snapshot) Settle(ctx context.Context) ([]string, error) {
	tick := time.NewTicker(settleEvery)
	defer tick.Stop()
	for {
		now, err := Take(s.scope)
		if err != nil {
			return nil, err
		}
		diff := s.Diff(now)
		if len(diff) == 0 {
			return nil, nil
		}
		select {
		case <-ctx.Done():
			return diff, nil
		case <-tick.C:
		}
	}
}
