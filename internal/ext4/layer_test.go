package ext4_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"push.rocks/smartvm/image/oci/flatten"
	"push.rocks/smartvm/internal/ext4"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// overlaid runs a script in an overlay of a directory and a scratch, in the directory $0, where it
// leaves lower.tar, merged.tar and the scratch.
const overlaid = `
unset CDPATH; cd "$0"; mkdir lower merged mnt
cd lower; mkdir -p a/b gone kept/below usr/lib; echo 1 >a/one; echo 2 >a/b/two; echo 3 >gone/three; echo 4 >kept/below/four; echo 5 >five; ln five six
ln -s usr/lib lib; echo so >usr/lib/so; cd ..
tar --sort=name --format=pax -cf lower.tar -C lower .
truncate -s 32M scratch; mkfs.ext4 -q scratch; mount -o loop scratch mnt; mkdir mnt/upper mnt/work
mknod mnt/upper/lost+found c 0 0
mount -t overlay -o "lowerdir=lower,upperdir=mnt/upper,workdir=mnt/work,redirect_dir=off,metacopy=off" overlay merged
cd merged; `

const endOverlaid = `
cd ..; tar --sort=name --format=pax --xattrs -cf merged.tar -C merged .; umount merged mnt
`

func layerOf(t testing.TB, scratch string, leave func(string) bool) ([]byte, error) {
	t.Helper()
	f, err := os.Open(scratch)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	fs, err := ext4.Open(f)
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	if err := fs.Layer(t.Context(), w, "upper", leave, plenty); err != nil {
		return nil, err
	}
	return out.Bytes(), w.Close()
}

// Over what was below, a layer of what the kernel's overlay has noted comes to what the overlay
// showed.
func TestLayer(t *testing.T) {
	testenv.Require(t, testenv.Root)
	testenv.Fixture(t, fixtures.MkfsExt4)
	for name, script := range map[string]string{
		"nothing":                        "",
		"files":                          "echo new >a/new; echo more >>five; chmod 4755 a/one; chown 7:8 kept/below/four; mkfifo fifo; mknod dev c 1 3; ln -s nowhere link",
		"removed":                        "rm a/one six; rm -r gone",
		"removed and made":               "rm -r a; mkdir a; echo 9 >a/nine; rm five; mkdir five; rm lib; mkdir lib; echo l >lib/l; rm -r usr; echo file >usr",
		"hidden below":                   "rm -r kept; mkdir -p kept/below/deeper; echo 1 >kept/other",
		"renamed":                        "mv a/one a/uno; mv five cinque; cp -a kept again; rm -r kept; mv a/b/two usr/lib/",
		"several names":                  "ln a/one a/ein; ln a/one kept/eins; rm a/one",
		"attributes":                     "touch -d @5 a/one a kept; chmod 700 kept",
		"many that are gone are one":     "for n in $(seq 100); do echo $n >new$n; done; sync; rm -r a gone kept usr five six lib",
		"a directory in place of a link": "rm lib; mkdir -p lib/x; echo 1 >lib/x/y; rm usr/lib/so",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if out, err := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-euc", overlaid+script+endOverlaid,
				dir).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			layer, err := layerOf(t, filepath.Join(dir, "scratch"), func(name string) bool { return name == "lost+found" })
			if err != nil {
				t.Fatal(err)
			}
			lower, err := os.ReadFile(filepath.Join(dir, "lower.tar"))
			if err != nil {
				t.Fatal(err)
			}
			f, err := os.Create(filepath.Join(dir, "image"))
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			var layers []flatten.Layer
			for _, text := range [][]byte{lower, layer} {
				layers = append(layers, flatten.Layer{
					DiffID: fmt.Sprintf("sha256:%x", sha256.Sum256(text)),
					Open:   func(context.Context) (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(text)), nil },
				})
			}
			if _, err := flatten.Layers(t.Context(), layers, f, flatten.Options{}); err != nil {
				t.Fatal(err)
			}
			got, err := archive(t, f)
			if err != nil {
				t.Fatal(err)
			}
			want, err := os.ReadFile(filepath.Join(dir, "merged.tar"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(plain(inTar(t, want)), inTar(t, got)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// plain takes the dots away that tar puts before names.
func plain(all map[string]string) map[string]string {
	to := map[string]string{}
	for name, what := range all {
		to[strings.TrimPrefix(name, "./")] = strings.Replace(what, " ./", " ", 1)
	}
	return to
}

// What a layer cannot say is refused, and what is to be left out is.
func TestLayer_Refused(t *testing.T) {
	testenv.Require(t, testenv.Root)
	mkfs := testenv.Fixture(t, fixtures.MkfsExt4)
	dir := t.TempDir()
	upper := filepath.Join(dir, "root/upper")
	err := errors.Join(os.MkdirAll(filepath.Join(upper, "etc"), 0o755),
		os.WriteFile(filepath.Join(upper, "etc/hosts"), []byte("h"), 0o644),
		os.WriteFile(filepath.Join(upper, ".wh.x"), nil, 0o644), os.Mkdir(filepath.Join(upper, "r"), 0o755),
		unix.Setxattr(filepath.Join(upper, "r"), "trusted.overlay.redirect", []byte("/a"), 0))
	if err != nil {
		t.Fatal(err)
	}
	scratch := filepath.Join(dir, "scratch")
	if out, err := exec.CommandContext(t.Context(), mkfs, "-q", "-d", filepath.Dir(upper), scratch,
		"16M").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	for _, name := range []string{".wh.x", "r"} {
		_, err := layerOf(t, scratch, func(n string) bool { return n != name })
		if !errors.Is(err, ext4.ErrLayer) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: got %v", name, err)
		}
	}
	text, err := layerOf(t, scratch, func(n string) bool { return n != "etc" })
	if err != nil {
		t.Fatal(err)
	}
	if got := inTar(t, text); len(got) != 2 || got["etc"] == "" {
		t.Errorf("got %v, want the root and etc", got)
	}
}
