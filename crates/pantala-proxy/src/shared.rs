//! What all threads share. Workers read the view and take slots; the control thread writes the view and answers for the
//! agent. Nothing here blocks for longer than a map look-up.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use arc_swap::ArcSwap;
use pantala_route::snapshot::Snapshot;
use pantala_wire::feed::ProxyLog;
use tokio::sync::{Notify, mpsc, watch};

use crate::handover::asking::Asking;
use crate::handover::counts::Beside;
use crate::handover::sockets::Key;
use crate::limits::Limits;
use crate::mesh::Mesh;
use crate::queue::Queues;
use crate::remember::Memory;
use crate::room::Room;
use crate::settings::Settings;
use crate::timing::Lines;
use crate::tls::Tls;
use crate::trace::Traces;
use crate::tunnels::Tunnels;
use crate::wakes::Wakes;

/// `seq` grows with each change, so that whoever waits can tell a newer view from the one it judged.
pub struct View {
    pub seq: u64,
    pub snapshot: Snapshot,
}

/// How far the end of this process has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Life {
    /// another process still serves; this one reads its view
    Arriving,
    Serving,
    /// no new connections; answers say `Connection: close`
    Leaving,
    /// idle connections are closed
    Closing,
    /// the longest drain is over
    Ending,
}

/// From workers to the control thread.
pub enum Command {
    /// there are wakes to send
    Wake,
    Log(ProxyLog),
}

pub struct Shared {
    pub settings: Settings,
    view: ArcSwap<View>,
    changed: watch::Sender<u64>,
    pub life: watch::Sender<Life>,
    /// Told to end, and still accepting: those who announce this edge see it in `/healthz` first.
    pub withdrawn: AtomicBool,
    /// the view is the agent's, or there is no agent
    pub informed: watch::Sender<bool>,
    /// another process asked for the sockets
    pub handing_over: AtomicBool,
    /// what a second process has in flight
    pub beside: Beside,
    /// places are given by another process
    pub asking: Arc<Asking>,
    /// another process serves instead
    pub handed_over: watch::Sender<bool>,
    listening: Mutex<Vec<(Key, OwnedFd)>>,
    pub tls: Tls,
    pub limits: Arc<Limits>,
    /// none: this host is alone
    pub mesh: Option<Arc<Mesh>>,
    pub wakes: Wakes,
    pub queues: Queues,
    pub room: Arc<Room>,
    /// about waits, to the agent
    pub lines: Lines,
    /// about requests of other hosts, to this proxy's own log
    pub mesh_lines: Lines,
    pub traces: Arc<Traces>,
    pub replays: Memory,
    pub tunnels: Tunnels,
    /// a draining machine has become empty
    pub emptied: Notify,
    pub commands: mpsc::Sender<Command>,
    pub metrics: Metrics,
    pub started: Instant,
}

/// Commands that wait for the control thread; beyond it log frames are dropped and wakes are picked up by its next tick.
const COMMANDS_MAX: usize = 4096;

impl Shared {
    pub fn new(
        settings: Settings,
        tls: Tls,
        life: Life,
        listening: Vec<(Key, OwnedFd)>,
        workers: usize,
    ) -> (Arc<Shared>, mpsc::Receiver<Command>) {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let shared = Shared {
            queues: Queues::default(),
            room: Room::new(settings.wire.queue_per_app_max, settings.wire.waiting_max),
            lines: Lines::default(),
            mesh_lines: Lines::default(),
            traces: Arc::new(Traces::new(workers, settings.wire.trace_mib_max)),
            mesh: Mesh::of(&settings),
            limits: Limits::new(&settings.wire),
            settings,
            view: ArcSwap::from_pointee(View {
                seq: 0,
                snapshot: Snapshot::default(),
            }),
            changed: watch::Sender::new(0),
            life: watch::Sender::new(life),
            withdrawn: AtomicBool::new(false),
            informed: watch::Sender::new(false),
            handing_over: AtomicBool::new(false),
            beside: Beside::default(),
            asking: Arc::default(),
            handed_over: watch::Sender::new(false),
            listening: Mutex::new(listening),
            tls,
            wakes: Wakes::default(),
            replays: Memory::default(),
            tunnels: Tunnels::default(),
            emptied: Notify::new(),
            commands,
            metrics: Metrics::default(),
            started: Instant::now(),
        };
        (Arc::new(shared), receiver)
    }

    pub fn view(&self) -> Arc<View> {
        self.view.load_full()
    }

    pub fn publish(&self, snapshot: Snapshot) {
        self.replace(|_| snapshot.clone());
    }

    /// Something beside the rows changed that whoever waits judges by: a peer went or came.
    pub fn stir(&self) {
        self.replace(|view| view.snapshot.clone());
    }

    fn replace(&self, make: impl Fn(&View) -> Snapshot) {
        let seq = self.beside.publish(|settle| {
            let before = self.view.rcu(|view| {
                let snapshot = make(view);
                settle(&snapshot);
                View {
                    seq: view.seq + 1,
                    snapshot,
                }
            });
            before.seq + 1
        });
        self.changed
            .send_if_modified(|now| std::mem::replace(now, seq.max(*now)) < seq);
        self.queues.stir();
    }

    /// Returns when the view is newer than `seq`.
    pub async fn newer_than(&self, seq: u64) {
        // The sender lives in self, so the wait cannot end otherwise.
        let _ = self.changed.subscribe().wait_for(|now| *now > seq).await;
    }

    /// Milliseconds since start: the clock of the gauges.
    pub fn elapsed_ms(&self) -> u64 {
        self.started.elapsed().as_millis() as u64
    }

    /// What the next process gets; emptied when this one accepts no more, or the ports would stay open.
    pub fn listening(&self) -> MutexGuard<'_, Vec<(Key, OwnedFd)>> {
        self.listening.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns once this process serves.
    pub async fn serving(&self) {
        let _ = self.life.subscribe().wait_for(|life| *life >= Life::Serving).await;
    }

    /// Returns once another process serves instead.
    pub async fn replaced(&self) {
        let _ = self.handed_over.subscribe().wait_for(|handed_over| *handed_over).await;
    }

    pub fn leaving(&self) -> bool {
        self.withdrawn.load(Relaxed) || *self.life.borrow() > Life::Serving
    }

    pub fn tell_agent(&self, log: ProxyLog) {
        if self.commands.try_send(Command::Log(log)).is_err() {
            self.metrics.logs_dropped.fetch_add(1, Relaxed);
        }
    }
}

#[derive(Default)]
pub struct Metrics {
    pub connections: AtomicU64,
    pub connections_open: AtomicU64,
    /// of the open ones, those that are quiet
    pub connections_parked: AtomicU64,
    pub handshakes_failed: AtomicU64,
    pub http2_broken: AtomicU64,
    pub requests: AtomicU64,
    pub refused: AtomicU64,
    pub failed: AtomicU64,
    pub retries: AtomicU64,
    pub replays: AtomicU64,
    pub replay_cache_hits: AtomicU64,
    pub wakes: AtomicU64,
    pub queued: AtomicU64,
    /// by the process that this one replaces
    pub places_asked: AtomicU64,
    /// processes that this one replaced and that live
    pub lending: AtomicU64,
    pub upstream_connects: AtomicU64,
    pub logs_dropped: AtomicU64,
    pub dns_queries: AtomicU64,
    pub dns_refused: AtomicU64,
}
