//! Which packet may go when. Pure: time and chance are arguments.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::time::{Duration, Instant};

use crate::queue::{Packet, Verdict};

#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Distance {
    pub one_way: Duration,
    /// Chance that a packet does not arrive, 0 to 1.
    pub loss: f64,
}

const NEAR: Distance = Distance {
    one_way: Duration::ZERO,
    loss: 0.0,
};

/// Regions by device, and the matrix of distances.
#[derive(Debug)]
pub struct Table {
    size: usize,
    region_of: HashMap<u32, usize>,
    matrix: Vec<Distance>,
}

impl Table {
    pub fn new(size: usize) -> Table {
        Table {
            size,
            region_of: HashMap::new(),
            matrix: vec![NEAR; size * size],
        }
    }

    pub fn add_device(&mut self, index: u32, region: usize) {
        self.region_of.insert(index, region);
    }

    pub fn set(&mut self, a: usize, b: usize, distance: Distance) {
        self.matrix[a * self.size + b] = distance;
        self.matrix[b * self.size + a] = distance;
    }

    #[cfg(test)]
    pub fn devices(&self) -> usize {
        self.region_of.len()
    }

    fn distance(&self, packet: &Packet) -> Distance {
        match (
            self.region_of.get(&packet.came_by),
            self.region_of.get(&packet.leaves_by),
        ) {
            (Some(from), Some(to)) => self.matrix[from * self.size + to],
            _ => NEAR,
        }
    }
}

/// Packets on their way. The kernel bounds how many there are.
pub struct Delays {
    table: Table,
    /// Due, then in the order of arrival.
    under_way: BinaryHeap<Reverse<(Instant, u64, u32)>>,
    arrivals: u64,
    lost: u64,
}

impl Delays {
    pub fn new(table: Table) -> Delays {
        Delays {
            table,
            under_way: BinaryHeap::new(),
            arrivals: 0,
            lost: 0,
        }
    }

    /// Packets that are on their way keep their time of arrival.
    pub fn replace(&mut self, table: Table) {
        self.table = table;
    }

    /// The verdict, if it is known at once. `chance` is 0 to 1.
    pub fn take(&mut self, packet: &Packet, now: Instant, chance: f64) -> Option<Verdict> {
        let distance = self.table.distance(packet);
        self.arrivals += 1;
        if chance < distance.loss {
            self.lost += 1;
            return Some(Verdict::lose(packet.id));
        }
        if distance.one_way.is_zero() {
            return Some(Verdict::pass(packet.id));
        }
        let entry = (now + distance.one_way, self.arrivals, packet.id);
        self.under_way.push(Reverse(entry));
        None
    }

    /// When the next packet is due.
    pub fn next(&self) -> Option<Instant> {
        self.under_way.peek().map(|Reverse((at, _, _))| *at)
    }

    pub fn release(&mut self, now: Instant, due: &mut Vec<Verdict>) {
        while self.next().is_some_and(|at| at <= now) {
            if let Some(Reverse((_, _, id))) = self.under_way.pop() {
                due.push(Verdict::pass(id));
            }
        }
    }

    pub fn stats(&self) -> serde_json::Value {
        serde_json::json!({
            "packets": self.arrivals,
            "lost": self.lost,
            "under_way": self.under_way.len(),
            "devices": self.table.region_of.len(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    fn packet(id: u32, came_by: u32, leaves_by: u32) -> Packet {
        Packet { id, came_by, leaves_by }
    }

    /// Devices 1, 2, 3 in regions 0, 1, 2; 10 ms between 0 and 1, 30 ms between 0 and 2.
    fn delays(loss: f64) -> Delays {
        let mut table = Table::new(3);
        for device in 1..=3 {
            table.add_device(device, device as usize - 1);
        }
        table.set(0, 1, Distance { one_way: 10 * MS, loss });
        table.set(0, 2, Distance { one_way: 30 * MS, loss });
        Delays::new(table)
    }

    fn released(delays: &mut Delays, now: Instant) -> Vec<Verdict> {
        let mut due = Vec::new();
        delays.release(now, &mut due);
        due
    }

    #[test]
    fn packets_leave_after_their_way_in_the_order_in_which_they_came() {
        let (mut delays, start) = (delays(0.0), Instant::now());
        assert_eq!(delays.take(&packet(1, 1, 3), start, 0.5), None);
        assert_eq!(delays.take(&packet(2, 2, 1), start, 0.5), None);
        assert_eq!(delays.take(&packet(3, 1, 2), start, 0.5), None);
        assert_eq!(delays.next(), Some(start + 10 * MS));
        assert_eq!(released(&mut delays, start + 9 * MS), []);
        assert_eq!(
            released(&mut delays, start + 10 * MS),
            [Verdict::pass(2), Verdict::pass(3)]
        );
        assert_eq!(released(&mut delays, start + 40 * MS), [Verdict::pass(1)]);
        assert_eq!(delays.next(), None);
    }

    #[test]
    fn within_a_region_and_to_nowhere_nothing_waits() {
        let (mut delays, start) = (delays(0.0), Instant::now());
        for (came_by, leaves_by) in [(1, 1), (1, 9), (9, 1), (2, 3)] {
            assert_eq!(
                delays.take(&packet(7, came_by, leaves_by), start, 0.0),
                Some(Verdict::pass(7))
            );
        }
    }

    #[test]
    fn loss_is_by_chance_and_only_between_regions() {
        let (mut delays, start) = (delays(0.25), Instant::now());
        assert_eq!(delays.take(&packet(1, 1, 2), start, 0.2), Some(Verdict::lose(1)));
        assert_eq!(delays.take(&packet(2, 1, 2), start, 0.3), None);
        assert_eq!(delays.take(&packet(3, 1, 1), start, 0.2), Some(Verdict::pass(3)));
        assert_eq!(delays.stats()["lost"], 1);
    }

    #[test]
    fn new_distances_hold_for_new_packets() {
        let (mut delays, start) = (delays(0.0), Instant::now());
        delays.take(&packet(1, 1, 2), start, 0.5);
        delays.replace(Table::new(0));
        assert_eq!(delays.take(&packet(2, 1, 2), start, 0.5), Some(Verdict::pass(2)));
        assert_eq!(released(&mut delays, start + 10 * MS), [Verdict::pass(1)]);
    }
}
