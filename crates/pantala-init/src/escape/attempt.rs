//! One attempt: made in a process of its own, so that what kills or holds it ends nothing else, and judged.

use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{ForkResult, fork};

use super::Aims;

const DEADLINE: Duration = Duration::from_secs(25);
const SAID_BYTES_MAX: u64 = 4096;

/// Refusals that say: you may not, or there is no such thing for you.
pub const NO: &[Errno] = &[Errno::EPERM, Errno::EACCES, Errno::EROFS, Errno::ENOSYS];

pub enum Tried {
    Refused(String),
    Through(String),
    /// Neither: it went wrong in a way that says nothing about what is allowed.
    Unclear(String),
    /// There is nothing to aim at.
    Nothing(String),
    /// The machine was allowed to; whether it reached the host, only the host can see.
    HostSees(String),
}

impl Tried {
    /// An outcome and what to say of it. A refusal of what the host does not have either (`missing`) proves nothing.
    pub fn judged(self, missing: Option<&str>) -> (&'static str, String) {
        match (self, missing) {
            (Self::Through(detail), _) => ("through", detail),
            (Self::Refused(_) | Self::Unclear(_), Some(why)) => ("not_applicable", why.to_owned()),
            (Self::Refused(detail), None) => ("held", detail),
            (Self::Unclear(detail), None) => ("unclear", detail),
            (Self::Nothing(detail), _) => ("not_applicable", detail),
            (Self::HostSees(detail), _) => ("host_sees", detail),
        }
    }

    fn written(&self) -> (u8, &str) {
        match self {
            Self::Refused(text) => (b'r', text),
            Self::Through(text) => (b't', text),
            Self::Unclear(text) => (b'u', text),
            Self::Nothing(text) => (b'n', text),
            Self::HostSees(text) => (b'h', text),
        }
    }

    fn read(said: &[u8]) -> Option<Self> {
        let (kind, text) = said.split_first()?;
        let text = String::from_utf8_lossy(text).into_owned();
        match kind {
            b'r' => Some(Self::Refused(text)),
            b't' => Some(Self::Through(text)),
            b'u' => Some(Self::Unclear(text)),
            b'n' => Some(Self::Nothing(text)),
            b'h' => Some(Self::HostSees(text)),
            _ => None,
        }
    }
}

/// What the host must have, so that a refusal proves something.
pub enum Need {
    Nothing,
    /// A system call; with these arguments it does nothing, whoever makes it.
    Call(libc::c_long, [libc::c_long; 5]),
    Path(&'static str),
    Filesystem(&'static str),
    /// A family of sockets.
    Family(libc::c_int),
    /// Whether it is there, asked in a process of its own; and what to say when it is not.
    Asked(fn() -> bool, &'static str),
}

pub struct Attempt {
    pub name: &'static str,
    pub need: Need,
    pub act: fn(&Aims) -> Tried,
}

impl Attempt {
    pub fn make(&self, aims: &Aims) -> Tried {
        apart(|| (self.act)(aims))
    }
}

/// What a call's errno says, where these ones are refusals.
pub fn judge(what: &str, refusals: &[&[Errno]], result: io::Result<String>) -> Tried {
    match result {
        Ok(got) => Tried::Through(got),
        Err(error) => {
            let errno = Errno::from_raw(error.raw_os_error().unwrap_or(0));
            let text = format!("{what}: {errno:?}");
            if refusals.iter().any(|list| list.contains(&errno)) {
                Tried::Refused(text)
            } else {
                Tried::Unclear(text)
            }
        }
    }
}

/// The worst of what was met decides; the detail names it, or how often each refusal came.
pub fn each<'a, T: 'a>(aims: impl Iterator<Item = &'a T>, without: &str, act: impl Fn(&T) -> Tried) -> Tried {
    let (mut refused, mut unclear) = (Vec::new(), Vec::new());
    for aim in aims {
        match act(aim) {
            Tried::Refused(detail) => refused.push(detail),
            Tried::Unclear(detail) => unclear.push(detail),
            other => return other,
        }
    }
    match (refused.as_slice(), unclear.into_iter().next()) {
        (_, Some(detail)) => Tried::Unclear(detail),
        ([], None) => Tried::Nothing(without.to_owned()),
        ([only], None) => Tried::Refused(only.clone()),
        (all, None) => Tried::Refused(counted(all)),
    }
}

fn counted(refusals: &[String]) -> String {
    let mut words: Vec<(&str, usize)> = Vec::new();
    for refusal in refusals {
        let word = refusal.rsplit(": ").next().unwrap_or(refusal);
        match words.iter_mut().find(|(known, _)| *known == word) {
            Some((_, count)) => *count += 1,
            None => words.push((word, 1)),
        }
    }
    let words: Vec<String> = words.iter().map(|(word, count)| format!("{word} × {count}")).collect();
    words.join(", ")
}

/// Where attempts make their files.
pub const SCRATCH: &str = "/tmp/pantala-escape";

/// A raw system call, because most of these have no door in a library.
pub fn syscall(number: libc::c_long, arguments: [libc::c_long; 5]) -> io::Result<libc::c_long> {
    let [a, b, c, d, e] = arguments;
    // SAFETY: pointers among the arguments are null, or of values that the caller holds until this returns; no attempt
    // asks the kernel to change this program's memory elsewhere.
    let done = unsafe { libc::syscall(number, a, b, c, d, e, 0 as libc::c_long) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(done)
    }
}

/// The address of a value, as an argument of `syscall`.
pub fn address<T: ?Sized>(value: &T) -> libc::c_long {
    (value as *const T).cast::<u8>() as libc::c_long
}

/// Run it in a child and hear what it says before `DEADLINE`.
pub fn apart(act: impl FnOnce() -> Tried) -> Tried {
    let (mut reader, mut writer) = match io::pipe() {
        Ok(ends) => ends,
        Err(error) => return Tried::Unclear(format!("a pipe cannot be made: {error}")),
    };
    // SAFETY: this program has one thread.
    let child = match unsafe { fork() } {
        Ok(ForkResult::Parent { child }) => child,
        Ok(ForkResult::Child) => {
            drop(reader);
            let tried = act();
            let (kind, text) = tried.written();
            let _ = writer.write_all(&[&[kind], text.as_bytes()].concat());
            // SAFETY: ends this process without running what the parent's exit will run.
            unsafe { libc::_exit(0) }
        }
        Err(error) => return Tried::Unclear(format!("fork: {error:?}")),
    };
    drop(writer);
    let mut said = Vec::new();
    let in_time = is_ready(reader.as_raw_fd(), libc::POLLIN, Instant::now() + DEADLINE);
    if in_time {
        let _ = io::Read::by_ref(&mut reader)
            .take(SAID_BYTES_MAX)
            .read_to_end(&mut said);
    } else {
        let _ = kill(child, Signal::SIGKILL);
    }
    let ended = waitpid(child, None);
    if let Some(tried) = Tried::read(&said) {
        return tried;
    }
    match ended {
        Ok(WaitStatus::Signaled(_, Signal::SIGSYS, _)) => Tried::Refused("killed by SIGSYS".to_owned()),
        _ if !in_time => Tried::Unclear(format!("no end within {} s", DEADLINE.as_secs())),
        other => Tried::Unclear(format!("it ended without a word: {other:?}")),
    }
}

/// Whether one of `events` came before `until`.
pub fn is_ready(fd: i32, events: libc::c_short, until: Instant) -> bool {
    loop {
        let left = until.saturating_duration_since(Instant::now());
        let mut one = libc::pollfd { fd, events, revents: 0 };
        // SAFETY: one entry, which lives until poll returns.
        let ready = unsafe { libc::poll(&raw mut one, 1, i32::try_from(left.as_millis()).unwrap_or(i32::MAX)) };
        if ready > 0 {
            return true;
        }
        if ready == 0 || Errno::last() != Errno::EINTR {
            return false;
        }
    }
}
