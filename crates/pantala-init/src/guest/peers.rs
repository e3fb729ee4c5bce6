//! Connections of the agent: one JSON document a line in each direction.

use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use pantala_wire::guest::{GuestReply, GuestRequest};

/// Files and environment travel in one line.
const LINE_BYTES_MAX: usize = 16 * 1024 * 1024;
/// The agent holds one or two; beyond this the oldest is dropped.
const PEERS_MAX: usize = 16;
const WRITE_TIMEOUT: Duration = Duration::from_secs(1);

pub struct Peer {
    /// Tells it from all others of this machine, also later ones.
    pub id: u64,
    pub socket: UnixStream,
    input: Vec<u8>,
    is_open: bool,
}

/// Take every waiting connection.
pub fn accept(listener: &UnixListener, peers: &mut Vec<Peer>, next_id: &mut u64) {
    while let Ok((socket, _)) = listener.accept() {
        if socket.set_nonblocking(true).is_err() || socket.set_write_timeout(Some(WRITE_TIMEOUT)).is_err() {
            continue;
        }
        if peers.len() == PEERS_MAX {
            peers.remove(0);
        }
        *next_id += 1;
        peers.push(Peer {
            id: *next_id,
            socket,
            input: Vec::new(),
            is_open: true,
        });
    }
}

impl Peer {
    pub fn is_open(&self) -> bool {
        self.is_open
    }

    /// Requests that have arrived whole; an unreadable one is an error sentence to answer with.
    pub fn receive(&mut self) -> Vec<Result<GuestRequest, String>> {
        let mut buffer = [0; 64 * 1024];
        loop {
            match self.socket.read(&mut buffer) {
                Ok(0) => {
                    self.is_open = false;
                    break;
                }
                Ok(length) => self.input.extend_from_slice(&buffer[..length]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.is_open = false;
                    break;
                }
            }
            if self.input.len() > LINE_BYTES_MAX {
                self.is_open = false;
                return vec![Err(format!("a request is longer than {LINE_BYTES_MAX} bytes"))];
            }
        }
        let mut requests = Vec::new();
        while let Some(end) = self.input.iter().position(|&byte| byte == b'\n') {
            let line: Vec<u8> = self.input.drain(..=end).collect();
            requests.push(serde_json::from_slice(&line).map_err(|error| format!("a request cannot be read: {error}")));
        }
        requests
    }

    pub fn answer(&mut self, reply: &GuestReply) {
        if self.try_answer(reply).is_err() {
            self.is_open = false;
        }
    }

    fn try_answer(&mut self, reply: &GuestReply) -> io::Result<()> {
        let mut line = serde_json::to_vec(reply)?;
        line.push(b'\n');
        // Blocking with a deadline: replies are short, and a peer that does not read them loses its connection.
        self.socket.set_nonblocking(false)?;
        self.socket.write_all(&line)?;
        self.socket.set_nonblocking(true)
    }
}
