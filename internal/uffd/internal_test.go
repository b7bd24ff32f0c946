package uffd

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestParseRegions(t *testing.T) {
	const good = `[{"base_host_virt_addr":140000000000000,"size":8192,"offset":0,"page_size":4096,"page_size_kib":4096},` +
		`{"base_host_virt_addr":8192,"size":4096,"offset":8192,"page_size":4096}]`
	for name, c := range map[string]struct {
		text string
		size int64
		ok   bool
	}{
		"Good":         {good, 12288, true},
		"OldPageSize":  {`[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size_kib":4096}]`, 4096, true},
		"HugePages":    {`[{"base_host_virt_addr":4194304,"size":2097152,"offset":0,"page_size":2097152}]`, 2 << 20, true},
		"LargerFile":   {good, 16384, false},
		"SmallerFile":  {good, 8192, false},
		"Empty":        {`[]`, 4096, false},
		"Object":       {`{}`, 4096, false},
		"NoPageSize":   {`[{"base_host_virt_addr":4096,"size":4096,"offset":0}]`, 4096, false},
		"OddPageSize":  {`[{"base_host_virt_addr":8192,"size":8192,"offset":0,"page_size":8192}]`, 8192, false},
		"TwoPageSizes": {`[{"base_host_virt_addr":4194304,"size":2097152,"offset":0,"page_size":4096},{"base_host_virt_addr":8388608,"size":2097152,"offset":2097152,"page_size":2097152}]`, 4 << 20, false},
		"Negative":     {`[{"base_host_virt_addr":4096,"size":-4096,"offset":0,"page_size":4096}]`, 4096, false},
		"NoSize":       {`[{"base_host_virt_addr":4096,"size":0,"offset":0,"page_size":4096}]`, 4096, false},
		"OddBase":      {`[{"base_host_virt_addr":4097,"size":4096,"offset":0,"page_size":4096}]`, 4096, false},
		"OddSize":      {`[{"base_host_virt_addr":4096,"size":4095,"offset":0,"page_size":4096}]`, 4095, false},
		"AddressWraps": {
			`[{"base_host_virt_addr":18446744073709547520,"size":8192,"offset":0,"page_size":4096}]`, 8192,
			false,
		},
		"OffsetOutside": {`[{"base_host_virt_addr":4096,"size":4096,"offset":4096,"page_size":4096}]`, 4096, false},
		"OffsetWraps": {
			`[{"base_host_virt_addr":4096,"size":4096,"offset":18446744073709547520,"page_size":4096}]`, 4096,
			false,
		},
		"SameAddress":    {`[{"base_host_virt_addr":4096,"size":4096,"offset":0,"page_size":4096},{"base_host_virt_addr":4096,"size":4096,"offset":4096,"page_size":4096}]`, 8192, false},
		"AddressOverlap": {`[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096},{"base_host_virt_addr":8192,"size":4096,"offset":8192,"page_size":4096}]`, 12288, false},
		"OffsetOverlap":  {`[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096},{"base_host_virt_addr":65536,"size":4096,"offset":4096,"page_size":4096}]`, 12288, false},
		"Many":           {"[" + strings.Repeat(`{"page_size":4096},`, maxRegions) + `{"page_size":4096}]`, 4096, false},
	} {
		regions, _, err := parseRegions([]byte(c.text), c.size)
		if (err == nil) != c.ok || err != nil && !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v, %v", name, regions, err)
		}
	}
}

// What is taken for regions lies in the file and covers it.
func FuzzParseRegions(f *testing.F) {
	f.Add([]byte(`[{"base_host_virt_addr":4096,"size":8192,"offset":0,"page_size":4096}]`), int64(8192))
	f.Add([]byte(
		`[{"base_host_virt_addr":4096,"size":4096,"offset":4096,"page_size":4096},{"base_host_virt_addr":65536,"size":4096,"offset":0,"page_size_kib":4096}]`), int64(8192))
	f.Fuzz(func(t *testing.T, data []byte, size int64) {
		if size <= 0 || size > 1<<20 {
			return // the file is ours
		}
		regions, pageSize, err := parseRegions(data, size)
		if err != nil {
			return
		}
		pages := newBitmap(size / pageSize)
		for _, r := range regions {
			for at := r.offset; at < r.offset+r.size; at += uint64(pageSize) {
				if i := int64(at) / pageSize; pages.has(i) {
					t.Fatalf("page %d is in two regions", i)
				} else {
					pages.add(i)
				}
			}
		}
		if got := pages.ranges(size / pageSize); !reflect.DeepEqual(got, []Range{{0, size / pageSize}}) {
			t.Errorf("of %d pages there are %v", size/pageSize, got)
		}
	})
}

func TestSet(t *testing.T) {
	path := filepath.Join(t.TempDir(), "set")
	for _, want := range []*Set{
		{PageSize: 4096, Size: 1 << 20, Ranges: []Range{{0, 1}, {5, 250}, {255, 1}}},
		{PageSize: 2 << 20, Size: 2 << 20},
	} {
		if err := WriteSet(path, want); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadSet(path); err != nil || !reflect.DeepEqual(got, want) {
			t.Errorf("%+v became %+v, %v", want, got, err)
		}
	}
	for name, text := range map[string]string{
		"Empty": "", "Other": "something else\n", "NoSizes": setHeader + "\n", "OddSize": setHeader + "\n4096 5000\n",
		"OddPage": setHeader + "\n1000 5000\n",
		"Outside": setHeader + "\n4096 8192\n1 2\n", "Negative": setHeader + "\n4096 8192\n-1 2\n",
		"None":    setHeader + "\n4096 8192\n0 0\n",
		"Overlap": setHeader + "\n4096 8192\n0 1\n0 1\n", "Words": setHeader + "\n4096 8192\nzero one\n",
		"Huge":  setHeader + "\n4096 8192\n0 9223372036854775807\n",
		"Wraps": setHeader + "\n4096 9223372036854771712\n1 9223372036854775807\n",
		"More":  setHeader + "\n4096 8192\n0 1 1\n", "Line": setHeader + "\n4096 8192\n" + strings.Repeat("1", 70_000),
		"Large": setHeader + "\n4096 8192\n" + strings.Repeat("\n", maxSetFile),
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadSet(path); !errors.Is(err, ErrSet) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
	}
	if _, err := ReadSet(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
}

func FuzzParseSet(f *testing.F) {
	f.Add([]byte(setHeader + "\n4096 8192\n0 1\n1 1\n"))
	f.Add([]byte(setHeader + "\n2097152 2097152\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := parseSet(data)
		if err != nil {
			return
		}
		last := int64(0)
		for _, r := range s.Ranges {
			if r.First < last || r.Pages < 1 || (r.First+r.Pages)*s.PageSize > s.Size {
				t.Errorf("range %+v of %+v", r, s)
			}
			last = r.First + r.Pages
		}
	})
}

func TestBitmap(t *testing.T) {
	b := newBitmap(200)
	for _, i := range []int64{0, 1, 63, 64, 65, 130, 199} {
		b.add(i)
	}
	b.drop(1)
	if got, want := fmt.Sprint(b.ranges(200)), "[{0 1} {63 3} {130 1} {199 1}]"; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if !bytes.Equal([]byte(fmt.Sprint(newBitmap(0).ranges(0))), []byte("[]")) {
		t.Error("nothing has ranges")
	}
}
