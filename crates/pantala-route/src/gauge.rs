//! What is in flight on one machine, and whether it drains: one atomic word, so that taking a slot and starting a drain
//! cannot miss each other. A gauge outlives snapshots; it belongs to the machine's id.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering::SeqCst};

const IN_FLIGHT_BITS: u32 = 20;
const IN_FLIGHT: u64 = (1 << IN_FLIGHT_BITS) - 1;
const DRAINING: u64 = 1 << 63;
/// Places are given by another process.
const HANDED_OVER: u64 = 1 << 62;
const SEQ: u64 = !(DRAINING | HANDED_OVER | IN_FLIGHT);

/// No limit set: still bounded by the width of the counter.
pub const UNLIMITED: u32 = IN_FLIGHT as u32;

#[derive(Debug, Default)]
pub struct Gauge {
    /// draining (1 bit), handed over (1 bit), requests so far (42 bits, wraps), in flight (20 bits)
    word: AtomicU64,
    last_end_ms: AtomicU64,
    epoch: AtomicU32,
    /// Of a machine on another host: when its proxy said so (44 bits of milliseconds, 0: never) and what is in flight there
    /// beside our own requests (20 bits, in sixteenths).
    others: AtomicU64,
    /// What a second process of this host's proxy has in flight, while one replaces the other.
    elsewhere: AtomicU32,
}

/// What another host's proxy said of a machine's load is worth something for so long.
const REPORT_HOLDS_MS: u64 = 1_000;
/// So much time between two reports makes them count alike.
const REPORT_HALVES_MS: u64 = 300;
const FRACTION: u64 = 16;
const OTHERS_MAX: u32 = UNLIMITED / FRACTION as u32;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    pub draining: bool,
    pub seq: u64,
    pub in_flight: u32,
}

impl From<u64> for Reading {
    fn from(word: u64) -> Self {
        Reading {
            draining: word & DRAINING != 0,
            seq: (word & SEQ) >> IN_FLIGHT_BITS,
            in_flight: (word & IN_FLIGHT) as u32,
        }
    }
}

impl Gauge {
    pub fn read(&self) -> Reading {
        self.word.load(SeqCst).into()
    }

    /// Takes a slot unless the machine drains, `hard` are taken, or another process gives them.
    pub fn acquire(&self, hard: u32) -> bool {
        let hard = hard.min(UNLIMITED).saturating_sub(self.elsewhere.load(SeqCst));
        self.count(hard, DRAINING | HANDED_OVER)
    }

    /// Counts a request whose slot somebody else gives: the proxy of the machine's host, or the process that replaces this one.
    pub fn propose(&self) -> bool {
        self.count(UNLIMITED, DRAINING)
    }

    fn count(&self, hard: u32, unless: u64) -> bool {
        let taken = self.word.fetch_update(SeqCst, SeqCst, |word| {
            let now = Reading::from(word);
            if word & unless != 0 || now.in_flight >= hard {
                return None;
            }
            let seq = word.wrapping_add(1 << IN_FLIGHT_BITS) & SEQ;
            Some((word & HANDED_OVER) | seq | ((word & IN_FLIGHT) + 1))
        });
        taken.is_ok()
    }

    /// Gives a slot back and says what is left.
    pub fn release(&self, now_ms: u64) -> Reading {
        self.last_end_ms.store(now_ms, SeqCst);
        let before = self.word.fetch_sub(1, SeqCst);
        debug_assert!(before & IN_FLIGHT > 0, "a slot is released once");
        (before - 1).into()
    }

    /// The proxy of the machine's host said how many requests of others are in flight there. Ours are counted here: at the
    /// moment when its word arrives some of those that it counted have ended. What was said a moment ago counts as well:
    /// edges that all follow the newest word of one machine would all go there at once, and then all leave it.
    pub fn report(&self, others: u32, now_ms: u64) {
        let new = u64::from(others.min(OTHERS_MAX)) * FRACTION;
        let smooth = |word: u64| {
            let (old, age_ms) = (word & IN_FLIGHT, (now_ms + 1).saturating_sub(word >> IN_FLIGHT_BITS));
            let known = word != 0 && age_ms < REPORT_HOLDS_MS;
            let others = match known {
                true => (old * REPORT_HALVES_MS + new * age_ms.max(1)) / (REPORT_HALVES_MS + age_ms.max(1)),
                false => new,
            };
            Some((now_ms + 1) << IN_FLIGHT_BITS | others)
        };
        // The closure always answers, so there is nothing to fail.
        let _ = self.others.fetch_update(SeqCst, SeqCst, smooth);
    }

    /// It refused because it is full: that counts as it is.
    pub fn report_full(&self, others: u32, now_ms: u64) {
        let others = u64::from(others.min(OTHERS_MAX)) * FRACTION;
        self.others.store((now_ms + 1) << IN_FLIGHT_BITS | others, SeqCst);
    }

    /// Our own requests and, for a machine on another host, what is known of the others'.
    pub fn load(&self, now_ms: u64) -> u32 {
        let own = self.here();
        let word = self.others.load(SeqCst);
        let fresh = word != 0 && now_ms < (word >> IN_FLIGHT_BITS) + REPORT_HOLDS_MS;
        let others = ((word & IN_FLIGHT) + FRACTION / 2) / FRACTION;
        own + if fresh { others as u32 } else { 0 }
    }

    /// In flight through all processes of this host's proxy.
    pub fn here(&self) -> u32 {
        self.read().in_flight + self.elsewhere.load(SeqCst)
    }

    /// From now on [`Gauge::acquire`] gives nothing here; what is in flight at this moment is the last that it gave.
    pub fn hand_over(&self) {
        self.word.fetch_or(HANDED_OVER, SeqCst);
    }

    pub fn take_back(&self) {
        self.word.fetch_and(!HANDED_OVER, SeqCst);
    }

    /// A request that is there already, with a place of the second process, which has ended.
    pub fn inherit(&self) {
        self.count(UNLIMITED, 0);
    }

    /// The other process of this host's proxy said how much it has in flight. Loads that are reported stay our own: the
    /// agent hears from both.
    pub fn set_elsewhere(&self, in_flight: u32) {
        self.elsewhere.store(in_flight.min(UNLIMITED), SeqCst);
    }

    /// Stops new requests. With `load_seq` only if none came since; the answer is whether it drains now.
    pub fn drain(&self, load_seq: Option<u64>) -> bool {
        let started = self.word.fetch_update(SeqCst, SeqCst, |word| match load_seq {
            Some(seq) if Reading::from(word).seq != seq => None,
            _ => Some(word | DRAINING),
        });
        started.is_ok()
    }

    pub fn undrain(&self) {
        self.word.fetch_and(!DRAINING, SeqCst);
    }

    pub fn idle_ms(&self, now_ms: u64) -> u64 {
        if self.read().in_flight > 0 {
            0
        } else {
            now_ms.saturating_sub(self.last_end_ms.load(SeqCst))
        }
    }

    /// Idle time counts from here for a machine that had no request yet.
    pub fn touch(&self, now_ms: u64) {
        self.last_end_ms.fetch_max(now_ms, SeqCst);
    }

    /// Connections opened in an older epoch lead to a process that is gone.
    pub fn epoch(&self) -> u32 {
        self.epoch.load(SeqCst)
    }

    pub fn next_epoch(&self) -> u32 {
        self.epoch.fetch_add(1, SeqCst).wrapping_add(1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;

    proptest! {
        #[test]
        fn never_above_the_hard_limit_and_never_while_draining(hard in 1u32..6, steps in prop::collection::vec(0u8..4, 0..200)) {
            let gauge = Gauge::default();
            let (mut held, mut draining, mut seq) = (0u32, false, 0u64);
            for step in steps {
                match step {
                    0 | 1 => {
                        let got = gauge.acquire(hard);
                        prop_assert_eq!(got, !draining && held < hard);
                        held += u32::from(got);
                        seq += u64::from(got);
                    }
                    2 if held > 0 => { gauge.release(0); held -= 1; }
                    2 => {}
                    _ => { draining = !draining; if draining { gauge.drain(None); } else { gauge.undrain(); } }
                }
                prop_assert_eq!(gauge.read(), Reading { draining, seq, in_flight: held });
                prop_assert!(held <= hard);
            }
        }

        #[test]
        fn a_drain_with_a_stale_sequence_is_refused(before in 0u64..20, since in 0u64..3) {
            let gauge = Gauge::default();
            for _ in 0..before + since {
                gauge.acquire(UNLIMITED);
            }
            prop_assert_eq!(gauge.drain(Some(before)), since == 0);
            prop_assert_eq!(gauge.read().draining, since == 0);
        }
    }

    #[test]
    fn what_others_have_in_flight_is_added_for_a_while() {
        let gauge = Gauge::default();
        assert!(gauge.acquire(9));
        gauge.report(4, 100);
        assert_eq!(gauge.load(100), 5);
        assert!(gauge.acquire(9));
        assert_eq!(gauge.load(200), 6);
        gauge.release(200);
        gauge.release(200);
        assert_eq!(gauge.load(300), 4);
        assert_eq!(gauge.load(100 + REPORT_HOLDS_MS + 1), 0);
        gauge.report(0, 5_000);
        assert_eq!(gauge.load(5_000), 0);
    }

    #[test]
    fn a_limit_holds_over_two_processes() {
        let gauge = Gauge::default();
        gauge.set_elsewhere(2);
        assert!(gauge.acquire(3));
        assert!(!gauge.acquire(3));
        assert_eq!((gauge.load(0), gauge.read().in_flight), (3, 1));
        gauge.set_elsewhere(9);
        assert!(!gauge.acquire(3));
        gauge.set_elsewhere(0);
        assert!(gauge.acquire(3));
    }

    proptest! {
        /// The old process hands over and asks; what each tells the other arrives late, in order. The second one may end.
        #[test]
        fn a_limit_holds_while_one_process_replaces_another(
            hard in 1u32..5, before in 0u32..5, steps in prop::collection::vec(0u8..8, 0..200), ends in prop::option::of(0usize..200),
        ) {
            let (old, new) = (Gauge::default(), Gauge::default());
            let (mut own, mut lent, mut news) = (0, 0, 0);
            (0..before).for_each(|_| own += u32::from(old.acquire(hard)));
            old.hand_over();
            let mut on_its_way = std::collections::VecDeque::from([old.read().in_flight]);
            new.set_elsewhere(own);
            for (at, step) in steps.into_iter().enumerate() {
                if ends == Some(at) {
                    (0..lent).for_each(|_| old.inherit());
                    old.set_elsewhere(0);
                    old.take_back();
                    (own, lent, news) = (own + lent, 0, 0);
                }
                let over = ends.is_some_and(|ends| ends <= at);
                match step {
                    0 if over => own += u32::from(old.acquire(hard)),
                    0 => prop_assert!(!old.acquire(hard)),
                    1 if !over => lent += u32::from(new.acquire(hard)),
                    2 if !over => news += u32::from(new.acquire(hard)),
                    3 if own > 0 => { old.release(0); own -= 1; }
                    4 if lent > 0 => { new.release(0); lent -= 1; }
                    5 if news > 0 => { new.release(0); news -= 1; }
                    6 => on_its_way.push_back(old.read().in_flight),
                    7 => on_its_way.pop_front().into_iter().for_each(|told| new.set_elsewhere(told)),
                    _ => {}
                }
                prop_assert!(own + lent + news <= hard);
            }
        }
    }

    #[test]
    fn a_single_word_does_not_sway_it_but_a_full_machine_does() {
        let gauge = Gauge::default();
        gauge.report(8, 10);
        gauge.report(0, 20);
        assert_eq!(gauge.load(20), 8, "ten milliseconds are little");
        gauge.report(0, 320);
        assert_eq!(gauge.load(320), 4);
        for step in 0..40 {
            gauge.report(0, 330 + step * 50);
        }
        assert_eq!(gauge.load(2_280), 0);
        gauge.report_full(25, 2_281);
        assert_eq!(gauge.load(2_281), 25);
        gauge.report(u32::MAX, 9_000);
        assert_eq!(gauge.load(9_000), OTHERS_MAX);
    }

    #[test]
    fn threads_share_the_limit() {
        let gauge = Arc::new(Gauge::default());
        let threads: Vec<_> = (0..4)
            .map(|_| {
                let gauge = gauge.clone();
                std::thread::spawn(move || {
                    for _ in 0..20_000 {
                        if gauge.acquire(3) {
                            assert!(gauge.read().in_flight <= 3);
                            gauge.release(1);
                        }
                    }
                })
            })
            .collect();
        for thread in threads {
            thread.join().unwrap();
        }
        assert_eq!(gauge.read().in_flight, 0);
    }

    #[test]
    fn the_sequence_wraps_into_nothing_else() {
        let gauge = Gauge {
            word: AtomicU64::new(SEQ),
            ..Gauge::default()
        };
        assert!(gauge.acquire(1));
        assert_eq!(
            gauge.read(),
            Reading {
                draining: false,
                seq: 0,
                in_flight: 1
            }
        );
    }
}
