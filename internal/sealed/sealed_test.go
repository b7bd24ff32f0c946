package sealed_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"push.rocks/smartvm/internal/sealed"
)

func TestWhole(t *testing.T) {
	text := sealed.Seal([]byte("{\"a\":1,\"b\":{\"sum\":\"x\"}}\n"))
	if !sealed.Whole(text) || !json.Valid(text) {
		t.Fatalf("%s", text)
	}
	for i := range text {
		flipped := bytes.Clone(text)
		flipped[i] ^= 1
		if sealed.Whole(flipped) {
			t.Errorf("whole: %s", flipped)
		}
	}
	for _, bad := range [][]byte{nil, []byte("{}"), text[:len(text)-1], append(bytes.Clone(text), ' ')} {
		if sealed.Whole(bad) {
			t.Errorf("whole: %s", bad)
		}
	}
}
