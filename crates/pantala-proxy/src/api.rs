//! `_api.internal:4280` as machines reach it: connections are carried to the control plane's API as they are.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::log;
use crate::shared::Shared;

const CONNECTIONS_MAX: usize = 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub async fn run(shared: Arc<Shared>, listener: std::net::TcpListener, to: SocketAddr) -> std::io::Result<()> {
    shared.serving().await;
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let accepted = tokio::select! {
            () = shared.replaced() => return Ok(()),
            accepted = listener.accept() => accepted,
        };
        let Ok((mut client, _)) = accepted else {
            sleep(ACCEPT_PAUSE).await;
            continue;
        };
        let Ok(place) = places.clone().try_acquire_owned() else {
            continue;
        }; // over the bound: closed
        tokio::spawn(async move {
            match timeout(CONNECT_TIMEOUT, TcpStream::connect(to)).await {
                // How it ended is the business of both ends.
                Ok(Ok(mut server)) => drop(copy_bidirectional(&mut client, &mut server).await),
                _ => log::warning("API not reached", &[("address", &to)]),
            }
            drop(place);
        });
    }
}
