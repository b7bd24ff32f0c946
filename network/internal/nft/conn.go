package nft

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"syscall"

	"github.com/google/nftables"
	"github.com/google/nftables/userdata"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// maxMessage bounds in bytes what is said to the kernel at once. A largest policy takes some 8 MiB;
// nothing is set aside.
const maxMessage = 64 << 20

// Open returns a connection to nftables of the calling thread's network. Each of its calls is by a
// socket of its own.
func Open() (*nftables.Conn, error) { return connect(&socket{fd: -1}) }

// OpenOnce returns a connection for some calls, and what closes it. That waits until all is gone
// that was removed by it (10 to 20 ms), for which nobody else need wait.
func OpenOnce() (conn *nftables.Conn, closeLater func(), err error) {
	s, err := open()
	if err != nil {
		return nil, nil, err
	}
	conn, err = connect(s)
	return conn, func() { go s.close() }, err
}

// Lasting is a connection that stays open, as to close one waits until all is gone that anybody has
// removed just before (10 to 20 ms). Its zero value serves, also several at once.
type Lasting struct {
	mu     sync.Mutex
	socket *socket // nil: not open
	conn   *nftables.Conn
}

// Do calls f with the connection, opened if need be.
func (l *Lasting) Do(f func(*nftables.Conn) error) (err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.socket == nil {
		if l.socket, err = open(); err != nil {
			return err
		}
		if l.conn, err = connect(l.socket); err != nil {
			return err
		}
	}
	if err = f(l.conn); err != nil { // what the kernel has still to say of it would be in the next one's way
		l.close()
	}
	return err
}

// Close closes it.
func (l *Lasting) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.close()
}

func (l *Lasting) close() {
	if l.socket != nil {
		l.socket.close()
	}
	l.socket = nil
}

// socket carries what nftables.Conn says and hears, in place of its own: that one has the kernel
// answer each message of a change, and rules twice, and reads each answer twice. Here it answers
// only what fails, all at once, before the change's only call returns.
type socket struct {
	fd       int // -1: there is one for each exchange
	sequence uint32
	pid      uint32 // that nftables.Conn believes to have
	buffer   []byte // of receive
}

// connect has a connection speak by s. The option is meant for tests, but is the way to give it
// another socket.
func connect(s *socket) (*nftables.Conn, error) {
	conn, err := nftables.New(nftables.WithTestDial(s.exchange))
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", err)
	}
	return conn, nil
}

func open() (*socket, error) {
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_NETFILTER)
	if err != nil {
		return nil, fmt.Errorf("open nftables: %w", os.NewSyscallError("socket", err))
	}
	s := &socket{fd: fd}
	// What failed need not be told whole.
	if err := unix.SetsockoptInt(fd, unix.SOL_NETLINK, unix.NETLINK_CAP_ACK, 1); err != nil {
		s.close()
		return nil, fmt.Errorf("open nftables: %w", os.NewSyscallError("setsockopt", err))
	}
	return s, nil
}

func (s *socket) close() { _ = unix.Close(s.fd) }

// exchange is a nltest.Func: it says some messages, and returns what was answered; without any it
// returns that all went well.
func (s *socket) exchange(messages []netlink.Message) ([]netlink.Message, error) {
	if len(messages) == 0 {
		return s.verdict(0), nil
	}
	s.sequence, s.pid = messages[0].Header.Sequence, messages[0].Header.PID
	by := s
	if s.fd < 0 {
		once, err := open()
		if err != nil {
			return nil, err
		}
		defer once.close()
		by = once
	}
	if messages[0].Header.Type == unix.NFNL_MSG_BATCH_BEGIN {
		err := by.change(messages)
		if errno, ok := errors.AsType[unix.Errno](err); ok {
			return s.verdict(errno), nil // an error would be that of each message
		}
		return nil, err
	}
	for range maxDumps {
		all, err := by.ask(messages[0])
		if errors.Is(err, errInterrupted) {
			continue
		}
		for i := range all {
			all[i].Header.PID = s.pid
		}
		if err == nil && len(all) == 0 {
			err = io.EOF // which stands for that
		}
		return all, err
	}
	return nil, errInterrupted
}

// verdict is what the kernel says of one message.
func (s *socket) verdict(errno unix.Errno) []netlink.Message {
	return []netlink.Message{{
		Header: netlink.Header{Type: netlink.Error, Sequence: s.sequence, PID: s.pid},
		Data:   binary.NativeEndian.AppendUint32(nil, uint32(-int32(errno))),
	}}
}

// change carries out what the kernel does as a whole or not at all. Of what fails it returns the
// first, which is mostly why the others did.
func (s *socket) change(messages []netlink.Message) error {
	var all []byte
	for _, m := range messages {
		m.Header.Flags &^= netlink.Acknowledge | netlink.Echo
		all = appendMessage(all, m)
	}
	if err := s.send(all); err != nil {
		return err
	}
	var failed, lost error
	for {
		part, err := s.receive(maxError, unix.MSG_DONTWAIT)
		switch {
		case errors.Is(err, unix.ENOBUFS): // more has failed than a socket takes: some of it is told
			lost = err
			continue
		case errors.Is(err, unix.EAGAIN):
			return cmp.Or(failed, lost)
		case err != nil:
			return err
		}
		for _, m := range part {
			if m.Header.Type == unix.NLMSG_ERROR && failed == nil {
				failed = errorOf(m)
			}
		}
	}
}

// maxDumps is how often something is listed that changes meanwhile.
const maxDumps = 20

var errInterrupted = errors.New("nftables changes again and again while it is looked at")

// ask returns the answer to one message.
func (s *socket) ask(m netlink.Message) (all []netlink.Message, err error) {
	m.Header.Flags &^= netlink.Echo | netlink.Acknowledge
	if m.Header.Flags&netlink.Dump != netlink.Dump {
		m.Header.Flags |= netlink.Acknowledge // which ends the answer
	}
	if err := s.send(appendMessage(nil, m)); err != nil {
		return nil, err
	}
	sequence, interrupted := m.Header.Sequence, false
	for {
		part, err := s.receive(maxPart, 0)
		if err != nil {
			return nil, err
		}
		for _, m := range part {
			if m.Header.Seq != sequence {
				continue
			}
			interrupted = interrupted || m.Header.Flags&unix.NLM_F_DUMP_INTR != 0
			switch m.Header.Type {
			case unix.NLMSG_ERROR, unix.NLMSG_DONE:
				if err := errorOf(m); err != nil {
					return nil, err
				}
				if interrupted {
					return nil, errInterrupted
				}
				return all, nil
			}
			all = append(all, netlink.Message{
				Header: netlink.Header{
					Length: m.Header.Len, Type: netlink.HeaderType(m.Header.Type),
					Flags: netlink.HeaderFlags(m.Header.Flags) &^ netlink.Multi, Sequence: m.Header.Seq,
				},
				Data: slices.Clone(m.Data),
			})
		}
	}
}

func (s *socket) send(data []byte) error {
	const usual = 128 << 10 // fits into what a socket may send
	if len(data) > usual {
		if err := unix.SetsockoptInt(s.fd, unix.SOL_SOCKET, unix.SO_SNDBUFFORCE, maxMessage); err != nil {
			return os.NewSyscallError("setsockopt", err)
		}
	}
	for {
		err := unix.Sendto(s.fd, data, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK})
		if !errors.Is(err, unix.EINTR) {
			return os.NewSyscallError("sendto", err)
		}
	}
}

// What the kernel answers at most at once, in bytes: that something failed, and a part of a list.
const (
	maxError = 256
	maxPart  = 32 << 10
)

// receive returns messages of at most so many bytes, good until it is called again.
func (s *socket) receive(most, flags int) ([]syscall.NetlinkMessage, error) {
	if len(s.buffer) < most {
		s.buffer = make([]byte, most)
	}
	for {
		n, _, is, from, err := unix.Recvmsg(s.fd, s.buffer, nil, flags)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, os.NewSyscallError("recvmsg", err)
		}
		if kernel, ok := from.(*unix.SockaddrNetlink); !ok || kernel.Pid != 0 {
			continue // another process may send what it likes
		}
		if is&unix.MSG_TRUNC != 0 {
			return nil, errors.New("nftables answers with more than is known of it")
		}
		return syscall.ParseNetlinkMessage(s.buffer[:n])
	}
}

// errorOf is what NLMSG_ERROR, or the end of a list, says.
func errorOf(m syscall.NetlinkMessage) error {
	if len(m.Data) < 4 {
		return nil
	}
	if n := int32(binary.NativeEndian.Uint32(m.Data)); n < 0 {
		return os.NewSyscallError("nftables", unix.Errno(-n))
	}
	return nil
}

// appendMessage adds a message as the kernel reads it.
func appendMessage(to []byte, m netlink.Message) []byte {
	to = binary.NativeEndian.AppendUint32(to, uint32(unix.NLMSG_HDRLEN+len(m.Data)))
	to = binary.NativeEndian.AppendUint16(to, uint16(m.Header.Type))
	to = binary.NativeEndian.AppendUint16(to, uint16(m.Header.Flags))
	to = binary.NativeEndian.AppendUint32(to, m.Header.Sequence)
	to = binary.NativeEndian.AppendUint32(to, 0)
	to = append(to, m.Data...)
	return append(to, make([]byte, -len(to)&3)...)
}

// Comments are those of the rules of some chains, "" for a rule without one, and none for a chain
// that is not there. Nothing else of the rules is read: to read them whole takes three times as
// long, and each start of a VM waits for it.
func Comments(chains ...*nftables.Chain) (all [][]string, err error) {
	s, err := open()
	if err != nil {
		return nil, err
	}
	defer s.close()
	for _, c := range chains {
		attributes, err := netlink.MarshalAttributes([]netlink.Attribute{
			{Type: unix.NFTA_RULE_TABLE, Data: []byte(c.Table.Name + "\x00")},
			{Type: unix.NFTA_RULE_CHAIN, Data: []byte(c.Name + "\x00")},
		})
		if err != nil {
			return nil, err
		}
		rules, err := s.exchange([]netlink.Message{{
			Header: netlink.Header{
				Type:  unix.NFNL_SUBSYS_NFTABLES<<8 | unix.NFT_MSG_GETRULE,
				Flags: netlink.Request | netlink.Dump,
			},
			Data: append([]byte{byte(c.Table.Family), unix.NFNETLINK_V0, 0, 0}, attributes...),
		}})
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, unix.ENOENT) {
			return nil, fmt.Errorf("look at chain %s of table %s: %w", c.Name, c.Table.Name, err)
		}
		var comments []string
		for _, r := range rules {
			comments = append(comments, comment(r.Data))
		}
		all = append(all, comments)
	}
	return all, nil
}

// comment is that of a rule as the kernel tells it.
func comment(rule []byte) (text string) {
	const header = 4
	attributes, err := netlink.NewAttributeDecoder(rule[min(header, len(rule)):])
	if err != nil {
		return ""
	}
	for attributes.Next() {
		if attributes.Type() == unix.NFTA_RULE_USERDATA {
			text, _ = userdata.GetString(attributes.Bytes(), userdata.TypeComment)
		}
	}
	return text
}
