package config

import (
	"encoding/json"
	"maps"
	"time"
)

// Text is a configuration that Parse reads as d.
func (d *Document) Text() ([]byte, error) {
	type empty struct{}
	set := func(list []string) map[string]empty {
		all := map[string]empty{}
		for _, l := range list {
			all[l] = empty{}
		}
		return all
	}
	type runs struct {
		Entrypoint   []string          `json:",omitempty"`
		Cmd          []string          `json:",omitempty"`
		Env          []string          `json:",omitempty"`
		User         string            `json:",omitempty"`
		WorkingDir   string            `json:",omitempty"`
		StopSignal   string            `json:",omitempty"`
		ExposedPorts map[string]empty  `json:",omitempty"`
		Volumes      map[string]empty  `json:",omitempty"`
		Healthcheck  map[string]any    `json:",omitempty"`
		Labels       map[string]string `json:",omitempty"`
	}
	c := d.Config
	r := runs{
		Entrypoint: c.Entrypoint, Cmd: c.Cmd, Env: c.Env, User: c.User, WorkingDir: c.WorkingDir, StopSignal: c.StopSignal,
		ExposedPorts: set(c.ExposedPorts), Volumes: set(c.Volumes), Labels: c.Labels,
	}
	if h := c.Healthcheck; h != nil {
		r.Healthcheck = map[string]any{"Test": h.Test}
		for key, n := range map[string]time.Duration{
			"Interval": h.Interval, "Timeout": h.Timeout,
			"StartPeriod": h.StartPeriod, "StartInterval": h.StartInterval,
		} {
			if n != 0 {
				r.Healthcheck[key] = n
			}
		}
		if h.Retries != 0 {
			r.Healthcheck["Retries"] = h.Retries
		}
	}
	steps := []map[string]any{}
	for _, s := range d.About.History {
		steps = append(steps, s.text())
	}
	whole := map[string]any{
		"os": d.OS, "architecture": d.Architecture, "config": r, "history": steps,
		"rootfs": map[string]any{"type": "layers", "diff_ids": d.DiffIDs},
	}
	maps.Copy(whole, present(map[string]string{"variant": d.Variant, "author": d.About.Author}))
	if !d.About.Built.IsZero() {
		whole["created"] = d.About.Built
	}
	return json.Marshal(whole)
}

func (s Step) text() map[string]any {
	text := present(map[string]string{"created_by": s.CreatedBy, "author": s.Author, "comment": s.Comment})
	if !s.Created.IsZero() {
		text["created"] = s.Created
	}
	if s.NoLayer {
		text["empty_layer"] = true
	}
	return text
}

// present are the values that are there.
func present(all map[string]string) map[string]any {
	some := map[string]any{}
	for key, value := range all {
		if value != "" {
			some[key] = value
		}
	}
	return some
}
