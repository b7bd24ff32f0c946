package share_test

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"push.rocks/smartvm/internal/share"
)

// header is a tar's, which change makes one that the archive/tar package does not write.
func header(t *testing.T, h tar.Header, change func(block []byte)) []byte {
	t.Helper()
	var b bytes.Buffer
	h.Format, h.Mode = tar.FormatGNU, 0o644
	if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
		t.Fatal(err)
	}
	block := b.Bytes()[:512]
	change(block)
	copy(block[148:156], "        ")
	sum := 0
	for _, c := range block {
		sum += int(c)
	}
	copy(block[148:156], fmt.Sprintf("%06o\x00 ", sum))
	return block
}

// oldSparse is a file of nothing but a hole, as old GNU tar has it.
func oldSparse(t *testing.T, name string, size uint64) []byte {
	return header(t, tar.Header{Typeflag: tar.TypeReg, Name: "0/upper/" + name}, func(b []byte) {
		b[156] = tar.TypeGNUSparse
		b[483] = 0x80 // a binary number
		binary.BigEndian.PutUint64(b[487:495], size)
	})
}

// paxSparse is the same as a PAX archive has it.
func paxSparse(t *testing.T, name string, size int64) []byte {
	var records bytes.Buffer
	for _, r := range []string{
		"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=0/upper/" + name,
		fmt.Sprint("GNU.sparse.realsize=", size),
	} {
		n := len(r) + 2
		for n != len(fmt.Sprint(n))+len(r)+2 {
			n = len(fmt.Sprint(n)) + len(r) + 2
		}
		fmt.Fprintf(&records, "%d %s\n", n, r)
	}
	extended := header(t, tar.Header{Typeflag: tar.TypeReg, Name: "pax", Size: int64(records.Len())}, func(b []byte) {
		b[156] = tar.TypeXHeader
	})
	body := make([]byte, (records.Len()+511)/512*512)
	copy(body, records.Bytes())
	regions := make([]byte, 512)
	copy(regions, "0\n")
	return bytes.Join(
		[][]byte{
			extended, body, header(t, tar.Header{Typeflag: tar.TypeReg, Name: "x", Size: 512}, func([]byte) {}),
			regions,
		}, nil)
}

// What comes back has no more than its limit, holes included, whatever an archive says of itself;
// what fits comes.
func TestMerge_Limits(t *testing.T) {
	large := archive(t, file("large", strings.Repeat("x", 4<<20))...).Bytes()
	large = large[:len(large)-1024] // its end
	for name, test := range map[string]struct {
		hostile         []byte
		failures, other int
	}{
		"sizes that overflow":  {joined(oldSparse(t, "s1", 1<<62), oldSparse(t, "s2", 1<<62), large), 1, 2},
		"a large hole":         {paxSparse(t, "s", 1<<60), 1, 0},
		"a hole that is taken": {paxSparse(t, "s", 1<<19), 0, 0},
		"many holes": {
			joined(paxSparse(t, "s", 1<<19), paxSparse(t, "s2", 1<<19), paxSparse(t, "s3", 1<<19)), 1,
			0,
		},
		"a file of nothing":      {nil, 0, 0},
		"more than all may have": {large, 1, 0},
	} {
		t.Run(name, func(t *testing.T) {
			source := filepath.Join(t.TempDir(), "s")
			put(t, source, map[string]string{"a": "old"})
			all := volumes(source)
			merge := share.Merge{Volumes: all, Told: share.Guest(all), Copied: taken(t, source), MaxBytes: 1<<20 + 8}
			report, err := merge.Apply(t.Context(),
				bytes.NewReader(joined(test.hostile, archive(t, file("a", "new")...).Bytes())))
			if err != nil || report.Failures != test.failures || report.Left != test.other {
				t.Fatalf("%+v, %v", report, err)
			}
			for _, f := range report.Failed {
				if _, ok := errors.AsType[*share.LimitError](f.Err); !ok {
					t.Errorf("%s: %v", f.Path, f.Err)
				}
			}
			got, sum := tree(t, source), 0
			for _, text := range got {
				sum += len(text)
			}
			if got["a"] != "new" || sum > 1<<20+8 {
				t.Errorf("a is %q, and there are %d bytes", got["a"], sum)
			}
			if name == "a hole that is taken" && len(got["s"]) != 1<<19 {
				t.Errorf("it has %d bytes", len(got["s"]))
			}
		})
	}
}

func joined(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
