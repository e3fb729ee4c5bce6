//! Requests of an app whose machines are all at their hard limit: in order, woken one at a time. Whoever is woken tries again
//! and either goes on (and wakes the next) or keeps its place. How many there may be is up to [`crate::room`].

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::Notify;

#[derive(Default)]
struct Waiting {
    /// by ticket; whoever was called keeps its place until it leaves
    line: BTreeMap<u64, Arc<Notify>>,
    last: u64,
}

#[derive(Default)]
pub struct Queues {
    apps: Mutex<HashMap<Arc<str>, Waiting>>,
    /// of all apps: nearly always 0, and then a release costs one load
    waiting: AtomicUsize,
}

impl Queues {
    fn apps(&self) -> MutexGuard<'_, HashMap<Arc<str>, Waiting>> {
        self.apps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn len(&self) -> usize {
        self.waiting.load(SeqCst)
    }

    /// Somebody stands in line for the app.
    pub fn waits(&self, app: &str) -> bool {
        self.len() > 0 && self.apps().contains_key(app)
    }

    pub fn join(&self, app: &Arc<str>) -> Place<'_> {
        let mut apps = self.apps();
        let waiting = apps.entry(app.clone()).or_default();
        waiting.last += 1;
        let (ticket, called) = (waiting.last, Arc::new(Notify::new()));
        waiting.line.insert(ticket, called.clone());
        self.waiting.fetch_add(1, SeqCst);
        Place {
            queues: self,
            app: app.clone(),
            ticket,
            called,
        }
    }

    /// A slot of the app became free: its first in line looks again.
    pub fn call(&self, app: &str) {
        if self.len() > 0
            && let Some(first) = self.apps().get(app).and_then(|waiting| waiting.line.values().next())
        {
            first.notify_one();
        }
    }

    /// Everything may have changed: the first of each app looks again.
    pub fn stir(&self) {
        if self.len() > 0 {
            for first in self.apps().values().filter_map(|waiting| waiting.line.values().next()) {
                first.notify_one();
            }
        }
    }
}

/// A place in the line of one app; leaving it calls the next.
pub struct Place<'a> {
    queues: &'a Queues,
    app: Arc<str>,
    ticket: u64,
    called: Arc<Notify>,
}

impl Place<'_> {
    pub async fn called(&self) {
        self.called.notified().await;
    }

    /// Others came first, so taking a slot now would overtake them.
    pub fn first(&self) -> bool {
        let apps = self.queues.apps();
        apps.get(&self.app)
            .and_then(|waiting| waiting.line.keys().next())
            .is_none_or(|first| *first == self.ticket)
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut apps = self.queues.apps();
        if let Some(waiting) = apps.get_mut(&self.app) {
            waiting.line.remove(&self.ticket);
            self.queues.waiting.fetch_sub(1, SeqCst);
            match waiting.line.values().next() {
                Some(next) => next.notify_one(),
                None => drop(apps.remove(&self.app)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn in_order() {
        let queues = Queues::default();
        let app: Arc<str> = "web".into();
        let (first, second) = (queues.join(&app), queues.join(&app));
        assert!(first.first() && !second.first());
        drop(first);
        assert!(second.first());
        drop(second);
        assert_eq!(queues.len(), 0);
        assert!(queues.apps().is_empty());
    }
}
