package config_test

import (
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/oci/config"
)

// What is written is read as it was.
func TestText(t *testing.T) {
	at := time.Date(2024, 2, 3, 4, 5, 6, 7, time.UTC)
	for name, d := range map[string]config.Document{
		"little": {OS: "linux", Architecture: "amd64", About: config.About{Platform: "linux/amd64"}},
		"all": {
			OS: "linux", Architecture: "arm64", Variant: "v8", DiffIDs: []string{"sha256:a", "sha256:b"},
			Config: config.Config{
				Entrypoint: []string{"/e"}, Cmd: []string{"a", ""}, Env: []string{"A=<&>"}, User: "u", WorkingDir: "/w",
				StopSignal:   "SIGINT",
				ExposedPorts: []string{"53/udp", "80/tcp"}, Volumes: []string{"/a", "/b"}, Labels: map[string]string{"l": "v"},
				Healthcheck: &config.Healthcheck{
					Test: []string{"CMD", "x"}, Interval: time.Second, Timeout: 2, StartPeriod: 3, StartInterval: 4, Retries: 5,
				},
			},
			About: config.About{Platform: "linux/arm64/v8", Built: at, Author: "me", History: []config.Step{
				{Created: at, CreatedBy: "by", Author: "me", Comment: "c"}, {NoLayer: true},
			}},
		},
	} {
		text, err := d.Text()
		if err != nil {
			t.Fatal(err)
		}
		got, err := config.Parse(text)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(&d, got); diff != "" {
			t.Errorf("%s:\n%s", name, diff)
		}
	}
}
