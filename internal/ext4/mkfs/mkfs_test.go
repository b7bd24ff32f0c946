package mkfs_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"iter"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/internal/ext4"
	"push.rocks/smartvm/internal/ext4/mkfs"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// node is a name in a test's tree.
type node struct {
	*mkfs.Inode
	body     []byte // of a file
	xattrs   map[string]string
	children map[string]*node
}

// named makes a node what the Writer wants.
type named struct{ *node }

func (n named) Inode() *mkfs.Inode { return n.node.Inode }

func (n named) Children() iter.Seq2[string, mkfs.Node] {
	return func(yield func(string, mkfs.Node) bool) {
		for name, c := range n.children {
			if !yield(name, named{c}) {
				return
			}
		}
	}
}

var someTime = time.Unix(1_600_000_000, 123_456_789)

func dir(children map[string]*node) *node {
	return &node{Inode: &mkfs.Inode{Mode: unix.S_IFDIR | 0o755, ModTime: someTime}, children: children}
}

func file(body []byte) *node {
	return &node{Inode: &mkfs.Inode{Mode: unix.S_IFREG | 0o644, ModTime: someTime}, body: body}
}

// write makes a file system of a tree.
func write(t testing.TB, root *node) (*os.File, error) {
	t.Helper()
	f, w := start(t)
	if err := contents(t, w, root, map[*node]bool{}); err != nil {
		return f, err
	}
	return f, w.Finish(named{root})
}

func start(t testing.TB) (*os.File, *mkfs.Writer) {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	w, err := mkfs.New(f, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return f, w
}

// contents writes what files hold, each once.
func contents(t testing.TB, w *mkfs.Writer, n *node, written map[*node]bool) (err error) {
	for _, name := range slices.Sorted(maps.Keys(n.children)) {
		if err := contents(t, w, n.children[name], written); err != nil {
			return err
		}
	}
	if written[n] {
		return nil
	}
	written[n] = true
	if n.body != nil {
		n.Content, err = w.Content(t.Context(), bytes.NewReader(n.body))
	}
	if err == nil {
		n.Attributes, err = w.Attributes(n.xattrs)
	}
	return err
}

// made is a file system that e2fsck finds nothing wrong with.
func made(t testing.TB, root *node) *os.File {
	t.Helper()
	f, err := write(t, root)
	if err != nil {
		t.Fatal(err)
	}
	fsck(t, f)
	return f
}

func fsck(t testing.TB, f *os.File) {
	t.Helper()
	testenv.Fixture(t, fixtures.MkfsExt4) // of the same package
	out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", f.Name()).CombinedOutput()
	if err != nil || bytes.Contains(out, []byte("?")) { // a question that -n has answered
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
}

// attributes are the extended ones that a tar's header has.
func attributes(h *tar.Header) map[string]string {
	all := map[string]string{}
	for key, value := range h.PAXRecords {
		if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			all[name] = value
		}
	}
	return all
}

// describe says of a file what a tar's header does.
func describe(h *tar.Header, body []byte) string {
	return fmt.Sprintf("%c %o %d:%d %d.%d %q %d:%d %q %d %x",
		h.Typeflag, h.Mode, h.Uid, h.Gid, h.ModTime.Unix(), h.ModTime.Nanosecond(), h.Linkname, h.Devmajor, h.Devminor,
		attributes(h), len(body), sha256.Sum256(body))
}

// want describes a tree by names, links by the first of theirs.
func want(root *node) map[string]string {
	all, first := map[string]string{}, map[*mkfs.Inode]string{}
	kinds := map[uint16]byte{
		unix.S_IFREG: tar.TypeReg, unix.S_IFDIR: tar.TypeDir, unix.S_IFLNK: tar.TypeSymlink,
		unix.S_IFIFO: tar.TypeFifo, unix.S_IFCHR: tar.TypeChar, unix.S_IFBLK: tar.TypeBlock,
	}
	var walk func(name string, n *node)
	walk = func(name string, n *node) {
		i := n.Inode
		h := &tar.Header{
			Typeflag: kinds[i.Mode&unix.S_IFMT], Mode: int64(i.Mode & 0o7777),
			Uid: int(i.UID), Gid: int(i.GID), ModTime: i.ModTime,
			Linkname: i.Target, Devmajor: int64(i.Major), Devminor: int64(i.Minor), PAXRecords: map[string]string{},
		}
		for name, value := range n.xattrs {
			h.PAXRecords["SCHILY.xattr."+name] = value
		}
		if before, linked := first[i]; linked {
			all[name] = "= " + before
			return
		}
		first[i] = name
		all[name] = describe(h, n.body)
		for _, base := range slices.Sorted(maps.Keys(n.children)) {
			walk(path.Join(name, base), n.children[base])
		}
	}
	walk(".", root)
	return all
}

// got describes a file system, as our own reader has it.
func got(t testing.TB, f *os.File) map[string]string {
	t.Helper()
	fs, err := ext4.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	r, w := io.Pipe()
	go func() {
		tw := tar.NewWriter(w)
		err := fs.Tar(t.Context(), tw, ext4.Limits{Bytes: 1 << 40, Entries: 1 << 20})
		w.CloseWithError(errors.Join(err, tw.Close()))
	}()
	all := map[string]string{}
	for in := tar.NewReader(r); ; {
		h, err := in.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		name := path.Clean(h.Name)
		if h.Typeflag == tar.TypeLink {
			all[name] = "= " + h.Linkname
			continue
		}
		body, err := io.ReadAll(in)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = describe(h, body)
	}
}

// mounted runs a shell script where f is mounted at $1, and returns what it says.
func mounted(t testing.TB, f *os.File, script string, stdin io.Reader) string {
	t.Helper()
	testenv.Require(t, testenv.Root)
	script = `mount -t ext4 -o ro,loop "$0" "$1"; cd "$1"; ` + script
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-euc", script, f.Name(), t.TempDir())
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = stdin, &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, stderr.String())
	}
	return string(out)
}

// Random trees are sound, and read as what they were made of. SMARTVM_SEED sets the seed.
func TestFinish_Random(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	if text := os.Getenv("SMARTVM_SEED"); text != "" {
		var err error
		if seed, err = strconv.ParseUint(text, 10, 64); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("SMARTVM_SEED=%d", seed)
	for n := range uint64(25) {
		g := &generator{Rand: rand.New(rand.NewPCG(seed, n))}
		root := dir(map[string]*node{})
		for range g.IntN(200) {
			g.grow(root)
		}
		if diff := cmp.Diff(want(root), got(t, made(t, root))); diff != "" {
			t.Fatalf("tree %d: -want +got:\n%s", n, diff)
		}
	}
}

// generator makes trees.
type generator struct {
	*rand.Rand
	files []*node
}

// name is of any bytes that a name may have.
func (g *generator) name() string {
	b := make([]byte, 1+g.IntN(1<<(1+g.IntN(8))-1))
	for k := range b {
		for b[k] == 0 || b[k] == '/' || string(b) == "." || string(b) == ".." {
			b[k] = byte(g.Uint32())
		}
	}
	return string(b)
}

// grow adds a file of any kind somewhere in a directory.
func (g *generator) grow(d *node) {
	for depth := 0; depth < 12 && g.IntN(3) > 0; depth++ {
		for _, name := range slices.Sorted(maps.Keys(d.children)) {
			if c := d.children[name]; c.children != nil && g.IntN(3) == 0 {
				d = c
				break
			}
		}
	}
	var n *node
	switch g.IntN(8) {
	case 0, 1:
		n = dir(map[string]*node{})
	case 2:
		n = file(nil)
		n.Mode, n.Target = unix.S_IFLNK|0o777, strings.Repeat("t", 1+g.IntN(1<<(1+g.IntN(12))-1))
	case 3:
		n = file(nil)
		n.Mode = []uint16{unix.S_IFIFO, unix.S_IFCHR, unix.S_IFBLK}[g.IntN(3)] | 0o600
		if n.Mode&unix.S_IFMT != unix.S_IFIFO {
			n.Major, n.Minor = g.Uint32N(1<<(1+g.IntN(12))), g.Uint32N(1<<(1+g.IntN(20)))
		}
	case 4:
		if len(g.files) > 0 {
			d.children[g.name()] = g.files[g.IntN(len(g.files))]
			return
		}
		fallthrough
	default:
		n = file(g.body())
	}
	n.UID, n.GID, n.Mode = g.Uint32(), g.Uint32(), n.Mode|uint16(g.IntN(8))<<9
	n.ModTime = time.Unix(g.Int64N(3<<32)-1<<31, g.Int64N(1e9))
	for range g.IntN(4) {
		if n.xattrs == nil {
			n.xattrs = map[string]string{}
		}
		name := strings.NewReplacer("=", "e", "\n", "n").Replace(g.name())
		space := []string{"user.", "trusted.", "security."}[g.IntN(3)]
		n.xattrs[space+name] = strings.Repeat("v\x00", g.IntN(1<<(1+g.IntN(9))))
	}
	d.children[g.name()] = n
	if n.children == nil {
		g.files = append(g.files, n)
	}
}

// body is of pieces that are zeros or not.
func (g *generator) body() []byte {
	body := []byte{}
	for range g.IntN(8) {
		piece := make([]byte, g.IntN(1<<(1+g.IntN(18))))
		if g.IntN(3) > 0 {
			for k := range piece {
				piece[k] = byte(g.Uint32())
			}
		}
		body = append(body, piece...)
	}
	return body
}

// A directory is found through by the kernel, however large it is.
func TestFinish_Directories(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	names := func(count, size int) (all []string) {
		for n := range count {
			b := fmt.Appendf(nil, "%x-", n)
			for len(b) < size {
				b = append(b, byte('!'+random.IntN(255-'!'))) // no blanks
			}
			all = append(all, strings.NewReplacer("/", "_", "\x7f", "_", `\`, "_", `"`, "_", "'", "_").Replace(string(b)))
		}
		return all
	}
	for name, c := range map[string]struct {
		names  []string
		blocks int
	}{
		"one name":                   {names(1, 3), 1},
		"a block that is full":       {names((4096-24)/16, 8), 1},
		"one name more":              {names((4096-24)/16+1, 8), 2},
		"an index of one level":      {names(5_000, 20), 0},
		"more inodes than blocks":    {names(33_000, 6), 0},
		"a root that is full":        {names(508*15, 255), 509},
		"an index of two levels":     {names(508*15+1, 255), 1 + 509 + 1},
		"more than a node of leaves": {names(511*15+1, 255), 1 + 512 + 2},
	} {
		t.Run(name, func(t *testing.T) {
			d := map[string]*node{}
			for _, name := range c.names {
				d[name] = file(nil)
			}
			f := made(t, dir(map[string]*node{"d": dir(d)}))
			if all := got(t, f); len(all) != len(c.names)+2 {
				t.Errorf("%d names, want %d", len(all), len(c.names)+2)
			}
			if fi, err := f.Stat(); err != nil || fi.Size() > 1<<20+int64(len(c.names))*(256+300) {
				t.Errorf("%d bytes for %d names: %v", fi.Size(), len(c.names), err)
			}
			asked := strings.Join(c.names, "\n")
			said := mounted(t, f, `cd d; stat -c %s .; xargs -d '\n' stat -c %n; test ! -e nothing; ls -f . | wc -l`,
				strings.NewReader(asked))
			size, said, _ := strings.Cut(said, "\n")
			if c.blocks != 0 && size != strconv.Itoa(c.blocks*4096) {
				t.Errorf("%s bytes, want %d blocks", size, c.blocks)
			}
			if want := fmt.Sprintf("%s\n%d\n", asked, len(c.names)+2); said != want {
				t.Errorf("%d bytes of names were found, want %d", len(said), len(want))
			}
		})
	}
}

// Names that have the same hash are found on both sides of the end of a block.
func TestFinish_Collision(t *testing.T) {
	const inBlock = 4096 / 20
	var all []string
	for n := range 300_000 {
		all = append(all, fmt.Sprintf("name-%07d", n)) // 20 bytes in a directory
	}
	slices.SortFunc(all, func(a, b string) int { return int(int64(mkfs.Hash(a)) - int64(mkfs.Hash(b))) })
	tried := 0
	for n := 2 * inBlock; n+inBlock < len(all) && tried < 3; n++ {
		if mkfs.Hash(all[n-1]) != mkfs.Hash(all[n]) {
			continue
		}
		tried++
		d := map[string]*node{}
		for _, name := range all[n-2*inBlock : n+inBlock] { // n-1 ends the second block
			d[name] = file(nil)
		}
		said := mounted(t, made(t, dir(map[string]*node{"d": dir(d)})), "cd d; stat -c %n "+all[n-1]+" "+all[n], nil)
		if want := all[n-1] + "\n" + all[n] + "\n"; said != want {
			t.Errorf("found %q, want %q", said, want)
		}
	}
	if tried == 0 {
		t.Error("no two names have the same hash")
	}
}

// pieces reads as so many pieces, each a hole and a block of its number.
func pieces(count, hole int) []byte {
	body := make([]byte, 0, count*(hole+4096))
	for n := range count {
		body = append(body, make([]byte, hole)...)
		body = append(body, bytes.Repeat(fmt.Appendf(nil, "%08d", n), 4096/8)...)
	}
	return body
}

// Files have as many extents as they need, and none where they have zeros.
func TestContent_Extents(t *testing.T) {
	const hole = 16 * 4096
	for name, c := range map[string]struct {
		body []byte
		used int64 // blocks that a file takes
	}{
		"empty":                      {[]byte{}, 0},
		"a byte":                     {[]byte("x"), 1},
		"zeros":                      {make([]byte, 100_000), 0},
		"zeros at the end":           {append([]byte("x"), make([]byte, 5*4096)...), 1},
		"a short run of zeros":       {pieces(2, hole-4096), 2 * 16},
		"four extents":               {pieces(4, hole), 4},
		"a leaf that is full":        {pieces(340, hole), 340 + 1},
		"two leaves":                 {pieces(341, hole), 341 + 2},
		"two levels":                 {pieces(4*340+1, hole), 4*340 + 1 + 5 + 1},
		"zeros over many reads":      {append(append([]byte("x"), make([]byte, 1<<20)...), 'y'), 2},
		"more blocks than an extent": {pieces(1<<15+1, 0), 1<<15 + 1},
	} {
		t.Run(name, func(t *testing.T) {
			root := dir(map[string]*node{"f": file(c.body)})
			f := made(t, root)
			if diff := cmp.Diff(want(root), got(t, f)); diff != "" {
				t.Error(diff)
			}
			var fi unix.Stat_t
			if err := unix.Fstat(int(f.Fd()), &fi); err != nil {
				t.Fatal(err)
			}
			if room := c.used*4096 + 64<<10; fi.Blocks*512 > room {
				t.Errorf("%d bytes on disk, want %d at most", fi.Blocks*512, room)
			}
			sum := fmt.Sprintf("%d\n%x  f\n", c.used*8, sha256.Sum256(c.body))
			if said := mounted(t, f, "stat -c %b f; sha256sum f", nil); said != sum {
				t.Errorf("%s, want %s", said, sum)
			}
		})
	}
}

// What is given back takes no room, and is free.
func TestFree(t *testing.T) {
	f, w := start(t)
	root := dir(map[string]*node{})
	put := func(body []byte) *node {
		t.Helper()
		n := file(body)
		n.xattrs = map[string]string{"user.large": strings.Repeat("x", 1000)}
		if err := contents(t, w, n, map[*node]bool{}); err != nil {
			t.Fatal(err)
		}
		return n
	}
	for n := range 4 {
		root.children[strconv.Itoa(n)] = put(pieces(3+n, 0))
		w.Free(put(pieces(2000, 0)).Inode)
		w.Free(put(pieces(1, 0)).Inode) // which is not written yet
	}
	if err := w.Finish(named{root}); err != nil {
		t.Fatal(err)
	}
	fsck(t, f)
	if diff := cmp.Diff(want(root), got(t, f)); diff != "" {
		t.Error(diff)
	}
	fi, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if used := fi.Sys().(*syscall.Stat_t).Blocks * 512; fi.Size() < 4*2000*4096 || used > 256<<10 {
		t.Errorf("%d bytes of %d are on disk", used, fi.Size())
	}
	if used := mounted(t, f, "df --output=used -B 4096 .|tail -n 1", nil); len(strings.TrimSpace(used)) > 2 {
		t.Errorf("%s blocks are in use", used)
	}
}

// Times are right before 1970 and after 2038, to the nanosecond; the rest of the kernel's view too.
func TestFinish_Kernel(t *testing.T) {
	d := map[string]*node{}
	var lines []string
	for n, at := range map[string]time.Time{
		"1901": time.Unix(-1<<31, 0), "1969": time.Unix(-1, 0), "1970": time.Unix(0, 1), "2038": time.Unix(1<<31-1, 5),
		"2039": time.Unix(1<<31, 6), "2106": time.Unix(1<<32, 7), "2242": time.Unix(1<<33, 8),
		"2310": time.Unix(1<<33+1<<31-1, 999_999_999),
	} {
		d[n] = file(nil)
		d[n].ModTime = at
		lines = append(lines, fmt.Sprintf("%s %d.%09d 1 regular empty file 644 0:0 0 0", n, at.Unix(), at.Nanosecond()))
	}
	special := func(name string, mode uint16, line string) *node {
		n := file(nil)
		n.Mode, n.ModTime = mode, time.Unix(7, 0)
		d[name] = n
		lines = append(lines, name+" 7.000000000 "+line)
		return n
	}
	special("fifo", unix.S_IFIFO|0o601, "1 fifo 601 0:0 0 0")
	special("null", unix.S_IFCHR|0o666, "1 character special file 666 0:0 1 3").Major = 1
	d["null"].Minor = 3
	special("big", unix.S_IFBLK|0o600, "1 block special file 600 0:0 103 11170").Major = 259
	d["big"].Minor = 70000
	special("owned", unix.S_IFREG|0o6755, "1 regular empty file 6755 100000:3000000000 0 0").UID = 100000
	d["owned"].GID = 3000000000
	d["linked"] = special("link", unix.S_IFREG|0o600, "2 regular empty file 600 0:0 0 0")
	lines = append(lines, "linked 7.000000000 2 regular empty file 600 0:0 0 0")
	long := strings.Repeat("l", 4095)
	for name, target := range map[string]string{"s59": long[:59], "s60": long[:60], "s4095": long} {
		special(name, unix.S_IFLNK|0o777, "1 symbolic link 777 0:0 0 0").Target = target
	}
	d["attributes"] = file(nil)
	d["attributes"].xattrs = map[string]string{
		"user.empty": "", "user.a": "1", "trusted.b": "22", "security.c": strings.Repeat("3", 3900),
	}
	few := special("few", unix.S_IFREG|0o644, "1 regular empty file 644 0:0 0 0")
	few.xattrs = map[string]string{"user.x": "y", "user.empty": ""}
	f := made(t, dir(d))
	said := mounted(t, f, `stat -c "%n %.9Y %h %F %a %u:%g %t %T" -- * | grep -v "^lost+found\|^attributes"`, nil)
	slices.Sort(lines)
	heard := strings.Split(strings.TrimSpace(said), "\n")
	slices.Sort(heard)
	if diff := cmp.Diff(lines, heard); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	said = mounted(t, f, `readlink s59 s60 s4095; stat -c %a lost+found`, nil)
	if diff := cmp.Diff(long[:59]+"\n"+long[:60]+"\n"+long+"\n700\n", said); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	said = mounted(t, f, `tar --xattrs --xattrs-include='*' -cf - attributes few`, nil)
	packed := tar.NewReader(strings.NewReader(said))
	for _, name := range []string{"attributes", "few"} {
		h, err := packed.Next()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(d[name].xattrs, attributes(h)); diff != "" {
			t.Errorf("%s: -want +got:\n%s", name, diff)
		}
	}
}

// What ext4 has no number for is not counted, and what it cannot have is refused by name.
func TestFinish_Many(t *testing.T) {
	many := map[string]*node{}
	for n := range 64_999 {
		many[strconv.Itoa(n)] = dir(nil)
	}
	few := dir(map[string]*node{"d": dir(many), "e": dir(map[string]*node{"f": dir(nil)})})
	if said := mounted(t, made(t, few), "stat -c %h d e . d/7", nil); said != "1\n3\n5\n2\n" {
		t.Errorf("links: %q", said)
	}
	links := map[string]*node{}
	linked := file([]byte("x"))
	for n := range 65_000 {
		links[fmt.Sprintf("%05d", n)] = linked
	}
	root := dir(map[string]*node{"d": dir(links)})
	if said := mounted(t, made(t, root), "stat -c %h d/00007", nil); said != "65000\n" {
		t.Errorf("links: %q", said)
	}
	links["over"] = linked
	root = dir(map[string]*node{"d": dir(links)})
	*linked.Inode = *file(nil).Inode
	wrong := map[string]*node{
		`"d/over": more than 65000 hard links`: root,
	}
	odd := func(change func(n *node)) *node {
		n := file(nil)
		change(n)
		return dir(map[string]*node{"a": dir(map[string]*node{"odd": n})})
	}
	wrong[`"a/odd": a symbolic link to a name of 4096`] = odd(func(n *node) {
		n.Mode, n.Target = unix.S_IFLNK, strings.Repeat("x", 4096)
	})
	wrong[`"a/odd": mode 0140000`] = odd(func(n *node) { n.Mode = unix.S_IFSOCK })
	wrong[`"lost+found": must be a directory`] = dir(map[string]*node{"lost+found": file(nil)})
	wrong[`".": must be a directory`] = file(nil)
	wrong[`: a name of 256 bytes`] = dir(map[string]*node{strings.Repeat("x", 256): file(nil)})
	for text, root := range wrong {
		var named *mkfs.FileError
		if _, err := write(t, root); !errors.As(err, &named) || !strings.Contains(err.Error(), text) {
			t.Errorf("%v, want %s", err, text)
		}
	}
}

func TestAttributes_Refused(t *testing.T) {
	_, w := start(t)
	for text, all := range map[string]map[string]string{
		"4072 bytes of extended attributes, where there is room for 4064": {"user.a": strings.Repeat("x", 4045)},
		`an extended attribute "system.posix_acl_access"`:                 {"system.posix_acl_access": ""},
		`an extended attribute "user."`:                                   {"user.a": "", "user.": ""},
	} {
		if _, err := w.Attributes(all); err == nil || err.Error() != text {
			t.Errorf("%v, want %s", err, text)
		}
	}
	if _, err := w.Attributes(map[string]string{"user.a": strings.Repeat("x", 4040)}); err != nil {
		t.Error(err)
	}
}

// An image's own lost+found stays what it is.
func TestFinish_LostAndFound(t *testing.T) {
	lost := dir(map[string]*node{"f": file([]byte("x"))})
	lost.Mode = unix.S_IFDIR | 0o711
	root := dir(map[string]*node{"lost+found": lost})
	if diff := cmp.Diff(want(root), got(t, made(t, root))); diff != "" {
		t.Error(diff)
	}
}

// The same tree gives the same bytes, whatever was in the file before.
func TestFinish_Same(t *testing.T) {
	var images [][]byte
	for range 2 {
		g := &generator{Rand: rand.New(rand.NewPCG(7, 7))}
		root := dir(map[string]*node{})
		for range 300 {
			g.grow(root)
		}
		f, err := os.Create(filepath.Join(t.TempDir(), "image"))
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := f.Write(bytes.Repeat([]byte("before"), 100_000*len(images))); err != nil {
			t.Fatal(err)
		}
		w, err := mkfs.New(f, 1<<30)
		if err == nil {
			err = contents(t, w, root, map[*node]bool{})
		}
		if err == nil {
			err = w.Finish(named{root})
		}
		if err != nil {
			t.Fatal(err)
		}
		image, err := os.ReadFile(f.Name())
		if err != nil {
			t.Fatal(err)
		}
		images = append(images, image)
	}
	if !bytes.Equal(images[0], images[1]) {
		t.Errorf("%d and %d bytes differ", len(images[0]), len(images[1]))
	}
}

// Errors of what is read, of the context and of the file end a content.
func TestContent_Errors(t *testing.T) {
	f, w := start(t)
	errRead := errors.New("read")
	r := io.MultiReader(bytes.NewReader(make([]byte, 5000)), failing{errRead})
	if _, err := w.Content(t.Context(), r); !errors.Is(err, errRead) {
		t.Errorf("%v, want that of the reader", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := w.Content(ctx, bytes.NewReader(pieces(100, 0))); !errors.Is(err, context.Canceled) {
		t.Errorf("%v, want that of the context", err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Content(t.Context(), bytes.NewReader(pieces(300, 0))); !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v, want that of the file", err)
	}
	if err := w.Finish(named{dir(nil)}); !errors.Is(err, os.ErrClosed) {
		t.Errorf("%v, want that of the file", err)
	}
	f, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if w, err = mkfs.New(f, 100<<20); err == nil {
		err = contents(t, w, file(pieces(1<<15, 0)), map[*node]bool{})
	}
	if err == nil || !strings.Contains(err.Error(), "more than 32768 blocks") {
		t.Errorf("%v, want the size that it was to have", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }
