// Package eventview shows events: filters, lines and JSON.
package eventview

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"push.rocks/smartvm"
	"push.rocks/smartvm/internal/human"
	"push.rocks/smartvm/status"
)

// View shows events.
type View struct {
	Stdout, Stderr io.Writer
	JSON           bool // an object a line

	from    int64
	until   time.Time
	filters map[string][]string
}

// Parse returns a view of what happened since a time, a duration ago or an id (empty: from now on),
// until a time or a duration ago (empty: without end), that has one of the values of each key of
// the filters, which are KEY=VALUE.
func Parse(since, until string, filters []string) (*View, error) {
	v := &View{from: smartvm.EventsNow, filters: map[string][]string{}}
	if since != "" {
		id, err := strconv.ParseInt(since, 10, 64)
		if err != nil || id < 1<<33 { // as an id it is a time of long ago
			var from time.Time
			if from, err = human.Since(since, time.Now()); err != nil {
				return nil, err
			}
			id = max(0, from.UnixMicro())
		}
		v.from = id
	}
	if until != "" {
		var err error
		if v.until, err = human.Since(until, time.Now()); err != nil {
			return nil, fmt.Errorf("--until %q: want a time like 2006-01-02T15:04:05Z, or how long ago, like 10m", until)
		}
	}
	for _, f := range filters {
		key, value, ok := strings.Cut(f, "=")
		if !ok || key == "" {
			return nil, fmt.Errorf("--filter %q: want KEY=VALUE", f)
		}
		v.filters[key] = append(v.filters[key], value)
	}
	return v, nil
}

// Show shows events until the end that was asked for, or the end of ctx, whose error it returns
// then.
func (v *View) Show(ctx context.Context, h *smartvm.Host) error {
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

func (v *View) wants(e smartvm.Event) bool {
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

func (v *View) print(e smartvm.Event) error {
	if v.JSON {
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
