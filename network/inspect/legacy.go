package inspect

import (
	"encoding/binary"
	"fmt"
	"os"
	"slices"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// legacy is how the kernel's older rules of one protocol are read (linux/netfilter/x_tables.h,
// ip_tables.h, ip6_tables.h).
type legacy struct {
	family string // as nftables has it
	tables string // names those that are there: to ask for another makes the kernel make it
	domain int
	level  int
	// where a rule says where its target begins: behind what it matches, which is as long as the
	// protocol's addresses are
	target int
}

var legacies = []legacy{
	{"ip", "/proc/net/ip_tables_names", unix.AF_INET, unix.IPPROTO_IP, 88},
	{"ip6", "/proc/net/ip6_tables_names", unix.AF_INET6, unix.IPPROTO_IPV6, 140},
}

const (
	getInfo    = 64 // IPT_SO_GET_INFO and IP6T_SO_GET_INFO
	getEntries = 65
	nameLen    = 32
	// infoLen is that of a name, the valid hooks, for each of five where its rules begin and where its
	// policy is, their number and size.
	infoLen, policyAt, sizeAt = 84, nameLen + 4 + 5*4, infoLen - 4
	rulesAt                   = 40 // behind a name and a size
	verdictAt                 = 32 // in a target
	maxRules                  = 64 << 20
	drop                      = -1 // -NF_DROP - 1
)

// blocks says whether the policy of a hook (NF_INET_FORWARD and the like) is to drop. There may be
// no such rules.
func (l legacy) blocks(hook int) (bool, error) {
	names, err := os.ReadFile(l.tables)
	if err != nil || !slices.Contains(strings.Fields(string(names)), "filter") {
		return false, nil // none, or none that we may see
	}
	fd, err := unix.Socket(l.domain, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false, err
	}
	defer unix.Close(fd)
	info := make([]byte, infoLen)
	copy(info, "filter")
	if err := getsockopt(fd, l.level, getInfo, info); err != nil {
		return false, err
	}
	native := binary.NativeEndian
	policy, size := int(native.Uint32(info[policyAt+4*hook:])), int(native.Uint32(info[sizeAt:]))
	if size > maxRules {
		return false, fmt.Errorf("%d bytes of rules", size)
	}
	rules := make([]byte, rulesAt+size)
	copy(rules, "filter")
	native.PutUint32(rules[nameLen:], uint32(size))
	if err := getsockopt(fd, l.level, getEntries, rules); err != nil {
		return false, err // EAGAIN: somebody has changed them meanwhile
	}
	rules = rules[rulesAt:]
	if policy+l.target+2 > size {
		return false, nil
	}
	verdict := policy + int(native.Uint16(rules[policy+l.target:])) + verdictAt
	return verdict+4 <= size && int32(native.Uint32(rules[verdict:])) == drop, nil
}

func getsockopt(fd, level, option int, value []byte) error {
	length := uint32(len(value))
	_, _, errno := unix.Syscall6(unix.SYS_GETSOCKOPT, uintptr(fd), uintptr(level), uintptr(option),
		uintptr(unsafe.Pointer(&value[0])), uintptr(unsafe.Pointer(&length)), 0)
	if errno != 0 {
		return errno
	}
	return nil
}
