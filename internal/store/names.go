package store

// Every file name we use below a runtime directory. docs/layout.md explains them and is checked
// against this list.
const (
	// LeaseDir holds a symbolic link for each name that is taken, "kind.name" -> id of its VM.
	LeaseDir = ".leases"

	// NetworkDir holds the networks that are up: see package network.
	NetworkDir = ".networks"

	// EventDir holds the newest events.
	EventDir = ".events"
	// SlotDir holds warm slots, a directory a network, in it one a slot.
	SlotDir = ".slots"

	// In a VM's directory, <runtime>/<id>/:

	LockFile       = "lock"            // flock: held by the process that supervises the VM
	MachineFile    = "machine.json"    // what was asked for; the VM exists while this file does
	ExitFile       = "exit.json"       // how the last run ended
	CreateJournal  = "create.journal"  // effects that end with Remove
	RunJournal     = "run.journal"     // effects that end with Stop
	ConsoleLog     = "console.log"     // what the guest wrote to its serial port, the newest part
	VMMLog         = "firecracker.log" // what the VMM logged, the newest part
	SuperviseLog   = "supervise.log"   // what a detached VM's own process did, the newest part
	AutoRemove     = "autoremove"      // there: the VM is removed when it ends
	CommandLog     = "command.log"     // what a command of an attached run put out, the newest part
	NetworkLog     = "network.log"     // what the guest tried to reach, the newest part
	HoldFile       = "hold"            // flock: held by the process that holds the VM still for a snapshot
	LastSnapshot   = "last-snapshot"   // the snapshot since which the VMM knows what memory was written
	RotatedSuffix  = ".1"              // added to a log's name: its older half
	TimesSuffix    = ".times"          // added to the name of a log or its older half: when it was written
	GuestStateFile = "guest.json"      // how far the last run's guest has come
	GuestFile      = "guest"           // what the first program of an image's guest is told
	DriveDir       = "drives"          // staged copies, by device id
	VolumeFile     = "volumes"         // copies of the host's directories, for one run
	ControlSocket  = "control.socket"  // by which the process that supervises the VM is asked to look at its record
	PortsFile      = "ports.json"      // which ports of the host lead to the guest of the last run
	PendingFile    = "pending.json"    // there: what the guest has changed in them may not be copied back yet
	CopiedFile     = "copied"          // what each file of the host was when it was copied, until all is copied back
	NetNSFile      = "netns"           // the network namespace of a VM that has one, or of a slot
	RunDir         = "run"             // what one run makes

	// In RunDir:

	ConsoleFIFO = "console.fifo" // the VMM's standard output
	InputFIFO   = "input.fifo"   // the VMM's standard input
	RootDir     = "root"         // the VMM's working directory, where it is not jailed
	JailDir     = "jail"         // the jailer's base directory, where it is

	// In the VMM's working directory (RootDir, or the jail's root), the names that it is given:

	SocketFile   = "firecracker.socket"
	LogFIFO      = "log.fifo"     // the VMM's log
	MetricsFIFO  = "metrics.fifo" // the VMM's metrics, if asked for
	KernelFile   = "kernel"
	InitrdFile   = "initrd"
	VsockFile    = "vsock.socket"
	DevicesDir   = "drives"        // drives and pmem files, by device id
	RestoreDir   = "snapshot"      // the state and memory that it is restored from
	MemorySocket = "memory.socket" // where its page faults are served
	TakeDir      = "snapshot.new"  // where it writes a snapshot

	// In a data directory:

	ImageDir    = "images"
	VolumeDir   = "volumes"
	BinaryDir   = "bin"         // Firecracker, a directory a version
	BaseDir     = "base-images" // Firecracker's own images, a directory a bundle
	NetworksDir = "networks"    // networks that somebody has made, a file each
	SnapshotDir = "snapshots"
	TouchedFile = "touched" // in a snapshot: the pages that a VM of it touched first
	PoolDir     = "pools"   // pools of VMs that are ready, a file each
	StageDir    = "staging" // a VM's own copies of drives whose source shares a reflink file system with it
)
