package vmflags

import (
	"fmt"
	"strconv"

	"github.com/spf13/pflag"

	"push.rocks/smartvm/image/oci/flatten"
)

// Limits are flags that bound what images, and directories of VMs, may hold.
type Limits struct {
	size    Memory
	entries int64
}

// Flags adds them.
func (l *Limits) Flags(f *pflag.FlagSet) {
	f.Var(&l.size, "max-image-size",
		"what an image, or all -v of a VM, may hold: `size` in MiB, or like 64G; 32G without it [$SMARTVM_MAX_IMAGE_SIZE]")
	f.Int64Var(&l.entries, "max-image-entries", 0,
		"`how many` files and directories, 524288 without it [$SMARTVM_MAX_IMAGE_ENTRIES]")
}

// Finish asks the environment about those that were not given, and checks them.
func (l *Limits) Finish(getenv func(string) string) error {
	if text := getenv("SMARTVM_MAX_IMAGE_SIZE"); l.size == 0 && text != "" {
		if err := l.size.Set(text); err != nil {
			return fmt.Errorf("SMARTVM_MAX_IMAGE_SIZE=%q: %w", text, err)
		}
	}
	if text := getenv("SMARTVM_MAX_IMAGE_ENTRIES"); l.entries == 0 && text != "" {
		var err error
		if l.entries, err = strconv.ParseInt(text, 10, 64); err != nil {
			return fmt.Errorf("SMARTVM_MAX_IMAGE_ENTRIES=%q: want a number", text)
		}
	}
	if l.entries < 0 {
		return fmt.Errorf("--max-image-entries %d: want a number above 0", l.entries)
	}
	return nil
}

// Limits are what the flags say; zero values stand for defaults.
func (l *Limits) Limits() flatten.Limits {
	return flatten.Limits{MaxBytes: int64(l.size) << 20, MaxEntries: l.entries}
}

// Args are flags that say the same.
func (l *Limits) Args() (args []string) {
	if l.size != 0 {
		args = append(args, "--max-image-size", l.size.String())
	}
	if l.entries != 0 {
		args = append(args, "--max-image-entries", strconv.FormatInt(l.entries, 10))
	}
	return args
}
