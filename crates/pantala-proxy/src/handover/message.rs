//! What two proxies say to each other: one JSON document a packet, sockets beside it. Each read and write has a deadline.

use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use serde::{Deserialize, Serialize};

use super::sockets::Key;

/// Descriptors beside one packet; the kernel takes 253.
pub const SOCKETS_MAX: usize = 64;
pub const COUNTS_MAX: usize = 500;
/// A packet of so many of either is below.
const PACKET_BYTES_MAX: usize = 64 * 1024;
const SEND_MAX: Duration = Duration::from_secs(5);

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub enum Message {
    /// `lends`: it gives places to the old one, which gives none itself from `Yours` on
    Ask {
        pid: u32,
        version: String,
        #[serde(default)]
        lends: bool,
    },
    Refused {
        why: String,
    },
    Sockets {
        keys: Vec<Key>,
    },
    All,
    Ready,
    Counts {
        machines: Vec<(String, u32)>,
        last: bool,
    },
    Yours,
    Serving,
    Want {
        id: u64,
        want: Want,
    },
    Lent {
        id: u64,
        machine: String,
    },
    Denied {
        id: u64,
        reason: String,
        happened: String,
        in_flight: u32,
    },
    Done {
        id: u64,
    },
}

/// A place on a machine of this host: on that one, or with `queue` and without `only` on any of the app, in line.
#[derive(Debug, Serialize, Deserialize)]
pub struct Want {
    pub app: String,
    pub port: u16,
    pub machine: String,
    pub queue: bool,
    pub only: bool,
    pub deadline_ms: u64,
}

pub fn send(socket: impl AsFd, message: &Message) -> io::Result<()> {
    send_with(socket, message, &[])
}

pub fn send_with(socket: impl AsFd, message: &Message, beside: &[&OwnedFd]) -> io::Result<()> {
    let text = serde_json::to_vec(message)?;
    let borrowed: Vec<_> = beside.iter().map(AsFd::as_fd).collect();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !borrowed.is_empty() && !control.push(SendAncillaryMessage::ScmRights(&borrowed)) {
        return Err(io::Error::other("too many sockets for one packet"));
    }
    set_socket_timeout(&socket, Timeout::Send, Some(SEND_MAX))?;
    sendmsg(&socket, &[IoSlice::new(&text)], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// None: the other end is gone. `within` none: for as long as it takes.
pub fn receive(socket: impl AsFd, within: Option<Duration>) -> io::Result<Option<(Message, Vec<OwnedFd>)>> {
    set_socket_timeout(&socket, Timeout::Recv, within)?;
    let mut text = vec![0; PACKET_BYTES_MAX];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(SOCKETS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = loop {
        let mut room = [IoSliceMut::new(&mut text)];
        match recvmsg(&socket, &mut room, &mut control, RecvFlags::CMSG_CLOEXEC) {
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN) => return Err(io::Error::new(io::ErrorKind::TimedOut, "no answer in time")),
            Err(rustix::io::Errno::CONNRESET) => return Ok(None),
            other => break other?,
        }
    };
    if received.bytes == 0 {
        return Ok(None);
    }
    let mut beside = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(sockets) = message {
            beside.extend(sockets);
        }
    }
    Ok(Some((serde_json::from_slice(&text[..received.bytes])?, beside)))
}
