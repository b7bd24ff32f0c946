package smartvm

import (
	"errors"
	"io"
	"path/filepath"

	"push.rocks/smartvm/internal/logfile"
	"push.rocks/smartvm/internal/store"
	"push.rocks/smartvm/internal/vmm"
)

// What is kept of the streams of a VM, in bytes.
const (
	consoleLimit = 2 << 20
	logLimit     = 1 << 20
	metricsLimit = 16 << 20
)

// streams opens the files that take what the VMM writes. Console, if not nil, gets the guest's part as it comes.
func (m *Machine) streams(console io.Writer) (s vmm.Streams, err error) {
	if console == nil && m.host.opts.Console != nil {
		console = m.host.opts.Console(m.rec().ID)
	}
	files, metrics := make([]*logfile.Writer, 3), ""
	if m.rec().Spec.Metrics != nil {
		metrics = m.rec().Spec.Metrics.MetricsPath
	}
	for i, f := range []struct {
		path  string
		limit int64
	}{{m.ConsoleLog(), consoleLimit}, {m.VMMLog(), logLimit}, {metrics, metricsLimit}} {
		if f.path == "" {
			continue
		}
		create := logfile.Create
		if filepath.Dir(f.path) == m.RuntimeDir() {
			create = logfile.CreateTimed // elsewhere nobody wants more than what was named
		}
		if files[i], err = create(f.path, f.limit); err != nil {
			for _, opened := range files[:i] {
				err = errors.Join(err, opened.Close())
			}
			return s, err
		}
	}
	s.Console, s.Log = logfile.Tee{Writer: files[0], Live: console}, files[1]
	if files[2] != nil {
		s.Metrics = files[2]
	}
	return s, nil
}

// CommandLog is what the command of a Run put out, kept as ConsoleLog is; there is none where the console has it.
func (m *Machine) CommandLog() string { return m.path(store.CommandLog) }
