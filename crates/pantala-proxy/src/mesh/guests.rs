//! How many of a machine's requests came from which host: said with each answer, so that an edge can tell others' load from
//! its own, whose end it may see before the machine's host does or after.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// machine, then node
type Key = (Arc<str>, Arc<str>);

#[derive(Default)]
pub struct Guests(Arc<Mutex<HashMap<Key, u32>>>);

/// One request in flight.
pub struct Guest {
    key: Key,
    all: Arc<Mutex<HashMap<Key, u32>>>,
}

fn lock(all: &Mutex<HashMap<Key, u32>>) -> MutexGuard<'_, HashMap<Key, u32>> {
    all.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guests {
    pub fn enter(&self, machine: &Arc<str>, node: &Arc<str>) -> Guest {
        let key = (machine.clone(), node.clone());
        *lock(&self.0).entry(key.clone()).or_default() += 1;
        Guest {
            key,
            all: self.0.clone(),
        }
    }

    pub fn of(&self, machine: &Arc<str>, node: &Arc<str>) -> u32 {
        let key = (machine.clone(), node.clone());
        lock(&self.0).get(&key).copied().unwrap_or_default()
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let mut all = lock(&self.all);
        if let Some(count) = all.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.key);
            }
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
        assert_eq!((guests.of(&machine, &one), guests.of(&machine, &two)), (2, 1));
        drop((first, third));
        assert_eq!((guests.of(&machine, &one), guests.of(&machine, &two)), (1, 0));
        drop(second);
        assert!(lock(&guests.0).is_empty());
    }
}
