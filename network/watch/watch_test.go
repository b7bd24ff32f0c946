package watch_test

import (
	"context"
	"errors"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"

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
		done <- watch.Watch(ctx, watch.Of{Tables: []string{filter.TableName("own")}}, func() {
			listens <- struct{}{}
			<-read
		}, func() { event <- struct{}{} }, func() {})
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

// Who leads guests by rules of routes hears when one is gone.
func TestWatch_RouteRule(t *testing.T) {
	if !nettest.Alone(t) {
		return
	}
	for _, family := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		ctx, stop := context.WithTimeout(t.Context(), time.Minute)
		listens, event, done := make(chan struct{}, 2), make(chan struct{}, 1), make(chan error, 1)
		go func() {
			done <- watch.Watch(ctx, watch.Of{Tables: []string{filter.TableName("own")}}, func() {
				listens <- struct{}{}
			}, func() { event <- struct{}{} }, func() {})
		}()
		<-listens
		<-listens
		rule := netlink.NewRule()
		rule.Family, rule.Priority, rule.Table = family, 5000, 77
		if err := errors.Join(netlink.RuleAdd(rule), netlink.RuleDel(rule)); err != nil {
			t.Fatal(err)
		}
		select {
		case <-event:
		case <-ctx.Done():
			t.Errorf("no event of family %d", family)
		}
		stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}
