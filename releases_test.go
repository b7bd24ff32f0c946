package smartvm_test

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/rogpeppe/go-internal/txtar"

	"push.rocks/smartvm"
	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/sealed"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network"
	"push.rocks/smartvm/network/policy"
)

// thisRelease names the golden file of what this release writes: go test -run TestReleases -update
// . writes it. A release gets a name of its own, and the files of all that were before stay.
const thisRelease = "first"

const releaseDir = "testdata/releases"

// What a release has written is a golden file with the records, journals and symbolic links of a
// runtime and a data directory. Places of this host are replaced by words there.

// places are what is replaced, the longest first.
func (s *site) places() [][2]string {
	return [][2]string{
		{testenv.Jailer(s.t), "/JAILER"},
		{testenv.Firecracker(s.t), "/FIRECRACKER"},
		{s.dir, "/SITE"},
	}
}

// thisMachine is what manifests say of the machine that they were written on.
var thisMachine = regexp.MustCompile(`"(cpuModel|hostKernel)":"[^"]*"`)

// resum makes journals and manifests whole again in which something was replaced.
func resum(path string, text []byte) []byte {
	switch name := filepath.Base(path); {
	case strings.HasSuffix(name, "journal"):
		var all []byte
		for line := range bytes.Lines(text) {
			_, body, _ := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
			all = fmt.Appendf(all, "%08x %s\n", crc32.ChecksumIEEE(body), body)
		}
		return all
	case name == "manifest.json":
		return reseal(text)
	}
	return text
}

func reseal(manifest []byte) []byte {
	return sealed.Seal(append(manifest[:bytes.LastIndex(manifest, []byte(`,"sum":`))], '}'))
}

// pack is what is in the site's directories, as a golden file.
func (s *site) pack() []byte {
	s.t.Helper()
	var files txtar.Archive
	var links []string
	err := filepath.WalkDir(s.dir, func(path string, d fs.DirEntry, err error) error {
		name, _ := filepath.Rel(s.dir, path)
		top, _, _ := strings.Cut(name, "/")
		switch {
		case err != nil || top != "runtime" && top != "data" || d.IsDir():
			return err
		case d.Type() == fs.ModeSymlink:
			to, err := os.Readlink(path)
			if !strings.Contains(name, "/run/") {
				links = append(links, name+"\t"+to)
			}
			return err
		case filepath.Ext(name) == ".json" && d.Name() != "seen.json" || strings.HasSuffix(name, "journal") ||
			d.Name() == store.LockFile:
			text, err := os.ReadFile(path)
			text = thisMachine.ReplaceAll(text, []byte(`"$1":"x"`))
			files.Files = append(files.Files, txtar.File{Name: name, Data: text})
			return err
		}
		return nil
	})
	if err != nil {
		s.t.Fatal(err)
	}
	files.Files = append(files.Files, txtar.File{Name: "links", Data: []byte(strings.Join(links, "\n"))})
	for i, f := range files.Files {
		for _, p := range s.places() {
			f.Data = bytes.ReplaceAll(f.Data, []byte(p[0]), []byte(p[1]))
		}
		files.Files[i].Data = resum(f.Name, f.Data)
	}
	return txtar.Format(&files)
}

// unpack puts what a golden file has into the site's directories.
func (s *site) unpack(golden string) {
	s.t.Helper()
	files, err := txtar.ParseFile(golden)
	if err != nil {
		s.t.Fatal(err)
	}
	for _, f := range files.Files {
		for _, p := range s.places() {
			f.Data = bytes.ReplaceAll(f.Data, []byte(p[1]), []byte(p[0]))
		}
		path := s.path(f.Name)
		if f.Name != "links" {
			err = errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, resum(f.Name, f.Data), 0o600))
		}
		for line := range strings.Lines(string(f.Data)) {
			if name, to, _ := strings.Cut(strings.TrimSpace(line), "\t"); f.Name == "links" {
				err = errors.Join(err, os.MkdirAll(filepath.Dir(s.path(name)), 0o700), os.Symlink(to, s.path(name)))
			}
		}
		if err != nil {
			s.t.Fatal(err)
		}
	}
}

// writeRelease makes VMs of each kind and writes down what is there of them while they run.
func (s *site) writeRelease(golden string) {
	t := s.t
	h := s.open()
	networks, err := h.Networks()
	if err == nil {
		_, err = networks.Create(network.Config{Name: "own"})
	}
	if err == nil {
		_, err = h.Warm(t.Context(), network.DefaultName, 2)
	}
	if err != nil {
		t.Fatal(err)
	}
	no := false
	ended, jailed, spaced := s.spec("reboot"), netSpec(s.spec("idle"), 1), netSpec(s.spec("idle"), 1)
	ended.ID, jailed.ID, spaced.ID = "ended", "jailed", "spaced"
	ended.Name, ended.Labels = "web", map[string]string{"team": "blue"}
	jailed.Drives[0].Ephemeral = &no
	jailed.Ports = []smartvm.Port{{HostPort: 8080, GuestPort: 80}}
	jailed.Policy = &policy.Policy{DefaultAction: policy.Deny}
	spaced.NetworkInterfaces[0].Namespace = true
	all := []*smartvm.Machine{
		s.started(h, ended), s.started(h, jailed), s.started(h, spaced),
		s.started(h, s.spec("idle")),
	}
	if _, err := all[0].Wait(t.Context()); err != nil {
		t.Fatal(err)
	}
	state := guest.State{VMM: 1, Agent: 2, Command: 3, Exit: &guest.Exit{Code: 4}}
	if err := atomicfile.WriteJSON(filepath.Join(all[0].RuntimeDir(), store.GuestStateFile), state); err != nil {
		t.Fatal(err)
	}
	sn := s.snapshot(all[3], smartvm.SnapshotOptions{Name: "golden"})
	s.stopAndRemove(all[3])
	text := s.pack()
	if i := strings.Index(string(text), "/dev/shm"); i >= 0 {
		t.Errorf("there is a place of this host: %s", text[i:min(i+60, len(text))])
	}
	if err := errors.Join(os.MkdirAll(releaseDir, 0o755), os.WriteFile(golden, text, 0o644)); err != nil {
		t.Fatal(err)
	}
	for _, m := range all[:3] {
		s.stopAndRemove(m)
	}
	s.removeSnapshot(h, sn.ID)
	s.clearNetworks(h)
}

// clearNetworks removes what is there without VMs.
func (s *site) clearNetworks(h *smartvm.Host) {
	networks, err := h.Networks()
	if err == nil {
		err = networks.Remove("own")
	}
	_, warmErr := h.Warm(s.t.Context(), network.DefaultName, 0)
	if err := errors.Join(err, warmErr, os.Remove(networks.Dir)); err != nil {
		s.t.Error(err)
	}
}

// TestReleases finds the VMs, networks and snapshots of each release so far as they were when this
// machine went down: they are listed, recovered, restored and removed, and nothing of them is left.
func TestReleases(t *testing.T) {
	testenv.Require(t, testenv.KVM)
	if !nettest.Alone(t) {
		return
	}
	if *update {
		newSite(t, smartvm.LaunchJailed).writeRelease(filepath.Join(releaseDir, thisRelease+".txtar"))
		return
	}
	goldens, err := filepath.Glob(filepath.Join(releaseDir, "*.txtar"))
	if err != nil || !slices.Contains(goldens, filepath.Join(releaseDir, thisRelease+".txtar")) {
		t.Fatalf("%v, %v: want that of this release too", goldens, err)
	}
	for _, golden := range goldens {
		t.Run(filepath.Base(golden), func(t *testing.T) {
			s := newSite(t, smartvm.LaunchJailed)
			s.unpack(golden)
			s.testRelease()
		})
	}
}

func (s *site) testRelease() {
	t, h := s.t, s.open()
	all, err := h.Machines(t.Context())
	var ids []string
	for _, m := range all {
		ids = append(ids, m.ID())
	}
	if want := []string{"ended", "jailed", "spaced"}; err != nil || !slices.Equal(ids, want) {
		t.Fatalf("VMs %v, %v; want %v", ids, err, want)
	}
	for i, want := range []smartvm.State{smartvm.Stopped, smartvm.Lost, smartvm.Lost} {
		wantState(t, all[i], want)
	}
	if exit, err := all[0].Exit(); err != nil || exit.Outcome != smartvm.OutcomeExited {
		t.Errorf("it ended %+v, %v", exit, err)
	}
	state := filepath.Join(all[0].RuntimeDir(), store.GuestStateFile)
	if g, err := atomicfile.ReadJSON[guest.State](state, 1<<20, 0); err != nil || g.Exit == nil || g.Exit.Code != 4 {
		t.Errorf("its guest has come as far as %+v, %v", g, err)
	}
	if m, err := h.Machine(t.Context(), "web"); err != nil || m.ID() != "ended" {
		t.Errorf("by name: %v", err)
	}
	report, err := h.Recover(t.Context())
	if err != nil || !slices.Equal(report.Recovered, []string{"jailed", "spaced"}) {
		t.Errorf("recovered %+v, %v", report, err)
	}
	networks, err := h.Networks()
	if err != nil {
		t.Fatal(err)
	}
	if list, err := networks.List(); err != nil || len(list) != 2 || list[1].Name != "own" {
		t.Errorf("networks %+v, %v", list, err)
	}
	if slots, err := h.Slots(network.DefaultName); err != nil || slots != (smartvm.Slots{All: 2, Free: 1}) {
		t.Errorf("warm slots %+v, %v", slots, err)
	}
	s.revive(h, "golden")
	s.stopAndRemove(s.restored(h, "golden", smartvm.RestoreOptions{}))
	s.removeSnapshot(h, "golden")
	for _, m := range all {
		if err := m.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	}
	s.clearNetworks(h)
}

// revive gives a golden snapshot, which is but a manifest, the files of another one, as the state
// and the memory of a VM belong to a version of Firecracker and to a processor.
func (s *site) revive(h *smartvm.Host, name string) {
	t := s.t
	t.Helper()
	old, err := h.Snapshot(name)
	if err != nil {
		t.Fatal(err)
	}
	m := s.started(h, s.spec("idle"))
	sn := s.snapshot(m, smartvm.SnapshotOptions{})
	s.stopAndRemove(m)
	var was, is map[string]json.RawMessage
	path := filepath.Join(old.Dir(), "manifest.json")
	for from, to := range map[string]*map[string]json.RawMessage{
		path:                                     &was,
		filepath.Join(sn.Dir(), "manifest.json"): &is,
	} {
		text, err := os.ReadFile(from)
		if err == nil {
			err = json.Unmarshal(text, to)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for _, key := range []string{"files", "firecracker", "format", "arch", "cpuVendor", "cpuModel", "hostKernel"} {
		was[key] = is[key]
	}
	maps.DeleteFunc(was, func(key string, value json.RawMessage) bool { return key == "sum" || value == nil })
	text, err := json.Marshal(was)
	if err == nil {
		err = os.WriteFile(path, sealed.Seal(text), 0o600)
	}
	for _, file := range slices.Collect(maps.Keys(sn.Files)) {
		to := filepath.Join(old.Dir(), file)
		err = errors.Join(err, os.MkdirAll(filepath.Dir(to), 0o755), os.Rename(sn.Path(file), to))
	}
	if err := errors.Join(err, os.MkdirAll(old.UsersDir(), 0o700)); err != nil {
		t.Fatal(err)
	}
	s.removeSnapshot(h, sn.ID)
}
