package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"push.rocks/smartvm/journal"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/forward"
)

// forwardInterval is how often interfaces are looked for that have come since.
const forwardInterval = 4 * time.Second

// seenFile has, beside the journal, whether the host forwarded at the last look: who hears that
// somebody has switched it on or off looks at once.
const seenFile = "forwarding.seen"

// forwards has the host forward for the networks of a directory that are up.
func forwards(ctx context.Context, dir string) (err error) {
	var tables []*filter.Tables
	ipv6 := false
	known, _ := networksUp(dir) // those that brought up the others forward for them
	for _, u := range known {
		if u.Network.LAN != nil {
			continue
		}
		tables = append(tables, u.Network.tables(u.Owner))
		ipv6 = ipv6 || u.Network.Subnet6.IsValid()
	}
	if len(tables) == 0 {
		return nil
	}
	path := filepath.Join(dir, forwardingFile)
	j, err := journal.Open(path, Kinds(), sharedOf(ctx).Trace)
	if errors.Is(err, fs.ErrNotExist) {
		if forward.On(ipv6) {
			return nil
		}
		j, err = journal.Create(path, Kinds(), sharedOf(ctx).Trace)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, j.Close()) }()
	seen := forward.State()
	narrow, changed, err := forward.Ensure(ctx, j, tables)
	if err != nil {
		return fmt.Errorf("forward: %w", err)
	}
	if changed {
		sharedOf(ctx).log().Info("the host forwards for guests, and as before for nobody else", "interfaces", narrow.String())
	}
	if err := os.WriteFile(filepath.Join(dir, seenFile), []byte(seen), 0o600); err != nil {
		return fmt.Errorf("forward: %w", err)
	}
	now := time.Now()
	return os.Chtimes(path, now, now)
}

// forwardsSeen says whether somebody has looked lately, and the host forwards.
func forwardsSeen(dir string, ipv6 bool) bool {
	seen, err := os.Stat(filepath.Join(dir, forwardingFile))
	if err != nil {
		return forward.On(ipv6)
	}
	state, err := os.ReadFile(filepath.Join(dir, seenFile))
	return err == nil && string(state) == forward.State() && time.Since(seen.ModTime()).Abs() < forwardInterval
}

// unforward undoes what all networks needed, when there is none.
func unforward(ctx context.Context, dir string) error {
	known, others := networksUp(dir)
	if others != nil || slices.ContainsFunc(known, func(u *up) bool { return u.Network.LAN == nil }) {
		return nil
	}
	if err := undo(ctx, filepath.Join(dir, forwardingFile)); err != nil {
		return fmt.Errorf("undo forwarding: %w", err)
	}
	if err := os.Remove(filepath.Join(dir, seenFile)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("undo forwarding: %w", err)
	}
	return nil
}
