package human

import (
	"fmt"
	"strconv"
	"time"
)

// Since reads a time, or a length of time before now. Nothing is the zero time.
func Since(text string, now time.Time) (time.Time, error) {
	if text == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(text); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339Nano, "2006-01-02T15:04:05", "2006-01-02T15:04", "2006-01-02"} {
		if at, err := time.ParseInLocation(layout, text, now.Location()); err == nil {
			return at, nil
		}
	}
	if seconds, err := strconv.ParseFloat(text, 64); err == nil && seconds >= 0 && seconds < 1<<33 {
		return time.Unix(0, int64(seconds*float64(time.Second))), nil
	}
	return time.Time{}, fmt.Errorf("--since %q: want a time like 2006-01-02T15:04:05Z, or how long ago, like 10m", text)
}
