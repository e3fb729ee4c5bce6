//! Session tickets: sealed with the keys of the view, which all edges have, so that a session goes on at any of them. Without
//! such keys each process has one of its own.
//!
//! A ticket: name of the key (16 bytes), nonce (12), AES-256-GCM of the session with both as associated data.

use std::fmt;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use arc_swap::ArcSwap;
use pantala_wire::feed::TicketRow;
use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::digest;
use ring::rand::{SecureRandom, SystemRandom};
use tokio_rustls::rustls;
use tokio_rustls::rustls::server::ProducesTickets;

const KEY_BYTES: usize = 32;
const NAME_BYTES: usize = 16;
const HEAD_BYTES: usize = NAME_BYTES + NONCE_LEN;
const LIFETIME_S: u32 = 12 * 3600;

pub struct Tickets {
    /// the newest first
    keys: ArcSwap<Vec<Key>>,
    own: Arc<dyn ProducesTickets>,
    random: SystemRandom,
}

struct Key {
    name: [u8; NAME_BYTES],
    key: LessSafeKey,
    from_ms: i64,
    until_ms: i64,
}

impl fmt::Debug for Tickets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Tickets({} keys)", self.keys.load().len())
    }
}

impl Tickets {
    pub fn new() -> Result<Tickets, rustls::Error> {
        Ok(Tickets {
            keys: ArcSwap::default(),
            own: rustls::crypto::ring::Ticketer::new()?,
            random: SystemRandom::new(),
        })
    }

    /// Puts all rows in force that can be used; the others are named with the reason.
    pub fn replace<'a>(&self, rows: impl Iterator<Item = (&'a String, &'a TicketRow)>) -> Vec<(String, String)> {
        let (mut keys, mut unusable) = (Vec::new(), Vec::new());
        for (row_key, row) in rows {
            match Key::of(row) {
                Some(key) => keys.push(key),
                None => unusable.push((row_key.clone(), "key: not 32 bytes in base64".to_owned())),
            }
        }
        keys.sort_by_key(|key| std::cmp::Reverse(key.from_ms));
        self.keys.store(Arc::new(keys));
        unusable
    }

    fn seal(&self, key: &Key, plain: &[u8]) -> Option<Vec<u8>> {
        let mut nonce = [0; NONCE_LEN];
        self.random.fill(&mut nonce).ok()?;
        let head = [&key.name[..], &nonce].concat();
        let mut sealed = plain.to_vec();
        let nonce = Nonce::assume_unique_for_key(nonce);
        key.key
            .seal_in_place_append_tag(nonce, Aad::from(&head), &mut sealed)
            .ok()?;
        Some([head, sealed].concat())
    }
}

impl Key {
    fn of(row: &TicketRow) -> Option<Key> {
        let bytes = data_encoding::BASE64.decode(row.key.as_bytes()).ok()?;
        if bytes.len() != KEY_BYTES {
            return None;
        }
        let named = digest::digest(&digest::SHA256, &[b"pantala session ticket\0", &bytes[..]].concat());
        Some(Key {
            name: named.as_ref()[..NAME_BYTES].try_into().ok()?,
            key: LessSafeKey::new(UnboundKey::new(&AES_256_GCM, &bytes).ok()?),
            from_ms: row.not_before_ms,
            until_ms: row.not_after_ms,
        })
    }

    fn open(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let (head, sealed) = ticket.split_at_checked(HEAD_BYTES)?;
        let nonce = Nonce::try_assume_unique_for_key(&head[NAME_BYTES..]).ok()?;
        let mut sealed = sealed.to_vec();
        let plain = self.key.open_in_place(nonce, Aad::from(head), &mut sealed).ok()?;
        Some(plain.to_vec())
    }
}

impl ProducesTickets for Tickets {
    fn enabled(&self) -> bool {
        true
    }

    fn lifetime(&self) -> u32 {
        let now = now_ms();
        let keys = self.keys.load();
        let left_s = keys
            .iter()
            .find(|key| key.from_ms <= now && now < key.until_ms)
            .map(|key| (key.until_ms - now) / 1000);
        left_s.map_or(LIFETIME_S, |s| {
            u32::try_from(s).map_or(LIFETIME_S, |s| s.min(LIFETIME_S))
        })
    }

    fn encrypt(&self, plain: &[u8]) -> Option<Vec<u8>> {
        let now = now_ms();
        let keys = self.keys.load();
        match keys.iter().find(|key| key.from_ms <= now && now < key.until_ms) {
            Some(key) => self.seal(key, plain),
            None => self.own.encrypt(plain),
        }
    }

    fn decrypt(&self, ticket: &[u8]) -> Option<Vec<u8>> {
        let now = now_ms();
        let keys = self.keys.load();
        match keys.iter().find(|key| ticket.starts_with(&key.name)) {
            Some(key) if now < key.until_ms => key.open(ticket),
            Some(_) => None,
            None => self.own.decrypt(ticket),
        }
    }
}

fn now_ms() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| since.as_millis() as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(secret: u8, from_ms: i64, until_ms: i64) -> TicketRow {
        TicketRow {
            not_before_ms: from_ms,
            not_after_ms: until_ms,
            sealed_key: String::new(),
            key: data_encoding::BASE64.encode(&[secret; KEY_BYTES]),
        }
    }

    fn edge(rows: &[TicketRow]) -> Tickets {
        let tickets = Tickets::new().unwrap();
        let rows: Vec<(String, &TicketRow)> = rows
            .iter()
            .enumerate()
            .map(|(n, row)| (format!("ticket/{n}"), row))
            .collect();
        assert!(tickets.replace(rows.iter().map(|(key, row)| (key, *row))).is_empty());
        tickets
    }

    #[test]
    fn a_session_goes_on_at_another_edge() {
        let now = now_ms();
        let (old, new) = (row(1, now - 2000, now + 60_000), row(2, now - 1000, now + 120_000));
        let (here, there) = (edge(&[old.clone(), new.clone()]), edge(&[new, old.clone()]));
        let ticket = here.encrypt(b"session").unwrap();
        assert_eq!(there.decrypt(&ticket).unwrap(), b"session");
        assert!(edge(&[old]).decrypt(&ticket).is_none(), "the newest key seals");
        assert!((119..=120).contains(&here.lifetime()));
    }

    #[test]
    fn a_key_opens_before_it_seals_and_until_it_ends() {
        let now = now_ms();
        let (begun, coming) = (row(1, now - 1000, now + 60_000), row(2, now + 30_000, now + 90_000));
        let early = edge(&[row(2, now - 1000, now + 90_000)]);
        let here = edge(&[begun, coming]);
        assert_eq!(here.decrypt(&early.encrypt(b"s").unwrap()).unwrap(), b"s");
        assert!(early.decrypt(&here.encrypt(b"s").unwrap()).is_none());
        let ended = edge(&[row(2, now - 1000, now - 1)]);
        assert!(ended.decrypt(&early.encrypt(b"s").unwrap()).is_none());
    }

    #[test]
    fn without_keys_a_process_opens_its_own() {
        let alone = edge(&[]);
        let ticket = alone.encrypt(b"s").unwrap();
        assert_eq!(alone.decrypt(&ticket).unwrap(), b"s");
        assert!(edge(&[]).decrypt(&ticket).is_none());
    }

    #[test]
    fn what_was_altered_is_no_ticket() {
        let here = edge(&[row(1, 0, i64::MAX)]);
        let ticket = here.encrypt(b"session").unwrap();
        for at in 0..ticket.len() {
            let mut altered = ticket.clone();
            altered[at] ^= 1;
            assert!(here.decrypt(&altered).is_none(), "{at}");
        }
        for length in 0..ticket.len() {
            assert!(here.decrypt(&ticket[..length]).is_none(), "{length}");
        }
    }

    #[test]
    fn a_row_without_a_key_is_named() {
        let bad = TicketRow {
            key: "AAAA".to_owned(),
            ..row(1, 0, 1)
        };
        let found = Tickets::new()
            .unwrap()
            .replace([(&"ticket/1".to_owned(), &bad)].into_iter());
        assert_eq!(found[0].0, "ticket/1");
    }
}
