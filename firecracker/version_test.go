package firecracker_test

import (
	"strings"
	"testing"

	"push.rocks/smartvm/firecracker"
)

func TestParseVersion(t *testing.T) {
	for text, want := range map[string]string{
		"v1.12.1":                           "1.12.1",
		"1.12.1":                            "1.12.1",
		"1.17.0-dev":                        "1.17.0",
		"v1.5.0-dev-23-gdeadbeef":           "1.5.0",
		"1.2.3+build.4":                     "1.2.3",
		"0.0.0":                             "0.0.0",
		"":                                  "",
		"v":                                 "",
		"1.12":                              "",
		"1.12.1.4":                          "",
		"1.12.x":                            "",
		"1.-2.3":                            "",
		"1.+2.3":                            "",
		"-1.2.3":                            "",
		"1..3":                              "",
		" 1.2.3":                            "",
		"vv1.2.3":                           "",
		"1.2.99999":                         "",
		"1.2.3-" + strings.Repeat("x", 100): "",
	} {
		v, err := firecracker.ParseVersion(text)
		switch {
		case want == "" && err == nil:
			t.Errorf("%q is %v, want an error", text, v)
		case want != "" && err != nil:
			t.Error(err)
		case want != "" && v.String() != want:
			t.Errorf("%q is %v, want %s", text, v, want)
		}
	}
}

func TestParseVersionOutput(t *testing.T) {
	for output, want := range map[string]string{
		"Firecracker v1.16.1\n\n2026-01-01T00:00:00 [anonymous-instance:main] exiting\n": "1.16.1",
		"Firecracker v1.12.1":       "1.12.1",
		"Firecracker v1.12.1\r\n":   "1.12.1",
		"Firecracker v1.17.0-dev\n": "1.17.0",
		"":                          "",
		"\nFirecracker v1.12.1":     "",
		"Jailer v1.12.1\n":          "",
		"Firecracker\n":             "",
		"Firecrackerv1.12.1\n":      "",
		"\x7fELF\x00\x01":           "",
		"Firecracker v1.12.1" + strings.Repeat(" ", 1000) + "x\n": "1.12.1", // bounded, not read to the end
	} {
		v, err := firecracker.ParseVersionOutput("Firecracker", []byte(output))
		switch {
		case want == "" && err == nil:
			t.Errorf("%q is %v, want an error", output, v)
		case want == "" && len(err.Error()) > 400:
			t.Errorf("%q: error of %d bytes", output, len(err.Error()))
		case want != "" && (err != nil || v.String() != want):
			t.Errorf("%q is %v, %v, want %s", output, v, err, want)
		}
	}
	if v, err := firecracker.ParseVersionOutput("Jailer", []byte("Jailer v1.12.1\n")); err != nil || v != v1_12_1 {
		t.Errorf("jailer: %v, %v", v, err)
	}
}

func TestVersion_Compare(t *testing.T) {
	ordered := []string{"0.25.2", "1.7.0", "1.7.1", "1.10.0", "1.14.4", "1.15.0", "2.0.0"}
	for i, older := range ordered {
		for j, newer := range ordered {
			want := 0
			switch {
			case i < j:
				want = -1
			case i > j:
				want = 1
			}
			if got := parse(t, older).Compare(parse(t, newer)); got != want {
				t.Errorf("%s compared to %s is %d, want %d", older, newer, got, want)
			}
			if got := parse(t, older).AtLeast(parse(t, newer)); got != (i >= j) {
				t.Errorf("%s at least %s is %v", older, newer, got)
			}
		}
	}
	if !(firecracker.Version{}).IsZero() || v1_7.IsZero() {
		t.Error("IsZero")
	}
}

func FuzzParseVersion(f *testing.F) {
	for _, seed := range []string{
		"v1.12.1", "1.17.0-dev", "1.2", "Firecracker v1.16.1\n", "65535.65535.65535",
		"1.2.3-\xff",
	} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, text string) {
		v, err := firecracker.ParseVersion(text)
		if err == nil {
			again, err := firecracker.ParseVersion(v.String())
			if err != nil || again != v {
				t.Errorf("%q is %v, and that is %v, %v", text, v, again, err)
			}
		}
		if v, err := firecracker.ParseVersionOutput("Firecracker", []byte("Firecracker "+text)); err == nil &&
			v.Compare(v) != 0 {
			t.Errorf("%v is not itself", v)
		}
	})
}
