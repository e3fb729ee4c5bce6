//! Records of one worker thread, the newest last: bounded by memory and by time, grown chunk by chunk, so that a proxy
//! without requests keeps none. Pushed by its own thread alone; who looks something up holds the lock for one chunk at a time.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::record::Record;
use crate::ids::Ulid;

/// Records that are taken and given back at once.
const CHUNK: usize = 256;
pub const KEPT_US: u64 = 10 * 60 * 1_000_000;

pub struct Ring {
    kept: Mutex<Kept>,
    chunks_max: usize,
}

/// Where a record was put: how many came before it.
pub type Place = u64;

#[derive(Default)]
struct Kept {
    chunks: VecDeque<Vec<Record>>,
    /// number of the first chunk
    first: u64,
    /// when the newest record was written that is gone
    lost_us: u64,
}

impl Ring {
    pub fn new(bytes_max: usize) -> Ring {
        Ring {
            kept: Mutex::default(),
            chunks_max: (bytes_max / (CHUNK * size_of::<Record>())).max(2),
        }
    }

    pub fn push(&self, record: Record) -> Place {
        let mut kept = self.lock();
        if kept.chunks.back().is_none_or(|chunk| chunk.len() == CHUNK) {
            kept.turn(self.chunks_max, record.at_us());
        }
        let number = kept.first + kept.chunks.len() as u64 - 1;
        let Some(chunk) = kept.chunks.back_mut() else {
            return 0; // `turn` has made one
        };
        chunk.push(record);
        number * CHUNK as u64 + chunk.len() as u64 - 1
    }

    /// Changes a record that is still there.
    pub fn change(&self, place: Place, change: impl FnOnce(&mut Record)) {
        let mut kept = self.lock();
        let (number, at) = (place / CHUNK as u64, place as usize % CHUNK);
        let chunk = number.checked_sub(kept.first);
        let found = chunk.and_then(|chunk| kept.chunks.get_mut(chunk as usize)?.get_mut(at));
        if let Some(record) = found {
            change(record);
        }
    }

    pub fn find(&self, id: Ulid) -> Vec<Record> {
        let (mut found, mut number) = (Vec::new(), 0);
        loop {
            let kept = self.lock();
            number = number.max(kept.first);
            let Some(chunk) = kept.chunks.get((number - kept.first) as usize) else {
                return found;
            };
            found.extend(chunk.iter().filter(|record| record.id == id).cloned());
            number += 1;
        }
    }

    /// A record that was written later is here.
    pub fn lost_us(&self) -> u64 {
        self.lock().lost_us
    }

    /// Gives back what is too old, for times when nothing is pushed.
    pub fn expire(&self, now_us: u64) {
        let mut kept = self.lock();
        while kept.expired(now_us) {
            kept.pop();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Kept {
    /// A chunk with room at the end: an old one that must go anyway, or a new one.
    fn turn(&mut self, chunks_max: usize, now_us: u64) {
        let mut room = None;
        while self.expired(now_us) || self.chunks.len() >= chunks_max {
            room = self.pop();
        }
        let mut chunk = room.unwrap_or_else(|| Vec::with_capacity(CHUNK));
        chunk.clear();
        self.chunks.push_back(chunk);
    }

    fn expired(&self, now_us: u64) -> bool {
        let newest = self.chunks.front().and_then(|chunk| chunk.last());
        newest.is_some_and(|record| record.at_us() + KEPT_US < now_us)
    }

    fn pop(&mut self) -> Option<Vec<Record>> {
        let chunk = self.chunks.pop_front()?;
        self.first += 1;
        self.lost_us = chunk.last().map_or(self.lost_us, Record::at_us);
        Some(chunk)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::RequestId;
    use crate::trace::record::{Outcome, Role, Who};

    fn id(number: u64) -> Ulid {
        RequestId::read(&format!("{number:026}")).unwrap().ulid
    }

    fn record(number: u64, at_us: u64) -> Record {
        Record {
            began_us: at_us,
            ..Record::new(id(number), Role::Edge, Outcome::Answered, Who::Nobody)
        }
    }

    fn ring(chunks: usize) -> Ring {
        Ring::new(chunks * CHUNK * size_of::<Record>())
    }

    #[test]
    fn a_record_is_found_until_newer_ones_need_its_room() {
        let ring = ring(3);
        assert_eq!((ring.find(id(1)).len(), ring.lost_us()), (0, 0));
        for number in 0..3 * CHUNK as u64 {
            assert_eq!(ring.push(record(number, number)), number);
        }
        assert_eq!((ring.find(id(0)).len(), ring.lost_us()), (1, 0));
        ring.push(record(9_999, 9_999));
        assert_eq!((ring.find(id(0)).len(), ring.lost_us()), (0, CHUNK as u64 - 1));
        assert_eq!(ring.find(id(9_999)).len(), 1);
        assert_eq!(ring.find(id(CHUNK as u64)).len(), 1);
        assert_eq!(ring.lock().chunks.len(), 3);
    }

    #[test]
    fn all_tries_of_one_request_are_found() {
        let ring = ring(2);
        for number in [7, 8, 7] {
            ring.push(record(number, 1));
        }
        assert_eq!(ring.find(id(7)).len(), 2);
    }

    #[test]
    fn a_record_is_changed_where_it_is_and_only_while_it_is() {
        let ring = ring(2);
        let places: Vec<Place> = (0..2 * CHUNK as u64 + 1)
            .map(|number| ring.push(record(number, 1)))
            .collect();
        for place in &places {
            ring.change(*place, |record| record.status = 204);
        }
        assert!(ring.find(id(0)).is_empty());
        assert_eq!(ring.find(id(CHUNK as u64))[0].status, 204);
        assert_eq!(ring.find(id(2 * CHUNK as u64))[0].status, 204);
        ring.change(1 << 60, |_| unreachable!());
    }

    #[test]
    fn what_is_old_goes_even_when_nothing_comes() {
        let ring = ring(8);
        for number in 0..CHUNK as u64 + 1 {
            ring.push(record(number, number));
        }
        ring.expire(KEPT_US + CHUNK as u64 - 1);
        assert_eq!(ring.find(id(0)).len(), 1, "the newest of its chunk is kept");
        ring.expire(KEPT_US + CHUNK as u64);
        assert_eq!((ring.find(id(0)).len(), ring.lost_us()), (0, CHUNK as u64 - 1));
        ring.expire(u64::MAX);
        assert_eq!(ring.lost_us(), CHUNK as u64);
        assert!(ring.lock().chunks.is_empty());
        let place = ring.push(record(5, KEPT_US * 2));
        ring.change(place, |record| record.status = 200);
        assert_eq!(ring.find(id(5))[0].status, 200);
    }
}
