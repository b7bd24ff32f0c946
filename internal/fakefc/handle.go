package fakefc

import (
	"bytes"
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"

	"push.rocks/smartvm/firecracker"
)

// faultMessage is an error in the VMM's words, which are not those of Go.
type faultMessage string

func (f faultMessage) Error() string { return string(f) }

const (
	faultTooEarly  faultMessage = "The requested operation is not supported before starting the microVM."
	faultTooLate   faultMessage = "The requested operation is not supported after starting the microVM."
	faultNoDevice  faultMessage = "Device not found."
	faultNoHinting faultMessage = "Free page hinting is not enabled."
	faultNoKernel  faultMessage = "Cannot start microvm without kernel configuration."
	faultNotPaused faultMessage = "Cannot create snapshot: the microVM is not paused."
	faultNoFile    faultMessage = "Create snapshot error: Cannot perform open on the snapshot backing file: No such file or directory (os error 2)"
	faultNoState   faultMessage = "Load snapshot error: Failed to restore from snapshot: Failed to get snapshot state from file: An error occurred during deserialization: bitcode error"
	faultNoMMDS    faultMessage = "The MMDS data store is not initialized."
)

func faultPath(method, path string) error {
	return faultMessage("Invalid request method and/or path: " + method + " " + strings.TrimPrefix(path, "/") + ".")
}

// handle does one request and returns the answer's value, nil for none.
func (s *Server) handle(method, path string, body []byte) (any, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	collection, id, _ := strings.Cut(strings.TrimPrefix(path, "/"), "/")
	isDrive := func(d firecracker.Drive) bool { return d.DriveID == id }
	isInterface := func(n firecracker.NetworkInterface) bool { return n.IfaceID == id }
	isPmem := func(p firecracker.Pmem) bool { return p.ID == id }
	switch method + " /" + collection {
	case "PUT /drives":
		return nil, putDevice(s, body, &s.vm.Drives, isDrive)
	case "PUT /network-interfaces":
		return nil, putDevice(s, body, &s.vm.NetworkInterfaces, isInterface)
	case "PUT /pmem":
		return nil, putDevice(s, body, &s.vm.Pmem, isPmem)
	case "PATCH /drives":
		return nil, patchDevice[firecracker.PartialDrive](s, body, s.vm.Drives, isDrive)
	case "PATCH /network-interfaces":
		return nil, patchDevice[firecracker.PartialNetworkInterface](s, body, s.vm.NetworkInterfaces, isInterface)
	case "PATCH /pmem":
		return nil, patchDevice[firecracker.PartialPmem](s, body, s.vm.Pmem, isPmem)
	}
	if method == "GET" {
		return s.get(path)
	}
	return nil, s.put(method+" "+path, body)
}

func (s *Server) get(path string) (any, error) {
	switch path {
	case "/":
		return firecracker.InstanceInfo{
			ID: s.config.ID, State: s.state, VMMVersion: s.config.Version,
			AppName: "Firecracker",
		}, nil
	case "/version":
		return map[string]string{"firecracker_version": s.config.Version}, nil
	case "/vm/config":
		return s.vm, nil
	case "/machine-config":
		return s.vm.MachineConfig, nil
	case "/balloon":
		if s.vm.Balloon == nil {
			return nil, faultNoDevice
		}
		return s.vm.Balloon, nil
	case "/balloon/hinting/status":
		if s.vm.Balloon == nil || !s.vm.Balloon.FreePageHinting {
			return nil, faultNoHinting
		}
		return s.hinting, s.need(true)
	case "/hotplug/memory":
		if s.vm.MemoryHotplug == nil {
			return nil, faultNoDevice
		}
		return s.plugged(), s.need(true)
	case "/mmds":
		if s.mmds == nil {
			return struct{}{}, nil
		}
		return s.mmds, nil
	}
	return nil, faultPath("GET", path)
}

// put does whatever changes something and has no id.
func (s *Server) put(request string, body []byte) error {
	switch request {
	case "PUT /boot-source":
		return set(s, body, &s.vm.BootSource)
	case "PUT /machine-config":
		return set(s, body, &s.vm.MachineConfig)
	case "PATCH /machine-config":
		return merge[firecracker.PartialMachineConfiguration](s, body, s.vm.MachineConfig, s.need(false))
	case "PUT /vsock":
		return set(s, body, &s.vm.Vsock)
	case "PUT /entropy":
		return set(s, body, &s.vm.Entropy)
	case "PUT /balloon":
		return set(s, body, &s.vm.Balloon)
	case "PATCH /balloon":
		if s.vm.Balloon == nil {
			return faultNoDevice
		}
		return merge[balloonUpdate](s, body, s.vm.Balloon, s.need(true))
	case "PATCH /balloon/hinting/start":
		return s.hint(body, 2)
	case "PATCH /balloon/hinting/stop":
		return s.hint(nil, 1)
	case "PUT /hotplug/memory":
		return set(s, body, &s.vm.MemoryHotplug)
	case "PATCH /hotplug/memory":
		return s.plug(body)
	case "PUT /mmds/config":
		return set(s, body, &s.vm.MMDSConfig)
	case "PUT /cpu-config":
		return set(s, body, new(*firecracker.CPUConfig))
	case "PUT /serial":
		return set(s, body, new(*firecracker.SerialDevice))
	case "PUT /logger":
		return set(s, body, new(*firecracker.Logger))
	case "PUT /metrics":
		return set(s, body, new(*firecracker.Metrics))
	case "PUT /mmds":
		s.mmds = map[string]any{}
		return merge[map[string]any](s, body, &s.mmds, nil)
	case "PATCH /mmds":
		if s.mmds == nil {
			return faultNoMMDS
		}
		return merge[map[string]any](s, body, &s.mmds, nil)
	case "PUT /actions":
		var action action
		if err := decode(s.version, body, &action); err != nil {
			return err
		}
		return s.act(action.Type)
	case "PATCH /vm":
		vm := vmState{}
		if err := merge[vmState](s, body, &vm, s.need(true)); err != nil {
			return err
		}
		state, ok := map[string]firecracker.InstanceState{
			"Paused":  firecracker.StatePaused,
			"Resumed": firecracker.StateRunning,
		}[vm.State]
		if !ok {
			return faultMessage("unknown variant `" + vm.State + "`")
		}
		resumed := s.state == firecracker.StatePaused && state == firecracker.StateRunning
		s.deaf = s.deaf || resumed && !s.reset && slices.Contains(deafVersions, s.version.String())
		s.state, s.reset = state, s.reset && !resumed
		return nil
	case "PUT /snapshot/create":
		return s.save(body)
	case "PUT /snapshot/load":
		return s.load(body)
	}
	method, path, _ := strings.Cut(request, " ")
	return faultPath(method, path)
}

// hint gives the guest a command, of which it takes note.
func (s *Server) hint(body []byte, command uint64) error {
	if s.vm.Balloon == nil || !s.vm.Balloon.FreePageHinting {
		return faultNoHinting
	}
	var start struct {
		AcknowledgeOnStop bool `json:"acknowledge_on_stop"`
	}
	if body != nil {
		if err := decode(s.version, body, &start); err != nil {
			return err
		}
	}
	if err := s.need(true); err != nil {
		return err
	}
	s.hinting = firecracker.BalloonHinting{HostCommand: command, GuestCommand: &command}
	return nil
}

// plug does what is asked at once, where a guest takes its time.
func (s *Server) plug(body []byte) error {
	var update struct {
		RequestedSizeMiB uint64 `json:"requested_size_mib"`
	}
	if err := decode(s.version, body, &update); err != nil {
		return err
	}
	if s.vm.MemoryHotplug == nil {
		return faultNoDevice
	}
	if err := s.need(true); err != nil {
		return err
	}
	s.pluggedMiB = update.RequestedSizeMiB
	return nil
}

func (s *Server) plugged() firecracker.MemoryHotplugStatus {
	h := s.vm.MemoryHotplug
	return firecracker.MemoryHotplugStatus{
		TotalSizeMiB: h.TotalSizeMiB, SlotSizeMiB: cmp.Or(h.SlotSizeMiB, 128), BlockSizeMiB: cmp.Or(h.BlockSizeMiB, 2),
		PluggedSizeMiB: s.pluggedMiB, RequestedSizeMiB: s.pluggedMiB,
	}
}

// deafVersions hear nothing of the host over vsock after a pause during which no snapshot was made.
var deafVersions = []string{"1.16.0", "1.16.1"}

// act does one of the actions. The caller holds mu.
func (s *Server) act(name string) error {
	switch name {
	case "FlushMetrics", "SendCtrlAltDel":
		return s.need(true)
	case "InstanceStart":
		if s.vm.BootSource == nil {
			return faultNoKernel
		}
		if err := s.need(false); err != nil {
			return err
		}
		s.state = firecracker.StateRunning
		if s.config.Started != nil {
			s.config.Started()
		}
		return nil
	}
	return faultMessage("unknown variant `" + name + "`")
}

// need refuses what is not for the VM's state.
func (s *Server) need(started bool) error {
	switch isStarted := s.state != firecracker.StateNotStarted; {
	case started && !isStarted:
		return faultTooEarly
	case !started && isStarted:
		return faultTooLate
	}
	return nil
}

type vmState struct {
	State string `json:"state"`
}

type action struct {
	Type string `json:"action_type"`
}

type balloonUpdate struct {
	AmountMiB uint32 `json:"amount_mib"`
}

// decode reads a body as strictly as the VMM of version v does.
func decode(v firecracker.Version, body []byte, value any) error {
	decoder := json.NewDecoder(bytes.NewReader(body))
	decoder.DisallowUnknownFields()
	err := decoder.Decode(value)
	if err == nil {
		err = firecracker.CheckVersion(v, value)
	}
	if err != nil {
		return faultMessage(fmt.Sprintf("An error occurred when deserializing the json body of a request: %v.", err))
	}
	return nil
}

// set stores a body that is configured before boot.
func set[T any](s *Server, body []byte, to **T) error {
	value := new(T)
	if err := decode(s.version, body, value); err != nil {
		return err
	}
	if err := s.need(false); err != nil {
		return err
	}
	*to = value
	return nil
}

// merge stores the fields of a body of type P in the larger thing it changes, unless the VM's state
// forbids it.
func merge[P any](s *Server, body []byte, to any, state error) error {
	if err := decode(s.version, body, new(P)); err != nil {
		return err
	}
	if state != nil {
		return state
	}
	return json.Unmarshal(body, to)
}

func putDevice[T any](s *Server, body []byte, list *[]T, is func(T) bool) error {
	var device *T
	if err := set(s, body, &device); err != nil {
		return err
	}
	if i := slices.IndexFunc(*list, is); i >= 0 {
		(*list)[i] = *device
		return nil
	}
	*list = append(*list, *device)
	return nil
}

func patchDevice[P, T any](s *Server, body []byte, list []T, is func(T) bool) error {
	i := slices.IndexFunc(list, is)
	if i < 0 {
		return faultNoDevice
	}
	return merge[P](s, body, &list[i], s.need(true))
}
