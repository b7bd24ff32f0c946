package agent

import (
	"context"
	"net"
	"sync"

	"push.rocks/smartvm/internal/agentproto"
)

// maxForwards bounds the connections of a Forward at a time.
const maxForwards = 256

// Forward leads the connections that l accepts to where dial connects, until ctx ends, which is its
// error, or l fails. Failed, if not nil, is told why one could not be. It closes l, and returns
// when no connection is left.
func Forward(ctx context.Context, l net.Listener, dial func(context.Context) (net.Conn, error),
	failed func(error),
) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = l.Close() })()
	slots := make(chan struct{}, maxForwards)
	for {
		c, err := l.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			return err
		}
		slots <- struct{}{}
		all.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			to, err := dial(ctx)
			if err != nil {
				if failed != nil && ctx.Err() == nil {
					failed(err)
				}
				return
			}
			defer to.Close()
			defer context.AfterFunc(ctx, func() { _, _ = c.Close(), to.Close() })()
			agentproto.Relay(to, c)
		})
	}
}
