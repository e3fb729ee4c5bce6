//! SIGTERM and SIGINT: say so in `/healthz` for `lame_duck_ms` and serve on; then accept no more, answer with
//! `Connection: close`, close idle connections, wait for the rest. A process that another one replaced does the same,
//! without the first.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::{Instant, sleep, timeout_at};

use crate::shared::{Life, Shared};
use crate::tunnels::SERVICE_RESTART;
use crate::{log, notify};

/// Clients need a moment to see `Connection: close`; hyper's graceful shutdown at once would cut requests on their way.
const NOTICE: Duration = Duration::from_secs(2);
const LOOK_EVERY: Duration = Duration::from_millis(20);
const LEAVE: Duration = Duration::from_millis(250);

/// The signals are taken over when this is called, before anything is served.
pub fn watch(shared: Arc<Shared>) -> std::io::Result<impl Future<Output = ()>> {
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        let replaced = tokio::select! {
            () = either(&mut terminate, &mut interrupt) => false,
            () = shared.replaced() => true,
        };
        log::info(
            "proxy leaving",
            &[("connections", &shared.metrics.connections_open.load(Relaxed))],
        );
        let by = Instant::now() + Duration::from_millis(shared.settings.wire.drain_max_ms);
        tokio::select! {
            () = withdraw_and_leave(&shared, replaced, by) => {}
            () = either(&mut terminate, &mut interrupt) => {} // asked twice
        }
        shared.tunnels.end_all(SERVICE_RESTART);
        empty_by(&shared, Instant::now() + LEAVE).await;
        shared.life.send_replace(Life::Ending);
    })
}

async fn withdraw_and_leave(shared: &Shared, replaced: bool, by: Instant) {
    if !replaced {
        // Whoever does not hear it sees it end.
        let _ = notify::stopping();
        shared.withdrawn.store(true, Relaxed);
        // Routers go on sending new connections until they have heard.
        sleep(Duration::from_millis(shared.settings.wire.lame_duck_ms)).await;
    }
    leave(shared, by).await;
}

async fn leave(shared: &Shared, by: Instant) {
    shared.listening().clear();
    shared.life.send_replace(Life::Leaving);
    if !empty_by(shared, by.min(Instant::now() + NOTICE)).await {
        shared.life.send_replace(Life::Closing);
        empty_by(shared, by).await;
    }
}

async fn empty_by(shared: &Shared, by: Instant) -> bool {
    let empty = async {
        // Whoever this process replaced has its places from here, and through it from the next one.
        let lends = || *shared.handed_over.borrow() && shared.metrics.lending.load(Relaxed) > 0;
        while shared.metrics.connections_open.load(Relaxed) + shared.tunnels.open() > 0 || lends() {
            sleep(LOOK_EVERY).await;
        }
    };
    timeout_at(by, empty).await.is_ok()
}

async fn either(terminate: &mut Signal, interrupt: &mut Signal) {
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
}
