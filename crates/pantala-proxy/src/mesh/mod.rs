//! Proxy to proxy: HTTP/2 over mutual TLS between the hosts of a cluster. The edge, which took a request from its client, sends
//! it to the proxy of the machine's host; that proxy owns the machine's limit, counts exactly, wakes, and refuses before a
//! byte reached the app.
//!
//! - [`wire`]: what both say beside the app's own request and answer
//! - [`tls`]: certificates of nodes, read again when they change
//! - [`peers`] and [`ping`]: which proxies answer, and how far they are (a thread of its own)
//! - [`pool`] and [`edge`]: the sending side; kept connections of each worker thread, one attempt across
//! - [`listen`], [`serve`] and [`guests`]: the receiving side
//! - [`report`]: for the operator

pub mod edge;
pub mod guests;
pub mod listen;
pub mod peers;
pub mod ping;
pub mod pool;
pub mod report;
pub mod serve;
pub mod tls;
pub mod wire;

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pantala_route::snapshot::Snapshot;
use pantala_route::turn::{REASONS, Reason};
use pantala_wire::feed::MeshSettings;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use self::guests::Guests;
use self::peers::{Peer, Peers};
use self::tls::{Credentials, Files};
use crate::settings::Settings;

/// A stream is slowed down when its receiver has so much unread. Below what a request keeps for another attempt, so that a
/// refusal never finds the body lost.
const STREAM_WINDOW: u32 = 512 * 1024;
/// Of a whole connection: all its streams at once, so that receivers which stand still stop nobody else.
const CONNECTION_WINDOW: u32 = STREAM_WINDOW * STREAMS_MAX;
const STREAMS_MAX: u32 = 256;
const HEAD_BYTES_MAX: u32 = 128 * 1024;
/// With its head of nine bytes a large frame is four whole records of TLS, written at once.
const FRAME_BYTES_MAX: u32 = 64 * 1024 - 9;
/// A connection that carries something and hears nothing for twice as long is dead.
const KEEP_ALIVE: Duration = Duration::from_secs(5);

pub struct Mesh {
    pub listen: SocketAddr,
    pub files: Files,
    pub peers: Peers,
    pub ping_interval: Duration,
    pub ping_timeout: Duration,
    pub metrics: Metrics,
    /// machines of other hosts, with the number of our requests that wait for them to wake
    waking: Mutex<HashMap<Arc<str>, usize>>,
    pub guests: Guests,
}

impl Mesh {
    pub fn of(settings: &Settings) -> Option<Arc<Mesh>> {
        let (wire, listen) = (settings.wire.mesh.as_ref()?, settings.mesh_listen?);
        Some(Arc::new(Mesh::new(wire, listen)))
    }

    fn new(settings: &MeshSettings, listen: SocketAddr) -> Mesh {
        Mesh {
            listen,
            files: Files::new(settings),
            peers: Peers::default(),
            ping_interval: Duration::from_millis(settings.ping_interval_ms),
            ping_timeout: Duration::from_millis(settings.ping_timeout_ms),
            metrics: Metrics::default(),
            waking: Mutex::default(),
            guests: Guests::default(),
        }
    }

    fn machines_waking(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        self.waking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn wakes(&self, machine: &str) -> bool {
        self.machines_waking().contains_key(machine)
    }

    /// One more request waits for the machine until the answer is dropped.
    pub fn wait_for(self: &Arc<Self>, machine: &Arc<str>) -> Waking {
        *self.machines_waking().entry(machine.clone()).or_default() += 1;
        Waking {
            mesh: self.clone(),
            machine: machine.clone(),
        }
    }

    /// A new connection to a peer, up to the end of the TLS handshake.
    async fn connect(&self, peer: &Peer, credentials: &Credentials) -> Result<TlsStream<TcpStream>, ConnectError> {
        let far = peer
            .rtt_us()
            .map_or(Duration::ZERO, |rtt| 4 * Duration::from_micros(rtt.into()));
        let connecting = async {
            let stream = TcpStream::connect(peer.address).await?;
            stream.set_nodelay(true)?;
            Ok(TlsConnector::from(credentials.client.clone())
                .connect(peer.name.clone(), stream)
                .await?)
        };
        self.metrics.connects.fetch_add(1, Relaxed);
        let connected = timeout(self.ping_timeout.max(far), connecting).await;
        let connected = connected.unwrap_or(Err(ConnectError::Timeout));
        if connected.is_err() {
            self.metrics.connects_failed.fetch_add(1, Relaxed);
        }
        connected
    }
}

/// Whether a node belongs to the cluster, asked anew for each connection and request.
pub fn is_member(view: &Snapshot, node: &str) -> bool {
    view.members.contains(node)
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("{0}")]
    Socket(#[from] std::io::Error),
    #[error("no answer in time")]
    Timeout,
    #[error("this host has no mesh certificate yet")]
    NoCertificate,
    #[error("it does not answer pings")]
    Down,
    #[error("{0}")]
    HTTP2(#[from] h2::Error),
    #[error("{0}")]
    Lately(String),
}

pub struct Waking {
    mesh: Arc<Mesh>,
    machine: Arc<str>,
}

impl Drop for Waking {
    fn drop(&mut self) {
        let mut waking = self.mesh.machines_waking();
        if let Some(count) = waking.get_mut(&self.machine) {
            *count -= 1;
            if *count == 0 {
                waking.remove(&self.machine);
            }
        }
    }
}

#[derive(Default)]
pub struct Metrics {
    /// attempts sent to other hosts
    pub sent: AtomicU64,
    /// requests of other hosts
    pub served: AtomicU64,
    pub connects: AtomicU64,
    pub connects_failed: AtomicU64,
    /// handshakes of other hosts' connections
    pub handshakes: AtomicU64,
    pub handshakes_refused: AtomicU64,
    pub pings_missed: AtomicU64,
    /// our refusals, by reason as in [`REASONS`]
    refusals: [AtomicU64; REASONS.len()],
}

impl Metrics {
    pub fn refused(&self, reason: Reason) {
        self.refusals[reason as usize].fetch_add(1, Relaxed);
    }

    pub fn refusals(&self) -> impl Iterator<Item = (&'static str, u64)> {
        REASONS
            .iter()
            .map(|reason| (reason.word(), self.refusals[*reason as usize].load(Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_counted_by_their_reason() {
        let metrics = Metrics::default();
        REASONS.iter().for_each(|reason| metrics.refused(*reason));
        assert!(metrics.refusals().all(|(_, count)| count == 1));
    }
}
