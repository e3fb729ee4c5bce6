//! Several edges, each with its own view of the load, send to machines whose hosts have the last word: how far limits are
//! kept and how evenly the work is spread. A simulation in virtual milliseconds with a fixed seed.
#![allow(clippy::unwrap_used)] // helpers of tests, which clippy does not see as such

use std::cell::Cell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;
use std::net::IpAddr;
use std::sync::Arc;

use pantala_route::choose::{Choice, Knowledge, Reach, choose};
use pantala_route::gauge::{Gauge, UNLIMITED};
use pantala_route::matching::Matched;
use pantala_route::snapshot::{App, Machine};
use pantala_route::table::Table;
use pantala_wire::feed::FeedRow;
use serde_json::{Value, json};

struct Setup {
    edges: usize,
    machines: usize,
    soft: u32,
    hard: u32,
    /// requests a second, over all edges
    rate: u64,
    /// ms on a machine, from and to
    work: std::ops::Range<u64>,
    one_way_ms: u64,
}

struct Edge {
    app: Arc<App>,
    now_ms: Cell<u64>,
}

impl Knowledge for Edge {
    fn tried(&self, _: &Machine) -> bool {
        false
    }
    fn waking(&self, _: &Machine) -> bool {
        false
    }
    fn reach(&self, _: &Machine) -> Reach {
        Reach::There
    }
    fn distance(&self, _: &str) -> u32 {
        0
    }
    fn now_ms(&self) -> u64 {
        self.now_ms.get()
    }
}

fn edge(setup: &Setup) -> Edge {
    let row = |key: String, value: Value| FeedRow {
        stream: "routes".into(),
        key,
        value: Some((&value).into()),
    };
    let mut rows = vec![
        row("host/web.test".into(), json!({"app": "web"})),
        row("app/web".into(), json!({"app": "web", "org": "o", "network": 1})),
        row(
            "svc/web/d".into(),
            json!({"app": "web", "protocol": "tcp", "internal_port": 1, "ports": [{"port": 80, "handlers": ["http"]}],
                "concurrency": {"type": "requests", "soft_limit": setup.soft, "hard_limit": setup.hard}}),
        ),
    ];
    for index in 0..setup.machines {
        rows.push(row(
            format!("m/m{index}"),
            json!({"id": format!("m{index}"), "app": "web", "region": "iad", "node": format!("w{index}"), "instance_id": "A",
                "generation": 1, "state": "started", "ip4": "", "ip6": "", "services": ["d"], "passing": [true]}),
        ));
    }
    let mut table = Table::new("edge");
    table.apply(1, rows);
    let any: IpAddr = "127.0.0.1".parse().unwrap();
    let Matched::App(app) = table.snapshot().find(any, Some("web.test")) else {
        panic!("no app")
    };
    Edge {
        app,
        now_ms: Cell::new(1),
    }
}

#[derive(Debug, Default)]
struct Seen {
    served: u64,
    /// turned away by a machine's host although the edge thought there was room
    refused: u64,
    /// nobody had room
    queued: u64,
    load_max: u32,
    /// of the difference between the most and the least loaded machine, over all samples
    spread_max: u32,
    spread_sum: u64,
    samples: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Enter {
        edge: usize,
    },
    Arrive {
        edge: usize,
        machine: usize,
    },
    /// the answer's head is back at the edge, with the count of the moment at which it left
    Answered {
        edge: usize,
        machine: usize,
        others: u32,
    },
    Refused {
        edge: usize,
        machine: usize,
        others: u32,
    },
    End {
        edge: usize,
        machine: usize,
    },
    Sample,
}

fn run(setup: &Setup, for_ms: u64) -> Seen {
    fastrand::seed(7);
    let edges: Vec<Edge> = (0..setup.edges).map(|_| edge(setup)).collect();
    let hosts: Vec<Gauge> = (0..setup.machines).map(|_| Gauge::default()).collect();
    let mut of_edge = vec![vec![0u32; setup.machines]; setup.edges];
    let mut seen = Seen::default();
    let mut due = BinaryHeap::new();
    let mut number = 0u64; // of two at one moment the first said
    let mut at = |due: &mut BinaryHeap<_>, ms: u64, what: What| {
        number += 1;
        due.push(Reverse((ms, number, what)));
    };
    for request in 0..setup.rate * for_ms / 1000 {
        let edge = fastrand::usize(..setup.edges);
        at(&mut due, 1 + request * 1000 / setup.rate, What::Enter { edge });
    }
    (for_ms / 4..for_ms)
        .step_by(5)
        .for_each(|ms| at(&mut due, ms, What::Sample));
    while let Some(Reverse((now_ms, _, what))) = due.pop() {
        let gauge = |edge: usize, machine: usize| {
            let own = &edges[edge].app.machines;
            own.iter()
                .find(|one| *one.id == format!("m{machine}"))
                .unwrap()
                .gauge
                .clone()
        };
        match what {
            What::Enter { edge } => {
                let one = &edges[edge];
                one.now_ms.set(now_ms);
                match choose(&one.app.offer(80).unwrap().targets, one) {
                    Choice::Use(target) => {
                        assert!(target.machine.gauge.acquire(UNLIMITED));
                        let machine = target.machine.id[1..].parse().unwrap();
                        at(&mut due, now_ms + setup.one_way_ms, What::Arrive { edge, machine });
                    }
                    Choice::Queue(_) => {
                        seen.queued += 1;
                        at(&mut due, now_ms + 20, What::Enter { edge });
                    }
                    other => panic!("{other:?}"),
                }
            }
            What::Arrive { edge, machine } => {
                let taken = hosts[machine].acquire(setup.hard);
                of_edge[edge][machine] += u32::from(taken);
                let others = hosts[machine].read().in_flight - of_edge[edge][machine];
                let back = now_ms + setup.one_way_ms;
                if taken {
                    let done = now_ms + fastrand::u64(setup.work.clone());
                    at(&mut due, back, What::Answered { edge, machine, others });
                    at(&mut due, done, What::End { edge, machine });
                } else {
                    at(&mut due, back, What::Refused { edge, machine, others });
                }
            }
            What::Answered { edge, machine, others } => gauge(edge, machine).report(others, now_ms),
            What::Refused { edge, machine, others } => {
                seen.refused += 1;
                let gauge = gauge(edge, machine);
                gauge.report_full(others.max(setup.hard), now_ms);
                gauge.release(now_ms);
                at(&mut due, now_ms, What::Enter { edge });
            }
            What::End { edge, machine } => {
                seen.served += 1;
                of_edge[edge][machine] -= 1;
                hosts[machine].release(now_ms);
                gauge(edge, machine).release(now_ms);
            }
            What::Sample => {
                let loads: Vec<u32> = hosts.iter().map(|host| host.read().in_flight).collect();
                let (least, most) = (*loads.iter().min().unwrap(), *loads.iter().max().unwrap());
                assert!(most <= setup.hard, "above the hard limit");
                seen.load_max = seen.load_max.max(most);
                seen.spread_max = seen.spread_max.max(most - least);
                seen.spread_sum += u64::from(most - least);
                seen.samples += 1;
            }
        }
    }
    seen
}

impl Seen {
    fn spread_mean(&self) -> f64 {
        self.spread_sum as f64 / self.samples as f64
    }
}

#[test]
fn one_edge_spreads_exactly() {
    let setup = Setup {
        edges: 1,
        machines: 6,
        soft: 20,
        hard: 25,
        rate: 1000,
        work: 20..80,
        one_way_ms: 0,
    };
    let seen = run(&setup, 4_000);
    println!("{seen:?}");
    assert_eq!((seen.served, seen.refused, seen.queued), (4_000, 0, 0));
    assert!(seen.spread_mean() <= 2.0 && seen.spread_max <= 5, "{seen:?}");
}

#[test]
fn low_concurrency_does_not_stick_to_one_machine() {
    let setup = Setup {
        edges: 4,
        machines: 4,
        soft: 20,
        hard: 25,
        rate: 100,
        work: 20..40,
        one_way_ms: 1,
    };
    let seen = run(&setup, 10_000);
    println!("{seen:?}");
    // three at a time on four machines: hardly ever two on one while another idles
    assert!(seen.load_max <= 4 && seen.spread_mean() <= 1.6, "{seen:?}");
}

#[test]
fn several_edges_keep_limits_and_spread() {
    // Drawn at random the mean spread were about 6, 10, 10, 10 and 13.
    for (edges, machines, spread) in [(2, 3, 2.7), (4, 8, 5.2), (8, 8, 6.8), (16, 8, 8.5), (4, 20, 10.0)] {
        let setup = Setup {
            edges,
            machines,
            soft: 20,
            hard: 25,
            // about half of the hard limit
            rate: 250 * machines as u64,
            work: 25..75,
            one_way_ms: 2,
        };
        let seen = run(&setup, 4_000);
        println!("{edges} edges, {machines} machines: {:.2} {seen:?}", seen.spread_mean());
        assert_eq!(seen.served, setup.rate * 4);
        assert!(seen.spread_max < setup.hard, "one idle while another is full: {seen:?}");
        assert!(seen.spread_mean() <= spread, "{seen:?}");
        assert!(seen.refused <= seen.served / 100, "{seen:?}");
    }
}

#[test]
fn more_than_fits_waits_and_overshoots_nothing() {
    let setup = Setup {
        edges: 8,
        machines: 4,
        soft: 4,
        hard: 5,
        rate: 500,
        work: 30..50,
        one_way_ms: 3,
    };
    // twenty slots of 40 ms serve 500 a second at best
    let seen = run(&setup, 4_000);
    println!("{seen:?}");
    assert_eq!(seen.load_max, setup.hard);
    assert_eq!(seen.served, 2_000, "all of them in the end");
}
