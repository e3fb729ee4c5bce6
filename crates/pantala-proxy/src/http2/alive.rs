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
        if !gives_sign(&mut pings, sign, || heard.replace(false)).await {
            return;
        }
    }
}

/// Asks the other end for a sign of life. Does not return when the connection ends by itself meanwhile. `heard`: whether
/// anything came since this was last asked.
pub async fn gives_sign(pings: &mut PingPong, sign: Duration, heard: impl Fn() -> bool) -> bool {
    let mut pong = std::pin::pin!(pings.ping(Ping::opaque()));
    loop {
        tokio::select! {
            biased;
            answered = pong.as_mut() => match answered {
                Ok(_) => return true,
                Err(_) => return std::future::pending().await,
            },
            () = sleep(sign) => if !heard() { return false },
        }
    }
}
