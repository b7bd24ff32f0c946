package human

import (
	"fmt"
	"strings"
	"sync"
	"time"
)

// Transfer is how far something is that has steps, each so many bytes long. The zero value is one
// that has not begun.
type Transfer struct {
	mu    sync.Mutex
	step  string
	begun time.Time // of the step
	from  int64     // bytes that were there when it began: they came without waiting
	done  int64
	total int64 // 0: unknown
}

// Set says how far a step is. Another step's name begins that one.
func (t *Transfer) Set(step string, done, total int64) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if step != t.step {
		t.step, t.begun, t.from = step, time.Now(), done
	}
	t.done, t.total = done, total
}

// barWidth is that of the bar, in columns: the whole line fits into 80.
const barWidth = 20

// Text is for Status: the step, a bar, bytes, rate and what remains.
func (t *Transfer) Text(time.Duration) string {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.step == "" {
		return ""
	}
	rate := float64(t.done-t.from) / max(time.Since(t.begun).Seconds(), 1e-3)
	if t.total <= 0 {
		return fmt.Sprintf("%-14.14s %s  %s/s", t.step, Size(t.done), Size(int64(rate)))
	}
	full := int(barWidth * min(t.done, t.total) / t.total)
	text := fmt.Sprintf("%-14.14s [%s%s] %s of %s  %s/s", t.step, strings.Repeat("#", full),
		strings.Repeat(".", barWidth-full),
		Size(t.done), Size(t.total), Size(int64(rate)))
	if left := float64(t.total-t.done) / max(rate, 1); rate > 0 && left >= 1 && left < 1e6 {
		text += "  " + Ago(time.Duration(left*float64(time.Second))) + " left"
	}
	return text
}
