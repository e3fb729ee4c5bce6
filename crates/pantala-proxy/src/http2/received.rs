//! A body that comes by HTTP/2: of a client's request, or of the answer of an app or another host. The sender may send on as far as it
//! was taken from here; a client that waits for a 100 is told to begin when its body is asked for the first time.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use h2::{Reason, RecvStream};
use hyper::HeaderMap;
use hyper::body::{Body, Frame, SizeHint};
use hyper::header::CONTENT_LENGTH;

use super::client::Rest;
use crate::conversation::Reading;
use crate::hints::Early;

pub struct Received {
    stream: RecvStream,
    data_over: bool,
    /// of what the sender announced; h2 holds it to it
    left: Option<u64>,
    /// the client waits until it is told to go on
    waits: Option<Arc<Early>>,
    /// of an answer
    rest: Option<Rest>,
    /// the client's connection is not parked until this is gone
    _reading: Option<Reading>,
}

impl Received {
    pub fn new(
        stream: RecvStream,
        headers: &HeaderMap,
        waits: Option<Arc<Early>>,
        reading: Option<Reading>,
    ) -> Received {
        let announced = headers.get(CONTENT_LENGTH).and_then(|value| value.to_str().ok());
        Received {
            stream,
            data_over: false,
            left: announced.and_then(|length| length.parse().ok()),
            waits,
            rest: None,
            _reading: reading,
        }
    }

    pub fn of_answer(stream: RecvStream, headers: &HeaderMap, rest: Rest) -> Received {
        let mut received = Received::new(stream, headers, None, None);
        received.rest = Some(rest);
        received
    }

    /// Nothing more of an answer comes.
    fn over(&mut self) {
        self.rest.take().into_iter().for_each(Rest::over);
    }
}

impl Drop for Received {
    fn drop(&mut self) {
        if self.stream.is_end_stream() {
            self.over();
        }
    }
}

impl Body for Received {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let this = &mut *self;
        if !this.data_over {
            let data = this.stream.poll_data(cx);
            if let (Some(early), true) = (this.waits.take(), data.is_pending()) {
                early.go_on();
            }
            match ready!(data) {
                Some(Ok(data)) => {
                    let _ = this.stream.flow_control().release_capacity(data.len()); // never more than came
                    this.left = this.left.map(|left| left.saturating_sub(data.len() as u64));
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                Some(Err(error)) => return Poll::Ready(ended(error)),
                None => this.data_over = true,
            }
        }
        match ready!(this.stream.poll_trailers(cx)) {
            Ok(trailers) => {
                this.over();
                Poll::Ready(trailers.map(|trailers| Ok(Frame::trailers(trailers))))
            }
            Err(error) => Poll::Ready(ended(error)),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        match self.left {
            Some(left) => SizeHint::with_exact(left),
            None if self.is_end_stream() => SizeHint::with_exact(0),
            None => SizeHint::default(),
        }
    }
}

/// A client may stop sending without an error, once it has its answer (RFC 9113, 8.1).
fn ended(error: h2::Error) -> Option<Result<Frame<Bytes>, h2::Error>> {
    (error.reason() != Some(Reason::NO_ERROR)).then_some(Err(error))
}
