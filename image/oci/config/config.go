// Package config reads the configuration of an OCI image:
// https://github.com/opencontainers/image-spec/blob/main/config.md
package config

import (
	"cmp"
	"encoding/json"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"
)

// Config is what an image wants to be run as.
type Config struct {
	Entrypoint []string `json:"entrypoint,omitempty"`
	Cmd        []string `json:"cmd,omitempty"`
	Env        []string `json:"env,omitempty"` // "NAME=value"
	User       string   `json:"user,omitempty"`
	WorkingDir string   `json:"workingDir,omitempty"`
	StopSignal string   `json:"stopSignal,omitempty"`
	// ExposedPorts are those of TCP and UDP that it says it serves, "80/tcp", in order. At most
	// maxExposed.
	ExposedPorts []string `json:"exposedPorts,omitempty"`
	// Volumes are directories that it keeps data in, as absolute and clean paths, in order. At most
	// maxVolumes.
	Volumes []string `json:"volumes,omitempty"`
	// Healthcheck is kept and shown; nothing runs it.
	Healthcheck *Healthcheck      `json:"healthcheck,omitempty"`
	Labels      map[string]string `json:"labels,omitempty"`
}

// Healthcheck says how to find out whether what an image runs is well. Durations are in
// nanoseconds; zero is the default of who runs it.
type Healthcheck struct {
	Test          []string      `json:"test,omitempty"` // "NONE", or "CMD" or "CMD-SHELL" and what to run
	Interval      time.Duration `json:"interval,omitempty"`
	Timeout       time.Duration `json:"timeout,omitempty"`
	StartPeriod   time.Duration `json:"startPeriod,omitempty"`
	StartInterval time.Duration `json:"startInterval,omitempty"`
	Retries       int           `json:"retries,omitempty"`
}

// maxExposed is more than can be published.
const maxExposed = 1024

const (
	maxVolumes    = 64
	maxVolumePath = 1024 // bytes; a longer one is left out
)

// About is what an image says of itself.
type About struct {
	Platform string    `json:"platform,omitempty"` // "linux/arm64/v8"; empty: it does not say
	Built    time.Time `json:"built,omitzero"`     // zero: it does not say
	Author   string    `json:"author,omitempty"`
	History  []Step    `json:"history,omitempty"` // the oldest first. At most maxSteps, the newest
}

// Step is how a part of an image was made.
type Step struct {
	Created   time.Time `json:"created,omitzero"`
	CreatedBy string    `json:"createdBy,omitempty"` // a command
	Author    string    `json:"author,omitempty"`
	Comment   string    `json:"comment,omitempty"`
	NoLayer   bool      `json:"noLayer,omitempty"`
	// Size is that of its layer as it is fetched, in bytes; 0 without one, and where it is not known.
	Size int64 `json:"size,omitempty"`
}

// maxSteps is more than images have.
const maxSteps = 1024

// Document is what a configuration says.
type Document struct {
	OS, Architecture, Variant string
	DiffIDs                   []string // of the layers, as they are
	Config                    Config
	About                     About
}

// Parse reads a configuration.
func Parse(text []byte) (*Document, error) {
	var c struct {
		OS           string `json:"os"`
		Architecture string `json:"architecture"`
		Variant      string `json:"variant"`
		Created      string `json:"created"`
		Author       string `json:"author"`
		History      []struct {
			Created   string `json:"created"`
			CreatedBy string `json:"created_by"`
			Author    string `json:"author"`
			Comment   string `json:"comment"`
			Empty     bool   `json:"empty_layer"`
		} `json:"history"`
		RootFS struct {
			DiffIDs []string `json:"diff_ids"`
		} `json:"rootfs"`
		Config struct {
			Entrypoint, Cmd, Env         []string
			User, WorkingDir, StopSignal string
			ExposedPorts, Volumes        map[string]json.RawMessage
			Healthcheck                  *Healthcheck
			Labels                       map[string]string
		} `json:"config"`
	}
	if err := json.Unmarshal(text, &c); err != nil {
		return nil, fmt.Errorf("read image configuration: %w", err)
	}
	d := &Document{OS: c.OS, Architecture: c.Architecture, Variant: c.Variant, DiffIDs: c.RootFS.DiffIDs}
	d.Config = Config{
		Entrypoint: c.Config.Entrypoint, Cmd: c.Config.Cmd, Env: c.Config.Env, User: c.Config.User,
		WorkingDir: c.Config.WorkingDir,
		StopSignal: c.Config.StopSignal, ExposedPorts: exposed(c.Config.ExposedPorts), Volumes: volumes(c.Config.Volumes),
		Healthcheck: c.Config.Healthcheck,
		Labels:      c.Config.Labels,
	}
	d.About = About{Built: moment(c.Created), Author: c.Author}
	if c.OS != "" && c.Architecture != "" {
		d.About.Platform = path.Join(c.OS, c.Architecture, c.Variant)
	}
	for _, h := range c.History[max(0, len(c.History)-maxSteps):] {
		d.About.History = append(d.About.History, Step{
			Created: moment(h.Created), CreatedBy: h.CreatedBy, Author: h.Author, Comment: h.Comment, NoLayer: h.Empty,
		})
	}
	return d, nil
}

// Sizes notes the sizes of layers, the lowest first, if the history is of as many.
func (a *About) Sizes(layers []int64) {
	n := 0
	for _, h := range a.History {
		if !h.NoLayer {
			n++
		}
	}
	if n != len(layers) {
		return
	}
	for i := range a.History {
		if !a.History[i].NoLayer {
			a.History[i].Size, layers = layers[0], layers[1:]
		}
	}
}

// moment is a time, and zero if it is none: nothing depends on it. One that JSON cannot have is
// none either.
func moment(text string) time.Time {
	t, err := time.Parse(time.RFC3339Nano, text)
	if err != nil || t.UTC().Year() < 1 || t.UTC().Year() > 9999 {
		return time.Time{}
	}
	return t.UTC()
}

// volumes leaves out the root, and what is no path.
func volumes(paths map[string]json.RawMessage) []string {
	var all []string
	for p := range paths {
		if p = path.Clean("/" + p); p != "/" && len(p) <= maxVolumePath && utf8.ValidString(p) &&
			!strings.Contains(p, "\x00") {
			all = append(all, p)
		}
	}
	slices.Sort(all)
	all = slices.Compact(all)
	return all[:min(len(all), maxVolumes)]
}

// exposed takes "PORT", "PORT/tcp" and "PORT/udp", and leaves out what is none of these.
func exposed(ports map[string]json.RawMessage) []string {
	type port struct {
		number   uint64
		protocol string
	}
	var all []port
	for text := range ports {
		number, protocol, _ := strings.Cut(text, "/")
		p := port{protocol: strings.ToLower(cmp.Or(protocol, "tcp"))}
		var err error
		if p.number, err = strconv.ParseUint(number, 10, 16); err == nil && p.number > 0 &&
			(p.protocol == "tcp" || p.protocol == "udp") {
			all = append(all, p)
		}
	}
	slices.SortFunc(all, func(a, b port) int {
		return cmp.Or(cmp.Compare(a.number, b.number), cmp.Compare(a.protocol, b.protocol))
	})
	all = slices.Compact(all)
	var texts []string
	for _, p := range all[:min(len(all), maxExposed)] {
		texts = append(texts, fmt.Sprintf("%d/%s", p.number, p.protocol))
	}
	return texts
}
