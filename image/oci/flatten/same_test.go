package flatten

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"math/rand/v2"
	"path"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// A file as it comes out: what it is, and which names share it.
type outFile struct {
	Type    byte
	Content string
	Mode    int64
	First   string // the alphabetically first of its names
}

// run flattens layers to a tar in place of a file system, in one pass or by a plan.
func run(t *testing.T, layers [][]byte, byPlan bool) (map[string]outFile, error) {
	t.Helper()
	var out bytes.Buffer
	w := &writer{tar: tar.NewWriter(&out), buf: make([]byte, 4096), seed: maphash.MakeSeed(), links: map[uint64]int{}}
	pass := func(v visitor, down bool) error {
		l := limits{maxBytes: 1 << 20, maxEntries: 1 << 10}
		for i := range layers {
			n := i
			if down {
				n = len(layers) - 1 - i
			}
			if err := v.begin(n + 1); err != nil {
				return err
			}
			if err := readTar(bytes.NewReader(layers[n]), true, &l, v.entry); err != nil {
				return err
			}
		}
		return nil
	}
	if !byPlan {
		if err := pass(newShadow(w), true); err != nil {
			return nil, err
		}
		return parse(t, &out), nil
	}
	p := newPlan()
	if err := pass(p, false); err != nil {
		return nil, err
	}
	p.finish()
	if err := pass(&planned{plan: p, writer: w}, true); err != nil {
		return nil, err
	}
	return parse(t, &out), nil
}

// parse reads what was written, and checks what the ext4 writer relies on.
func parse(t *testing.T, r io.Reader) map[string]outFile {
	t.Helper()
	got := map[string]outFile{}
	names := map[string][]string{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := path.Clean(h.Name)
		before, twice := got[name]
		if parent, ok := got[path.Dir(name)]; path.Dir(name) != "." && (!ok || parent.Type != tar.TypeDir) {
			t.Errorf("%s was written before its directory", name)
		}
		if twice && (before.Type != tar.TypeDir || h.Typeflag != tar.TypeDir) {
			t.Errorf("%s was written twice", name)
		}
		if h.Typeflag == tar.TypeLink {
			f, ok := got[h.Linkname]
			if !ok || f.Type == tar.TypeDir {
				t.Errorf("%s was linked to %s, which was not written", name, h.Linkname)
			}
			got[name] = f
			names[f.First] = append(names[f.First], name)
			continue
		}
		content, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		got[name] = outFile{Type: h.Typeflag, Content: string(content), Mode: h.Mode, First: name}
		names[name] = []string{name}
	}
	for _, all := range names {
		first := all[0]
		for _, n := range all {
			first = min(first, n)
		}
		for _, n := range all {
			f := got[n]
			f.First = first
			got[n] = f
		}
	}
	return got
}

// layersOf makes layers of few names out of bytes, so that they meet often.
func layersOf(t *testing.T, data []byte) (layers [][]byte) {
	names := []string{"a", "b", "a/a", "a/b", "b/a", "a/a/a", "a/a/b", "b/a/a", "."}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for n := 0; len(data) > 1 && n < 60; n++ {
		op, arg := data[0], data[1]
		data = data[2:]
		name := names[int(op>>3)%len(names)]
		h := &tar.Header{Name: name, Mode: int64(n + 0o100), Typeflag: tar.TypeReg}
		body := ""
		switch op % 8 {
		case 0, 1:
			body = fmt.Sprintf("%d", n)
			h.Size = int64(len(body))
		case 2:
			h.Typeflag, h.Name = tar.TypeDir, name+"/"
		case 3:
			h.Typeflag, h.Linkname = tar.TypeSymlink, names[int(arg)%len(names)]
		case 4:
			h.Typeflag, h.Linkname = tar.TypeLink, names[int(arg)%len(names)]
		case 5:
			h.Name = path.Join(path.Dir(name), whiteout+path.Base(name))
		case 6:
			h.Name = path.Join(name, opaque)
		case 7:
			layers = append(layers, bytes.Clone(buf.Bytes()))
			buf.Reset()
			w = tar.NewWriter(&buf)
			continue
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, body); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	return append(layers, buf.Bytes())
}

// One pass comes to what the plan comes to, or gives up.
func same(t *testing.T, data []byte) (gaveUp bool) {
	t.Helper()
	layers := layersOf(t, data)
	fast, err := run(t, layers, false)
	if errors.Is(err, errPlan) {
		gaveUp = true
	}
	exact, perr := run(t, layers, true)
	if gaveUp {
		return true
	}
	if (err == nil) != (perr == nil) {
		t.Errorf("one pass: %v, plan: %v", err, perr)
	}
	if diff := cmp.Diff(exact, fast); diff != "" {
		t.Errorf("one pass (+) and the plan (-) differ:\n%s", diff)
	}
	return false
}

func TestOnePassIsAsExactAsThePlan(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	gaveUp := 0
	const rounds = 20_000
	for range rounds {
		data := make([]byte, 2*(1+random.UintN(24)))
		for i := range data {
			data[i] = byte(random.Uint32())
		}
		if same(t, data) {
			gaveUp++
		}
		if t.Failed() {
			t.Fatalf("input %x", data)
		}
	}
	t.Logf("gave up %d times of %d", gaveUp, rounds)
	if gaveUp > rounds*9/10 {
		t.Errorf("one pass gave up %d times of %d: little was compared", gaveUp, rounds)
	}
}

func FuzzOnePassIsAsExactAsThePlan(f *testing.F) {
	f.Add([]byte{0, 0, 7, 0, 5, 0, 16, 0})
	f.Add([]byte{16, 0, 20, 0, 7, 0, 48, 0, 0, 0})
	f.Fuzz(func(t *testing.T, data []byte) { same(t, data) })
}
