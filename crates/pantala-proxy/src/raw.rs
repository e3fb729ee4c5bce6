//! Ports that carry no HTTP: the app is found by address or SNI, and bytes pass both ways. A connection counts as one
//! request until it ends.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use pantala_route::matching::Matched;
use pantala_wire::feed::ProxyLog;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::headers::Client;
use crate::respond::Refusal;
use crate::select::{Selection, Slot};
use crate::shared::Shared;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ATTEMPTS_MAX: u32 = pantala_route::retry::ATTEMPTS_MAX;

pub async fn carry<S: AsyncRead + AsyncWrite + Unpin>(
    shared: &Arc<Shared>,
    client: Client,
    mut stream: S,
    name: Option<String>,
) {
    let name = name.as_deref().and_then(pantala_route::names::normalise);
    // A port that no app offers is closed after the accept.
    let Matched::App(app) = shared.view().snapshot.find(client.local.ip(), name.as_deref()) else {
        return;
    };
    let port = client.local.port();
    if app.offer(port).is_none() {
        return;
    }
    let host = name.unwrap_or_default();
    let mut selection = Selection::new(shared, &app.name, client.local.ip(), port, &host);
    match connect(&mut selection).await {
        Ok((slot, mut upstream)) => {
            let mut ends = shared.tunnels.join(&slot.target.machine.id);
            tokio::select! {
                // How it ended is the business of both ends.
                _ = copy_bidirectional(&mut stream, &mut upstream) => {}
                _ = ends.wait_for(Option::is_some) => {}
            }
        }
        Err(refusal) => {
            shared.metrics.failed.fetch_add(1, Relaxed);
            shared.tell_agent(ProxyLog {
                app: app.name.to_string(),
                code: refusal.code.to_owned(),
                message: refusal.happened,
                machine: refusal.machine,
                request_id: String::new(),
            });
        }
    }
}

async fn connect(selection: &mut Selection) -> Result<(Slot, TcpStream), Refusal> {
    for _ in 0..ATTEMPTS_MAX {
        let slot = selection.slot().await?;
        let machine = slot.target.machine.id.clone();
        let why = match slot.target.socket() {
            None => "the machine has no address".to_owned(),
            Some(socket) => match timeout(CONNECT_TIMEOUT, TcpStream::connect(socket)).await {
                Ok(Ok(stream)) => return Ok((slot, stream)),
                Ok(Err(error)) => error.to_string(),
                Err(_) => "no answer in time".to_owned(),
            },
        };
        drop(slot);
        let refusal = Refusal::new(
            hyper::StatusCode::BAD_GATEWAY,
            "PC01",
            format!("The app did not take the connection: {why}."),
            "",
        );
        selection.failed(&machine, refusal.of_machine(&machine));
    }
    Err(Refusal::new(
        hyper::StatusCode::BAD_GATEWAY,
        "PR03",
        "No machine took the connection.",
        "",
    ))
}
