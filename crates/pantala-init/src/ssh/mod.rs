//! `pantala-init ssh`: the SSH server of a machine, a process of its own beside the app.
//!
//! Begun by PID 1 (`guest/door.rs`) when somebody connects, with the listening socket as its input and `Settings` as its
//! output; ends by itself after `QUIET`. One way in: a user certificate of the control plane's (`certificate`). A
//! connection is a `session::Login`; what it runs, `program`. All of it on one thread, so that a program can be forked
//! safely.

mod certificate;
mod input;
mod program;
mod session;
mod terminal;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::net::TcpListener;
use std::os::fd::FromRawFd;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pantala_wire::guest::Ssh;
use russh::keys::PrivateKey;
use russh::{MethodKind, MethodSet, server};
use serde::{Deserialize, Serialize};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::guest::app;
use certificate::Policy;
use session::Login;

/// Connections at once; one more is told so and closed.
pub const CONNECTIONS_MAX: usize = 32;
/// From connecting to being logged in.
const LOGIN_MAX: Duration = Duration::from_secs(20);
/// A server without connections ends after it.
const QUIET: Duration = Duration::from_secs(60);
/// A client that does not answer three of these is gone.
const KEEPALIVE: Duration = Duration::from_secs(15);
const ATTEMPTS_MAX: usize = 6;

#[derive(Serialize, Deserialize)]
pub struct Settings {
    pub ssh: Ssh,
    pub env: BTreeMap<String, String>,
    /// By name.
    pub containers: BTreeMap<String, Place>,
}

/// A container, as its programs find it.
#[derive(Serialize, Deserialize)]
pub struct Place {
    pub root: String,
    pub env: BTreeMap<String, String>,
}

/// What every connection is given.
pub struct House {
    policy: Policy,
    env: BTreeMap<String, String>,
    containers: BTreeMap<String, Place>,
}

pub fn run() -> ExitCode {
    match serve() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pantala-init: ssh: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve() -> io::Result<()> {
    // As in PID 1: nobody of the machine reads our memory, in which the host key and the app's environment are.
    nix::sys::prctl::set_dumpable(false)?;
    app::unblock_signals()?;
    // SAFETY: the contract of the two descriptors (`guest/door.rs`); nothing else in this process owns them.
    let (listener, document) = unsafe { (TcpListener::from_raw_fd(0), File::from_raw_fd(1)) };
    app::close_on_exec(&listener)?;
    app::close_on_exec(&document)?;
    let mut text = String::new();
    { document }.read_to_string(&mut text)?;
    let settings: Settings = serde_json::from_str(&text)?;
    let policy = Policy::read(&settings.ssh).map_err(io::Error::other)?;
    let host_key = PrivateKey::from_openssh(&settings.ssh.host_key).map_err(io::Error::other)?;
    let house = Arc::new(House {
        policy,
        env: settings.env,
        containers: settings.containers,
    });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(accept(listener, Arc::new(config(host_key)), house, QUIET))
}

fn config(host_key: PrivateKey) -> server::Config {
    server::Config {
        server_id: russh::SshId::Standard("SSH-2.0-Pantala".into()),
        methods: MethodSet::from(&[MethodKind::PublicKey][..]),
        auth_rejection_time: Duration::from_millis(300),
        auth_rejection_time_initial: Some(Duration::ZERO),
        keys: vec![host_key],
        max_auth_attempts: ATTEMPTS_MAX,
        inactivity_timeout: None,
        keepalive_interval: Some(KEEPALIVE),
        keepalive_max: 3,
        nodelay: true,
        ..server::Config::default()
    }
}

/// Until nobody was connected for `quiet`.
async fn accept(
    listener: TcpListener,
    config: Arc<server::Config>,
    house: Arc<House>,
    quiet: Duration,
) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let seats = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let waiting = tokio::time::timeout(quiet, listener.accept());
        let stream = match waiting.await {
            Ok(Ok((stream, _))) => stream,
            Ok(Err(_)) => {
                // Out of descriptors, or the client went away.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
            Err(_) if seats.available_permits() == CONNECTIONS_MAX => return Ok(()),
            Err(_) => continue,
        };
        match seats.clone().try_acquire_owned() {
            Ok(seat) => drop(tokio::spawn(converse(stream, config.clone(), house.clone(), seat))),
            Err(_) => drop(tokio::spawn(refuse(stream))),
        }
    }
}

/// A line before the version is what clients show.
async fn refuse(mut stream: TcpStream) {
    let line = format!("{CONNECTIONS_MAX} connections are open already\r\n");
    let _ = tokio::time::timeout(Duration::from_secs(2), stream.write_all(line.as_bytes())).await;
}

async fn converse(stream: TcpStream, config: Arc<server::Config>, house: Arc<House>, seat: OwnedSemaphorePermit) {
    let (login, logged_in) = Login::new(house);
    let begun = async {
        let session = server::run_stream(config, stream, login).await?;
        Ok::<_, russh::Error>(session)
    };
    let Ok(Ok(session)) = tokio::time::timeout(LOGIN_MAX, begun).await else {
        return;
    };
    let handle = session.handle();
    let mut session = Box::pin(session);
    let in_time = tokio::time::timeout(LOGIN_MAX, async {
        tokio::select! {
            _ = logged_in => true,
            _ = &mut session => false,
        }
    });
    match in_time.await {
        Ok(true) => drop(session.await), // its errors are the end of one connection
        Ok(false) => {}
        Err(_) => {
            let reason = "nobody logged in".to_owned();
            let _ = handle
                .disconnect(russh::Disconnect::ByApplication, reason, String::new())
                .await;
            let _ = tokio::time::timeout(Duration::from_secs(2), session).await;
        }
    }
    drop(seat);
}
