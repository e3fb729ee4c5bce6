//! Whether the other end of a connection is still there.

use std::cell::Cell;
use std::time::Duration;

use h2::{Ping, PingPong};
use tokio::time::sleep;

/// Returns when the other end gives no sign of life. Whatever it sends is one, as a pong waits behind a large answer.
/// `look`: an end that is silent from one look to the next, while something is `wanted` of it, is asked for a sign.
pub async fn lost(
    pings: Option<PingPong>,
    heard: &Cell<bool>,
    (look, sign): (Duration, Duration),
    wanted: impl Fn() -> bool,
) {
    let Some(mut pings) = pings else {
        return std::future::pending().await;
    };
    loop {
        sleep(look).await;
        if heard.replace(false) || !wanted() {
            continue;
        }
        let mut pong = std::pin::pin!(pings.ping(Ping::opaque()));
        loop {
            tokio::select! {
                biased;
                answered = pong.as_mut() => match answered {
                    Ok(_) => break,
                    Err(_) => return std::future::pending().await, // the connection ends by itself
                },
                () = sleep(sign) => if !heard.replace(false) { return },
            }
        }
    }
}
