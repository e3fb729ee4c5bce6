//! Everything between a plan and a blocked PID 1: `pantala-init enclose`.
//!
//! All mounts of a machine are made in a mount namespace of this short-lived process. The runtime's container is cloned
//! from it, so afterwards they live in the machine's own mount namespace and nowhere else: nothing is ever mounted where
//! the host can see it, and when PID 1 ends (or this process dies half way) the kernel takes all of it back, loop
//! device included.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, chown};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use serde::Deserialize;

use super::containers::{self, ContainerPlan, Upper, VolumePlan};
use super::facts::{self, FactsPlan, Stand};
use super::{Doing, HostError, Result, loops, mounts, namespaces, plan};

#[derive(Deserialize)]
struct Plan {
    machine_id: String,
    /// The machine's folder for what lives as long as its PID 1: socket, pid file, console.
    run: PathBuf,
    ring: PathBuf,
    exit_record: PathBuf,
    /// Files of control groups to join before anything is charged; this process has one thread.
    cgroups: Vec<PathBuf>,
    uid_base: u32,
    /// Found at `enclosure/ns/net` and `enclosure/ns/user` by the runtime. Without a user namespace one with the same
    /// map is made for the id-mapped layers.
    netns: Option<PathBuf>,
    userns: Option<PathBuf>,
    /// Must be what `run/attempt` holds: a helper that outlived its caller must not mix into a later attempt.
    attempt: String,
    /// Lowest first.
    layers: Vec<PathBuf>,
    /// An ext4 image: the writable layer.
    disk: PathBuf,
    /// The disk outlives this run: what an earlier one left on it is gone on with.
    #[serde(default)]
    keeps_root: bool,
    /// This program, as the machine will see it.
    init: PathBuf,
    /// The OCI runtime and its global options.
    runtime: Vec<String>,
    /// An existing directory that anyone may pass through; a tmpfs covers it in our mount namespace.
    enclosure: PathBuf,
    /// Mounts that the runtime stumbles over.
    detach: Vec<PathBuf>,
    /// The runtime's specification; paths in it are below `enclosure`.
    config: serde_json::Value,
    /// Small files for the machine, by name below `enclosure/files`.
    files: Vec<(String, String)>,
    facts: FactsPlan,
    #[serde(default)]
    containers: Vec<ContainerPlan>,
    #[serde(default)]
    volumes: Vec<VolumePlan>,
}

pub fn run() -> Result<()> {
    let plan: Plan = plan()?;
    containers::check_names(&plan.volumes, &plan.containers)?;
    for procs in &plan.cgroups {
        fs::write(procs, "0").doing(|| format!("join {}", procs.display()))?;
    }
    // After joining: whoever wrote another attempt has first killed everything in the group.
    let attempt = plan.run.join("attempt");
    if fs::read_to_string(&attempt).doing(|| format!("read {}", attempt.display()))? != plan.attempt {
        return Err(HostError::Runtime("a later attempt has taken over".to_owned()));
    }
    // Opened before the tmpfs covers anything: sources may lie below it.
    let sources = Sources::open(&plan)?;
    let inherited = Inherited::make(&plan)?;
    enter_own_mounts(&plan)?;
    let stand = build(&plan, &sources, &inherited)?;
    let pid = run_runtime(&plan, &inherited)?;
    if let Some(stand) = stand {
        stand.down();
    }
    record_pid(&inherited.run, pid)
}

/// `pid.json`, whole or not at all. The start time and the boot tell this process from a later one of the same number.
fn record_pid(run: &OwnedFd, pid: i32) -> Result<()> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).doing(|| format!("look at pid {pid}"))?;
    let start_ticks: u64 = stat
        .rsplit(')')
        .next()
        .and_then(|rest| rest.split_whitespace().nth(19))
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| HostError::Runtime(format!("/proc/{pid}/stat cannot be read: {stat:?}")))?;
    let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").doing(|| "read the boot id".to_owned())?;
    let text = serde_json::json!({ "pid": pid, "start_ticks": start_ticks, "boot_id": boot_id.trim() }).to_string();
    fs::write(in_folder(run, "pid.json.new"), text).doing(|| "write pid.json".to_owned())?;
    fs::rename(in_folder(run, "pid.json.new"), in_folder(run, "pid.json")).doing(|| "write pid.json".to_owned())
}

/// A file of the run folder, whatever is mounted over its path by now.
fn in_folder(run: &OwnedFd, name: &str) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/{name}", run.as_raw_fd()))
}

/// `layers` and `init` are mounts already, read-only and attached nowhere: clones can only be made in the mount namespace
/// that their originals are in.
struct Sources {
    layers: Vec<OwnedFd>,
    volumes: Vec<Vec<OwnedFd>>,
    containers: Vec<Vec<OwnedFd>>,
    disk: File,
    /// Of those volumes that have one.
    volume_disks: Vec<File>,
    init: OwnedFd,
    netns: Option<File>,
    userns: OwnedFd,
}

impl Sources {
    fn open(plan: &Plan) -> Result<Self> {
        let userns: OwnedFd = match &plan.userns {
            Some(path) => File::open(path).doing(|| format!("open {}", path.display()))?.into(),
            None => namespaces::user_namespace(plan.uid_base)?,
        };
        let read_only = |path: &PathBuf, userns: Option<BorrowedFd<'_>>| -> Result<OwnedFd> {
            let mut options = OpenOptions::new();
            options.read(true).custom_flags(libc::O_PATH);
            let source = options.open(path).doing(|| format!("open {}", path.display()))?;
            let tree = mounts::clone(source.as_fd()).doing(|| format!("clone the mount of {}", path.display()))?;
            mounts::restrict(&tree, userns).doing(|| format!("map the ids of {}", path.display()))?;
            Ok(tree)
        };
        let image = |layers: &Vec<PathBuf>| -> Result<Vec<OwnedFd>> {
            let mapped = layers.iter().map(|path| read_only(path, Some(userns.as_fd())));
            mapped.collect()
        };
        let disk = |path: &PathBuf| -> Result<File> {
            let mut options = OpenOptions::new();
            options.read(true).write(true);
            options.open(path).doing(|| format!("open {}", path.display()))
        };
        Ok(Sources {
            layers: image(&plan.layers)?,
            volumes: plan
                .volumes
                .iter()
                .map(|one| image(&one.layers))
                .collect::<Result<_>>()?,
            containers: plan
                .containers
                .iter()
                .map(|one| image(&one.layers))
                .collect::<Result<_>>()?,
            disk: disk(&plan.disk)?,
            volume_disks: plan
                .volumes
                .iter()
                .filter_map(|one| one.disk.as_ref())
                .map(disk)
                .collect::<Result<_>>()?,
            init: read_only(&plan.init, None)?,
            netns: match &plan.netns {
                Some(path) => Some(File::open(path).doing(|| format!("open {}", path.display()))?),
                None => None,
            },
            userns,
        })
    }
}

/// What PID 1 gets at 3, 4, 5 and from there on, and where its own words go.
struct Inherited {
    listener: UnixListener,
    ring: File,
    exit_record: File,
    facts: Option<facts::Sources>,
    console: File,
    run: OwnedFd,
}

impl Inherited {
    fn make(plan: &Plan) -> Result<Self> {
        std::env::set_current_dir(&plan.run).doing(|| format!("enter {}", plan.run.display()))?;
        let _ = fs::remove_file("init.sock");
        let read_write = |path: &Path| {
            let mut options = OpenOptions::new();
            options.read(true).write(true).create(true).truncate(false).mode(0o600);
            options.open(path).doing(|| format!("open {}", path.display()))
        };
        let console = OpenOptions::new()
            .append(true)
            .create(true)
            .mode(0o600)
            .open("console")
            .doing(|| "open console".to_owned())?;
        let facts = facts::Sources::open(&plan.facts, plan.uid_base);
        if let Err(error) = &facts {
            // It still has its size; only what it uses of that is not told.
            let _ = writeln!(&console, "the machine is not told what it uses: {error}");
        }
        Ok(Inherited {
            // A relative name: the absolute one may be longer than a socket address holds.
            listener: UnixListener::bind("init.sock").doing(|| "bind init.sock".to_owned())?,
            ring: read_write(&plan.ring)?,
            exit_record: read_write(&plan.exit_record)?,
            facts: facts.ok(),
            console,
            run: File::open(".").doing(|| "open the run folder".to_owned())?.into(),
        })
    }
}

fn enter_own_mounts(plan: &Plan) -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNS).doing(|| "make a mount namespace".to_owned())?;
    let nothing = None::<&str>;
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .doing(|| "make mounts private".to_owned())?;
    for path in &plan.detach {
        // Not there is as good.
        let _ = umount2(path, MntFlags::MNT_DETACH);
    }
    let options = Some("mode=755,size=4m");
    mount(
        Some("pantala"),
        &plan.enclosure,
        Some("tmpfs"),
        MsFlags::MS_NOSUID,
        options,
    )
    .doing(|| format!("mount a tmpfs at {}", plan.enclosure.display()))?;
    std::env::set_current_dir(&plan.enclosure).doing(|| format!("enter {}", plan.enclosure.display()))
}

/// The root filesystem and its sources, below the enclosure (the current directory).
/// Afterwards the files that PID 1 will serve are served for it.
fn build(plan: &Plan, sources: &Sources, inherited: &Inherited) -> Result<Option<Stand>> {
    let run = &inherited.run;
    let folder = |path: &str, mode: u32| {
        DirBuilder::new()
            .recursive(true)
            .mode(mode)
            .create(path)
            .doing(|| format!("create {path}"))
    };
    for path in ["lower", "disk", "root", "files", "bundle", "state", "nodes", "ns"] {
        folder(path, 0o755)?;
    }
    let owner = Some(plan.uid_base);

    // Held until they are mounted: the kernel frees them with their last user.
    let mut devices = Vec::new();
    for disk in std::iter::once(&sources.disk).chain(&sources.volume_disks) {
        devices.push(loops::attach(disk, Path::new("nodes")).doing(|| "attach a loop device".to_owned())?);
    }
    // Before they are mounted: whoever waits for their end need not look at those of all machines.
    let names = devices.iter().filter_map(|(_, node)| node.file_name()?.to_str());
    let names = names.collect::<Vec<_>>().join("\n");
    fs::write(in_folder(run, "loop"), names).doing(|| "write down the loop devices".to_owned())?;
    let mut nodes = devices.iter().map(|(_, node)| node.clone());
    let node = nodes.next().unwrap_or_default();
    if plan.keeps_root {
        let options = Some("noinit_itable,errors=remount-ro");
        mount(Some(&node), "disk", Some("ext4"), containers::ON_DISK, options)
            .doing(|| "mount the writable layer".to_owned())?;
    } else {
        containers::fleeting(&node, "disk")?;
    }
    let upper = Upper {
        owner: plan.uid_base,
        is_kept: plan.keeps_root,
    };
    containers::writable(&sources.layers, "root", "disk", "lower", upper)?;
    if plan.keeps_root {
        containers::tidy(&plan.containers)?;
    }
    let layers = (&sources.volumes[..], &sources.containers[..]);
    containers::build(&plan.volumes, &plan.containers, layers, nodes, upper)?;

    File::create("init").doing(|| "create init".to_owned())?;
    mounts::attach(&sources.init, Path::new("init")).doing(|| "attach init".to_owned())?;
    if let Some(netns) = &sources.netns {
        bind_namespace(netns.as_fd(), "ns/net")?;
        if plan.userns.is_none() {
            mount_sysfs_of(netns)?;
        }
    }
    if plan.userns.is_some() {
        bind_namespace(sources.userns.as_fd(), "ns/user")?;
    }
    for (name, text) in &plan.files {
        let path = Path::new("files").join(name);
        fs::write(&path, text).doing(|| format!("write {}", path.display()))?;
        chown(&path, owner, owner).doing(|| format!("give {} to the machine", path.display()))?;
    }
    fs::write("bundle/config.json", plan.config.to_string()).doing(|| "write config.json".to_owned())?;
    facts::build(&plan.facts, inherited.facts.as_ref(), plan.uid_base)
}

/// sysfs at `sys`, showing the devices of a namespace that the machine does not own and so cannot mount itself.
fn mount_sysfs_of(netns: &File) -> Result<()> {
    fs::create_dir("sys").doing(|| "create sys".to_owned())?;
    let own = File::open("/proc/self/ns/net").doing(|| "open our network namespace".to_owned())?;
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).doing(|| "enter the machine's network namespace".to_owned())?;
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("sysfs"), "sys", Some("sysfs"), flags, None::<&str>).doing(|| "mount sysfs".to_owned())?;
    setns(own.as_fd(), CloneFlags::CLONE_NEWNET).doing(|| "return to our network namespace".to_owned())
}

fn bind_namespace(namespace: BorrowedFd<'_>, target: &str) -> Result<()> {
    File::create(target).doing(|| format!("create {target}"))?;
    let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    mount(
        Some(source.as_str()),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .doing(|| format!("bind {target}"))
}

fn run_runtime(plan: &Plan, inherited: &Inherited) -> Result<i32> {
    let [program, options @ ..] = &plan.runtime[..] else {
        return Err(HostError::Runtime("the plan names no runtime".to_owned()));
    };
    let at = |path: &str| plan.enclosure.join(path);
    let console = |what: &str| inherited.console.try_clone().doing(|| what.to_owned());
    let descriptors: Vec<RawFd> = [
        inherited.listener.as_raw_fd(),
        inherited.ring.as_raw_fd(),
        inherited.exit_record.as_raw_fd(),
    ]
    .into_iter()
    .chain(inherited.facts.iter().flat_map(facts::Sources::descriptors))
    .collect();
    let _filled = fill_below(FIRST_FD + descriptors.len() as RawFd)?;
    let mut command = Command::new(program);
    command
        .args(options)
        .arg("--root")
        .arg(at("state"))
        .args(["run", "--detach", "--preserve-fds", &descriptors.len().to_string()])
        .arg("--pid-file")
        .arg(at("pid"))
        .arg("--bundle")
        .arg(at("bundle"))
        .arg(&plan.machine_id)
        .stdin(Stdio::null())
        .stdout(console("share the console")?)
        .stderr(console("share the console")?);
    begin_the_clock();
    let mut high = vec![0; descriptors.len()];
    // SAFETY: only system calls between fork and exec, on descriptors that stay open in the parent.
    unsafe { command.pre_exec(move || hand_over(&descriptors, &mut high)) };
    let status = command.status().doing(|| format!("run {program}"))?;
    if !status.success() {
        let said =
            fs::read_to_string(format!("/proc/self/fd/{}/console", inherited.run.as_raw_fd())).unwrap_or_default();
        return Err(HostError::Runtime(format!(
            "{program} ended with {status}: {}",
            said.trim()
        )));
    }
    let text = fs::read_to_string(at("pid")).doing(|| "read the pid file".to_owned())?;
    text.trim()
        .parse()
        .map_err(|_| HostError::Runtime(format!("{program} wrote {text:?} for a pid")))
}

/// The machine boots now: what is begun from here on counts time since boot (and with it the start times of processes)
/// from this moment. Where the kernel knows no such namespace, it is the host's boot.
fn begin_the_clock() {
    if unshare(CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)).is_err() {
        return;
    }
    if let Ok(now) = nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME) {
        // Whole seconds, so that it is never before zero. Refused, the namespace says what the host does.
        let _ = fs::write("/proc/self/timens_offsets", format!("boottime -{} 0\n", now.tv_sec()));
    }
}

const FIRST_FD: RawFd = 3;

/// No descriptor that is opened from now on is below `bound`: what `Command` opens for itself must not be where the child
/// will have something else.
fn fill_below(bound: RawFd) -> Result<Vec<File>> {
    let mut fill = Vec::new();
    loop {
        let file = File::open("/dev/null").doing(|| "open /dev/null".to_owned())?;
        if file.as_raw_fd() >= bound {
            return Ok(fill);
        }
        fill.push(file);
    }
}

/// Move the descriptors to 3, 4, 5 and so on in the child. By way of high numbers (`high` has room for as many), since
/// they may be among these.
fn hand_over(descriptors: &[RawFd], high: &mut [RawFd]) -> io::Result<()> {
    const ABOVE: libc::c_int = 64;
    for (slot, &fd) in high.iter_mut().zip(descriptors) {
        // SAFETY: duplicates a descriptor; no memory is involved.
        *slot = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, ABOVE) };
        if *slot < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    for (target, &fd) in (FIRST_FD..).zip(&*high) {
        // SAFETY: as above; the new descriptor survives exec.
        if unsafe { libc::dup2(fd, target) } < 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(())
}
