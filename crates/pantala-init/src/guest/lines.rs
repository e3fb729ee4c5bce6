//! From a pipe to lines: the app's stdout or stderr, read without blocking, into the ring.

use std::fs::File;
use std::io::{ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use pantala_wire::guest::RING_LINE_BYTES_MAX;

use super::ring::{Ring, Stream};
use super::unix_ns;

/// Per turn of the loop, so that one loud stream does not starve the rest.
const TURN_BYTES: usize = 64 * 1024;

pub struct LineReader {
    pipe: File,
    stream: Stream,
    /// Begins every line: whose output it is.
    prefix: Vec<u8>,
    partial: Vec<u8>,
}

impl LineReader {
    /// `pipe` must be non-blocking.
    pub fn new(pipe: OwnedFd, stream: Stream) -> Self {
        LineReader {
            pipe: File::from(pipe),
            stream,
            prefix: Vec::new(),
            partial: Vec::new(),
        }
    }

    /// Each of its lines says the container's name.
    pub fn named(mut self, container: &str) -> Self {
        self.prefix = format!("{container} | ").into_bytes();
        self.partial = self.prefix.clone();
        self
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.pipe.as_fd()
    }

    /// Move what is there into the ring; false when the pipe has ended (the partial last line is flushed then).
    pub fn pump(&mut self, ring: &mut Ring) -> bool {
        let mut buffer = [0; 16 * 1024];
        for _ in 0..TURN_BYTES / buffer.len() {
            match self.pipe.read(&mut buffer) {
                Ok(0) => {
                    self.flush(ring);
                    return false;
                }
                Ok(length) => self.take(&buffer[..length], ring),
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => {
                    self.flush(ring);
                    return false;
                }
            }
        }
        true
    }

    /// Write what is left of an unfinished line.
    pub fn flush(&mut self, ring: &mut Ring) {
        if self.partial.len() > self.prefix.len() {
            self.append(ring);
        }
    }

    /// A line longer than a record becomes several: cut, never dropped.
    fn take(&mut self, data: &[u8], ring: &mut Ring) {
        let mut pieces = data.split(|&byte| byte == b'\n').peekable();
        while let Some(mut piece) = pieces.next() {
            let is_whole = pieces.peek().is_some();
            loop {
                let room = RING_LINE_BYTES_MAX - self.partial.len();
                if piece.len() <= room {
                    break;
                }
                self.partial.extend_from_slice(&piece[..room]);
                self.flush(ring);
                piece = &piece[room..];
            }
            self.partial.extend_from_slice(piece);
            if is_whole {
                self.append(ring);
            }
        }
    }

    fn append(&mut self, ring: &mut Ring) {
        ring.append(unix_ns(), self.stream, &self.partial);
        self.partial.truncate(self.prefix.len());
    }
}
