// Command inguest runs in a guest that is measured: it is what the agent is compared with.
//
//   - serve: listens on the vsock ports below until it is killed.
//   - spawn N: the nanoseconds that each of N forks and execs of true took, until it had ended.
//   - kernel: when the kernel ran its first program, in nanoseconds since its start.
package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// The ports: one sends back what comes; one takes as many bytes as the first eight say, and answers
// with one; one sends so many.
const (
	echoPort = 2000 + iota
	sinkPort
	sourcePort
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "inguest:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	switch {
	case len(args) == 1 && args[0] == "serve":
		return serve()
	case len(args) == 2 && args[0] == "spawn":
		n, err := strconv.Atoi(args[1])
		if err != nil {
			return err
		}
		return spawn(n)
	case len(args) == 1 && args[0] == "kernel":
		return kernel()
	}
	return errors.New("serve, spawn N or kernel")
}

func serve() error {
	ended := make(chan error)
	for port, answer := range map[uint32]func(net.Conn) error{
		echoPort: func(c net.Conn) error { _, err := io.Copy(c, c); return err },
		sinkPort: func(c net.Conn) error {
			left, err := length(c)
			for buf := make([]byte, bufferSize); left > 0 && err == nil; {
				var n int
				n, err = c.Read(buf)
				left -= n
			}
			if err != nil {
				return err
			}
			_, err = c.Write([]byte{'.'})
			return err
		},
		sourcePort: func(c net.Conn) error {
			left, err := length(c)
			for buf := bytes.Repeat([]byte{'x'}, bufferSize); left > 0 && err == nil; left -= len(buf) {
				_, err = c.Write(buf[:min(left, len(buf))])
			}
			return err
		},
	} {
		l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
		if err != nil {
			return err
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				go func() {
					if err := answer(c); err != nil {
						fmt.Fprintln(os.Stderr, "inguest:", err)
					}
					_ = c.Close()
				}()
			}
		}()
	}
	fmt.Println("listening")
	return <-ended
}

// bufferSize is that of streams.
const bufferSize = 256 << 10

// length reads eight bytes that say how long a stream is: the VMM knows no connection that has
// ended one way only.
func length(c net.Conn) (int, error) {
	var n [8]byte
	_, err := io.ReadFull(c, n[:])
	return int(binary.BigEndian.Uint64(n[:])), err
}

func spawn(n int) error {
	path, err := exec.LookPath("true")
	if err != nil {
		return err
	}
	for range n {
		begun := time.Now()
		pid, err := syscall.ForkExec(path, []string{"true"}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
		if err != nil {
			return err
		}
		if _, err := syscall.Wait4(pid, nil, 0, nil); err != nil {
			return err
		}
		fmt.Println(time.Since(begun).Nanoseconds())
	}
	return nil
}

// kernel finds the moment in the kernel's log, whose clock is not that of the phases: a line of its
// own in it says by how much.
func kernel() error {
	const own = "inguest: now"
	log, err := os.OpenFile("/dev/kmsg", os.O_RDWR|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer log.Close()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &now); err != nil {
		return err
	}
	if _, err := log.WriteString(own + "\n"); err != nil {
		return err
	}
	var first int64
	for buf := make([]byte, 16<<10); ; {
		n, err := unix.Read(int(log.Fd()), buf)
		if err != nil {
			return fmt.Errorf("the log lacks what is sought: %w", err)
		}
		head, text, _ := strings.Cut(string(buf[:n]), ";")
		fields := strings.Split(head, ",")
		at, err := strconv.ParseInt(fields[min(2, len(fields)-1)], 10, 64)
		if err != nil {
			return err
		}
		switch {
		case strings.HasPrefix(text, "Run /init as init process"):
			first = at * 1000
		case strings.HasPrefix(text, own) && first > 0:
			fmt.Println(first + now.Nano() - at*1000)
			return nil
		}
	}
}
