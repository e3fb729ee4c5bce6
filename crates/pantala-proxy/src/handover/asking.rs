//! The replaced process's end of one rule: once the new process serves, it alone gives places on this host's machines. What
//! still arrives on connections of the old one asks it, over the socket of the hand-over, and stands in its line.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pantala_route::gauge::Gauge;
use pantala_route::turn::Reason;
use tokio::sync::oneshot;

use super::message::{Message, Want};
use crate::shared::Shared;

#[derive(Default)]
pub struct Asking {
    /// nearly always false, and then a request pays one load
    asks: AtomicBool,
    last: AtomicU64,
    inner: Mutex<Inner>,
}

#[derive(Default)]
struct Inner {
    voice: Option<Sender<Message>>,
    /// grows with each other process
    round: u64,
    waiting: HashMap<u64, oneshot::Sender<Answer>>,
    /// in use here and counted there
    lent: HashMap<u64, Arc<Gauge>>,
    /// those whose places the new process gives
    gauges: Vec<Arc<Gauge>>,
}

pub enum Answer {
    /// on that machine, which may be another one than was asked for
    Granted(Granted, String),
    Denied {
        reason: Reason,
        happened: String,
        in_flight: u32,
    },
}

impl Asking {
    pub fn asks(&self) -> bool {
        self.asks.load(SeqCst)
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sent when this returns, in order. None: the other process is gone, and this one decides again.
    pub fn ask(self: &Arc<Asking>, want: Want) -> Option<Asked> {
        let id = self.last.fetch_add(1, SeqCst) + 1;
        let (sender, answer) = oneshot::channel();
        let mut inner = self.inner();
        inner.voice.as_ref()?.send(Message::Want { id, want }).ok()?;
        inner.waiting.insert(id, sender);
        drop(inner);
        Some(Asked {
            asking: self.clone(),
            id,
            answer,
        })
    }

    pub fn lent(self: &Arc<Asking>, id: u64, machine: String) {
        let (waiting, round) = {
            let mut inner = self.inner();
            (inner.waiting.remove(&id), inner.round)
        };
        let lent = Granted {
            asking: self.clone(),
            id,
            round,
            taken: false,
        };
        if let Some(waiting) = waiting {
            // Dropped by whoever does not wait any more, it goes back.
            let _ = waiting.send(Answer::Granted(lent, machine));
        }
    }

    pub fn denied(&self, id: u64, reason: Reason, happened: String, in_flight: u32) {
        let denied = Answer::Denied {
            reason,
            happened,
            in_flight,
        };
        let waiting = self.inner().waiting.remove(&id);
        if let Some(waiting) = waiting {
            let _ = waiting.send(denied);
        }
    }

    fn done(&self, id: u64) {
        if let Some(voice) = &self.inner().voice {
            let _ = voice.send(Message::Done { id });
        }
    }
}

/// From now on nothing is given here.
pub fn begin(shared: &Shared, voice: Sender<Message>) {
    {
        let mut inner = shared.asking.inner();
        inner.voice = Some(voice);
        inner.round += 1;
    }
    // First this, then the gauges: whoever finds a gauge closed finds that he is to ask. A machine that appears later is
    // seen by those only who see this too.
    shared.asking.asks.store(true, SeqCst);
    let view = shared.view();
    let machines = view.snapshot.apps.values().flat_map(|app| &app.machines);
    let gauges: Vec<_> = machines
        .filter(|machine| machine.local)
        .map(|machine| machine.gauge.clone())
        .collect();
    gauges.iter().for_each(|gauge| gauge.hand_over());
    shared.asking.inner().gauges = gauges;
    shared.queues.stir();
}

/// The other process is gone, or never served. What has a place of it counts here from now on.
pub fn end(shared: &Shared) {
    let waiting = {
        let mut inner = shared.asking.inner();
        inner.voice = None;
        inner.lent.drain().for_each(|(_, gauge)| gauge.inherit());
        inner.gauges.drain(..).for_each(|gauge| gauge.take_back());
        std::mem::take(&mut inner.waiting)
    };
    shared.asking.asks.store(false, SeqCst);
    drop(waiting); // they look again
    shared.queues.stir();
}

/// A place that the new process gave, and has back if it is not taken.
pub struct Granted {
    asking: Arc<Asking>,
    id: u64,
    round: u64,
    taken: bool,
}

impl Granted {
    /// None: the new process ended meanwhile.
    pub fn take(mut self, gauge: &Arc<Gauge>) -> Option<Lent> {
        let mut inner = self.asking.inner();
        if inner.voice.is_none() || inner.round != self.round {
            return None;
        }
        inner.lent.insert(self.id, gauge.clone());
        drop(inner);
        self.taken = true;
        Some(Lent {
            asking: self.asking.clone(),
            id: self.id,
        })
    }
}

impl Drop for Granted {
    fn drop(&mut self) {
        if !self.taken {
            self.asking.done(self.id);
        }
    }
}

/// A place of the new process in use.
pub struct Lent {
    asking: Arc<Asking>,
    id: u64,
}

impl Lent {
    /// True: it counts here by now, and is to be released here.
    pub fn end(self) -> bool {
        let known = self.asking.inner().lent.remove(&self.id).is_some();
        if known {
            self.asking.done(self.id);
        }
        !known
    }
}

/// Whoever gives up does not stand in line there any longer.
pub struct Asked {
    asking: Arc<Asking>,
    id: u64,
    answer: oneshot::Receiver<Answer>,
}

impl Asked {
    pub async fn answer(mut self) -> Option<Answer> {
        (&mut self.answer).await.ok()
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        let given_up = self.asking.inner().waiting.remove(&self.id).is_some();
        if given_up {
            self.asking.done(self.id);
        }
    }
}
