//! User namespaces with a fixed map, and the pair of namespaces that a machine's network is made of.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::waitpid;
use nix::unistd::{ForkResult, Pid, fork};
use serde::Deserialize;

use super::{Doing, Result};

/// Ids of one machine, from its `uid_base` up.
const IDS: u32 = 65_536;

/// A network namespace that belongs to a user namespace; both are pinned.
#[derive(Deserialize)]
pub struct Namespaces {
    uid_base: u32,
    /// Files to be made, to bind the namespaces to.
    netns: PathBuf,
    userns: PathBuf,
    /// Pin the namespaces of this process instead of new ones.
    adopt_pid: Option<i32>,
    /// Where to bind them: the mount namespace of this process's file, so that they outlive the caller.
    mount_namespace: Option<PathBuf>,
    /// Under /proc/sys/net of the new namespace.
    sysctls: Vec<(String, String)>,
}

/// Make and pin them; the network namespace, open.
///
/// The order is what gives the machine's root its rights there: in a network namespace made by the host it could
/// neither bind low ports nor mount sysfs.
pub fn make(wanted: &Namespaces) -> Result<OwnedFd> {
    let (net, user) = match wanted.adopt_pid {
        Some(pid) => (open(pid, "net")?, open(pid, "user")?),
        None => {
            let child = Holder::start(CloneFlags::CLONE_NEWNET, wanted.uid_base, &wanted.sysctls)?;
            (open(child.pid.as_raw(), "net")?, open(child.pid.as_raw(), "user")?)
        }
    };
    if let Some(path) = &wanted.mount_namespace {
        enter_mounts(path)?;
    }
    // By way of our own descriptors: the child's /proc entries go with it.
    pin(&net, &wanted.netns)?;
    pin(&user, &wanted.userns)?;
    Ok(net)
}

pub fn enter_mounts(path: &Path) -> Result<()> {
    let namespace = File::open(path).doing(|| format!("open {}", path.display()))?;
    setns(namespace.as_fd(), CloneFlags::CLONE_NEWNS).doing(|| format!("enter {}", path.display()))
}

fn pin(namespace: &OwnedFd, target: &Path) -> Result<()> {
    use std::os::fd::AsRawFd;
    File::create(target).doing(|| format!("create {}", target.display()))?;
    let source = format!("/proc/self/fd/{}", namespace.as_raw_fd());
    mount(
        Some(source.as_str()),
        target,
        None::<&str>,
        MsFlags::MS_BIND,
        None::<&str>,
    )
    .doing(|| format!("bind a namespace to {}", target.display()))
}

/// A user namespace with the map of `uid_base`, for id-mapped mounts.
pub fn user_namespace(uid_base: u32) -> Result<OwnedFd> {
    let child = Holder::start(CloneFlags::empty(), uid_base, &[])?;
    open(child.pid.as_raw(), "user")
}

fn open(pid: i32, kind: &str) -> Result<OwnedFd> {
    let path = format!("/proc/{pid}/ns/{kind}");
    Ok(File::open(&path).doing(|| format!("open {path}"))?.into())
}

/// A child that holds new namespaces open until dropped.
struct Holder {
    pid: Pid,
}

impl Holder {
    fn start(flags: CloneFlags, uid_base: u32, sysctls: &[(String, String)]) -> Result<Self> {
        let (mut ready, ready_write) = std::io::pipe().doing(|| "make a pipe".to_owned())?;
        let (mapped_read, mut mapped) = std::io::pipe().doing(|| "make a pipe".to_owned())?;
        // SAFETY: this process has one thread; the child makes a few system calls and ends without returning.
        let pid = match unsafe { fork() }.doing(|| "fork".to_owned())? {
            ForkResult::Parent { child } => child,
            ForkResult::Child => {
                drop((ready, mapped));
                hold(flags, sysctls, ready_write, mapped_read);
            }
        };
        let holder = Holder { pid };
        drop((ready_write, mapped_read));
        let mut byte = [0; 1];
        ready
            .read_exact(&mut byte)
            .doing(|| "make a user namespace".to_owned())?;
        for map in ["uid_map", "gid_map"] {
            let path = format!("/proc/{pid}/{map}");
            fs::write(&path, format!("0 {uid_base} {IDS}\n")).doing(|| format!("write {path}"))?;
        }
        mapped.write_all(&[0]).doing(|| "go on".to_owned())?;
        ready
            .read_exact(&mut byte)
            .doing(|| "make the namespace and its settings".to_owned())?;
        Ok(holder)
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = kill(self.pid, Signal::SIGKILL);
        let _ = waitpid(self.pid, None);
    }
}

/// The child's life: enter, report, wait for the map, enter the rest, report, wait to be killed.
fn hold(
    flags: CloneFlags,
    sysctls: &[(String, String)],
    mut ready: std::io::PipeWriter,
    mut mapped: std::io::PipeReader,
) -> ! {
    let mut live = || -> std::io::Result<()> {
        nix::sys::prctl::set_pdeathsig(Some(Signal::SIGKILL))?;
        unshare(CloneFlags::CLONE_NEWUSER)?;
        ready.write_all(&[0])?;
        mapped.read_exact(&mut [0; 1])?;
        if !flags.is_empty() {
            unshare(flags)?;
        }
        for (name, value) in sysctls {
            fs::write(Path::new("/proc/sys/net").join(name), value)?;
        }
        ready.write_all(&[0])?;
        loop {
            nix::unistd::pause();
        }
    };
    if let Err(error) = live() {
        eprintln!("{error}");
    }
    std::process::exit(1)
}
