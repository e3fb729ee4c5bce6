//! The new process's end: gives places on this host's machines to requests on connections of the one that it replaces, as
//! it gives them to its own, and keeps them until that one is done with them or gone.

use std::collections::HashMap;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pantala_route::choose::machine;
use tokio::runtime::Handle;
use tokio::task::AbortHandle;

use super::message::{Message, Want};
use crate::select::Selection;
use crate::shared::Shared;
use crate::slot::Slot;

enum Place {
    Waiting(AbortHandle),
    Lent(#[expect(dead_code, reason = "its end is what counts")] Slot),
}

pub struct Lender {
    shared: Arc<Shared>,
    runtime: Handle,
    voice: Sender<Message>,
    places: Mutex<HashMap<u64, Place>>,
}

impl Lender {
    pub fn new(shared: Arc<Shared>, runtime: Handle, voice: Sender<Message>) -> Arc<Lender> {
        Arc::new(Lender {
            shared,
            runtime,
            voice,
            places: Mutex::default(),
        })
    }

    fn places(&self) -> MutexGuard<'_, HashMap<u64, Place>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn want(self: &Arc<Lender>, id: u64, want: Want) {
        self.shared.metrics.places_asked.fetch_add(1, Relaxed);
        let lender = self.clone();
        let mut places = self.places(); // held, so that the task finds its entry
        let task = self.runtime.spawn(async move { lender.give(id, want).await });
        places.insert(id, Place::Waiting(task.abort_handle()));
    }

    async fn give(&self, id: u64, want: Want) {
        let mut selection = Selection::of_process(&self.shared, &want);
        let answer = match selection.slot().await {
            Ok(slot) => {
                let machine = slot.target.machine.id.to_string();
                match self.places().get_mut(&id) {
                    Some(place) => *place = Place::Lent(slot),
                    None => return, // not wanted any more
                }
                Message::Lent { id, machine }
            }
            Err(refusal) => {
                self.places().remove(&id);
                let view = self.shared.view();
                let app = view.snapshot.apps.get(want.app.as_str());
                let known = app.and_then(|app| machine(app, &want.machine));
                Message::Denied {
                    id,
                    reason: selection.reason.word().to_owned(),
                    happened: refusal.happened,
                    in_flight: known.map_or(0, |machine| machine.gauge.here()),
                }
            }
        };
        // A voice that is gone means that the other process is.
        let _ = self.voice.send(answer);
    }

    pub fn done(&self, id: u64) {
        let place = self.places().remove(&id);
        if let Some(Place::Waiting(task)) = place {
            task.abort();
        }
    }

    /// The other process is gone, and all that it had.
    pub fn end(&self) {
        let places = std::mem::take(&mut *self.places());
        for place in places.into_values() {
            if let Place::Waiting(task) = place {
                task.abort();
            }
        }
    }
}
