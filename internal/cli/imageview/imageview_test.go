package imageview_test

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image"
	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/config"
	"push.rocks/smartvm/internal/cli/imageview"
)

func inspection(name string, day int, labels map[string]string) *image.Inspection {
	return &image.Inspection{
		Image: image.Image{
			Name: name, ID: strings.Repeat("0123456789abcdef", 4), Digest: "sha256:x",
			Created: time.Date(2026, 1, day, 0, 0, 0, 0, time.UTC),
			Config:  oci.Config{Labels: labels},
		},
		Objects: []image.Object{{ID: "chain3-0", Type: "ext4"}, {ID: "kernel-0", Release: "6.1"}},
	}
}

func TestFilter(t *testing.T) {
	all := []*image.Inspection{
		inspection("debian:11", 1, nil), inspection("debian:12", 2, map[string]string{"team": "web", "empty": ""}),
		inspection("localhost:5000/app", 3, map[string]string{"team": "db"}),
	}
	old := fmt.Sprintf("%.0fh", time.Since(all[1].Created).Hours()+12) // between the first and the second
	find := func(ref string) (*image.Image, error) {
		for _, in := range all {
			if in.Name == ref {
				return &in.Image, nil
			}
		}
		return nil, image.ErrNotFound
	}
	for filters, want := range map[string]string{
		"":                                "debian:11 debian:12 localhost:5000/app",
		"label=team":                      "debian:12 localhost:5000/app",
		"label=team=web":                  "debian:12",
		"label=empty=":                    "debian:12",
		"label=none":                      "",
		"reference=debian":                "debian:11 debian:12",
		"reference=*:12":                  "debian:12",
		"reference=localhost:5000/a*":     "localhost:5000/app",
		"before=debian:12":                "debian:11",
		"since=debian:11":                 "debian:12 localhost:5000/app",
		"since=debian:11,label=team=web":  "debian:12",
		"label!=team":                     "debian:11",
		"label!=team=web":                 "debian:11 localhost:5000/app",
		"label!=team,label!=none":         "debian:11",
		"until=1h":                        "debian:11 debian:12 localhost:5000/app",
		"until=" + old:                    "debian:11",
		"until=2026-01-02T00:00:00Z":      "debian:11",
		"until=2026-01-02T01:00:00+01:00": "debian:11",
		"until=1767312000":                "debian:11",
		"until=2025-12-30":                "",
		"until=2030-01-01T10:30":          "debian:11 debian:12 localhost:5000/app",
	} {
		var list []string
		if filters != "" {
			list = strings.Split(filters, ",")
		}
		meets, err := imageview.Filter(list, find)
		var names []string
		for _, in := range all {
			if err == nil && meets(&in.Image) {
				names = append(names, in.Name)
			}
		}
		if err != nil || strings.Join(names, " ") != want {
			t.Errorf("%s: %q, %v, want %q", filters, names, err, want)
		}
	}
	for _, filter := range []string{
		"label", "label=", "size=3", "reference=[", "", "until=", "until=soon",
		"until!=1h", "label!",
	} {
		if _, err := imageview.Filter([]string{filter}, find); !errors.Is(err, imageview.ErrFilter) {
			t.Errorf("%q: %v", filter, err)
		}
	}
	if _, err := imageview.Filter([]string{"since=none"}, find); !errors.Is(err, image.ErrNotFound) {
		t.Errorf("since none: %v", err)
	}
}

func TestTable(t *testing.T) {
	in := inspection("debian:12", 2, nil)
	in.Missing = []string{"kernel-1"}
	heading, rows := imageview.Table([]*image.Inspection{in}, true, false)
	if heading != "NAME\tID\tDIGEST\tCONTENT\tSIZE\tCREATED\tVMS" || len(rows) != 1 ||
		!strings.HasPrefix(rows[0], "debian:12\t0123456789ab\tsha256:x\text4, kernel 6.1 (incomplete)\t") {
		t.Errorf("%q\n%q", heading, rows)
	}
	if heading, rows = imageview.Table([]*image.Inspection{in}, false, true); strings.Contains(heading, "DIGEST") ||
		!strings.Contains(rows[0], in.ID) {
		t.Errorf("%q\n%q", heading, rows)
	}
}

func TestFormat(t *testing.T) {
	format, err := imageview.Template(`{{.Name}} {{.ID}} {{json .Labels}} {{.Labels.none}}`)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := imageview.Format(&out, format, []*image.Inspection{inspection("a", 1, map[string]string{"b": "c"})},
		false); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff("a 0123456789ab {\"b\":\"c\"} \n", out.String()); diff != "" {
		t.Error(diff)
	}
}

// A history is an image's own words: on one line each, and nothing that a terminal obeys.
func TestHistory(t *testing.T) {
	steps := []config.Step{
		{CreatedBy: "COPY\n\t. /", Size: 2048},
		{CreatedBy: strings.Repeat("x", 100), NoLayer: true},
		{CreatedBy: "\x1b[31mred", Comment: "a\nb"},
	}
	_, rows := imageview.History(steps, false)
	want := []string{
		"-\t-\t\ufffd[31mred\ta\ufffdb", "-\t0 KiB\t" + strings.Repeat("x", 59) + "…\t",
		"-\t2 KiB\tCOPY . /\t",
	}
	if diff := cmp.Diff(want, rows); diff != "" {
		t.Error(diff)
	}
	if _, rows = imageview.History(steps, true); !strings.Contains(rows[1], strings.Repeat("x", 100)) {
		t.Error(rows)
	}
}
