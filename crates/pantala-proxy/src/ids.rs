//! Request ids: `<ULID>-<edge region>`. A program keeps them as numbers; only headers and lines carry them as text.

use std::fmt;

use crate::log::now_ms;

const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";
const DIGITS: usize = 26;
/// Of a region's code; what is longer is cut off here, and nowhere else.
const REGION_MAX: usize = 16;

/// The part of an id that tells one request from all others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ulid {
    high: u64,
    low: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestId {
    pub ulid: Ulid,
    region: [u8; REGION_MAX],
}

impl Ulid {
    fn new(time_ms: u64, random: u128) -> Ulid {
        Ulid::of((u128::from(time_ms) << 80) | (random & ((1 << 80) - 1)))
    }

    fn of(value: u128) -> Ulid {
        Ulid {
            high: (value >> 64) as u64,
            low: value as u64,
        }
    }

    /// In either case; `I`, `L` and `O` are no digits of it.
    fn read(text: &[u8]) -> Option<Ulid> {
        let digit = |c: &u8| CROCKFORD.iter().position(|known| *known == c.to_ascii_uppercase());
        let mut value = 0_u128;
        for c in text {
            // The first digit carries three bits.
            value = value.checked_mul(32)? | digit(c)? as u128;
        }
        (text.len() == DIGITS).then(|| Ulid::of(value))
    }

    fn write(self, text: &mut String) {
        let value = (u128::from(self.high) << 64) | u128::from(self.low);
        let mut digits = [0; DIGITS];
        for (at, digit) in digits.iter_mut().rev().enumerate() {
            *digit = CROCKFORD[((value >> (at * 5)) & 31) as usize];
        }
        text.extend(std::str::from_utf8(&digits));
    }
}

impl RequestId {
    pub fn new(region: &str) -> RequestId {
        RequestId::of(Ulid::new(now_ms(), fastrand::u128(..)), region)
    }

    fn of(ulid: Ulid, region: &str) -> RequestId {
        let mut kept = [0; REGION_MAX];
        kept.iter_mut().zip(region.bytes()).for_each(|(to, from)| *to = from);
        RequestId { ulid, region: kept }
    }

    /// With or without its region.
    pub fn read(text: &str) -> Option<RequestId> {
        let (digits, region) = text.split_once('-').unwrap_or((text, ""));
        Some(RequestId::of(Ulid::read(digits.as_bytes())?, region))
    }

    pub fn text(&self) -> String {
        let mut text = String::with_capacity(DIGITS + 1 + REGION_MAX);
        self.ulid.write(&mut text);
        text.push('-');
        text.extend(self.region.iter().take_while(|b| **b != 0).map(|b| char::from(*b)));
        text
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(time_ms: u64, random: u128) -> String {
        RequestId::of(Ulid::new(time_ms, random), "iad").text()
    }

    #[test]
    fn twenty_six_digits_that_sort_by_time() {
        assert_eq!(text(0, 0), format!("{}-iad", "0".repeat(26)));
        assert_eq!(text((1 << 48) - 1, u128::MAX), "7ZZZZZZZZZZZZZZZZZZZZZZZZZ-iad");
        assert!(text(1, u128::MAX) < text(2, 0));
        assert!(RequestId::new("iad").text().ends_with("-iad"));
    }

    #[test]
    fn read_as_written_with_or_without_a_region() {
        let id = RequestId::of(Ulid::new(1_732_222_222_222, 77 << 40), "lhr");
        assert_eq!(RequestId::read(&id.text()), Some(id));
        let bare = id.text()[..26].to_ascii_lowercase();
        assert_eq!(RequestId::read(&bare).map(|read| read.ulid), Some(id.ulid));
    }

    #[test]
    fn what_is_no_id_is_none() {
        let id = text(1, 1);
        let bad = [
            "",
            "-iad",
            &id[1..],
            &format!("1{id}"),
            "I0000000000000000000000000",
            "8ZZZZZZZZZZZZZZZZZZZZZZZZZ",
        ];
        assert!(bad.iter().all(|text| RequestId::read(text).is_none()));
    }
}
