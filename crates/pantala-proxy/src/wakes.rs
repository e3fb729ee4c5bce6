//! Machines on their way up: one wake per machine however many requests wait for it.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pantala_wire::feed::WakeResult;
use tokio::sync::watch;

pub type Outcome = Option<Arc<WakeResult>>;

pub struct Pending {
    pub id: u64,
    pub since: Instant,
    /// on the current connection to the agent
    pub sent: bool,
    done: watch::Sender<Outcome>,
}

#[derive(Default)]
pub struct Wakes {
    pending: Mutex<HashMap<Arc<str>, Pending>>,
    /// machines that could not be woken, and when: others serve meanwhile without asking again at each request
    refused: Mutex<HashMap<String, Instant>>,
    last_id: AtomicU64,
}

const REFUSAL_HOLDS: Duration = Duration::from_secs(2);

impl Wakes {
    fn pending(&self) -> MutexGuard<'_, HashMap<Arc<str>, Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn any(&self) -> bool {
        !self.pending().is_empty()
    }

    pub fn under_way(&self, machine: &str) -> bool {
        self.pending().contains_key(machine)
    }

    /// The outcome to wait for, and whether this call began the wake.
    pub fn join(&self, machine: &Arc<str>) -> (watch::Receiver<Outcome>, bool) {
        let mut pending = self.pending();
        if let Some(known) = pending.get(machine) {
            return (known.done.subscribe(), false);
        }
        let id = self.last_id.fetch_add(1, Relaxed) + 1;
        let (done, receiver) = watch::channel(None);
        pending.insert(
            machine.clone(),
            Pending {
                id,
                since: Instant::now(),
                sent: false,
                done,
            },
        );
        (receiver, true)
    }

    /// Wakes that the agent has not been asked for on this connection; they count as asked from now on.
    pub fn take_unsent(&self) -> Vec<(u64, Arc<str>, Instant)> {
        let mut unsent = Vec::new();
        for (machine, wake) in self.pending().iter_mut().filter(|(_, wake)| !wake.sent) {
            wake.sent = true;
            unsent.push((wake.id, machine.clone(), wake.since));
        }
        unsent
    }

    /// A new connection to the agent knows nothing of what an older one was asked.
    pub fn forget_sent(&self) {
        self.pending().values_mut().for_each(|wake| wake.sent = false);
    }

    pub fn refused_lately(&self, machine: &str) -> bool {
        self.refusals()
            .get(machine)
            .is_some_and(|at| at.elapsed() < REFUSAL_HOLDS)
    }

    fn refusals(&self) -> MutexGuard<'_, HashMap<String, Instant>> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// It could not be woken, here or by the proxy of its host.
    pub fn refused(&self, machine: &str) {
        let mut refused = self.refusals();
        refused.retain(|_, at| at.elapsed() < REFUSAL_HOLDS);
        refused.insert(machine.to_owned(), Instant::now());
    }

    pub fn resolve(&self, result: WakeResult) {
        if !result.ok {
            self.refused(&result.machine);
        }
        let mut pending = self.pending();
        // The id guards against the late answer to a wake that was given up.
        if pending.get(&*result.machine).is_some_and(|wake| wake.id == result.id)
            && let Some(wake) = pending.remove(&*result.machine)
        {
            wake.done.send_replace(Some(Arc::new(result)));
        }
    }

    /// Ends what waits longer than `limit`, or longer than `hold` for an agent that is away since `away`.
    pub fn expire(&self, limit: Duration, hold: Duration, away: Option<Instant>) {
        let mut over = Vec::new();
        for (machine, wake) in self.pending().iter() {
            let reason = if wake.since.elapsed() >= limit {
                ("PM03", "the machine did not become ready in time")
            } else if away.is_some_and(|away| away.max(wake.since).elapsed() >= hold) {
                ("PM02", "the agent of this host is away")
            } else {
                continue;
            };
            over.push((wake.id, machine.to_string(), reason));
        }
        for (id, machine, (code, reason)) in over {
            self.resolve(WakeResult {
                id,
                machine,
                ok: false,
                ip4: String::new(),
                code: code.to_owned(),
                reason: reason.to_owned(),
                elsewhere: false,
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn result(id: u64, ok: bool) -> WakeResult {
        let (machine, ip4) = ("m1".to_owned(), "127.0.0.1".to_owned());
        WakeResult {
            id,
            machine,
            ok,
            ip4,
            code: String::new(),
            reason: String::new(),
            elsewhere: false,
        }
    }

    #[test]
    fn one_wake_for_all_who_wait() {
        let wakes = Wakes::default();
        let machine: Arc<str> = "m1".into();
        let (first, began) = wakes.join(&machine);
        let (second, again) = wakes.join(&machine);
        assert!(began && !again && wakes.under_way("m1"));
        let sent = wakes.take_unsent();
        assert_eq!((sent.len(), wakes.take_unsent().len()), (1, 0));
        wakes.forget_sent();
        assert_eq!(wakes.take_unsent()[0].0, sent[0].0, "asked again under the same id");
        wakes.resolve(result(sent[0].0 + 1, true));
        assert!(first.borrow().is_none(), "an answer to another wake");
        wakes.resolve(result(sent[0].0, true));
        assert!(first.borrow().as_ref().unwrap().ok && second.borrow().as_ref().unwrap().ok);
        assert!(!wakes.under_way("m1"));
    }

    #[test]
    fn an_absent_agent_is_waited_for_only_so_long() {
        let wakes = Wakes::default();
        let (waiting, _) = wakes.join(&"m1".into());
        wakes.expire(Duration::from_secs(9), Duration::from_secs(9), Some(Instant::now()));
        assert!(waiting.borrow().is_none());
        wakes.expire(Duration::from_secs(9), Duration::ZERO, Some(Instant::now()));
        assert_eq!(waiting.borrow().as_ref().unwrap().code, "PM02");
        let (waiting, _) = wakes.join(&"m1".into());
        wakes.expire(Duration::ZERO, Duration::ZERO, None);
        assert_eq!(waiting.borrow().as_ref().unwrap().code, "PM03");
    }
}
