package flowlog

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Errors of listen.
var (
	errTaken = errors.New("another process listens")
	// ErrNotSupported says that the kernel has no nfnetlink_log.
	ErrNotSupported = errors.New("this kernel has no nfnetlink_log")
)

// What nfnetlink_log is asked for (linux/netfilter/nfnetlink_log.h).
const (
	messagePacket = unix.NFNL_SUBSYS_ULOG << 8
	messageConfig = unix.NFNL_SUBSYS_ULOG<<8 | 1

	configCommand, commandBind  = 1, 1
	configMode, modeCopyPacket  = 2, 2
	configTimeout, configThresh = 4, 5

	copied  = 128      // bytes of a packet: IP's header, some that extend it, and ports
	delay   = 10       // of a message that waits for others, in hundredths of a second
	waiting = 64       // messages at most
	buffer  = 16 << 20 // bytes of messages that were not received yet; nothing is set aside
)

// listener hears what rules log to a group.
type listener struct{ conn *netlink.Conn }

// listen returns a listener of the calling thread's network. Returns errTaken where there is one,
// ErrNotSupported.
func listen(group uint16) (*listener, error) {
	conn, err := netlink.Dial(unix.NETLINK_NETFILTER, nil)
	if err != nil {
		return nil, fmt.Errorf("listen to rules: %w", err)
	}
	number := func(n uint32) []byte { return binary.BigEndian.AppendUint32(nil, n) }
	config, err := netlink.MarshalAttributes([]netlink.Attribute{
		{Type: configCommand, Data: []byte{commandBind}},
		{Type: configMode, Data: append(number(copied), modeCopyPacket, 0)},
		{Type: configTimeout, Data: number(delay)},
		{Type: configThresh, Data: number(waiting)},
	})
	if err == nil {
		err = conn.SetReadBuffer(buffer)
	}
	if err == nil {
		data := append(binary.BigEndian.AppendUint16([]byte{unix.AF_UNSPEC, unix.NFNETLINK_V0}, group), config...)
		_, err = conn.Execute(
			netlink.Message{
				Header: netlink.Header{Type: messageConfig, Flags: netlink.Request | netlink.Acknowledge},
				Data:   data,
			})
	}
	switch {
	case err == nil:
		return &listener{conn}, nil
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EBUSY), errors.Is(err, unix.EEXIST):
		// EPERM is the group's too: it is another socket's
		err = fmt.Errorf("%w: %w", errTaken, err)
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		err = fmt.Errorf("%w: %w", ErrNotSupported, err)
	}
	return nil, errors.Join(fmt.Errorf("listen to rules: %w", err), conn.Close())
}

// receive returns what has come, by its sender's MAC.
func (l *listener) receive() (map[string][]Event, error) {
	messages, err := l.conn.Receive()
	if err != nil && !errors.Is(err, unix.ENOBUFS) { // some were lost
		return nil, fmt.Errorf("listen to rules: %w", err)
	}
	all := map[string][]Event{}
	for _, m := range messages {
		if m.Header.Type != messagePacket {
			continue
		}
		if sender, e, ok := parseMessage(m.Data); ok {
			all[sender] = append(all[sender], e)
		}
	}
	return all, nil
}

func (l *listener) Close() error { return l.conn.Close() }
