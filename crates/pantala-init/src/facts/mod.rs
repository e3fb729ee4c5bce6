//! What a machine is told of itself: its own memory, swap, CPU time, age and tasks where `/proc` would speak of the host.
//!
//! `host::facts` mounts a small filesystem and binds its files over those of the machine; PID 1 serves it (`fuse`). So a
//! file is made when somebody reads it, and only then: nothing is refreshed, a machine that sleeps costs nothing, and
//! there is no daemon that could end and leave broken files behind: the server ends with its machine.

pub mod counters;
pub mod fuse;
pub mod render;
mod tasks;

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use nix::fcntl::{FcntlArg, FdFlag, OFlag, fcntl};
use nix::sys::stat::{SFlag, fstat};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use counters::Counters;
use fuse::Server;

/// Files of the filesystem, by their numbers there.
pub const NAMES: &[&str] = &["meminfo", "swaps", "stat", "uptime", "loadavg"];
/// PID 1 finds the device there, after what it is always given (`wire/guest.py`), and a description after that.
pub const DEVICE_FD: RawFd = 6;
const DESCRIPTION_FD: RawFd = 7;
pub const FIRST_COUNTER_FD: RawFd = 8;

/// As the host wrote it down for PID 1; `counters` by their descriptors.
#[derive(Serialize, Deserialize)]
pub struct Description<T> {
    pub cpus: u32,
    pub unified: bool,
    /// Bytes.
    pub memory: u64,
    /// Bytes of the group's limit that are not the machine's.
    pub beside: u64,
    pub owner: u32,
    pub counters: Counters<T>,
}

impl Description<File> {
    /// The file of that number.
    fn content(&self, file: usize, began: Duration) -> String {
        match NAMES.get(file).copied() {
            Some("meminfo") => render::meminfo(&self.counters.memory(self.unified, self.memory, self.beside)),
            Some("swaps") => render::swaps(&self.counters.memory(self.unified, self.memory, self.beside)),
            Some("uptime") => {
                let lived = hundredths(since_boot().saturating_sub(began));
                render::uptime(
                    hundredths(since_boot()),
                    self.cpus,
                    &self.counters.cpu(self.unified),
                    lived,
                )
            }
            Some("loadavg") => render::loadavg(&tasks::count()),
            _ => {
                let lived = hundredths(since_boot().saturating_sub(began));
                render::stat(self.cpus, &self.counters.cpu(self.unified), lived, booted_s())
            }
        }
    }
}

fn hundredths(time: Duration) -> u64 {
    u64::try_from(time.as_millis() / 10).unwrap_or(u64::MAX)
}

/// PID 1's end.
pub struct Facts {
    server: Server,
    description: Description<File>,
    /// On the clock since boot: the machine's, where the kernel can tell it apart from the host's.
    began: Duration,
}

impl Facts {
    /// None: the host has no such filesystem, and the machine was given what it could be.
    pub fn inherit() -> Option<Self> {
        // SAFETY: only looked at; whoever started us left either nothing at this number or what is looked for.
        let device = unsafe { BorrowedFd::borrow_raw(DEVICE_FD) };
        if !is_fuse(device) {
            return None;
        }
        let mut text = Vec::new();
        take(DESCRIPTION_FD).ok()?.read_to_end(&mut text).ok()?;
        let described: Description<RawFd> = serde_json::from_slice(&text).ok()?;
        let description = Description {
            cpus: described.cpus,
            unified: described.unified,
            memory: described.memory,
            beside: described.beside,
            owner: described.owner,
            counters: described.counters.try_map(|&fd| take(fd)).ok()?,
        };
        let device: OwnedFd = take(DEVICE_FD).ok()?.into();
        fcntl(&device, FcntlArg::F_SETFL(OFlag::O_NONBLOCK)).ok()?;
        Some(Facts {
            server: Server::new(device, NAMES, description.owner),
            description,
            began: since_boot(),
        })
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.server.fd()
    }

    /// An error: nobody will ask again.
    pub fn answer(&mut self) -> io::Result<()> {
        let Facts {
            server,
            description,
            began,
        } = self;
        server.answer(|file| render::even(description.content(file, *began)).into_bytes())
    }
}

fn is_fuse(device: BorrowedFd<'_>) -> bool {
    const FUSE: (u64, u64) = (10, 229);
    fstat(device).is_ok_and(|seen| {
        SFlag::from_bits_truncate(seen.st_mode) & SFlag::S_IFMT == SFlag::S_IFCHR
            && (nix::sys::stat::major(seen.st_rdev), nix::sys::stat::minor(seen.st_rdev)) == FUSE
    })
}

/// An inherited descriptor, which no program that we begin gets.
fn take(fd: RawFd) -> io::Result<File> {
    // SAFETY: by the description these numbers are ours alone; a closed one is found out by the next call.
    let file = unsafe { File::from_raw_fd(fd) };
    match fcntl(&file, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)) {
        Ok(_) => Ok(file),
        Err(errno) => {
            // It is not open, so it must not be closed either.
            std::mem::forget(file);
            Err(errno.into())
        }
    }
}

fn since_boot() -> Duration {
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(Duration::ZERO, Duration::from)
}

fn booted_s() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    now.saturating_sub(since_boot()).as_secs()
}
