//! The kernel's queue of packets (nfnetlink_queue): announcements in, verdicts out. Packets themselves stay there.
//!
//! Source: `linux/netfilter/nfnetlink_queue.h`. Numbers in netlink headers are in the host's order, those in attributes
//! of this subsystem big-endian.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::netlink::{NETFILTER, SocketAddrNetlink};
use rustix::net::sockopt::set_socket_recv_buffer_size_force;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, bind, recv, send, socket_with};

const SUBSYSTEM: u16 = 3;
const PACKET: u16 = SUBSYSTEM << 8;
const VERDICT: u16 = PACKET | 1;
const CONFIG: u16 = PACKET | 2;
const ERROR: u16 = 2;
const REQUEST: u16 = 1;
const ACK: u16 = 4;
const HEADER: usize = 20; // nlmsghdr and nfgenmsg

const CFG_CMD: u16 = 1;
const CFG_PARAMS: u16 = 2;
const CFG_MAXLEN: u16 = 3;
const CFG_MASK: u16 = 4;
const CFG_FLAGS: u16 = 5;
const CMD_BIND: u8 = 1;
const COPY_META: u8 = 1;
/// Segments of one send stay one packet: fewer verdicts.
const FLAG_GSO: u32 = 4;
const ATTR_PACKET_HDR: u16 = 1;
const ATTR_VERDICT_HDR: u16 = 2;
const ATTR_INDEV: u16 = 5;
const ATTR_OUTDEV: u16 = 6;

/// Packets under way at once; the kernel drops what comes beyond, as a full line would.
const PACKETS_MAX: u32 = 32_768;
/// Announcements (about 200 bytes each) that may wait while the relay is not scheduled.
const RECEIVE_BYTES: usize = 16 << 20;

/// What the kernel says of a packet: which devices (interface numbers) it came by and will leave by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub id: u32,
    pub came_by: u32,
    pub leaves_by: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    id: u32,
    pass: bool,
}

impl Verdict {
    pub fn pass(id: u32) -> Verdict {
        Verdict { id, pass: true }
    }

    pub fn lose(id: u32) -> Verdict {
        Verdict { id, pass: false }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum QueueError {
    #[error("netlink queue: {0}")]
    System(#[from] Errno),
    #[error("netlink queue {number}: the kernel refused it ({reason}); is another relay running?")]
    Refused { number: u16, reason: Errno },
}

pub struct Queue {
    socket: OwnedFd,
    number: u16,
    buffer: Vec<u8>,
}

impl AsFd for Queue {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Queue {
    pub fn open(number: u16) -> Result<Queue, QueueError> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, Some(NETFILTER))?;
        bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        set_socket_recv_buffer_size_force(&socket, RECEIVE_BYTES)?;
        let queue = Queue {
            socket,
            number,
            buffer: vec![0; 8192],
        };
        queue.configure(CFG_CMD, &[CMD_BIND, 0, 0, 0])?;
        queue.configure(CFG_PARAMS, &[0, 0, 0, 0, COPY_META])?;
        queue.configure(CFG_MAXLEN, &PACKETS_MAX.to_be_bytes())?;
        let mut both = Vec::new();
        attribute(&mut both, CFG_MASK, &FLAG_GSO.to_be_bytes());
        attribute(&mut both, CFG_FLAGS, &FLAG_GSO.to_be_bytes());
        queue.ask(&both)?;
        Ok(queue)
    }

    /// The next announcement, if one is there.
    pub fn receive(&mut self) -> Result<Option<Packet>, QueueError> {
        loop {
            match recv(&self.socket, &mut self.buffer[..], RecvFlags::empty()) {
                Ok((length, _)) => {
                    if let Some(packet) = parse(&self.buffer[..length]) {
                        return Ok(Some(packet));
                    }
                }
                Err(Errno::AGAIN) => return Ok(None),
                // Some announcements were lost; their packets are dropped when the queue is full.
                Err(Errno::INTR | Errno::NOBUFS) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    pub fn send(&self, verdicts: &[Verdict]) -> Result<(), QueueError> {
        for chunk in verdicts.chunks(64) {
            let mut bytes = Vec::with_capacity(chunk.len() * 32);
            for verdict in chunk {
                let mut value = [0; 8];
                value[..4].copy_from_slice(&u32::from(verdict.pass).to_be_bytes());
                value[4..].copy_from_slice(&verdict.id.to_be_bytes());
                let mut attributes = Vec::with_capacity(12);
                attribute(&mut attributes, ATTR_VERDICT_HDR, &value);
                message(&mut bytes, VERDICT, REQUEST, self.number, &attributes);
            }
            self.send_all(&bytes)?;
        }
        Ok(())
    }

    fn send_all(&self, bytes: &[u8]) -> Result<(), Errno> {
        loop {
            match send(&self.socket, bytes, SendFlags::empty()) {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn configure(&self, kind: u16, value: &[u8]) -> Result<(), QueueError> {
        let mut attributes = Vec::new();
        attribute(&mut attributes, kind, value);
        self.ask(&attributes)
    }

    /// Netlink answers within the call, so the acknowledgement is there when `send` returns.
    fn ask(&self, attributes: &[u8]) -> Result<(), QueueError> {
        let mut bytes = Vec::new();
        message(&mut bytes, CONFIG, REQUEST | ACK, self.number, attributes);
        self.send_all(&bytes)?;
        let mut answer = [0; 8192];
        loop {
            let (length, _) = recv(&self.socket, &mut answer[..], RecvFlags::empty())?;
            if let Some(code) = error_code(&answer[..length]) {
                return match code {
                    0 => Ok(()),
                    code => Err(QueueError::Refused {
                        number: self.number,
                        reason: Errno::from_raw_os_error(-code),
                    }),
                };
            }
        }
    }
}

fn message(out: &mut Vec<u8>, kind: u16, flags: u16, queue: u16, attributes: &[u8]) {
    let length = u32::try_from(HEADER + attributes.len()).unwrap_or(u32::MAX);
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(&flags.to_ne_bytes());
    out.extend_from_slice(&[0; 8]); // sequence and port: ours to ignore
    out.extend_from_slice(&[0, 0]); // any family, version 0
    out.extend_from_slice(&queue.to_be_bytes());
    out.extend_from_slice(attributes);
}

fn attribute(out: &mut Vec<u8>, kind: u16, value: &[u8]) {
    let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
    out.extend_from_slice(&length.to_ne_bytes());
    out.extend_from_slice(&kind.to_ne_bytes());
    out.extend_from_slice(value);
    out.resize(out.len().next_multiple_of(4), 0);
}

fn kind_of(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?))
}

fn error_code(bytes: &[u8]) -> Option<i32> {
    if kind_of(bytes)? != ERROR {
        return None;
    }
    Some(i32::from_ne_bytes(bytes.get(16..20)?.try_into().ok()?))
}

/// None for messages that announce no packet.
fn parse(bytes: &[u8]) -> Option<Packet> {
    if kind_of(bytes)? != PACKET {
        return None;
    }
    let mut rest = bytes.get(HEADER..)?;
    let (mut id, mut came_by, mut leaves_by) = (None, 0, 0);
    while rest.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes(rest[..2].try_into().ok()?));
        let kind = u16::from_ne_bytes(rest[2..4].try_into().ok()?);
        let value = rest.get(4..length)?;
        let number = || Some(u32::from_be_bytes(value.get(..4)?.try_into().ok()?));
        match kind {
            ATTR_PACKET_HDR => id = number(),
            ATTR_INDEV => came_by = number()?,
            ATTR_OUTDEV => leaves_by = number()?,
            _ => {}
        }
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Packet {
        id: id?,
        came_by,
        leaves_by,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn announcement(attributes: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        message(&mut bytes, PACKET, 0, 7, attributes);
        bytes
    }

    #[test]
    fn an_announcement_names_the_packet_and_its_devices() {
        let mut attributes = Vec::new();
        attribute(&mut attributes, ATTR_PACKET_HDR, &[0, 0, 1, 2, 8, 0, 2]);
        attribute(&mut attributes, ATTR_INDEV, &3_u32.to_be_bytes());
        attribute(&mut attributes, 99, b"later kernels say more");
        attribute(&mut attributes, ATTR_OUTDEV, &4_u32.to_be_bytes());
        let expected = Packet {
            id: 0x0102,
            came_by: 3,
            leaves_by: 4,
        };
        assert_eq!(parse(&announcement(&attributes)), Some(expected));
    }

    #[test]
    fn what_is_cut_off_or_something_else_is_no_packet() {
        let mut attributes = Vec::new();
        attribute(&mut attributes, ATTR_PACKET_HDR, &[0, 0, 1, 2, 8, 0, 2]);
        let whole = announcement(&attributes);
        for length in 0..whole.len() - 1 {
            assert_eq!(parse(&whole[..length]), None, "{length} bytes");
        }
        let mut verdict = Vec::new();
        message(&mut verdict, VERDICT, 0, 7, &attributes);
        assert_eq!(parse(&verdict), None);
        let mut endless = whole;
        endless[HEADER] = 0;
        endless[HEADER + 1] = 0;
        assert_eq!(parse(&endless), None);
    }
}
