//! Request ids: `<ULID>-<edge region>`.

use crate::log::now_ms;

const CROCKFORD: &[u8; 32] = b"0123456789ABCDEFGHJKMNPQRSTVWXYZ";

pub fn request_id(region: &str) -> String {
    format!("{}-{region}", ulid(now_ms(), fastrand::u128(..)))
}

fn ulid(time_ms: u64, random: u128) -> String {
    let value = (u128::from(time_ms) << 80) | (random & ((1 << 80) - 1));
    (0..26)
        .rev()
        .map(|digit| char::from(CROCKFORD[((value >> (digit * 5)) & 31) as usize]))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn twenty_six_digits_that_sort_by_time() {
        assert_eq!(ulid(0, 0), "0".repeat(26));
        assert_eq!(ulid((1 << 48) - 1, u128::MAX), "7ZZZZZZZZZZZZZZZZZZZZZZZZZ");
        assert!(ulid(1, u128::MAX) < ulid(2, 0));
        assert!(request_id("iad").ends_with("-iad"));
    }
}
