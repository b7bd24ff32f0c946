package firecracker_test

import (
	"bytes"
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/firecracker"
)

func TestAPIError(t *testing.T) {
	const raw = "{ \"error\": \"Request payload with size 60002 is larger than the limit of 51200 allowed by server.\nAll previous unanswered requests will be dropped.\" }"
	for name, row := range map[string]struct {
		status int
		body   string
		fault  string
	}{
		"regular": {400, `{"fault_message":"The kernel file cannot be opened"}`, "The kernel file cannot be opened"},
		"quotes":  {400, `{"fault_message":"no \"such\" \\ thing"}`, `no "such" \ thing`},
		"too large": {
			413, `{"fault_message":"The MMDS patch request doesn't fit."}`,
			"The MMDS patch request doesn't fit.",
		},
		"more fields": {400, `{"fault_message":"f","code":7}`, "f"},
		"raw newline": {
			400, raw,
			`Request payload with size 60002 is larger than the limit of 51200 allowed by server.\nAll previous unanswered requests will be dropped.`,
		},
		"raw quotes":     {400, `{ "error": "Invalid header: "x" }" }`, `Invalid header: "x" }`},
		"raw, no end":    {400, `{ "error": "Invalid`, "Invalid"},
		"too many":       {503, `{ "error": "Too many open connections" }`, "Too many open connections"},
		"plain text":     {500, "Error reading from socket.\n", "Error reading from socket."},
		"empty":          {400, "", ""},
		"other JSON":     {400, `{"message":"hm"}`, `{"message":"hm"}`},
		"wrong type":     {400, `{"fault_message":5}`, `{"fault_message":5}`},
		"no object":      {400, `"oops"`, `"oops"`},
		"terminal":       {400, `{"fault_message":"a\u001b[31mb\u0007\u009bc\td"}`, `a\x1b[31mb\a\u009bc\td`},
		"other lines":    {400, `{"fault_message":"a\r\nb\u2028c\u202ed"}`, `a\r\nb\u2028c\u202ed`},
		"not UTF-8":      {500, "\xff\xfe", `\xff\xfe`},
		"no error":       {302, "", ""},
		"printable":      {400, `{"fault_message":"größer – 漢"}`, "größer – 漢"},
		"long":           {400, `{"fault_message":"` + strings.Repeat("x", 10_000) + `"}`, strings.Repeat("x", 4093) + "..."},
		"long, wide":     {400, `{"fault_message":"` + strings.Repeat("漢", 10_000) + `"}`, strings.Repeat("漢", 1364) + "..."},
		"long, escaping": {500, strings.Repeat("\x01", 10_000), strings.Repeat(`\x01`, 1023) + "..."},
	} {
		t.Run(name, func(t *testing.T) {
			dial, _ := listen(t, always(answer(row.status, row.body)))
			err := newClient(t, dial, v1_12_1).PutBootSource(t.Context(), firecracker.BootSource{})
			var got *firecracker.APIError
			if !errors.As(err, &got) {
				t.Fatalf("got %v, want an APIError", err)
			}
			want := &firecracker.APIError{Method: "PUT", Path: "/boot-source", Status: row.status, Fault: row.fault}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("error (-want +got):\n%s", diff)
			}
		})
	}
}

func TestAPIError_Error(t *testing.T) {
	for want, err := range map[string]error{
		"PUT /vsock: status 400: Address in use": &firecracker.APIError{
			Method: "PUT", Path: "/vsock", Status: 400,
			Fault: "Address in use",
		},
		"PUT /vsock: status 500": &firecracker.APIError{Method: "PUT", Path: "/vsock", Status: 500},
		"PUT /serial needs Firecracker 1.14.0 or newer, this is 1.12.1": &firecracker.VersionError{
			Endpoint: "PUT /serial", Need: firecracker.Version{Major: 1, Minor: 14}, Have: v1_12_1,
		},
		`PUT /machine-config: field huge_pages with value "Transparent" needs Firecracker 1.17.0 or newer, this is 1.12.1`: &firecracker.VersionError{
			Endpoint: "PUT /machine-config", Field: "huge_pages", Value: "Transparent",
			Need: firecracker.Version{Major: 1, Minor: 17}, Have: v1_12_1,
		},
		"field pmem needs Firecracker 1.14.0 or newer, this is 1.12.1": &firecracker.VersionError{
			Field: "pmem", Need: firecracker.Version{Major: 1, Minor: 14}, Have: v1_12_1,
		},
	} {
		if got := err.Error(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	}
}

// FuzzAnswer feeds the client whatever a VMM that was taken over might send.
func FuzzAnswer(f *testing.F) {
	for _, seed := range []string{
		answer(400, `{"fault_message":"no \"such\" thing"}`),
		answer(400, "{ \"error\": \"Invalid\n header\" }"),
		answer(400, `{ "error":`),
		answer(400, `{"error":"}`),
		answer(503, "\x1b]0;x\x07\xff"),
		answer(200, goodInfo),
		answer(204, ""),
		"HTTP/1.1 200 \r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
		"HTTP/1.0 500\r\n\r\noops",
		"HTTP/1.1 100 \r\n\r\n",
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, sent []byte) {
		answers := &conn{answers: bytes.NewReader(sent)}
		c := firecracker.New(func(context.Context) (net.Conn, error) { return answers, nil }, v1_12_1)
		defer c.Close()
		err := info(c, t.Context())
		var fault *firecracker.APIError
		if !errors.As(err, &fault) {
			return
		}
		if len(fault.Fault) > 4096 || !utf8.ValidString(fault.Fault) ||
			strings.ContainsAny(fault.Fault, "\r\n\t\x00\x1b\x7f\u0085\u009b\u2028\u2029\u202e") {
			t.Errorf("unsafe fault %q", fault.Fault)
		}
	})
}
