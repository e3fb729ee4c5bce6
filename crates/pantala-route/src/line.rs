//! The line of an app: requests for which every machine that they may use is at its limit. Those that may use the same ones
//! stand in one lane, first come first served; a place that became free calls the first of all lanes that can use it. So
//! nobody who wants one machine alone holds up those behind who would take another, nobody overtakes whom he could serve as
//! well, and a release looks at the heads of lanes, of which there are as many as there are different wishes.
//!
//! Whoever was called looks at the machines again. Until he has, the call is his to pass on: when he leaves, to whoever is
//! first then; when he could not use the place after all, to those behind him.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::choose::Choice;
use crate::prefer::Wishes;
use crate::snapshot::{App, Machine, Phase, Target};

/// Which machines of an app a request may use.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Condition {
    pub port: u16,
    /// from another host's edge: machines of this host only
    pub here: bool,
    pub only: Option<Arc<str>>,
    /// of these the conditions
    pub wishes: Wishes,
    /// those that failed it
    pub tried: Vec<Arc<str>>,
}

impl Condition {
    /// At this moment there is a place for it on the machine.
    pub fn fits(&self, app: &App, machine: &Machine, now_ms: u64) -> bool {
        self.admits(machine)
            && app
                .offer(self.port)
                .and_then(|offer| offer.target(machine))
                .is_some_and(|target| has_room(target, now_ms))
    }

    fn admits(&self, machine: &Machine) -> bool {
        (machine.local || !self.here)
            && self.only.as_ref().is_none_or(|only| *only == machine.id)
            && !self.tried.contains(&machine.id)
            && self.wishes.admit(machine)
    }

    /// The same for a target of `port`, which mostly is its own.
    fn fits_target(&self, app: &App, port: u16, target: &Target, now_ms: u64) -> bool {
        match self.port == port {
            true => has_room(target, now_ms) && self.admits(&target.machine),
            false => self.fits(app, &target.machine, now_ms),
        }
    }
}

fn has_room(target: &Target, now_ms: u64) -> bool {
    let machine = &target.machine;
    machine.phase == Phase::Running
        && !machine.cordoned
        && target.passing
        && (!machine.local || machine.ip4.is_some())
        && !machine.gauge.read().draining
        && machine.gauge.load(now_ms) < target.service.hard
}

/// A place in the line.
#[derive(Clone, Debug)]
pub struct Ticket {
    number: u64,
    condition: Arc<Condition>,
}

/// Why somebody was called and has not looked yet.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Calls {
    pub machines: Vec<Arc<str>>,
    /// anything may have changed
    pub all: bool,
}

impl Calls {
    pub fn add(&mut self, other: Calls) {
        other.machines.into_iter().for_each(|machine| self.machine(machine));
        self.all |= other.all;
    }

    fn machine(&mut self, machine: Arc<str>) {
        if !self.machines.contains(&machine) {
            self.machines.push(machine);
        }
    }
}

struct Standing<W> {
    whom: W,
    calls: Calls,
}

/// `W`: how whoever stands there is told.
pub struct Line<W> {
    lanes: HashMap<Arc<Condition>, BTreeMap<u64, Standing<W>>>,
    last: u64,
}

impl<W> Default for Line<W> {
    fn default() -> Line<W> {
        Line {
            lanes: HashMap::new(),
            last: 0,
        }
    }
}

impl<W> Line<W> {
    pub fn is_empty(&self) -> bool {
        self.lanes.is_empty()
    }

    /// Whoever joins looks once more: what became free before called somebody else, or nobody.
    pub fn join(&mut self, condition: Condition, whom: W) -> Ticket {
        self.last += 1;
        let condition = match self.lanes.get_key_value(&condition) {
            Some((known, _)) => known.clone(),
            None => Arc::new(condition),
        };
        let standing = Standing {
            whom,
            calls: Calls::default(),
        };
        let lane = self.lanes.entry(condition.clone()).or_default();
        lane.insert(self.last, standing);
        Ticket {
            number: self.last,
            condition,
        }
    }

    /// What those want who came earlier; without a ticket, all in line.
    pub fn before(&self, ticket: Option<&Ticket>) -> Vec<Arc<Condition>> {
        let earlier = |first: u64| ticket.is_none_or(|ticket| first < ticket.number);
        let lanes = self.heads().filter(|(first, _)| earlier(*first));
        lanes.map(|(_, condition)| condition.clone()).collect()
    }

    fn heads(&self) -> impl Iterator<Item = (u64, &Arc<Condition>)> {
        let first = |lane: &BTreeMap<u64, Standing<W>>| lane.keys().next().copied();
        self.lanes
            .iter()
            .filter_map(move |(condition, lane)| Some((first(lane)?, condition)))
    }

    /// There may be room on the machine: the first whom it `fits` is to look, of all or of those behind `after`.
    pub fn call(
        &mut self,
        machine: &Arc<str>,
        after: Option<&Ticket>,
        fits: impl Fn(&Condition) -> bool,
    ) -> Option<&W> {
        let behind = |first: u64| after.is_none_or(|ticket| first > ticket.number);
        let heads = self.heads().filter(|(first, _)| behind(*first));
        let (_, condition) = heads
            .filter(|(_, condition)| fits(condition))
            .min_by_key(|(first, _)| *first)?;
        let condition = condition.clone();
        let standing = self.lanes.get_mut(&condition)?.values_mut().next()?;
        standing.calls.machine(machine.clone());
        Some(&standing.whom)
    }

    /// Anything may have changed: the first of each lane is to look.
    pub fn stir(&mut self) -> impl Iterator<Item = &W> {
        let heads = self.lanes.values_mut().filter_map(|lane| lane.values_mut().next());
        heads.map(|standing| {
            standing.calls.all = true;
            &standing.whom
        })
    }

    /// Why it was called, before it looks.
    pub fn heed(&mut self, ticket: &Ticket) -> Calls {
        let lane = self.lanes.get_mut(&ticket.condition);
        let standing = lane.and_then(|lane| lane.get_mut(&ticket.number));
        standing
            .map(|standing| std::mem::take(&mut standing.calls))
            .unwrap_or_default()
    }

    /// With the calls that it has not heeded.
    pub fn leave(&mut self, ticket: &Ticket) -> Calls {
        let Some(lane) = self.lanes.get_mut(&ticket.condition) else {
            return Calls::default();
        };
        let left = lane.remove(&ticket.number);
        if lane.is_empty() {
            self.lanes.remove(&ticket.condition);
        }
        left.map(|standing| standing.calls).unwrap_or_default()
    }
}

/// `choose` among the targets of `port`, without overtaking those `before` who could take the place as well. None: stand in line.
pub fn in_turn<E>(
    app: &App,
    port: u16,
    targets: &[Target],
    before: &[Arc<Condition>],
    now_ms: u64,
    choose: impl FnOnce(&[Target]) -> Result<Choice, E>,
) -> Result<Option<Choice>, E> {
    let claimed = |target: &Target| before.iter().any(|one| one.fits_target(app, port, target, now_ms));
    if before.is_empty() || !targets.iter().any(claimed) {
        return choose(targets).map(Some);
    }
    let free: Vec<Target> = targets.iter().filter(|target| !claimed(target)).cloned().collect();
    // Whatever else is said of the rest is not said of all.
    Ok(choose(&free)
        .ok()
        .filter(|choice| matches!(choice, Choice::Use(_) | Choice::Wake(..))))
}
