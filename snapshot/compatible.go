package snapshot

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"push.rocks/smartvm/firecracker"
)

// HostFacts are what a restored VM finds where it is restored.
type HostFacts struct {
	Arch      string // as Go spells it
	CPUVendor string // "GenuineIntel", "AuthenticAMD"; of ARM the implementer, "0x41"
	CPUModel  string // model name, family and model; of ARM the part
	Kernel    string // as uname -r says it
	// FreeHugePagesMiB is what can be had in pages of 2 MiB.
	FreeHugePagesMiB int
	// Firecracker is the version of the VMM that is to restore it, and Format the snapshot format that
	// its program names. If Format is empty, it is taken from the version where that is known.
	// ReadHostFacts leaves both empty.
	Firecracker firecracker.Version
	Format      string
}

// Mismatch is one thing in which a snapshot and a host differ.
type Mismatch struct {
	What     string // "CPU model"
	Snapshot string // what the snapshot has or needs
	Host     string // what there is
	Advice   string // what would do
}

func (m *Mismatch) Error() string {
	return fmt.Sprintf("%s: the snapshot has %s, here it is %s", m.What, m.Snapshot, m.Host)
}

// Hint is what would do.
func (m *Mismatch) Hint() string { return m.Advice }

// Compatible compares a snapshot with where it is to be restored. Refusal is an errors.Join of a
// *Mismatch for each thing that does not match; the guest would not run, or break. Warnings, of the
// same kind, are about what mostly goes well. What one side does not know is not compared.
func Compatible(m *Manifest, h HostFacts) (warnings []error, refusal error) {
	var refused []error
	differ := func(refuse bool, what, snapshot, host, advice string) {
		if snapshot == "" || host == "" || snapshot == host {
			return
		}
		mismatch := &Mismatch{What: what, Snapshot: snapshot, Host: host, Advice: advice}
		if refuse {
			refused = append(refused, mismatch)
		} else {
			warnings = append(warnings, mismatch)
		}
	}
	differ(true, "architecture", m.Arch, h.Arch, "restore it on a host of that architecture")
	if m.Arch == h.Arch {
		differ(true, "CPU vendor", m.CPUVendor, h.CPUVendor, "restore it on a host with a CPU of that vendor")
		if m.CPUVendor == h.CPUVendor {
			// A template hides the differences between some models; which ones, only its maker knows.
			differ(m.CPUTemplate == "", "CPU model", m.CPUModel, h.CPUModel,
				"restore it on a host with that CPU, or make the snapshot of a VM with a CPU template that both have")
		}
	}
	differ(false, "host kernel", m.HostKernel, h.Kernel,
		"restore it under that kernel if the guest does not go on as it should")
	if err := m.CheckFormat(h); err != nil {
		refused = append(refused, err)
	}
	if m.HugePages == "2M" && h.FreeHugePagesMiB < m.MemSizeMiB {
		refused = append(refused, &Mismatch{
			What: "huge pages", Snapshot: fmt.Sprintf("%d MiB in pages of 2 MiB", m.MemSizeMiB),
			Host:   fmt.Sprintf("%d MiB that are free", h.FreeHugePagesMiB),
			Advice: fmt.Sprintf("sysctl vm.nr_hugepages=N, with %d more than now", (m.MemSizeMiB-h.FreeHugePagesMiB+1)/2),
		})
	}
	return warnings, errors.Join(refused...)
}

// formats are those that versions of Firecracker write, from the first of them on: for manifests
// without a format, and for advice.
var formats = []struct {
	since  firecracker.Version
	format string
}{
	{firecracker.Version{Major: 1, Minor: 7}, "1.0.0"},
	{firecracker.Version{Major: 1, Minor: 8}, "2.0.0"},
	{firecracker.Version{Major: 1, Minor: 9}, "3.0.0"},
	{firecracker.Version{Major: 1, Minor: 10, Patch: 1}, "4.0.0"},
	{firecracker.Version{Major: 1, Minor: 11}, "5.0.0"},
	{firecracker.Version{Major: 1, Minor: 12}, "6.0.0"},
	{firecracker.Version{Major: 1, Minor: 13}, "8.0.0"},
	{firecracker.Version{Major: 1, Minor: 15}, "9.0.0"},
	{firecracker.Version{Major: 1, Minor: 16}, "10.0.0"},
	{firecracker.Version{Major: 1, Minor: 17}, ""}, // its program names it
}

// formatOf is what a version writes; "" if that is not known.
func formatOf(v firecracker.Version) string {
	format := ""
	for _, f := range formats {
		if v.AtLeast(f.since) {
			format = f.format
		}
	}
	return format
}

// CheckFormat refuses, with a *Mismatch, a state that the host's VMM cannot read: of another major
// version of the format, or of a newer minor one.
func (m *Manifest) CheckFormat(h HostFacts) error {
	made, err := firecracker.ParseVersion(m.Firecracker)
	if err == nil && m.Format == "" && made == h.Firecracker {
		return nil
	}
	has, reads := cmp.Or(m.Format, formatOf(made)), cmp.Or(h.Format, formatOf(h.Firecracker))
	if has == "" || reads == "" || canRead(reads, has) {
		return nil
	}
	return &Mismatch{
		What: "snapshot format", Snapshot: fmt.Sprintf("%s, of Firecracker %s", has, m.Firecracker),
		Host: fmt.Sprintf("%s, of Firecracker %v", reads, h.Firecracker),
		Advice: fmt.Sprintf("restore it with Firecracker %s (smartvm firecracker install %s), or make it again with %v",
			writers(has, m.Firecracker), m.Firecracker, h.Firecracker),
	}
}

func canRead(reads, has string) bool {
	var readMajor, readMinor, major, minor int
	_, rerr := fmt.Sscanf(reads, "%d.%d.", &readMajor, &readMinor)
	_, herr := fmt.Sscanf(has, "%d.%d.", &major, &minor)
	return rerr == nil && herr == nil && readMajor == major && minor <= readMinor
}

// writers names the versions that write a format, as people do. Of a format that is not in the list
// it is the version that made the snapshot.
func writers(format, made string) string {
	for i, f := range formats[:len(formats)-1] {
		if f.format != format {
			continue
		}
		first, last := short(f.since), short(firecracker.Version{Major: 1, Minor: formats[i+1].since.Minor - 1})
		if patch := formats[i+1].since.Patch; patch > 0 {
			last = fmt.Sprintf("1.%d.%d", formats[i+1].since.Minor, patch-1)
		}
		if f.since.Patch > 0 || first == last {
			return first
		}
		return first + " to " + last
	}
	return made
}

// short leaves a patch of 0 out.
func short(v firecracker.Version) string { return strings.TrimSuffix(v.String(), ".0") }

// ReadHostFacts reads what this host is.
func ReadHostFacts() (HostFacts, error) {
	h := HostFacts{Arch: runtime.GOARCH}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return h, fmt.Errorf("read host: %w", err)
	}
	h.Kernel = unix.ByteSliceToString(name.Release[:])
	cpu, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return h, fmt.Errorf("read host: %w", err)
	}
	h.CPUVendor, h.CPUModel = parseCPU(cpu)
	memory, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return h, fmt.Errorf("read host: %w", err)
	}
	h.FreeHugePagesMiB = parseHugePages(memory)
	return h, nil
}

// fields reads "name : value" lines up to the first empty one: the first processor's.
func fields(text []byte) map[string]string {
	all := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(text)); lines.Scan() && lines.Text() != ""; {
		if name, value, ok := strings.Cut(lines.Text(), ":"); ok {
			all[strings.TrimSpace(name)] = strings.TrimSpace(value)
		}
	}
	return all
}

// parseCPU reads /proc/cpuinfo. Two models may have one name, as virtual CPUs have, so the numbers
// belong to it.
func parseCPU(text []byte) (vendor, model string) {
	f := fields(text)
	if vendor = f["vendor_id"]; vendor != "" {
		return vendor, fmt.Sprintf("%s (family %s, model %s)", f["model name"], f["cpu family"], f["model"])
	}
	if vendor = f["CPU implementer"]; vendor != "" {
		return vendor, fmt.Sprintf("part %s variant %s", f["CPU part"], f["CPU variant"])
	}
	return "", ""
}

// parseHugePages reads /proc/meminfo. What others have reserved is not free.
func parseHugePages(text []byte) int {
	f := fields(text)
	if f["Hugepagesize"] != "2048 kB" {
		return 0
	}
	free, _ := strconv.Atoi(f["HugePages_Free"])
	reserved, _ := strconv.Atoi(f["HugePages_Rsvd"])
	return max(0, free-reserved) * 2
}
