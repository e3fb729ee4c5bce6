//! Machines that are being emptied. The switch that stops new requests is in the machine's gauge; here is who asked, until
//! when, and what becomes of it when the agent goes away in between.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pantala_route::gauge::Gauge;
use pantala_wire::feed::{Drain, DrainResult, ProxyFrame};

use crate::shared::Shared;
use crate::tunnels::GOING_AWAY;

/// Between the close frame of a WebSocket and the report, for both ends to take leave.
const LEAVE: Duration = Duration::from_millis(250);
/// A new agent repeats the drains of the steps it resumes soon after its snapshot; what it does not is lifted.
const RESUMED_WITHIN: Duration = Duration::from_secs(2);

struct Draining {
    id: u64,
    gauge: Arc<Gauge>,
    deadline: Instant,
    ended: Option<Instant>,
    reported: bool,
    lift_at: Option<Instant>,
}

pub struct Drains {
    shared: Arc<Shared>,
    machines: HashMap<String, Draining>,
}

impl Drains {
    pub fn new(shared: Arc<Shared>) -> Drains {
        Drains {
            shared,
            machines: HashMap::new(),
        }
    }

    /// Answers at once if the machine is busy, empty or unknown.
    pub fn begin(&mut self, drain: &Drain, gauge: Option<&Arc<Gauge>>) -> Vec<ProxyFrame> {
        let Some(gauge) = gauge else {
            return vec![answer(drain.id, &drain.machine, DrainResult::Drained, 0)];
        };
        if !gauge.drain(drain.load_seq) {
            let in_flight = gauge.read().in_flight;
            return vec![answer(drain.id, &drain.machine, DrainResult::Busy, in_flight)];
        }
        let draining = Draining {
            id: drain.id,
            gauge: gauge.clone(),
            deadline: Instant::now() + Duration::from_millis(drain.deadline_ms),
            ended: None,
            reported: false,
            lift_at: None,
        };
        self.machines.insert(drain.machine.clone(), draining);
        self.look()
    }

    pub fn is_empty(&self) -> bool {
        self.machines.is_empty()
    }

    /// Reports of drains that came to an end.
    pub fn look(&mut self) -> Vec<ProxyFrame> {
        let mut reports = Vec::new();
        for (machine, draining) in self.machines.iter_mut().filter(|(_, draining)| !draining.reported) {
            let in_flight = draining.gauge.read().in_flight;
            let left_long_enough = draining.ended.is_some_and(|ended| ended.elapsed() >= LEAVE);
            if in_flight == 0 {
                let result = if draining.ended.is_some() {
                    DrainResult::Deadline
                } else {
                    DrainResult::Drained
                };
                reports.push(answer(draining.id, machine, result, 0));
                draining.reported = true;
            } else if left_long_enough {
                reports.push(answer(draining.id, machine, DrainResult::Deadline, in_flight));
                draining.reported = true;
            } else if draining.ended.is_none() && Instant::now() >= draining.deadline {
                self.shared.tunnels.end(machine, GOING_AWAY);
                draining.ended = Some(Instant::now());
            }
        }
        reports
    }

    pub fn lift(&mut self, machine: &str) {
        if let Some(draining) = self.machines.remove(machine) {
            draining.gauge.undrain();
        }
    }

    /// The machine's row moved on; its gauge is open already.
    pub fn forget(&mut self, machine: &str) {
        self.machines.remove(machine);
    }

    pub fn agent_away(&mut self) {
        let hold = Duration::from_millis(self.shared.settings.wire.wake_hold_ms);
        self.lift_all_in(hold);
    }

    pub fn agent_back(&mut self) {
        self.lift_all_in(RESUMED_WITHIN);
    }

    fn lift_all_in(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.machines
            .values_mut()
            .for_each(|draining| draining.lift_at = Some(at));
    }

    /// Whether any was lifted.
    pub fn lift_overdue(&mut self) -> bool {
        let now = Instant::now();
        let over = |d: &Draining| d.lift_at.is_some_and(|at| at <= now);
        let overdue: Vec<String> = self
            .machines
            .iter()
            .filter(|(_, d)| over(d))
            .map(|(id, _)| id.clone())
            .collect();
        overdue.iter().for_each(|machine| self.lift(machine));
        !overdue.is_empty()
    }
}

fn answer(id: u64, machine: &str, result: DrainResult, in_flight: u32) -> ProxyFrame {
    ProxyFrame::Drained {
        id,
        machine: machine.to_owned(),
        result,
        in_flight: u64::from(in_flight),
    }
}
