//! What is in flight on this host's machines, told to the other process while there are two. Each adds the other's share
//! to its own; a process that dies has none. Only the newest one gives places (`asking`, `lending`), so an old one's share
//! becomes smaller only, and a limit holds however late it is told.

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use pantala_route::gauge::Gauge;
use pantala_route::snapshot::Snapshot;

use super::message::{COUNTS_MAX, Message, receive, send};
use crate::shared::Shared;

const EVERY: Duration = Duration::from_millis(10);
/// A machine that the other one did not know yet is told again.
const REPEATED_EVERY: Duration = Duration::from_secs(1);

/// There may be several processes at once, each with the next one beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    Older,
    Newer,
}

impl Side {
    fn opposite(self) -> Side {
        match self {
            Side::Older => Side::Newer,
            Side::Newer => Side::Older,
        }
    }
}

/// By machine.
pub type Shares = Vec<(String, u32)>;

/// Both directions, until the other process ends. `words`: what else is to be said to it; `hear`: what else it says.
pub fn exchange(
    shared: &Arc<Shared>,
    with: Side,
    socket: Arc<OwnedFd>,
    words: Receiver<Message>,
    mut hear: impl FnMut(Message),
) -> io::Result<()> {
    let (telling, to) = (shared.clone(), socket.clone());
    let teller = thread::Builder::new().name("counts".to_owned());
    // Ends when the other one has ended, or reads nothing any more.
    teller.spawn(move || tell_all(&telling, with, &to, &words))?;
    while let Ok(Some((message, _))) = receive(&socket, None) {
        match message {
            Message::Counts { machines, last } => shared.beside.take(shared, with, machines, last),
            other => hear(other),
        }
    }
    shared.beside.take(shared, with, Vec::new(), true);
    // Ends the teller too.
    let _ = rustix::net::shutdown(&*socket, rustix::net::Shutdown::Both);
    Ok(())
}

fn tell_all(shared: &Shared, with: Side, to: &OwnedFd, words: &Receiver<Message>) -> io::Result<()> {
    let (mut told, mut at) = (Vec::new(), Instant::now());
    let mut look = Instant::now();
    loop {
        match words.recv_timeout(look.saturating_duration_since(Instant::now())) {
            Ok(word) => send(to, &word)?,
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => thread::sleep(EVERY),
        }
        if Instant::now() < look {
            continue;
        }
        look = Instant::now() + EVERY;
        let now = share(shared, with);
        if now != told || at.elapsed() >= REPEATED_EVERY {
            tell(to, &now)?;
            (told, at) = (now, Instant::now());
        }
    }
}

/// What this process has in flight, with those on its far side.
pub fn share(shared: &Shared, with: Side) -> Shares {
    // First the others: a place that passes from one to the other is counted twice rather than not at all.
    let others = shared.beside.shares(with.opposite());
    let view = shared.view();
    let machines = view.snapshot.apps.values().flat_map(|app| &app.machines);
    let busy = machines.filter(|machine| machine.local).filter_map(|machine| {
        let in_flight = machine.gauge.read().in_flight + others.get(&*machine.id).copied().unwrap_or(0);
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

/// What older and newer processes have in flight. A machine that the view does not have yet gets their shares before any
/// request sees it.
#[derive(Default)]
pub struct Beside(Mutex<Heard>);

#[derive(Default)]
struct Heard {
    arriving: [Shares; 2],
    told: [HashMap<String, u32>; 2],
    set: HashMap<String, Arc<Gauge>>,
}

impl Heard {
    fn settle(&mut self, snapshot: &Snapshot) {
        let before = std::mem::take(&mut self.set);
        for machine in snapshot.apps.values().flat_map(|app| &app.machines) {
            let share: u32 = self.told.iter().filter_map(|told| told.get(&*machine.id)).sum();
            if share > 0 {
                machine.gauge.set_elsewhere(share);
                self.set.insert(machine.id.to_string(), machine.gauge.clone());
            }
        }
        let gone = before.into_iter().filter(|(id, _)| !self.set.contains_key(id));
        gone.for_each(|(_, gauge)| gauge.set_elsewhere(0));
    }
}

impl Beside {
    fn heard(&self) -> MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What processes on that side have in flight.
    fn shares(&self, of: Side) -> HashMap<String, u32> {
        self.heard().told[of as usize].clone()
    }

    pub fn take(&self, shared: &Shared, from: Side, machines: Shares, last: bool) {
        let mut heard = self.heard();
        heard.arriving[from as usize].extend(machines);
        if !last {
            return;
        }
        let arrived = std::mem::take(&mut heard.arriving[from as usize]);
        heard.told[from as usize] = arrived.into_iter().collect();
        heard.settle(&shared.view().snapshot);
        drop(heard);
        shared.queues.stir();
    }

    /// `publish` shows a snapshot before it makes it the view.
    pub fn publish<R>(&self, publish: impl FnOnce(&mut dyn FnMut(&Snapshot)) -> R) -> R {
        let mut heard = self.heard();
        let any = heard.told.iter().any(|told| !told.is_empty());
        publish(&mut |snapshot| {
            if any {
                heard.settle(snapshot);
            }
        })
    }
}
