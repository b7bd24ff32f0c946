package dnsproxy

import (
	"sync"
	"time"
)

// Rate is how many questions a guest may ask.
type Rate struct {
	PerSecond int // 0: DefaultPerSecond
	Burst     int // at once, after some time without; 0: DefaultBurst
}

// The defaults of Rate are far above what programs ask, and far below what keeps a host's resolver
// busy.
const (
	DefaultPerSecond = 200
	DefaultBurst     = 400
)

// warnEvery is how often it is said that questions are dropped.
const warnEvery = time.Minute

// bucket counts the questions that a guest may ask now.
type bucket struct {
	Rate
	mu     sync.Mutex // protects the rest
	tokens float64
	at     time.Time
}

func newBucket(r Rate) *bucket { return &bucket{Rate: r, tokens: float64(r.Burst)} }

// take takes one, or returns when there may be one.
func (b *bucket) take(now time.Time) (wait time.Duration) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if !b.at.IsZero() {
		b.tokens = min(b.tokens+now.Sub(b.at).Seconds()*float64(b.PerSecond), float64(b.Burst))
	}
	b.at = now
	if b.tokens >= 1 {
		b.tokens--
		return 0
	}
	return max(time.Duration((1-b.tokens)/float64(b.PerSecond)*float64(time.Second)), time.Millisecond)
}
