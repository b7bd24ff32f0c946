package events_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"push.rocks/smartvm/internal/events"
	"push.rocks/smartvm/internal/testenv"
	"push.rocks/smartvm/status"
)

func ring(t *testing.T, limit int64) *events.Ring {
	return &events.Ring{Dir: filepath.Join(t.TempDir(), "ring"), Limit: limit, Failed: func(err error) { t.Error(err) }}
}

func add(t *testing.T, r *events.Ring, name string) {
	t.Helper()
	r.Append(status.Event{Type: status.EventStarted, Name: name})
	r.Flush()
}

// read takes n events, or what is said in place of one.
func read(ctx context.Context, r *events.Ring, since int64, n int) (got []status.Event,
	lost *status.LostError, err error,
) {
	for e, err := range r.Follow(ctx, since) {
		if errors.As(err, &lost) {
			continue
		}
		if err != nil {
			return got, lost, err
		}
		if got = append(got, e); len(got) == n {
			break
		}
	}
	return got, lost, nil
}

// Events of many processes come to each reader whole, once and in the order of their ids, across
// files that are replaced.
func TestRing_Order(t *testing.T) {
	testenv.NoLeaks(t)
	r := ring(t, 1<<20)
	add(t, r, "first")
	const writers, each = 4, 50
	var all sync.WaitGroup
	results := make(chan error, 2)
	for range 2 {
		all.Go(func() {
			got, lost, err := read(t.Context(), r, 0, 1+writers*each)
			seen := map[string]int{}
			last := int64(0)
			for _, e := range got {
				seen[e.Name]++
				if e.ID <= last || e.Time.IsZero() || e.Type != status.EventStarted {
					err = errors.Join(err, fmt.Errorf("%+v comes after %d", e, last))
				}
				last = e.ID
			}
			if len(seen) != 1+writers*each || lost != nil {
				err = errors.Join(err, fmt.Errorf("%d events, lost %v", len(seen), lost))
			}
			results <- err
		})
	}
	for w := range writers {
		all.Go(func() {
			own := &events.Ring{Dir: r.Dir, Limit: r.Limit, Failed: r.Failed}
			for i := range each {
				own.Append(status.Event{Type: status.EventStarted, Name: fmt.Sprint(w, "-", i)})
			}
			own.Flush()
		})
	}
	all.Wait()
	for range 2 {
		if err := <-results; err != nil {
			t.Error(err)
		}
	}
}

// Processes that append in turns, one of which leaves an incomplete line as a full file system
// does, lose nothing of each other's.
func TestRing_Turns(t *testing.T) {
	a := ring(t, 1<<20)
	b := &events.Ring{Dir: a.Dir, Limit: a.Limit, Failed: a.Failed}
	var want []string
	for i, r := range []*events.Ring{a, a, b, a, b, b, a} {
		want = append(want, fmt.Sprint(i))
		add(t, r, want[i])
		if i%2 == 0 {
			continue
		}
		f, err := os.OpenFile(filepath.Join(a.Dir, "events"), os.O_WRONLY|os.O_APPEND, 0)
		if err == nil {
			_, err = f.WriteString(`{"id":`)
			err = errors.Join(err, f.Close())
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	got, lost, err := read(t.Context(), a, 0, len(want))
	if err != nil || lost != nil {
		t.Fatal(err, lost)
	}
	for i, e := range got {
		if e.Name != want[i] || i > 0 && e.ID <= got[i-1].ID {
			t.Errorf("event %d is %+v", i, e)
		}
	}
}

// A ring keeps the newest events; a reader that comes too late is told between which ids it has
// lost some, and ids go on.
func TestRing_Lost(t *testing.T) {
	r := ring(t, 1000)
	add(t, r, "first")
	first, _, err := read(t.Context(), r, 0, 1)
	if err != nil {
		t.Fatal(err)
	}
	const n = 100
	for i := range n {
		add(t, r, fmt.Sprint(i))
	}
	kept, lost, err := read(t.Context(), r, 0, 1)
	if err != nil || lost != nil || kept[0].ID <= first[0].ID {
		t.Fatalf("from the oldest on: %+v, %v, %v", kept, lost, err)
	}
	got, lost, err := read(t.Context(), r, first[0].ID, 1)
	if err != nil || lost == nil || lost.Since != first[0].ID || lost.Through < first[0].ID || got[0].ID != kept[0].ID ||
		got[0].ID <= lost.Through {
		t.Errorf("got %+v, %v, %v, want the loss and then %d", got, lost, err, kept[0].ID)
	}
	if got, lost, err := read(t.Context(), r, kept[0].ID, 1); err != nil || lost != nil || got[0].ID <= kept[0].ID {
		t.Errorf("after one that is kept: %+v, %v, %v", got, lost, err)
	}
	var size int64
	for _, name := range []string{"events", "events.1"} {
		fi, err := os.Stat(filepath.Join(r.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		size += fi.Size()
	}
	if size > 3000 {
		t.Errorf("the ring has %d bytes", size)
	}
}

// A reader that stands still while the ring turns over is told so, and goes on with what is there.
func TestRing_Slow(t *testing.T) {
	r := ring(t, 1000)
	add(t, r, "first")
	var lost *status.LostError
	got := 0
	for e, err := range r.Follow(t.Context(), 0) {
		if errors.As(err, &lost) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.Name == "first" {
			for i := range 100 {
				add(t, r, fmt.Sprint(i))
			}
		}
		if got++; e.Name == "99" {
			break
		}
	}
	if lost == nil || got > 50 {
		t.Errorf("lost %v, %d events", lost, got)
	}
}

// What comes is told at once, and the end of the context ends it. A line that a full disk has cut
// off is no event and breaks none.
func TestRing_Now(t *testing.T) {
	r := ring(t, 1<<20)
	add(t, r, "before")
	path := filepath.Join(r.Dir, "events")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err == nil {
		_, err = f.WriteString(`{"id":99,"na`)
		err = errors.Join(err, f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	told := make(chan status.Event)
	ended := make(chan error, 1)
	go func() {
		for e, err := range r.Follow(ctx, events.Now) {
			if err != nil {
				ended <- err
				return
			}
			told <- e
		}
	}()
	// Which of them comes first depends on when the reader is there; "before" never does.
	var got status.Event
	for got.Name == "" {
		add(t, r, "after")
		select {
		case got = <-told:
		case err := <-ended:
			t.Fatal(err)
		case <-time.After(time.Millisecond): // the reader's turn
		}
	}
	if got.Name != "after" {
		t.Errorf("got %+v", got)
	}
	over := errors.New("over")
	go func() {
		for range told {
		}
	}()
	cancel(over)
	if err := <-ended; !errors.Is(err, over) {
		t.Errorf("it ended with %v", err)
	}
	close(told)
}
