//! Requests that wait for a place on a machine of this host or another, app by app, as `pantala_route::line` orders them.
//! Whoever is called looks again and either goes on or keeps its place. How many there may be is up to [`crate::room`].

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pantala_route::choose::machine;
use pantala_route::line::{Calls, Condition, Line, Ticket};
use tokio::sync::Notify;

use crate::shared::Shared;

type Lines = HashMap<Arc<str>, Line<Arc<Notify>>>;

#[derive(Default)]
pub struct Queues {
    apps: Mutex<Lines>,
    /// of all apps: nearly always 0, and then a release costs one load
    waiting: AtomicUsize,
}

impl Queues {
    fn apps(&self) -> MutexGuard<'_, Lines> {
        self.apps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn len(&self) -> usize {
        self.waiting.load(SeqCst)
    }

    /// What those want who stand in line for the app before that place, or at all.
    pub fn before(&self, app: &str, place: Option<&Place>) -> Vec<Arc<Condition>> {
        if self.len() == 0 {
            return Vec::new();
        }
        let apps = self.apps();
        let line = apps.get(app);
        line.map(|line| line.before(place.map(|place| &place.ticket)))
            .unwrap_or_default()
    }

    /// Everything may have changed.
    pub fn stir(&self) {
        if self.len() > 0 {
            self.apps()
                .values_mut()
                .flat_map(Line::stir)
                .for_each(|called| called.notify_one());
        }
    }

    /// There may be room on the machine.
    pub fn call(&self, shared: &Shared, app: &str, id: &str, after: Option<&Ticket>) {
        if self.len() == 0 {
            return;
        }
        let (view, now_ms) = (shared.view(), shared.elapsed_ms());
        let Some(app) = view.snapshot.apps.get(app) else {
            return;
        };
        let Some(machine) = machine(app, id) else { return };
        let mut apps = self.apps();
        let line = apps.get_mut(&app.name);
        let fits = |condition: &Condition| condition.fits(app, machine, now_ms);
        if let Some(called) = line.and_then(|line| line.call(&machine.id, after, fits)) {
            called.notify_one();
        }
    }
}

/// A place in the line of one app; who leaves it passes on what it was called for.
pub struct Place<'a> {
    shared: &'a Shared,
    app: Arc<str>,
    ticket: Ticket,
    called: Arc<Notify>,
    heeded: Calls,
}

impl<'a> Place<'a> {
    pub fn join(shared: &'a Shared, app: &Arc<str>, condition: Condition) -> Place<'a> {
        let called = Arc::new(Notify::new());
        let mut apps = shared.queues.apps();
        let ticket = apps.entry(app.clone()).or_default().join(condition, called.clone());
        shared.queues.waiting.fetch_add(1, SeqCst);
        Place {
            shared,
            app: app.clone(),
            ticket,
            called,
            heeded: Calls::default(),
        }
    }

    pub async fn called(&self) {
        self.called.notified().await;
    }

    /// Before it looks at the machines.
    pub fn heed(&mut self) {
        let calls = self
            .shared
            .queues
            .apps()
            .get_mut(&self.app)
            .map(|line| line.heed(&self.ticket));
        self.heeded.add(calls.unwrap_or_default());
    }

    /// It looked, and nothing was for it: perhaps for somebody behind.
    pub fn pass_by(&mut self) {
        for id in std::mem::take(&mut self.heeded).machines {
            self.shared.queues.call(self.shared, &self.app, &id, Some(&self.ticket));
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let queues = &self.shared.queues;
        let mut calls = std::mem::take(&mut self.heeded);
        let mut apps = queues.apps();
        if let Some(line) = apps.get_mut(&self.app) {
            calls.add(line.leave(&self.ticket));
            queues.waiting.fetch_sub(1, SeqCst);
            if calls.all {
                line.stir().for_each(|called| called.notify_one());
            }
            if line.is_empty() {
                apps.remove(&self.app);
            }
        }
        drop(apps);
        for id in calls.machines {
            queues.call(self.shared, &self.app, &id, None);
        }
    }
}
