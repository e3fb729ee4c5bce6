//! The mesh thread: follows the view's peers and pings each over a connection of its own, so that a full one tells nothing
//! false. What answers is up, and how long it took is its distance; what misses pings, or cannot be connected to, is down at
//! once for requests, and gone (its connections cut) when it stays silent.
//!
//! The work is bounded: up to [`PINGS_PER_S_MAX`] all peers are pinged at the interval of the settings; beyond, peers in use
//! come before idle ones, and the intervals of both grow with their number.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use bytes::Bytes;
use h2::client::{self, SendRequest};
use hyper::{Request, StatusCode};
use tokio::task::{LocalSet, spawn_local};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout_at};

use super::peers::{Peer, State};
use super::{ConnectError, Mesh, wire};
use crate::log;
use crate::shared::{Life, Shared};

const PINGS_PER_S_MAX: u64 = 200;
/// Silent for so long: connections are cut, whatever they carry.
const GONE_AFTER: Duration = Duration::from_secs(10);
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const FILES_EVERY: Duration = Duration::from_secs(1);

/// The whole life of the thread.
pub fn work(shared: Arc<Shared>, mesh: Arc<Mesh>) -> std::io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let ending = shared.clone();
    LocalSet::new().block_on(&runtime, async move {
        spawn_local(look_at_files(mesh.clone()));
        spawn_local(follow(shared, mesh));
        let mut life = ending.life.subscribe();
        // The sender is in shared, so this ends only with the life of the process.
        let _ = life.wait_for(|life| *life == Life::Ending).await;
        Ok(())
    })
}

async fn look_at_files(mesh: Arc<Mesh>) {
    let mut ticks = interval(FILES_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let mesh = mesh.clone();
        // A disk that stands still must not hold up pings.
        let _ = tokio::task::spawn_blocking(move || mesh.files.look()).await;
    }
}

async fn follow(shared: Arc<Shared>, mesh: Arc<Mesh>) {
    let pace = Arc::new(Pace::default());
    let mut ticks = interval(mesh.ping_interval);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let view = shared.view();
        for peer in mesh.peers.follow(&view.snapshot, &shared.settings.wire.node) {
            let watch = Watch {
                shared: shared.clone(),
                mesh: mesh.clone(),
                peer,
                pace: pace.clone(),
            };
            spawn_local(watch.run());
        }
        tokio::select! {
            () = shared.newer_than(view.seq) => {}
            _ = ticks.tick() => {
                mesh.peers.measure();
                let (all, now_ms) = (mesh.peers.all(), shared.elapsed_ms());
                let in_use = all.iter().filter(|peer| peer.in_use(now_ms)).count() as u64;
                pace.in_use.store(in_use, Relaxed);
                pace.all.store(all.len() as u64, Relaxed);
            }
        }
    }
}

#[derive(Default)]
struct Pace {
    all: AtomicU64,
    in_use: AtomicU64,
}

impl Pace {
    /// Half of the bound for peers in use, half for the others.
    fn interval(&self, base: Duration, in_use: bool) -> Duration {
        let (all, busy) = (self.all.load(Relaxed), self.in_use.load(Relaxed));
        if Duration::from_millis(all * 1000 / PINGS_PER_S_MAX) <= base {
            return base;
        }
        let number = if in_use { busy } else { all.saturating_sub(busy) };
        base.max(Duration::from_millis(number * 2000 / PINGS_PER_S_MAX))
    }
}

struct Watch {
    shared: Arc<Shared>,
    mesh: Arc<Mesh>,
    peer: Arc<Peer>,
    pace: Arc<Pace>,
}

type Sender = SendRequest<Bytes>;

impl Watch {
    /// Ends with the peer's place in the view.
    async fn run(self) {
        tokio::select! {
            () = self.peer.removed() => {}
            () = self.watch() => {}
        }
    }

    async fn watch(&self) {
        let (mut pause, mut silent_since) = (PAUSE_FIRST, Instant::now());
        loop {
            let why = match self.open().await {
                Err(error) => error.to_string(),
                Ok(mut sender) => {
                    let (why, heard) = self.ping(&mut sender).await;
                    if let Some(heard) = heard {
                        (pause, silent_since) = (PAUSE_FIRST, heard);
                    }
                    why
                }
            };
            let state = if silent_since.elapsed() >= GONE_AFTER {
                State::Gone
            } else {
                State::Down
            };
            self.turn(state, &why);
            sleep(pause).await;
            pause = (pause * 2).min(self.mesh.ping_interval.max(Duration::from_secs(1)));
        }
    }

    async fn open(&self) -> Result<Sender, ConnectError> {
        let credentials = self.mesh.files.current().ok_or(ConnectError::NoCertificate)?;
        let stream = self.mesh.connect(&self.peer, &credentials).await?;
        let (sender, connection) = client::handshake(stream).await?;
        spawn_local(async move {
            // The ping that finds it closed says so.
            let _ = connection.await;
        });
        Ok(sender)
    }

    /// Pings until one is missed; answers why, and when the last one came back.
    async fn ping(&self, sender: &mut Sender) -> (String, Option<Instant>) {
        let mut heard: Option<Instant> = None;
        loop {
            let asked = Instant::now();
            let interval = self
                .pace
                .interval(self.mesh.ping_interval, self.peer.in_use(self.shared.elapsed_ms()));
            // Counted from the last sign of life, so that a silent peer is down within one timeout of it.
            let patience = self.mesh.ping_timeout + interval.saturating_sub(self.mesh.ping_interval);
            let by = heard.map_or(asked + patience, |heard| (heard + patience).max(asked + patience / 2));
            let mut request = Request::new(());
            *request.uri_mut() = hyper::Uri::from_static("http://mesh/");
            wire::ping(request.headers_mut());
            let answered = async { sender.send_request(request, true)?.0.await };
            match timeout_at(by, answered).await {
                Ok(Ok(response)) if response.status() == StatusCode::OK => {
                    let rtt_us = asked.elapsed().as_micros().try_into().unwrap_or(u32::MAX);
                    self.peer.heard(rtt_us, self.shared.elapsed_ms());
                    heard = Some(Instant::now());
                    self.turn(State::Up, "");
                }
                Ok(Ok(response)) => return (format!("it answered a ping with {}", response.status()), heard),
                Ok(Err(error)) => return (format!("the connection ended: {error}"), heard),
                Err(_) => {
                    self.mesh.metrics.pings_missed.fetch_add(1, Relaxed);
                    return ("it does not answer pings".to_owned(), heard);
                }
            }
            tokio::select! {
                () = sleep(interval.saturating_sub(asked.elapsed())) => {}
                () = self.peer.hurry.notified() => {}
            }
        }
    }

    fn turn(&self, state: State, why: &str) {
        let before = self.peer.state();
        if !self.peer.set(state) {
            return;
        }
        let (node, region) = (&self.peer.node, &self.peer.region);
        match state {
            State::Up => log::info("peer up", &[("node", node), ("region", region)]),
            _ if before <= State::Up => {
                log::warning("peer down", &[("node", node), ("region", region), ("reason", &why)]);
            }
            _ => {}
        }
        self.mesh.peers.measure();
        self.shared.stir();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_work_is_bounded() {
        let base = Duration::from_millis(250);
        for (all, in_use) in [(2, 2), (35, 35), (35, 3), (300, 10), (300, 300), (300, 0)] {
            let pace = Pace::default();
            pace.all.store(all, Relaxed);
            pace.in_use.store(in_use, Relaxed);
            let rate = |number: u64, used| number as f64 / pace.interval(base, used).as_secs_f64();
            assert!(
                rate(in_use, true) + rate(all - in_use, false) <= PINGS_PER_S_MAX as f64 * 1.01,
                "{all} {in_use}"
            );
            assert!(pace.interval(base, true) >= base);
        }
        let small = Pace::default();
        small.all.store(35, Relaxed);
        assert_eq!(small.interval(base, false), base);
    }
}
