//! Phase 5: a slot on a machine. The decision is `pantala_route::choose`; here it is carried out: a wake is joined, a place
//! in the queue taken, a change of the view awaited, each within its deadline.

use std::future::Future;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::StatusCode;
use pantala_route::choose::{Choice, Failure, Knowledge, Waiting, choose};
use pantala_route::matching::Matched;
use pantala_route::prefer::Wishes;
use pantala_route::snapshot::{App, Machine, Target};
use pantala_wire::feed::WakeResult;
use tokio::time::{Instant, timeout_at};

use crate::respond::Refusal;
use crate::shared::{Command, Shared};

/// How long an app may refuse connections while its machine counts as running.
const REFUSING_MAX: Duration = Duration::from_secs(5);
/// A refused wake may only mean that our view is older than the agent's.
const NEWER_VIEW_MAX: Duration = Duration::from_secs(2);
/// Wakes that one request waits for.
const WAKES_MAX: u32 = 20;
const PAUSE_FIRST: Duration = Duration::from_millis(10);
const PAUSE_MAX: Duration = Duration::from_millis(250);

/// One request's place on a machine; given back when dropped.
pub struct Slot {
    pub target: Target,
    shared: Arc<Shared>,
}

impl Drop for Slot {
    fn drop(&mut self) {
        let left = self.target.machine.gauge.release(self.shared.elapsed_ms());
        if left.draining && left.in_flight == 0 {
            self.shared.emptied.notify_one();
        }
        self.shared.queues.call(&self.target.machine.app);
    }
}

/// What one request learnt on its way through the machines.
pub struct Selection {
    shared: Arc<Shared>,
    app: Arc<str>,
    port: u16,
    local: IpAddr,
    host: String,
    wishes: Wishes,
    /// the machine that the client prefers and does not get
    pub unavailable: Option<String>,
    tried: Vec<Arc<str>>,
    wakes_joined: u32,
    pause: Duration,
    /// One end for everything that precedes the request's first byte on a machine: wakes, retries, states that pass.
    pub reach_by: Instant,
    queue_by: Option<Instant>,
    refusing_by: Option<Instant>,
    last_failure: Option<Refusal>,
}

impl Knowledge for Selection {
    fn tried(&self, machine: &Machine) -> bool {
        self.tried.contains(&machine.id)
    }

    fn waking(&self, machine: &Machine) -> bool {
        self.shared.wakes.under_way(&machine.id)
    }
}

impl Selection {
    pub fn new(shared: &Arc<Shared>, app: &Arc<str>, local: IpAddr, port: u16, host: &str) -> Selection {
        Selection {
            shared: shared.clone(),
            app: app.clone(),
            port,
            local,
            host: host.to_owned(),
            wishes: Wishes::default(),
            unavailable: None,
            tried: Vec::new(),
            wakes_joined: 0,
            pause: PAUSE_FIRST,
            reach_by: Instant::now() + Duration::from_millis(shared.settings.wire.wake_timeout_ms),
            queue_by: None,
            refusing_by: None,
            last_failure: None,
        }
    }

    /// The machine did not take the request; another one may.
    pub fn failed(&mut self, machine: &Arc<str>, why: Refusal) {
        self.tried.push(machine.clone());
        self.refusing_by.get_or_insert_with(|| Instant::now() + REFUSING_MAX);
        self.last_failure = Some(why);
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
            let app = match view.snapshot.find(self.local, Some(&self.host)) {
                Matched::App(app) => app,
                _ => return Err(self.refuse("PR01", "The app is gone.")),
            };
            let Some(offer) = app.offer(self.port) else {
                return Err(self.refuse("PR01", "The app no longer serves this port."));
            };
            let in_turn = match &place {
                None => !shared.queues.waits(&self.app),
                Some(place) => crate::queue::Place::first(place),
            };
            let choice = if in_turn {
                self.choose(&offer.targets)?
            } else {
                Choice::Queue
            };
            match choice {
                Choice::Use(target) => {
                    if let Some(slot) = self.take(target) {
                        return Ok(slot);
                    }
                }
                Choice::Wake(target, meanwhile) => {
                    place = None; // those behind must not wait for a wake that is not theirs
                    if let Some(target) = self.wake(target, meanwhile, view.seq).await?
                        && let Some(slot) = self.take(target)
                    {
                        return Ok(slot);
                    }
                }
                Choice::Queue => match &place {
                    None => place = Some(self.queue(&shared)?),
                    Some(place) => self.called(place.called()).await?,
                },
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

    fn choose(&mut self, targets: &[Target]) -> Result<Choice, Refusal> {
        if !self.wishes.any() {
            return Ok(choose(targets, self));
        }
        let wished = self.wishes.choose(targets, self);
        self.unavailable = wished.unavailable;
        wished
            .choice
            .ok_or_else(|| self.refuse("PR01", "The app has no machine where the request demands one."))
    }

    fn take(&mut self, target: Target) -> Option<Slot> {
        let taken = target.machine.gauge.acquire(target.service.hard);
        taken.then(|| Slot {
            target,
            shared: self.shared.clone(),
        })
    }

    /// Answers with a machine to use at once if the wake failed and one can help out.
    async fn wake(&mut self, target: Target, meanwhile: Option<Target>, seq: u64) -> Result<Option<Target>, Refusal> {
        if meanwhile.is_some() && self.shared.wakes.refused_lately(&target.machine.id) {
            return Ok(meanwhile);
        }
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
        let by = self.queue_by.unwrap_or(self.reach_by);
        timeout_at(by, called).await.map_err(|_| {
            self.refuse(
                "PR04",
                "All machines of the app stayed at their limit while the request waited.",
            )
            .retry_after(2)
        })
    }

    async fn change(&mut self, why: Waiting, seq: u64, app: &App) -> Result<(), Refusal> {
        let (by, happened) = match why {
            Waiting::Change => (self.reach_by, "The app's machine did not become ready in time."),
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
        let code = if failure == Failure::Unstartable {
            "PM08"
        } else {
            "PR01"
        };
        let mut happened = failure.reason().to_owned();
        happened[..1].make_ascii_uppercase();
        self.refuse(code, happened + ".")
    }

    fn refuse(&self, code: &'static str, happened: impl Into<String>) -> Refusal {
        let advice = "Try again in a moment. If you run this app: look at its machines and logs.";
        Refusal::new(StatusCode::SERVICE_UNAVAILABLE, code, happened, advice).of_app(&self.app)
    }
}

/// Codes of the agent that may be shown; anything else is the agent's fault.
fn known_code(code: &str) -> &'static str {
    const KNOWN: [&str; 11] = [
        "PM01", "PM02", "PM03", "PM04", "PM05", "PM06", "PM07", "PM08", "PM09", "PM10", "PM11",
    ];
    KNOWN.into_iter().find(|known| *known == code).unwrap_or("PM01")
}
