//! The proxies of other hosts as this one knows them: where they are, how far, and whether they answer. What they are is in
//! the view; whether they live is measured here ([`super::ping`]), because a silent bus says nothing about a host.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed};

use arc_swap::ArcSwap;
use pantala_route::choose::Reach;
use pantala_route::snapshot::Snapshot;
use tokio::sync::{Notify, watch};
use tokio_rustls::rustls::pki_types::ServerName;

use super::tls;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum State {
    /// not asked yet: worth a try
    New,
    Up,
    /// it misses pings: not chosen, and requests that wait for its answer are given up
    Down,
    /// silent for so long that its connections are cut
    Gone,
    /// out of the view, or somewhere else: this peer is never up again
    Removed,
}

pub struct Peer {
    pub node: Arc<str>,
    pub region: String,
    pub address: SocketAddr,
    pub name: ServerName<'static>,
    state: watch::Sender<State>,
    /// smoothed, µs; 0 as long as nothing was measured
    rtt_us: AtomicU32,
    heard_ms: AtomicU64,
    used_ms: AtomicU64,
    /// how often it fell silent: connections from before carry nothing new, since it may have been started again
    silences: AtomicU64,
    /// a request found it unwatched: look now
    pub hurry: Notify,
}

/// Of the last so many ms of requests: such peers are pinged more often than idle ones.
const USED_FOR_MS: u64 = 30_000;

impl Peer {
    fn new(node: &Arc<str>, region: &str, address: SocketAddr) -> Option<Peer> {
        Some(Peer {
            name: tls::name_of(node)?,
            node: node.clone(),
            region: region.to_owned(),
            address,
            state: watch::Sender::new(State::New),
            rtt_us: AtomicU32::new(0),
            heard_ms: AtomicU64::new(0),
            used_ms: AtomicU64::new(0),
            silences: AtomicU64::new(0),
            hurry: Notify::new(),
        })
    }

    pub fn state(&self) -> State {
        *self.state.borrow()
    }

    /// Whether it changed.
    pub fn set(&self, state: State) -> bool {
        self.state.send_if_modified(|now| {
            let changes = *now != state && *now != State::Removed;
            if changes {
                self.silences.fetch_add(u64::from(state == State::Down), Relaxed);
                *now = state;
            }
            changes
        })
    }

    pub fn silences(&self) -> u64 {
        self.silences.load(Relaxed)
    }

    pub fn answers(&self) -> bool {
        matches!(self.state(), State::New | State::Up)
    }

    /// Returns once it does not answer.
    pub async fn down(&self) {
        // The sender lives in self.
        let _ = self.state.subscribe().wait_for(|state| *state > State::Up).await;
    }

    pub async fn removed(&self) {
        let _ = self.state.subscribe().wait_for(|state| *state == State::Removed).await;
    }

    pub fn gone(&self) -> impl Future<Output = ()> + use<> {
        let mut state = self.state.subscribe();
        async move {
            // Without its peer in the table a connection has no use either.
            let _ = state.wait_for(|state| *state >= State::Gone).await;
        }
    }

    pub fn rtt_us(&self) -> Option<u32> {
        Some(self.rtt_us.load(Relaxed)).filter(|rtt| *rtt > 0)
    }

    pub fn heard_ms(&self) -> u64 {
        self.heard_ms.load(Relaxed)
    }

    /// A ping came back.
    pub fn heard(&self, rtt_us: u32, now_ms: u64) {
        self.heard_ms.store(now_ms, Relaxed);
        let rtt_us = rtt_us.max(1);
        let smoothed = self.rtt_us().map_or(rtt_us, |old| old - old / 8 + rtt_us / 8);
        self.rtt_us.store(smoothed.max(1), Relaxed);
    }

    pub fn used(&self, now_ms: u64) {
        if !self.in_use(now_ms) {
            self.hurry.notify_one();
        }
        self.used_ms.store(now_ms.max(1), Relaxed);
    }

    pub fn in_use(&self, now_ms: u64) -> bool {
        let used = self.used_ms.load(Relaxed);
        used > 0 && now_ms < used + USED_FOR_MS
    }
}

#[derive(Default)]
struct Table {
    peers: HashMap<Arc<str>, Arc<Peer>>,
    /// of each region the shortest round trip to a peer that answers
    distances: HashMap<String, u32>,
}

#[derive(Default)]
pub struct Peers {
    table: ArcSwap<Table>,
}

impl Peers {
    pub fn find(&self, node: &str) -> Option<Arc<Peer>> {
        self.table.load().peers.get(node).cloned()
    }

    pub fn all(&self) -> Vec<Arc<Peer>> {
        self.table.load().peers.values().cloned().collect()
    }

    pub fn reach(&self, node: &str) -> Reach {
        match self.table.load().peers.get(node) {
            None => Reach::Never,
            Some(peer) if peer.answers() => Reach::There,
            Some(_) => Reach::Away,
        }
    }

    pub fn distance(&self, region: &str) -> u32 {
        self.table.load().distances.get(region).copied().unwrap_or(u32::MAX)
    }

    /// Takes over what the view says; answers with the peers that are new. Those that are gone, or are somewhere else, end.
    pub fn follow(&self, view: &Snapshot, own: &str) -> Vec<Arc<Peer>> {
        let (mut peers, mut new) = (HashMap::new(), Vec::new());
        let old = self.table.load_full();
        for (node, row) in view.nodes.iter().filter(|(node, _)| &***node != own) {
            let Some(address) = row.mesh.filter(|_| view.members.contains(node)) else {
                continue;
            };
            let same = |peer: &&Arc<Peer>| peer.address == address && peer.region == row.region;
            let known = old.peers.get(node).filter(same).cloned();
            let peer = known.or_else(|| {
                let peer = Arc::new(Peer::new(node, &row.region, address)?);
                new.push(peer.clone());
                Some(peer)
            });
            peers.extend(peer.map(|peer| (node.clone(), peer)));
        }
        for peer in old.peers.values() {
            if !peers.get(&peer.node).is_some_and(|now| Arc::ptr_eq(now, peer)) {
                peer.set(State::Removed);
            }
        }
        let distances = distances(&peers);
        self.table.store(Arc::new(Table { peers, distances }));
        new
    }

    /// Round trips change all the time; the order of regions is made anew now and then.
    pub fn measure(&self) {
        let old = self.table.load_full();
        let distances = distances(&old.peers);
        if distances != old.distances {
            let peers = old.peers.clone();
            self.table.store(Arc::new(Table { peers, distances }));
        }
    }
}

fn distances(peers: &HashMap<Arc<str>, Arc<Peer>>) -> HashMap<String, u32> {
    let mut distances = HashMap::new();
    for peer in peers.values().filter(|peer| peer.answers()) {
        if let Some(rtt) = peer.rtt_us() {
            let best = distances.entry(peer.region.clone()).or_insert(rtt);
            *best = rtt.min(*best);
        }
    }
    distances
}

#[cfg(test)]
mod tests {
    use super::*;
    use pantala_route::snapshot::Node;

    fn view(nodes: &[(&str, &str, &str)]) -> Snapshot {
        let mut view = Snapshot::default();
        for (node, region, mesh) in nodes {
            let row = Node {
                region: (*region).to_owned(),
                mesh: mesh.parse().ok(),
            };
            view.nodes.insert((*node).into(), row);
            view.members.insert((*node).into());
        }
        view
    }

    #[test]
    fn who_is_a_peer() {
        let peers = Peers::default();
        let mut now = view(&[
            ("own", "iad", "10.0.0.1:1"),
            ("a", "lhr", "10.0.0.2:1"),
            ("b", "nrt", ""),
        ]);
        assert_eq!(peers.follow(&now, "own").len(), 1);
        assert!(peers.follow(&now, "own").is_empty());
        assert_eq!(
            (peers.reach("a"), peers.reach("b"), peers.reach("own")),
            (Reach::There, Reach::Never, Reach::Never)
        );
        let a = peers.find("a").unwrap();
        a.set(State::Down);
        assert_eq!(peers.reach("a"), Reach::Away);
        now.members.remove("a");
        peers.follow(&now, "own");
        assert_eq!((peers.reach("a"), a.state()), (Reach::Never, State::Removed));
        assert!(!a.set(State::Up), "for ever");
    }

    #[test]
    fn a_region_is_as_near_as_its_nearest_peer_that_answers() {
        let peers = Peers::default();
        peers.follow(&view(&[("a", "lhr", "10.0.0.2:1"), ("b", "lhr", "10.0.0.3:1")]), "own");
        assert_eq!(peers.distance("lhr"), u32::MAX);
        for (node, rtt) in [("a", 75_000), ("b", 80_000)] {
            peers.find(node).unwrap().heard(rtt, 1);
        }
        peers.measure();
        assert_eq!(peers.distance("lhr"), 75_000);
        peers.find("a").unwrap().set(State::Down);
        peers.measure();
        assert_eq!(peers.distance("lhr"), 80_000);
    }

    #[test]
    fn a_single_slow_ping_moves_little() {
        let peers = Peers::default();
        peers.follow(&view(&[("a", "lhr", "10.0.0.2:1")]), "own");
        let a = peers.find("a").unwrap();
        a.heard(8_000, 1);
        a.heard(16_000, 2);
        assert_eq!(a.rtt_us(), Some(9_000));
    }
}
