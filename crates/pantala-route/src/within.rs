//! The choice inside one region: the least loaded machine below its soft limit (compared one by one up to eight, above that
//! the better of two drawn), then a wake, then one between its limits. Used by [`crate::choose`], region by region.

use crate::choose::{Choice, Failure, Knowledge, Reach, Waiting};
use crate::snapshot::{Phase, Target};

/// Up to so many candidates are compared one by one; above, two are drawn and the less loaded one taken.
const COMPARED_MAX: usize = 8;

pub fn within(targets: &[Target], known: &impl Knowledge) -> Choice {
    if let Some(quick) = draw_two(targets, known) {
        return Choice::Use(quick);
    }
    let seen = Seen::of(targets, known);
    if let Some(target) = seen.below_soft.best() {
        return Choice::Use(target.clone());
    }
    let between = seen.between.best().cloned();
    if let (Some(target), true) = (&between, seen.waking.is_some() || seen.starting) {
        return Choice::Use(target.clone()); // help is on its way
    }
    if let Some(target) = seen.waking {
        return Choice::Wake(target.clone(), None);
    }
    if seen.starting && seen.at_hard.count == 0 {
        return Choice::Wait(Waiting::Start);
    }
    if let Some(target) = seen.asleep {
        return Choice::Wake(target.clone(), between);
    }
    if let Some(target) = between {
        return Choice::Use(target);
    }
    if let Some(target) = seen.at_hard.best() {
        return Choice::Queue(target.clone());
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
    if seen.away {
        return Choice::Wait(Waiting::Away);
    }
    Choice::Fail(seen.why_not)
}

/// The usual case of a large app costs two looks, not a scan.
fn draw_two(targets: &[Target], known: &impl Knowledge) -> Option<Target> {
    if targets.len() <= COMPARED_MAX {
        return None;
    }
    let now_ms = known.now_ms();
    let first = fastrand::usize(..targets.len());
    let second = (first + fastrand::usize(1..targets.len())) % targets.len();
    let fit = |target: &'_ &Target| {
        serves(target, known) && !known.tried(&target.machine) && {
            let gauge = &target.machine.gauge;
            !gauge.read().draining && gauge.load(now_ms) < target.service.soft
        }
    };
    let drawn = [&targets[first], &targets[second]];
    drawn
        .into_iter()
        .filter(fit)
        .min_by_key(|t| (t.machine.gauge.load(now_ms), !t.machine.local))
        .cloned()
}

/// Running, in reach, in rotation; its load is another question.
fn serves(target: &Target, known: &impl Knowledge) -> bool {
    let machine = &target.machine;
    let reached = match known.reach(machine) {
        Reach::Here => machine.ip4.is_some(),
        Reach::There => true,
        Reach::Away | Reach::Never => false,
    };
    machine.phase == Phase::Running && reached && !machine.cordoned && target.passing
}

/// Load first; of equals the one on this host, which spares a hop.
type Rank = (u32, bool);

/// Machines of one kind, of which only those that may be taken are kept.
#[derive(Default)]
struct Loaded<'a> {
    count: usize,
    /// any of those with the lowest rank, each as likely as the others
    least: Option<(Rank, &'a Target)>,
    ties: usize,
    /// any two, each pair as likely as the others
    drawn: [Option<(Rank, &'a Target)>; 2],
}

impl<'a> Loaded<'a> {
    fn push(&mut self, load: u32, target: &'a Target) {
        let rank = (load, !target.machine.local);
        self.count += 1;
        match self.least {
            Some((least, _)) if least < rank => {}
            Some((least, _)) if least == rank => {
                self.ties += 1;
                if fastrand::usize(..self.ties) == 0 {
                    self.least = Some((rank, target));
                }
            }
            _ => (self.least, self.ties) = (Some((rank, target)), 1),
        }
        let at = match self.count {
            1 | 2 => self.count - 1,
            count => fastrand::usize(..count),
        };
        if let Some(place) = self.drawn.get_mut(at) {
            *place = Some((rank, target));
        }
    }

    fn best(&self) -> Option<&'a Target> {
        let best = match self.count > COMPARED_MAX {
            true => self.drawn.into_iter().flatten().min_by_key(|(rank, _)| *rank),
            false => self.least,
        };
        best.map(|(_, target)| target)
    }
}

struct Seen<'a> {
    below_soft: Loaded<'a>,
    between: Loaded<'a>,
    at_hard: Loaded<'a>,
    waking: Option<&'a Target>,
    asleep: Option<&'a Target>,
    starting: bool,
    changing: bool,
    failing: bool,
    tried: bool,
    away: bool,
    why_not: Failure,
}

impl<'a> Seen<'a> {
    fn of(targets: &'a [Target], known: &impl Knowledge) -> Seen<'a> {
        let mut seen = Seen {
            below_soft: Loaded::default(),
            between: Loaded::default(),
            at_hard: Loaded::default(),
            waking: None,
            asleep: None,
            starting: false,
            changing: false,
            failing: false,
            tried: false,
            away: false,
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
        match known.reach(machine) {
            Reach::Never => return self.why_not(Failure::Elsewhere),
            Reach::Away if machine.phase == Phase::Gone => return self.why_not(Failure::Unstartable),
            Reach::Away => {
                self.away = true;
                return;
            }
            Reach::Here | Reach::There => {}
        }
        if known.tried(machine) {
            self.tried = true;
            return;
        }
        match machine.phase {
            Phase::Running => self.running(target, known),
            Phase::Asleep(_) | Phase::Starting if known.runs(machine) => self.loaded(target, known),
            Phase::Asleep(rank) if target.service.autostart => {
                if known.waking(machine) {
                    self.waking = self.waking.or(Some(target));
                } else if self.asleep.is_none_or(|best| rank < asleep_rank(best)) {
                    self.asleep = Some(target);
                }
            }
            Phase::Asleep(_) => self.why_not(Failure::Asleep),
            Phase::Starting if target.service.autostart && known.waking(machine) => {
                self.waking = self.waking.or(Some(target))
            }
            Phase::Starting => self.starting = true,
            Phase::Changing => self.changing = true,
            Phase::Ending if target.service.autostart => self.changing = true,
            Phase::Ending => self.why_not(Failure::Asleep),
            Phase::Gone => self.why_not(Failure::Unstartable),
        }
    }

    fn running(&mut self, target: &'a Target, known: &impl Knowledge) {
        let machine = &target.machine;
        if machine.gauge.read().draining || (machine.local && machine.ip4.is_none()) {
            self.changing = true;
        } else if !target.passing && target.service.autostart && known.waking(machine) {
            // Its row came before the end of its wake: it runs and will be ready, another need not be woken.
            self.waking = self.waking.or(Some(target));
        } else if !target.passing {
            self.failing = true;
        } else {
            self.loaded(target, known);
        }
    }

    fn loaded(&mut self, target: &'a Target, known: &impl Knowledge) {
        let load = target.machine.gauge.load(known.now_ms());
        if load < target.service.soft {
            self.below_soft.push(load, target);
        } else if load < target.service.hard {
            self.between.push(load, target);
        } else {
            self.at_hard.push(load, target);
        }
    }

    fn why_not(&mut self, reason: Failure) {
        if reason.worth() > self.why_not.worth() {
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
