// Package imageview shows images to people: chosen by filters, as tables or by a template, and how
// they were made.
package imageview

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"text/template"
	"time"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/internal/human"
)

// shortID is how many digits of an id are shown.
const shortID = 12

// Filter makes one of several that must all be met: label=NAME, label=NAME=VALUE, label!=NAME,
// label!=NAME=VALUE, reference=PATTERN, before=IMAGE, since=IMAGE or until=TIME. Find finds the
// images that are named.
func Filter(filters []string, find func(ref string) (*image.Image, error)) (meets func(*image.Image) bool, err error) {
	var all []func(*image.Image) bool
	var errs []error
	for _, f := range filters {
		meets, err := parse(f, find)
		all, errs = append(all, meets), append(errs, err)
	}
	return func(i *image.Image) bool {
		return !slices.ContainsFunc(all, func(meets func(*image.Image) bool) bool { return !meets(i) })
	}, errors.Join(errs...)
}

// ErrFilter says that a filter makes no sense.
var ErrFilter = errors.New(
	"want label=NAME, label=NAME=VALUE, label!=NAME, label!=NAME=VALUE, reference=PATTERN, before=IMAGE, since=IMAGE or until=TIME, as in 24h or 2026-01-31")

func parse(filter string, find func(ref string) (*image.Image, error)) (meets func(*image.Image) bool, err error) {
	kind, value, ok := strings.Cut(filter, "=")
	if !ok || value == "" {
		return nil, fmt.Errorf("filter %q: %w", filter, ErrFilter)
	}
	switch kind {
	case "label", "label!":
		name, want, exact := strings.Cut(value, "=")
		return func(i *image.Image) bool {
			got, ok := i.Config.Labels[name]
			return (ok && (!exact || got == want)) == (kind == "label")
		}, nil
	case "reference":
		if _, err := path.Match(value, ""); err != nil {
			return nil, fmt.Errorf("filter %q: %w: %w", filter, ErrFilter, err)
		}
		return func(i *image.Image) bool { return matches(value, i.Name) }, nil
	case "before", "since":
		other, err := find(value)
		if err != nil {
			return nil, fmt.Errorf("filter %q: %w", filter, err)
		}
		return func(i *image.Image) bool {
			return kind == "before" && i.Created.Before(other.Created) || kind == "since" && i.Created.After(other.Created)
		}, nil
	case "until":
		if end, ok := moment(value, time.Now()); ok {
			return func(i *image.Image) bool { return i.Created.Before(end) }, nil
		}
	}
	return nil, fmt.Errorf("filter %q: %w", filter, ErrFilter)
}

// moment is a time as docker's filters have it: how long ago, in seconds of Unix, or a date with
// more or less of a time.
func moment(text string, now time.Time) (time.Time, bool) {
	if ago, err := time.ParseDuration(text); err == nil {
		return now.Add(-ago), true
	}
	if seconds, err := strconv.ParseInt(text, 10, 64); err == nil {
		return time.Unix(seconds, 0), true
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", "2006-01-02T15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return t, true
		}
	}
	return time.Time{}, false
}

// matches says whether a name, with or without its tag, is of a pattern.
func matches(pattern, name string) bool {
	repository := name
	if colon := strings.LastIndexByte(name, ':'); colon > strings.LastIndexByte(name, '/') {
		repository = name[:colon]
	}
	whole, _ := path.Match(pattern, name)
	part, _ := path.Match(pattern, repository)
	return whole || part
}

// View is what a template has of an image.
type View struct {
	Name, ID, Digest, Content, Size, Created, Platform, Author string
	Labels                                                     map[string]string
	VMs                                                        int
}

func view(in *image.Inspection, whole bool) View {
	id := in.ID
	if !whole {
		id = id[:min(len(id), shortID)]
	}
	return View{
		Name: in.Name, ID: id, Digest: in.Digest, Content: content(in), Size: human.Size(in.Size),
		Created:  human.Ago(time.Since(in.Created)) + " ago",
		Platform: in.About.Platform, Author: in.About.Author, Labels: in.Config.Labels, VMs: len(in.UsedBy),
	}
}

// content says what an image has.
func content(in *image.Inspection) string {
	text := ""
	for _, o := range in.Objects {
		if text != "" {
			text += ", "
		}
		kind, _, _ := strings.Cut(o.ID, "-")
		text += cmp.Or(o.Type, kind)
		if o.Release != "" {
			text += " " + o.Release
		}
	}
	if in.Bundle != "" {
		text = "bundle " + in.Bundle
	}
	if len(in.Missing) > 0 {
		text += " (incomplete)"
	}
	return strings.TrimSpace(text)
}

// Table is a heading and rows of columns, with digests if they are asked for. Whole shows ids in
// full.
func Table(all []*image.Inspection, digests, whole bool) (heading string, rows []string) {
	column := func(digest string) string {
		if !digests {
			return ""
		}
		return cmp.Or(digest, "-") + "\t"
	}
	for _, in := range all {
		v := view(in, whole)
		rows = append(rows,
			fmt.Sprintf("%s\t%s\t%s%s\t%s\t%s\t%d", v.Name, v.ID, column(v.Digest), v.Content, v.Size, v.Created, v.VMs))
	}
	return "NAME\tID\t" + column("DIGEST") + "CONTENT\tSIZE\tCREATED\tVMS", rows
}

// History is a heading and rows of how an image was made, the newest step first. Whole shows
// commands in full.
func History(steps []config.Step, whole bool) (heading string, rows []string) {
	for _, h := range slices.Backward(steps) {
		created, size, by := "-", human.Size(h.Size), human.Printable(strings.Join(strings.Fields(h.CreatedBy), " "))
		if !h.Created.IsZero() {
			created = human.Ago(time.Since(h.Created)) + " ago"
		}
		if h.Size == 0 && !h.NoLayer {
			size = "-"
		}
		if runes := []rune(by); !whole && len(runes) > maxCommand {
			by = string(runes[:maxCommand-1]) + "…"
		}
		rows = append(rows, fmt.Sprintf("%s\t%s\t%s\t%s", created, size, by, human.Printable(h.Comment)))
	}
	return "CREATED\tSIZE\tCREATED BY\tCOMMENT", rows
}

// maxCommand is how much of a command fits into a table.
const maxCommand = 60

// Template reads a template for each of what it is made for. It has json, which writes a value as
// JSON.
func Template(text string) (*template.Template, error) {
	t, err := template.New("format").Option("missingkey=zero").Funcs(template.FuncMap{"json": func(v any) (string, error) {
		data, err := json.Marshal(v)
		return string(data), err
	}}).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("format %q: %w", text, err)
	}
	return t, nil
}

// Format writes a line for each image.
func Format(w io.Writer, t *template.Template, all []*image.Inspection, whole bool) error {
	for _, in := range all {
		if err := line(w, t, view(in, whole)); err != nil {
			return err
		}
	}
	return nil
}

// Inspect writes a line for each image, of all that is known.
func Inspect(w io.Writer, t *template.Template, all []*image.Inspection) error {
	for _, in := range all {
		if err := line(w, t, in); err != nil {
			return err
		}
	}
	return nil
}

func line(w io.Writer, t *template.Template, v any) error {
	if err := t.Execute(w, v); err != nil {
		return fmt.Errorf("format: %w", err)
	}
	_, err := fmt.Fprintln(w)
	return err
}
