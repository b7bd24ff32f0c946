package fakefc

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// programName is what the fake is run as, and scriptSuffix what its script's name adds to it.
const (
	programName  = "firecracker"
	scriptSuffix = ".json"
)

// Script says how the fake program behaves. Its zero value behaves well.
type Script struct {
	Version       string           `json:"version,omitempty"`        // DefaultVersion if empty
	VersionOutput string           `json:"version_output,omitempty"` // all that --version prints, in place of a version
	VersionHang   bool             `json:"version_hang,omitempty"`   // --version never ends
	Format        string           `json:"format,omitempty"`         // of snapshots; DefaultFormat if empty
	NoSocket      bool             `json:"no_socket,omitempty"`      // never opens the API socket, and stays
	ExitAtOnce    *Exit            `json:"exit_at_once,omitempty"`   // ends before the API socket
	ExitOnAccept  *Exit            `json:"exit_on_accept,omitempty"` // ends when the API socket is connected to
	Faults        map[string]Fault `json:"faults,omitempty"`         // as in Config
	ConsoleBytes  int              `json:"console_bytes,omitempty"`  // printed, in lines, once the VM is started
}

// Install makes a program named firecracker in dir that is the running test binary, and behaves as
// script says. It returns the program's path.
func Install(dir string, script Script) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	text, err := json.Marshal(script)
	if err != nil {
		return "", err
	}
	program := filepath.Join(dir, programName)
	if err := os.WriteFile(program+scriptSuffix, text, 0o600); err != nil {
		return "", err
	}
	// Either can tell its own path however it is run. A test binary is large, but dir may be on
	// another file system.
	if os.Link(self, program) == nil {
		return program, nil
	}
	return program, copyProgram(program, self)
}

func copyProgram(to, from string) (err error) {
	src, err := os.Open(from)
	if err != nil {
		return err
	}
	defer src.Close()
	dst, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o700)
	if err != nil {
		return err
	}
	_, err = io.Copy(dst, src)
	return errors.Join(err, dst.Close())
}

// Called reports whether the test binary was run as the fake program.
func Called(args []string) bool { return filepath.Base(args[0]) == programName }

// Main is the fake program. It returns the exit status.
func Main(args []string, stdout, stderr io.Writer) int {
	script, err := loadScript(args[0])
	if err != nil {
		fmt.Fprintln(stderr, err)
		return 2
	}
	flags, err := parseFlags(args[1:])
	if err != nil {
		fmt.Fprintln(stderr, "Arguments parsing error:", err)
		return 153
	}
	p := program{script: script, flags: flags, stdout: stdout, log: stdout}
	if _, ok := flags["--version"]; ok {
		return p.printVersion()
	}
	if _, ok := flags["--snapshot-version"]; ok {
		fmt.Fprintf(p.stdout, "v%s\n%s\n", cmp.Or(script.Format, DefaultFormat), exiting)
		return 0
	}
	if path := flags["--log-path"]; path != "" {
		file, err := os.OpenFile(path, os.O_WRONLY, 0)
		if err != nil {
			return p.end(Exit{Status: 1, Message: err.Error()})
		}
		defer file.Close()
		p.log = file
	}
	if script.ExitAtOnce != nil {
		return p.end(*script.ExitAtOnce)
	}
	if script.NoSocket {
		hang()
	}
	return p.run()
}

func loadScript(arg0 string) (Script, error) {
	var script Script
	text, err := os.ReadFile(arg0 + scriptSuffix)
	if err != nil {
		self, _ := os.Executable()
		text, err = os.ReadFile(self + scriptSuffix)
	}
	if err != nil {
		return script, err
	}
	return script, json.Unmarshal(text, &script)
}

// parseFlags knows the VMM's flags, and that it takes no --flag=value and nothing twice.
func parseFlags(args []string) (map[string]string, error) {
	flags := map[string]string{}
	for i := 0; i < len(args); i++ {
		name, value := args[i], ""
		switch name {
		case "--version", "--snapshot-version", "--no-api", "--boot-timer", "--show-level", "--show-log-origin",
			"--enable-pci", "--no-seccomp":
		case "--id", "--api-sock", "--config-file", "--metadata", "--log-path", "--level", "--module", "--metrics-path",
			"--http-api-max-payload-size", "--mmds-size-limit", "--seccomp-filter",
			"--start-time-us", "--start-time-cpu-us", "--parent-cpu-time-us":
			if i++; i == len(args) || strings.HasPrefix(args[i], "--") {
				return nil, fmt.Errorf("argument %q needs a value", name)
			}
			value = args[i]
		default:
			return nil, fmt.Errorf("found argument %q which wasn't expected", name)
		}
		if _, twice := flags[name]; twice {
			return nil, fmt.Errorf("argument %q was provided more than once", name)
		}
		flags[name] = value
	}
	return flags, nil
}

type program struct {
	script      Script
	flags       map[string]string
	stdout, log io.Writer
}

func (p *program) printVersion() int {
	if p.script.VersionHang {
		hang()
	}
	if p.script.VersionOutput != "" {
		_, _ = io.WriteString(p.stdout, p.script.VersionOutput)
		return 0
	}
	fmt.Fprintf(p.stdout, "Firecracker v%s\n\n%s\n", cmp.Or(p.script.Version, DefaultVersion), exiting)
	return 0
}

// exiting is what the program logs after an answer.
const exiting = "2026-01-01T00:00:00.000000000 [anonymous-instance:main] Firecracker exiting successfully. exit_code=0"

// end says farewell as the VMM does.
func (p *program) end(e Exit) int {
	if e.Message != "" {
		fmt.Fprintln(p.log, e.Message)
	}
	return e.Status
}

// run serves the API, unless told not to, until a fault ends it.
func (p *program) run() int {
	exits := make(chan Exit, 1)
	server := New(Config{
		Version: p.script.Version,
		Format:  p.script.Format,
		ID:      p.flags["--id"],
		Faults:  p.script.Faults,
		Exit: func(e Exit) {
			select {
			case exits <- e:
			default:
			}
		},
		Started: func() { go p.console() },
	})
	defer server.Close()
	if path := p.flags["--config-file"]; path != "" {
		text, err := os.ReadFile(path)
		if err == nil {
			err = server.Boot(text)
		}
		if err != nil {
			return p.end(Exit{Status: 1, Message: err.Error()})
		}
	}
	if _, ok := p.flags["--no-api"]; ok {
		hang()
	}
	// Any file in its place is an error, and it is never unlinked.
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.flags["--api-sock"], Net: "unix"})
	if err != nil {
		return p.end(
			Exit{Status: 1, Message: "RunWithApiError error: Failed to bind and run the HTTP server: " + err.Error()})
	}
	listener.SetUnlinkOnClose(false)
	if p.script.ExitOnAccept != nil {
		_, _ = listener.Accept()
		return p.end(*p.script.ExitOnAccept)
	}
	go func() { _ = server.Serve(listener) }()
	return p.end(<-exits)
}

// console prints the script's number of bytes, a newline after every 79.
func (p *program) console() {
	const line = "0123456789abcdefghijklmnopqrstuvwxyz0123456789abcdefghijklmnopqrstuvwxyz0123456\n"
	for left := p.script.ConsoleBytes; left > 0; left -= len(line) {
		if _, err := io.WriteString(p.stdout, line[:min(left, len(line))]); err != nil {
			return
		}
	}
}

// hang never returns. A timer keeps the runtime from calling it a deadlock.
func hang() {
	for {
		time.Sleep(time.Hour)
	}
}
