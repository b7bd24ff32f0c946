package guest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/status"
)

func (s *Shell) events() *cobra.Command {
	var since, until string
	var filters []string
	cmd := &cobra.Command{
		Use:   "events [flags]",
		Short: "Show what happens to VMs, snapshots, images and networks",
		Long: "Show what happens to VMs, whichever process does it, and to snapshots, images and\n" +
			"networks, until Ctrl-C: created, restored, forked, started, failed, ready,\n" +
			"degraded, paused, resumed, updated, adopted, exited, removed; snapshot, image,\n" +
			"network. The newest one or two MiB are kept.\n\n" +
			"A filter is type=TYPE, vm=VM (id, its beginning, or name), image=NAME, network=NAME\n" +
			"or an attribute, like outcome=killed. If a key is given several times, one of its\n" +
			"values must match; all keys must match.\n\n" +
			"With -o json each is an object in a line of its own, with an id that only grows;\n" +
			"--since takes the last id that was seen.",
		Example: "  smartvm events --filter type=exited --filter type=failed\n" +
			"  smartvm -o json events --since 10m --until 0s",
		Args: s.Takes(0, 0, ""),
		RunE: func(cmd *cobra.Command, _ []string) error {
			v := eventView{Shell: s, from: smartvm.EventsNow}
			if err := v.parse(since, until, filters); err != nil {
				return s.Usage(err, "")
			}
			h, err := s.Open(cmd.Context())
			if err != nil {
				return err
			}
			return errors.Join(v.show(cmd.Context(), h), h.Close())
		},
	}
	f := cmd.Flags()
	f.StringVar(&since, "since", "", "begin with what happened since a `time`, or so long ago, or after an id")
	f.StringVar(&until, "until", "", "end at a `time`, or so long ago")
	f.StringArrayVar(&filters, "filter", nil, "show only what has this `KEY=VALUE`; may be repeated")
	return cmd
}

// eventView shows events.
type eventView struct {
	*Shell
	from    int64
	until   time.Time
	filters map[string][]string
}

func (v *eventView) parse(since, until string, filters []string) error {
	if since != "" {
		id, err := strconv.ParseInt(since, 10, 64)
		if err != nil || id < 1<<33 { // as an id it is a time of long ago
			var from time.Time
			if from, err = human.Since(since, time.Now()); err != nil {
				return err
			}
			id = max(0, from.UnixMicro())
		}
		v.from = id
	}
	if until != "" {
		var err error
		if v.until, err = human.Since(until, time.Now()); err != nil {
			return fmt.Errorf("--until %q: want a time like 2006-01-02T15:04:05Z, or how long ago, like 10m", until)
		}
	}
	v.filters = map[string][]string{}
	for _, f := range filters {
		key, value, ok := strings.Cut(f, "=")
		if !ok || key == "" {
			return fmt.Errorf("--filter %q: want KEY=VALUE", f)
		}
		v.filters[key] = append(v.filters[key], value)
	}
	return nil
}

func (v *eventView) show(ctx context.Context, h *smartvm.Host) error {
	asked := ctx
	if !v.until.IsZero() {
		var cancel context.CancelFunc
		ctx, cancel = context.WithDeadline(ctx, v.until)
		defer cancel()
	}
	for e, err := range h.Events(ctx, v.from) {
		var lost *status.LostError
		switch {
		case errors.As(err, &lost):
			fmt.Fprintln(v.Stderr, "smartvm:", lost)
			continue
		case err != nil && asked.Err() == nil && ctx.Err() != nil:
			return nil
		case err != nil:
			return err
		case !v.until.IsZero() && e.Time.After(v.until) || !v.wants(e):
			continue
		}
		if err := v.print(e); err != nil {
			return fmt.Errorf("show events: %w", err)
		}
	}
	return nil
}

func (v *eventView) wants(e smartvm.Event) bool {
	for key, values := range v.filters {
		if !slices.ContainsFunc(values, func(value string) bool {
			switch {
			case key == "type":
				return string(e.Type) == value
			case key == "vm":
				return e.VM != "" && value != "" && (e.Name == value || strings.HasPrefix(e.VM, value))
			case key == string(e.Type) && e.Name != "": // an image or a network
				return e.Name == value
			}
			return e.Attributes[key] == value
		}) {
			return false
		}
	}
	return true
}

func (v *eventView) print(e smartvm.Event) error {
	if v.JSON() {
		return json.NewEncoder(v.Stdout).Encode(e)
	}
	words := []string{e.Time.Format("2006-01-02T15:04:05.000000Z"), string(e.Type)}
	for _, word := range []string{e.VM, e.Name} {
		if word != "" {
			words = append(words, word)
		}
	}
	var attributes []string
	for _, name := range slices.Sorted(maps.Keys(e.Attributes)) {
		attributes = append(attributes, name+"="+strconv.Quote(e.Attributes[name]))
	}
	if attributes != nil {
		words = append(words, "("+strings.Join(attributes, ", ")+")")
	}
	_, err := fmt.Fprintln(v.Stdout, strings.Join(words, " "))
	return err
}
