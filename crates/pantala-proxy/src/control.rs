//! The control thread: the one writer of the routing view and the one who speaks with the agent. Rows in, wakes and loads
//! out, drains watched, the view saved.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use pantala_route::snapshot::Phase;
use pantala_route::table::{Changes, Table};
use pantala_wire::feed::{AgentFrame, FeedRow, MachineLoad, ProxyFrame, ProxyLog, WakeResult};
use tokio::sync::mpsc;
use tokio::time::{MissedTickBehavior, interval};

use crate::drains::Drains;
use crate::generations::Generations;
use crate::ids::RequestId;
use crate::link::Event;
use crate::log;
use crate::shared::{Command, Life, Shared};

const TICK: Duration = Duration::from_millis(50);
const LOAD_EVERY: Duration = Duration::from_secs(1);
/// The view is saved when nothing changed for so long, at the latest after the other.
const SETTLED_AFTER: Duration = Duration::from_millis(300);
const SAVED_WITHIN: Duration = Duration::from_secs(3);

pub struct Control {
    shared: Arc<Shared>,
    table: Table,
    generations: Arc<Generations>,
    drains: Drains,
    agent: Option<mpsc::Sender<ProxyFrame>>,
    away_since: Option<Instant>,
    /// rows of snapshot frames until the last one has come
    arriving: Vec<FeedRow>,
    unusable_certs: Vec<(String, String)>,
    unusable_tickets: Vec<(String, String)>,
    unsaved: Option<Unsaved>,
    saving: Option<tokio::task::JoinHandle<()>>,
    reported: HashMap<String, u64>,
}

struct Unsaved {
    first: Instant,
    last: Instant,
}

impl Control {
    /// Serves from the last good view at once.
    pub fn new(shared: Arc<Shared>, generations: Generations) -> std::io::Result<Control> {
        let replacing = *shared.life.borrow() == Life::Arriving;
        let mut table = Table::new(&shared.settings.wire.node);
        generations.load(&mut table, replacing)?;
        let mut control = Control {
            drains: Drains::new(shared.clone()),
            shared,
            table,
            generations: Arc::new(generations),
            agent: None,
            away_since: Some(Instant::now()),
            arriving: Vec::new(),
            unusable_certs: Vec::new(),
            unusable_tickets: Vec::new(),
            unsaved: None,
            saving: None,
            reported: HashMap::new(),
        };
        control.publish(&Changes {
            certs: true,
            tickets: true,
            ..Changes::default()
        });
        Ok(control)
    }

    pub async fn run(mut self, mut events: mpsc::Receiver<Event>, mut commands: mpsc::Receiver<Command>) {
        let mut tick = interval(TICK);
        let mut load = interval(LOAD_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        load.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = self.shared.clone();
        let mut life = shared.life.subscribe();
        loop {
            let waits = self.waits_for_something();
            tokio::select! {
                Some(event) = events.recv() => self.on_event(event),
                Some(command) = commands.recv() => self.on_command(command),
                () = shared.emptied.notified() => self.look_at_drains(),
                _ = tick.tick(), if waits => self.on_tick(),
                _ = load.tick() => {
                    self.on_tick();
                    self.report_load();
                    shared.traces.tidy();
                }
                _ = life.wait_for(|life| *life == Life::Ending) => break,
            }
        }
        self.finish().await;
    }

    fn on_event(&mut self, event: Event) {
        match event {
            Event::Up(agent) => {
                log::info("agent connected", &[]);
                (self.agent, self.away_since) = (Some(agent), None);
                self.arriving.clear();
                self.shared.wakes.forget_sent();
                self.send_wakes();
            }
            Event::Down => {
                (self.agent, self.away_since) = (None, Some(Instant::now()));
                self.drains.agent_away();
            }
            Event::Absent => drop(self.shared.informed.send_replace(true)),
            Event::Frame(frame) => self.on_frame(frame),
        }
    }

    fn on_frame(&mut self, frame: AgentFrame) {
        match frame {
            AgentFrame::Hello { node, region, .. } => {
                let wire = &self.shared.settings.wire;
                if node != wire.node || region != wire.region {
                    log::error("agent of another node", &[("node", &node), ("region", &region)]);
                }
            }
            AgentFrame::Snapshot { revision, rows, last } => {
                self.arriving.extend(rows);
                if last {
                    let rows = std::mem::take(&mut self.arriving);
                    let changes = self.table.replace(revision, rows);
                    self.applied(&changes);
                    self.drains.agent_back();
                    self.shared.informed.send_replace(true);
                }
            }
            AgentFrame::Delta { revision, rows } => {
                let changes = self.table.apply(revision, rows);
                self.applied(&changes);
            }
            AgentFrame::WakeResult(result) => self.woken(result),
            AgentFrame::Drain(drain) => {
                let answer = self.drains.begin(&drain, self.table.gauge(&drain.machine));
                self.shared.publish(self.table.snapshot()); // workers close what they keep open
                self.send_all(answer);
            }
            AgentFrame::Trace { id, request } => self.trace(id, &request),
            AgentFrame::Undrain { machine } => {
                self.drains.lift(&machine);
                self.shared.publish(self.table.snapshot());
            }
        }
    }

    fn applied(&mut self, changes: &Changes) {
        self.publish(changes);
        let now = Instant::now();
        let first = self.unsaved.as_ref().map_or(now, |unsaved| unsaved.first);
        self.unsaved = Some(Unsaved { first, last: now });
        let set_aside = self.table.set_aside().map(|(key, _)| key.to_owned()).collect();
        self.send(ProxyFrame::Applied {
            revision: self.table.revision(),
            set_aside,
        });
    }

    fn publish(&mut self, changes: &Changes) {
        if changes.certs {
            self.unusable_certs = self.shared.tls.certificates.replace(self.table.certs());
            for (key, why) in &self.unusable_certs {
                log::warning("certificate set aside", &[("key", key), ("reason", why)]);
            }
        }
        if changes.tickets {
            self.unusable_tickets = self.shared.tls.tickets.replace(self.table.tickets());
        }
        for (key, why) in self.unusable_certs.iter().chain(&self.unusable_tickets) {
            self.table.mark_set_aside("certs", key, why);
        }
        changes.undrained.iter().for_each(|machine| self.drains.forget(machine));
        self.shared.publish(self.table.snapshot());
    }

    /// The view first, then those who wait: they look at it.
    fn woken(&mut self, result: WakeResult) {
        if result.ok {
            self.table.woken(&result.machine, &result.ip4);
            self.drains.forget(&result.machine);
            self.shared.publish(self.table.snapshot());
        } else {
            let (code, reason) = (&result.code, &result.reason);
            log::info(
                "wake refused",
                &[("machine", &result.machine), ("code", code), ("reason", reason)],
            );
        }
        self.shared.wakes.resolve(result);
    }

    fn on_command(&mut self, command: Command) {
        match command {
            Command::Wake => self.send_wakes(),
            Command::Log(entry) => self.send_log(entry),
        }
    }

    /// Beside this thread: tens of thousands of records are looked through.
    fn trace(&self, id: u64, request: &str) {
        let (Some(agent), Some(request)) = (self.agent.clone(), RequestId::read(request)) else {
            return;
        };
        let traces = self.shared.traces.clone();
        tokio::task::spawn_blocking(move || {
            let (since_ms, records) = traces.find(request.ulid);
            // An agent that reads nothing does not wait for this either.
            let _ = agent.try_send(ProxyFrame::Traced { id, since_ms, records });
        });
    }

    fn send_wakes(&mut self) {
        if self.agent.is_none() {
            return;
        }
        let limit = Duration::from_millis(self.shared.settings.wire.wake_timeout_ms);
        for (id, machine, since) in self.shared.wakes.take_unsent() {
            let deadline_ms = limit.saturating_sub(since.elapsed()).as_millis() as u64;
            self.send(ProxyFrame::Wake {
                id,
                machine: machine.to_string(),
                deadline_ms,
            });
        }
    }

    /// Whether time alone can change something: nobody looks twenty times a second at a host that is asleep.
    fn waits_for_something(&self) -> bool {
        self.unsaved.is_some() || !self.drains.is_empty() || self.shared.wakes.any()
    }

    fn on_tick(&mut self) {
        let wire = &self.shared.settings.wire;
        let (limit, hold) = (
            Duration::from_millis(wire.wake_timeout_ms),
            Duration::from_millis(wire.wake_hold_ms),
        );
        self.shared.wakes.expire(limit, hold, self.away_since);
        self.send_wakes();
        self.look_at_drains();
        self.save_when_settled();
    }

    fn look_at_drains(&mut self) {
        let finished = self.drains.look();
        self.send_all(finished);
        if self.drains.lift_overdue() {
            self.shared.publish(self.table.snapshot());
        }
    }

    fn report_load(&mut self) {
        if self.agent.is_none() {
            return;
        }
        let now_ms = self.shared.elapsed_ms();
        let mut machines = Vec::new();
        let mut reported = HashMap::new();
        for machine in self
            .table
            .snapshot()
            .apps
            .values()
            .flat_map(|app| &app.machines)
            .filter(|m| m.local)
        {
            let (gauge, before) = (&machine.gauge, self.reported.get(&*machine.id));
            let now = gauge.read();
            if machine.phase == Phase::Running {
                if before.is_none() {
                    gauge.touch(now_ms); // its idle time begins when it starts
                }
                reported.insert(machine.id.to_string(), now.seq);
            } else if now.in_flight == 0 && before.is_none_or(|seq| *seq == now.seq) {
                continue;
            }
            let (in_flight, idle_ms) = (u64::from(now.in_flight), gauge.idle_ms(now_ms));
            machines.push(MachineLoad {
                machine: machine.id.to_string(),
                in_flight,
                seq: now.seq,
                idle_ms,
            });
        }
        self.reported = reported;
        self.send(ProxyFrame::Load { machines });
    }

    fn save_when_settled(&mut self) {
        let due = |u: &Unsaved| u.last.elapsed() >= SETTLED_AFTER || u.first.elapsed() >= SAVED_WITHIN;
        let busy = self.saving.as_ref().is_some_and(|saving| !saving.is_finished());
        if busy || !self.saves() || !self.unsaved.as_ref().is_some_and(due) {
            return;
        }
        self.unsaved = None;
        self.saving = Some(self.save());
    }

    fn save(&self) -> tokio::task::JoinHandle<()> {
        let (revision, rows, generations) = (self.table.revision(), self.table.rows(), self.generations.clone());
        tokio::task::spawn_blocking(move || {
            if let Err(error) = generations.save(revision, &rows) {
                log::error("snapshot not saved", &[("reason", &error)]);
            }
        })
    }

    /// One process at a time writes the views.
    fn saves(&self) -> bool {
        *self.shared.life.borrow() > Life::Arriving && !*self.shared.handed_over.borrow()
    }

    async fn finish(&mut self) {
        if let Some(saving) = self.saving.take() {
            let _ = saving.await;
        }
        if !self.saves() {
            return; // views and mark are another process's
        }
        if self.unsaved.take().is_some() {
            let _ = self.save().await;
        }
        self.generations.end_in_order();
    }

    fn send_all(&mut self, frames: Vec<ProxyFrame>) {
        frames.into_iter().for_each(|frame| self.send(frame));
    }

    /// A flood of errors must not crowd out wakes and drains.
    fn send_log(&mut self, entry: ProxyLog) {
        match &self.agent {
            Some(agent) if agent.capacity() > agent.max_capacity() / 2 => self.send(ProxyFrame::Log(entry)),
            _ => {
                self.shared.metrics.logs_dropped.fetch_add(1, Relaxed);
            }
        }
    }

    /// An agent that reads nothing any more is as good as away: it connects anew and gets what still matters.
    fn send(&mut self, frame: ProxyFrame) {
        if self.agent.as_ref().is_some_and(|agent| agent.try_send(frame).is_err()) {
            self.agent = None;
        }
    }
}
