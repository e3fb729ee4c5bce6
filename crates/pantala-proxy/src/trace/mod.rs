//! What this proxy knows of the requests of the last ten minutes: a record for each try, written when it ended. The moments
//! between which it is measured are taken where a request passes them ([`crate::forward`], [`crate::mesh::serve`]); here
//! they become durations. Looked up by `pantala trace` through the agent ([`crate::control`]), by an operator through
//! [`crate::admin`].

mod record;
mod ring;

use std::rc::Rc;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use pantala_route::snapshot::Machine;
use pantala_wire::feed::TraceRecord;
use tokio::time::Instant;

use self::record::Record;
pub use self::record::{Outcome, Role, Who};
use self::ring::{KEPT_US, Place, Ring};
use crate::forward::Failed;
use crate::ids::{RequestId, Ulid};
use crate::respond::Refusal;
use crate::timing::Waited;

/// The records of all threads.
pub struct Traces {
    started: Instant,
    /// after 1970
    started_us: u64,
    /// one for each worker; none: nothing is kept
    rings: Vec<Arc<Ring>>,
}

impl Traces {
    pub fn new(workers: usize, mib_max: usize) -> Traces {
        let each = (mib_max << 20) / workers.max(1);
        let workers = if mib_max > 0 { workers } else { 0 };
        let since_1970 = SystemTime::now().duration_since(UNIX_EPOCH);
        Traces {
            started: Instant::now(),
            started_us: since_1970.map_or(0, |since| since.as_micros() as u64),
            rings: (0..workers).map(|_| Arc::new(Ring::new(each))).collect(),
        }
    }

    /// For one worker, which writes alone.
    pub fn recorder(&self, worker: usize) -> Option<Rc<Recorder>> {
        let ring = self.rings.get(worker)?.clone();
        let started = self.started;
        Some(Rc::new(Recorder { ring, started }))
    }

    /// The tries of one request in order, and since when (ms after 1970) none is missing.
    pub fn find(&self, id: Ulid) -> (u64, Vec<TraceRecord>) {
        let since_us = self.since_us();
        let mut found: Vec<Record> = self.rings.iter().flat_map(|ring| ring.find(id)).collect();
        found.retain(|record| record.at_us() >= since_us);
        found.sort_by_key(Record::at_us);
        let shown = found.iter().map(|record| record.shown(self.started_us)).collect();
        ((self.started_us + since_us) / 1000, shown)
    }

    fn since_us(&self) -> u64 {
        let now_us = micros(self.started, Instant::now());
        let lost_us = self.rings.iter().map(|ring| ring.lost_us()).max();
        match lost_us {
            Some(lost_us) => lost_us.max(now_us.saturating_sub(KEPT_US)),
            None => now_us,
        }
    }

    /// Now and then.
    pub fn tidy(&self) {
        let now_us = micros(self.started, Instant::now());
        self.rings.iter().for_each(|ring| ring.expire(now_us));
    }
}

fn micros(from: Instant, to: Instant) -> u64 {
    to.duration_since(from).as_micros() as u64
}

fn short(from: Instant, to: Instant) -> u32 {
    u32::try_from(to.duration_since(from).as_micros()).unwrap_or(u32::MAX)
}

/// A worker's way to its records.
pub struct Recorder {
    ring: Arc<Ring>,
    started: Instant,
}

/// Which request, and since when it is here.
#[derive(Clone, Copy)]
pub struct Trail {
    pub id: RequestId,
    pub role: Role,
    pub began: Instant,
}

impl Trail {
    pub fn begin(id: RequestId, role: Role) -> Trail {
        let began = Instant::now();
        Trail { id, role, began }
    }

    pub fn refused(&self, recorder: Option<&Rc<Recorder>>, refusal: &Refusal) {
        if recorder.is_some() {
            let who = match &*refusal.app {
                "" => Who::Nobody,
                app => Who::App(app.into()),
            };
            self.end(recorder, who, refusal.status.as_u16(), Some(refusal));
        }
    }

    /// No machine has answered: a redirect, a page of this proxy, the end of all tries.
    pub fn end(&self, recorder: Option<&Rc<Recorder>>, who: Who, status: u16, refusal: Option<&Refusal>) {
        let Some(recorder) = recorder else { return };
        let outcome = refusal.map_or(Outcome::Answered, |_| Outcome::Refused);
        let mut record = Record::new(self.id.ulid, self.role, outcome, who);
        record.began_us = micros(recorder.started, self.began);
        record.from_us = short(self.began, Instant::now());
        record.status = status;
        record.code = refusal.map_or("", |refusal| refusal.code);
        record.waited = refusal
            .and_then(|refusal| refusal.waited.as_deref().copied())
            .unwrap_or_default();
        record.ended(0, false);
        recorder.ring.push(record);
    }
}

/// One request at its present try.
pub struct Span {
    trail: Option<Trail>,
    recorder: Option<Rc<Recorder>>,
    since: Instant,
    chosen: Instant,
    sent: Instant,
    waited: Waited,
    attempt: u8,
    replays: u8,
    reused: bool,
}

impl Span {
    /// Without a trail: a request of which nobody can say the id.
    pub fn new(trail: Option<Trail>, recorder: Option<&Rc<Recorder>>) -> Span {
        let began = trail.map_or_else(Instant::now, |trail| trail.began);
        Span {
            trail,
            recorder: recorder.filter(|_| trail.is_some()).cloned(),
            since: began,
            chosen: began,
            sent: began,
            waited: Waited::default(),
            attempt: 0,
            replays: 0,
            reused: false,
        }
    }

    pub fn id(&self) -> Option<RequestId> {
        self.trail.map(|trail| trail.id)
    }

    /// A machine has a slot, or none will have; `waited` for it by this try alone.
    pub fn chosen(&mut self, waited: Waited) {
        self.chosen = Instant::now();
        (self.sent, self.reused) = (self.chosen, true);
        self.waited = waited;
    }

    /// A moment ago: when a machine was chosen, the last time that the clock was read.
    pub fn now(&self) -> Instant {
        self.chosen
    }

    /// There is a connection.
    pub fn connected(&mut self, reused: bool) {
        if self.recorder.is_some() && !reused {
            (self.sent, self.reused) = (Instant::now(), false);
        }
    }

    /// The app's answer is not for the client.
    pub fn replayed(&mut self) {
        self.replays = self.replays.saturating_add(1);
        self.since = Instant::now();
    }

    /// The head of the answer is here.
    pub fn answered(&mut self, machine: Option<&Arc<Machine>>, status: u16) -> Answering {
        let mut answering = Answering {
            id: self.trail.map(|trail| trail.id),
            kept: None,
        };
        if let Some((record, now)) = self.record(machine, Outcome::Answered)
            && let Some(recorder) = &self.recorder
        {
            let place = recorder.ring.push(Record { status, ..record });
            answering.kept = Some((recorder.clone(), place, now));
        }
        answering
    }

    pub fn failed(&mut self, machine: &Arc<Machine>, failed: &Failed) {
        let outcome = failed.reason.map_or(Outcome::Failed(failed.fault), Outcome::Turned);
        self.turned(Some(machine), outcome, &failed.refusal);
    }

    pub fn turned(&mut self, machine: Option<&Arc<Machine>>, outcome: Outcome, refusal: &Refusal) {
        if let Some((record, now)) = self.record(machine, outcome)
            && let Some(recorder) = &self.recorder
        {
            let (status, code) = (refusal.status.as_u16(), refusal.code);
            recorder.ring.push(Record { status, code, ..record });
            self.since = now;
        }
    }

    fn record(&mut self, machine: Option<&Arc<Machine>>, outcome: Outcome) -> Option<(Record, Instant)> {
        let (trail, recorder) = (self.trail?, self.recorder.as_ref()?);
        let now = Instant::now();
        self.attempt = self.attempt.saturating_add(1);
        let who = machine.map_or(Who::Nobody, |machine| Who::Machine(machine.clone()));
        let mut record = Record::new(trail.id.ulid, trail.role, outcome, who);
        record.began_us = micros(recorder.started, trail.began);
        record.from_us = short(trail.began, self.since);
        record.choose_us = short(self.since, self.chosen);
        record.connect_us = short(self.chosen, self.sent);
        record.answer_us = short(self.sent, now);
        record.waited = self.waited;
        (record.attempt, record.replays, record.reused) = (self.attempt, self.replays, self.reused);
        Some((record, now))
    }
}

/// An answer on its way; when this is dropped it is over.
pub struct Answering {
    pub id: Option<RequestId>,
    kept: Option<(Rc<Recorder>, Place, Instant)>,
}

impl Answering {
    /// `whole`: all of it has come. What is said first holds. Answers with the present moment, which the caller needs too.
    pub fn over(&mut self, whole: bool) -> Instant {
        let now = Instant::now();
        if let Some((recorder, place, head)) = self.kept.take() {
            let body_us = short(head, now);
            recorder.ring.change(place, |record| record.ended(body_us, !whole));
        }
        now
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        if self.kept.is_some() {
            self.over(false);
        }
    }
}
