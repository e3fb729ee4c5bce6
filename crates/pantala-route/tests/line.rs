//! The line of an app under arrivals, releases, changes of the view and people who leave: no place is idle while somebody in
//! line may use it, nobody overtakes, no limit is passed, everybody is served in the end.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::cell::Cell;
use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;

use pantala_route::choose::{Choice, Knowledge, Reach, choose, machine};
use pantala_route::line::{Calls, Condition, Line, Ticket, in_turn};
use pantala_route::prefer::Wishes;
use pantala_route::snapshot::{App, Machine};
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use proptest::prelude::*;
use serde_json::{Value, json};

const NOW_MS: u64 = 1_000;
/// Two services that share machines, with limits of their own.
const HARDS: [u32; 2] = [2, 3];

#[derive(Clone, Copy, Debug)]
enum Step {
    /// a request of that kind
    Arrive(usize),
    Release(prop::sample::Index),
    /// one of those called gets to look
    Look(prop::sample::Index),
    /// a client goes away
    Leave(prop::sample::Index),
    /// in or out of rotation
    Turn(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0..KINDS).prop_map(Step::Arrive),
        4 => any::<prop::sample::Index>().prop_map(Step::Release),
        4 => any::<prop::sample::Index>().prop_map(Step::Look),
        1 => any::<prop::sample::Index>().prop_map(Step::Leave),
        1 => (0..MACHINES.len()).prop_map(Step::Turn),
    ]
}

const KINDS: usize = 7;
/// id, region, its services
const MACHINES: [(&str, &str, &[&str]); 4] = [
    ("a", "iad", &["d0"]),
    ("b", "iad", &["d0", "d1"]),
    ("c", "lhr", &["d0", "d1"]),
    ("d", "lhr", &["d1"]),
];

fn condition(kind: usize) -> Condition {
    let wished = |wishes| Condition {
        port: 80,
        wishes,
        ..Condition::default()
    };
    match kind {
        0 => wished(Wishes::default()),
        1 => wished(Wishes {
            force_instance: Some("a".into()),
            ..Wishes::default()
        }),
        2 => wished(Wishes {
            force_region: vec!["lhr".into()],
            ..Wishes::default()
        }),
        3 => wished(Wishes {
            exclude: Some("b".into()),
            ..Wishes::default()
        }),
        4 => Condition {
            port: 81,
            ..Condition::default()
        },
        5 => Condition {
            port: 81,
            here: true,
            only: Some("b".into()),
            ..Condition::default()
        },
        _ => Condition {
            port: 80,
            tried: vec!["a".into(), "c".into()],
            ..Condition::default()
        },
    }
}

struct Client<'a>(&'a Condition);

impl Knowledge for Client<'_> {
    fn tried(&self, machine: &Machine) -> bool {
        self.0.tried.contains(&machine.id)
    }
    fn waking(&self, _: &Machine) -> bool {
        false
    }
    fn reach(&self, _: &Machine) -> Reach {
        Reach::Here
    }
    fn distance(&self, region: &str) -> u32 {
        u32::from(region != "iad")
    }
    fn now_ms(&self) -> u64 {
        NOW_MS
    }
}

struct Waiter {
    condition: Condition,
    ticket: Ticket,
    called: Rc<Cell<bool>>,
    heeded: Calls,
}

struct World {
    table: Table,
    app: Arc<App>,
    cordoned: [bool; MACHINES.len()],
    line: Line<Rc<Cell<bool>>>,
    /// by arrival
    waiting: BTreeMap<u64, Waiter>,
    arrivals: u64,
    held: Vec<Arc<Machine>>,
    served: Vec<u64>,
}

fn row(key: String, value: Value) -> FeedRow {
    FeedRow {
        stream: "routes".into(),
        key,
        value: Some((&value).into()),
    }
}

fn machine_row(at: usize, cordoned: bool) -> FeedRow {
    let (id, region, services) = MACHINES[at];
    let value = json!({"id": id, "app": "web", "region": region, "node": "n1", "instance_id": "A", "generation": 1,
        "state": "started", "ip4": "127.0.0.1", "ip6": "", "services": services, "passing": vec![true; services.len()],
        "cordoned": cordoned});
    row(format!("m/{id}"), value)
}

impl World {
    fn new() -> World {
        let mut table = Table::new("n1");
        let mut rows = vec![row("app/web".into(), json!({"app": "web", "org": "o", "network": 1}))];
        for (at, hard) in HARDS.into_iter().enumerate() {
            let value = json!({"app": "web", "protocol": "tcp", "internal_port": 1, "ports": [{"port": 80 + at}],
                "concurrency": {"type": "requests", "soft_limit": 1, "hard_limit": hard}});
            rows.push(row(format!("svc/web/d{at}"), value));
        }
        rows.extend((0..MACHINES.len()).map(|at| machine_row(at, false)));
        table.apply(1, rows);
        assert_eq!(table.set_aside().count(), 0);
        let app = table.snapshot().apps.get("web").unwrap().clone();
        World {
            table,
            app,
            cordoned: [false; MACHINES.len()],
            line: Line::default(),
            waiting: BTreeMap::new(),
            arrivals: 0,
            held: Vec::new(),
            served: Vec::new(),
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Arrive(kind) => self.arrive(condition(kind)),
            Step::Release(which) if !self.held.is_empty() => {
                let machine = self.held.swap_remove(which.index(self.held.len()));
                machine.gauge.release(NOW_MS);
                self.call(&machine.id.clone(), None);
            }
            Step::Look(which) => {
                let called = self.called();
                if !called.is_empty() {
                    self.look(called[which.index(called.len())]);
                }
            }
            Step::Leave(which) if !self.waiting.is_empty() => {
                let waiting: Vec<u64> = self.waiting.keys().copied().collect();
                self.leave(waiting[which.index(waiting.len())]);
            }
            Step::Turn(at) => {
                self.cordoned[at] = !self.cordoned[at];
                self.table.apply(2, vec![machine_row(at, self.cordoned[at])]);
                self.app = self.table.snapshot().apps.get("web").unwrap().clone();
                self.line.stir().for_each(|called| called.set(true));
            }
            Step::Release(_) | Step::Leave(_) => {}
        }
    }

    fn called(&self) -> Vec<u64> {
        let called = self.waiting.iter().filter(|(_, waiter)| waiter.called.get());
        called.map(|(arrival, _)| *arrival).collect()
    }

    fn call(&mut self, id: &Arc<str>, after: Option<&Ticket>) {
        let machine = machine(&self.app, id).unwrap();
        let fits = |condition: &Condition| condition.fits(&self.app, machine, NOW_MS);
        if let Some(called) = self.line.call(id, after, fits) {
            called.set(true);
        }
    }

    fn arrive(&mut self, condition: Condition) {
        self.arrivals += 1;
        let arrival = self.arrivals;
        if self.take(arrival, &condition, None) {
            return;
        }
        let called = Rc::new(Cell::new(true)); // whoever joins looks once more
        let ticket = self.line.join(condition.clone(), called.clone());
        let waiter = Waiter {
            condition,
            ticket,
            called,
            heeded: Calls::default(),
        };
        self.waiting.insert(arrival, waiter);
    }

    fn look(&mut self, arrival: u64) {
        let waiter = self.waiting.get_mut(&arrival).unwrap();
        waiter.called.set(false);
        waiter.heeded.add(self.line.heed(&waiter.ticket));
        let (condition, ticket) = (waiter.condition.clone(), waiter.ticket.clone());
        if self.take(arrival, &condition, Some(&ticket)) {
            return self.leave(arrival);
        }
        let heeded = std::mem::take(&mut self.waiting.get_mut(&arrival).unwrap().heeded);
        heeded.machines.iter().for_each(|id| self.call(id, Some(&ticket)));
    }

    /// What the proxy does with a choice: places are taken or waited for.
    fn take(&mut self, arrival: u64, condition: &Condition, ticket: Option<&Ticket>) -> bool {
        let before = self.line.before(ticket);
        let offer = self.app.offer(condition.port).unwrap();
        let known = Client(condition);
        let chosen = in_turn(&self.app, condition.port, &offer.targets, &before, NOW_MS, |targets| {
            let only: Vec<_> = targets
                .iter()
                .filter(|target| condition.only.as_ref().is_none_or(|only| *only == target.machine.id))
                .cloned()
                .collect();
            match condition.only {
                Some(_) => Ok(choose(&only, &known)),
                None => condition.wishes.choose(targets, &known).choice.ok_or(()),
            }
        });
        let Ok(Some(Choice::Use(target))) = chosen else {
            return false;
        };
        for (earlier, waiter) in self.waiting.range(..arrival) {
            let overtaken = waiter.condition.fits(&self.app, &target.machine, NOW_MS);
            assert!(!overtaken, "{arrival} overtakes {earlier} at {}", target.machine.id);
        }
        assert!(target.machine.gauge.acquire(target.service.hard));
        self.held.push(target.machine.clone());
        self.served.push(arrival);
        true
    }

    fn leave(&mut self, arrival: u64) {
        let waiter = self.waiting.remove(&arrival).unwrap();
        let mut calls = waiter.heeded;
        calls.add(self.line.leave(&waiter.ticket));
        if calls.all {
            self.line.stir().for_each(|called| called.set(true));
        }
        calls.machines.iter().for_each(|id| self.call(id, None));
    }

    /// All who were called look.
    fn settle(&mut self) {
        let mut looks = 0;
        while let Some(arrival) = self.called().first().copied() {
            self.look(arrival);
            looks += 1;
            assert!(looks < 100_000, "they call each other for ever");
        }
        assert_eq!(self.line.is_empty(), self.waiting.is_empty());
        for machine in &self.app.machines {
            assert!(machine.gauge.read().in_flight <= HARDS[1]);
            for (arrival, waiter) in &self.waiting {
                let idle = waiter.condition.fits(&self.app, machine, NOW_MS);
                assert!(!idle, "{arrival} waits for {} although it has room", machine.id);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1024))]

    #[test]
    fn no_place_is_idle_nobody_overtakes_and_everybody_is_served(steps in prop::collection::vec(step(), 1..120), every in 1usize..9) {
        let mut world = World::new();
        for (at, step) in steps.into_iter().enumerate() {
            world.step(step);
            if at % every == 0 {
                world.settle();
            }
        }
        for at in 0..MACHINES.len() {
            if world.cordoned[at] {
                world.step(Step::Turn(at));
            }
        }
        world.settle();
        while let Some(machine) = world.held.pop() {
            machine.gauge.release(NOW_MS);
            world.call(&machine.id.clone(), None);
            world.settle();
        }
        prop_assert_eq!(world.waiting.len(), 0);
    }
}

#[test]
fn who_wants_one_machine_alone_holds_up_nobody() {
    let mut world = World::new();
    let (any, only_a) = (condition(0), condition(1));
    for _ in 0..6 {
        world.arrive(any.clone()); // two on each of a, b, c
    }
    world.arrive(only_a.clone());
    world.arrive(any);
    world.arrive(only_a);
    world.settle();
    let at = |world: &World, id: &str| world.held.iter().position(|machine| &*machine.id == id).unwrap();
    for (freed, wanted) in [("b", 8), ("a", 7), ("a", 9)] {
        let machine = world.held.remove(at(&world, freed));
        machine.gauge.release(NOW_MS);
        world.call(&machine.id.clone(), None);
        world.settle();
        assert_eq!(world.served.last(), Some(&wanted), "{freed}");
    }
}

#[test]
fn whoever_cannot_use_a_place_after_all_is_passed_by() {
    let mut line = Line::default();
    let tickets: Vec<_> = (0..3).map(|kind| line.join(condition(kind), kind)).collect();
    let id: Arc<str> = "a".into();
    let anybody = |_: &Condition| true;
    assert_eq!(line.call(&id, None, anybody), Some(&0));
    assert_eq!(line.call(&id, Some(&tickets[0]), anybody), Some(&1));
    assert_eq!(line.call(&id, Some(&tickets[1]), |_| false), None);
    assert_eq!(line.heed(&tickets[1]).machines, std::slice::from_ref(&id));
    assert_eq!(line.leave(&tickets[1]), Calls::default());
    assert_eq!(line.call(&id, Some(&tickets[2]), anybody), None);
    assert_eq!(line.leave(&tickets[0]).machines, [id]);
}
