// Package batch gathers what several ask for at the same time.
package batch

import "sync"

// Batch does to many at once what several ask for: while one call is under way, the others gather.
type Batch[T any] struct {
	mu      sync.Mutex
	busy    bool
	waiting []request[T]
}

type request[T any] struct {
	what T
	done chan error
}

// Do returns what all returned for the things that it was called with, what among them.
func (b *Batch[T]) Do(what T, all func([]T) error) error {
	mine := request[T]{what, make(chan error, 1)}
	b.mu.Lock()
	b.waiting = append(b.waiting, mine)
	if b.busy {
		b.mu.Unlock()
		return <-mine.done
	}
	b.busy = true
	for len(b.waiting) > 0 {
		now := b.waiting
		b.waiting = nil
		b.mu.Unlock()
		things := make([]T, len(now))
		for i, r := range now {
			things[i] = r.what
		}
		err := all(things)
		for _, r := range now {
			r.done <- err
		}
		b.mu.Lock()
	}
	b.busy = false
	b.mu.Unlock()
	return <-mine.done
}
