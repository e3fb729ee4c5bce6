//! `_api.internal:4280` as machines reach it: connections are carried to the control plane's API as they are.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::log;

const CONNECTIONS_MAX: usize = 1024;
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

pub async fn run(listener: std::net::TcpListener, to: SocketAddr) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok((mut client, _)) = listener.accept().await else {
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
