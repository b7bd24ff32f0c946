//! Starts VMs with fctools and measures that. `bench` runs it:
//!
//!     bench-fctools start FIRECRACKER KERNEL DRIVE
//!     bench-fctools restore FIRECRACKER STATE MEMORY
//!     bench-fctools fork FIRECRACKER STATE MEMORY COUNT AT_ONCE
//!
//! For each line of its standard input it takes the next of three steps: prepare, start, stop, and
//! prepare again. When a step is done it writes how long that took, in nanoseconds, on a line of
//! its own. `start` waits for the guest's first byte too. `fork` prepares its VMs in the second
//! step. API sockets are made in the working directory.

use std::{
    error::Error,
    io::{self, Write},
    sync::Arc,
    time::{Duration, Instant},
};

use fctools::{
    process_spawner::DirectProcessSpawner,
    runtime::tokio::TokioRuntime,
    vm::{
        configuration::{InitMethod, VmConfiguration, VmConfigurationData},
        models::{
            BootSource, Drive, LoadSnapshot, MachineConfiguration, MemoryBackend, MemoryBackendType,
        },
        shutdown::{VmShutdownAction, VmShutdownMethod},
        Vm, VmState,
    },
    vmm::{
        arguments::{VmmApiSocket, VmmArguments, VmmLogLevel},
        executor::unrestricted::UnrestrictedVmmExecutor,
        installation::VmmInstallation,
        ownership::VmmOwnershipModel,
        resource::{system::ResourceSystem, MovedResourceType, Resource, ResourceType},
    },
};
use futures_util::AsyncReadExt;
use tokio::{runtime, sync::Semaphore};

type Failure = Box<dyn Error + Send + Sync>;
type DirectVm = Vm<UnrestrictedVmmExecutor, DirectProcessSpawner, TokioRuntime>;
type DirectResources = ResourceSystem<DirectProcessSpawner, TokioRuntime>;

/// What the guest prints.
const MARK: u8 = 7;

/// Bounds the wait for an API socket.
const SOCKET_TIMEOUT: Duration = Duration::from_secs(10);

/// What every VM is made of: a kernel and a drive, or the two files of a snapshot.
struct Plan {
    firecracker: String,
    restored: bool,
    files: [String; 2],
}

fn main() -> Result<(), Failure> {
    runtime::Runtime::new()?.block_on(run())
}

async fn run() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (count, at_once) = match args.len() {
        6 => (args[4].parse()?, args[5].parse()?),
        4 => (1, 1),
        n => return Err(format!("{n} arguments").into()),
    };
    let plan = Arc::new(Plan {
        firecracker: args[1].clone(),
        restored: args[0] != "start",
        files: [args[2].clone(), args[3].clone()],
    });
    let fork = args[0] == "fork";
    loop {
        let mut ready = None;
        let Some(begun) = next_line()? else {
            return Ok(());
        };
        if !fork {
            ready = Some(plan.prepare(0).await?);
        }
        answer(begun)?;
        let Some(begun) = next_line()? else {
            return Ok(());
        };
        let vms = match ready {
            Some(vm) => vec![plan.start(vm).await?],
            None => plan.fork(count, at_once).await?,
        };
        answer(begun)?;
        let Some(begun) = next_line()? else {
            return Ok(());
        };
        for vm in vms {
            stop(vm).await?;
        }
        answer(begun)?;
    }
}

/// Waits for a line and returns when it came, or None at the end.
fn next_line() -> io::Result<Option<Instant>> {
    let read = io::stdin().read_line(&mut String::new())?;
    Ok((read > 0).then(Instant::now))
}

fn answer(begun: Instant) -> io::Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{}", begun.elapsed().as_nanos())?;
    out.flush()
}

impl Plan {
    async fn prepare(&self, number: usize) -> Result<DirectVm, Failure> {
        let mut resources = ResourceSystem::new(
            DirectProcessSpawner,
            TokioRuntime,
            VmmOwnershipModel::Shared,
        );
        let configuration = self.configuration(&mut resources)?;
        let arguments = VmmArguments::new(VmmApiSocket::Enabled(format!("{number}.sock").into()))
            .log_level(VmmLogLevel::Off);
        let mut executor = UnrestrictedVmmExecutor::new(arguments);
        if self.restored {
            executor = executor.disable_pipes(); // nothing reads them
        }
        let unused = ""; // the paths of the jailer and of the snapshot editor
        let installation = VmmInstallation::new(self.firecracker.as_str(), unused, unused);
        Ok(Vm::prepare(executor, resources, installation, configuration).await?)
    }

    fn configuration(&self, resources: &mut DirectResources) -> Result<VmConfiguration, Failure> {
        // Without a jail they stay where they are.
        let mut file = |i: usize| -> Result<Resource, Failure> {
            let kind = ResourceType::Moved(MovedResourceType::HardLinked);
            Ok(resources.create_resource(&self.files[i], kind)?)
        };
        // That of a restored VM is not sent.
        let mut data = VmConfigurationData {
            boot_source: BootSource {
                kernel_image: file(0)?,
                boot_args: None,
                initrd: None,
            },
            drives: Vec::new(),
            machine_configuration: MachineConfiguration {
                vcpu_count: 1,
                mem_size_mib: 128,
                smt: None,
                track_dirty_pages: None,
                huge_pages: None,
            },
            cpu_template: None,
            network_interfaces: Vec::new(),
            balloon_device: None,
            vsock_device: None,
            logger_system: None,
            metrics_system: None,
            mmds_configuration: None,
            entropy_device: None,
        };
        if self.restored {
            let load_snapshot = LoadSnapshot {
                enable_diff_snapshots: None,
                mem_backend: MemoryBackend {
                    backend_type: MemoryBackendType::File,
                    backend: file(1)?,
                },
                snapshot: data.boot_source.kernel_image.clone(),
                resume_vm: Some(true),
            };
            return Ok(VmConfiguration::RestoredFromSnapshot {
                load_snapshot,
                data,
            });
        }
        data.drives.push(Drive {
            drive_id: "data".into(),
            is_root_device: false,
            cache_type: None,
            partuuid: None,
            is_read_only: Some(false),
            block: Some(file(1)?),
            rate_limiter: None,
            io_engine: None,
            socket: None,
        });
        let init_method = InitMethod::default(); // API calls
        Ok(VmConfiguration::New { init_method, data })
    }

    async fn start(&self, mut vm: DirectVm) -> Result<DirectVm, Failure> {
        vm.start(SOCKET_TIMEOUT).await?;
        if !self.restored {
            let mut console = vm.take_pipes()?.stdout;
            let mut buffer = [0; 4096];
            while !buffer.contains(&MARK) {
                if console.read(&mut buffer).await? == 0 {
                    return Err("the guest's console has ended".into());
                }
            }
        }
        Ok(vm)
    }

    /// Prepares and starts as many VMs, a few at once.
    async fn fork(
        self: &Arc<Self>,
        count: usize,
        at_once: usize,
    ) -> Result<Vec<DirectVm>, Failure> {
        let slots = Arc::new(Semaphore::new(at_once));
        let tasks: Vec<_> = (0..count)
            .map(|number| {
                let (plan, slots) = (self.clone(), slots.clone());
                tokio::spawn(async move {
                    let _slot = slots.acquire().await?;
                    plan.start(plan.prepare(number).await?).await
                })
            })
            .collect();
        let mut vms = Vec::new();
        for task in tasks {
            vms.push(task.await??);
        }
        Ok(vms)
    }
}

async fn stop(mut vm: DirectVm) -> Result<(), Failure> {
    let kill = VmShutdownAction {
        method: VmShutdownMethod::Kill,
        timeout: None,
        graceful: false,
    };
    let outcome = vm.shutdown([kill]).await;
    // It fails where the process is gone before shutdown begins to wait for that.
    if !matches!(vm.get_state(), VmState::Exited | VmState::Crashed(_)) {
        outcome?;
    }
    Ok(vm.cleanup().await?)
}
