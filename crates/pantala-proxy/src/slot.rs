//! A request's place on a machine, from the choice to the last byte of the answer.

use std::sync::Arc;

use pantala_route::snapshot::Target;
use pantala_route::turn::Attempt;
use pantala_wire::feed::ProxyLog;

use crate::codes;
use crate::handover::asking::Lent;
use crate::ids::RequestId;
use crate::mesh::Waking;
use crate::mesh::guests::Guest;
use crate::shared::Shared;

/// One request's place on a machine; given back when dropped. On another host it is only proposed: that host's proxy takes it.
pub struct Slot {
    pub target: Target,
    pub attempt: Attempt,
    waking: Option<Waking>,
    /// came from another host, and counts as its until the gauge has let go
    _guest: Option<Guest>,
    /// the process that replaces this one gave it and counts it
    lent: Option<Lent>,
    shared: Arc<Shared>,
}

impl Slot {
    /// Of a slot that the gauge gave.
    pub fn new(shared: &Arc<Shared>, target: Target, attempt: Attempt, guest: Option<Guest>) -> Slot {
        let waking = match (&shared.mesh, attempt) {
            (Some(mesh), Attempt::Wake) => Some(mesh.wait_for(&target.machine.id)),
            _ => None,
        };
        Slot {
            target,
            attempt,
            waking,
            _guest: guest,
            lent: None,
            shared: shared.clone(),
        }
    }

    pub fn of_lent(shared: &Arc<Shared>, target: Target, lent: Lent, guest: Option<Guest>) -> Slot {
        let mut slot = Slot::new(shared, target, Attempt::Take, guest);
        slot.lent = Some(lent);
        slot
    }

    /// The answer began and will not end; its client sees the connection end.
    pub fn broke_off(&self, request: Option<RequestId>) {
        let machine = &self.target.machine;
        let (code, message) = match machine.gauge.epoch() == machine.epoch {
            true => ("PU02", "The app ended the connection in the middle of an answer."),
            false => (
                "PR02",
                "The machine stopped or was replaced in the middle of an answer.",
            ),
        };
        let advice = codes::find(code).map_or("", |code| code.advice);
        self.shared.tell_agent(ProxyLog {
            app: machine.app.to_string(),
            code: code.to_owned(),
            message: format!("{message} {advice}"),
            machine: machine.id.to_string(),
            request_id: request.map_or_else(String::new, |id| id.text()),
        });
    }

    /// The machine took the request, so it is awake.
    pub fn arrived(&mut self) {
        self.waking = None;
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        if self.lent.take().is_some_and(|lent| !lent.end()) {
            return;
        }
        let left = self.target.machine.gauge.release(self.shared.elapsed_ms());
        if left.draining && left.in_flight == 0 {
            self.shared.emptied.notify_one();
        }
        let machine = &self.target.machine;
        self.shared.queues.call(&self.shared, &machine.app, &machine.id, None);
    }
}
