//! Kept connections to other hosts' proxies: each worker thread has its own, one for each peer and more only when so many
//! streams are open. Concurrent requests share a connection on its way; a peer that refuses is left alone for a growing
//! pause, in which requests for it fail at once and go elsewhere.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;
use tokio::time::Instant;

use super::peers::Peer;
use super::tls::{self, Credentials};
use super::wire::Form;
use super::{
    CONNECTION_WINDOW, ConnectError, FRAME_BYTES_MAX, HEAD_BYTES_MAX, KEEP_ALIVE, Mesh, STREAM_WINDOW, STREAMS_MAX,
};
use crate::http2::client::{self, Connection, Manner, Share};

const MANNER: Manner = Manner {
    window: STREAM_WINDOW,
    connection_window: CONNECTION_WINDOW,
    head_bytes_max: HEAD_BYTES_MAX,
    frame_bytes_max: FRAME_BYTES_MAX,
    streams_max: STREAMS_MAX,
    alive: (KEEP_ALIVE.checked_div(2).unwrap(), KEEP_ALIVE),
};
const IDLE_MAX: Duration = Duration::from_secs(300);
const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);

struct Road {
    connection: Rc<Connection>,
    form: Form,
    /// nothing was said on it yet
    new: Cell<bool>,
    generation: u64,
    /// of the peer when this was opened
    silences: u64,
    peer: Arc<Peer>,
}

impl Road {
    fn share(&self) -> Way {
        Way {
            share: Share::new(&self.connection),
            form: self.form,
            first: self.new.take(),
        }
    }
}

/// For one request.
pub struct Way {
    pub share: Share,
    /// of calls on its connection
    pub form: Form,
    /// its connection carried none before
    pub first: bool,
}

#[derive(Default)]
struct Kept {
    roads: RefCell<Vec<Road>>,
    /// held while connecting; the others find what came of it
    gate: Mutex<Refused>,
}

#[derive(Default)]
struct Refused {
    until: Option<Instant>,
    pause: Duration,
    why: String,
}

pub struct MeshPool {
    pub mesh: Arc<Mesh>,
    peers: RefCell<HashMap<Arc<str>, Rc<Kept>>>,
}

impl MeshPool {
    pub fn new(mesh: Arc<Mesh>) -> MeshPool {
        MeshPool {
            mesh,
            peers: RefCell::default(),
        }
    }

    pub async fn share(&self, peer: &Arc<Peer>) -> Result<Way, ConnectError> {
        let credentials = self.mesh.files.current().ok_or(ConnectError::NoCertificate)?;
        let kept = self.peers.borrow_mut().entry(peer.node.clone()).or_default().clone();
        if let Some(share) = kept.usable(peer, &credentials) {
            return Ok(share);
        }
        tokio::select! {
            biased;
            () = peer.down() => Err(ConnectError::Down),
            connected = self.connect(&kept, peer, &credentials) => connected,
        }
    }

    async fn connect(&self, kept: &Kept, peer: &Arc<Peer>, credentials: &Credentials) -> Result<Way, ConnectError> {
        let mut refused = kept.gate.lock().await;
        if let Some(share) = kept.usable(peer, credentials) {
            return Ok(share);
        }
        if refused.until.is_some_and(|until| Instant::now() < until) {
            return Err(ConnectError::Lately(refused.why.clone()));
        }
        match self.open(peer, credentials).await {
            Ok(road) => {
                *refused = Refused::default();
                let share = road.share();
                kept.roads.borrow_mut().push(road);
                Ok(share)
            }
            Err(error) => {
                refused.pause = (refused.pause * 2).clamp(PAUSE_FIRST, PAUSE_MAX);
                refused.until = Some(Instant::now() + refused.pause);
                refused.why = error.to_string();
                Err(error)
            }
        }
    }

    async fn open(&self, peer: &Arc<Peer>, credentials: &Credentials) -> Result<Road, ConnectError> {
        let silences = peer.silences();
        let stream = self.mesh.connect(peer, credentials).await?;
        let form = match stream.get_ref().1.alpn_protocol() {
            Some(tls::BRIEF) => Form::Brief,
            _ => Form::Long,
        };
        Ok(Road {
            connection: client::open(stream, &MANNER, peer.gone()).await?,
            form,
            new: Cell::new(true),
            generation: credentials.generation,
            silences,
            peer: peer.clone(),
        })
    }

    /// Forgets connections that ended, and lets go of idle ones and of those with an older certificate.
    pub fn sweep(&self) {
        let generation = self.mesh.files.current().map(|now| now.generation);
        let fine = |road: &Road| {
            let idle = road.connection.streams() == 0;
            let left = Some(road.generation) != generation || road.silences != road.peer.silences();
            let old = left || road.connection.idle() >= IDLE_MAX;
            !(road.connection.is_closed() || idle && old)
        };
        self.peers.borrow_mut().retain(|_, kept| {
            kept.roads.borrow_mut().retain(fine);
            Rc::strong_count(kept) > 1 || !kept.roads.borrow().is_empty() || kept.refuses()
        });
    }
}

impl Kept {
    fn usable(&self, peer: &Arc<Peer>, credentials: &Credentials) -> Option<Way> {
        let fits = |road: &&Road| {
            road.generation == credentials.generation
                && road.silences == peer.silences()
                && Arc::ptr_eq(&road.peer, peer)
                && road.connection.has_room()
                && !road.connection.is_closed()
        };
        let roads = self.roads.borrow();
        roads.iter().find(fits).map(Road::share)
    }

    fn refuses(&self) -> bool {
        self.gate
            .try_lock()
            .is_ok_and(|refused| refused.until.is_some_and(|until| until.elapsed() < PAUSE_MAX))
    }
}
