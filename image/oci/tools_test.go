package oci_test

import (
	"errors"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"push.rocks/smartvm/image/oci"
	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// An image that umoci made comes out as umoci itself unpacks it.
func TestFlatten_LikeUmoci(t *testing.T) {
	testenv.Require(t, testenv.Root)
	testenv.Fixture(t, fixtures.Umoci)
	testenv.Fixture(t, fixtures.MkfsExt4) // e2fsck is of the same package
	tmp := t.TempDir()
	at := func(n string) string { return filepath.Join(tmp, n) }
	image := at("layout") + ":1"
	err := errors.Join(
		os.MkdirAll(at("one/sub/deep"), 0o750), os.WriteFile(at("one/a"), []byte("a"), 0o600),
		os.Chmod(at("one/a"), 0o755|os.ModeSetuid), os.WriteFile(at("one/sub/b"), []byte("b"), 0o600),
		os.Link(at("one/a"), at("one/hard")), os.Symlink("../a", at("one/sub/s")), os.Chown(at("one/sub/b"), 1234, 99999),
		os.MkdirAll(at("two/sub"), 0o700), os.WriteFile(at("two/a"), []byte("new"), 0o644),
		os.WriteFile(at("two/sub/c"), nil, 0o644),
	)
	if err != nil {
		t.Fatal(err)
	}
	run(t, "umoci", "init", "--layout", at("layout"))
	run(t, "umoci", "new", "--image", image)
	run(t, "umoci", "config", "--image", image, "--config.user", "7", "--config.cmd", "x", "--architecture", "amd64")
	for _, args := range [][]string{
		{at("one"), "/usr"},
		{at("one"), "/opt"},
		{at("two"), "/usr"},
		{"--opaque", at("two"), "/opt"},
		{"--whiteout", "/usr/sub/deep"},
	} {
		run(t, "umoci", append([]string{"insert", "--image", image}, args...)...)
	}
	run(t, "umoci", "raw", "unpack", "--image", image, at("unpacked"))
	i := resolve(t, "oci:"+image, oci.Options{})
	if len(i.Layers) != 5 || i.Config.User != "7" {
		t.Errorf("%+v", i)
	}
	f, err := os.Create(at("root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	_, err = i.Flatten(t.Context(), tmp, f, nil)
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	run(t, "e2fsck", "-fn", f.Name())
	if err := os.Mkdir(at("mnt"), 0o700); err != nil {
		t.Fatal(err)
	}
	run(t, "unshare", "-m", "sh", "-euc", `
		mount -t ext4 -o ro,loop "$0/root.ext4" "$0/mnt"
		list() { cd "$1" && find . -mindepth 1 -name lost+found -prune -o -mindepth 1 -printf '%P %y %m %U:%G %n %Ts %l\n' | sort; }
		(list "$0/unpacked") >"$0/want"
		(list "$0/mnt") >"$0/got"
		grep -q 'hard f 4755' "$0/got"
		diff -u "$0/want" "$0/got"
		diff -r --no-dereference --exclude=lost+found "$0/unpacked" "$0/mnt"`, tmp)
}

// An image that another client pushed to another registry.
func TestFetch_Pushed(t *testing.T) {
	dir := t.TempDir()
	d := add(t, dir, "1", files("a"), files("b"))
	srv := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	defer srv.Close()
	ref := strings.TrimPrefix(srv.URL, "http://") + "/some/repository:1"
	to, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	i, err := index.Image(manifest.Manifests[0].Digest)
	if err == nil {
		err = remote.Write(to, i, remote.WithContext(t.Context()))
	}
	if err != nil {
		t.Fatal(err)
	}
	got := resolve(t, ref, oci.Options{})
	if got.Digest != d.Digest {
		t.Errorf("digest %s, want %s", got.Digest, d.Digest)
	}
	pull(t, got, t.TempDir())
}

// What a full disk has no room for does not keep the room that it had.
func TestFetch_FullDisk(t *testing.T) {
	testenv.Require(t, testenv.Root)
	dir, layers := t.TempDir(), t.TempDir()
	add(t, dir, "1", noise(300_000, 0))
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-euc",
		`mount -t tmpfs -o size=100k none "$1"; "$0" -test.run='^TestChild$' && exit 1; echo left: $(ls "$1")`, self, layers)
	cmd.Env = append(os.Environ(), "OCI_TEST_CHILD="+serve(t, dir, nil).host()+"/a:1\n"+layers)
	out, err := cmd.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "no space left") || !strings.HasSuffix(string(out), "left:\n") {
		t.Errorf("%v: %s", err, out)
	}
}
