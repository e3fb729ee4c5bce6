//! Which machine serves a request, or what has to happen first (Fly Proxy's documented load balancing and autostart). The answer is a
//! proposal: the caller takes the slot with [`Gauge::acquire`](crate::gauge::Gauge::acquire) and asks again when it lost the race.

use std::sync::Arc;

use crate::snapshot::{App, Machine, Phase, Target};

/// Up to so many candidates are compared one by one; above, two are drawn and the less loaded one taken.
const COMPARED_MAX: usize = 8;

#[derive(Clone, Debug)]
pub enum Choice {
    Use(Target),
    /// Ask for this machine (once, however many wait). `meanwhile` serves when the wake fails.
    Wake(Target, Option<Target>),
    /// All are at their hard limit.
    Queue,
    /// Nothing serves at this moment, something will without our doing: look again when rows change.
    Wait(Waiting),
    /// Every machine that could serve was tried by this request.
    Exhausted,
    Fail(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// a machine starts, changes, ends or drains
    Change,
    /// machines run and fail their checks
    Checks,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    NoMachines,
    /// all machines are on hosts that this proxy does not reach
    Elsewhere,
    Cordoned,
    /// asleep, and no service of theirs has autostart
    Asleep,
    /// failed, destroyed or in an unknown state
    Unstartable,
}

impl Failure {
    pub fn reason(self) -> &'static str {
        match self {
            Failure::NoMachines => "no machine of the app serves this port",
            Failure::Elsewhere => "the app's machines are on hosts that this edge does not reach",
            Failure::Cordoned => "all machines of the app are cordoned",
            Failure::Asleep => "all machines of the app are stopped and autostart is off",
            Failure::Unstartable => "no machine of the app is in a state from which it can serve",
        }
    }
}

/// What one request knows beside the snapshot.
pub trait Knowledge {
    /// this request tried the machine and it failed
    fn tried(&self, machine: &Machine) -> bool;
    /// a wake of the machine is on its way
    fn waking(&self, machine: &Machine) -> bool;
}

pub fn choose(targets: &[Target], known: &impl Knowledge) -> Choice {
    if let Some(quick) = draw_two(targets, known) {
        return Choice::Use(quick);
    }
    let seen = Seen::of(targets, known);
    if let Some(target) = least_loaded(&seen.below_soft) {
        return Choice::Use(target.clone());
    }
    let between = least_loaded(&seen.between).cloned();
    if let (Some(target), true) = (&between, seen.waking.is_some() || seen.starting) {
        return Choice::Use(target.clone()); // help is on its way
    }
    if let Some(target) = seen.waking {
        return Choice::Wake(target.clone(), None);
    }
    if seen.starting && seen.at_hard == 0 {
        return Choice::Wait(Waiting::Change);
    }
    if let Some(target) = seen.asleep {
        return Choice::Wake(target.clone(), between);
    }
    if let Some(target) = between {
        return Choice::Use(target);
    }
    if seen.at_hard > 0 {
        return Choice::Queue;
    }
    if seen.changing {
        return Choice::Wait(Waiting::Change);
    }
    if seen.failing {
        return Choice::Wait(Waiting::Checks);
    }
    if seen.tried {
        return Choice::Exhausted;
    }
    Choice::Fail(seen.why_not)
}

/// The usual case of a large app costs two looks, not a scan.
fn draw_two(targets: &[Target], known: &impl Knowledge) -> Option<Target> {
    if targets.len() <= COMPARED_MAX {
        return None;
    }
    let first = fastrand::usize(..targets.len());
    let second = (first + fastrand::usize(1..targets.len())) % targets.len();
    let fit = |t: &&Target| {
        serves(t) && !known.tried(&t.machine) && {
            let now = t.machine.gauge.read();
            !now.draining && now.in_flight < t.service.soft
        }
    };
    let drawn = [&targets[first], &targets[second]];
    drawn
        .into_iter()
        .filter(fit)
        .min_by_key(|t| t.machine.gauge.read().in_flight)
        .cloned()
}

/// Running, here, in rotation; its load is another question.
fn serves(target: &Target) -> bool {
    let machine = &target.machine;
    machine.phase == Phase::Running && machine.local && !machine.cordoned && target.passing && machine.ip4.is_some()
}

fn least_loaded<'a>(loaded: &[(u32, &'a Target)]) -> Option<&'a Target> {
    if loaded.len() > COMPARED_MAX {
        let first = fastrand::usize(..loaded.len());
        let second = (first + fastrand::usize(1..loaded.len())) % loaded.len();
        let drawn = [&loaded[first], &loaded[second]];
        return drawn
            .into_iter()
            .min_by_key(|(load, _)| *load)
            .map(|(_, target)| *target);
    }
    let least = loaded.iter().map(|(load, _)| *load).min()?;
    let ties: Vec<&'a Target> = loaded
        .iter()
        .filter(|(load, _)| *load == least)
        .map(|(_, target)| *target)
        .collect();
    fastrand::choice(ties)
}

struct Seen<'a> {
    below_soft: Vec<(u32, &'a Target)>,
    between: Vec<(u32, &'a Target)>,
    at_hard: usize,
    waking: Option<&'a Target>,
    asleep: Option<&'a Target>,
    starting: bool,
    changing: bool,
    failing: bool,
    tried: bool,
    why_not: Failure,
}

impl<'a> Seen<'a> {
    fn of(targets: &'a [Target], known: &impl Knowledge) -> Seen<'a> {
        let mut seen = Seen {
            below_soft: Vec::new(),
            between: Vec::new(),
            at_hard: 0,
            waking: None,
            asleep: None,
            starting: false,
            changing: false,
            failing: false,
            tried: false,
            why_not: Failure::NoMachines,
        };
        for target in targets {
            seen.add(target, known);
        }
        seen
    }

    fn add(&mut self, target: &'a Target, known: &impl Knowledge) {
        let machine = &target.machine;
        if machine.cordoned {
            return self.why_not(Failure::Cordoned);
        }
        if !machine.local {
            return self.why_not(Failure::Elsewhere);
        }
        if known.tried(machine) {
            self.tried = true;
            return;
        }
        match machine.phase {
            Phase::Running => self.running(target, known),
            Phase::Asleep(rank) if target.service.row.autostart => {
                if known.waking(machine) {
                    self.waking = self.waking.or(Some(target));
                } else if self.asleep.is_none_or(|best| rank < asleep_rank(best)) {
                    self.asleep = Some(target);
                }
            }
            Phase::Asleep(_) => self.why_not(Failure::Asleep),
            Phase::Starting => self.starting = true,
            Phase::Changing => self.changing = true,
            Phase::Ending if target.service.row.autostart => self.changing = true,
            Phase::Ending => self.why_not(Failure::Asleep),
            Phase::Gone => self.why_not(Failure::Unstartable),
        }
    }

    fn running(&mut self, target: &'a Target, known: &impl Knowledge) {
        let now = target.machine.gauge.read();
        if now.draining || target.machine.ip4.is_none() {
            self.changing = true;
        } else if !target.passing && target.service.row.autostart && known.waking(&target.machine) {
            // Its row came before the end of its wake: it runs and will be ready, another need not be woken.
            self.waking = self.waking.or(Some(target));
        } else if !target.passing {
            self.failing = true;
        } else if now.in_flight < target.service.soft {
            self.below_soft.push((now.in_flight, target));
        } else if now.in_flight < target.service.hard {
            self.between.push((now.in_flight, target));
        } else {
            self.at_hard += 1;
        }
    }

    /// The most hopeful reason is the one worth telling.
    fn why_not(&mut self, reason: Failure) {
        let worth = |failure| match failure {
            Failure::NoMachines => 0,
            Failure::Elsewhere => 1,
            Failure::Unstartable => 2,
            Failure::Cordoned => 3,
            Failure::Asleep => 4,
        };
        if worth(reason) > worth(self.why_not) {
            self.why_not = reason;
        }
    }
}

fn asleep_rank(target: &Target) -> u8 {
    match target.machine.phase {
        Phase::Asleep(rank) => rank,
        _ => u8::MAX,
    }
}

/// A machine of the app, for frames that name only its id.
pub fn machine<'a>(app: &'a App, id: &str) -> Option<&'a Arc<Machine>> {
    app.machines.iter().find(|m| &*m.id == id)
}
