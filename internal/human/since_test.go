package human_test

import (
	"testing"
	"time"

	"push.rocks/smartvm/internal/human"
)

func TestSince(t *testing.T) {
	zone := time.FixedZone("there", 3600)
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, zone)
	for text, want := range map[string]time.Time{
		"": {}, "10m": now.Add(-10 * time.Minute), "1h30m": now.Add(-90 * time.Minute),
		"2026-01-31T15:04:05Z":        time.Date(2026, 1, 31, 15, 4, 5, 0, time.UTC),
		"2026-01-31T15:04:05.5+02:00": time.Date(2026, 1, 31, 13, 4, 5, 5e8, time.UTC),
		"2026-01-30":                  time.Date(2026, 1, 30, 0, 0, 0, 0, zone),
		"2026-01-31T10:30":            time.Date(2026, 1, 31, 10, 30, 0, 0, zone), "1600000000": time.Unix(1600000000, 0),
		"1600000000.5": time.Unix(1600000000, 5e8),
	} {
		if got, err := human.Since(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%q: got %v, %v, want %v", text, got, err, want)
		}
	}
	for _, bad := range []string{"yesterday", "-1", "1e300", "2026-13-01", "NaN"} {
		if got, err := human.Since(bad, now); err == nil {
			t.Errorf("%q is %v", bad, got)
		}
	}
}
