//! Commands beside the app: run with its environment, their output kept for one answer.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use nix::poll::{PollFd, PollFlags};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pantala_wire::guest::{Exec, Executed, GuestReply};

use super::app;
use super::command::{CODE_CANNOT_RUN, CannotRun};

/// What a command left in the background may hold its output open; it is answered without.
const LINGER: Duration = Duration::from_millis(100);
/// Per turn of the loop, so that one loud command does not starve the rest.
const TURN_BYTES: usize = 64 * 1024;

/// A command that runs, or ended and is not answered yet.
pub struct Run {
    /// The connection that waits for it.
    pub peer: u64,
    pub pid: i32,
    input: Option<Input>,
    stdout: Capture,
    stderr: Capture,
    deadline: Instant,
    timed_out: bool,
    end: Option<End>,
}

struct Input {
    pipe: File,
    left: Vec<u8>,
}

struct End {
    exit_code: i32,
    signal: i32,
    answer_by: Instant,
}

/// Run `exec` as its user, root if it names none, where the app works.
pub fn begin(exec: &Exec, app_env: &BTreeMap<String, String>, app_cwd: &str, peer: u64) -> Result<Run, CannotRun> {
    let refuse = |reason: String| CannotRun::new(CODE_CANNOT_RUN, reason);
    let left = STANDARD
        .decode(&exec.stdin_base64)
        .map_err(|error| refuse(format!("its input cannot be read: {error}")))?;
    let identity = app::identify(&exec.user)?;
    let mut env = app_env.clone();
    env.remove("HOME");
    env.extend(exec.env.clone());
    let cwd = [exec.cwd.as_str(), app_cwd, "/"]
        .into_iter()
        .find(|path| !path.is_empty());
    let (stdin, input) = if left.is_empty() {
        (Stdio::null(), None)
    } else {
        let (read, pipe) = app::input_pipe().map_err(|error| refuse(format!("no pipe for its input: {error}")))?;
        let pipe = File::from(pipe);
        (Stdio::from(read), Some(Input { pipe, left }))
    };
    let running = app::run(&exec.argv, &env, &identity, Path::new(cwd.unwrap_or("/")), stdin)?;
    Ok(Run {
        peer,
        pid: running.pid,
        input,
        stdout: Capture::new(running.stdout, exec.output_bytes_max),
        stderr: Capture::new(running.stderr, exec.output_bytes_max),
        deadline: Instant::now() + Duration::from_millis(exec.timeout_ms),
        timed_out: false,
        end: None,
    })
}

impl Run {
    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let writes = self
            .input
            .iter()
            .map(|input| PollFd::new(input.pipe.as_fd(), PollFlags::POLLOUT));
        let reads = [&self.stdout, &self.stderr]
            .into_iter()
            .filter_map(|capture| capture.pipe.as_ref());
        writes.chain(reads.map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN)))
    }

    /// When it must be looked at although nothing happened.
    pub fn wakes_at(&self) -> Instant {
        self.end.as_ref().map_or(self.deadline, |end| end.answer_by)
    }

    pub fn pump(&mut self) {
        self.stdout.pump();
        self.stderr.pump();
        if self.input.as_mut().is_some_and(|input| !input.pump()) {
            self.input = None;
        }
    }

    pub fn ended(&mut self, exit_code: i32, signal: i32) {
        self.input = None;
        self.end = Some(End {
            exit_code,
            signal,
            answer_by: Instant::now() + LINGER,
        });
    }

    pub fn is_alive(&self) -> bool {
        self.end.is_none()
    }

    /// With all that it started and that stayed in its process group.
    pub fn kill(&self) {
        if self.is_alive() {
            // It may have ended meanwhile; the loop will tell.
            let _ = killpg(Pid::from_raw(self.pid), Signal::SIGKILL);
        }
    }

    /// How it ended, once its output is there too; ends it when its time is over.
    pub fn finished(&mut self) -> Option<Finished<'_>> {
        let now = Instant::now();
        let Some(end) = &self.end else {
            if now >= self.deadline && !self.timed_out {
                self.timed_out = true;
                self.kill();
                self.deadline = now + Duration::from_secs(1); // only until it is collected
            }
            return None;
        };
        if now < end.answer_by && (self.stdout.pipe.is_some() || self.stderr.pipe.is_some()) {
            return None;
        }
        Some(Finished {
            exit_code: end.exit_code,
            signal: end.signal,
            stdout: &self.stdout.kept,
            stderr: &self.stderr.kept,
            truncated: self.stdout.is_cut || self.stderr.is_cut,
            timed_out: self.timed_out,
        })
    }

    pub fn answer(&mut self) -> Option<GuestReply> {
        self.finished().map(|finished| {
            GuestReply::Executed(Executed {
                exit_code: finished.exit_code,
                signal: finished.signal,
                stdout_base64: STANDARD.encode(finished.stdout),
                stderr_base64: STANDARD.encode(finished.stderr),
                truncated: finished.truncated,
                timed_out: finished.timed_out,
            })
        })
    }
}

/// A command that ended, with what it wrote.
pub struct Finished<'a> {
    pub exit_code: i32,
    pub signal: i32,
    pub stdout: &'a [u8],
    pub stderr: &'a [u8],
    pub truncated: bool,
    pub timed_out: bool,
}

impl Input {
    /// Write what fits; false when all is written or nobody reads any more.
    fn pump(&mut self) -> bool {
        match self.pipe.write(&self.left) {
            Ok(written) => {
                self.left.drain(..written);
                !self.left.is_empty()
            }
            Err(error) => matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted),
        }
    }
}

/// One output of a command: its first bytes are kept, the rest is read and dropped.
struct Capture {
    pipe: Option<File>,
    kept: Vec<u8>,
    bytes_max: usize,
    is_cut: bool,
}

impl Capture {
    fn new(pipe: OwnedFd, bytes_max: usize) -> Self {
        Capture {
            pipe: Some(File::from(pipe)),
            kept: Vec::new(),
            bytes_max,
            is_cut: false,
        }
    }

    fn pump(&mut self) {
        let mut buffer = [0; 16 * 1024];
        for _ in 0..TURN_BYTES / buffer.len() {
            let Some(pipe) = &mut self.pipe else { return };
            match pipe.read(&mut buffer) {
                Ok(0) => self.pipe = None,
                Ok(length) => {
                    let room = self.bytes_max - self.kept.len();
                    self.kept.extend_from_slice(&buffer[..length.min(room)]);
                    self.is_cut |= length > room;
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => self.pipe = None,
            }
        }
    }
}
