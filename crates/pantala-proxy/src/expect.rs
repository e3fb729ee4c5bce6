//! `Expect: 100-continue`: the body is not asked of the client before the app has asked for it. An app that refuses by its
//! head alone is passed through without a byte of the body; one that knows nothing of it gets the body after a moment.

use std::pin::Pin;
use std::sync::atomic::{AtomicU8, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

use hyper::header::{EXPECT, HeaderValue};
use hyper::{HeaderMap, Version};
use tokio::time::{Sleep, sleep};

use crate::body::AttemptBody;

/// RFC 9110, 10.1.1: nobody waits for ever for a 100 that may not come.
const PATIENCE: Duration = Duration::from_secs(1);

const CLOSED: u8 = 0;
const OPEN: u8 = 1;
const GIVEN_UP: u8 = 2;

/// Between the client's body and one attempt; opened by the app's 100.
#[derive(Default)]
pub struct Gate {
    state: AtomicU8,
    waker: Mutex<Option<Waker>>,
}

impl Gate {
    /// The app asked for the body.
    pub fn open(&self) {
        self.decide(OPEN);
    }

    fn decide(&self, state: u8) {
        if self.state.compare_exchange(CLOSED, state, Relaxed, Relaxed).is_ok() {
            let waker = self.waker.lock().unwrap_or_else(PoisonError::into_inner).take();
            waker.into_iter().for_each(Waker::wake);
        }
    }
}

/// The body's end of the gate.
pub struct Held {
    gate: Arc<Gate>,
    patience: Pin<Box<Sleep>>,
}

#[derive(Debug, thiserror::Error)]
#[error("the app answered without the body")]
pub struct NotWanted;

impl Held {
    pub fn poll_open(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), NotWanted>> {
        *self.gate.waker.lock().unwrap_or_else(PoisonError::into_inner) = Some(cx.waker().clone());
        if self.patience.as_mut().poll(cx).is_ready() {
            self.gate.decide(OPEN);
        }
        match self.gate.state.load(Relaxed) {
            OPEN => Poll::Ready(Ok(())),
            GIVEN_UP => Poll::Ready(Err(NotWanted)),
            _ => Poll::Pending,
        }
    }
}

/// Held while the answer passes. A connection whose body was never asked for cannot carry another request.
pub struct Asked(Arc<Gate>);

impl Asked {
    pub fn gate(&self) -> &Arc<Gate> {
        &self.0
    }

    pub fn was_open(&self) -> bool {
        self.0.state.load(Relaxed) == OPEN
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.decide(GIVEN_UP);
    }
}

pub fn wanted(headers: &HeaderMap) -> bool {
    let is_continue = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(b"100-continue");
    headers.get(EXPECT).is_some_and(is_continue)
}

/// Of a client's request: HTTP/1.0 knows no 100, and without a body there is nothing to wait for.
pub fn keep(headers: &mut HeaderMap, version: Version, bodiless: bool) {
    if headers.contains_key(EXPECT) && (version == Version::HTTP_10 || bodiless || !wanted(headers)) {
        headers.remove(EXPECT);
    }
}

/// Puts a gate before the body.
pub fn hold(body: &mut AttemptBody) -> Asked {
    let gate = Arc::new(Gate::default());
    body.hold(Held {
        gate: gate.clone(),
        patience: Box::pin(sleep(PATIENCE)),
    });
    Asked(gate)
}
