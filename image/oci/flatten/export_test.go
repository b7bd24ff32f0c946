package flatten

import (
	"context"
	"os"
)

// PlannedLayers is Layers by the plan alone.
func PlannedLayers(ctx context.Context, layers []Layer, dst *os.File) (Stats, error) {
	s := &stack{layers: layers, planned: true, max: newLimits(Limits{})}
	return s.flatten(ctx, dst)
}
