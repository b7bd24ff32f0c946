package main

import (
	"archive/tar"
	"encoding/pem"
	"flag"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"sync"

	"github.com/rogpeppe/go-internal/testscript"

	"push.rocks/smartvm/image/oci/ocitest"
)

// registryCommand serves an image, app:1, and sets REGISTRY to where; what is asked of it is in the
// file requests: registry [-tls] [-login USER:PASSWORD]. The certificate of one with TLS is
// certs/ca.crt.
func registryCommand(ts *testscript.TestScript, neg bool, args []string) {
	var flags flag.FlagSet
	tls, login := flags.Bool("tls", false, ""), flags.String("login", "", "")
	if err := flags.Parse(args); neg || err != nil || flags.NArg() > 0 {
		ts.Fatalf("usage: registry [-tls] [-login USER:PASSWORD]")
	}
	layout := ts.MkAbs("registry-layout")
	image, err := ocitest.Add(layout, "amd64", func(w *tar.Writer) error {
		return w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "bin/", Mode: 0o755})
	})
	ts.Check(err)
	ts.Check(ocitest.Tag(layout, "1", image))
	ts.Check(os.WriteFile(ts.MkAbs("requests"), nil, 0o600))
	var mu sync.Mutex
	serve := ocitest.Registry(layout)
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		mu.Lock()
		defer mu.Unlock()
		f, err := os.OpenFile(ts.MkAbs("requests"), os.O_APPEND|os.O_WRONLY, 0)
		if err == nil {
			_, err = io.WriteString(f, r.Method+" "+r.URL.Path+"\n")
			_ = f.Close()
		}
		user, password, _ := r.BasicAuth()
		switch {
		case err != nil:
			http.Error(w, err.Error(), http.StatusInternalServerError)
		case *login != "" && user+":"+password != *login:
			w.Header().Set("WWW-Authenticate", `Basic realm="test"`)
			w.WriteHeader(http.StatusUnauthorized)
		default:
			serve.ServeHTTP(w, r)
		}
	}))
	server.Config.ErrorLog = log.New(io.Discard, "", 0)
	if *tls {
		server.StartTLS()
		ts.Check(os.MkdirAll(ts.MkAbs("certs"), 0o700))
		text := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
		ts.Check(os.WriteFile(ts.MkAbs("certs/ca.crt"), text, 0o600))
	} else {
		server.Start()
	}
	ts.Defer(server.Close)
	_, host, _ := strings.Cut(server.URL, "://")
	ts.Setenv("REGISTRY", host)
}
