package images

import (
	"container/heap"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/network/catalog"
	"push.rocks/smartvm/network/flowlog"
)

func (s *Shell) networkLog() *cobra.Command {
	var v flowView
	var sinceText string
	cmd := &cobra.Command{
		Use:   "log [flags] [NETWORK|VM]",
		Short: "Show what VMs tried to reach",
		Long: "Show what VMs tried to reach, and what became of it: what was allowed, denied, or\n" +
			"over a bound, by which rule, to which address and name; and the names that a policy\n" +
			"refused. All VMs, those of a network, or one; what is the name of a network and of\n" +
			"a VM is the network. The newest one or two MiB are kept of each VM, as long as it is\n" +
			"there. What comes faster than the log takes is counted.\n\n" +
			"With -o json each is an object in a line of its own.",
		Example: "  smartvm network log --since 10m web\n" +
			"  smartvm -o json network log -f lan",
		Args: s.Takes(0, 1, "a network or a VM"),
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if v.since, err = human.Since(sinceText, time.Now()); err != nil {
				return s.Usage(err, "")
			}
			return s.networks(func(h *smartvm.Host, all *catalog.Store) error {
				v.host = h
				if len(args) > 0 {
					if _, err := all.Get(args[0]); err == nil {
						v.network = args[0]
					} else if v.vm, err = h.Machine(cmd.Context(), args[0]); err != nil {
						return err
					}
				}
				return v.show(cmd.Context(), s.printEvent)
			})
		},
	}
	cmd.Flags().BoolVarP(&v.follow, "follow", "f", false, "go on until the VM ends, or Ctrl-C")
	cmd.Flags().StringVar(&sinceText, "since", "", "begin with what was tried since a `time`, or so long ago")
	return cmd
}

func (s *Shell) printEvent(e flowlog.Event) (err error) {
	if s.JSON() {
		err = json.NewEncoder(s.Stdout).Encode(e)
	} else {
		_, err = fmt.Fprintln(s.Stdout, e)
	}
	if err != nil {
		return fmt.Errorf("show log: %w", err)
	}
	return nil
}

// flowView is of the logs of some VMs.
type flowView struct {
	host    *smartvm.Host
	network string           // that is meant; "": all
	vm      *smartvm.Machine // that alone is meant, if not nil
	since   time.Time
	follow  bool
	logs    map[string]*flowSource // by id
}

// flowSource is one VM's log, and the event that is next.
type flowSource struct {
	*flowlog.Reader
	vm      *smartvm.Machine
	network string
	next    flowlog.Event
}

const (
	followPoll = 100 * time.Millisecond
	lookEvery  = time.Second // how often VMs are looked for that are new
)

// show prints what there is in the order of its time, and if asked for what comes, until the VM
// ends.
func (v *flowView) show(ctx context.Context, each func(flowlog.Event) error) error {
	v.logs = map[string]*flowSource{}
	defer func() {
		for _, l := range v.logs {
			_ = l.Close()
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	ended := make(chan error, 1)
	if v.vm != nil && v.follow {
		go func() {
			_, err := v.vm.Wait(ctx)
			// it is removed, so it has ended; or it never ran
			if errors.Is(err, smartvm.ErrNotFound) || errors.Is(err, smartvm.ErrState) {
				err = nil
			}
			ended <- err
		}()
	}
	poll := time.NewTicker(followPoll)
	defer poll.Stop()
	var looked time.Time
	for {
		if time.Since(looked) >= lookEvery {
			// What VMs tried last that are gone by now is shown before.
			if err := errors.Join(v.print(each), v.look(ctx)); err != nil {
				return err
			}
			looked = time.Now()
		}
		if err := v.print(each); err != nil || !v.follow {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case err := <-ended:
			return errors.Join(v.print(each), err)
		case <-poll.C:
		}
	}
}

// look opens the logs of VMs that are new, and closes those of VMs that are gone.
func (v *flowView) look(ctx context.Context) error {
	all := []*smartvm.Machine{v.vm}
	if v.vm == nil {
		var err error
		if all, err = v.host.Machines(ctx); err != nil && len(all) == 0 {
			return err
		}
	}
	there := map[string]bool{}
	for _, m := range all {
		there[m.ID()] = true
		if v.logs[m.ID()] != nil {
			continue
		}
		r, err := flowlog.Open(filepath.Join(m.RuntimeDir(), store.NetworkLog), v.since)
		if err != nil {
			return err
		}
		v.logs[m.ID()] = &flowSource{Reader: r, vm: m, network: v.network}
	}
	for id, l := range v.logs {
		if !there[id] {
			_ = l.Close()
			delete(v.logs, id)
		}
	}
	return nil
}

// print prints what has come.
func (v *flowView) print(each func(flowlog.Event) error) error {
	var all flowQueue
	for _, l := range v.logs {
		more, err := l.advance()
		if err != nil {
			return err
		}
		if more {
			all = append(all, l)
		}
	}
	heap.Init(&all)
	for len(all) > 0 {
		if err := each(all[0].next); err != nil {
			return err
		}
		more, err := all[0].advance()
		switch {
		case err != nil:
			return err
		case more:
			heap.Fix(&all, 0)
		default:
			heap.Pop(&all)
		}
	}
	return nil
}

// advance says whether there is another event.
func (l *flowSource) advance() (bool, error) {
	for {
		e, err := l.Next()
		if errors.Is(err, io.EOF) {
			return false, nil
		}
		if err != nil {
			return false, fmt.Errorf("show log: %w", err)
		}
		if l.network == "" || e.Network == l.network {
			e.VM, e.Name = l.vm.ID(), l.vm.Name()
			l.next = e
			return true, nil
		}
	}
}

// flowQueue has the log with the oldest event first.
type flowQueue []*flowSource

func (q flowQueue) Len() int           { return len(q) }
func (q flowQueue) Less(i, j int) bool { return q[i].next.Time.Before(q[j].next.Time) }
func (q flowQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *flowQueue) Push(x any)        { *q = append(*q, x.(*flowSource)) }
func (q *flowQueue) Pop() any {
	last := (*q)[len(*q)-1]
	*q = (*q)[:len(*q)-1]
	return last
}
