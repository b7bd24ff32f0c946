// Package dryrun shows what making and starting a VM would do.
package dryrun

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"strings"
)

// Print writes a plan, as Host.Plan returns it, for people.
func Print(w io.Writer, data []byte) error {
	type step struct {
		Kind   string          `json:"kind"`
		Effect json.RawMessage `json:"effect"`
	}
	var plan struct {
		Create, Run []step
		Argv        []string
		Calls       []struct {
			Path string          `json:"path"`
			Body json.RawMessage `json:"body"`
		}
	}
	if err := json.Unmarshal(data, &plan); err != nil {
		return fmt.Errorf("read plan: %w", err)
	}
	for _, part := range []struct {
		title string
		steps []step
	}{{"To create it, until it is removed:", plan.Create}, {"To start it, until it has stopped:", plan.Run}} {
		fmt.Fprintln(w, part.title)
		for _, s := range part.steps {
			fmt.Fprintf(w, "  %-8s %s\n", s.Kind, members(s.Effect))
		}
	}
	fmt.Fprintf(w, "The VMM's command line:\n  %s\nWhat it is told:\n", strings.Join(plan.Argv, " "))
	for _, c := range plan.Calls {
		fmt.Fprintf(w, "  %-18s %s\n", c.Path, members(c.Body))
	}
	return nil
}

// members shows an object's members in their order, one level deep.
func members(object json.RawMessage) string {
	var parts []string
	dec := json.NewDecoder(bytes.NewReader(object))
	_, _ = dec.Token()
	for dec.More() {
		key, err := dec.Token()
		var value json.RawMessage
		if err != nil || dec.Decode(&value) != nil {
			return string(object)
		}
		parts = append(parts, fmt.Sprintf("%s=%s", key, bytes.Trim(value, `"`)))
	}
	return strings.Join(parts, " ")
}
