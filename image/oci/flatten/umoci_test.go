package flatten_test

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// Random images come out as umoci unpacks them. Where the two differ on purpose:
//
//   - A whiteout removes names of lower layers alone, wherever in its layer it stands, as the
//     specification has it; umoci's removes what its own layer has made before. No whiteout here
//     names what its layer has made.
//   - A directory that a layer with an opaque mark above it only implies loses the mode that a
//     lower layer gave it; umoci leaves it. No mode of a directory is compared where there is such
//     a mark.
//   - umoci refuses an entry below a file, hard links to nothing that are overridden later, and
//     links to themselves. Images that umoci refuses are not compared.
//   - umoci follows 255 symbolic links on the way to a name, we 40, as Linux does.
//
// The seed is printed; SMARTVM_SEED and SMARTVM_IMAGES set it and the number of images.
func TestLayers_LikeUmoci(t *testing.T) {
	testenv.Require(t, testenv.Root)
	if dir := os.Getenv("FLATTEN_UNPACK"); dir != "" {
		unpackAll(t, dir)
		return
	}
	umoci := testenv.Fixture(t, fixtures.Umoci)
	seed, count := uint64(time.Now().UnixNano()), 500
	if text := os.Getenv("SMARTVM_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	if text := os.Getenv("SMARTVM_IMAGES"); text != "" {
		var err error
		if count, err = strconv.Atoi(text); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SMARTVM_SEED=%d", seed)
	tmp := t.TempDir()
	store := &layout{t: t, dir: filepath.Join(tmp, "layout")}
	images := make([][][]ent, count)
	errs := make([]error, count)
	for n := range images {
		g := &generator{
			Rand: rand.New(rand.NewPCG(seed, uint64(n))), links: map[string]string{},
			alias: map[string][]string{},
		}
		images[n] = g.image()
		store.add(strconv.Itoa(n), images[n])
		errs[n] = oursTo(t, images[n], filepath.Join(tmp, fmt.Sprintf("%d.ext4", n)), n%20 == 0)
	}
	store.finish()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", self, "-test.run", "^TestLayers_LikeUmoci$")
	cmd.Env = append(os.Environ(), "FLATTEN_UNPACK="+tmp, "SMARTVM_IMAGES="+strconv.Itoa(count), "FLATTEN_UMOCI="+umoci)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	compared := 0
	for n := range images {
		theirs, err := os.ReadFile(filepath.Join(tmp, fmt.Sprintf("%d.theirs", n)))
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		compared++
		want := plainly(images[n], theirs)
		if errs[n] != nil {
			if strings.Contains(errs[n].Error(), "more than 40 symbolic links") {
				continue // umoci follows 255
			}
			t.Errorf("image %d: umoci takes it, we do not: %v\n%s\numoci:\n%s", n, errs[n], describeImage(images[n]),
				strings.Join(want, "\n"))
			continue
		}
		ours, err := os.ReadFile(filepath.Join(tmp, fmt.Sprintf("%d.ours", n)))
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, plainly(images[n], ours)); diff != "" {
			t.Errorf("image %d: -umoci +ours:\n%s\nof\n%s", n, diff, describeImage(images[n]))
		}
	}
	t.Logf("compared %d images of %d", compared, count)
	if compared < count/2 {
		t.Errorf("umoci took %d images of %d: little was compared", compared, count)
	}
}

// oursTo flattens an image to a file, which is empty after an error.
func oursTo(t *testing.T, image [][]ent, to string, check bool) error {
	f, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	_, err = flatten.Layers(t.Context(), layers(t, image...), f, flatten.Options{})
	switch {
	case err != nil:
		if err := f.Truncate(0); err != nil {
			t.Fatal(err)
		}
	case check:
		fsck(t, f)
	}
	return errors.Join(err, f.Close())
}

// unpackAll writes what umoci makes of all images, and what is in ours, to files. It is alone in a
// mount namespace.
func unpackAll(t *testing.T, dir string) {
	syscall.Umask(0o022) // umoci makes what an image only implies by it
	count, err := strconv.Atoi(os.Getenv("SMARTVM_IMAGES"))
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	mnt := filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o700); err != nil {
		t.Fatal(err)
	}
	for n := range count {
		theirs := fmt.Sprintf("unpacked-%d", n)
		if exec.CommandContext(t.Context(), os.Getenv("FLATTEN_UMOCI"), "raw", "unpack", "--image",
			fmt.Sprintf("layout:%d", n), theirs).Run() == nil {
			list(t, theirs, fmt.Sprintf("%d.theirs", n))
		}
		image := fmt.Sprintf("%d.ext4", n)
		if fi, err := os.Stat(image); err != nil || fi.Size() == 0 {
			continue // we have refused it
		}
		if out, err := exec.CommandContext(t.Context(), "mount", "-t", "ext4", "-o", "ro,loop", image,
			mnt).CombinedOutput(); err != nil {
			t.Fatalf("mount image %d: %v\n%s", n, err, out)
		}
		list(t, mnt, fmt.Sprintf("%d.ours", n))
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
	}
}

// list writes a line for each name in a tree to a file: what it is, and which other name it shares.
func list(t *testing.T, root, to string) {
	var lines []string
	first := map[uint64]string{}
	err := filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, name)
		if err != nil {
			return err
		}
		if rel == "lost+found" {
			return fs.SkipDir
		}
		fi, err := d.Info()
		if err != nil {
			return err
		}
		st := fi.Sys().(*syscall.Stat_t)
		if d.IsDir() { // its time is when something was written into it, if umoci has restored none
			lines = append(lines, fmt.Sprintf("%s directory %d:%d %v", rel, st.Uid, st.Gid, fi.Mode()))
			return nil
		}
		if other := first[st.Ino]; other != "" {
			lines = append(lines, rel+" = "+other)
			return nil
		}
		first[st.Ino] = rel
		var what []byte
		note := make([]byte, 8)
		switch {
		case fi.Mode().IsRegular():
			what, err = os.ReadFile(name)
		case fi.Mode()&fs.ModeSymlink != 0:
			var link string
			link, err = os.Readlink(name)
			what = []byte(link)
		}
		size, _ := unix.Lgetxattr(name, "user.note", note)
		lines = append(lines,
			fmt.Sprintf("%s %d:%d %v %d %q %q", rel, st.Uid, st.Gid, fi.Mode(), st.Mtim.Sec, what, note[:max(size, 0)]))
		return err
	})
	if err = errors.Join(err, os.WriteFile(to, []byte(strings.Join(lines, "\n")), 0o600)); err != nil {
		t.Fatal(err)
	}
}

var dirMode = regexp.MustCompile(`^(\S+ directory \S+) \S+$`)

// plainly is a listing without the modes of directories if the image has opaque marks.
func plainly(image [][]ent, list []byte) []string {
	lines := strings.Split(string(list), "\n")
	if slices.ContainsFunc(slices.Concat(image...), func(e ent) bool { return path.Base(e.Name) == ".wh..wh..opq" }) {
		for n, line := range lines {
			lines[n] = dirMode.ReplaceAllString(line, "$1")
		}
	}
	return lines
}

func describeImage(image [][]ent) string {
	var text strings.Builder
	for n, l := range image {
		for _, e := range l {
			fmt.Fprintf(&text, "layer %d: %c %s %o -> %s\n", n+1, e.Typeflag, e.Name, e.Mode, e.Linkname)
		}
	}
	return text.String()
}

// generator makes images of few names, so that they meet often.
type generator struct {
	*rand.Rand
	alias map[string][]string // symbolic links to a directory
	links map[string]string   // where symbolic links lead, by the last part of their names
	names []string
	files []string        // those of them that are no directories
	made  map[string]bool // parts of names that the layer has made
	count int
}

func (g *generator) image() (image [][]ent) {
	for range 1 + g.IntN(4) {
		g.made = map[string]bool{}
		var l []ent
		for range 1 + g.IntN(8) {
			if e, ok := g.entry(); ok {
				l = append(l, e)
			}
		}
		image = append(image, l)
	}
	return image
}

// name is a new name or one that was there.
func (g *generator) name() string {
	if len(g.names) > 0 && g.IntN(3) == 0 {
		return g.by(g.pick(g.names))
	}
	var parts []string
	for range 1 + g.IntN(3) {
		parts = append(parts, g.pick([]string{"a", "b", "c", "d", "e"}))
	}
	if g.IntN(8) > 0 { // a file's: nothing is below it
		parts[len(parts)-1] = g.pick([]string{"f", "g", "h"})
	}
	return path.Join(parts...)
}

// by is a name by way of a symbolic link to its directory, if there is one.
func (g *generator) by(name string) string {
	if links := g.alias[path.Dir(name)]; len(links) > 0 && g.IntN(2) == 0 {
		return path.Join(g.pick(links), path.Base(name))
	}
	return name
}

func (g *generator) pick(all []string) string { return all[g.IntN(len(all))] }

// note remembers that the layer makes a name, by whatever symbolic links.
func (g *generator) note(name string) {
	for part := range strings.SplitSeq(name, "/") {
		if !g.made[part] {
			g.made[part] = true
			g.note(g.links[part])
		}
	}
}

func (g *generator) entry() (ent, bool) {
	g.count++
	name := g.name()
	var e ent
	switch op := g.IntN(20); {
	case op < 6:
		e = file(name, fmt.Sprint(g.count))
		e.Mode = []int64{0o644, 0o4755, 0o600}[g.IntN(3)]
		e.Uid = []int{0, 7, 100_000}[g.IntN(3)]
	case op < 9:
		name = path.Join(strings.TrimRight(name, "/fgh"), g.pick([]string{"a", "b", "c", "d", "e"}))
		e = dir(name, []int64{0o755, 0o700, 0o1777}[g.IntN(3)])
	case op < 13:
		to := g.pick([]string{"", "/", "../", "../../../", "no/../", "./"}) + g.name()
		if g.IntN(10) == 0 {
			to = g.pick([]string{".", "..", "/", path.Base(name)})
		}
		if g.IntN(2) == 0 {
			name = path.Join(strings.TrimRight(name, "/fgh"), g.pick([]string{"a", "b", "c", "d", "e"}))
		}
		if len(g.names) > 0 && g.IntN(2) == 0 {
			if dir := path.Dir(g.pick(g.names)); dir != "." {
				to = "/" + dir
				g.alias[dir] = append(g.alias[dir], name)
			}
		}
		e = symlink(name, to)
		g.links[path.Base(name)] += "/" + to
	case op < 15:
		if len(g.files) == 0 { // there hardly is a target, without which umoci refuses the image
			return e, false
		}
		e = link(name, g.pick([]string{"", "/", "./"})+g.by(g.pick(g.files)))
		g.links[path.Base(name)] += "/" + g.links[path.Base(e.Linkname)]
	case op == 15:
		e = ent{tar.Header{Typeflag: tar.TypeFifo, Name: name, Mode: 0o600}, ""}
	case op < 18:
		if len(g.names) > 0 {
			name = g.by(g.pick(g.names))
		}
		if g.made[path.Base(name)] {
			return e, false
		}
		e = file(path.Join(path.Dir(name), ".wh."+path.Base(name)), "")
		e.Name = g.odd(e.Name)
		return e, true
	default:
		if len(g.names) > 0 {
			name = path.Dir(g.by(g.pick(g.names)))
		}
		e = file(path.Join(name, ".wh..wh..opq"), "")
		return e, true
	}
	g.note(name)
	g.names = append(g.names, name)
	if e.Typeflag != tar.TypeDir {
		g.files = append(g.files, name)
	}
	e.Name = g.odd(e.Name)
	if e.Typeflag == tar.TypeReg && g.IntN(4) == 0 {
		e.PAXRecords = map[string]string{"SCHILY.xattr.user.note": "x", "comment": "odd"}
	}
	return e, true
}

// odd is a name as some programs write it.
func (g *generator) odd(name string) string {
	return g.pick([]string{"", "", "", "./", "/", ".//"}) + name
}

// layout is an OCI layout of many images:
// https://github.com/opencontainers/image-spec/blob/main/image-layout.md
type layout struct {
	t     *testing.T
	dir   string
	index []descriptor
}

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int               `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

const ociType = "application/vnd.oci.image."

func (l *layout) write(name string, content []byte) {
	l.t.Helper()
	name = filepath.Join(l.dir, name)
	if err := errors.Join(os.MkdirAll(filepath.Dir(name), 0o700), os.WriteFile(name, content, 0o600)); err != nil {
		l.t.Fatal(err)
	}
}

func (l *layout) blob(kind string, content []byte) descriptor {
	digest := fmt.Sprintf("%x", sha256.Sum256(content))
	l.write("blobs/sha256/"+digest, content)
	return descriptor{MediaType: ociType + kind, Digest: "sha256:" + digest, Size: len(content)}
}

func (l *layout) json(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		l.t.Fatal(err)
	}
	return text
}

func (l *layout) add(tag string, image [][]ent) {
	var blobs []descriptor
	var ids []string
	for n, entries := range image {
		d := l.blob("layer.v1.tar", tarOf(l.t, n%2 == 0, entries...))
		blobs, ids = append(blobs, d), append(ids, d.Digest)
	}
	config := l.blob("config.v1+json", l.json(map[string]any{
		"os": "linux", "architecture": "amd64", "rootfs": map[string]any{"type": "layers", "diff_ids": ids},
	}))
	m := l.blob("manifest.v1+json", l.json(map[string]any{
		"schemaVersion": 2, "mediaType": ociType + "manifest.v1+json", "config": config, "layers": blobs,
	}))
	m.Annotations = map[string]string{"org.opencontainers.image.ref.name": tag}
	l.index = append(l.index, m)
}

func (l *layout) finish() {
	l.write("oci-layout", []byte(`{"imageLayoutVersion":"1.0.0"}`))
	l.write("index.json", l.json(map[string]any{"schemaVersion": 2, "manifests": l.index}))
}
