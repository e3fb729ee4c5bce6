//! What has been said on a connection of HTTP/2 so far, as far as it still matters: enough to tell it to a new [`h2`] connection,
//! which then goes on where another one was given up. Both directions are read along, frame by frame; what is not understood
//! makes a connection one that cannot be taken up again, and nothing worse.

use bytes::{BufMut, Bytes};

use super::table::Table;

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD: usize = 9;
/// The most that a frame may have, as we never allow more.
const PAYLOAD_MAX: usize = 16 * 1024;
/// What both ends may send on a connection before anything was said about it.
const WINDOW: i64 = 65_535;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const GOAWAY: u8 = 7;
const WINDOW_UPDATE: u8 = 8;
const CONTINUATION: u8 = 9;

const END_STREAM: u8 = 0x1;
const ACK: u8 = 0x1;
const END_HEADERS: u8 = 0x4;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;

/// Those that we act on, from HEADER_TABLE_SIZE to MAX_HEADER_LIST_SIZE.
const SETTINGS_KNOWN: usize = 6;
const INITIAL_WINDOW_SIZE: usize = 3;
/// GET https://x/ without anything to remember.
const ANY_REQUEST: &[u8] = b"\x82\x87\x84\x01\x01x";
/// A field that no request may have, so that the block which teaches all others is refused, after it was read to its end.
const FORBIDDEN: &[u8] = b"\x00\x0aconnection\x01x";

struct Head {
    kind: u8,
    flags: u8,
    stream: u32,
    length: usize,
}

impl Head {
    fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// One direction, cut into frames.
struct Frames {
    /// of the preface
    skip: usize,
    head: [u8; HEAD],
    have: usize,
    left: usize,
    payload: Vec<u8>,
    keeps: fn(u8) -> bool,
}

impl Frames {
    fn new(skip: usize, keeps: fn(u8) -> bool) -> Frames {
        Frames {
            skip,
            head: [0; HEAD],
            have: 0,
            left: 0,
            payload: Vec::new(),
            keeps,
        }
    }

    /// Nothing of a frame has come yet.
    fn between(&self) -> bool {
        self.skip == 0 && self.have == 0
    }

    /// `whole` is called with each frame that ends here; of most kinds the payload is left out.
    fn take(&mut self, mut bytes: &[u8], mut whole: impl FnMut(&Head, &[u8])) {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        bytes = &bytes[skipped..];
        while !bytes.is_empty() {
            let wanted = (HEAD - self.have).min(bytes.len());
            self.head[self.have..self.have + wanted].copy_from_slice(&bytes[..wanted]);
            bytes = &bytes[wanted..];
            if wanted > 0 {
                self.have += wanted;
                if self.have < HEAD {
                    return;
                }
                self.left = self.length();
            }
            let (now, after) = bytes.split_at(self.left.min(bytes.len()));
            (bytes, self.left) = (after, self.left - now.len());
            let head = self.read();
            let keeps = (self.keeps)(head.kind) && head.length <= PAYLOAD_MAX;
            if self.left > 0 {
                if keeps {
                    self.payload.extend_from_slice(now);
                }
                return;
            }
            self.have = 0;
            match (keeps, self.payload.is_empty()) {
                (false, _) => whole(&head, &[]),
                (true, true) => whole(&head, now),
                (true, false) => {
                    self.payload.extend_from_slice(now);
                    whole(&head, &std::mem::take(&mut self.payload));
                }
            }
        }
    }

    fn length(&self) -> usize {
        usize::from(self.head[0]) << 16 | usize::from(self.head[1]) << 8 | usize::from(self.head[2])
    }

    fn read(&self) -> Head {
        let [.., a, b, c, d] = self.head;
        Head {
            kind: self.head[3],
            flags: self.head[4],
            stream: u32::from_be_bytes([a & 0x7f, b, c, d]),
            length: self.length(),
        }
    }
}

struct Open {
    stream: u32,
    client_ended: bool,
    we_ended: bool,
}

pub struct Past {
    coming: Frames,
    going: Frames,
    said: Said,
}

/// What a new connection is told.
pub struct Told {
    pub first: Bytes,
    /// As much as this is to be answered to a request that comes first: nothing else makes less of what may be sent.
    pub spent: u16,
    pub fields: Bytes,
}

struct Said {
    settings: [Option<u32>; SETTINGS_KNOWN],
    /// the client has agreed to ours
    agreed: bool,
    table: Table,
    /// of fields that are not all there yet
    block: Vec<u8>,
    open: Vec<Open>,
    last_stream: u32,
    /// what we may send, and the client
    room: i64,
    client_room: i64,
    /// it cannot be taken up again
    lost: bool,
}

impl Past {
    pub fn new() -> Past {
        let read = |kind| matches!(kind, HEADERS | SETTINGS | WINDOW_UPDATE | CONTINUATION);
        Past {
            coming: Frames::new(PREFACE.len(), read),
            going: Frames::new(0, |kind| kind == WINDOW_UPDATE),
            said: Said {
                settings: [None; SETTINGS_KNOWN],
                agreed: false,
                table: Table::new(),
                block: Vec::new(),
                open: Vec::new(),
                last_stream: 0,
                room: WINDOW,
                client_room: WINDOW,
                lost: false,
            },
        }
    }

    /// Read from the client.
    pub fn came(&mut self, bytes: &[u8]) {
        let said = &mut self.said;
        self.coming.take(bytes, |head, payload| {
            if said.frame_came(head, payload).is_none() {
                said.lost = true;
            }
        });
    }

    /// Written to the client.
    pub fn went(&mut self, bytes: &[u8]) {
        let said = &mut self.said;
        self.going.take(bytes, |head, payload| said.frame_went(head, payload));
    }

    /// Nothing is under way, and all that was said can be told. A client that may send less than we told it at first gets the
    /// rest back by [`Past::dues`].
    pub fn rests(&self) -> bool {
        let said = &self.said;
        let at_rest = said.agreed && !said.lost && said.open.is_empty();
        at_rest && self.coming.between() && self.going.between()
    }

    /// A WINDOW_UPDATE for the client, if it may send less than `window`.
    pub fn dues(&self, window: u32) -> Option<[u8; HEAD + 4]> {
        let missing = u32::try_from(i64::from(window) - self.said.client_room).ok()?;
        let mut frame = Vec::with_capacity(HEAD + 4);
        say_update(&mut frame, 0, missing);
        (missing > 0).then(|| frame.try_into().ok()).flatten()
    }

    /// All of it, as a client would have said it at once. None: it does not fit into a frame.
    pub fn tell(&mut self) -> Option<Told> {
        self.said.tell()
    }
}

impl Said {
    fn frame_came(&mut self, head: &Head, payload: &[u8]) -> Option<()> {
        match head.kind {
            DATA => {
                self.client_room -= head.length as i64;
                self.ended(head, |open| &mut open.client_ended);
            }
            HEADERS => {
                if head.stream > self.last_stream {
                    self.last_stream = head.stream;
                    self.open.push(Open {
                        stream: head.stream,
                        client_ended: false,
                        we_ended: false,
                    });
                }
                self.ended(head, |open| &mut open.client_ended);
                self.fields(head, fragment(head, payload)?)?;
            }
            CONTINUATION => self.fields(head, payload)?,
            RST_STREAM => self.open.retain(|open| open.stream != head.stream),
            SETTINGS if head.has(ACK) => self.agreed = true,
            SETTINGS => {
                for setting in payload.chunks_exact(6) {
                    let number = usize::from(u16::from_be_bytes([setting[0], setting[1]]));
                    let value = u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                    if let Some(kept) = number.checked_sub(1).and_then(|at| self.settings.get_mut(at)) {
                        *kept = Some(value);
                    }
                }
            }
            WINDOW_UPDATE if head.stream == 0 => self.room += increment(payload)?,
            GOAWAY => return None, // the client is leaving
            _ => {}
        }
        (head.length <= PAYLOAD_MAX).then_some(())
    }

    fn frame_went(&mut self, head: &Head, payload: &[u8]) {
        match head.kind {
            DATA => {
                self.room -= head.length as i64;
                self.ended(head, |open| &mut open.we_ended);
            }
            HEADERS => self.ended(head, |open| &mut open.we_ended),
            RST_STREAM => self.open.retain(|open| open.stream != head.stream),
            WINDOW_UPDATE if head.stream == 0 => self.client_room += increment(payload).unwrap_or_default(),
            GOAWAY => self.lost = true,
            _ => {}
        }
    }

    fn ended(&mut self, head: &Head, side: impl Fn(&mut Open) -> &mut bool) {
        if !head.has(END_STREAM) {
            return;
        }
        if let Some(at) = self.open.iter().position(|open| open.stream == head.stream) {
            *side(&mut self.open[at]) = true;
            if self.open[at].client_ended && self.open[at].we_ended {
                self.open.swap_remove(at);
            }
        }
    }

    fn fields(&mut self, head: &Head, part: &[u8]) -> Option<()> {
        if head.has(END_HEADERS) && self.block.is_empty() {
            return self.table.learn(part);
        }
        if self.lost || self.block.len() + part.len() > PAYLOAD_MAX {
            self.block = Vec::new();
            return None;
        }
        self.block.extend_from_slice(part);
        if head.has(END_HEADERS) {
            let block = std::mem::take(&mut self.block);
            return self.table.learn(&block);
        }
        Some(())
    }

    fn tell(&mut self) -> Option<Told> {
        let mut first = Vec::with_capacity(128);
        first.extend_from_slice(PREFACE);
        let settings = || {
            (1u16..)
                .zip(self.settings)
                .filter_map(|(number, value)| Some((number, value?)))
        };
        say_head(&mut first, settings().count() * 6, SETTINGS, 0, 0);
        for (number, value) in settings() {
            first.put_u16(number);
            first.put_u32(value);
        }
        say_head(&mut first, 0, SETTINGS, ACK, 0);
        if self.room > WINDOW {
            say_update(&mut first, 0, u32::try_from(self.room - WINDOW).ok()?);
        }
        let spent = u16::try_from(WINDOW - self.room.min(WINDOW)).ok()?;
        // All in the place of the last request: what comes on it, or on earlier ones, is late and no fault.
        if spent > 0 {
            say_head(&mut first, ANY_REQUEST.len(), HEADERS, END_HEADERS, self.last_stream);
            first.extend_from_slice(ANY_REQUEST);
            if self.settings[INITIAL_WINDOW_SIZE].is_some_and(|window| window < u32::from(spent)) {
                say_update(&mut first, self.last_stream, u32::from(spent));
            }
        }
        let mut fields = Vec::new();
        if self.last_stream > 0 {
            let mut block = Vec::with_capacity(1024);
            self.table.tell(&mut block);
            block.extend_from_slice(FORBIDDEN);
            if block.len() > PAYLOAD_MAX {
                self.lost = true;
                return None;
            }
            say_head(
                &mut fields,
                block.len(),
                HEADERS,
                END_STREAM | END_HEADERS,
                self.last_stream,
            );
            fields.extend_from_slice(&block);
        }
        Some(Told {
            first: first.into(),
            spent,
            fields: fields.into(),
        })
    }
}

/// Of the fields, without what is around them.
fn fragment<'a>(head: &Head, payload: &'a [u8]) -> Option<&'a [u8]> {
    let mut part = payload;
    if head.has(PADDED) {
        let (&padding, rest) = part.split_first()?;
        part = &rest[..rest.len().checked_sub(usize::from(padding))?];
    }
    if head.has(PRIORITY) {
        part = part.get(5..)?;
    }
    Some(part)
}

fn increment(payload: &[u8]) -> Option<i64> {
    let bytes = payload.try_into().ok()?;
    Some(i64::from(u32::from_be_bytes(bytes) & 0x7fff_ffff))
}

fn say_head(to: &mut Vec<u8>, length: usize, kind: u8, flags: u8, stream: u32) {
    to.put_uint(length as u64, 3);
    to.put_u8(kind);
    to.put_u8(flags);
    to.put_u32(stream);
}

fn say_update(to: &mut Vec<u8>, stream: u32, increment: u32) {
    say_head(to, 4, WINDOW_UPDATE, 0, stream);
    to.put_u32(increment);
}
