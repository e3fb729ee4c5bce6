//! The waiting room: every request that has to wait for a machine (asleep, full, unhealthy, silent) has a place here. It holds
//! so many for each app and so many in all; who comes later is told at once to come again.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

pub struct Room {
    per_app_max: usize,
    max: usize,
    inside: AtomicUsize,
    apps: Mutex<HashMap<Arc<str>, usize>>,
}

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Full {
    #[error("{0} requests already wait")]
    App(usize),
    #[error("{0} requests of all apps already wait at this host")]
    Host(usize),
}

impl Room {
    pub fn new(per_app_max: usize, max: usize) -> Arc<Room> {
        Arc::new(Room {
            per_app_max,
            max,
            inside: AtomicUsize::new(0),
            apps: Mutex::default(),
        })
    }

    pub fn len(&self) -> usize {
        self.inside.load(Relaxed)
    }

    fn apps(&self) -> MutexGuard<'_, HashMap<Arc<str>, usize>> {
        self.apps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub fn enter(self: &Arc<Room>, app: &Arc<str>) -> Result<Inside, Full> {
        let mut apps = self.apps();
        let inside = self.len();
        if inside >= self.max {
            return Err(Full::Host(inside));
        }
        let of_app = apps.entry(app.clone()).or_default();
        if *of_app >= self.per_app_max {
            return Err(Full::App(*of_app));
        }
        *of_app += 1;
        self.inside.store(inside + 1, Relaxed); // counted under the lock only
        Ok(Inside {
            room: self.clone(),
            app: app.clone(),
        })
    }
}

/// One request's place; leaving is dropping it.
pub struct Inside {
    room: Arc<Room>,
    app: Arc<str>,
}

impl Drop for Inside {
    fn drop(&mut self) {
        let mut apps = self.room.apps();
        self.room.inside.fetch_sub(1, Relaxed);
        if let Some(of_app) = apps.get_mut(&self.app) {
            *of_app -= 1;
            if *of_app == 0 {
                apps.remove(&self.app);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounded_for_each_app_and_in_all() {
        let room = Room::new(2, 3);
        let (one, two): (Arc<str>, Arc<str>) = ("one".into(), "two".into());
        let first = room.enter(&one).ok().unwrap();
        let _second = room.enter(&one).ok().unwrap();
        assert_eq!(room.enter(&one).err(), Some(Full::App(2)));
        let third = room.enter(&two).ok().unwrap();
        assert_eq!(room.enter(&two).err(), Some(Full::Host(3)));
        drop(first);
        let fourth = room.enter(&one).ok().unwrap();
        drop((third, fourth, _second));
        assert_eq!(room.len(), 0);
        assert!(room.apps().is_empty());
    }
}
