//! Upgraded connections by machine, so that a drain can end those that its deadline finds.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use crate::shared::Shared;

/// WebSocket close codes.
pub const GOING_AWAY: u16 = 1001;
pub const SERVICE_RESTART: u16 = 1012;

#[derive(Default)]
pub struct Tunnels {
    /// the sender's value is the close code once they are to end
    machines: Mutex<HashMap<Arc<str>, watch::Sender<Option<u16>>>>,
    /// that bytes pass through; their connections count no more once hyper has let go of them
    open: AtomicU64,
}

/// One of those that bytes pass through.
pub struct Open(Arc<Shared>);

impl Open {
    pub fn new(shared: &Arc<Shared>) -> Open {
        shared.tunnels.open.fetch_add(1, Relaxed);
        Open(shared.clone())
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.tunnels.open.fetch_sub(1, Relaxed);
    }
}

impl Tunnels {
    pub fn open(&self) -> u64 {
        self.open.load(Relaxed)
    }

    fn machines(&self) -> MutexGuard<'_, HashMap<Arc<str>, watch::Sender<Option<u16>>>> {
        self.machines.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn join(&self, machine: &Arc<str>) -> watch::Receiver<Option<u16>> {
        let mut machines = self.machines();
        machines.retain(|_, ends| ends.receiver_count() > 0);
        machines
            .entry(machine.clone())
            .or_insert_with(|| watch::Sender::new(None))
            .subscribe()
    }

    pub fn end(&self, machine: &str, code: u16) {
        if let Some(ends) = self.machines().remove(machine) {
            ends.send_replace(Some(code));
        }
    }

    pub fn end_all(&self, code: u16) {
        for (_, ends) in self.machines().drain() {
            ends.send_replace(Some(code));
        }
    }
}
