package share_test

import (
	"bytes"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"push.rocks/smartvm/internal/atomicfile"
	"push.rocks/smartvm/internal/share"
)

// What has failed is not tried again by each command, and less often each time; what has not is not
// put off.
func TestPending(t *testing.T) {
	path := filepath.Join(t.TempDir(), "pending.json")
	var log bytes.Buffer
	logger := slog.New(slog.NewTextHandler(&log, nil))
	if failed, later := share.PutOff(path, logger); failed || later {
		t.Error("there is nothing")
	}
	if err := atomicfile.WriteJSON(path, share.Pending{Taken: time.Now()}); err != nil {
		t.Fatal(err)
	}
	if failed, later := share.PutOff(path, logger); failed || later || log.Len() > 0 {
		t.Errorf("nothing has failed: %s", &log)
	}
	why, last := errors.New("no room "+strings.Repeat("\xff", 10_000)), time.Duration(0)
	for try := range 20 {
		p, err := share.ReadPending(path)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Failed(path, why); !errors.Is(err, why) || err.Error() != why.Error() {
			t.Fatal(err)
		}
		log.Reset()
		if failed, later := share.PutOff(path, logger); !failed || !later || strings.Count(log.String(), "\n") != 1 ||
			!strings.Contains(log.String(), "no room") {
			t.Errorf("%v, %v: %s", failed, later, &log)
		}
		pause := p.Due().Sub(p.Tried)
		if pause < last || pause > time.Hour || try == 0 && pause != time.Minute || try > 6 && pause != time.Hour {
			t.Errorf("try %d is followed by %v, after %v", try, pause, last)
		}
		last = pause
		p.Tried = p.Tried.Add(-pause)
		if err := atomicfile.WriteJSON(path, p); err != nil {
			t.Fatal(err)
		}
		if failed, later := share.PutOff(path, logger); !failed || later {
			t.Errorf("%v later: %v, %v", pause, failed, later)
		}
	}
	if err := share.Forget(path, path+".none"); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
}
