//! What the proxy of a machine's host answers the edge of another host instead of serving: it turns the request away before
//! a byte reached the app, and the edge tries elsewhere. The host judges by its own view, which is the truth about its
//! machines, while the edge's may be older.

use crate::choose::{Choice, Failure, Waiting};
use crate::snapshot::{Machine, Target};

/// How far the receiving proxy may go to serve a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attempt {
    /// the machine runs and has a free slot, or retry elsewhere
    Take,
    /// also wake it
    Wake,
    /// all others refused: wait for a slot
    Queue,
}

impl Attempt {
    pub fn word(self) -> &'static str {
        match self {
            Attempt::Take => "take",
            Attempt::Wake => "wake",
            Attempt::Queue => "queue",
        }
    }

    pub fn of(word: &str) -> Option<Attempt> {
        [Attempt::Take, Attempt::Wake, Attempt::Queue]
            .into_iter()
            .find(|attempt| attempt.word() == word)
    }
}

/// Why a host's proxy did not serve a request. Only after `Died` may a byte have reached the app.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// no such machine on this host, any more or yet
    Unknown,
    Cordoned,
    Draining,
    Full,
    /// it sleeps, and the attempt was not one that wakes
    Asleep,
    /// starting, changing, failing its checks or ended
    Unready,
    /// it could not be woken
    Wake,
    /// the app does not take the connection
    Connect,
    /// the deadline passed
    Late,
    /// the app took the request and did not answer
    Died,
    /// the request of the other proxy was not understood
    Malformed,
}

pub const REASONS: [Reason; 11] = [
    Reason::Unknown,
    Reason::Cordoned,
    Reason::Draining,
    Reason::Full,
    Reason::Asleep,
    Reason::Unready,
    Reason::Wake,
    Reason::Connect,
    Reason::Late,
    Reason::Died,
    Reason::Malformed,
];

impl Reason {
    pub fn word(self) -> &'static str {
        match self {
            Reason::Unknown => "unknown",
            Reason::Cordoned => "cordoned",
            Reason::Draining => "draining",
            Reason::Full => "full",
            Reason::Asleep => "asleep",
            Reason::Unready => "unready",
            Reason::Wake => "wake",
            Reason::Connect => "connect",
            Reason::Late => "late",
            Reason::Died => "died",
            Reason::Malformed => "malformed",
        }
    }

    /// A word of a later version is a refusal all the same.
    pub fn of(word: &str) -> Reason {
        REASONS
            .into_iter()
            .find(|reason| reason.word() == word)
            .unwrap_or(Reason::Unready)
    }
}

/// Judges what [`crate::choose::choose`] said over the machines of this host. `choice`: none while others stand in line
/// before the request. `known`: the machine that was asked for, if it is here. `waking`: a wake of that target is on its way.
/// None: this host goes on with it.
pub fn turn(
    choice: Option<&Choice>,
    attempt: Attempt,
    known: Option<&Machine>,
    waking: impl Fn(&Target) -> bool,
) -> Option<(Reason, &'static str)> {
    let Some(known) = known else {
        return Some((Reason::Unknown, "The machine is no longer on its host."));
    };
    let turned = match choice {
        None | Some(Choice::Queue(_)) if attempt != Attempt::Queue => (Reason::Full, "The machine is at its limit."),
        None | Some(Choice::Use(_) | Choice::Queue(_)) => return None,
        Some(Choice::Wake(target, _)) if attempt == Attempt::Take && !waking(target) => {
            (Reason::Asleep, "The machine went to sleep.")
        }
        Some(Choice::Wake(..)) => return None,
        Some(Choice::Wait(_)) if known.gauge.read().draining => (Reason::Draining, "The machine is being emptied."),
        Some(Choice::Wait(Waiting::Checks)) => (Reason::Unready, "The machine does not pass its health checks."),
        Some(Choice::Wait(_)) => (Reason::Unready, "The machine is starting or changing."),
        Some(Choice::Fail(Failure::Cordoned)) => (Reason::Cordoned, "The machine is cordoned."),
        Some(Choice::Fail(_)) => (
            Reason::Unready,
            "The machine is not in a state from which it can serve.",
        ),
        Some(Choice::Exhausted) => (Reason::Wake, "The machine could not be started."),
    };
    Some(turned)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::gauge::Gauge;
    use crate::intern::Ports;
    use crate::snapshot::{Phase, Service};
    use pantala_wire::feed::{Autostop, Concurrency, ServiceRow};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    fn target() -> Target {
        let machine = Machine {
            id: "m1".into(),
            app: "web".into(),
            region: "iad".into(),
            node: "n1".into(),
            phase: Phase::Running,
            ip4: None,
            cordoned: false,
            ip6: None,
            dns: true,
            group: "".into(),
            metadata: BTreeMap::new(),
            local: true,
            epoch: 0,
            gauge: Arc::new(Gauge::default()),
        };
        let row = ServiceRow {
            app: "web".to_owned(),
            protocol: "tcp".to_owned(),
            internal_port: 80,
            ports: Vec::new(),
            concurrency: Concurrency::default(),
            autostart: true,
            autostop: Autostop::Off,
            min_machines_running: 0,
            checked: false,
            statics: Vec::new(),
        };
        Target {
            machine: Arc::new(machine),
            service: Arc::new(Service::new(row, &mut Ports::default())),
            passing: true,
            h2: false,
        }
    }

    fn reason(choice: Option<&Choice>, attempt: Attempt, waking: bool) -> Option<Reason> {
        turn(choice, attempt, Some(&target().machine), |_| waking).map(|(reason, _)| reason)
    }

    #[test]
    fn only_the_last_attempt_waits_for_a_slot() {
        let full = Choice::Queue(target());
        for attempt in [Attempt::Take, Attempt::Wake] {
            assert_eq!(reason(Some(&full), attempt, false), Some(Reason::Full));
            assert_eq!(
                reason(None, attempt, false),
                Some(Reason::Full),
                "nobody overtakes those in line"
            );
        }
        assert_eq!(reason(Some(&full), Attempt::Queue, false), None);
        assert_eq!(reason(None, Attempt::Queue, false), None);
    }

    #[test]
    fn only_who_may_wake_does() {
        let asleep = Choice::Wake(target(), None);
        assert_eq!(reason(Some(&asleep), Attempt::Take, false), Some(Reason::Asleep));
        assert_eq!(
            reason(Some(&asleep), Attempt::Take, true),
            None,
            "a wake on its way is joined"
        );
        assert_eq!(reason(Some(&asleep), Attempt::Wake, false), None);
        assert_eq!(reason(Some(&asleep), Attempt::Queue, false), None);
    }

    #[test]
    fn what_does_not_serve_is_never_waited_for() {
        for choice in [
            Choice::Wait(Waiting::Start),
            Choice::Wait(Waiting::Change),
            Choice::Wait(Waiting::Checks),
            Choice::Fail(Failure::Unstartable),
            Choice::Fail(Failure::Cordoned),
            Choice::Exhausted,
        ] {
            for attempt in [Attempt::Take, Attempt::Wake, Attempt::Queue] {
                assert!(reason(Some(&choice), attempt, false).is_some(), "{choice:?}");
            }
        }
        assert_eq!(
            turn(None, Attempt::Queue, None, |_| true).map(|(reason, _)| reason),
            Some(Reason::Unknown)
        );
        let target = target();
        target.machine.gauge.drain(None);
        let draining = turn(
            Some(&Choice::Wait(Waiting::Change)),
            Attempt::Take,
            Some(&target.machine),
            |_| false,
        );
        assert_eq!(draining.map(|(reason, _)| reason), Some(Reason::Draining));
    }

    #[test]
    fn every_word_is_read_back() {
        for reason in REASONS {
            assert_eq!(Reason::of(reason.word()), reason);
        }
        assert_eq!(Reason::of("a later word"), Reason::Unready);
        for attempt in [Attempt::Take, Attempt::Wake, Attempt::Queue] {
            assert_eq!(Attempt::of(attempt.word()), Some(attempt));
        }
    }
}
