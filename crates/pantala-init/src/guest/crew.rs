//! The containers of a machine: started in the order of their dependencies, restarted by their policies, stopped in reverse.
//!
//! `pending` (until what it depends on is so) → `started` ⇄ `restarting` → `stopped`; `stopping` between a request to end and
//! the end. Called once a turn of PID 1's loop; nothing here waits. The machine ends when every container has, or when
//! one can never start.

use std::time::{Duration, Instant};

use nix::poll::PollFd;
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use pantala_wire::guest::{Condition, ContainerHealth, ContainerPhase, ContainerState, GuestContainer, RestartPolicy};

use super::command::CannotRun;
use super::health::Check;
use super::lines::LineReader;
use super::ring::{Ring, Stream};
use super::roots::Entered;
use super::{End, app, send, unix_ns};

/// As for machines (`domain/restart.py`).
const WINDOW: Duration = Duration::from_secs(300);
const FIRST_DELAY: Duration = Duration::from_millis(250);
const MOST_DELAY: Duration = Duration::from_secs(30);

pub struct Crew {
    members: Vec<Member>,
    pipes: Vec<LineReader>,
    stopping: bool,
    /// What the machine will have ended with.
    failure: Option<End>,
}

struct Member {
    spec: GuestContainer,
    at: At,
    checks: Vec<Check>,
    restarts: Vec<Instant>,
    restarted: u32,
    exit_code: Option<i32>,
    was_started: bool,
    has_succeeded: bool,
    is_condemned: bool,
}

enum At {
    Pending,
    Started { pid: i32 },
    Stopping { pid: i32, kill_at: Instant },
    Restarting { until: Instant },
    Stopped,
}

/// What one container may know of another that it depends on.
enum Met {
    Yes,
    NotYet,
    Never(String),
}

impl Crew {
    pub fn new(containers: Vec<GuestContainer>) -> Self {
        let member = |spec| Member {
            spec,
            at: At::Pending,
            checks: Vec::new(),
            restarts: Vec::new(),
            restarted: 0,
            exit_code: None,
            was_started: false,
            has_succeeded: false,
            is_condemned: false,
        };
        Crew {
            members: containers.into_iter().map(member).collect(),
            pipes: Vec::new(),
            stopping: false,
            failure: None,
        }
    }

    /// Start those that wait for nobody. Whichever cannot is a sentence for the owner, and the end of the machine.
    pub fn begin(&mut self) -> Result<i32, CannotRun> {
        let now = Instant::now();
        for index in 0..self.members.len() {
            if self.members[index].spec.depends_on.is_empty() {
                self.launch(index, now)?;
            }
        }
        Ok(self.pids().next().unwrap_or(0))
    }

    pub fn pids(&self) -> impl Iterator<Item = i32> {
        self.members.iter().filter_map(|member| member.pid())
    }

    pub fn specs(&self) -> impl Iterator<Item = &GuestContainer> {
        self.members.iter().map(|member| &member.spec)
    }

    /// The container of that name, the first for an empty one.
    pub fn find(&self, name: &str) -> Option<&GuestContainer> {
        self.specs().find(|spec| name.is_empty() || spec.name == name)
    }

    pub fn states(&self) -> Vec<ContainerState> {
        self.members.iter().map(Member::state).collect()
    }

    // -- the loop of PID 1 -------------------------------------------------------------------------------------------

    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        let checks = self.members.iter().flat_map(|member| &member.checks);
        checks.flat_map(Check::poll_fds)
    }

    pub fn wakes_at(&self) -> Option<Instant> {
        self.members.iter().filter_map(Member::wakes_at).min()
    }

    pub fn pump(&mut self) {
        let checks = self.members.iter_mut().flat_map(|member| &mut member.checks);
        checks.for_each(Check::pump);
    }

    /// Outputs of what was started since the last time.
    pub fn take_pipes(&mut self) -> Vec<LineReader> {
        std::mem::take(&mut self.pipes)
    }

    /// A process ended; true if it was one of ours.
    pub fn ended(&mut self, pid: i32, exit_code: i32, signal: i32, ring: &mut Ring) -> bool {
        let checks = self.members.iter_mut().flat_map(|member| &mut member.checks);
        for check in checks {
            if check.ended(pid, exit_code, signal) {
                return true;
            }
        }
        let Some(member) = self.members.iter_mut().find(|member| member.pid() == Some(pid)) else {
            return false;
        };
        // What it began and left behind in its process group ends with it.
        let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
        member.checks.clear();
        member.exit_code = Some(exit_code);
        member.has_succeeded |= exit_code == 0 && !member.is_condemned;
        let said = match member.after_exit(exit_code, self.stopping) {
            Some(delay) => {
                member.at = At::Restarting {
                    until: Instant::now() + delay,
                };
                format!(
                    "exited with code {exit_code}; starting it again in {} ms",
                    delay.as_millis()
                )
            }
            None => {
                member.at = At::Stopped;
                format!("exited with code {exit_code}")
            }
        };
        if matches!(member.at, At::Stopped) && (exit_code != 0 || member.is_condemned) && self.failure.is_none() {
            self.failure = Some(End {
                exit_code: if exit_code == 0 { 1 } else { exit_code },
                signal,
                reason: format!("container {} {said}", member.spec.name),
            });
        }
        tell(ring, &member.spec.name, &said);
        true
    }

    /// Do what is due; how the machine ended once all containers have.
    pub fn turn(&mut self, ring: &mut Ring) -> Option<End> {
        let now = Instant::now();
        for index in 0..self.members.len() {
            match self.members[index].at {
                At::Restarting { until } if now >= until => self.launch_or_fail(index, now, ring),
                At::Started { .. } => self.look_after(index, now, ring),
                At::Stopping { pid, kill_at } if now >= kill_at => {
                    let _ = killpg(Pid::from_raw(pid), Signal::SIGKILL);
                    let kill_at = now + MOST_DELAY;
                    self.members[index].at = At::Stopping { pid, kill_at };
                }
                _ => {}
            }
        }
        while self.launch_next(now, ring) {}
        if self.stopping {
            self.stop_in_reverse(now);
        }
        let is_over = self.members.iter().all(|member| matches!(member.at, At::Stopped));
        is_over.then(|| {
            self.failure.take().unwrap_or(End {
                exit_code: 0,
                signal: 0,
                reason: String::new(),
            })
        })
    }

    /// End all of them, those first that nobody depends on. Whoever calls keeps the last deadline.
    pub fn stop(&mut self) {
        self.stopping = true;
        for member in &mut self.members {
            if matches!(member.at, At::Pending | At::Restarting { .. }) {
                member.at = At::Stopped;
            }
        }
        self.stop_in_reverse(Instant::now());
    }

    // -- footnotes ---------------------------------------------------------------------------------------------------

    /// One of those whose dependencies are met; false when there is none.
    fn launch_next(&mut self, now: Instant, ring: &mut Ring) -> bool {
        for index in 0..self.members.len() {
            match self.members[index].at {
                At::Pending if !self.stopping => match self.ready(index) {
                    Met::Yes => self.launch_or_fail(index, now, ring),
                    Met::Never(why) => self.fail(index, 1, &why, ring),
                    Met::NotYet => continue,
                },
                _ => continue,
            }
            return true;
        }
        false
    }

    fn ready(&self, index: usize) -> Met {
        let mut all = Met::Yes;
        for wanted in &self.members[index].spec.depends_on {
            let Some(other) = self.members.iter().find(|member| member.spec.name == wanted.name) else {
                return Met::Never(format!("there is no container {}", wanted.name));
            };
            match other.meets(wanted.condition) {
                Met::Yes => {}
                Met::NotYet => all = Met::NotYet,
                never @ Met::Never(_) => return never,
            }
        }
        all
    }

    fn launch(&mut self, index: usize, now: Instant) -> Result<(), CannotRun> {
        let member = &mut self.members[index];
        let spec = &member.spec;
        let name = &spec.name;
        let refuse = |reason: String| CannotRun::new(126, format!("container {name}: {reason}"));
        let inside =
            Entered::enter(&spec.root).map_err(|error| refuse(format!("no root at {}: {error}", spec.root)))?;
        let running = app::begin(&spec.argv, &spec.env, &spec.user, &spec.cwd, &spec.files)
            .map_err(|CannotRun { code, reason }| CannotRun::new(code, format!("container {name}: {reason}")))?;
        drop(inside);
        self.pipes
            .push(LineReader::new(running.stdout, Stream::Stdout).named(name));
        self.pipes
            .push(LineReader::new(running.stderr, Stream::Stderr).named(name));
        member.checks = spec.healthchecks.iter().map(|check| Check::new(check, now)).collect();
        member.at = At::Started { pid: running.pid };
        member.was_started = true;
        member.is_condemned = false;
        Ok(())
    }

    fn launch_or_fail(&mut self, index: usize, now: Instant, ring: &mut Ring) {
        match self.launch(index, now) {
            Ok(()) => tell(ring, &self.members[index].spec.name, "started"),
            Err(CannotRun { code, reason }) => self.fail(index, code, &reason, ring),
        }
    }

    /// It will never start, so the machine is not what was asked for: all end, and its own policy says what follows.
    fn fail(&mut self, index: usize, exit_code: i32, why: &str, ring: &mut Ring) {
        let member = &mut self.members[index];
        member.at = At::Stopped;
        tell(ring, &member.spec.name, &format!("cannot start: {why}"));
        let reason = format!("container {} cannot start: {why}", member.spec.name);
        // The code of a dependency that failed says more than ours.
        let before = self.failure.take();
        self.failure = Some(End {
            exit_code: before.as_ref().map_or(exit_code, |end| end.exit_code),
            signal: before.map_or(0, |end| end.signal),
            reason,
        });
        self.stop();
    }

    fn look_after(&mut self, index: usize, now: Instant, ring: &mut Ring) {
        let member = &mut self.members[index];
        for check in &mut member.checks {
            if check.turn(&member.spec, now) {
                let how = if check.passing() == Some(true) {
                    "passes"
                } else {
                    "fails"
                };
                tell(
                    ring,
                    &member.spec.name,
                    &format!("check {} {how}: {}", check.name(), check.state().output),
                );
            }
        }
        if member.checks.iter().any(Check::condemns) {
            tell(ring, &member.spec.name, "is unhealthy and is stopped");
            member.is_condemned = true;
            member.ask_to_stop(now);
        }
    }

    fn stop_in_reverse(&mut self, now: Instant) {
        let needed: Vec<String> = self
            .members
            .iter()
            .filter(|member| member.pid().is_some())
            .flat_map(|member| member.spec.depends_on.iter().map(|wanted| wanted.name.clone()))
            .collect();
        for member in &mut self.members {
            if matches!(member.at, At::Started { .. }) && !needed.contains(&member.spec.name) {
                member.ask_to_stop(now);
            }
        }
    }
}

impl Member {
    fn pid(&self) -> Option<i32> {
        match self.at {
            At::Started { pid } | At::Stopping { pid, .. } => Some(pid),
            _ => None,
        }
    }

    fn wakes_at(&self) -> Option<Instant> {
        match self.at {
            At::Restarting { until } => Some(until),
            At::Stopping { kill_at, .. } => Some(kill_at),
            At::Started { .. } => self.checks.iter().map(Check::wakes_at).min(),
            _ => None,
        }
    }

    fn health(&self) -> ContainerHealth {
        if self.spec.healthchecks.is_empty() || !matches!(self.at, At::Started { .. } | At::Stopping { .. }) {
            ContainerHealth::None
        } else if self.checks.iter().any(|check| check.passing() == Some(false)) {
            ContainerHealth::Unhealthy
        } else if !self.checks.is_empty() && self.checks.iter().all(|check| check.passing() == Some(true)) {
            ContainerHealth::Healthy
        } else {
            ContainerHealth::Starting
        }
    }

    fn meets(&self, condition: Condition) -> Met {
        let is_so = match condition {
            Condition::Started => self.was_started,
            Condition::Healthy => self.health() == ContainerHealth::Healthy,
            Condition::ExitedSuccessfully => self.has_succeeded,
        };
        match (is_so, &self.at) {
            (true, _) => Met::Yes,
            (false, At::Stopped) => Met::Never(match self.exit_code {
                Some(code) => format!("{}, which it depends on, exited with code {code}", self.spec.name),
                None => format!("{}, which it depends on, never started", self.spec.name),
            }),
            _ => Met::NotYet,
        }
    }

    fn ask_to_stop(&mut self, now: Instant) {
        if let At::Started { pid } = self.at {
            send(pid, self.spec.stop_signal);
            self.at = At::Stopping {
                pid,
                kill_at: now + Duration::from_millis(self.spec.stop_grace_ms),
            };
        }
    }

    /// The pause before it is started again; None when it stays as it is.
    fn after_exit(&mut self, exit_code: i32, stopping: bool) -> Option<Duration> {
        let failed = exit_code != 0 || self.is_condemned;
        let now = Instant::now();
        self.restarts.retain(|&at| now.duration_since(at) < WINDOW);
        let recent = u32::try_from(self.restarts.len()).unwrap_or(u32::MAX);
        let stays = match self.spec.restart {
            _ if stopping => true,
            RestartPolicy::No => true,
            RestartPolicy::OnFailure => !failed || recent >= self.spec.max_retries,
            RestartPolicy::Always => false,
        };
        if stays {
            return None;
        }
        self.restarts.push(now);
        self.restarted += 1;
        Some((FIRST_DELAY * 2_u32.saturating_pow(recent.min(16))).min(MOST_DELAY))
    }

    fn state(&self) -> ContainerState {
        ContainerState {
            name: self.spec.name.clone(),
            state: match self.at {
                At::Pending => ContainerPhase::Pending,
                At::Started { .. } => ContainerPhase::Started,
                At::Stopping { .. } => ContainerPhase::Stopping,
                At::Restarting { .. } => ContainerPhase::Restarting,
                At::Stopped => ContainerPhase::Stopped,
            },
            health: self.health(),
            pid: self.pid().unwrap_or(0),
            exit_code: self.exit_code,
            restarts: self.restarted,
            checks: self.checks.iter().map(Check::state).collect(),
        }
    }
}

/// For the owner, among the container's own words.
fn tell(ring: &mut Ring, name: &str, what: &str) {
    ring.append(
        unix_ns(),
        Stream::Stderr,
        format!("pantala-init: container {name} {what}").as_bytes(),
    );
}
