//! Phase 5, its waits: what a request does until a machine has a slot for it. Each ends by its own deadline with a reason.

use std::future::Future;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hyper::Response;
use pantala_route::choose::Waiting;
use pantala_route::snapshot::{App, Machine, Phase, Target};
use pantala_route::turn::{Attempt, Reason};
use pantala_wire::feed::WakeResult;
use tokio::time::{Instant, timeout_at};

use crate::body::OutBody;
use crate::codes;
use crate::handover::asking::Answer;
use crate::handover::message::Want;
use crate::queue::Place;
use crate::respond::Refusal;
use crate::select::{REFUSING_MAX, Scope, Selection};
use crate::shared::{Command, Shared};
use crate::slot::Slot;
use crate::timing::{Cause, Wait, Waited};

/// A refused wake may only mean that our view is older than the agent's.
const NEWER_VIEW_MAX: Duration = Duration::from_secs(2);
/// Wakes that one request waits for.
const WAKES_MAX: u32 = 20;
/// How often those in line ask whether another host has room.
const LOOK_ABROAD: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_millis(250);

impl Selection {
    /// An answer of which it is to be said why it came late, if it did.
    pub fn timed(&self, mut response: Response<OutBody>, machine: &Machine) -> Response<OutBody> {
        let there = response.extensions_mut().remove::<Waited>();
        let mut waited = self.waited;
        there.iter().for_each(|there| waited.merge(there));
        if waited.any() {
            response.extensions_mut().insert(Wait {
                waited,
                app: self.app.to_string(),
                machine: machine.id.to_string(),
                told: false,
            });
        }
        response
    }

    /// A machine of this host is woken through its agent; one of another host by the proxy there, where the request waits.
    pub async fn awaken(
        &mut self,
        target: Target,
        meanwhile: Option<Target>,
        seq: u64,
    ) -> Result<Option<Slot>, Refusal> {
        if target.machine.local {
            let usable = self.wake(target, meanwhile, seq).await?;
            return match usable {
                Some(target) => self.take(target).await,
                None => Ok(None),
            };
        }
        match meanwhile {
            Some(target_meanwhile) if self.shared.wakes.refused_lately(&target.machine.id) => {
                self.take(target_meanwhile).await
            }
            _ => Ok(self.propose(target, Attempt::Wake)),
        }
    }

    /// The process that replaces this one gives the places on this host's machines.
    /// A place in the line here is left for one there, in the same order.
    pub async fn ask(
        &mut self,
        target: Target,
        attempt: Attempt,
        place: Option<Place<'_>>,
    ) -> Result<Option<Slot>, Refusal> {
        let queue = attempt == Attempt::Queue;
        self.reason = Reason::Full;
        let by = match queue {
            true => {
                self.enter()?;
                self.queued()
            }
            false => self.reach_by,
        };
        let machine = target.machine.clone();
        let want = Want {
            app: self.app.to_string(),
            port: self.port,
            machine: machine.id.to_string(),
            queue,
            only: self.alone(),
            deadline_ms: by.saturating_duration_since(Instant::now()).as_millis() as u64,
        };
        let since = Instant::now();
        let asked = self.shared.asking.ask(want);
        drop(place);
        let answer = match asked {
            Some(asked) => asked.answer().await,
            None => None,
        };
        if queue {
            self.waited.add(Cause::Queue, since);
        }
        match answer {
            // It has ended, and this process is about to notice it.
            None => {
                tokio::task::yield_now().await;
                Ok(None)
            }
            Some(Answer::Granted(granted, id)) => {
                let view = self.shared.view();
                let app = view.snapshot.apps.get(&self.app);
                let offer = app.and_then(|app| app.offer(self.port));
                let given = offer.and_then(|offer| offer.targets.iter().find(|target| *target.machine.id == *id));
                let Some(given) = given.filter(|target| target.machine.local) else {
                    return Ok(None);
                };
                let lent = granted.take(&given.machine.gauge);
                Ok(lent.map(|lent| self.local(given.clone(), lent)))
            }
            Some(Answer::Denied {
                reason,
                happened,
                in_flight,
            }) => {
                let code = if reason == Reason::Full { "PR04" } else { "PR01" };
                let why = self.refuse(code, happened).of_machine(&machine.id).retry_after(1);
                if reason == Reason::Full {
                    // Until it tells its counts again.
                    let hard = target.service.hard.saturating_sub(machine.gauge.read().in_flight);
                    machine.gauge.set_elsewhere(in_flight.max(hard));
                }
                self.turned(&machine, attempt, Some(reason), why)?;
                Ok(None)
            }
        }
    }

    /// A wait in line ends then.
    pub fn queued(&mut self) -> Instant {
        let limit = Duration::from_millis(self.shared.settings.wire.queue_timeout_ms);
        self.shared.metrics.queued.fetch_add(1, Relaxed);
        let by = *self.queue_by.get_or_insert_with(|| Instant::now() + limit);
        by.min(self.reach_by)
    }

    /// Answers with a machine to use at once if the wake failed and one can help out.
    async fn wake(&mut self, target: Target, meanwhile: Option<Target>, seq: u64) -> Result<Option<Target>, Refusal> {
        if meanwhile.is_some() && self.shared.wakes.refused_lately(&target.machine.id) {
            return Ok(meanwhile);
        }
        self.reason = Reason::Wake;
        self.enter()?;
        let since = Instant::now();
        let (mut outcome, began) = self.shared.wakes.join(&target.machine.id);
        if began {
            self.shared.metrics.wakes.fetch_add(1, Relaxed);
            // A full channel is no loss: the control thread looks for unsent wakes with every tick.
            let _ = self.shared.commands.try_send(Command::Wake);
        }
        let result = timeout_at(self.reach_by, outcome.wait_for(Option::is_some)).await;
        let waited = result.map(|result| result.map(|result| result.clone()));
        let suspended = target.machine.phase == Phase::of("suspended");
        self.waited
            .add(if suspended { Cause::Resume } else { Cause::Cold }, since);
        let result = match waited {
            Ok(Ok(result)) => result,
            _ => {
                return Err(self
                    .refuse("PM03", "The machine did not become ready in time.")
                    .of_machine(&target.machine.id)
                    .retry_after(2));
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
        let stale = matches!(why.code, "PM07" | "PM08" | "PM11");
        let since = Instant::now();
        if stale && newer.await.is_ok() {
            self.waited.add(Cause::Start, since);
            Ok(None)
        } else {
            Err(why)
        }
    }

    /// Before the first wait of a request, whatever it waits for.
    fn enter(&mut self) -> Result<(), Refusal> {
        if self.inside.is_some() {
            return Ok(());
        }
        match self.shared.room.enter(&self.app) {
            Ok(inside) => self.inside = Some(inside),
            Err(full) => {
                self.reason = Reason::Full; // for the edge of another host: no machine here is worth a wait now
                let happened = format!("No machine of the app can take the request now and {full}.");
                return Err(self.refuse("PR04", happened).retry_after(1));
            }
        }
        Ok(())
    }

    /// A place in line, or in the next turn the wait there.
    pub async fn stand<'a>(&mut self, shared: &'a Shared, place: &mut Option<Place<'a>>) -> Result<(), Refusal> {
        self.reason = Reason::Full;
        self.enter()?;
        match place {
            None => {
                self.queued();
                *place = Some(Place::join(shared, &self.app, self.condition()));
                Ok(())
            }
            Some(place) => {
                place.pass_by();
                let since = Instant::now();
                let called = self.called(place.called()).await;
                self.waited.add(Cause::Queue, since);
                called
            }
        }
    }

    async fn called(&mut self, called: impl Future<Output = ()>) -> Result<(), Refusal> {
        let by = self.queue_by.unwrap_or(self.reach_by).min(self.reach_by);
        // Nobody calls when a machine of another host has room again: then it is looked for now and then.
        let look = match (&self.scope, &self.shared.mesh) {
            (Scope::Client, Some(_)) => by.min(Instant::now() + LOOK_ABROAD),
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

    pub async fn change(&mut self, why: Waiting, seq: u64, app: &App) -> Result<(), Refusal> {
        self.enter()?;
        let since = Instant::now();
        let (changed, cause) = match why {
            Waiting::Away => (self.away(seq).await, Cause::Host),
            Waiting::Checks => (self.changed(why, seq, app).await, Cause::Health),
            Waiting::Start | Waiting::Change => (self.changed(why, seq, app).await, Cause::Start),
        };
        self.waited.add(cause, since);
        changed
    }

    async fn changed(&mut self, why: Waiting, seq: u64, app: &App) -> Result<(), Refusal> {
        let (by, happened) = match why {
            Waiting::Start | Waiting::Change | Waiting::Away => {
                (self.reach_by, "The app's machine did not become ready in time.")
            }
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
    pub async fn breathe(&mut self, seq: u64) -> Result<(), Refusal> {
        let by = self.refusing_by.unwrap_or(self.reach_by);
        if Instant::now() >= by {
            let unknown = self.refuse("PR04", "No machine of the app took the request.");
            return Err(self.last_failure.take().unwrap_or(unknown));
        }
        self.enter()?;
        let since = Instant::now();
        let pause = (since + self.pause).min(by);
        self.pause = (self.pause * 2).min(PAUSE_MAX);
        // Either way the machines are asked again.
        let _ = timeout_at(pause, self.shared.newer_than(seq)).await;
        self.waited.add(Cause::Retry, since);
        self.tried.clear();
        Ok(())
    }
}

/// Codes of the agent that may be shown; anything else is the agent's fault.
fn known_code(code: &str) -> &'static str {
    codes::find(code).map_or("PM01", |code| code.name)
}
