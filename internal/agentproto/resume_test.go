package agentproto_test

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"sync"
	"testing"
	"time"

	"push.rocks/smartvm/internal/agentproto"
)

// brittle breaks when so many bytes have gone through it, in either direction.
type brittle struct {
	net.Conn
	mu   *sync.Mutex
	left *int
}

var errBroken = errors.New("broken")

func (b brittle) take(n int) int {
	b.mu.Lock()
	defer b.mu.Unlock()
	n = min(n, *b.left)
	*b.left -= n
	return n
}

func (b brittle) Write(p []byte) (int, error) {
	n := b.take(len(p))
	written, err := b.Conn.Write(p[:n])
	if err == nil && n < len(p) {
		_ = b.Close()
		err = errBroken
	}
	return written, err
}

const patience = time.Minute

// pair makes two ends of a connection that goes on, and on, by links which last for so many bytes
// each, the last one for ever. Ahead is by how much the ends lie about what they have received.
func pair(lasts []int, ahead uint64) (a, b *agentproto.Conn) {
	type offer struct {
		conn     net.Conn
		received uint64
		answer   chan uint64
	}
	offers := make(chan offer)
	link := func() (p, q net.Conn) {
		p, q = net.Pipe()
		if len(lasts) == 0 {
			return p, q
		}
		mu, left := new(sync.Mutex), lasts[0]
		lasts = lasts[1:]
		return brittle{p, mu, &left}, brittle{q, mu, &left}
	}
	p, q := link()
	a, b = agentproto.NewConn(p), agentproto.NewConn(q)
	a.Resumable(0, func(lost error) (agentproto.Link, error) {
		p, q := link()
		o := offer{q, a.Received() + ahead, make(chan uint64, 1)}
		select {
		case offers <- o:
			return agentproto.Link{Conn: agentproto.NewConn(p), Received: <-o.answer}, nil
		case <-a.Done():
		case <-b.Done():
		}
		return agentproto.Link{}, lost
	})
	b.Resumable(0, func(lost error) (agentproto.Link, error) {
		select {
		case o := <-offers:
			o.answer <- b.Received() + ahead
			return agentproto.Link{Conn: agentproto.NewConn(o.conn), Received: o.received}, nil
		case <-a.Done():
		case <-b.Done():
		}
		return agentproto.Link{}, lost
	})
	return a, b
}

// talk has both ends send and receive streams and frames of their own, and says what is wrong with
// what comes.
func talk(t *testing.T, a, b *agentproto.Conn, sizes map[agentproto.Kind]int) {
	t.Helper()
	data := make([]byte, 1<<20)
	chacha := rand.NewChaCha8([32]byte{})
	_, _ = chacha.Read(data)
	var all, done sync.WaitGroup
	for k, size := range sizes {
		from, to, half := a, b, 0
		if k != agentproto.KindStdin {
			from, to, half = b, a, 1<<10
		}
		want := bytes.Repeat(data[half:], 1+size/len(data))[:size]
		in, out := to.Inbox(k), from.Writer(k)
		done.Go(func() {
			got, err := io.ReadAll(in)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("stream %d: %d bytes of %d, %v", k, len(got), len(want), err)
			}
		})
		all.Go(func() {
			for rest := want; len(rest) > 0; {
				n := min(len(rest), 1+rand.IntN(40000))
				if _, err := out.Write(rest[:n]); err != nil {
					t.Errorf("stream %d: %v", k, err)
					return
				}
				rest = rest[n:]
			}
			_ = out.Close()
		})
	}
	signals := 10 + sizes[agentproto.KindStdin]>>16
	all.Go(func() {
		for i := range signals {
			_ = a.Send(agentproto.KindSignal, []byte{byte(i)})
		}
	})
	received := make(chan int, 1)
	go func() {
		n := 0
		for {
			k, payload, err := b.Receive()
			if err != nil {
				break
			}
			if k != agentproto.KindSignal || payload[0] != byte(n) {
				t.Errorf("frame %d: kind %d, %v", n, k, payload)
			}
			n++
		}
		received <- n
	}()
	go func() {
		for {
			if _, _, err := a.Receive(); err != nil {
				return
			}
		}
	}()
	all.Wait()
	done.Wait()
	if err := a.SendSurely(agentproto.KindSignal, []byte{byte(signals)}, patience); err != nil {
		t.Error(err)
	}
	_, _ = a.Close(), b.Close()
	if n := <-received; n != signals+1 {
		t.Errorf("%d signals came, not %d", n, signals+1)
	}
}

// However often what carries a connection breaks, and wherever, all comes, once and in order.
func TestConn_Resumable(t *testing.T) {
	var lasts []int
	for range 300 {
		lasts = append(lasts, rand.IntN(150<<10))
	}
	a, b := pair(lasts, 0)
	talk(t, a, b,
		map[agentproto.Kind]int{
			agentproto.KindStdin: 6 << 20, agentproto.KindStdout: 6 << 20,
			agentproto.KindStderr: 100 << 10,
		})
}

// It breaks at every byte of what is said first.
func TestConn_ResumableAnywhere(t *testing.T) {
	const most = 700 // is said
	for n := range most {
		a, b := pair([]int{n, most - n}, 0)
		talk(t, a, b, map[agentproto.Kind]int{agentproto.KindStdin: 300, agentproto.KindStdout: 200})
	}
}

// Who says that more has come than was sent ends the connection, and no more is kept than is
// allowed for who says nothing.
func TestConn_ResumableHostile(t *testing.T) {
	a, b := pair([]int{100}, 1<<40)
	go func() { _, _ = a.Writer(agentproto.KindStdin).Write(make([]byte, 1<<20)) }()
	b.Inbox(agentproto.KindStdin)
	go func() { _, _, _ = b.Receive() }()
	if _, _, err := a.Receive(); !errors.Is(err, agentproto.ErrProtocol) {
		t.Errorf("got %v", err)
	}
	_, _ = a.Close(), b.Close()

	p, q := net.Pipe()
	c := agentproto.NewConn(p)
	c.Resumable(0, agentproto.GiveUp)
	sent := make(chan int)
	go func() {
		n, _ := c.Writer(agentproto.KindStdin).Write(make([]byte, 1<<20))
		sent <- n
	}()
	// The last frame may not fit.
	const most, largest = 256 << 10, 64 << 10
	buf := make([]byte, 1<<10)
	for n := 0; n < most-largest; {
		m, err := q.Read(buf)
		if n += m; err != nil {
			t.Fatal(err)
		}
	}
	_ = c.Close()
	if n := <-sent; n == 0 || n > most {
		t.Errorf("%d bytes were taken without an answer", n)
	}
}

// A frame that is larger than all that is kept comes too, behind a small one of which nobody is
// told.
func TestConn_ResumableLarge(t *testing.T) {
	a, b := pair([]int{1 << 10, 100 << 10, 1 << 20}, 0)
	large := bytes.Repeat([]byte("large"), 1<<18)
	go func() {
		for range 3 {
			_ = errors.Join(a.Send(agentproto.KindResize, make([]byte, 4)), a.Send(agentproto.KindExit, large))
		}
	}()
	go func() { _, _, _ = a.Receive() }()
	for range 3 {
		if k, _, err := b.Receive(); k != agentproto.KindResize || err != nil {
			t.Fatalf("frame of kind %d, %v", k, err)
		}
		if k, got, err := b.Receive(); k != agentproto.KindExit || err != nil || !bytes.Equal(got, large) {
			t.Fatalf("frame of kind %d with %d bytes, %v", k, len(got), err)
		}
	}
	_, _ = a.Close(), b.Close()
}

func FuzzResumable(f *testing.F) {
	f.Add([]byte{0, 0, 1, 200, 3}, uint16(1000), uint16(50000))
	f.Add([]byte{255, 255, 255, 1, 1, 1}, uint16(65535), uint16(0))
	f.Fuzz(func(t *testing.T, breaks []byte, there, back uint16) {
		var lasts []int
		for _, n := range breaks[:min(len(breaks), 200)] {
			lasts = append(lasts, int(n)*int(n))
		}
		a, b := pair(lasts, 0)
		talk(t, a, b, map[agentproto.Kind]int{agentproto.KindStdin: int(there) * 8, agentproto.KindStdout: int(back) * 8})
	})
}
