//! What a client's header compression refers to (RFC 7541): the fields that it told us to remember, in the words in which it
//! told them. `h2` keeps the same, but does not say what; a connection that begins anew has to be told.

use std::collections::VecDeque;

/// What both ends begin with, and the most that we let a client use.
const BYTES_MAX: usize = 4096;
/// Of each field, beside its letters.
const FIELD_BYTES: usize = 32;
const INDEXED: u8 = 0x80;
const REMEMBERED: u8 = 0x40;
const SIZE_UPDATE: u8 = 0x20;
const COMPRESSED: u8 = 0x80;
/// Of the names that everybody knows, in their order.
const KNOWN_NAMES: [u8; 61] = [
    10, 7, 7, 5, 5, 6, 7, 7, 7, 7, 7, 7, 7, 7, 14, 15, 15, 13, 6, 27, 3, 5, 13, 13, 19, 16, 16, 14, 16, 13, 12, 6, 4,
    4, 6, 7, 4, 4, 8, 17, 13, 8, 19, 13, 4, 8, 12, 18, 19, 5, 7, 7, 11, 6, 10, 25, 17, 10, 4, 3, 16,
];
/// How many letters have a code of so many bits. The codes of one length follow each other.
const CODES: [u32; 31] = [
    0, 0, 0, 0, 0, 10, 26, 32, 6, 0, 5, 3, 2, 6, 2, 3, 0, 0, 0, 3, 8, 13, 26, 29, 12, 4, 15, 19, 29, 0, 4,
];

struct Field {
    /// as the client said it; its name is what it says or whose number it gives among those known to everybody
    said: Box<[u8]>,
    name_end: usize,
    name_len: usize,
    bytes: usize,
}

pub struct Table {
    /// the newest first
    fields: VecDeque<Field>,
    bytes: usize,
    bytes_max: usize,
}

impl Table {
    pub fn new() -> Table {
        Table {
            fields: VecDeque::new(),
            bytes: 0,
            bytes_max: BYTES_MAX,
        }
    }

    /// Of a whole block of fields. None: it cannot be followed.
    pub fn learn(&mut self, block: &[u8]) -> Option<()> {
        let mut rest = block;
        while let Some(&first) = rest.first() {
            if first & INDEXED != 0 {
                number(&mut rest, 7)?;
            } else if first & REMEMBERED != 0 {
                self.remember(&mut rest)?;
            } else if first & SIZE_UPDATE != 0 {
                let bytes_max = number(&mut rest, 5)?;
                self.bytes_max = (bytes_max <= BYTES_MAX).then_some(bytes_max)?;
                self.shrink_to(bytes_max);
            } else {
                if number(&mut rest, 4)? == 0 {
                    skip(&mut rest)?;
                }
                skip(&mut rest)?;
            }
        }
        Some(())
    }

    fn remember(&mut self, rest: &mut &[u8]) -> Option<()> {
        let begin = *rest;
        let (mut said, name_len) = match number(rest, 6)? {
            0 => {
                let length = text(rest)?;
                (begin[..begin.len() - rest.len()].to_vec(), length)
            }
            known if known <= KNOWN_NAMES.len() => {
                let said = begin[..begin.len() - rest.len()].to_vec();
                (said, usize::from(KNOWN_NAMES[known - 1]))
            }
            own => {
                let field = self.fields.get(own - KNOWN_NAMES.len() - 1)?;
                (field.said[..field.name_end].to_vec(), field.name_len)
            }
        };
        let (name_end, value) = (said.len(), *rest);
        let bytes = FIELD_BYTES + name_len + text(rest)?;
        said.extend_from_slice(&value[..value.len() - rest.len()]);
        self.shrink_to(self.bytes_max.saturating_sub(bytes));
        if bytes <= self.bytes_max {
            self.bytes += bytes;
            self.fields.push_front(Field {
                said: said.into_boxed_slice(),
                name_end,
                name_len,
                bytes,
            });
        }
        Some(())
    }

    fn shrink_to(&mut self, bytes: usize) {
        while self.bytes > bytes
            && let Some(oldest) = self.fields.pop_back()
        {
            self.bytes -= oldest.bytes;
        }
    }

    /// A block that teaches all of it to whoever knows nothing.
    pub fn tell(&self, to: &mut Vec<u8>) {
        if self.bytes_max != BYTES_MAX {
            say_number(to, SIZE_UPDATE, 5, self.bytes_max);
        }
        for field in self.fields.iter().rev() {
            to.extend_from_slice(&field.said);
        }
    }
}

/// Section 5.1: in the last bits of a byte, and in those that follow if they do not suffice.
fn number(rest: &mut &[u8], bits: u32) -> Option<usize> {
    let most = (1 << bits) - 1;
    let (first, mut after) = rest.split_first()?;
    let mut value = usize::from(*first) & most;
    if value == most {
        for shift in [0, 7, 14, 21] {
            let (byte, then) = after.split_first()?;
            after = then;
            value += usize::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                *rest = after;
                return Some(value);
            }
        }
        return None;
    }
    *rest = after;
    Some(value)
}

fn say_number(to: &mut Vec<u8>, first: u8, bits: u32, value: usize) {
    let most = (1 << bits) - 1;
    if value < most {
        return to.push(first | value as u8);
    }
    to.push(first | most as u8);
    let mut left = value - most;
    while left >= 0x80 {
        to.push(left as u8 | 0x80);
        left >>= 7;
    }
    to.push(left as u8);
}

fn skip<'a>(rest: &mut &'a [u8]) -> Option<(bool, &'a [u8])> {
    let compressed = rest.first()? & COMPRESSED != 0;
    let length = number(rest, 7)?;
    let (said, after) = rest.split_at_checked(length)?;
    *rest = after;
    Some((compressed, said))
}

/// How many letters it has.
fn text(rest: &mut &[u8]) -> Option<usize> {
    match skip(rest)? {
        (true, said) => letters(said),
        (false, said) => Some(said.len()),
    }
}

fn letters(compressed: &[u8]) -> Option<usize> {
    let (mut count, mut length) = (0, 0);
    // The bits since the last letter, and the first code of as many.
    let (mut code, mut first) = (0, 0);
    for byte in compressed {
        for bit in (0..8).rev() {
            length += 1;
            code = code << 1 | u32::from(byte >> bit & 1);
            first <<= 1;
            let codes = *CODES.get(length)?;
            if code < first + codes {
                (count, length, code, first) = (count + 1, 0, 0, 0);
            } else {
                first += codes;
            }
        }
    }
    Some(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn unhex(hex: &str) -> Vec<u8> {
        let digits: Vec<u8> = hex.bytes().filter(|b| !b.is_ascii_whitespace()).collect();
        let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
        digits.chunks(2).map(byte).collect()
    }

    fn sizes(table: &Table) -> Vec<usize> {
        table.fields.iter().map(|field| field.bytes).collect()
    }

    /// RFC 7541, C.3 and C.4: the same three requests without and with compressed texts.
    #[test]
    fn the_requests_of_the_standard() {
        for blocks in [
            [
                "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
                "8286 84be 5808 6e6f 2d63 6163 6865",
                "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
            ],
            [
                "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
                "8286 84be 5886 a8eb 1064 9cbf",
                "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
            ],
        ] {
            let mut table = Table::new();
            for (block, expected) in blocks.iter().zip([&[57][..], &[53, 57], &[54, 53, 57]]) {
                table.learn(&unhex(block)).unwrap();
                assert_eq!(sizes(&table), expected);
            }
            let mut told = Vec::new();
            table.tell(&mut told);
            let mut other = Table::new();
            other.learn(&told).unwrap();
            assert_eq!(sizes(&other), [54, 53, 57]);
        }
    }

    /// RFC 7541, C.6: answers with compressed texts in a table of 256 bytes, from which fields fall out.
    #[test]
    fn the_oldest_fall_out() {
        let mut table = Table::new();
        table.learn(&unhex("3fe101")).unwrap();
        for (block, expected) in [
            (
                "4882 6402 5885 aec3 771a 4b61 96d0 7abe 9410 54d4 44a8 2005 9504 0b81 66e0 82a6 2d1b ff6e 919d 29ad 1718 \
                 63c7 8f0b 97c8 e9ae 82ae 43d3",
                &[63, 65, 52, 42][..],
            ),
            ("4883 640e ffc1 c0bf", &[42, 63, 65, 52]),
            (
                "88c1 6196 d07a be94 1054 d444 a820 0595 040b 8166 e084 a62d 1bff c05a 839b d9ab 77ad 94e7 821d d7f2 \
                 e6c7 b335 dfdf cd5b 3960 d5af 2708 7f36 72c1 ab27 0fb5 291f 9587 3160 65c0 03ed 4ee5 b106 3d50 07",
                &[98, 52, 65],
            ),
        ] {
            table.learn(&unhex(block)).unwrap();
            assert_eq!(sizes(&table), expected);
        }
        let mut told = Vec::new();
        table.tell(&mut told);
        assert_eq!(told[..3], unhex("3fe101"));
    }

    #[test]
    fn a_name_may_be_that_of_a_field_which_is_gone() {
        let mut table = Table::new();
        table.learn(&unhex("20 3f21 40 0161 0162")).unwrap(); // 64 bytes: one field
        table.learn(&unhex("7e 0163")).unwrap(); // named like the one that it drives out
        let mut told = Vec::new();
        table.tell(&mut told);
        assert_eq!(told, unhex("3f21 40 0161 0163"));
    }

    #[test]
    fn what_is_cut_off_or_unknown_is_not_followed() {
        for block in [
            "40",
            "4001",
            "400161",
            "40016102",
            "7e0161",
            "3fffffffff7f",
            "3fe2ff01",
            "00",
        ] {
            assert_eq!(Table::new().learn(&unhex(block)), None, "{block}");
        }
    }
}
