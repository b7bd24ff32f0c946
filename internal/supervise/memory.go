package supervise

import (
	"bufio"
	"fmt"
	"os"
	"runtime/debug"
	"strings"

	"golang.org/x/sys/unix"
)

// forget gives back the memory that only the start needed: of the heap, and of the program itself, whose pages come back from
// the page cache as they are used. Of those that a start runs through, some nine MiB, keeping a VM takes two.
func forget() error {
	debug.FreeOSMemory()
	program, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return err
	}
	maps, err := os.Open("/proc/self/smaps")
	if err != nil {
		return err
	}
	defer maps.Close()
	var first, last uintptr
	ours := false
	lines := bufio.NewScanner(maps)
	for lines.Scan() {
		f := strings.Fields(lines.Text())
		if strings.Contains(f[0], "-") { // first-last rights offset device inode path
			ours = len(f) == 6 && f[5] == program && !strings.Contains(f[1], "w")
			if _, err := fmt.Sscanf(f[0], "%x-%x", &first, &last); err != nil {
				return err
			}
		}
		// What was written to, by a loader say, is in no file.
		if !ours || f[0] != "Anonymous:" || f[1] != "0" {
			continue
		}
		if _, _, errno := unix.Syscall(unix.SYS_MADVISE, first, last-first, unix.MADV_DONTNEED); errno != 0 {
			return errno
		}
	}
	return lines.Err()
}
