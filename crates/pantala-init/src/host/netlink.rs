//! Netlink as far as a machine's network needs it: messages are built, sent, and each acknowledged by the kernel.
//!
//! By hand, because `ip` and `nft` are three processes for a machine and `nft` reads all elements of all machines before it
//! adds one; the crates that speak it bring an asynchronous runtime's worth of code into PID 1.

use std::io;
use std::net::IpAddr;
use std::os::fd::OwnedFd;

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, socket};
use nix::unistd::{read, write};

const HEADER_BYTES: usize = 16;
const ANSWER_BYTES_MAX: usize = 32 * 1024;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
pub const REPLACE: u16 = 0x100;
pub const EXCLUSIVE: u16 = 0x200;
pub const CREATE: u16 = 0x400;
const NESTED: u16 = 0x8000;

/// One message, or several in a row: the kernel takes them in their order.
pub struct Messages {
    bytes: Vec<u8>,
    number: u32,
    starts_at: usize,
}

impl Messages {
    pub fn new() -> Self {
        Messages {
            bytes: Vec::with_capacity(1024),
            number: 0,
            starts_at: 0,
        }
    }

    /// Begin a message that the kernel answers, `fixed` the struct that its kind begins with.
    pub fn begin(&mut self, kind: u16, flags: u16, fixed: &[u8]) -> &mut Self {
        self.begin_quietly(kind, flags | NLM_F_ACK, fixed)
    }

    /// One that is answered only when it is refused.
    pub fn begin_quietly(&mut self, kind: u16, flags: u16, fixed: &[u8]) -> &mut Self {
        self.starts_at = self.bytes.len();
        self.number += 1;
        self.bytes.extend([0; 4]);
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend((flags | NLM_F_REQUEST).to_ne_bytes());
        self.bytes.extend(self.number.to_ne_bytes());
        self.bytes.extend([0; 4]);
        self.bytes.extend(fixed);
        self.close()
    }

    pub fn attribute(&mut self, kind: u16, value: &[u8]) -> &mut Self {
        self.bytes.extend((4 + value.len() as u16).to_ne_bytes());
        self.bytes.extend(kind.to_ne_bytes());
        self.bytes.extend(value);
        self.close()
    }

    pub fn text(&mut self, kind: u16, value: &str) -> &mut Self {
        let mut bytes = value.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes)
    }

    pub fn number(&mut self, kind: u16, value: u32) -> &mut Self {
        self.attribute(kind, &value.to_ne_bytes())
    }

    pub fn address(&mut self, kind: u16, value: IpAddr) -> &mut Self {
        match value {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    pub fn nested(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) -> &mut Self {
        let at = self.bytes.len();
        self.bytes.extend([0; 2]);
        self.bytes.extend((kind | NESTED).to_ne_bytes());
        inside(self);
        let length = (self.bytes.len() - at) as u16;
        self.bytes[at..at + 2].copy_from_slice(&length.to_ne_bytes());
        self
    }

    /// Bytes as they are, inside of `nested`.
    pub fn plain(&mut self, bytes: &[u8]) -> &mut Self {
        self.bytes.extend(bytes);
        self.close()
    }

    /// Pads to four bytes; the length of the message that is being written follows.
    fn close(&mut self) -> &mut Self {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
        let length = (self.bytes.len() - self.starts_at) as u32;
        self.bytes[self.starts_at..self.starts_at + 4].copy_from_slice(&length.to_ne_bytes());
        self
    }
}

/// A socket in the network namespace that this process is in when it is opened.
pub struct Netlink(OwnedFd);

impl Netlink {
    pub fn routes() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkRoute)
    }

    pub fn firewall() -> io::Result<Self> {
        Self::open(SockProtocol::NetlinkNetFilter)
    }

    fn open(protocol: SockProtocol) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        Ok(Netlink(socket(
            AddressFamily::Netlink,
            SockType::Raw,
            flags,
            Some(protocol),
        )?))
    }

    /// The kernel does what they say before `write` returns, and has then answered. The first refusal is the error; what
    /// stood before it is done (a batch of the firewall is done whole or not at all). `last`: the last one that is answered.
    pub fn send(&self, messages: &Messages, last: u32) -> io::Result<()> {
        write(&self.0, &messages.bytes)?;
        let mut buffer = vec![0; ANSWER_BYTES_MAX];
        loop {
            let length = read(&self.0, &mut buffer)?;
            let mut rest = &buffer[..length];
            while rest.len() >= HEADER_BYTES + 4 {
                let number = |at: usize| u32::from_ne_bytes([rest[at], rest[at + 1], rest[at + 2], rest[at + 3]]);
                let code = number(HEADER_BYTES) as i32;
                if code != 0 {
                    return Err(io::Error::from_raw_os_error(-code));
                }
                if number(8) == last {
                    return Ok(());
                }
                let taken = (number(0) as usize).next_multiple_of(4).max(HEADER_BYTES);
                rest = rest.get(taken..).unwrap_or_default();
            }
        }
    }

    /// All of them are answered.
    pub fn send_all(&self, messages: &Messages) -> io::Result<()> {
        self.send(messages, messages.number)
    }
}
