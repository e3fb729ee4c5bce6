//! What the agent asks of PID 1, and what is done about it; the loop that calls is in `guest/mod.rs`.

use std::path::Path;
use std::time::{Duration, Instant};

use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use pantala_wire::guest::{Exec, GUEST_PROTOCOL, GuestReply, GuestRequest, Phase, Ssh, Start, Statics};

use super::command::{CODE_CANNOT_RUN, CannotRun};
use super::crew::Crew;
use super::door::Door;
use super::lines::LineReader;
use super::peers::{self, Peer};
use super::ring::Stream;
use super::roots::Entered;
use super::{End, Init, app, exec, send, unix_ms, unix_ns};

/// Commands beside the app at the same time; one more is refused.
const RUNS_MAX: usize = 16;

impl Init {
    pub(super) fn take_requests(&mut self) {
        peers::accept(&self.listener, &mut self.peers, &mut self.last_peer_id);
        let mut peers = std::mem::take(&mut self.peers);
        for peer in &mut peers {
            for request in peer.receive() {
                let reply = match request {
                    Ok(request) => self.answer(request, peer.id),
                    Err(reason) => Some(GuestReply::Refused { reason }),
                };
                if let Some(reply) = reply {
                    peer.answer(&reply);
                }
            }
        }
        peers.retain(Peer::is_open);
        self.peers = peers;
    }

    /// None: its answer comes later, by `finish_runs`.
    fn answer(&mut self, request: GuestRequest, peer: u64) -> Option<GuestReply> {
        let reply = match request {
            GuestRequest::Exec(exec) => match self.begin(&exec, peer) {
                Ok(()) => return None,
                Err(reply) => reply,
            },
            GuestRequest::TakeCalls => {
                self.calls.taker = peer;
                GuestReply::Ok
            }
            GuestRequest::Status => GuestReply::Status {
                protocol: GUEST_PROTOCOL,
                phase: self.phase(),
                pid: self.app_pid,
                containers: self.crew.as_ref().map_or_else(Vec::new, Crew::states),
            },
            GuestRequest::Start(_) if self.phase() != Phase::Prepared => refused("the app was started before"),
            GuestRequest::Start(start) => self.start(*start),
            GuestRequest::Stop { signal, grace_ms } => self.stop(signal, grace_ms),
            GuestRequest::Signal { signal } => self.pass_on(signal),
        };
        Some(reply)
    }

    fn start(&mut self, start: Start) -> GuestReply {
        match self.bring_up(start) {
            Ok(pid) => GuestReply::Started { pid },
            Err(CannotRun { code, reason }) => {
                self.tell(&reason);
                self.end = Some(End {
                    exit_code: code,
                    signal: 0,
                    reason: reason.clone(),
                });
                GuestReply::Failed { reason }
            }
        }
    }

    fn pass_on(&self, signal: i32) -> GuestReply {
        if self.app_pid == 0 {
            return refused("the app was not started");
        }
        if Signal::try_from(signal).is_err() {
            return refused(&format!("there is no signal {signal}"));
        }
        match self.crew {
            Some(_) => self.send_all(signal),
            None => send(self.app_pid, signal),
        }
        GuestReply::Ok
    }

    fn begin(&mut self, exec: &Exec, peer: u64) -> Result<(), GuestReply> {
        if self.app_pid == 0 {
            return Err(refused("the app was not started"));
        }
        if self.runs.len() >= RUNS_MAX {
            return Err(refused(&format!("{RUNS_MAX} commands run already")));
        }
        let begun = match &self.crew {
            None if exec.container.is_empty() => exec::begin(exec, &self.app_env, &self.app_cwd, peer),
            None => return Err(refused("this machine has no containers")),
            Some(_) if exec.machine => exec::begin(exec, &self.app_env, &self.app_cwd, peer),
            Some(crew) => {
                let Some(container) = crew.find(&exec.container) else {
                    return Err(refused(&format!("this machine has no container {:?}", exec.container)));
                };
                Entered::enter(&container.root)
                    .map_err(|error| CannotRun::new(CODE_CANNOT_RUN, format!("its root cannot be entered: {error}")))
                    .and_then(|_inside| exec::begin(exec, &container.env, &container.cwd, peer))
            }
        };
        self.runs
            .push(begun.map_err(|CannotRun { reason, .. }| GuestReply::Failed { reason })?);
        Ok(())
    }

    /// The app and what is beside it, or containers; the pid of the first.
    fn bring_up(&mut self, start: Start) -> Result<i32, CannotRun> {
        self.take_cpus(&start.cpus);
        // Before the app, which may call at once.
        if !start.api_socket.is_empty()
            && let Err(error) = self.calls.listen(Path::new(&start.api_socket))
        {
            self.tell(&format!("{} cannot be served: {error}", start.api_socket));
        }
        self.open_door(start.ssh.clone());
        if start.containers.is_empty() {
            let running = app::start(&start)?;
            self.app_pid = running.first().map_or(0, |app| app.pid);
            for process in running {
                self.running.push(process.pid);
                self.pipes.push(LineReader::new(process.stdout, Stream::Stdout));
                self.pipes.push(LineReader::new(process.stderr, Stream::Stderr));
            }
        } else {
            app::take_hostname(&start.hostname);
            self.app_pid = self.crew.insert(Crew::new(start.containers)).begin()?;
        }
        self.serve_statics(start.statics.as_ref());
        self.app_env = start.env;
        self.app_cwd = start.cwd;
        self.started_at_ms = unix_ms();
        Ok(self.app_pid)
    }

    /// All that the machine will run is begun by PID 1, and has its CPUs. An empty list: all of them.
    fn take_cpus(&mut self, cpus: &[usize]) {
        if cpus.is_empty() {
            return;
        }
        let mut set = CpuSet::new();
        let taken = cpus.iter().try_for_each(|&cpu| set.set(cpu));
        if let Err(error) = taken.and_then(|()| sched_setaffinity(Pid::from_raw(0), &set)) {
            // Of a host that has lost one of them since; its quota holds it to its size all the same.
            self.tell(&format!("the machine runs on all CPUs of its host: {error}"));
        }
    }

    /// An app that has the port itself keeps it; so that nobody can log in is only told.
    fn open_door(&mut self, ssh: Option<Ssh>) {
        match ssh.map(Door::open).transpose() {
            Ok(door) => self.door = door,
            Err(error) => self.tell(&format!("nobody can log in by ssh: {error}")),
        }
    }

    /// Without it the app is asked for everything, so its failure is only told.
    fn serve_statics(&mut self, statics: Option<&Statics>) {
        if let Some(Err(error)) = statics.map(crate::statics::start) {
            self.tell(&format!("statics cannot be served: {error}"));
        }
    }

    fn stop(&mut self, signal: i32, grace_ms: u64) -> GuestReply {
        if Signal::try_from(signal).is_err() {
            return refused(&format!("there is no signal {signal}"));
        }
        self.stop_requested = true;
        if self.app_pid == 0 {
            self.end_unstarted();
        } else {
            match &mut self.crew {
                Some(crew) => crew.stop(), // each by its own signal
                None => self.running.iter().for_each(|&pid| send(pid, signal)),
            }
            let at = Instant::now() + Duration::from_millis(grace_ms);
            // A second stop may shorten the grace, never prolong it.
            self.kill_at = Some(self.kill_at.map_or(at, |earlier| earlier.min(at)));
        }
        GuestReply::Ok
    }

    fn phase(&self) -> Phase {
        match (self.end.is_some(), self.app_pid, self.stop_requested) {
            (true, _, _) => Phase::Exited,
            (_, 0, _) => Phase::Prepared,
            (_, _, true) => Phase::Stopping,
            _ => Phase::Running,
        }
    }

    /// For the owner, among the app's own words.
    fn tell(&mut self, what: &str) {
        let line = format!("pantala-init: {what}");
        self.ring.append(unix_ns(), Stream::Stderr, line.as_bytes());
    }
}

fn refused(reason: &str) -> GuestReply {
    GuestReply::Refused {
        reason: reason.to_owned(),
    }
}
