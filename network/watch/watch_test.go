package watch_test

import (
	"context"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"

	"push.rocks/smartvm/internal/testenv/nettest"
	"push.rocks/smartvm/network/filter"
	"push.rocks/smartvm/network/watch"
)

// What the kernel could not tell may have been about any table, though what it could was of others.
func TestWatch_Lost(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	conn, err := nftables.New()
	if err != nil {
		t.Fatal(err)
	}
	other := conn.AddTable(&nftables.Table{Name: filter.TableName("other"), Family: nftables.TableFamilyINet})
	chain := conn.AddChain(&nftables.Chain{Table: other, Name: "chain"})
	for range 40 { // to tell of all these takes more than a socket holds
		for range 100 {
			conn.AddRule(&nftables.Rule{Table: other, Chain: chain, Exprs: []expr.Any{&expr.Counter{}}})
		}
		if err := conn.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithTimeout(t.Context(), time.Minute)
	defer stop()
	listens, read, event, done := make(chan struct{}, 2), make(chan struct{}), make(chan struct{}, 1), make(chan error, 1)
	go func() {
		done <- watch.Watch(ctx, []string{filter.TableName("own")}, nil, func() { listens <- struct{}{}; <-read }, func() { event <- struct{}{} })
	}()
	<-listens // to tables, and to links
	<-listens
	conn.DelTable(other)
	if err := conn.Flush(); err != nil {
		t.Fatal(err)
	}
	close(read)
	select {
	case <-event:
	case <-ctx.Done():
		t.Error("no event")
	}
	stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
