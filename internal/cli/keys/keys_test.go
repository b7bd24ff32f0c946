package keys_test

import (
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"

	"push.rocks/smartvm/internal/cli/keys"
)

func TestParse(t *testing.T) {
	for text, want := range map[string]string{
		keys.Default: "\x10\x11", "a": "a", "A,ctrl-@": "A\x00",
		"ctrl-[,ctrl-\\,ctrl-],ctrl-^,ctrl-_,CTRL-Z": "\x1b\x1c\x1d\x1e\x1f\x1a", "": "",
	} {
		if got, err := keys.Parse(text); err != nil || string(got) != want {
			t.Errorf("%q: got %q, %v, want %q", text, got, err, want)
		}
	}
	for _, bad := range []string{"ctrl-", "ab", "ctrl-1", ",", "ctrl-p,", "ctrl-pq", "ctrl-ä"} {
		if got, err := keys.Parse(bad); err == nil {
			t.Errorf("%q is %q", bad, got)
		}
	}
}

func TestReader(t *testing.T) {
	for _, tt := range []struct {
		keys, typed, want string
		detached          bool
	}{
		{"pq", "abc", "abc", false},
		{"pq", "abpqc", "ab", true},
		{"pq", "p", "p", false},
		{"pq", "pp", "pp", false},
		{"pq", "ppq", "p", true},
		{"pq", "apbpq", "apb", true},
		{"aab", "aaab", "a", true},
		{"aab", "aaacaab", "aaac", true},
		{"abac", "ababac", "ab", true},
		{"x", "", "", false},
		{"x", "x", "", true},
	} {
		for how, wrap := range map[string]func(io.Reader) io.Reader{"at once": func(r io.Reader) io.Reader {
			return r
		}, "by bytes": iotest.OneByteReader, "with its end": iotest.DataErrReader} {
			times := 0
			d := &keys.Reader{From: wrap(strings.NewReader(tt.typed)), Keys: []byte(tt.keys), Detach: func() { times++ }}
			got, err := io.ReadAll(iotest.OneByteReader(d))
			if string(got) != tt.want || errors.Is(err, keys.ErrDetach) != tt.detached || (times == 1) != tt.detached {
				t.Errorf("%s typed %s: %q after %q, %v, detached %d times", tt.typed, how, got, tt.keys, err, times)
			}
		}
	}
}
