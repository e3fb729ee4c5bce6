//! The ring file of the app's output. Format: `src/pantala/wire/guest.py`.
//!
//! One writer (init), any number of readers that may look at any moment, so the order of stores is the contract: `tail`
//! moves past what will be overwritten before the first byte of it changes, `head` moves after the record is whole. A
//! reader that copies a record and then still sees `tail` at or before its position has a whole one.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use pantala_wire::guest::{RING_HEADER_BYTES, RING_LINE_BYTES_MAX, RING_MAGIC, RING_VERSION};

const AT_CAPACITY: usize = 12;
const AT_HEAD: usize = 16;
const AT_TAIL: usize = 24;
/// Length (4), time (8), stream (1).
const RECORD_HEADER_BYTES: usize = 13;
/// The longest record twice, so that a full ring always keeps at least one.
pub const CAPACITY_MIN: usize = 2 * (RECORD_HEADER_BYTES + RING_LINE_BYTES_MAX);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Stream {
    Stdout = 1,
    Stderr = 2,
}

#[derive(Debug, thiserror::Error)]
pub enum RingError {
    #[error("the ring file has {0} bytes, fewer than a header and one record need")]
    TooSmall(u64),
    #[error("the ring file is of version {0}, this init writes {RING_VERSION}")]
    Version(u32),
    #[error("the ring file cannot be mapped")]
    Map(#[source] std::io::Error),
}

/// The mapped ring. The file's blocks are allocated by whoever made it: a hole on a full disk would kill PID 1.
pub struct Ring {
    base: NonNull<u8>,
    mapped_bytes: usize,
    capacity: usize,
    head: u64,
    tail: u64,
}

impl Ring {
    /// Map `file`; one without a header gets one, an existing one is continued.
    pub fn open(file: &File) -> Result<Self, RingError> {
        let size = file.metadata().map_err(RingError::Map)?.len();
        let capacity = (size as usize).saturating_sub(RING_HEADER_BYTES);
        if capacity < CAPACITY_MIN {
            return Err(RingError::TooSmall(size));
        }
        let mapped_bytes = RING_HEADER_BYTES + capacity;
        // SAFETY: a fresh shared mapping of a file that we hold open; nothing else in this process refers to it.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                mapped_bytes,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(RingError::Map(std::io::Error::last_os_error()));
        }
        let base = NonNull::new(address.cast::<u8>()).ok_or(RingError::TooSmall(size))?;
        let mut ring = Ring {
            base,
            mapped_bytes,
            capacity,
            head: 0,
            tail: 0,
        };
        if ring.bytes(0, 8) == RING_MAGIC {
            let version = u32::from_le_bytes(ring.array(8));
            if version != RING_VERSION {
                return Err(RingError::Version(version));
            }
            ring.capacity = (u32::from_le_bytes(ring.array(AT_CAPACITY)) as usize).clamp(CAPACITY_MIN, capacity);
            ring.head = ring.cell(AT_HEAD).load(Ordering::Acquire);
            ring.tail = ring.cell(AT_TAIL).load(Ordering::Acquire);
        } else {
            ring.put(8, &RING_VERSION.to_le_bytes());
            ring.put(AT_CAPACITY, &(capacity as u32).to_le_bytes());
            ring.put(0, &RING_MAGIC);
        }
        Ok(ring)
    }

    /// Append one record; text beyond `RING_LINE_BYTES_MAX` is the caller's to split.
    pub fn append(&mut self, unix_ns: u64, stream: Stream, text: &[u8]) {
        let text = &text[..text.len().min(RING_LINE_BYTES_MAX)];
        let record_bytes = (RECORD_HEADER_BYTES + text.len()) as u64;
        self.make_room(record_bytes);
        let mut at = self.head;
        let length = (record_bytes - 4) as u32;
        for part in [
            &length.to_le_bytes()[..],
            &unix_ns.to_le_bytes()[..],
            &[stream as u8][..],
            text,
        ] {
            self.put_wrapped(at, part);
            at += part.len() as u64;
        }
        self.head = at;
        self.cell(AT_HEAD).store(self.head.to_le(), Ordering::SeqCst);
    }

    /// First step of the publication: nobody may believe in records that are about to be overwritten.
    fn make_room(&mut self, record_bytes: u64) {
        while self.head + record_bytes - self.tail > self.capacity as u64 {
            let oldest = u32::from_le_bytes(self.wrapped_array(self.tail));
            self.tail += 4 + u64::from(oldest);
        }
        self.cell(AT_TAIL).store(self.tail.to_le(), Ordering::SeqCst);
    }

    fn cell(&self, offset: usize) -> &AtomicU64 {
        debug_assert!(offset.is_multiple_of(8) && offset + 8 <= RING_HEADER_BYTES);
        // SAFETY: inside the mapping, aligned (the mapping is page-aligned), valid for any bit pattern, and only ever
        // accessed atomically or before the ring is shared.
        unsafe { &*self.base.as_ptr().add(offset).cast::<AtomicU64>() }
    }

    fn bytes(&self, offset: usize, length: usize) -> &[u8] {
        assert!(offset + length <= self.mapped_bytes);
        // SAFETY: bounds asserted; this process is the only writer and holds `&self`.
        unsafe { std::slice::from_raw_parts(self.base.as_ptr().add(offset), length) }
    }

    fn array<const N: usize>(&self, offset: usize) -> [u8; N] {
        let mut out = [0; N];
        out.copy_from_slice(self.bytes(offset, N));
        out
    }

    fn wrapped_array<const N: usize>(&self, position: u64) -> [u8; N] {
        let mut out = [0; N];
        for (index, byte) in out.iter_mut().enumerate() {
            let at = ((position + index as u64) % self.capacity as u64) as usize;
            *byte = self.bytes(RING_HEADER_BYTES + at, 1)[0];
        }
        out
    }

    fn put(&mut self, offset: usize, data: &[u8]) {
        assert!(offset + data.len() <= self.mapped_bytes);
        // SAFETY: bounds asserted; `&mut self` is the only access from this process, other processes only read.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), self.base.as_ptr().add(offset), data.len()) }
    }

    fn put_wrapped(&mut self, position: u64, data: &[u8]) {
        let at = (position % self.capacity as u64) as usize;
        let first = data.len().min(self.capacity - at);
        self.put(RING_HEADER_BYTES + at, &data[..first]);
        self.put(RING_HEADER_BYTES, &data[first..]);
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        // SAFETY: exactly the mapping made in `open`; no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.mapped_bytes) };
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn ring(capacity: usize) -> (File, Ring) {
        let file = tempfile::tempfile().unwrap();
        file.set_len((RING_HEADER_BYTES + capacity) as u64).unwrap();
        let ring = Ring::open(&file).unwrap();
        (file, ring)
    }

    /// Everything a reader sees: (stream, text) of each record from tail to head.
    fn read(file: &File) -> Vec<(u8, Vec<u8>)> {
        let mut all = vec![0; file.metadata().unwrap().len() as usize];
        file.read_exact_at(&mut all, 0).unwrap();
        let number = |at: usize| u64::from_le_bytes(all[at..at + 8].try_into().unwrap());
        let (head, mut at) = (number(AT_HEAD), number(AT_TAIL));
        let body = &all[RING_HEADER_BYTES..];
        let byte = |position: u64| body[(position % body.len() as u64) as usize];
        let mut records = vec![];
        while at < head {
            let length = u32::from_le_bytes(std::array::from_fn(|i| byte(at + i as u64)));
            let content: Vec<u8> = (0..u64::from(length)).map(|i| byte(at + 4 + i)).collect();
            records.push((content[8], content[9..].to_vec()));
            at += 4 + u64::from(length);
        }
        assert_eq!(at, head);
        records
    }

    #[test]
    fn keeps_records_in_order() {
        let (file, mut ring) = ring(CAPACITY_MIN);
        ring.append(1, Stream::Stdout, b"one");
        ring.append(2, Stream::Stderr, b"");
        assert_eq!(read(&file), [(1, b"one".to_vec()), (2, vec![])]);
    }

    #[test]
    fn drops_the_oldest_whole_records_when_it_wraps() {
        let (file, mut ring) = ring(CAPACITY_MIN + 7);
        for index in 0..5000_u32 {
            ring.append(
                0,
                Stream::Stdout,
                format!("line {index} {}", "x".repeat(index as usize % 300)).as_bytes(),
            );
        }
        let kept = read(&file);
        assert!(kept.len() > 50);
        let first = 5000 - kept.len();
        for (offset, (_, text)) in kept.iter().enumerate() {
            assert!(text.starts_with(format!("line {} ", first + offset).as_bytes()));
        }
    }

    #[test]
    fn room_is_announced_before_anything_is_overwritten() {
        let (file, mut ring) = ring(CAPACITY_MIN);
        for _ in 0..2 {
            ring.append(0, Stream::Stdout, &[b'a'; RING_LINE_BYTES_MAX]);
        }
        ring.make_room(100);
        assert_eq!(read(&file), [(1, vec![b'a'; RING_LINE_BYTES_MAX])]);
    }

    #[test]
    fn the_longest_record_fits() {
        let (file, mut ring) = ring(CAPACITY_MIN);
        for _ in 0..5 {
            ring.append(0, Stream::Stdout, &vec![b'y'; RING_LINE_BYTES_MAX + 5]);
        }
        assert_eq!(read(&file)[0].1.len(), RING_LINE_BYTES_MAX);
    }

    #[test]
    fn a_second_writer_continues_the_first() {
        let (file, mut first) = ring(CAPACITY_MIN);
        first.append(0, Stream::Stdout, b"a");
        drop(first);
        Ring::open(&file).unwrap().append(0, Stream::Stdout, b"b");
        assert_eq!(read(&file).len(), 2);
    }

    #[test]
    fn a_file_too_small_is_refused() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        assert!(matches!(Ring::open(&file), Err(RingError::TooSmall(5000))));
    }
}
