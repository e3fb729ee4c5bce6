//! What is in flight on this host's machines, told to the other process while there are two. Each adds the other's share
//! to its own before it compares with a limit; a process that dies has none.

use std::collections::{HashMap, HashSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use pantala_route::gauge::Gauge;

use super::message::{COUNTS_MAX, Message, receive, send};
use crate::shared::Shared;

/// So long both may admit without having heard of each other.
const EVERY: Duration = Duration::from_millis(10);
/// A machine that the other one did not know yet is told again.
const REPEATED_EVERY: Duration = Duration::from_secs(1);

/// Both directions, until the other process ends.
pub fn exchange(shared: Arc<Shared>, socket: Arc<OwnedFd>, mut heard: Heard) -> io::Result<()> {
    let (telling, to) = (shared.clone(), socket.clone());
    let teller = thread::Builder::new().name("counts".to_owned());
    teller.spawn(move || {
        let (mut told, mut at) = (Vec::new(), Instant::now());
        loop {
            let now = own(&telling);
            if now != told || at.elapsed() >= REPEATED_EVERY {
                if tell(&to, &now).is_err() {
                    return; // it has ended, or reads nothing any more
                }
                (told, at) = (now, Instant::now());
            }
            thread::sleep(EVERY);
        }
    })?;
    while let Ok(Some((message, _))) = receive(&socket, None) {
        if let Message::Counts { machines, last } = message {
            heard.take(&shared, machines, last);
        }
    }
    heard.take(&shared, Vec::new(), true);
    // Ends the teller too.
    let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
    Ok(())
}

pub fn own(shared: &Shared) -> Vec<(String, u32)> {
    let view = shared.view();
    let machines = view.snapshot.apps.values().flat_map(|app| &app.machines);
    let busy = machines.filter(|machine| machine.local).filter_map(|machine| {
        let in_flight = machine.gauge.read().in_flight;
        (in_flight > 0).then(|| (machine.id.to_string(), in_flight))
    });
    busy.collect()
}

pub fn tell(socket: &OwnedFd, counts: &[(String, u32)]) -> io::Result<()> {
    let mut chunks = counts.chunks(COUNTS_MAX).peekable();
    loop {
        let machines = chunks.next().unwrap_or_default().to_vec();
        let last = chunks.peek().is_none();
        send(socket, &Message::Counts { machines, last })?;
        if last {
            return Ok(());
        }
    }
}

/// The other's shares.
#[derive(Default)]
pub struct Heard {
    arriving: Vec<(String, u32)>,
    set: HashMap<String, Arc<Gauge>>,
}

impl Heard {
    pub fn take(&mut self, shared: &Shared, machines: Vec<(String, u32)>, last: bool) {
        self.arriving.extend(machines);
        if !last {
            return;
        }
        let told: HashMap<String, u32> = std::mem::take(&mut self.arriving).into_iter().collect();
        let view = shared.view();
        let mut present = HashSet::new();
        for machine in view.snapshot.apps.values().flat_map(|app| &app.machines) {
            if let Some(count) = told.get(&*machine.id) {
                machine.gauge.set_elsewhere(*count);
                present.insert(machine.id.to_string());
                self.set.insert(machine.id.to_string(), machine.gauge.clone());
            }
        }
        self.set.retain(|id, gauge| {
            let there = present.contains(id);
            if !there {
                gauge.set_elsewhere(0);
            }
            there
        });
        shared.queues.stir();
    }
}
