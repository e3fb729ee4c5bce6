//! Phase 5: a slot on a machine. The decision is `pantala_route::choose`; here it is carried out: a wake is joined, a place
//! in the queue taken, a change of the view awaited, each within its deadline.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::StatusCode;
use pantala_route::choose::{Choice, Failure, Knowledge, Reach, choose};
use pantala_route::line::{Condition, in_turn};
use pantala_route::prefer::Wishes;
use pantala_route::snapshot::{App, Machine, Target};
use pantala_route::turn::{Attempt, Reason, turn};
use tokio::time::{Instant, timeout_at};

use crate::handover::asking::Lent;
use crate::handover::message::Want;
use crate::mesh::Mesh;
use crate::mesh::guests::Guest;
use crate::mesh::wire::{Call, HOPS_MAX};
use crate::queue::Place;
use crate::respond::Refusal;
use crate::room::Inside;
use crate::shared::Shared;
use crate::slot::Slot;
use crate::timing::Waited;

/// How long an app may refuse connections while its machine counts as running.
pub const REFUSING_MAX: Duration = Duration::from_secs(5);
const PAUSE_FIRST: Duration = Duration::from_millis(10);
/// What is left of a deadline goes to another host in such steps, so that one call reads like the next.
const LEFT_STEP_MS: u64 = 10;

pub const ADVICE: &str = "Try again in a moment. If you run this app: look at its machines and logs.";

/// Whose request it is, and so how far one may go for it.
pub enum Scope {
    /// of a client of this edge: any machine of the app
    Client,
    /// of another host's edge: this machine, or when it may queue any of the app on this host, else retry elsewhere
    Peer {
        node: Arc<str>,
        machine: Arc<str>,
        attempt: Attempt,
        only: bool,
    },
}

/// What one request learnt on its way through the machines.
pub struct Selection {
    pub shared: Arc<Shared>,
    pub app: Arc<str>,
    pub port: u16,
    pub scope: Scope,
    pub wishes: Wishes,
    /// rather ask elsewhere than wait: where a remembered replay led
    pub impatient: bool,
    /// tries at machines so far, and those that ended with the app gone
    pub attempts: u32,
    pub deaths: u32,
    /// the machine that the client prefers and does not get
    pub unavailable: Option<String>,
    pub tried: Vec<Arc<str>>,
    /// machines of other hosts that sleep although their rows say otherwise
    pub asleep: Vec<Arc<str>>,
    /// those that were at their limit, and so run although their rows may say otherwise
    pub full: Vec<Arc<str>>,
    pub wakes_joined: u32,
    pub pause: Duration,
    /// One end for everything that precedes the request's first byte on a machine: wakes, retries, states that pass.
    pub reach_by: Instant,
    pub queue_by: Option<Instant>,
    pub refusing_by: Option<Instant>,
    pub last_failure: Option<Refusal>,
    pub waited: Waited,
    /// from its first wait to its slot
    pub inside: Option<Inside>,
    /// for the other host, when there is no slot
    pub reason: Reason,
}

impl Knowledge for Selection {
    fn tried(&self, machine: &Machine) -> bool {
        self.tried.contains(&machine.id)
    }

    fn waking(&self, machine: &Machine) -> bool {
        let there = |mesh: &Arc<Mesh>| !machine.local && mesh.wakes(&machine.id);
        self.shared.wakes.under_way(&machine.id) || self.shared.mesh.as_ref().is_some_and(there)
    }

    fn runs(&self, machine: &Machine) -> bool {
        !machine.local && self.full.contains(&machine.id)
    }

    fn reach(&self, machine: &Machine) -> Reach {
        match (&self.scope, &self.shared.mesh) {
            _ if machine.local => Reach::Here,
            (Scope::Client, Some(mesh)) => mesh.peers.reach(&machine.node),
            _ => Reach::Never,
        }
    }

    fn distance(&self, region: &str) -> u32 {
        match &self.shared.mesh {
            _ if region == self.shared.settings.wire.region => 0,
            Some(mesh) => mesh.peers.distance(region),
            None => u32::MAX,
        }
    }

    fn now_ms(&self) -> u64 {
        self.shared.elapsed_ms()
    }
}

impl Selection {
    pub fn new(shared: &Arc<Shared>, app: &Arc<str>, port: u16, now: Instant) -> Selection {
        let limit = Duration::from_millis(shared.settings.wire.wake_timeout_ms);
        Selection::of(shared, app.clone(), port, Scope::Client, now + limit)
    }

    pub fn of_peer(shared: &Arc<Shared>, node: &Arc<str>, call: &Call) -> Selection {
        let scope = Scope::Peer {
            node: node.clone(),
            machine: call.machine.clone(),
            attempt: call.attempt,
            only: call.only,
        };
        let limit = Duration::from_millis(call.deadline_ms.min(shared.settings.wire.wake_timeout_ms));
        Selection::of(shared, call.app.clone(), call.port, scope, Instant::now() + limit)
    }

    /// Of the process that this one replaces: like another host's edge.
    pub fn of_process(shared: &Arc<Shared>, want: &Want) -> Selection {
        let scope = Scope::Peer {
            node: shared.settings.wire.node.as_str().into(),
            machine: want.machine.as_str().into(),
            attempt: if want.queue { Attempt::Queue } else { Attempt::Take },
            only: want.only,
        };
        let limit = Duration::from_millis(want.deadline_ms.min(shared.settings.wire.wake_timeout_ms));
        Selection::of(
            shared,
            want.app.as_str().into(),
            want.port,
            scope,
            Instant::now() + limit,
        )
    }

    fn of(shared: &Arc<Shared>, app: Arc<str>, port: u16, scope: Scope, reach_by: Instant) -> Selection {
        Selection {
            shared: shared.clone(),
            app,
            port,
            scope,
            wishes: Wishes::default(),
            impatient: false,
            attempts: 0,
            deaths: 0,
            unavailable: None,
            tried: Vec::new(),
            asleep: Vec::new(),
            full: Vec::new(),
            wakes_joined: 0,
            pause: PAUSE_FIRST,
            reach_by,
            queue_by: None,
            refusing_by: None,
            last_failure: None,
            waited: Waited::default(),
            inside: None,
            reason: Reason::Late,
        }
    }

    pub fn shared(&self) -> Arc<Shared> {
        self.shared.clone()
    }

    /// The machine did not take the request; another one may.
    pub fn failed(&mut self, machine: &Arc<str>, why: Refusal) {
        self.tried.push(machine.clone());
        self.refusing_by.get_or_insert_with(|| Instant::now() + REFUSING_MAX);
        self.last_failure = Some(why);
    }

    /// The host of the machine refused, or was not reached; fails when there is nobody else to ask.
    pub fn turned(
        &mut self,
        machine: &Machine,
        attempt: Attempt,
        reason: Option<Reason>,
        why: Refusal,
    ) -> Result<(), Refusal> {
        match reason {
            Some(Reason::Full | Reason::Late) if attempt == Attempt::Queue => return Err(why),
            // Its load is known now, which says more than that it was tried.
            Some(Reason::Full) => {
                if !self.full.contains(&machine.id) {
                    self.full.push(machine.id.clone());
                }
                self.last_failure = Some(why);
                return Ok(());
            }
            Some(Reason::Asleep) => self.asleep.push(machine.id.clone()),
            Some(Reason::Wake) => self.shared.wakes.refused(&machine.id),
            _ => {}
        }
        self.failed(&machine.id, why);
        Ok(())
    }

    /// How the machine's host is asked for the slot.
    pub fn call(&self, slot: &Slot, client: Option<SocketAddr>) -> Call {
        let by = match slot.attempt {
            Attempt::Queue => self.queue_by.unwrap_or(self.reach_by),
            _ => self.reach_by,
        };
        Call {
            app: self.app.clone(),
            machine: slot.target.machine.id.clone(),
            port: self.port,
            attempt: slot.attempt,
            only: self.wishes.conditions(),
            deadline_ms: (by.saturating_duration_since(Instant::now()).as_millis() as u64)
                .next_multiple_of(LEFT_STEP_MS),
            client,
            hops: HOPS_MAX,
        }
    }

    /// The machine that another host's edge names, as this host knows it.
    pub fn asked_for(&self) -> Option<Arc<Machine>> {
        let Scope::Peer { machine, .. } = &self.scope else {
            return None;
        };
        let view = self.shared.view();
        let app = view.snapshot.apps.get(&self.app)?;
        pantala_route::choose::machine(app, machine).cloned()
    }

    pub fn unmeshed(&self) -> Refusal {
        self.refuse("PU03", "This host has no way to other hosts.")
    }

    /// Each wait inside has a deadline of its own and a better reason; a machine that comes and goes for ever outlives them.
    pub async fn slot(&mut self) -> Result<Slot, Refusal> {
        let by = self.reach_by;
        let found = match Instant::now() < by {
            true => timeout_at(by, self.search()).await.ok(),
            false => None,
        };
        self.inside = None;
        let found = found.unwrap_or_else(|| {
            let unready = self
                .refuse("PM03", "No machine of the app became ready in time.")
                .retry_after(2);
            Err(self.last_failure.take().unwrap_or(unready))
        });
        found.map_err(|refusal| refusal.after(self.waited))
    }

    /// The view is asked anew at each turn, because every wait may have changed it.
    async fn search(&mut self) -> Result<Slot, Refusal> {
        let shared = self.shared.clone();
        let mut place: Option<Place> = None;
        loop {
            let view = shared.view();
            let app = view.snapshot.apps.get(&self.app).cloned();
            let app = app.ok_or_else(|| self.refuse("PR01", "The app is gone."))?;
            let Some(offer) = app.offer(self.port) else {
                self.reason = Reason::Unknown;
                return Err(self.refuse("PR01", "The app no longer serves this port."));
            };
            place.iter_mut().for_each(Place::heed);
            let asks = shared.asking.asks();
            // There is the line, too.
            let before = match asks {
                true => Vec::new(),
                false => shared.queues.before(&self.app, place.as_ref()),
            };
            let now_ms = self.now_ms();
            let choice = in_turn(&app, self.port, &offer.targets, &before, now_ms, |some| {
                self.choose(some)
            })?;
            if let Some(refusal) = self.elsewhere(choice.as_ref(), &app) {
                return Err(refusal);
            }
            if self.impatient && !matches!(choice, Some(Choice::Use(_) | Choice::Wake(..) | Choice::Fail(_))) {
                return Err(self.refuse("PR04", "No machine of the app can take the request at once."));
            }
            let Some(choice) = choice else {
                self.stand(&shared, &mut place).await?;
                continue;
            };
            match choice {
                Choice::Use(target) => {
                    if let Some(slot) = self.take(target).await? {
                        return Ok(slot);
                    }
                }
                Choice::Wake(target, meanwhile) => {
                    place = None; // those behind must not wait for a wake that is not theirs
                    if let Some(slot) = self.awaken(target, meanwhile, view.seq).await? {
                        return Ok(slot);
                    }
                }
                Choice::Queue(target) if target.machine.local && asks => {
                    if let Some(slot) = self.ask(target, Attempt::Queue, place.take()).await? {
                        return Ok(slot);
                    }
                }
                Choice::Queue(target) if target.machine.local => self.stand(&shared, &mut place).await?,
                Choice::Queue(target) => {
                    self.queued();
                    if let Some(slot) = self.propose(target, Attempt::Queue) {
                        return Ok(slot);
                    }
                }
                Choice::Wait(why) => {
                    place = None;
                    self.change(why, view.seq, &app).await?;
                }
                Choice::Exhausted => {
                    place = None; // it may use others afterwards
                    self.breathe(view.seq).await?;
                }
                Choice::Fail(failure) => return Err(self.fail(failure)),
            }
        }
    }

    pub fn with_wishes(self, wishes: Wishes) -> Selection {
        Selection { wishes, ..self }
    }

    /// No machine but the one that is asked for.
    pub fn alone(&self) -> bool {
        match &self.scope {
            Scope::Client => self.wishes.conditions(),
            Scope::Peer { attempt, only, .. } => *only || *attempt != Attempt::Queue,
        }
    }

    /// For its place in line.
    pub fn condition(&self) -> Condition {
        let (here, only) = match &self.scope {
            Scope::Client => (false, None),
            Scope::Peer { machine, only, .. } => (true, only.then(|| machine.clone())),
        };
        Condition {
            port: self.port,
            here,
            only,
            wishes: self.wishes.demands(),
            tried: self.tried.clone(),
        }
    }

    fn choose(&mut self, targets: &[Target]) -> Result<Choice, Refusal> {
        if let Scope::Peer {
            machine, attempt, only, ..
        } = &self.scope
        {
            let any = *attempt == Attempt::Queue && !only;
            let fit = |target: &&Target| target.machine.local && (any || target.machine.id == *machine);
            let here: Vec<Target> = targets.iter().filter(fit).cloned().collect();
            return Ok(choose(&here, self));
        }
        if !self.wishes.any() {
            return Ok(choose(targets, self));
        }
        let wished = self.wishes.choose(targets, self);
        self.unavailable = wished.unavailable;
        wished
            .choice
            .ok_or_else(|| self.refuse("PR01", "The app has no machine where the request demands one."))
    }

    /// What the edge of another host is told instead of waiting here.
    fn elsewhere(&mut self, choice: Option<&Choice>, app: &App) -> Option<Refusal> {
        let Scope::Peer { machine, attempt, .. } = &self.scope else {
            return None;
        };
        let known = pantala_route::choose::machine(app, machine).filter(|machine| machine.local);
        let waking = |target: &Target| self.waking(&target.machine);
        let (reason, happened) = turn(choice, *attempt, known.map(|known| &**known), waking)?;
        self.reason = reason;
        let code = match reason {
            Reason::Full => "PR04",
            Reason::Asleep => "PM11",
            _ => "PR01",
        };
        let refusal = self
            .refuse(code, happened)
            .of_machine(known.map_or("", |machine| &machine.id));
        Some(self.last_failure.take().unwrap_or(refusal))
    }

    pub async fn take(&mut self, target: Target) -> Result<Option<Slot>, Refusal> {
        if !target.machine.local {
            let asleep = self.asleep.contains(&target.machine.id);
            return Ok(self.propose(target, if asleep { Attempt::Wake } else { Attempt::Take }));
        }
        if self.shared.asking.asks() {
            return self.ask(target, Attempt::Take, None).await;
        }
        let guest = self.guest(&target.machine);
        let taken = target.machine.gauge.acquire(target.service.hard);
        Ok(taken.then(|| Slot::new(&self.shared, target, Attempt::Take, guest)))
    }

    pub fn local(&self, target: Target, lent: Lent) -> Slot {
        let guest = self.guest(&target.machine);
        Slot::of_lent(&self.shared, target, lent, guest)
    }

    /// Its host has the last word on its limit; what this edge has in flight there counts here all the same.
    pub fn propose(&self, target: Target, attempt: Attempt) -> Option<Slot> {
        let taken = target.machine.gauge.propose();
        taken.then(|| Slot::new(&self.shared, target, attempt, None))
    }

    fn guest(&self, machine: &Machine) -> Option<Guest> {
        match (&self.scope, &self.shared.mesh) {
            (Scope::Peer { node, .. }, Some(mesh)) => Some(mesh.guests.enter(&machine.id, node)),
            _ => None,
        }
    }

    fn fail(&mut self, failure: Failure) -> Refusal {
        if let Some(known) = self.last_failure.take() {
            return known;
        }
        let code = match failure {
            Failure::Unstartable => "PM08",
            Failure::Elsewhere => "PU03",
            _ => "PR01",
        };
        let mut happened = failure.reason().to_owned();
        happened[..1].make_ascii_uppercase();
        self.refuse(code, happened + ".")
    }

    pub fn refuse(&self, code: &'static str, happened: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, code, happened, ADVICE).of_app(&self.app)
    }
}
