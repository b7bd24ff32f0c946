package oci_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/image/oci/manifest"
	"push.rocks/smartvm/image/oci/ocitest"
)

// manifestOf is the text of an image's manifest in a layout, as an object to be changed.
func manifestOf(t testing.TB, dir string, d ocitest.Descriptor) map[string]any {
	t.Helper()
	text, err := os.ReadFile(ocitest.Blob(dir, d.Digest))
	var doc map[string]any
	if err == nil {
		err = json.Unmarshal(text, &doc)
	}
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// manifests answers requests for manifests with a text.
func manifests(text, contentType string) func(w http.ResponseWriter, r *http.Request) bool {
	return func(w http.ResponseWriter, r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/manifests/") {
			w.Header().Set("Content-Type", contentType)
			fmt.Fprint(w, text)
		}
		return strings.Contains(r.URL.Path, "/manifests/")
	}
}

const (
	typeManifest = "application/vnd.oci.image.manifest.v1+json"
	typeIndex    = "application/vnd.oci.image.index.v1+json"
	typeConfig   = "application/vnd.oci.image.config.v1+json"
)

// What is no container image is named, and documents that could be read as two things are refused.
func TestResolve_Documents(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"))
	change := func(f func(doc, config, layer map[string]any)) string {
		doc := manifestOf(t, dir, d)
		f(doc, doc["config"].(map[string]any), doc["layers"].([]any)[0].(map[string]any))
		text, err := json.Marshal(doc)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	good := change(func(_, _, _ map[string]any) {})
	for _, c := range []struct {
		name, text, contentType string
		want                    string // of the error; empty: there is none
		kind                    string // of a NotImageError
	}{
		{name: "an image", text: good, contentType: typeManifest},
		{name: "called nothing in particular", text: good, contentType: "text/plain"},
		{name: "with a parameter", text: good, contentType: typeManifest + "; charset=utf-8"},
		{name: "without types", text: change(func(doc, config, layer map[string]any) {
			delete(doc, "mediaType")
			delete(config, "mediaType")
			delete(layer, "mediaType")
		})},
		{name: "with types of docker's", text: change(func(doc, config, layer map[string]any) {
			doc["mediaType"], config["mediaType"] = "application/vnd.docker.distribution.manifest.v2+json",
				"application/vnd.docker.container.image.v1+json"
			layer["mediaType"] = "application/vnd.docker.image.rootfs.diff.tar.gzip"
		})},
		{name: "an image with an artifact's type", text: change(func(doc, _, _ map[string]any) {
			doc["artifactType"] = typeConfig
		})},
		{
			name: "a chart", text: change(func(_, config, _ map[string]any) {
				config["mediaType"] = "application/vnd.cncf.helm.config.v1+json"
			}),
			want: "no container image: it is a Helm chart", kind: "application/vnd.cncf.helm.config.v1+json",
		},
		{
			name: "an artifact", text: change(func(doc, config, _ map[string]any) {
				doc["artifactType"], config["mediaType"] = "application/vnd.example.sbom", "application/vnd.oci.empty.v1+json"
			}),
			want: "it is an artifact (application/vnd.example.sbom)", kind: "application/vnd.example.sbom",
		},
		{
			name: "a signature", text: change(func(_, _, layer map[string]any) {
				layer["mediaType"] = "application/vnd.dev.cosign.simplesigning.v1+json"
			}),
			want: "a signature", kind: "application/vnd.dev.cosign.simplesigning.v1+json",
		},
		{
			name: "encrypted", text: change(func(_, _, layer map[string]any) {
				layer["mediaType"] = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
			}),
			want: "is encrypted",
		},
		{
			name: "schema 1", text: `{"schemaVersion":1,"name":"a","fsLayers":[],"history":[]}`,
			contentType: "application/vnd.docker.distribution.manifest.v1+prettyjws",
			want:        "schema 1", kind: "application/vnd.docker.distribution.manifest.v1+json",
		},
		{name: "both", text: change(func(doc, _, _ map[string]any) { doc["manifests"] = []any{} }), want: "at once"},
		{name: "both, as an index", text: change(func(doc, _, _ map[string]any) {
			doc["manifests"], doc["mediaType"] = []any{d}, typeIndex
			delete(doc, "config")
		}), contentType: typeIndex, want: "at once"},
		{name: "a manifest that is called an index", text: good, contentType: typeIndex, want: "holds something else"},
		{name: "a manifest that calls itself an index", text: change(func(doc, _, _ map[string]any) {
			doc["mediaType"] = typeIndex
		}), want: "holds something else"},
		{name: "a key twice", text: `{"layers":[],` + good[1:], want: "twice"},
		{name: "a key twice in another case", text: `{"Layers":[],` + good[1:], want: "twice"},
		{name: "an index of nothing", text: `{"schemaVersion":2,"manifests":null}`, want: "there are: none"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := serve(t, dir, manifests(c.text, c.contentType))
			i, err := oci.Resolve(t.Context(), s.host()+"/a", oci.Options{})
			if err == nil {
				t.Cleanup(func() { _ = i.Close() })
			}
			if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %q", err, c.want)
			}
			var not *manifest.NotImageError
			if errors.As(err, &not) != (c.kind != "") || not != nil && not.Type != c.kind {
				t.Errorf("%v, want the type %q", err, c.kind)
			}
		})
	}
}

// An index says what a manifest is that it leads to.
func TestResolve_IndexOfIndexes(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"))
	lie := d
	lie.MediaType = typeIndex
	for tag, image := range map[string]ocitest.Descriptor{"good": d, "bad": lie} {
		index, err := ocitest.AddIndex(dir, image)
		if err == nil {
			err = ocitest.Tag(dir, tag, index)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	resolve(t, "oci:"+dir+":good", oci.Options{})
	if _, err := oci.Resolve(t.Context(), "oci:"+dir+":bad", oci.Options{}); err == nil ||
		!strings.Contains(err.Error(), "holds something else") {
		t.Errorf("%v", err)
	}
}

// What any processor of an architecture runs is chosen, or the best that a variant's runs.
func TestResolve_Variants(t *testing.T) {
	dir := t.TempDir()
	index := func(tag string, platforms ...string) (digests map[string]string) {
		digests = map[string]string{}
		var images []ocitest.Descriptor
		for _, p := range platforms {
			arch, variant, _ := strings.Cut(p, "/")
			d, err := ocitest.Add(dir, arch, files(p))
			if err != nil {
				t.Fatal(err)
			}
			if variant != "" {
				d.Platform["variant"] = variant
			}
			images, digests[p] = append(images, d), d.Digest
		}
		d, err := ocitest.AddIndex(dir, images...)
		if err == nil {
			err = ocitest.Tag(dir, tag, d)
		}
		if err != nil {
			t.Fatal(err)
		}
		return digests
	}
	all := index("all", "arm/v5", "arm/v7", "amd64/v4", "amd64/v3", "amd64", "amd64/v2", "arm64/v9", "arm64/v8.2",
		"arm64/v8", "amd64/x")
	for arch, want := range map[string]string{
		"amd64": "amd64", "amd64/v2": "amd64/v2", "amd64/v3": "amd64/v3", "arm64": "arm64/v8", "arm64/v8.4": "arm64/v8.2",
		"arm64/v9": "arm64/v9",
		"arm":      "arm/v7", "arm/v6": "arm/v5",
	} {
		if i := resolve(t, "oci:"+dir+":all", oci.Options{Arch: arch}); i.Digest != all[want] {
			t.Errorf("for %s: %s, want that of %s", arch, i.Digest, want)
		}
	}
	index("new", "amd64/v3", "amd64/v4", "arm/v6", "arm/v7")
	_, err := oci.Resolve(t.Context(), "oci:"+dir+":new", oci.Options{})
	var got *manifest.PlatformError
	have := []string{"linux/amd64/v3", "linux/amd64/v4", "linux/arm/v6", "linux/arm/v7"}
	want := &manifest.PlatformError{Want: "linux/amd64", Have: have}
	if !errors.As(err, &got) || !cmp.Equal(got, want) {
		t.Errorf("%v, want %v", err, want)
	}
}
