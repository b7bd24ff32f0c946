package server

import (
	"bytes"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"push.rocks/smartvm/guest"
	"push.rocks/smartvm/internal/agentproto"
	"push.rocks/smartvm/internal/guestagent/process"
)

// sector is how the kernel counts what goes to and from drives, in bytes.
const sector = 512

// transferred is what all drives have read and written.
func transferred() (read, written uint64) {
	data, err := os.ReadFile("/proc/diskstats")
	if err != nil {
		return 0, 0
	}
	for line := range strings.Lines(string(data)) {
		f := strings.Fields(line)
		if len(f) < 10 || !strings.HasPrefix(f[2], "vd") || strings.ContainsAny(f[2], "0123456789") { // not their partitions
			continue
		}
		for to, text := range map[*uint64]string{&read: f[5], &written: f[9]} {
			if n, err := strconv.ParseUint(text, 10, 54); err == nil {
				*to += n * sector
			}
		}
	}
	return read, written
}

// kernelThread is the kernel's flag of its own threads.
const kernelThread = 0x00200000

// processes tells what runs in the guest, without the kernel's own threads.
func processes(ss *session) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	names := process.Names()
	all := []guest.Process{}
	for _, dir := range dirs {
		if p, ok := look(dir, names); ok && len(all) < agentproto.MaxProcesses {
			all = append(all, p)
		}
	}
	return ss.reply(agentproto.Reply{Processes: all})
}

// look reads what /proc says of a process. One that has ended meanwhile is none.
func look(dir string, names map[uint32]string) (p guest.Process, ok bool) {
	stat, err := os.ReadFile(filepath.Join(dir, "stat"))
	open, shut := bytes.IndexByte(stat, '('), bytes.LastIndexByte(stat, ')') // its name may hold either
	fi, statErr := os.Stat(dir)
	if err != nil || statErr != nil || open < 0 || shut < open {
		return p, false
	}
	f := strings.Fields(string(stat[shut+1:])) // the third of the kernel's fields is the first
	if len(f) < 22 {
		return p, false
	}
	number := func(i int) int64 {
		n, _ := strconv.ParseInt(f[i], 10, 64)
		return n
	}
	if number(6)&kernelThread != 0 {
		return p, false
	}
	if p.PID, err = strconv.Atoi(filepath.Base(dir)); err != nil {
		return p, false
	}
	p.State, p.Parent = f[0], int(number(1))
	p.CPU = time.Duration(number(11)+number(12)) * time.Second / ticks
	p.Memory = uint64(max(number(21), 0)) * uint64(os.Getpagesize())
	uid := fi.Sys().(*syscall.Stat_t).Uid
	if p.User = names[uid]; p.User == "" {
		p.User = strconv.FormatUint(uint64(uid), 10)
	}
	line, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
	p.Command = strings.TrimSpace(strings.ReplaceAll(string(line[:min(len(line), agentproto.MaxCommand)]), "\x00", " "))
	if p.Command == "" {
		p.Command = "[" + string(stat[open+1:shut]) + "]"
	}
	return p, true
}
