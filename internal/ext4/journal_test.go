package ext4_test

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"push.rocks/smartvm/internal/fixtures"
	"push.rocks/smartvm/internal/testenv"
)

// The journal of one that is mounted still tells what e2fsck makes of it, transactions, revoked
// blocks and content like its marks included.
func TestTar_Journal(t *testing.T) {
	testenv.Require(t, testenv.Root)
	testenv.Fixture(t, fixtures.MkfsExt4)
	const script = `unset CDPATH; cd "$0"; truncate -s 64M image; mkfs.ext4 -q $1 image; mkdir mnt; mount -o loop$2 image mnt; cd mnt
for round in 1 2 3; do
  for n in $(seq 40); do mkdir -p d$n/e$n; echo $round >d$n/f; ln -s d$n s$n$round; done; sync d1/f
  rm -r d1* ; for n in $(seq 30); do printf '\300\073\071\230 like a journal' >m$n; head -c 20000 /dev/zero | tr '\0' $round >b$n; done; sync m30
  mv d2 moved$round; rm m1*; sync m2
done
rm -r d3* d4*; sync m2; { yes full | head -c 50M >fill; } 2>/dev/null || true; sync fill # where directories were
rm b20; mkdir last; printf '\300\073\071\230 marked' >last/marked; echo last >last/file; sync last/file
cd ..; cp --sparse=always image live; cp live checked; umount mnt
set +e; e2fsck -fy checked >log 2>&1; test $? -le 2 || { cat log; exit 1; }`
	for name, o := range map[string]struct{ mkfs, mount string }{
		"usual": {}, "no wide numbers": {"-O ^64bit", ""}, "no checksums": {"-O ^metadata_csum,^64bit", ""},
		"small blocks":    {"-b 1024", ""},
		"a small journal": {"-J size=4", ""}, "data too": {"-J size=16", ",data=journal"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if out, err := exec.CommandContext(t.Context(), "unshare", "-m", "sh", "-euc",
				strings.NewReplacer("$1", o.mkfs, "$2", o.mount).Replace(script), dir).CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			text := map[string][]byte{}
			for _, file := range []string{"live", "checked"} {
				data, err := os.ReadFile(filepath.Join(dir, file))
				if err != nil {
					t.Fatal(err)
				}
				if dirty := binary.LittleEndian.Uint32(data[1024+0x60:])&4 != 0; dirty != (file == "live") {
					t.Fatalf("%s: is its journal to be replayed: %v", file, dirty)
				}
				if text[file], err = archive(t, bytes.NewReader(data)); err != nil {
					t.Fatalf("%s: %v", file, err)
				}
			}
			want, got := inTar(t, text["checked"]), inTar(t, text["live"])
			if want["last/file"] == "" {
				t.Error("what was synced is not there")
			}
			if diff := cmp.Diff(want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}
