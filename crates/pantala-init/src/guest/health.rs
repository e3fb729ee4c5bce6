//! Health checks of a container. Each question is a process of its own, so that none holds up PID 1: a command in the
//! container's root, or this program (`probe`) for a port.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use nix::poll::PollFd;
use pantala_wire::guest::{CheckState, Exec, GuestContainer, GuestHealthcheck};

use super::command::CannotRun;
use super::exec::{self, Run};
use super::roots::Entered;

/// Asked in quick succession until a check passes for the first time: others wait for it.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const OUTPUT_BYTES_MAX: usize = 500;

pub struct Check {
    spec: GuestHealthcheck,
    run: Option<Run>,
    next_at: Instant,
    pause: Duration,
    /// Failures before it do not count; afterwards each counts at most once an interval.
    counts_from: Instant,
    successes: u32,
    failures: u32,
    passing: Option<bool>,
    output: String,
}

impl Check {
    pub fn new(spec: &GuestHealthcheck, now: Instant) -> Self {
        let grace = Duration::from_millis(spec.grace_ms);
        Check {
            next_at: now,
            pause: FIRST_PAUSE,
            counts_from: now + grace.max(interval(spec)),
            run: None,
            successes: 0,
            failures: 0,
            passing: None,
            output: "waiting for the first check".to_owned(),
            spec: spec.clone(),
        }
    }

    /// None: not known yet.
    pub fn passing(&self) -> Option<bool> {
        self.passing
    }

    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Its container is to be stopped.
    pub fn condemns(&self) -> bool {
        self.spec.stops && self.passing == Some(false)
    }

    pub fn state(&self) -> CheckState {
        CheckState {
            name: self.spec.name.clone(),
            kind: self.spec.kind.clone(),
            passing: self.passing == Some(true),
            output: self.output.clone(),
        }
    }

    pub fn poll_fds(&self) -> impl Iterator<Item = PollFd<'_>> {
        self.run.iter().flat_map(Run::poll_fds)
    }

    pub fn wakes_at(&self) -> Instant {
        self.run.as_ref().map_or(self.next_at, Run::wakes_at)
    }

    pub fn pump(&mut self) {
        if let Some(run) = &mut self.run {
            run.pump();
        }
    }

    pub fn ended(&mut self, pid: i32, exit_code: i32, signal: i32) -> bool {
        let Some(run) = self.run.as_mut().filter(|run| run.pid == pid) else {
            return false;
        };
        run.ended(exit_code, signal);
        true
    }

    /// Take an answer that is there, ask again when it is time. True when what is known has changed.
    pub fn turn(&mut self, container: &GuestContainer, now: Instant) -> bool {
        let before = self.passing;
        if let Some(finished) = self.run.as_mut().and_then(Run::finished) {
            let said = String::from_utf8_lossy(&[finished.stdout, finished.stderr].concat())
                .trim()
                .to_owned();
            let (good, output) = match (finished.timed_out, finished.exit_code) {
                (true, _) => (false, format!("no answer within {} ms", self.spec.timeout_ms)),
                (_, 0) => (true, said),
                (_, code) if said.is_empty() => (false, format!("exit code {code}")),
                _ => (false, said),
            };
            self.run = None;
            self.learn(good, output, now);
        } else if self.run.is_none() && now >= self.next_at {
            match self.ask(container) {
                Ok(run) => self.run = Some(run),
                Err(CannotRun { reason, .. }) => self.learn(false, reason, now),
            }
        }
        before != self.passing
    }

    fn ask(&self, container: &GuestContainer) -> Result<Run, CannotRun> {
        let exec = |argv: Vec<String>, user: &str| Exec {
            machine: false,
            argv,
            env: BTreeMap::new(),
            user: user.to_owned(),
            cwd: String::new(),
            stdin_base64: String::new(),
            container: String::new(),
            timeout_ms: self.spec.timeout_ms,
            output_bytes_max: OUTPUT_BYTES_MAX,
        };
        if self.spec.argv.is_empty() {
            return exec::begin(&exec(crate::probe::arguments(&self.spec), ""), &BTreeMap::new(), "/", 0);
        }
        let refuse = |error| {
            CannotRun::new(
                126,
                format!("the root of {} cannot be entered: {error}", container.name),
            )
        };
        let _inside = Entered::enter(&container.root).map_err(refuse)?;
        let asked = exec(self.spec.argv.clone(), &container.user);
        exec::begin(&asked, &container.env, &container.cwd, 0)
    }

    fn learn(&mut self, good: bool, output: String, now: Instant) {
        self.output = output;
        if good {
            self.failures = 0;
            self.successes += 1;
            if self.successes >= self.spec.success_threshold {
                self.passing = Some(true);
            }
        } else {
            self.successes = 0;
            if now >= self.counts_from {
                self.counts_from = now + interval(&self.spec);
                self.failures += 1;
                if self.failures >= self.spec.failure_threshold {
                    self.passing = Some(false);
                }
            }
        }
        let settled = interval(&self.spec);
        if self.passing == Some(true) {
            self.pause = settled;
        } else {
            self.pause = (self.pause * 3 / 2).min(settled);
        }
        self.next_at = now + self.pause;
    }
}

impl Drop for Check {
    /// Its container ended, and with it the question.
    fn drop(&mut self) {
        if let Some(run) = &self.run {
            run.kill();
        }
    }
}

fn interval(spec: &GuestHealthcheck) -> Duration {
    Duration::from_millis(spec.interval_ms.max(1))
}
