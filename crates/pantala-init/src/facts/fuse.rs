//! A filesystem of a few files that are made anew whenever they are read, served to the kernel over `/dev/fuse`: as much of
//! its protocol (`linux/fuse.h`, version 7.31) as that takes. One folder, files by name, nothing can be written.
//!
//! Answers need nothing but the request, so the host may serve while a machine is made and PID 1 from then on, both on the
//! same descriptor.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

/// The kernel asks for room for the largest request that it might send.
const REQUEST_BYTES: usize = 16 * 1024;
const HEAD: usize = 40;
const MAJOR: u32 = 7;
const MINOR: u32 = 31;
const ROOT: u64 = 1;
/// Names never change: the kernel asks once and remembers.
const FOREVER_S: u64 = u32::MAX as u64;
/// Every read comes to us. Only what is copied in the kernel (sendfile) goes by its cache, which each `open` empties, and
/// by the size of the file, which is asked for each time. It has to be the very length: what is missing would be NULs.
const SIZE_VALID_S: u64 = 0;
const FOPEN_DIRECT_IO: u32 = 1;
/// Readers whose file stays as it was when they began to read it; of more than these each read is made anew.
const OPEN_MAX: usize = 64;

const LOOKUP: u32 = 1;
const FORGET: u32 = 2;
const GETATTR: u32 = 3;
const OPEN: u32 = 14;
const READ: u32 = 15;
const STATFS: u32 = 17;
const RELEASE: u32 = 18;
const INIT: u32 = 26;
const INTERRUPT: u32 = 36;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

pub struct Server {
    device: OwnedFd,
    names: &'static [&'static str],
    /// Whose the files are, as the host counts ids.
    owner: u32,
    /// What a reader has begun to read, by its handle.
    begun: BTreeMap<u64, Vec<u8>>,
    last_handle: u64,
    /// Of what was made last.
    lengths: BTreeMap<usize, usize>,
}

/// What one request is answered with: an error number, or bytes. None: the kernel expects nothing.
type Answer = Option<Result<Vec<u8>, Errno>>;

impl Server {
    /// `device` must not block.
    pub fn new(device: OwnedFd, names: &'static [&'static str], owner: u32) -> Self {
        Server {
            device,
            names,
            owner,
            begun: BTreeMap::new(),
            last_handle: 0,
            lengths: BTreeMap::new(),
        }
    }

    pub fn fd(&self) -> BorrowedFd<'_> {
        self.device.as_fd()
    }

    /// Answer everything that waits; `content` makes the file of that number. An error: nothing is mounted any more.
    pub fn answer(&mut self, mut content: impl FnMut(usize) -> Vec<u8>) -> io::Result<()> {
        let mut request = [0; REQUEST_BYTES];
        loop {
            let length = match nix::unistd::read(&self.device, &mut request) {
                Ok(length) => length,
                Err(Errno::EAGAIN) => return Ok(()),
                // It was given up while we took it.
                Err(Errno::EINTR | Errno::ENOENT) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let request = request.get(..length).unwrap_or_default();
            let (Some(unique), Some(answer)) = (u64_at(request, 8), self.judge(request, &mut content)) else {
                continue;
            };
            let reply = reply(unique, answer);
            match nix::unistd::write(&self.device, &reply) {
                // Whoever asked is gone.
                Ok(_) | Err(Errno::ENOENT | Errno::EINTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn judge(&mut self, request: &[u8], content: &mut impl FnMut(usize) -> Vec<u8>) -> Answer {
        let opcode = u32_at(request, 4)?;
        let node = u64_at(request, 16)?;
        let body = request.get(HEAD..)?;
        match opcode {
            FORGET | BATCH_FORGET | INTERRUPT | DESTROY => None,
            INIT => Some(begin(body)),
            LOOKUP => Some(self.look_up(node, body, content)),
            GETATTR => Some(self.attributes(node, content).map(|attributes| {
                let mut out = [SIZE_VALID_S.to_le_bytes(), [0; 8]].concat();
                out.extend(attributes);
                out
            })),
            OPEN => Some(self.file(node).map(|_| {
                self.last_handle += 1;
                let mut out = self.last_handle.to_le_bytes().to_vec();
                out.extend(u64::from(FOPEN_DIRECT_IO).to_le_bytes());
                out
            })),
            READ => Some(self.file(node).and_then(|file| self.read(file, body, content))),
            RELEASE => {
                self.begun.remove(&u64_at(body, 0)?);
                Some(Ok(Vec::new()))
            }
            STATFS => Some(Ok(vec![0; 80])),
            // Said once, most of these are never asked again.
            _ => Some(Err(Errno::ENOSYS)),
        }
    }

    fn look_up(
        &mut self,
        node: u64,
        body: &[u8],
        content: &mut impl FnMut(usize) -> Vec<u8>,
    ) -> Result<Vec<u8>, Errno> {
        let name = body.split(|&byte| byte == 0).next().unwrap_or_default();
        let found = self.names.iter().position(|known| known.as_bytes() == name);
        let (ROOT, Some(file)) = (node, found) else {
            return Err(Errno::ENOENT);
        };
        let node = node_of(file);
        let mut out = [node, 0, FOREVER_S, SIZE_VALID_S, 0].map(u64::to_le_bytes).concat();
        out.extend(self.attributes(node, content)?);
        Ok(out)
    }

    fn attributes(&mut self, node: u64, content: &mut impl FnMut(usize) -> Vec<u8>) -> Result<Vec<u8>, Errno> {
        let (mode, links, length) = match node {
            ROOT => (libc::S_IFDIR | 0o555, 2, 0),
            _ => {
                let file = self.file(node)?;
                let length = *self.lengths.entry(file).or_insert_with(|| content(file).len());
                (libc::S_IFREG | 0o444, 1, length)
            }
        };
        // No times.
        let mut out = [node, length as u64, 0, 0, 0, 0].map(u64::to_le_bytes).concat();
        out.extend(
            [0, 0, 0, mode, links, self.owner, self.owner, 0, 4096, 0]
                .map(u32::to_le_bytes)
                .concat(),
        );
        Ok(out)
    }

    fn file(&self, node: u64) -> Result<usize, Errno> {
        let file = usize::try_from(node).ok().and_then(|node| node.checked_sub(2));
        file.filter(|&file| file < self.names.len()).ok_or(Errno::ENOENT)
    }

    /// Read from its beginning a file is made, and further parts are of the same one.
    fn read(&mut self, file: usize, body: &[u8], content: &mut impl FnMut(usize) -> Vec<u8>) -> Result<Vec<u8>, Errno> {
        let handle = u64_at(body, 0).ok_or(Errno::EIO)?;
        let offset = u64_at(body, 8).ok_or(Errno::EIO)?;
        let most = u32_at(body, 16).ok_or(Errno::EIO)?;
        let part = |whole: &[u8]| {
            let from = usize::try_from(offset).map_or(whole.len(), |from| from.min(whole.len()));
            let rest = &whole[from..];
            rest[..rest.len().min(most as usize)].to_vec()
        };
        if offset != 0
            && let Some(whole) = self.begun.get(&handle)
        {
            return Ok(part(whole));
        }
        let whole = content(file);
        self.lengths.insert(file, whole.len());
        let answer = part(&whole);
        if self.begun.len() < OPEN_MAX || self.begun.contains_key(&handle) {
            self.begun.insert(handle, whole);
        }
        Ok(answer)
    }
}

fn node_of(file: usize) -> u64 {
    file as u64 + 2
}

/// No flag is asked for: what the kernel does unasked is enough.
fn begin(body: &[u8]) -> Result<Vec<u8>, Errno> {
    if u32_at(body, 0) != Some(MAJOR) {
        return Err(Errno::EPROTO);
    }
    let readahead = 0;
    let write_most = 4096;
    let mut out = [MAJOR, MINOR, readahead, 0, 0, write_most, 1]
        .map(u32::to_le_bytes)
        .concat();
    out.resize(64, 0);
    Ok(out)
}

fn reply(unique: u64, answer: Result<Vec<u8>, Errno>) -> Vec<u8> {
    let (error, body) = match answer {
        Ok(body) => (0, body),
        Err(errno) => (-(errno as i32), Vec::new()),
    };
    let length = u32::try_from(16 + body.len()).unwrap_or(u32::MAX);
    let mut out = length.to_le_bytes().to_vec();
    out.extend(error.to_le_bytes());
    out.extend(unique.to_le_bytes());
    out.extend(body);
    out
}

/// The protocol is in the order of the processor; all that we run on are little-endian.
fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn server() -> Server {
        let null = std::fs::File::open("/dev/null").unwrap();
        Server::new(null.into(), &["first", "second"], 7)
    }

    fn ask(server: &mut Server, opcode: u32, node: u64, body: &[u8], text: &str) -> Answer {
        let mut request = vec![0; HEAD];
        request[4..8].copy_from_slice(&opcode.to_le_bytes());
        request[16..24].copy_from_slice(&node.to_le_bytes());
        request.extend(body);
        server.judge(&request, &mut |file| format!("{file} {text}").into_bytes())
    }

    fn read_body(handle: u64, offset: u64, most: u32) -> Vec<u8> {
        let mut body = [handle, offset].map(u64::to_le_bytes).concat();
        body.extend(most.to_le_bytes());
        body
    }

    #[test]
    fn names_lead_to_files_and_nothing_else_is_there() {
        let mut server = server();
        let found = ask(&mut server, LOOKUP, ROOT, b"second\0", "").unwrap().unwrap();
        assert_eq!((found.len(), u64_at(&found, 0)), (128, Some(3)));
        assert_eq!(u64_at(&found, 40 + 8), Some(2), "its length");
        assert_eq!(u32_at(&found, 40 + 60), Some(libc::S_IFREG | 0o444));
        assert_eq!(u32_at(&found, 40 + 68), Some(7));
        assert_eq!(
            ask(&mut server, LOOKUP, ROOT, b"third\0", "").unwrap(),
            Err(Errno::ENOENT)
        );
        assert_eq!(ask(&mut server, LOOKUP, 3, b"first\0", "").unwrap(), Err(Errno::ENOENT));
        assert_eq!(ask(&mut server, GETATTR, 4, &[], "").unwrap(), Err(Errno::ENOENT));
        assert_eq!(ask(&mut server, GETATTR, ROOT, &[], "").unwrap().unwrap().len(), 104);
    }

    #[test]
    fn one_reader_sees_one_file_until_it_begins_anew() {
        let mut server = server();
        let mut read = |offset, text| {
            let answer = ask(&mut server, READ, 3, &read_body(1, offset, 4), text);
            String::from_utf8(answer.unwrap().unwrap()).unwrap()
        };
        assert_eq!(read(0, "old"), "1 ol");
        assert_eq!(read(4, "new"), "d");
        assert_eq!(read(5, "new"), "");
        assert_eq!(read(0, "new"), "1 ne");
        assert_eq!(read(u64::MAX, "new"), "");
    }

    #[test]
    fn readers_that_never_close_cost_no_more_than_the_bound() {
        let mut server = server();
        for handle in 0..1000 {
            let answer = ask(&mut server, READ, 2, &read_body(handle, 0, 100), "text");
            assert_eq!(answer.unwrap().unwrap(), b"0 text");
        }
        assert_eq!(server.begun.len(), OPEN_MAX);
        let seen = ask(&mut server, GETATTR, 2, &[], "longer").unwrap().unwrap();
        assert_eq!(u64_at(&seen, 16 + 8), Some(6), "of what was read last");
        assert_eq!(
            ask(&mut server, READ, 2, &read_body(999, 2, 100), "text")
                .unwrap()
                .unwrap(),
            b"text"
        );
        ask(&mut server, RELEASE, 2, &0u64.to_le_bytes(), "");
        assert_eq!(server.begun.len(), OPEN_MAX - 1);
    }

    #[test]
    fn what_is_cut_short_or_unknown_is_answered_or_left() {
        let mut server = server();
        for opcode in 0..60 {
            for length in [0, 1, 7, 8, 20] {
                let _ = ask(&mut server, opcode, 2, &vec![0xff; length], "text");
            }
        }
        assert!(server.judge(&[0; 10], &mut |_| Vec::new()).is_none());
        assert_eq!(ask(&mut server, 39, 2, &[], "").unwrap(), Err(Errno::ENOSYS));
    }
}
