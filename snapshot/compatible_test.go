package snapshot_test

import (
	"errors"
	"strings"
	"testing"

	"push.rocks/smartvm/firecracker"
	"push.rocks/smartvm/snapshot"
)

func here() (snapshot.Manifest, snapshot.HostFacts) {
	m := snapshot.Manifest{
		Firecracker: "1.12.1", Format: "6.0.0", Arch: "amd64", CPUVendor: "AuthenticAMD",
		CPUModel:   "EPYC (family 25, model 17)",
		HostKernel: "6.1.0", MemSizeMiB: 256,
	}
	return m, snapshot.HostFacts{
		Arch: m.Arch, CPUVendor: m.CPUVendor, CPUModel: m.CPUModel, Kernel: m.HostKernel,
		Firecracker: firecracker.Version{Major: 1, Minor: 12, Patch: 1},
	}
}

func TestCompatible(t *testing.T) {
	for name, c := range map[string]struct {
		change   func(*snapshot.Manifest, *snapshot.HostFacts)
		refused  []string // what each refusal is about
		warned   []string
		inAdvice string
	}{
		"Same":  {func(*snapshot.Manifest, *snapshot.HostFacts) {}, nil, nil, ""},
		"Patch": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) { h.Firecracker.Patch = 0 }, nil, nil, ""},
		"OlderVMM": {
			func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
				h.Firecracker.Minor = 11
			},
			[]string{"snapshot format"},
			nil,
			"with Firecracker 1.12 (smartvm firecracker install 1.12.1), or make it again with 1.11.1",
		},
		"NewerVMM": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.Firecracker.Minor = 16
		}, []string{"snapshot format"}, nil, "with Firecracker 1.12"},
		"Format8": {func(m *snapshot.Manifest, _ *snapshot.HostFacts) {
			m.Firecracker, m.Format = "1.13.1", "8.0.0"
		}, []string{"snapshot format"}, nil, "1.13 to 1.14"},
		"SameFormat": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Firecracker, m.Format, h.Firecracker.Minor = "1.13.1", "8.0.0", 14
		}, nil, nil, ""},
		"1.10.0": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Firecracker, m.Format, h.Firecracker = "1.10.0", "3.0.0", firecracker.Version{Major: 1, Minor: 10, Patch: 1}
		}, []string{"snapshot format"}, nil, "1.9 to 1.10.0"},
		"UnknownVMM": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) { h.Firecracker.Minor = 40 }, nil, nil, ""},
		"NoFormatRead": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Format, h.Firecracker.Minor = "", 16
		}, []string{"snapshot format"}, nil, ""},
		"NewerMinor": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Format, h.Firecracker.Patch = "6.1.0", 0
		}, []string{"snapshot format"}, nil, ""},
		"FormatSaid": {
			func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
				h.Firecracker.Minor, h.Format = 17, "11.0.0"
			},
			[]string{"snapshot format"},
			nil,
			"with Firecracker 1.12 (smartvm firecracker install 1.12.1), or make it again with 1.17.1",
		},
		"FormatSaidFirst": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.Firecracker.Minor, h.Format = 16, "6.0.0"
		}, nil, nil, ""},
		"FormatOfLater": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Firecracker, m.Format, h.Format = "1.17.0", "11.0.0", "6.0.0"
		}, []string{"snapshot format"}, nil, "with Firecracker 1.17.0 (smartvm firecracker install 1.17.0)"},
		"FormatOfLaterHere": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Firecracker, m.Format, h.Format, h.Firecracker.Minor = "1.17.0", "11.0.0", "11.0.0", 17
		}, nil, nil, ""},
		"SameVMMOtherFormat": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.Format = "7.0.0"
		}, []string{"snapshot format"}, nil, ""},
		"SameVMMNoFormat": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.Format, h.Format = "", "7.0.0"
		}, nil, nil, ""},
		"OtherArch": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.Arch, h.CPUVendor, h.CPUModel = "arm64", "0x41", "part"
		}, []string{"architecture"}, nil, "that architecture"},
		"OtherVendor": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.CPUVendor, h.CPUModel = "GenuineIntel", "Xeon"
		}, []string{"CPU vendor"}, nil, "that vendor"},
		"OtherModel": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.CPUModel = "other"
		}, []string{"CPU model"}, nil, "CPU template"},
		"Template": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			h.CPUModel, m.CPUTemplate = "other", "T2A"
		}, nil, []string{"CPU model"}, ""},
		"Kernel": {func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
			h.Kernel = "6.2"
		}, nil, []string{"host kernel"}, ""},
		"HugePages": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.HugePages, h.FreeHugePagesMiB = "2M", 100
		}, []string{"huge pages"}, nil, "78 more"},
		"EnoughPages": {func(m *snapshot.Manifest, h *snapshot.HostFacts) {
			m.HugePages, h.FreeHugePagesMiB = "2M", 256
		}, nil, nil, ""},
		"Several": {
			func(_ *snapshot.Manifest, h *snapshot.HostFacts) {
				h.Firecracker.Minor, h.CPUModel, h.Kernel = 9, "x", "y"
			},
			[]string{"CPU model", "snapshot format"},
			[]string{"host kernel"},
			"",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m, h := here()
			c.change(&m, &h)
			warnings, refusal := snapshot.Compatible(&m, h)
			advice := wantMismatches(t, "refused", unjoin(refusal), c.refused)
			wantMismatches(t, "warned", warnings, c.warned)
			if !strings.Contains(advice, c.inAdvice) {
				t.Errorf("advice is %q, want %q in it", advice, c.inAdvice)
			}
		})
	}
}

func unjoin(err error) []error {
	if err == nil {
		return nil
	}
	return err.(interface{ Unwrap() []error }).Unwrap()
}

func wantMismatches(t *testing.T, what string, errs []error, want []string) (advice string) {
	t.Helper()
	if len(errs) != len(want) {
		t.Errorf("%s for %v, want %q", what, errs, want)
		return ""
	}
	for i, err := range errs {
		var m *snapshot.Mismatch
		if !errors.As(err, &m) || m.What != want[i] || m.Hint() == "" {
			t.Errorf("%s for %v, want %q", what, err, want[i])
			continue
		}
		advice += m.Hint()
	}
	return advice
}

func TestReadHostFacts(t *testing.T) {
	h, err := snapshot.ReadHostFacts()
	if err != nil || h.Arch == "" || h.CPUVendor == "" || h.CPUModel == "" || h.Kernel == "" {
		t.Errorf("%+v, %v", h, err)
	}
	m, facts := here()
	m.Arch, m.CPUVendor, m.CPUModel, m.HostKernel = h.Arch, h.CPUVendor, h.CPUModel, h.Kernel
	h.Firecracker = facts.Firecracker
	if warnings, refusal := snapshot.Compatible(&m, h); len(warnings) > 0 || refusal != nil {
		t.Errorf("this host does not match itself: %v, %v", warnings, refusal)
	}
}
