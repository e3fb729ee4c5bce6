//! The files in which a machine reads of itself (`facts`), mounted on the host's side before there is a PID 1 to serve them.

use std::fs::{self, File, OpenOptions};
use std::io::Seek;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;

use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use serde::Deserialize;

use super::{Doing, HostError, Result};
use crate::facts::counters::{Counters, Memory};
use crate::facts::fuse::Server;
use crate::facts::{Description, FIRST_COUNTER_FD, NAMES, render};

#[derive(Deserialize)]
pub struct FactsPlan {
    cpus: u32,
    unified: bool,
    memory: u64,
    beside: u64,
    /// Files of the machine's groups.
    counters: Counters<PathBuf>,
}

/// What PID 1 needs to serve its files, opened before anything is mounted over its path.
pub struct Sources {
    device: File,
    description: File,
    counters: Vec<File>,
}

impl Sources {
    pub fn open(plan: &FactsPlan, owner: u32) -> Result<Self> {
        let device = open_device()?;
        let mut files = Vec::new();
        let counters = plan.counters.try_map(|path| -> Result<RawFd> {
            files.push(File::open(path).doing(|| format!("open {}", path.display()))?);
            Ok(FIRST_COUNTER_FD + files.len() as RawFd - 1)
        })?;
        let description = Description {
            cpus: plan.cpus,
            unified: plan.unified,
            memory: plan.memory,
            beside: plan.beside,
            owner,
            counters,
        };
        let memory = memfd_create(c"facts", MFdFlags::MFD_CLOEXEC).doing(|| "make a file in memory".to_owned())?;
        let mut memory = File::from(memory);
        serde_json::to_writer(&memory, &description).map_err(HostError::Plan)?;
        memory.rewind().doing(|| "describe the machine".to_owned())?;
        Ok(Sources {
            device,
            description: memory,
            counters: files,
        })
    }

    /// In the order of the numbers that PID 1 finds them at.
    pub fn descriptors(&self) -> impl Iterator<Item = RawFd> {
        let first = [self.device.as_raw_fd(), self.description.as_raw_fd()];
        first.into_iter().chain(self.counters.iter().map(File::as_raw_fd))
    }
}

fn open_device() -> Result<File> {
    let mut options = OpenOptions::new();
    options.read(true).write(true).custom_flags(libc::O_NONBLOCK);
    options.open("/dev/fuse").doing(|| "open /dev/fuse".to_owned())
}

/// Another way to the same filesystem. What is handed to the runtime may be made to block by it.
fn another(device: &File) -> Result<File> {
    const FUSE_DEV_IOC_CLONE: libc::c_ulong = 0x8004_E500;
    let other = open_device()?;
    let of = u32::try_from(device.as_raw_fd()).unwrap_or(u32::MAX);
    // SAFETY: the call reads one number, which lives through it.
    if unsafe { libc::ioctl(other.as_raw_fd(), FUSE_DEV_IOC_CLONE as _, &raw const of) } < 0 {
        return Err(std::io::Error::last_os_error()).doing(|| "open /dev/fuse again".to_owned());
    }
    Ok(other)
}

/// Answers for PID 1 until it is there: the runtime looks at what it mounts.
pub struct Stand {
    thread: JoinHandle<()>,
    /// Closed to end it.
    ends: OwnedFd,
}

impl Stand {
    pub fn down(self) {
        drop(self.ends);
        // It never panics; and the machine would be told the same.
        let _ = self.thread.join();
    }
}

/// `facts/NAME` below the current directory. Without `sources` they say what is known now, and CPU time is the host's.
pub fn build(plan: &FactsPlan, sources: Option<&Sources>, owner: u32) -> Result<Option<Stand>> {
    for path in ["facts", "live"] {
        fs::create_dir(path).doing(|| format!("create {path}"))?;
    }
    let Some(sources) = sources else {
        let memory = Memory {
            total: plan.memory,
            ..Memory::default()
        };
        let texts = [render::meminfo(&memory), render::swaps(&memory)];
        let texts = texts.into_iter().chain(std::iter::repeat(String::new()));
        for (name, text) in NAMES.iter().zip(texts) {
            fs::write(Path::new("facts").join(name), text).doing(|| format!("write facts/{name}"))?;
        }
        for name in ["stat", "uptime", "loadavg"] {
            bind(&format!("/proc/{name}"), name)?;
        }
        return Ok(None);
    };
    let options = format!(
        "fd={},rootmode=40555,user_id={owner},group_id={owner},allow_other,default_permissions",
        sources.device.as_raw_fd()
    );
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_RDONLY;
    mount(Some("pantala"), "live", Some("fuse"), flags, Some(options.as_str()))
        .doing(|| "mount the machine's facts".to_owned())?;
    let stand = stand_in(sources, owner)?;
    for name in NAMES {
        File::create(Path::new("facts").join(name)).doing(|| format!("create facts/{name}"))?;
        bind(&format!("live/{name}"), name)?;
    }
    Ok(Some(stand))
}

fn bind(source: &str, name: &str) -> Result<()> {
    let target = Path::new("facts").join(name);
    let nothing = None::<&str>;
    mount(Some(source), &target, nothing, MsFlags::MS_BIND, nothing).doing(|| format!("bind {}", target.display()))
}

fn stand_in(sources: &Sources, owner: u32) -> Result<Stand> {
    let device = another(&sources.device)?;
    let (until, ends) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).doing(|| "make a pipe".to_owned())?;
    let mut server = Server::new(device.into(), NAMES, owner);
    let thread = std::thread::spawn(move || {
        loop {
            let mut fds = [
                PollFd::new(server.fd(), PollFlags::POLLIN),
                PollFd::new(until.as_fd(), PollFlags::POLLIN),
            ];
            let polled = poll(&mut fds, PollTimeout::NONE);
            let over = fds[1].revents().is_none_or(|seen| !seen.is_empty());
            if over || polled.is_err_and(|errno| errno != nix::errno::Errno::EINTR) {
                return;
            }
            // Names and attributes; nobody reads before there is a machine.
            if server.answer(|_| Vec::new()).is_err() {
                return;
            }
        }
    });
    Ok(Stand { thread, ends })
}
