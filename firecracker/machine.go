package firecracker

import (
	"context"
	"net/http"
)

// BootSource is what the VM boots.
type BootSource struct {
	KernelImagePath string `json:"kernel_image_path"`     // x86_64: uncompressed ELF vmlinux; aarch64: PE Image
	InitrdPath      string `json:"initrd_path,omitempty"` // do not set a root drive with it
	// BootArgs replaces the VMM's default command line completely. With what the VMM appends it must
	// stay below 2048 bytes.
	BootArgs string `json:"boot_args,omitempty"`
}

// PutBootSource sets kernel, initrd and command line before boot. The VMM opens the files at once.
func (c *Client) PutBootSource(ctx context.Context, b BootSource) error {
	return c.send(ctx, http.MethodPut, "/boot-source", b)
}

// HugePages is the kind of pages that back guest memory.
type HugePages string

// The kinds of pages.
const (
	HugePagesNone HugePages = "None" // the default
	HugePages2M   HugePages = "2M"   // hugetlbfs; not with an initrd before 1.11, nor with a balloon before 1.14
	// HugePagesTransparent asks the kernel for large pages where it has some: no pool is needed, and
	// nothing comes of it for memory from a MemBackendUffd. Firecracker >= 1.17.
	HugePagesTransparent HugePages = "Transparent"
	HugePagesSnapshot    HugePages = "Snapshot" // of SnapshotLoadParams alone, its default: as the snapshot's VM had
)

// CPUTemplate is one of the VMM's built-in CPU templates, deprecated since 1.5 in favour of
// [CPUConfig].
type CPUTemplate string

// The built-in templates.
const (
	CPUTemplateNone CPUTemplate = "None"
	CPUTemplateC3   CPUTemplate = "C3"
	CPUTemplateT2   CPUTemplate = "T2"
	CPUTemplateT2S  CPUTemplate = "T2S"
	CPUTemplateT2CL CPUTemplate = "T2CL"
	CPUTemplateT2A  CPUTemplate = "T2A"
	CPUTemplateV1N1 CPUTemplate = "V1N1" // aarch64
)

// MachineConfiguration is vCPUs and memory.
type MachineConfiguration struct {
	VCPUCount int `json:"vcpu_count"` // 1 to 32; 1 or even with SMT
	// above 0; even with HugePages2M and HugePagesTransparent
	MemSizeMiB      int         `json:"mem_size_mib"`
	SMT             bool        `json:"smt,omitempty"`               // never on aarch64
	TrackDirtyPages bool        `json:"track_dirty_pages,omitempty"` // for diff snapshots
	HugePages       HugePages   `json:"huge_pages,omitempty"`
	CPUTemplate     CPUTemplate `json:"cpu_template,omitempty"`
}

// GetMachineConfig returns the machine's configuration: 1 vCPU and 128 MiB if none was put.
func (c *Client) GetMachineConfig(ctx context.Context) (MachineConfiguration, error) {
	var m MachineConfiguration
	err := c.get(ctx, "/machine-config", &m)
	return m, err
}

// PutMachineConfig sets the machine's configuration before boot. Absent fields return to their
// defaults, except the CPU template: to drop an earlier one send [CPUTemplateNone].
func (c *Client) PutMachineConfig(ctx context.Context, m MachineConfiguration) error {
	return c.send(ctx, http.MethodPut, "/machine-config", m)
}

// PartialMachineConfiguration changes the fields that are set; at least one must be.
type PartialMachineConfiguration struct {
	VCPUCount       *int        `json:"vcpu_count,omitempty"`
	MemSizeMiB      *int        `json:"mem_size_mib,omitempty"` // required before 1.11
	SMT             *bool       `json:"smt,omitempty"`
	TrackDirtyPages *bool       `json:"track_dirty_pages,omitempty"` // required before 1.11
	HugePages       HugePages   `json:"huge_pages,omitempty"`
	CPUTemplate     CPUTemplate `json:"cpu_template,omitempty"`
}

// PatchMachineConfig changes the machine's configuration before boot, all of it or nothing.
func (c *Client) PatchMachineConfig(ctx context.Context, m PartialMachineConfiguration) error {
	return c.send(ctx, http.MethodPatch, "/machine-config", m)
}

// CPUConfig is a custom CPU template. A bitmap is "0b" followed by 0 (clear), 1 (set), x (keep) and
// _ (ignored), padded with x on the left; numbers in strings are "0x...", "0b..." or decimal.
type CPUConfig struct {
	KVMCapabilities []string           `json:"kvm_capabilities,omitempty"` // "121" adds, "!121" removes
	CPUIDModifiers  []CPUIDLeaf        `json:"cpuid_modifiers,omitempty"`  // x86_64
	MSRModifiers    []RegisterModifier `json:"msr_modifiers,omitempty"`    // x86_64; 32-bit addresses, 64-bit bitmaps
	// aarch64; 64-bit addresses, up to 128-bit bitmaps
	RegModifiers []RegisterModifier `json:"reg_modifiers,omitempty"`
	VCPUFeatures []VCPUFeature      `json:"vcpu_features,omitempty"` // aarch64
}

// CPUIDLeaf changes one leaf of CPUID.
type CPUIDLeaf struct {
	Leaf      string          `json:"leaf"`
	Subleaf   string          `json:"subleaf"`
	Flags     int             `json:"flags"` // KVM's flags of the entry
	Modifiers []CPUIDModifier `json:"modifiers"`
}

// CPUIDModifier changes one register of a leaf.
type CPUIDModifier struct {
	Register string `json:"register"` // eax, ebx, ecx or edx
	Bitmap   string `json:"bitmap"`   // 32 bits
}

// RegisterModifier changes one MSR or ARM register.
type RegisterModifier struct {
	Addr   string `json:"addr"`
	Bitmap string `json:"bitmap"`
}

// VCPUFeature changes one word of KVM_ARM_VCPU_INIT's features.
type VCPUFeature struct {
	Index  int    `json:"index"`
	Bitmap string `json:"bitmap"` // 32 bits
}

// PutCPUConfig sets a custom CPU template before boot. The last of it and a CPUTemplate wins.
func (c *Client) PutCPUConfig(ctx context.Context, config CPUConfig) error {
	return c.send(ctx, http.MethodPut, "/cpu-config", config)
}
