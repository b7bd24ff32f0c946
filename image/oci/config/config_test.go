package config_test

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/oci/config"
)

func TestParse(t *testing.T) {
	d, err := config.Parse([]byte(`{"os": "linux", "architecture": "arm64", "variant": "v8", "created": "2024-05-06T07:08:09.5+02:00", "author": "me",
		"config": {"Labels": {"a": "b"}, "Volumes": {"/data/": {}, "/": {}}, "ExposedPorts": {"80": {}}, "StopSignal": "SIGINT",
			"Healthcheck": {"Test": ["CMD", "true"], "Interval": 1000}},
		"history": [{"created": "2024-05-06T07:08:09Z", "created_by": "COPY . /", "comment": "c"}, {"created": "yesterday", "created_by": "CMD [\"x\"]", "empty_layer": true}],
		"rootfs": {"diff_ids": ["sha256:0"]}}`))
	if err != nil {
		t.Fatal(err)
	}
	d.About.Sizes([]int64{7})
	want := &config.Document{
		OS: "linux", Architecture: "arm64", Variant: "v8", DiffIDs: []string{"sha256:0"},
		Config: config.Config{
			StopSignal: "SIGINT", ExposedPorts: []string{"80/tcp"}, Volumes: []string{"/data"},
			Labels:      map[string]string{"a": "b"},
			Healthcheck: &config.Healthcheck{Test: []string{"CMD", "true"}, Interval: 1000},
		},
		About: config.About{
			Platform: "linux/arm64/v8", Built: time.Date(2024, 5, 6, 5, 8, 9, 5e8, time.UTC), Author: "me",
			History: []config.Step{
				{Created: time.Date(2024, 5, 6, 7, 8, 9, 0, time.UTC), CreatedBy: "COPY . /", Comment: "c", Size: 7},
				{CreatedBy: `CMD ["x"]`, NoLayer: true},
			},
		},
	}
	if diff := cmp.Diff(want, d); diff != "" {
		t.Error(diff)
	}
	d.About.Sizes([]int64{1, 2}) // a history of other layers
	if d.About.History[0].Size != 7 {
		t.Errorf("%+v", d.About.History)
	}
}

// Whatever a configuration says, it can be written down again.
func TestParse_Odd(t *testing.T) {
	steps := strings.TrimSuffix(strings.Repeat(`{"created_by": "x"},`, 5000), ",")
	for _, text := range []string{
		`{}`, `null`, `{"created": "9999-12-31T23:59:59-14:00"}`, `{"created": ""}`,
		`{"config": null, "history": null}`, `{"history": [` + steps + `]}`,
	} {
		d, err := config.Parse([]byte(text))
		if err != nil {
			t.Errorf("%.40s: %v", text, err)
			continue
		}
		if _, err := json.Marshal(d); err != nil || len(d.About.History) > 1024 {
			t.Errorf("%.40s: %v, %d steps", text, err, len(d.About.History))
		}
	}
	for _, text := range []string{``, `[]`, `{"config": {"Labels": 1}}`, `{"history": {}}`} {
		if d, err := config.Parse([]byte(text)); err == nil {
			t.Errorf("%s: %+v", text, d)
		}
	}
}
