// Package fakefc is a fake Firecracker for what a real one cannot be made to do in a test: fail at
// a chosen moment, hang, or be of another version. It boots nothing, and of the files it is told of
// it opens but those of snapshots.
//
// A [Server] is the API alone, in the test's own process. To stand in for the program, a test
// binary runs itself as one: [Install] puts a link to it named firecracker beside a [Script], and
// its TestMain begins with
//
//	if fakefc.Called(os.Args) {
//		os.Exit(fakefc.Main(os.Args, os.Stdout, os.Stderr))
//	}
package fakefc

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"sync"

	"push.rocks/smartvm/firecracker"
)

// DefaultVersion is the version of a fake that is not told another, and DefaultFormat that
// version's snapshot format.
const (
	DefaultVersion = "1.12.1"
	DefaultFormat  = "6.0.0"
)

// maxPayload is the VMM's default --http-api-max-payload-size, in bytes.
const maxPayload = 51200

// Config describes a Server.
type Config struct {
	Version string           // as GET /version answers; DefaultVersion if empty
	Format  string           // of its snapshots; DefaultFormat if empty
	ID      string           // the instance's
	Faults  map[string]Fault // by request, "PUT /drives/rootfs", or by action, "InstanceStart"

	// Exit is called, at most once, when a fault ends the process. Nil closes the server instead.
	Exit func(Exit)
	// Started is called when the VM is, if not nil. It must not call the server.
	Started func()
}

// Fault replaces the handling of a request. Its zero value answers success and does nothing.
type Fault struct {
	Status  int    `json:"status,omitempty"`  // answered in place of 204
	Message string `json:"message,omitempty"` // its fault_message
	Body    string `json:"body,omitempty"`    // its whole body, without Message
	Hang    bool   `json:"hang,omitempty"`    // never answers
	Exit    *Exit  `json:"exit,omitempty"`    // ends the process unanswered
	After   bool   `json:"after,omitempty"`   // Exit comes after the request was handled and answered as usual
}

// Exit is a process's end.
type Exit struct {
	Status  int    `json:"status"`
	Message string `json:"message,omitempty"` // its last line of log
}

// Request is a request that was received.
type Request struct {
	Method, Path, Body string
}

// Server is the API of one fake VMM. It keeps what it is configured with, and refuses what the real
// one would refuse for its state or version, and bodies with unknown fields.
type Server struct {
	config  Config
	version firecracker.Version
	http    http.Server

	mu       sync.Mutex // protects what follows
	state    firecracker.InstanceState
	vm       firecracker.FullVMConfiguration
	mmds     map[string]any
	requests []Request
	reset    bool // a snapshot has reset the guest's vsock since the last pause
	deaf     bool

	pluggedMiB uint64 // of memory that can be plugged
	hinting    firecracker.BalloonHinting
}

// New returns a server that is not started. It panics on a version that is none.
func New(config Config) *Server {
	config.Version, config.Format = cmp.Or(config.Version, DefaultVersion), cmp.Or(config.Format, DefaultFormat)
	version, err := firecracker.ParseVersion(config.Version)
	if err != nil {
		panic("fakefc: " + err.Error())
	}
	s := &Server{
		config:  config,
		version: version,
		state:   firecracker.StateNotStarted,
		vm: firecracker.FullVMConfiguration{
			Drives:        []firecracker.Drive{},
			MachineConfig: &firecracker.MachineConfiguration{VCPUCount: 1, MemSizeMiB: 128},
		},
	}
	s.http.Handler = http.HandlerFunc(s.serve)
	return s
}

// Serve answers requests on listener until Close, then returns nil. It closes the listener.
func (s *Server) Serve(listener net.Listener) error {
	if err := s.http.Serve(listener); !errors.Is(err, http.ErrServerClosed) {
		return err
	}
	return nil
}

// Close drops the listener and all connections.
func (s *Server) Close() error { return s.http.Close() }

// Requests returns what was received, in order.
func (s *Server) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.requests)
}

// Deaf reports whether a guest of this version would not hear the host over vsock any more.
func (s *Server) Deaf() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.deaf
}

// Boot configures the VM from a configuration file and starts it.
func (s *Server) Boot(file []byte) error {
	var vm firecracker.FullVMConfiguration
	if err := json.Unmarshal(file, &vm); err != nil {
		return fmt.Errorf("parse configuration: %w", err)
	}
	if vm.BootSource == nil || vm.Drives == nil {
		return errors.New("configuration lacks boot-source or drives")
	}
	if err := firecracker.CheckVersion(s.version, vm); err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if vm.MachineConfig == nil {
		vm.MachineConfig = s.vm.MachineConfig
	}
	s.vm = vm
	return s.act("InstanceStart")
}

// serve records a request, applies its fault, and otherwise handles it.
func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxPayload))
	s.mu.Lock()
	s.requests = append(s.requests, Request{Method: r.Method, Path: r.URL.Path, Body: string(body)})
	s.mu.Unlock()
	switch {
	case err != nil:
		parseError(w, "Request payload is larger than the limit allowed by server.")
		return
	case len(r.TransferEncoding) > 0:
		parseError(w, "Unsupported header value: Transfer-Encoding.")
		return
	case r.Method == http.MethodDelete && !s.version.AtLeast(firecracker.Version{Major: 1, Minor: 16}):
		parseError(w, "Invalid HTTP Method: Unsupported HTTP method.")
		return
	}
	fault, faulty := s.fault(r, body)
	switch {
	case fault.Hang:
		<-r.Context().Done()
		panic(http.ErrAbortHandler) // as Firecracker does, which answers no caller that has gone
	case fault.Exit != nil && !fault.After:
		s.exit(*fault.Exit)
		<-r.Context().Done()
		panic(http.ErrAbortHandler)
	case faulty && fault.Exit == nil:
		answerFault(w, fault)
	default:
		answer, err := s.handle(r.Method, r.URL.Path, body)
		write(w, answer, err)
		if err != nil && r.URL.Path == "/snapshot/load" { // nothing else can be done with it
			_ = http.NewResponseController(w).Flush()
			s.exit(Exit{Status: 1, Message: err.Error()})
		}
	}
	if fault.Exit != nil && fault.After {
		_ = http.NewResponseController(w).Flush()
		s.exit(*fault.Exit)
	}
}

func (s *Server) fault(r *http.Request, body []byte) (Fault, bool) {
	var action action
	if r.URL.Path == "/actions" && json.Unmarshal(body, &action) == nil {
		if fault, ok := s.config.Faults[action.Type]; ok {
			return fault, true
		}
	}
	fault, ok := s.config.Faults[r.Method+" "+r.URL.Path]
	return fault, ok
}

func (s *Server) exit(e Exit) {
	if s.config.Exit != nil {
		s.config.Exit(e)
		return
	}
	_ = s.http.Close()
}

// parseError answers as the VMM's HTTP layer does, in what is not JSON, and closes the connection.
func parseError(w http.ResponseWriter, text string) {
	w.Header().Set("Connection", "close")
	answerFault(w, Fault{
		Status: http.StatusBadRequest,
		Body:   "{ \"error\": \"" + text + "\nAll previous unanswered requests will be dropped.\" }",
	})
}

func answerFault(w http.ResponseWriter, fault Fault) {
	w.WriteHeader(cmp.Or(fault.Status, http.StatusNoContent))
	if fault.Message != "" {
		_ = json.NewEncoder(w).Encode(map[string]string{"fault_message": fault.Message})
		return
	}
	_, _ = io.WriteString(w, fault.Body)
}

func write(w http.ResponseWriter, answer any, err error) {
	switch {
	case err != nil:
		answerFault(w, Fault{Status: http.StatusBadRequest, Message: err.Error()})
	case answer == nil:
		w.WriteHeader(http.StatusNoContent)
	default:
		_ = json.NewEncoder(w).Encode(answer)
	}
}
