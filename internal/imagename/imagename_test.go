package imagename_test

import (
	"testing"

	"push.rocks/smartvm/internal/imagename"
)

func TestPinned(t *testing.T) {
	for ref, want := range map[string]string{
		"debian":                "debian@sha256:d",
		"debian:12":             "debian@sha256:d",
		"h:5000/a/b":            "h:5000/a/b@sha256:d",
		"h:5000/a/b:1":          "h:5000/a/b@sha256:d",
		"docker://h:5000/a:1":   "docker://h:5000/a@sha256:d",
		"h:5000/a:1@sha256:old": "h:5000/a@sha256:d",
	} {
		if got := imagename.Pinned(ref, "sha256:d"); got != want {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
}
