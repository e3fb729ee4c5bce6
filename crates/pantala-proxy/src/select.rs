//! Phase 5: a slot on a machine. The decision is `pantala_route::choose`; here it is carried out: a wake is joined, a place
//! in the queue taken, a change of the view awaited, each within its deadline.

use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::StatusCode;
use pantala_route::choose::{Choice, Failure, Knowledge, Reach, Waiting, choose};
use pantala_route::gauge::UNLIMITED;
use pantala_route::matching::Matched;
use pantala_route::prefer::Wishes;
use pantala_route::snapshot::{App, Machine, Target};
use pantala_route::turn::{Attempt, Reason, turn};
use pantala_wire::feed::WakeResult;
use tokio::time::{Instant, timeout_at};

use crate::mesh::Mesh;
use crate::mesh::guests::Guest;
use crate::mesh::wire::{Call, HOPS_MAX};
use crate::respond::Refusal;
use crate::shared::{Command, Shared, View};
use crate::slot::Slot;

/// How long an app may refuse connections while its machine counts as running.
const REFUSING_MAX: Duration = Duration::from_secs(5);
/// A refused wake may only mean that our view is older than the agent's.
const NEWER_VIEW_MAX: Duration = Duration::from_secs(2);
/// Wakes that one request waits for.
const WAKES_MAX: u32 = 20;
/// How often the first in line asks whether another host has room.
const LOOK_ABROAD: Duration = Duration::from_millis(250);
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(250);

pub const ADVICE: &str = "Try again in a moment. If you run this app: look at its machines and logs.";

/// Whose request it is, and so how far one may go for it.
enum Scope {
    /// of a client of this edge: any machine of the app
    Client { local: IpAddr, host: String },
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
    shared: Arc<Shared>,
    app: Arc<str>,
    port: u16,
    scope: Scope,
    wishes: Wishes,
    /// the machine that the client prefers and does not get
    pub unavailable: Option<String>,
    tried: Vec<Arc<str>>,
    /// machines of other hosts that sleep although their rows say otherwise
    asleep: Vec<Arc<str>>,
    wakes_joined: u32,
    pause: Duration,
    /// One end for everything that precedes the request's first byte on a machine: wakes, retries, states that pass.
    pub reach_by: Instant,
    queue_by: Option<Instant>,
    refusing_by: Option<Instant>,
    last_failure: Option<Refusal>,
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

    fn reach(&self, machine: &Machine) -> Reach {
        match (&self.scope, &self.shared.mesh) {
            _ if machine.local => Reach::Here,
            (Scope::Client { .. }, Some(mesh)) => mesh.peers.reach(&machine.node),
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
    pub fn new(shared: &Arc<Shared>, app: &Arc<str>, local: IpAddr, port: u16, host: &str) -> Selection {
        let scope = Scope::Client {
            local,
            host: host.to_owned(),
        };
        let limit = Duration::from_millis(shared.settings.wire.wake_timeout_ms);
        Selection::of(shared, app.clone(), port, scope, limit)
    }

    pub fn of_peer(shared: &Arc<Shared>, node: &Arc<str>, call: &Call) -> Selection {
        let scope = Scope::Peer {
            node: node.clone(),
            machine: call.machine.as_str().into(),
            attempt: call.attempt,
            only: call.only,
        };
        let limit = Duration::from_millis(call.deadline_ms.min(shared.settings.wire.wake_timeout_ms));
        Selection::of(shared, call.app.as_str().into(), call.port, scope, limit)
    }

    fn of(shared: &Arc<Shared>, app: Arc<str>, port: u16, scope: Scope, limit: Duration) -> Selection {
        Selection {
            shared: shared.clone(),
            app,
            port,
            scope,
            wishes: Wishes::default(),
            unavailable: None,
            tried: Vec::new(),
            asleep: Vec::new(),
            wakes_joined: 0,
            pause: PAUSE_FIRST,
            reach_by: Instant::now() + limit,
            queue_by: None,
            refusing_by: None,
            last_failure: None,
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
    pub fn call(&self, slot: &Slot, client: SocketAddr) -> Call {
        let by = match slot.attempt {
            Attempt::Queue => self.queue_by.unwrap_or(self.reach_by),
            _ => self.reach_by,
        };
        Call {
            app: self.app.to_string(),
            machine: slot.target.machine.id.to_string(),
            port: self.port,
            attempt: slot.attempt,
            only: self.wishes.force_instance.is_some(),
            deadline_ms: by.saturating_duration_since(Instant::now()).as_millis() as u64,
            client,
            hops: HOPS_MAX,
        }
    }

    pub fn unmeshed(&self) -> Refusal {
        self.refuse("PU03", "This host has no way to other hosts.")
    }

    /// Each wait inside has a deadline of its own and a better reason; a machine that comes and goes for ever outlives them.
    pub async fn slot(&mut self) -> Result<Slot, Refusal> {
        let by = self.reach_by;
        if Instant::now() < by
            && let Ok(found) = timeout_at(by, self.search()).await
        {
            return found;
        }
        let unready = self
            .refuse("PM03", "No machine of the app became ready in time.")
            .retry_after(2);
        Err(self.last_failure.take().unwrap_or(unready))
    }

    /// The view is asked anew at each turn, because every wait may have changed it.
    async fn search(&mut self) -> Result<Slot, Refusal> {
        let shared = self.shared.clone();
        let mut place = None;
        loop {
            let view = shared.view();
            let app = self.app(&view).ok_or_else(|| self.refuse("PR01", "The app is gone."))?;
            let Some(offer) = app.offer(self.port) else {
                self.reason = Reason::Unknown;
                return Err(self.refuse("PR01", "The app no longer serves this port."));
            };
            let in_turn = match &place {
                None => !shared.queues.waits(&self.app),
                Some(place) => crate::queue::Place::first(place),
            };
            let choice = if in_turn {
                Some(self.choose(&offer.targets)?)
            } else {
                None
            };
            if let Some(refusal) = self.elsewhere(choice.as_ref(), &app) {
                return Err(refusal);
            }
            let Some(choice) = choice else {
                self.stand(&shared, &mut place).await?;
                continue;
            };
            match choice {
                Choice::Use(target) => {
                    if let Some(slot) = self.take(target) {
                        return Ok(slot);
                    }
                }
                Choice::Wake(target, meanwhile) => {
                    place = None; // those behind must not wait for a wake that is not theirs
                    if let Some(slot) = self.awaken(target, meanwhile, view.seq).await? {
                        return Ok(slot);
                    }
                }
                Choice::Queue(target) if target.machine.local => self.stand(&shared, &mut place).await?,
                Choice::Queue(target) => {
                    let limit = Duration::from_millis(shared.settings.wire.queue_timeout_ms);
                    self.queue_by.get_or_insert_with(|| Instant::now() + limit);
                    shared.metrics.queued.fetch_add(1, Relaxed);
                    if let Some(slot) = self.propose(target, Attempt::Queue) {
                        return Ok(slot);
                    }
                }
                Choice::Wait(why) => {
                    place = None;
                    self.change(why, view.seq, &app).await?;
                }
                Choice::Exhausted => self.breathe(view.seq).await?,
                Choice::Fail(failure) => return Err(self.fail(failure)),
            }
        }
    }

    pub fn with_wishes(self, wishes: Wishes) -> Selection {
        Selection { wishes, ..self }
    }

    fn app(&self, view: &View) -> Option<Arc<App>> {
        match &self.scope {
            Scope::Peer { .. } => view.snapshot.apps.get(&self.app).cloned(),
            Scope::Client { local, host } => match view.snapshot.find(*local, Some(host)) {
                Matched::App(app) => Some(app),
                _ => None,
            },
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
        let code = if reason == Reason::Full { "PR04" } else { "PR01" };
        let refusal = self
            .refuse(code, happened)
            .of_machine(known.map_or("", |machine| &machine.id));
        Some(self.last_failure.take().unwrap_or(refusal))
    }

    fn take(&mut self, target: Target) -> Option<Slot> {
        if target.machine.local {
            let guest = self.guest(&target.machine);
            let taken = target.machine.gauge.acquire(target.service.hard);
            return taken.then(|| Slot::new(&self.shared, target, Attempt::Take, guest));
        }
        let asleep = self.asleep.contains(&target.machine.id);
        self.propose(target, if asleep { Attempt::Wake } else { Attempt::Take })
    }

    /// Its host has the last word on its limit; what this edge has in flight there counts here all the same.
    fn propose(&self, target: Target, attempt: Attempt) -> Option<Slot> {
        let taken = target.machine.gauge.acquire(UNLIMITED);
        taken.then(|| Slot::new(&self.shared, target, attempt, None))
    }

    fn guest(&self, machine: &Machine) -> Option<Guest> {
        match (&self.scope, &self.shared.mesh) {
            (Scope::Peer { node, .. }, Some(mesh)) => Some(mesh.guests.enter(&machine.id, node)),
            _ => None,
        }
    }

    /// A machine of this host is woken through its agent; one of another host by the proxy there, where the request waits.
    async fn awaken(&mut self, target: Target, meanwhile: Option<Target>, seq: u64) -> Result<Option<Slot>, Refusal> {
        if target.machine.local {
            let usable = self.wake(target, meanwhile, seq).await?;
            return Ok(usable.and_then(|target| self.take(target)));
        }
        Ok(match meanwhile {
            Some(target_meanwhile) if self.shared.wakes.refused_lately(&target.machine.id) => {
                self.take(target_meanwhile)
            }
            _ => self.propose(target, Attempt::Wake),
        })
    }

    /// Answers with a machine to use at once if the wake failed and one can help out.
    async fn wake(&mut self, target: Target, meanwhile: Option<Target>, seq: u64) -> Result<Option<Target>, Refusal> {
        if meanwhile.is_some() && self.shared.wakes.refused_lately(&target.machine.id) {
            return Ok(meanwhile);
        }
        self.reason = Reason::Wake;
        let (mut outcome, began) = self.shared.wakes.join(&target.machine.id);
        if began {
            self.shared.metrics.wakes.fetch_add(1, Relaxed);
            // A full channel is no loss: the control thread looks for unsent wakes with every tick.
            let _ = self.shared.commands.try_send(Command::Wake);
        }
        let waited = timeout_at(self.reach_by, outcome.wait_for(Option::is_some)).await;
        let result = match waited {
            Ok(Ok(result)) => result.clone(),
            _ => {
                return Err(self
                    .refuse("PM03", "The machine did not become ready in time.")
                    .of_machine(&target.machine.id));
            }
        };
        self.wakes_joined += 1;
        match result {
            Some(result) if !result.ok => self.wake_refused(&target.machine, &result, meanwhile, seq).await,
            _ if self.wakes_joined >= WAKES_MAX => Err(self.refuse("PM09", "The machine does not stay awake.")),
            _ => Ok(None),
        }
    }

    async fn wake_refused(
        &mut self,
        machine: &Machine,
        result: &WakeResult,
        meanwhile: Option<Target>,
        seq: u64,
    ) -> Result<Option<Target>, Refusal> {
        let happened = format!(
            "The machine could not be started: {}.",
            result.reason.trim_end_matches('.')
        );
        let why = self.refuse(known_code(&result.code), happened).of_machine(&machine.id);
        if meanwhile.is_some() {
            return Ok(meanwhile);
        }
        if self.wakes_joined >= WAKES_MAX {
            return Err(why);
        }
        if result.elsewhere {
            self.tried.push(machine.id.clone());
            self.last_failure = Some(why);
            return Ok(None);
        }
        let newer = tokio::time::timeout(NEWER_VIEW_MAX, self.shared.newer_than(seq));
        let stale = matches!(why.code, "PM07" | "PM08" | "PM10" | "PM11");
        if stale && newer.await.is_ok() {
            Ok(None)
        } else {
            Err(why)
        }
    }

    /// A place in line, or in the next turn the wait there.
    async fn stand<'a>(
        &mut self,
        shared: &'a Shared,
        place: &mut Option<crate::queue::Place<'a>>,
    ) -> Result<(), Refusal> {
        self.reason = Reason::Full;
        match place {
            None => *place = Some(self.queue(shared)?),
            Some(place) => self.called(place.called()).await?,
        }
        Ok(())
    }

    fn queue<'a>(&mut self, shared: &'a Shared) -> Result<crate::queue::Place<'a>, Refusal> {
        let limit = Duration::from_millis(shared.settings.wire.queue_timeout_ms);
        self.queue_by.get_or_insert_with(|| Instant::now() + limit);
        shared.metrics.queued.fetch_add(1, Relaxed);
        shared.queues.join(&self.app).map_err(|full| {
            self.refuse(
                "PR04",
                format!("All machines of the app are at their limit and {full}."),
            )
            .retry_after(1)
        })
    }

    async fn called(&mut self, called: impl Future<Output = ()>) -> Result<(), Refusal> {
        let by = self.queue_by.unwrap_or(self.reach_by).min(self.reach_by);
        // Nobody calls when a machine of another host has room again: then it is looked for now and then.
        let look = match (&self.scope, &self.shared.mesh) {
            (Scope::Client { .. }, Some(_)) => by.min(Instant::now() + LOOK_ABROAD),
            _ => by,
        };
        if timeout_at(look, called).await.is_ok() || Instant::now() < by {
            return Ok(());
        }
        let refusal = self.refuse(
            "PR04",
            "All machines of the app stayed at their limit while the request waited.",
        );
        Err(refusal.retry_after(2))
    }

    async fn change(&mut self, why: Waiting, seq: u64, app: &App) -> Result<(), Refusal> {
        let (by, happened) = match why {
            Waiting::Start | Waiting::Change => (self.reach_by, "The app's machine did not become ready in time."),
            Waiting::Away => return self.away(seq).await,
            Waiting::Checks => {
                let limit = Duration::from_millis(self.shared.settings.wire.queue_timeout_ms);
                let by = *self.queue_by.get_or_insert_with(|| Instant::now() + limit);
                (by.min(self.reach_by), "No machine of the app passes its health checks.")
            }
        };
        timeout_at(by, self.shared.newer_than(seq)).await.map_err(|_| {
            let machine = app.machines.first().map_or("", |m| &m.id);
            let unready = self.refuse("PR01", happened).of_machine(machine).retry_after(2);
            self.last_failure.take().unwrap_or(unready)
        })?;
        // What failed before belongs to a view that is gone.
        self.tried.clear();
        self.refusing_by = None;
        Ok(())
    }

    /// The hosts of all machines are silent: like an app that refuses, they are given a few seconds to come back.
    async fn away(&mut self, seq: u64) -> Result<(), Refusal> {
        let by = *self.refusing_by.get_or_insert_with(|| Instant::now() + REFUSING_MAX);
        if timeout_at(by.min(self.reach_by), self.shared.newer_than(seq))
            .await
            .is_ok()
        {
            self.tried.clear();
            return Ok(());
        }
        let silent = self.refuse("PU03", "The hosts of the app's machines do not answer.");
        Err(self.last_failure.take().unwrap_or(silent.retry_after(2)))
    }

    /// All were tried: a short pause, cut short by news, and around again until they have refused for too long.
    async fn breathe(&mut self, seq: u64) -> Result<(), Refusal> {
        let by = self.refusing_by.unwrap_or(self.reach_by);
        if Instant::now() >= by {
            let unknown = self.refuse("PR04", "No machine of the app took the request.");
            return Err(self.last_failure.take().unwrap_or(unknown));
        }
        let pause = (Instant::now() + self.pause).min(by);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        // Either way the machines are asked again.
        let _ = timeout_at(pause, self.shared.newer_than(seq)).await;
        self.tried.clear();
        Ok(())
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

    fn refuse(&self, code: &'static str, happened: impl Into<String>) -> Refusal {
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, code, happened, ADVICE).of_app(&self.app)
    }
}

/// Codes of the agent that may be shown; anything else is the agent's fault.
fn known_code(code: &str) -> &'static str {
    const KNOWN: [&str; 11] = [
        "PM01", "PM02", "PM03", "PM04", "PM05", "PM06", "PM07", "PM08", "PM09", "PM10", "PM11",
    ];
    KNOWN.into_iter().find(|known| *known == code).unwrap_or("PM01")
}
