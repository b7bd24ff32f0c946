package agentproto

import (
	"io"
	"net"
	"sync"
)

// Relay passes on what either connection says to the other, and each one's end, until both have
// ended. The caller closes them.
func Relay(a, b net.Conn) {
	var both sync.WaitGroup
	for _, way := range [][2]net.Conn{{a, b}, {b, a}} {
		both.Go(func() {
			_, _ = io.Copy(way[0], way[1])
			if c, ok := way[0].(interface{ CloseWrite() error }); ok {
				_ = c.CloseWrite()
			}
		})
	}
	both.Wait()
}
