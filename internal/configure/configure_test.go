package configure_test

import (
	"context"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/internal/configure"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/spec"
)

// A build of what is to become 1.17 may not know discard yet: then a drive has none, unless its spec wants it.
func TestCalls_DiscardUnknown(t *testing.T) {
	path := testenv.Socket(t, filepath.Join(t.TempDir(), "s"))
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var got []string
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		mu.Lock()
		defer mu.Unlock()
		discard := strings.Contains(string(body), `"discard":true`)
		got = append(got, map[bool]string{true: "discard", false: "none"}[discard])
		w.Header().Set("Content-Type", "application/json")
		if !discard {
			w.WriteHeader(http.StatusNoContent)
			return
		}
		w.WriteHeader(http.StatusBadRequest) // as serde has it
		_, _ = io.WriteString(w, "{\"fault_message\":\"An error occurred when deserializing the json body of a request: unknown field `discard`, expected one of `drive_id`, `partuuid` at line 1 column 99.\"}")
	})}
	go func() { _ = server.Serve(l) }()
	defer server.Close()
	v := firecracker.Version{Major: 1, Minor: 17}
	c := firecracker.New(func(ctx context.Context) (net.Conn, error) { return new(net.Dialer).DialContext(ctx, "unix", path) }, v)
	defer c.Close()
	for name, tt := range map[string]struct {
		drive spec.Drive
		want  []string
		ok    bool
	}{
		"nothing said":  {spec.Drive{DriveID: "d"}, []string{"discard", "none"}, true},
		"not wanted":    {spec.Drive{DriveID: "d", Discard: new(bool)}, []string{"none"}, true},
		"wanted":        {spec.Drive{DriveID: "d", Discard: new(true)}, []string{"discard"}, false},
		"not to offer":  {spec.Drive{DriveID: "d", IsReadOnly: true}, []string{"none"}, true},
		"nor this, too": {spec.Drive{DriveID: "d", IOEngine: "Async"}, []string{"none"}, true},
	} {
		got = nil
		for _, call := range configure.Calls(&spec.Spec{Drives: []spec.Drive{tt.drive}}, v) {
			if !strings.HasPrefix(call.Path, "/drives/") {
				continue
			}
			if err := call.Send(t.Context(), c); (err == nil) != tt.ok {
				t.Errorf("%s: %v", name, err)
			}
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%s: %s", name, diff)
		}
	}
}
