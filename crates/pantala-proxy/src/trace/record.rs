//! What is kept of one try of a request: a fixed size, no text of its own.

use std::sync::Arc;

use pantala_route::retry::Fault;
use pantala_route::snapshot::Machine;
use pantala_route::turn::Reason;
use pantala_wire::feed::{TraceRecord, TraceRole};

use crate::ids::Ulid;
use crate::timing::Waited;

/// Of `body_us`: the answer is still on its way.
const UNDER_WAY: u32 = u32::MAX;

/// Where a request was: with the proxy that its client reached, or with that of the machine's host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Edge,
    Worker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// by the machine, or by this proxy where none was asked
    Answered,
    Failed(Fault),
    /// the machine's host did not take it
    Turned(Reason),
    /// the end of a request that nobody answered
    Refused,
}

/// Whom it was about, without a copy of a name that others keep anyway.
#[derive(Clone, Debug)]
pub enum Who {
    Nobody,
    App(Arc<str>),
    Machine(Arc<Machine>),
}

#[derive(Clone, Debug)]
pub struct Record {
    pub id: Ulid,
    pub who: Who,
    pub role: Role,
    pub outcome: Outcome,
    /// one of Fly Proxy's error codes, or empty
    pub code: &'static str,
    /// when the request came, after the start of this process
    pub began_us: u64,
    /// from then to this try
    pub from_us: u32,
    /// until a machine had a slot for it, and what of it were waits
    pub choose_us: u32,
    pub waited: Waited,
    pub connect_us: u32,
    /// from the request's last head byte to the answer's
    pub answer_us: u32,
    pub body_us: u32,
    pub status: u16,
    /// 1 for the first; 0 for what is about the request as a whole
    pub attempt: u8,
    pub replays: u8,
    /// a kept connection
    pub reused: bool,
    /// the answer ended before its end
    pub cut: bool,
}

impl Record {
    pub fn new(id: Ulid, role: Role, outcome: Outcome, who: Who) -> Record {
        Record {
            id,
            who,
            role,
            outcome,
            code: "",
            began_us: 0,
            from_us: 0,
            choose_us: 0,
            waited: Waited::default(),
            connect_us: 0,
            answer_us: 0,
            body_us: UNDER_WAY,
            status: 0,
            attempt: 0,
            replays: 0,
            reused: false,
            cut: false,
        }
    }

    /// When it was written, after the start of this process.
    pub fn at_us(&self) -> u64 {
        let parts = [self.from_us, self.choose_us, self.connect_us, self.answer_us];
        self.began_us + parts.map(u64::from).iter().sum::<u64>()
    }

    pub fn ended(&mut self, body_us: u32, cut: bool) {
        (self.body_us, self.cut) = (body_us.min(UNDER_WAY - 1), cut);
    }

    /// For others; `started_us`: when this process did, after 1970.
    pub fn shown(&self, started_us: u64) -> TraceRecord {
        let (app, machine, node, region) = match &self.who {
            Who::Nobody => ("", "", "", ""),
            Who::App(app) => (&**app, "", "", ""),
            Who::Machine(machine) => (&*machine.app, &*machine.id, &*machine.node, &*machine.region),
        };
        let (outcome, reason) = match self.outcome {
            Outcome::Answered => ("answered", ""),
            Outcome::Failed(fault) => ("failed", word(fault)),
            Outcome::Turned(reason) => ("turned", reason.word()),
            Outcome::Refused => ("refused", ""),
        };
        TraceRecord {
            role: match self.role {
                Role::Edge => TraceRole::Edge,
                Role::Worker => TraceRole::Worker,
            },
            outcome: outcome.to_owned(),
            reason: reason.to_owned(),
            code: self.code.to_owned(),
            status: self.status,
            app: app.to_owned(),
            machine: machine.to_owned(),
            node: node.to_owned(),
            region: region.to_owned(),
            began_us: started_us + self.began_us,
            attempt: self.attempt,
            replays: self.replays,
            from_us: self.from_us,
            choose_us: self.choose_us,
            waited_us: self.waited.by_word().map(|(word, us)| (word.to_owned(), us)).collect(),
            connect_us: self.connect_us,
            reused: self.reused,
            answer_us: self.answer_us,
            body_us: (self.outcome == Outcome::Answered && self.body_us < UNDER_WAY).then_some(self.body_us),
            cut: self.cut,
        }
    }
}

fn word(fault: Fault) -> &'static str {
    match fault {
        Fault::Connect => "connect",
        Fault::NotSent => "not_sent",
        Fault::Stale => "stale",
        Fault::Turned => "turned",
        Fault::Died => "died",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RequestId;

    /// Two lines of a cache: tens of thousands are kept, and each request writes one.
    #[test]
    fn a_record_is_small() {
        assert!(size_of::<Record>() <= 128, "{}", size_of::<Record>());
    }

    #[test]
    fn an_answer_under_way_has_no_end_yet() {
        let id = RequestId::new("iad").ulid;
        let mut record = Record::new(id, Role::Worker, Outcome::Answered, Who::App("web".into()));
        (record.began_us, record.from_us, record.answer_us) = (5, 10, 100);
        assert_eq!(record.at_us(), 115);
        let shown = record.shown(1_000);
        assert_eq!((shown.began_us, shown.body_us, &*shown.app), (1_005, None, "web"));
        record.ended(u32::MAX, true);
        assert_eq!(record.shown(0).body_us, Some(u32::MAX - 1));
        record.ended(0, false);
        assert_eq!((record.shown(0).body_us, record.shown(0).cut), (Some(0), false));
    }

    #[test]
    fn a_try_that_failed_says_why() {
        let id = RequestId::new("iad").ulid;
        let of = |outcome| {
            let shown = Record::new(id, Role::Edge, outcome, Who::Nobody).shown(0);
            (shown.outcome, shown.reason)
        };
        let pair = |outcome: &str, reason: &str| (outcome.to_owned(), reason.to_owned());
        assert_eq!(of(Outcome::Failed(Fault::Connect)), pair("failed", "connect"));
        assert_eq!(of(Outcome::Turned(Reason::Full)), pair("turned", "full"));
        assert_eq!(of(Outcome::Refused), pair("refused", ""));
    }
}
