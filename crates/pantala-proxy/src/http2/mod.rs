//! Phases 2 and 3 of connections of HTTP/2: streams are taken from `h2` within our bounds, each answered by a task of its own
//! ([`stream`]). hyper has no way to send early hints on a stream, so it has no part in these connections. One that is quiet is
//! given up and parked, as its buffers are most of its weight; the next one is told what was said before ([`past`]).

pub mod alive;
pub mod client;
mod past;
pub mod received;
pub mod stream;
mod table;
pub mod tunnel;
mod wire;

use std::cell::Cell;
use std::future::poll_fn;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Poll;
use std::time::Duration;

use bytes::Bytes;
use h2::server::{self, Connection, SendResponse};
use h2::{PingPong, Reason, RecvStream};
use hyper::{Request, Response};
use tokio::task::spawn_local;
use tokio::time::{sleep, timeout};

use crate::conversation::{Conversation, Look, QUIET_AFTER};
use crate::headers::Client;
use crate::http::{GOODBYE_MAX, HEAD_BYTES_MAX, begin, closing, silent};
use crate::park::{Counted, Park};
use crate::service::Worker;

use wire::Wire;

const STREAMS_MAX: u32 = 250;
/// Of what the client may send ahead, on one stream and on all of a connection.
const WINDOW: u32 = 1024 * 1024;
/// Of an answer that waits for its client.
const SEND_BYTES_MAX: usize = 400 * 1024;
static SPENT: [u8; u16::MAX as usize] = [0; u16::MAX as usize];

pub async fn http_2<S: Park>(worker: &Rc<Worker>, client: Client, stream: S) {
    let conversation = begin(worker, &client);
    let wire = Wire::new(stream);
    let mut over = std::pin::pin!(over(worker, &conversation));
    let (mut known, mut woken) = (false, Woken::Heard);
    // With room of its own, which is given back while the connection is parked.
    while Box::pin(speak(worker, client, &conversation, &wire, over.as_mut(), known, woken)).await == Spoken::Quiet {
        woken = park(worker, &wire, over.as_mut()).await;
        known = true;
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spoken {
    /// nothing is under way: the connection is to be parked
    Quiet,
    Over,
}

/// Why a parked connection is taken up again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Woken {
    Heard,
    /// the client has to give a sign of life
    Silent,
    /// it is to end
    Over,
}

/// Streams, until the connection is quiet or over. `known`: it was parked, so that `h2` is told what was said before.
async fn speak<S: Park>(
    worker: &Rc<Worker>,
    client: Client,
    conversation: &Arc<Conversation>,
    wire: &Wire<S>,
    mut over: Pin<&mut impl Future<Output = ()>>,
    known: bool,
    woken: Woken,
) -> Spoken {
    let begun = match known {
        true => Box::pin(resume(wire)).await.map(|connection| (connection, false)),
        false => Box::pin(greet(worker, wire, over.as_mut())).await,
    };
    let Some((mut connection, mut leaving)) = begun else {
        return Spoken::Over;
    };
    if woken == Woken::Over {
        connection.graceful_shutdown();
        leaving = true;
    }
    let asks = Cell::new(woken == Woken::Silent);
    let mut lost = std::pin::pin!(lost(worker, connection.ping_pong(), wire, &asks));
    let mut quiet = std::pin::pin!(quiet(conversation, wire, &asks));
    loop {
        tokio::select! {
            biased; // what came before the end is answered
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (worker, conversation) = (worker.clone(), conversation.clone());
                    spawn_local(stream::serve(worker, client, conversation, request, respond));
                }
                // Its streams learn of it by themselves.
                Some(Err(error)) => {
                    count_broken(worker, &error);
                    return Spoken::Over;
                }
                None => return Spoken::Over,
            },
            // What was opened as a tunnel goes on; new streams go to another connection.
            () = over.as_mut(), if !leaving => {
                connection.graceful_shutdown();
                leaving = true;
            }
            () = lost.as_mut() => return Spoken::Over,
            () = quiet.as_mut(), if !leaving => break,
        }
    }
    drop(connection);
    match timeout(GOODBYE_MAX, wire.settle(WINDOW)).await {
        Ok(Ok(())) => Spoken::Quiet,
        _ => Spoken::Over,
    }
}

fn builder() -> server::Builder {
    let mut builder = server::Builder::new();
    builder
        .initial_window_size(WINDOW)
        .initial_connection_window_size(WINDOW)
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX as u32)
        .max_send_buffer_size(SEND_BYTES_MAX)
        .enable_connect_protocol(); // WebSocket over HTTP/2 (RFC 8441)
    builder
}

/// Answers whether the connection is to end as soon as it begins. A client that is just saying its first words may have
/// asked for something in them; one that never says them is as idle as any other.
async fn greet<S: Park>(
    worker: &Worker,
    wire: &Wire<S>,
    over: Pin<&mut impl Future<Output = ()>>,
) -> Option<(Connection<Wire<S>, Bytes>, bool)> {
    let mut greeting = builder().handshake(wire.clone());
    tokio::select! {
        biased;
        greeted = &mut greeting => {
            let connection = greeted.inspect_err(|error| count_broken(worker, error)).ok()?;
            Some((connection, false))
        }
        () = over => {
            let Ok(greeted) = timeout(GOODBYE_MAX, greeting).await else {
                worker.shared.metrics.http2_broken.fetch_add(1, Relaxed);
                return None;
            };
            let mut connection = greeted.inspect_err(|error| count_broken(worker, error)).ok()?;
            connection.graceful_shutdown();
            Some((connection, true))
        }
    }
}

/// Those that left are none.
fn count_broken(worker: &Worker, error: &h2::Error) {
    if !error.is_io() && !error.is_remote() {
        worker.shared.metrics.http2_broken.fetch_add(1, Relaxed);
    }
}

/// A connection that knows what was said on the one before it. Nothing of this waits for the client.
async fn resume<S: Park>(wire: &Wire<S>) -> Option<Connection<Wire<S>, Bytes>> {
    let told = wire.recall()?;
    let mut greeting = builder().handshake(wire.clone());
    let greeted = poll_fn(|cx| Poll::Ready(Pin::new(&mut greeting).poll(cx))).await;
    let Poll::Ready(Ok(mut connection)) = greeted else {
        return None;
    };
    let asked = match next(&mut connection).await {
        Poll::Pending => None,
        Poll::Ready(Some(Ok((request, mut respond)))) => {
            let mut send = respond.send_response(Response::new(()), false).ok()?;
            let spent = Bytes::from_static(&SPENT[..usize::from(told.spent)]);
            send.send_data(spent, true).ok()?;
            next(&mut connection).await.is_pending().then_some(())?;
            Some(request)
        }
        Poll::Ready(_) => return None,
    };
    wire.tell(told.fields)?;
    next(&mut connection).await.is_pending().then_some(())?;
    drop(asked); // it ended with the fields
    next(&mut connection).await.is_pending().then_some(())?;
    wire.resume()?;
    Some(connection)
}

/// What the connection has by now.
async fn next<S: Park>(
    connection: &mut Connection<Wire<S>, Bytes>,
) -> Poll<Option<Result<(Request<RecvStream>, SendResponse<Bytes>), h2::Error>>> {
    poll_fn(|cx| Poll::Ready(connection.poll_accept(cx))).await
}

/// The quiet time of a connection without its buffers. Its time-outs go on.
async fn park<S: Park>(worker: &Worker, wire: &Wire<S>, over: Pin<&mut impl Future<Output = ()>>) -> Woken {
    let _counted = Counted::new(&worker.shared.metrics);
    tokio::select! {
        biased;
        () = poll_fn(|cx| wire.poll_readable(cx)) => Woken::Heard,
        () = over => Woken::Over,
        () = sleep(ping_after(worker)) => Woken::Silent,
    }
}

/// Returns when nothing is under way any more, at the earliest after [`QUIET_AFTER`]: taking a connection up again has its price.
async fn quiet<S: Park>(conversation: &Conversation, wire: &Wire<S>, asks: &Cell<bool>) {
    loop {
        sleep(QUIET_AFTER).await;
        if silent(conversation, true).await == Look::Quiet && wire.rests() && !asks.get() {
            return;
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

fn ping_after(worker: &Worker) -> Duration {
    Duration::from_millis(worker.shared.settings.wire.client_ping_after_ms)
}

/// Returns when the client gives no sign of life. Whatever it sends is one, as a pong waits behind a large answer. `asks`: it
/// has been asked for one, or is to be at once.
async fn lost<S: Park>(worker: &Worker, pings: Option<PingPong>, wire: &Wire<S>, asks: &Cell<bool>) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    let sign_max = Duration::from_millis(worker.shared.settings.wire.client_ping_timeout_ms);
    loop {
        if !asks.get() {
            sleep(ping_after(worker)).await;
            if wire.heard() {
                continue;
            }
            asks.set(true);
        }
        if !alive::gives_sign(&mut pings, sign_max, || wire.heard()).await {
            return;
        }
        asks.set(false);
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
