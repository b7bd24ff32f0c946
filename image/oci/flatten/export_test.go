package flatten

import (
	"context"
	"os"
)

// PlannedLayers is Layers by the plan alone.
func PlannedLayers(ctx context.Context, layers []Layer, dst *os.File) (Stats, error) {
	s := &stack{layers: layers, planned: true, max: limits{maxBytes: MaxBytes, maxEntries: MaxEntries}}
	return s.flatten(ctx, dst)
}

// LimitedLayers is Layers with other limits.
func LimitedLayers(ctx context.Context, layers []Layer, dst *os.File, maxBytes, maxEntries int64) (Stats, error) {
	s := &stack{layers: layers, max: limits{maxBytes: maxBytes, maxEntries: maxEntries}}
	return s.flatten(ctx, dst)
}
