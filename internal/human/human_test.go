package human_test

import (
	"bytes"
	"testing"
	"testing/synctest"
	"time"

	"push.rocks/smartvm/internal/human"
)

func TestStatus(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var b bytes.Buffer
		done := human.Status(&b, human.Doing("stopping"))
		time.Sleep(900 * time.Millisecond)
		done()
		done()
		if got := b.String(); got != "" {
			t.Errorf("what is over at once was told: %q", got)
		}
		done = human.Status(&b, human.Doing("stopping"))
		time.Sleep(2300 * time.Millisecond)
		done()
		const clear = "\r\x1b[K"
		if got, want := b.String(), clear+"stopping, 1 s"+clear+"stopping, 2 s"+clear; got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

func TestProgress(t *testing.T) {
	var p human.Progress
	if got := p.Text(0); got != "" {
		t.Errorf("got %q, want nothing", got)
	}
	p.Set("data", 512<<20, 2<<30)
	if got, want := p.Text(0), "copying drive data: 512 MiB of 2.0 GiB (25 %)"; got != want {
		t.Errorf("got %q, want %q", got, want)
	}
	p.Set("data", 2<<30, 2<<30)
	if got := p.Text(0); got != "" {
		t.Errorf("got %q after the end", got)
	}
}

func TestAgo(t *testing.T) {
	for d, want := range map[time.Duration]string{
		-time.Hour: "moments", 0: "moments", time.Second: "1s", 90 * time.Second: "1m", 47 * time.Hour: "47h",
		49 * time.Hour: "2d",
	} {
		if got := human.Ago(d); got != want {
			t.Errorf("%v: got %q, want %q", d, got, want)
		}
	}
}

func TestShort(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0B", 999: "999B", 1000: "1.0K", 1024: "1.0K", 512 << 20: "512M",
		1023 << 20: "1.0G", 1536 << 20: "1.5G", 10 << 30: "10G", 1<<64 - 1: "16E",
	} {
		if got := human.Short(n); got != want {
			t.Errorf("%d: got %s, want %s", n, got, want)
		}
	}
}
