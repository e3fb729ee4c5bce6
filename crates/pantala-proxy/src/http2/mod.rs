//! Phases 2 and 3 of connections of HTTP/2: streams are taken from `h2` within our bounds, each answered by a task of its own
//! ([`stream`]). hyper has no way to send early hints on a stream, so it has no part in these connections.

pub mod alive;
pub mod client;
pub mod received;
pub mod stream;
pub mod tunnel;

use std::cell::Cell;
use std::pin::Pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use h2::server::{self, Connection};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::task::spawn_local;
use tokio::time::timeout;

use crate::conversation::Conversation;
use crate::headers::Client;
use crate::http::{GOODBYE_MAX, HEAD_BYTES_MAX, begin, closing, silent};
use crate::service::Worker;
use crate::watched::Watched;

const STREAMS_MAX: u32 = 250;
/// Of what the client may send ahead, on one stream and on all of a connection.
const WINDOW: u32 = 1024 * 1024;
/// Of an answer that waits for its client.
const SEND_BYTES_MAX: usize = 400 * 1024;
/// A client that is silent from one look to the next is asked for a sign.
const LOOK_INTERVAL: Duration = Duration::from_secs(40);
const SIGN_MAX: Duration = Duration::from_secs(20);

pub async fn http_2<S: AsyncRead + AsyncWrite + Unpin>(worker: &Rc<Worker>, client: Client, stream: S) {
    let conversation = begin(worker, &client);
    let heard = Cell::new(false);
    let mut over = std::pin::pin!(over(worker, &conversation));
    // With room of its own, which is given back.
    let greeted = Box::pin(greet(Watched::new(stream, |_: &[u8]| heard.set(true)), over.as_mut())).await;
    let Some((mut connection, mut leaving)) = greeted else {
        return;
    };
    let alive = (LOOK_INTERVAL, SIGN_MAX);
    let mut lost = std::pin::pin!(alive::lost(connection.ping_pong(), &heard, alive, || true));
    loop {
        tokio::select! {
            biased; // what came before the end is answered
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (worker, conversation) = (worker.clone(), conversation.clone());
                    spawn_local(stream::serve(worker, client, conversation, request, respond));
                }
                // Its streams learn of it by themselves.
                Some(Err(_)) | None => return,
            },
            // What was opened as a tunnel goes on; new streams go to another connection.
            () = over.as_mut(), if !leaving => {
                connection.graceful_shutdown();
                leaving = true;
            }
            () = lost.as_mut() => return,
        }
    }
}

/// Answers whether the connection is to end as soon as it begins. A client that is just saying its first words may have
/// asked for something in them.
async fn greet<S: AsyncRead + AsyncWrite + Unpin>(
    stream: S,
    over: Pin<&mut impl Future<Output = ()>>,
) -> Option<(Connection<S, Bytes>, bool)> {
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_send_buffer_size(SEND_BYTES_MAX)
        .enable_connect_protocol(); // WebSocket over HTTP/2 (RFC 8441)
    let mut greeting = builder.handshake(stream);
    tokio::select! {
        biased;
        greeted = &mut greeting => Some((greeted.ok()?, false)),
        () = over => {
            let mut connection = timeout(GOODBYE_MAX, greeting).await.ok()?.ok()?;
            connection.graceful_shutdown();
            Some((connection, true))
        }
    }
}

/// Returns when nothing new is to begin: this process ends, or the connection was idle for too long.
async fn over(worker: &Worker, conversation: &Conversation) {
    tokio::select! {
        () = closing(&worker.shared) => {}
        _ = silent(conversation, false) => {}
    }
}

/// What an error says to the other end of a stream: the reason of another stream, if it was that.
fn reason(error: &(dyn std::error::Error + 'static)) -> Reason {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(reason) = error.downcast_ref::<h2::Error>().and_then(h2::Error::reason) {
            return reason;
        }
        cause = error.source();
    }
    Reason::INTERNAL_ERROR
}
