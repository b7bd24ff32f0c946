// Package human says things the way people like to read them: sizes, ages, and on a terminal one
// line about what takes its time.
package human

import (
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"
)

const (
	statusDelay = time.Second
	statusEvery = 250 * time.Millisecond // between two looks
	clearLine   = "\r\x1b[K"
)

// Status shows one line of text on the terminal w, and shows it anew when it changes, until done is
// called. What is over within a second is not worth a line. A text of "" shows nothing.
func Status(w io.Writer, text func(elapsed time.Duration) string) (done func()) {
	var wg sync.WaitGroup
	stop := make(chan struct{})
	wg.Go(func() { draw(w, stop, text) })
	return sync.OnceFunc(func() {
		close(stop)
		wg.Wait()
	})
}

func draw(w io.Writer, stop <-chan struct{}, text func(time.Duration) string) {
	begun := time.Now()
	shown := ""
	next := time.NewTimer(statusDelay)
	defer next.Stop()
	for {
		select {
		case <-stop:
			if shown != "" {
				fmt.Fprint(w, clearLine)
			}
			return
		case <-next.C:
			next.Reset(statusEvery)
		}
		if now := text(time.Since(begun)); now != shown {
			fmt.Fprint(w, clearLine, now)
			shown = now
		}
	}
}

// Doing is the text of a Status about something of unknown length.
func Doing(what string) func(time.Duration) string {
	return func(d time.Duration) string { return fmt.Sprintf("%s, %d s", what, int(d.Seconds())) }
}

// Progress is how far the copy of a drive is. Its zero value is that of none.
type Progress struct{ now atomic.Pointer[copied] }

type copied struct {
	drive       string
	done, total int64
}

// Set says how far it is, in bytes.
func (p *Progress) Set(drive string, done, total int64) { p.now.Store(&copied{drive, done, total}) }

// Text is for Status.
func (p *Progress) Text(time.Duration) string {
	c := p.now.Load()
	if c == nil || c.done >= c.total {
		return ""
	}
	return fmt.Sprintf("copying drive %s: %s of %s (%d %%)", c.drive, Size(c.done), Size(c.total), c.done*100/c.total)
}

// Size is a number of bytes for people.
func Size(n int64) string {
	switch {
	case n < 1<<20:
		return fmt.Sprintf("%d KiB", n>>10)
	case n < 1<<30:
		return fmt.Sprintf("%d MiB", n>>20)
	}
	return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30))
}

// Short is a number of bytes for people who have little room: 512K, 1.5G.
func Short(n uint64) string {
	units := "BKMGTPE"
	value, unit := float64(n), 0
	for value >= 1000 && unit < len(units)-1 { // never four digits
		value, unit = value/1024, unit+1
	}
	if unit > 0 && value < 9.95 {
		return fmt.Sprintf("%.1f%c", value, units[unit])
	}
	return fmt.Sprintf("%.0f%c", value, units[unit])
}

// Ago is a length of time for people.
func Ago(d time.Duration) string {
	switch {
	case d < time.Second:
		return "moments"
	case d < time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
