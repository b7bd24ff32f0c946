package network

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/policy"
)

// Check makes the network whole again where somebody has flushed its rules or removed its bridge,
// and returns how often that was done: when it is more than before, guests add their part again;
// and with which policy it is up.
func (u *Use) Check(ctx context.Context) (restored int, now *policy.Policy, err error) {
	ctx = u.ahead(ctx)
	unlock, err := Lock(u.Dir)
	if err != nil {
		return 0, nil, err
	}
	defer unlock()
	was, err := u.state()
	if was == nil || err != nil {
		return 0, nil, err
	}
	before := was.Restored
	if err = u.repair(ctx, was, true); err != nil {
		return was.Restored, was.Network.Policy, err
	}
	if was.Restored > before || !forwardsSeen(u.Dir, was.Network.Subnet6.IsValid()) {
		err = forwards(ctx, u.Dir)
	}
	return was.Restored, was.Network.Policy, err
}

// Update gives a network the settings of made, if it is up: its guests go on, and connections end
// that are not allowed any more. Who supervises guests is told by Check.
func Update(ctx context.Context, dir string, made Config) error {
	if _, err := os.Lstat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	unlock, err := Lock(dir)
	if err != nil {
		return err
	}
	defer unlock()
	u := Use{Dir: dir, Network: Config{Name: made.Name}}
	now, err := u.state()
	if now == nil || err != nil {
		return err
	}
	// What is written first is what whoever looks next brings about.
	now.Network.Refresh(made)
	if err := atomicfile.WriteJSON(u.path(upFile), now); err != nil {
		return fmt.Errorf("change network %s: %w", made.Name, err)
	}
	return u.repair(ctx, now, false)
}

// repair counts first: if it does not come to its end, the guests look all the same. What a bridge
// is besides is for who looks now and then, and no start waits for it.
func (u *Use) repair(ctx context.Context, n *up, bridges bool) error {
	counted := false
	count := func() error {
		if counted {
			return nil
		}
		counted = true
		n.Restored++
		return atomicfile.WriteJSON(u.path(upFile), n)
	}
	for _, e := range n.effects() { // one may be whole again only after those before it
		there, err := e.(interface {
			There(context.Context) (bool, error)
		}).There(ctx)
		if err != nil {
			return err
		}
		if b, ok := e.(*Bridge); ok && there && bridges {
			forgotten, err := b.Repair()
			if err == nil && forgotten {
				err = count()
			}
			if err != nil {
				return fmt.Errorf("restore network %s: %w", n.Network.Name, err)
			}
		}
		t, isTables := e.(*filter.Tables)
		if !there && isTables {
			there, err = t.Renew(ctx)
		}
		if there {
			continue
		}
		if err = errors.Join(err, count()); err == nil {
			if isTables {
				err = t.Replace(ctx)
			} else {
				err = errors.Join(e.Revert(ctx), e.Apply(ctx))
			}
		}
		if err != nil {
			return fmt.Errorf("restore network %s: %w", n.Network.Name, err)
		}
	}
	if counted {
		sharedOf(ctx).log().Warn("restored what somebody had removed", "network", n.Network.Name)
	}
	return nil
}
