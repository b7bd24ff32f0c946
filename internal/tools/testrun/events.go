package main

import (
	"bytes"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"time"
)

// Marks in what test binaries and we ourselves print. Go's begin with this byte when they are told
// to write for test2json, wherever in a line that is.
const (
	mark      = "\x16"
	leftMark  = mark + "=== LEFT "
	beginMark = mark + "=== PACKAGE "
	endMark   = mark + "=== STATUS "
)

var (
	runLine    = regexp.MustCompile(`^=== RUN +([^/\s]+)$`)
	resultLine = regexp.MustCompile(`^--- (PASS|FAIL|SKIP): ([^/\s]+) \(([\d.]+)s\)$`)
	waitLine   = regexp.MustCompile(`: waited ([\d.]+)s for other packages' tests$`)
)

// result is how a test ended.
type result struct {
	pkg, test string
	outcome   string // PASS, FAIL, SKIP
	took      time.Duration
	lab       bool
}

// watcher follows the output of test binaries. It keeps what they say, and calls expired when one
// test takes longer than it may.
type watcher struct {
	mu      sync.Mutex
	limit   func(test string) time.Duration
	expired func(error)
	ended   func(result) // called for each test, if set

	pkg     string // in whose tests we are; in an emulated host the test's name follows
	test    string // that runs
	timer   *time.Timer
	line    []byte
	said    map[string]*bytes.Buffer // these are by pkg
	left    map[string][]string      // processes that outlived it
	status  map[string]int           // of what has come to its end
	results []result
	waited  time.Duration
}

// betweenTests is how long a package may take outside of its tests, on a quiet machine.
const betweenTests = time.Minute

func newWatcher(pkg string, limit func(test string) time.Duration, expired func(error)) *watcher {
	w := &watcher{
		pkg: pkg, limit: limit, expired: expired,
		said: map[string]*bytes.Buffer{pkg: {}}, left: map[string][]string{}, status: map[string]int{},
	}
	w.timer = time.AfterFunc(w.limit(""), w.expire)
	return w
}

func (w *watcher) expire() {
	w.mu.Lock()
	test, limit := w.test, w.limit(w.test)
	w.mu.Unlock()
	if test == "" {
		test = "between tests"
	}
	w.expired(fmt.Errorf("%s, %s: over its limit of %v", w.pkg, test, limit.Round(time.Second)))
}

// stop ends the watch.
func (w *watcher) stop() { w.timer.Stop() }

// Write never fails.
func (w *watcher) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for rest := p; len(rest) > 0; {
		line, more, whole := bytes.Cut(rest, []byte("\n"))
		w.line = append(w.line, line...)
		if whole {
			w.take(w.line)
			w.line = w.line[:0]
		}
		rest = more
	}
	return len(p), nil
}

// maxSaid bounds what is kept of a package's output.
const maxSaid = 4 << 20

// take takes a line.
func (w *watcher) take(line []byte) {
	said := w.said[w.pkg]
	if said == nil {
		said = new(bytes.Buffer)
		w.said[w.pkg] = said
	}
	i := bytes.IndexByte(line, mark[0])
	if over := said.Len() + len(line) - maxSaid; over > 0 {
		said.Next(over)
	}
	said.Write(bytes.ReplaceAll(line, []byte(mark), nil))
	said.WriteByte('\n')
	if m := waitLine.FindSubmatch(line); m != nil {
		w.waited += seconds(m[1])
	}
	if i < 0 {
		return
	}
	marked := line[i:]
	if pkg, ok := bytes.CutPrefix(marked, []byte(beginMark)); ok {
		w.pkg, w.test = string(pkg), ""
	}
	if status, ok := bytes.CutPrefix(marked, []byte(endMark)); ok {
		w.status[w.pkg], _ = strconv.Atoi(string(status))
	}
	if process, ok := bytes.CutPrefix(marked, []byte(leftMark)); ok {
		w.left[w.pkg] = append(w.left[w.pkg], string(process))
	}
	if m := runLine.FindSubmatch(marked[1:]); m != nil {
		w.test = string(m[1])
		w.timer.Reset(w.limit(w.test))
	}
	if m := resultLine.FindSubmatch(marked[1:]); m != nil {
		path, _, _ := strings.Cut(w.pkg, " ")
		res := result{pkg: path, test: string(m[2]), outcome: string(m[1]), took: seconds(m[3])}
		w.results = append(w.results, res)
		if w.ended != nil {
			w.ended(res)
		}
		w.test = ""
		w.timer.Reset(w.limit(""))
	}
}

func seconds(text []byte) time.Duration {
	s, _ := strconv.ParseFloat(string(text), 64)
	return time.Duration(s * float64(time.Second))
}

// running returns the package and test that run.
func (w *watcher) running() (pkg, test string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pkg, w.test
}
