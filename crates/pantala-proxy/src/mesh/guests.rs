//! How many of a machine's requests came from which host: said with each answer, so that an edge can tell others' load from
//! its own, whose end it may see before the machine's host does or after.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// machine, then node
type Key = (Arc<str>, Arc<str>);
type Counts = Mutex<HashMap<Key, Arc<AtomicU32>>>;

#[derive(Default)]
pub struct Guests(Arc<Counts>);

/// One request in flight.
pub struct Guest {
    key: Key,
    /// changes with the lock held only
    count: Arc<AtomicU32>,
    all: Arc<Counts>,
}

fn lock(all: &Counts) -> MutexGuard<'_, HashMap<Key, Arc<AtomicU32>>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub fn enter(&self, machine: &Arc<str>, node: &Arc<str>) -> Guest {
        let key = (machine.clone(), node.clone());
        let mut all = lock(&self.0);
        let count = all.entry(key.clone()).or_default().clone();
        count.fetch_add(1, Relaxed);
        drop(all);
        Guest {
            key,
            count,
            all: self.0.clone(),
        }
    }

    /// None: it has no request there. To be read as often as one likes.
    pub fn of(&self, machine: &Arc<str>, node: &Arc<str>) -> Option<Arc<AtomicU32>> {
        lock(&self.0).get(&(machine.clone(), node.clone())).cloned()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        if self.count.fetch_sub(1, Relaxed) == 1 {
            all.remove(&self.key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_host_is_told_its_own() {
        let (guests, machine) = (Guests::default(), Arc::from("m1"));
        let (one, two): (Arc<str>, Arc<str>) = ("n1".into(), "n2".into());
        let first = guests.enter(&machine, &one);
        let second = guests.enter(&machine, &one);
        let third = guests.enter(&machine, &two);
        let of = |node| guests.of(&machine, node).map_or(0, |count| count.load(Relaxed));
        assert_eq!((of(&one), of(&two)), (2, 1));
        drop((first, third));
        assert_eq!((of(&one), of(&two)), (1, 0));
        drop(second);
        assert!(lock(&guests.0).is_empty());
    }
}
