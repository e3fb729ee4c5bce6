//! Which machine serves a request, or what has to happen first (Fly Proxy's documented load balancing and autostart): regions
//! from the nearest to the farthest, each judged by [`crate::within`]. The answer is a proposal: the caller takes the slot with
//! [`Gauge::acquire`](crate::gauge::Gauge::acquire), or from the machine's host, and asks again when it lost the race.
//!
//! A running machine farther away does not spare a sleeping one near by its wake: by the documented load balancing traffic
//! leaves a region only when every machine there is unhealthy or at its hard limit, which a sleeping one is not, and by the
//! documented autostart one in the nearest region is started for a request that finds none running there below its soft
//! limit. The farther one helps out when the wake fails. What starts, changes or fails its checks near by is not waited for
//! while another region serves.

use std::sync::Arc;

use crate::snapshot::{App, Machine, Target};
use crate::within::within;

#[derive(Clone, Debug)]
pub enum Choice {
    Use(Target),
    /// Ask for this machine (once, however many wait). `meanwhile` serves when the wake fails.
    Wake(Target, Option<Target>),
    /// All are at their hard limit; this one is the nearest to wait at.
    Queue(Target),
    /// Nothing serves at this moment, something will without our doing: look again when rows change.
    Wait(Waiting),
    /// Every machine that could serve was tried by this request.
    Exhausted,
    Fail(Failure),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Waiting {
    /// a machine starts by itself
    Start,
    /// a machine changes, ends or drains
    Change,
    /// machines run and fail their checks
    Checks,
    /// the hosts of all machines do not answer at this moment
    Away,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    NoMachines,
    /// all machines are on hosts that this proxy has no way to
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

    /// The most hopeful reason is the one worth telling.
    pub(crate) fn worth(self) -> u8 {
        match self {
            Failure::NoMachines => 0,
            Failure::Elsewhere => 1,
            Failure::Unstartable => 2,
            Failure::Cordoned => 3,
            Failure::Asleep => 4,
        }
    }
}

/// How a machine's host is reached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reach {
    /// it is this host
    Here,
    /// through the proxy of its host
    There,
    /// its host does not answer at this moment
    Away,
    /// this proxy has no way to its host
    Never,
}

/// What one request knows beside the snapshot.
pub trait Knowledge {
    /// this request tried the machine and it failed
    fn tried(&self, machine: &Machine) -> bool;
    /// a wake of the machine is on its way
    fn waking(&self, machine: &Machine) -> bool;
    /// its host said, newer than its row, that it runs: it was at its limit when this request came
    fn runs(&self, _machine: &Machine) -> bool {
        false
    }
    fn reach(&self, machine: &Machine) -> Reach;
    /// measured round trip in µs; 0 for the own region, the largest where nothing is measured yet
    fn distance(&self, region: &str) -> u32;
    /// clock of the gauges
    fn now_ms(&self) -> u64;
}

/// Targets of one region stand together, as in [`crate::snapshot::Offer`].
pub fn choose(targets: &[Target], known: &impl Knowledge) -> Choice {
    let one_region = targets.first().map(region) == targets.last().map(region);
    if one_region {
        return within(targets, known);
    }
    let mut verdict = Verdict::default();
    for targets in nearest_first(targets, known) {
        if let Some(choice) = verdict.hear(within(targets, known)) {
            return choice;
        }
    }
    verdict.last()
}

fn region(target: &Target) -> &str {
    &target.machine.region
}

fn nearest_first<'a>(targets: &'a [Target], known: &impl Knowledge) -> Vec<&'a [Target]> {
    let mut regions: Vec<(u32, &[Target])> = targets
        .chunk_by(|a, b| region(a) == region(b))
        .map(|targets| (known.distance(region(&targets[0])), targets))
        .collect();
    regions.sort_by_key(|(distance, _)| *distance);
    regions.into_iter().map(|(_, targets)| targets).collect()
}

/// What the regions said so far, from the nearest on; of each kind the first.
#[derive(Default)]
struct Verdict {
    wake: Option<Target>,
    queue: Option<Target>,
    /// a machine starts nearer than `wake` is
    starts_nearer: bool,
    wait: Option<Waiting>,
    exhausted: bool,
    failure: Option<Failure>,
}

impl Verdict {
    /// Answers once nothing farther away could change it.
    fn hear(&mut self, choice: Choice) -> Option<Choice> {
        match choice {
            Choice::Use(target) => {
                return Some(match self.wake.take() {
                    Some(wake) if !self.starts_nearer => Choice::Wake(wake, Some(target)),
                    _ => Choice::Use(target),
                });
            }
            Choice::Wake(target, Some(meanwhile)) if self.wake.is_none() => {
                return Some(Choice::Wake(target, Some(meanwhile)));
            }
            Choice::Wake(target, meanwhile) => match (self.wake.take(), meanwhile) {
                (Some(nearer), Some(meanwhile)) => return Some(Choice::Wake(nearer, Some(meanwhile))),
                (nearer, _) => self.wake = nearer.or(Some(target)),
            },
            Choice::Queue(target) => drop(self.queue.get_or_insert(target)),
            Choice::Wait(why) => {
                self.starts_nearer |= why == Waiting::Start && self.wake.is_none();
                let worth = |why| match why {
                    Waiting::Start => 3,
                    Waiting::Change => 2,
                    Waiting::Checks => 1,
                    Waiting::Away => 0,
                };
                if self.wait.is_none_or(|known| worth(why) > worth(known)) {
                    self.wait = Some(why);
                }
            }
            Choice::Exhausted => self.exhausted = true,
            Choice::Fail(why) => {
                if self.failure.is_none_or(|known| why.worth() > known.worth()) {
                    self.failure = Some(why);
                }
            }
        }
        None
    }

    /// No region has a machine that serves at once.
    fn last(self) -> Choice {
        let sleeps_on = self.starts_nearer && self.queue.is_none();
        match (self.wake, self.queue, self.wait) {
            (Some(wake), _, _) if !sleeps_on => Choice::Wake(wake, None),
            (_, Some(target), _) => Choice::Queue(target),
            (_, _, Some(Waiting::Checks | Waiting::Away)) if self.exhausted => Choice::Exhausted,
            (_, _, Some(why)) => Choice::Wait(why),
            _ if self.exhausted => Choice::Exhausted,
            _ => Choice::Fail(self.failure.unwrap_or(Failure::NoMachines)),
        }
    }
}

/// A machine of the app, for frames that name only its id.
pub fn machine<'a>(app: &'a App, id: &str) -> Option<&'a Arc<Machine>> {
    let at = app.machines.binary_search_by(|machine| (*machine.id).cmp(id)).ok()?;
    app.machines.get(at)
}
