package forward

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
)

// Sysctl is a variable of the kernel's network that a network needs, as an effect on the host.
type Sysctl struct {
	Name  string `json:"name"`  // below /proc/sys/net
	Value string `json:"value"` // the same as Old: it is to come back when another's change has changed it
	Old   string `json:"old"`
	// Others is a variable that is 1 when somebody else wants this one as it is: then it stays.
	Others string `json:"others,omitempty"`
}

func (s *Sysctl) path() string { return "/proc/sys/net/" + s.Name }

// Apply sets the variable.
func (s *Sysctl) Apply(context.Context) error {
	if err := os.WriteFile(s.path(), []byte(s.Value), 0); err != nil {
		return fmt.Errorf("set net/%s: %w", s.Name, err)
	}
	return nil
}

// Revert gives the variable its old value, unless somebody has set another, or wants this one.
func (s *Sysctl) Revert(context.Context) error {
	if s.Others != "" && readSysctl(s.Others) == "1" {
		return nil
	}
	if now := readSysctl(s.Name); now != s.Value && s.Value != s.Old || now == s.Old {
		return nil
	}
	if err := os.WriteFile(s.path(), []byte(s.Old), 0); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restore net/%s: %w", s.Name, err)
	}
	return nil
}

// readSysctl returns a variable's value, "" where the kernel, or an interface, has none.
func readSysctl(name string) string {
	data, err := os.ReadFile("/proc/sys/net/" + name)
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(data))
}
