//! Just enough of RFC 6455 to know where one frame ends and another may begin, and to open a connection.

#[derive(Debug, Default)]
pub struct Frames {
    head: Vec<u8>,
    /// bytes of the present frame's payload still to come
    left: u64,
}

impl Frames {
    pub fn between(&self) -> bool {
        self.left == 0 && self.head.is_empty()
    }

    /// Goes over what passes; answers where the last frame that ends in it ends (0 if none does).
    pub fn see(&mut self, mut bytes: &[u8]) -> usize {
        let total = bytes.len();
        let mut boundary = 0;
        while !bytes.is_empty() {
            if self.left > 0 {
                let step = usize::try_from(self.left).unwrap_or(usize::MAX).min(bytes.len());
                self.left -= step as u64;
                bytes = &bytes[step..];
            } else {
                self.head.push(bytes[0]);
                bytes = &bytes[1..];
                if let Some(length) = payload(&self.head) {
                    self.left = length;
                    self.head.clear();
                }
            }
            if self.between() {
                boundary = total - bytes.len();
            }
        }
        boundary
    }

    /// The rest of a frame was cut off behind its boundary.
    pub fn reset(&mut self) {
        self.head.clear();
        self.left = 0;
    }
}

/// Length of what follows the head, once the head is complete.
fn payload(head: &[u8]) -> Option<u64> {
    let second = *head.get(1)?;
    let mask = if second & 0x80 != 0 { 4 } else { 0 };
    let extended = match second & 0x7f {
        126 => 2,
        127 => 8,
        _ => 0,
    };
    if head.len() < 2 + extended + mask {
        return None;
    }
    let length = &head[2..2 + extended];
    Some(if extended == 0 {
        u64::from(second & 0x7f)
    } else {
        length.iter().fold(0, |n, b| n << 8 | u64::from(*b))
    })
}

/// `Sec-WebSocket-Key`: sixteen random bytes in base64.
pub fn key(random: u128) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    // 128 bits are 21 digits of six bits and two bits more.
    let digit = |at: u32| char::from(DIGITS[(random >> (122 - 6 * at) & 63) as usize]);
    let last = char::from(DIGITS[((random & 3) << 4) as usize]);
    (0..21).map(digit).chain([last, '=', '=']).collect()
}

/// From a server: not masked.
pub fn close_frame(code: u16) -> [u8; 4] {
    let [high, low] = code.to_be_bytes();
    [0x88, 2, high, low]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(length: usize) -> Vec<u8> {
        let mut bytes = vec![0x82];
        match length {
            0..=125 => bytes.push(length as u8),
            126..=65535 => {
                bytes.push(126);
                bytes.extend((length as u16).to_be_bytes());
            }
            _ => {
                bytes.push(127);
                bytes.extend((length as u64).to_be_bytes());
            }
        }
        bytes.extend(vec![7; length]);
        bytes
    }

    #[test]
    fn boundaries_are_found_however_the_bytes_are_cut() {
        let lengths = [0, 1, 125, 126, 1000, 65535, 65536, 3];
        let all: Vec<u8> = lengths.iter().flat_map(|n| frame(*n)).collect();
        for cut in [1, 2, 3, 7, 1000, 16384] {
            let mut frames = Frames::default();
            let (mut at, mut ends) = (0, Vec::new());
            for piece in all.chunks(cut) {
                let boundary = frames.see(piece);
                if boundary > 0 {
                    ends.push(at + boundary);
                }
                at += piece.len();
            }
            assert!(frames.between());
            assert_eq!(ends.last(), Some(&all.len()));
        }
    }

    #[test]
    fn a_key_is_base64() {
        assert_eq!(key(0), "AAAAAAAAAAAAAAAAAAAAAA==");
        assert_eq!(key(u128::MAX), "/////////////////////w==");
        assert_eq!(
            key(u128::from_be_bytes(*b"the sample nonce")),
            "dGhlIHNhbXBsZSBub25jZQ=="
        ); // RFC 6455, 1.3
    }

    #[test]
    fn a_close_frame() {
        assert_eq!(close_frame(1001), [0x88, 2, 0x03, 0xe9]);
    }
}
