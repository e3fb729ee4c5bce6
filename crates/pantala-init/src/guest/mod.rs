//! PID 1 of a machine: one thread, one loop over the socket, the signals and the app's two pipes.
//!
//! `prepared` (blocked in `poll`, no process of the app) → `running` → `stopping` → exit. Nothing outside is needed on the
//! way: deadlines are kept here, output goes to the ring, the reason of the end to the exit record.

pub mod app;
mod calls;
pub mod command;
mod crew;
mod door;
mod exec;
mod health;
mod lines;
mod peers;
mod requests;
mod ring;
pub mod roots;
pub mod users;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, SeekFrom, Write};
use std::os::fd::{AsFd, FromRawFd};
use std::os::unix::net::UnixListener;
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use pantala_wire::guest::ExitRecord;

use crate::facts::Facts;
use crew::Crew;
use door::Door;
use lines::LineReader;
use peers::Peer;
use ring::Ring;

/// How long output of processes that outlive their SIGKILL is waited for.
const DRAIN: Duration = Duration::from_secs(2);
/// What the other processes of a machine have to end when one of them did.
const GRACE_OF_OTHERS: Duration = Duration::from_secs(5);
/// Signals to PID 1 that mean "end": handed to the app.
const FORWARDED: [Signal; 6] = [
    Signal::SIGTERM,
    Signal::SIGINT,
    Signal::SIGQUIT,
    Signal::SIGHUP,
    Signal::SIGUSR1,
    Signal::SIGUSR2,
];

pub fn run() -> ExitCode {
    if nix::unistd::getpid() != Pid::from_raw(1) {
        eprintln!("pantala-init: without arguments it must be PID 1 of a machine");
        return ExitCode::from(2);
    }
    match Init::inherit().and_then(Init::serve) {
        Ok(code) => ExitCode::from(u8::try_from(code).unwrap_or(u8::MAX)),
        Err(error) => {
            eprintln!("pantala-init: {error}");
            ExitCode::from(125)
        }
    }
}

pub fn unix_ns() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| u64::try_from(since.as_nanos()).unwrap_or(u64::MAX))
}

fn unix_ms() -> u64 {
    unix_ns() / 1_000_000
}

struct Init {
    listener: UnixListener,
    ring: Ring,
    record: File,
    signals: SignalFd,
    peers: Vec<Peer>,
    last_peer_id: u64,
    pipes: Vec<LineReader>,
    app_pid: i32,
    /// The app's process and those beside it that still run.
    running: Vec<i32>,
    /// How the first of them ended; the machine ends when the last did.
    first_end: Option<End>,
    /// What commands beside the app begin with: its environment and working directory.
    app_env: BTreeMap<String, String>,
    app_cwd: String,
    runs: Vec<exec::Run>,
    calls: calls::Calls,
    /// Where one may log in, once the app was started.
    door: Option<Door>,
    /// Instead of an app: containers.
    crew: Option<Crew>,
    /// What the machine is told of itself, unless the host can only say it once.
    facts: Option<Facts>,
    started_at_ms: u64,
    kill_at: Option<Instant>,
    stop_requested: bool,
    end: Option<End>,
}

/// How the app ended; set once.
struct End {
    exit_code: i32,
    signal: i32,
    reason: String,
}

impl Init {
    fn inherit() -> io::Result<Self> {
        // SAFETY: the contract of the three descriptors (wire/guest.py); nothing else in this process owns them.
        let (listener, ring_file, record) =
            unsafe { (UnixListener::from_raw_fd(3), File::from_raw_fd(4), File::from_raw_fd(5)) };
        app::close_on_exec(&listener)?;
        app::close_on_exec(&ring_file)?;
        app::close_on_exec(&record)?;
        listener.set_nonblocking(true)?;
        // The app may run with the same ids: without this it could open our descriptors through /proc/1/fd and
        // forge the exit record.
        nix::sys::prctl::set_dumpable(false)?;
        let mut wanted: SigSet = FORWARDED.into_iter().collect();
        wanted.add(Signal::SIGCHLD);
        wanted.thread_block()?;
        let signals = SignalFd::with_flags(&wanted, SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC)?;
        Ok(Init {
            listener,
            ring: Ring::open(&ring_file).map_err(io::Error::other)?,
            record,
            signals,
            peers: Vec::new(),
            last_peer_id: 0,
            pipes: Vec::new(),
            app_pid: 0,
            running: Vec::new(),
            first_end: None,
            app_env: BTreeMap::new(),
            app_cwd: String::new(),
            runs: Vec::new(),
            calls: calls::Calls::default(),
            door: None,
            crew: None,
            facts: Facts::inherit(),
            started_at_ms: unix_ms(),
            kill_at: None,
            stop_requested: false,
            end: None,
        })
    }

    fn serve(mut self) -> io::Result<i32> {
        let end = loop {
            if let Some(end) = self.end.take() {
                break end;
            }
            self.wait_for_anything()?;
            self.take_signals()?;
            self.reap();
            self.tell_facts();
            self.pump();
            self.take_requests();
            self.finish_runs();
            self.calls.hand_over(&self.peers);
            if let Some(door) = &mut self.door {
                door.answer(&self.app_env, self.crew.as_ref());
            }
            if let Some(crew) = &mut self.crew {
                self.end = self.end.take().or(crew.turn(&mut self.ring));
                self.pipes.append(&mut crew.take_pipes());
            }
            if self.kill_at.is_some_and(|at| Instant::now() >= at) {
                self.kill_at = None;
                kill_everything();
            }
        };
        self.write_record(&end)?;
        kill_everything();
        self.drain();
        Ok(end.exit_code)
    }

    fn wait_for_anything(&self) -> io::Result<()> {
        let mut fds = vec![
            PollFd::new(self.listener.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.signals.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(
            self.peers
                .iter()
                .map(|peer| PollFd::new(peer.socket.as_fd(), PollFlags::POLLIN)),
        );
        fds.extend(
            self.facts
                .iter()
                .map(|facts| PollFd::new(facts.fd(), PollFlags::POLLIN)),
        );
        fds.extend(self.pipes.iter().map(|pipe| PollFd::new(pipe.fd(), PollFlags::POLLIN)));
        fds.extend(self.runs.iter().flat_map(exec::Run::poll_fds));
        fds.extend(self.calls.poll_fd(&self.peers));
        fds.extend(self.door.iter().filter_map(Door::poll_fd));
        let door_at = self.door.as_ref().and_then(Door::wakes_at);
        fds.extend(self.crew.iter().flat_map(Crew::poll_fds));
        let crew_at = self.crew.as_ref().and_then(Crew::wakes_at);
        let deadlines = self
            .runs
            .iter()
            .map(exec::Run::wakes_at)
            .chain(self.kill_at)
            .chain(door_at)
            .chain(crew_at);
        match poll(&mut fds, poll_timeout(deadlines.min())) {
            Ok(_) | Err(nix::errno::Errno::EINTR) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn take_signals(&mut self) -> io::Result<()> {
        while let Some(info) = self.signals.read_signal()? {
            let number = i32::try_from(info.ssi_signo).unwrap_or(0);
            match Signal::try_from(number) {
                Ok(Signal::SIGCHLD) | Err(_) => {}
                Ok(_) if self.app_pid != 0 => self.send_all(number),
                Ok(Signal::SIGTERM | Signal::SIGINT | Signal::SIGQUIT) => self.end_unstarted(),
                Ok(_) => {}
            }
        }
        Ok(())
    }

    /// Collect every process that ended.
    fn reap(&mut self) {
        loop {
            match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => self.ended(pid.as_raw(), code, 0),
                Ok(WaitStatus::Signaled(pid, signal, _)) => {
                    self.ended(pid.as_raw(), 128 + signal as i32, signal as i32);
                }
                Ok(WaitStatus::StillAlive) | Err(_) => return,
                Ok(_) => {}
            }
        }
    }

    /// The end of the app, or of a process beside it, is the machine's: the others are asked to end too.
    fn ended(&mut self, pid: i32, exit_code: i32, signal: i32) {
        if let Some(run) = self.runs.iter_mut().find(|run| run.pid == pid) {
            run.ended(exit_code, signal);
        }
        if let Some(door) = &mut self.door {
            door.ended(pid, exit_code);
        }
        let Init { crew, ring, .. } = self;
        if crew
            .as_mut()
            .is_some_and(|crew| crew.ended(pid, exit_code, signal, ring))
        {
            return;
        }
        if !self.running.contains(&pid) {
            return;
        }
        self.running.retain(|&other| other != pid);
        let reason = if pid == self.app_pid {
            String::new()
        } else {
            "a process beside the app ended".to_owned()
        };
        self.first_end.get_or_insert(End {
            exit_code,
            signal,
            reason,
        });
        if self.running.is_empty() {
            self.end = self.first_end.take();
        } else if self.kill_at.is_none() {
            self.running.iter().for_each(|&pid| send(pid, libc::SIGTERM));
            self.kill_at = Some(Instant::now() + GRACE_OF_OTHERS);
        }
    }

    fn tell_facts(&mut self) {
        if self.facts.as_mut().is_some_and(|facts| facts.answer().is_err()) {
            self.facts = None;
        }
    }

    fn pump(&mut self) {
        let Init { pipes, ring, crew, .. } = self;
        pipes.retain_mut(|pipe| pipe.pump(ring));
        if let Some(crew) = crew {
            crew.pump();
        }
        for run in &mut self.runs {
            run.pump();
        }
    }

    /// Answer for commands that ended; end those whose caller went away or whose time is over.
    fn finish_runs(&mut self) {
        let peers = &mut self.peers;
        self.runs.retain_mut(|run| {
            let Some(peer) = peers.iter_mut().find(|peer| peer.id == run.peer && peer.is_open()) else {
                run.kill();
                return run.is_alive();
            };
            match run.answer() {
                Some(reply) => {
                    peer.answer(&reply);
                    false
                }
                None => true,
            }
        });
    }

    fn send_all(&self, number: i32) {
        let contained = self.crew.iter().flat_map(Crew::pids);
        self.running
            .iter()
            .copied()
            .chain(contained)
            .for_each(|pid| send(pid, number));
    }

    fn end_unstarted(&mut self) {
        self.stop_requested = true;
        let reason = "stopped before the app was started".to_owned();
        self.end.get_or_insert(End {
            exit_code: 0,
            signal: 0,
            reason,
        });
    }

    fn write_record(&mut self, end: &End) -> io::Result<()> {
        let record = ExitRecord {
            exit_code: end.exit_code,
            signal: end.signal,
            requested_stop: self.stop_requested,
            started_at_ms: self.started_at_ms,
            exited_at_ms: unix_ms(),
            reason: end.reason.clone(),
        };
        let text = serde_json::to_vec(&record)?;
        self.record.seek(SeekFrom::Start(0))?;
        self.record.write_all(&text)?;
        self.record.set_len(text.len() as u64)?;
        self.record.sync_all()
    }

    /// Read what the pipes still hold. All writers were killed, so both end soon.
    fn drain(&mut self) {
        let deadline = Instant::now() + DRAIN;
        while !self.pipes.is_empty() && Instant::now() < deadline {
            let mut fds: Vec<PollFd> = self
                .pipes
                .iter()
                .map(|pipe| PollFd::new(pipe.fd(), PollFlags::POLLIN))
                .collect();
            let polled = poll(&mut fds, poll_timeout(Some(deadline)));
            drop(fds);
            if polled.is_err_and(|errno| errno != nix::errno::Errno::EINTR) {
                break;
            }
            self.pump();
        }
        let Init { pipes, ring, .. } = self;
        for pipe in pipes {
            pipe.flush(ring);
        }
    }
}

/// Rounded up: waking before the deadline would only turn the loop once more.
fn poll_timeout(until: Option<Instant>) -> PollTimeout {
    match until {
        None => PollTimeout::NONE,
        Some(at) => {
            let left = at.saturating_duration_since(Instant::now()) + Duration::from_millis(1);
            PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX)
        }
    }
}

fn send(pid: i32, number: i32) {
    if let Ok(signal) = Signal::try_from(number) {
        // The app may have ended meanwhile; `reap` will tell.
        let _ = nix::sys::signal::kill(Pid::from_raw(pid), signal);
    }
}

/// SIGKILL for every process of the machine but us. `run` has made sure that we are PID 1: elsewhere this would
/// mean every process of the host.
fn kill_everything() {
    let _ = nix::sys::signal::kill(Pid::from_raw(-1), Signal::SIGKILL);
}
