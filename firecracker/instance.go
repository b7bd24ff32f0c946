package firecracker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
)

// InstanceState is the VMM's idea of the VM. There is no stopped state: the process exits instead.
type InstanceState string

// The states of an instance.
const (
	StateNotStarted InstanceState = "Not started"
	StateRunning    InstanceState = "Running"
	StatePaused     InstanceState = "Paused"
)

// InstanceInfo is the answer to GET /.
type InstanceInfo struct {
	ID         string        `json:"id"`
	State      InstanceState `json:"state"`
	VMMVersion string        `json:"vmm_version"` // without a leading v
	AppName    string        `json:"app_name"`    // "Firecracker"
}

// GetInstanceInfo returns what the VMM says about itself. It works in every state.
func (c *Client) GetInstanceInfo(ctx context.Context) (InstanceInfo, error) {
	var info InstanceInfo
	err := c.get(ctx, "/", &info)
	return info, err
}

// GetVersion asks the VMM for its version. It works in every state.
func (c *Client) GetVersion(ctx context.Context) (Version, error) {
	answer, err := c.call(ctx, http.MethodGet, "/version", nil)
	if err != nil {
		return Version{}, err
	}
	return decodeVersion(answer)
}

func decodeVersion(answer []byte) (Version, error) {
	var body struct {
		FirecrackerVersion string `json:"firecracker_version"`
	}
	if err := json.Unmarshal(answer, &body); err != nil {
		return Version{}, fmt.Errorf("GET /version: decode answer: %w", err)
	}
	return ParseVersion(body.FirecrackerVersion)
}

// FullVMConfiguration is the answer to GET /vm/config, and the document that --config-file takes.
// In answers absent sections are zero, and cpu-config, logger and metrics always are. In a file
// BootSource is required, and Drives must not be nil. The serial device is in neither.
type FullVMConfiguration struct {
	BootSource        *BootSource           `json:"boot-source,omitempty"`
	Drives            []Drive               `json:"drives"`
	MachineConfig     *MachineConfiguration `json:"machine-config,omitempty"`
	CPUConfig         *CPUConfig            `json:"cpu-config,omitempty" since:"1.13.0"` // in files, Firecracker >= 1.13
	NetworkInterfaces []NetworkInterface    `json:"network-interfaces,omitempty"`
	Vsock             *Vsock                `json:"vsock,omitempty"`
	Balloon           *Balloon              `json:"balloon,omitempty"`
	Entropy           *EntropyDevice        `json:"entropy,omitempty"`
	Pmem              []Pmem                `json:"pmem,omitempty" since:"1.14.0"`           // Firecracker >= 1.14
	MemoryHotplug     *MemoryHotplugConfig  `json:"memory-hotplug,omitempty" since:"1.14.0"` // Firecracker >= 1.14
	MMDSConfig        *MMDSConfig           `json:"mmds-config,omitempty"`
	Logger            *Logger               `json:"logger,omitempty"`
	Metrics           *Metrics              `json:"metrics,omitempty"`
}

// GetVMConfig returns the whole configuration. It works in every state.
func (c *Client) GetVMConfig(ctx context.Context) (FullVMConfiguration, error) {
	var config FullVMConfiguration
	err := c.get(ctx, "/vm/config", &config)
	return config, err
}

type action struct {
	Type string `json:"action_type"`
}

func (c *Client) act(ctx context.Context, name string) error {
	return c.send(ctx, http.MethodPut, "/actions", action{Type: name})
}

// InstanceStart boots the configured VM. It returns once the vCPUs run, long before the guest is
// up. After an error the process lives on, but is of use only if a plain configuration mistake (no
// boot source, too much memory) is corrected.
func (c *Client) InstanceStart(ctx context.Context) error { return c.act(ctx, "InstanceStart") }

// FlushMetrics makes the VMM write a line of metrics now. The VM must have been started.
func (c *Client) FlushMetrics(ctx context.Context) error { return c.act(ctx, "FlushMetrics") }

// SendCtrlAltDel presses these keys in a started x86_64 guest; on aarch64 it is refused. Success
// means pressed, not obeyed: the guest needs an i8042 keyboard driver and must react by rebooting,
// which ends the process.
func (c *Client) SendCtrlAltDel(ctx context.Context) error { return c.act(ctx, "SendCtrlAltDel") }

type vmState struct {
	State string `json:"state"`
}

// Pause stops the vCPUs and the device emulation. Pausing a paused VM succeeds. It may take as long
// as 30 s a vCPU.
func (c *Client) Pause(ctx context.Context) error {
	return c.send(ctx, http.MethodPatch, "/vm", vmState{State: "Paused"})
}

// Resume lets a paused VM run on. Resuming a running VM succeeds.
//
// In 1.16.0 and 1.16.1 a VM that was paused and resumed hears nothing of its host over vsock any
// more, unless a snapshot was made of it meanwhile, be it one that fails. So one is tried there,
// where nothing can be written. Open vsock connections end by it; in other versions they outlive a
// pause.
func (c *Client) Resume(ctx context.Context) error {
	version, err := c.learnVersion(ctx)
	if err != nil {
		return fmt.Errorf("PATCH /vm: %w", err)
	}
	if version.resumesDeaf() {
		err := c.CreateSnapshot(ctx, SnapshotCreateParams{SnapshotPath: nowhere, MemFilePath: nowhere})
		if err != nil && !errors.As(err, new(*APIError)) {
			return err
		}
	}
	return c.send(ctx, http.MethodPatch, "/vm", vmState{State: "Resumed"})
}

// nowhere is a path, from the VMM's working directory, in a directory that is not there.
const nowhere = "no-such-directory/snapshot"

// resumesDeaf says whether this version loses vsock traffic towards its guest by a pause.
func (v Version) resumesDeaf() bool {
	return v.AtLeast(Version{Major: 1, Minor: 16, Patch: 0}) && !v.AtLeast(Version{Major: 1, Minor: 16, Patch: 2})
}
