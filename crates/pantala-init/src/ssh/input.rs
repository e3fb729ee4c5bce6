//! What a client sends to a program, on its way there.
//!
//! The connection's loop must not wait for a program that does not read while that program waits for the loop to take its
//! output: each would wait for the other. So input is queued; the loop waits once much of it is, unless output waits too.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Notify, mpsc};

/// The client is held back from here on, as long as the program says nothing.
const QUEUED_MAX: usize = 1024 * 1024;
/// A client that sends so much more than is read is cut off.
const QUEUED_LIMIT: usize = 32 * 1024 * 1024;
const BLOCK: usize = 32 * 1024;

#[derive(Default)]
pub struct Gauge {
    queued: AtomicUsize,
    talking: AtomicUsize,
    changed: Notify,
}

/// The client's end.
#[derive(Clone)]
pub struct Input {
    queue: mpsc::UnboundedSender<Bytes>,
    gauge: Arc<Gauge>,
}

/// The program's end.
pub struct Source {
    queue: mpsc::UnboundedReceiver<Bytes>,
    pub gauge: Arc<Gauge>,
}

pub fn queue() -> (Input, Source) {
    let (sender, receiver) = mpsc::unbounded_channel();
    let gauge = Arc::new(Gauge::default());
    let input = Input {
        queue: sender,
        gauge: gauge.clone(),
    };
    (input, Source { queue: receiver, gauge })
}

impl Input {
    /// False when so much is queued that the connection must end.
    pub async fn push(&self, data: &[u8]) -> bool {
        loop {
            let mut changed = pin!(self.gauge.changed.notified());
            changed.as_mut().enable();
            let queued = self.gauge.queued.load(SeqCst);
            if queued > QUEUED_LIMIT {
                return false;
            }
            if queued < QUEUED_MAX || self.gauge.is_talking() || self.queue.is_closed() {
                break;
            }
            changed.await;
        }
        self.gauge.queued.fetch_add(data.len(), SeqCst);
        // A program that ended reads no more.
        let _ = self.queue.send(Bytes::copy_from_slice(data));
        true
    }
}

impl Source {
    /// Write all that comes to `to`, until the client says that this was all or nobody reads any more.
    pub async fn feed(mut self, mut to: impl AsyncWrite + Unpin, last: &[u8]) {
        while let Some(data) = self.queue.recv().await {
            let written = to.write_all(&data).await;
            self.gauge.queued.fetch_sub(data.len(), SeqCst);
            self.gauge.changed.notify_waiters();
            if written.is_err() {
                break;
            }
        }
        let _ = to.write_all(last).await;
        let _ = to.shutdown().await;
    }
}

/// However it ended: whatever still comes is dropped, and holds nobody back.
impl Drop for Source {
    fn drop(&mut self) {
        self.queue.close();
        self.gauge.changed.notify_waiters();
    }
}

impl Gauge {
    pub fn is_talking(&self) -> bool {
        self.talking.load(SeqCst) > 0
    }

    /// Everything of `from` to the client.
    pub async fn say(&self, mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin) {
        let mut block = vec![0; BLOCK];
        while let Ok(length @ 1..) = from.read(&mut block).await {
            if self.talk(to.write_all(&block[..length])).await.is_err() {
                return;
            }
        }
    }

    async fn talk<T>(&self, words: impl Future<Output = T>) -> T {
        self.talking.fetch_add(1, SeqCst);
        self.changed.notify_waiters();
        let done = words.await;
        self.talking.fetch_sub(1, SeqCst);
        done
    }
}
