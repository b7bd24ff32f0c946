package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/testscript"

	"push.rocks/smartvm/image/release"
)

// releasesCommand makes this a machine on which nothing is installed, and serves a release of
// Firecracker in the recorded shape: releases VERSION.
func releasesCommand(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: releases VERSION")
	}
	version, arch := args[0], release.HostArch()
	var archive bytes.Buffer
	zip := gzip.NewWriter(&archive)
	w := tar.NewWriter(zip)
	for name, from := range map[string]string{
		"firecracker": ts.Getenv("SMARTVM_FIRECRACKER"),
		"jailer":      ts.Getenv("SMARTVM_JAILER"),
	} {
		data, err := os.ReadFile(from)
		ts.Check(err)
		ts.Check(w.WriteHeader(
			&tar.Header{
				Name: fmt.Sprintf("release-%s-%s/%s-%[1]s-%[2]s", version, arch, name), Size: int64(len(data)),
				Mode: 0o755,
			}))
		_, err = w.Write(data)
		ts.Check(err)
	}
	ts.Check(errors.Join(w.Close(), zip.Close()))
	name := fmt.Sprintf("firecracker-%s-%s.tgz", version, arch)
	files := map[string][]byte{
		name:                 archive.Bytes(),
		name + ".sha256.txt": fmt.Appendf(nil, "%x  %s\n", sha256.Sum256(archive.Bytes()), name),
	}
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asset, isAsset := strings.CutPrefix(r.URL.Path, "/download/"+version+"/")
		switch {
		case r.URL.Path == "/latest":
			http.Redirect(w, r, "/tag/"+version, http.StatusFound)
		case r.URL.Path == "/tag/"+version: // a page
		case isAsset && files[asset] != nil:
			_, _ = w.Write(files[asset])
		default:
			http.NotFound(w, r)
		}
	}))
	ts.Defer(server.Close)
	ts.Setenv("SMARTVM_FIRECRACKER_RELEASES", server.URL)
	ts.Setenv("SMARTVM_FIRECRACKER", "")
	ts.Setenv("SMARTVM_JAILER", "")
	program, err := filepath.Abs(filepath.Dir(os.Args[0]))
	ts.Check(err)
	for _, dir := range filepath.SplitList(ts.Getenv("PATH")) {
		if _, err := os.Stat(filepath.Join(dir, "smartvm")); err == nil {
			program = dir
			break
		}
	}
	ts.Setenv("PATH", program)
}
