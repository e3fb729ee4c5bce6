//! The new proxy's end: gets the sockets before it binds any, and serves once its view is there.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use tokio::runtime::Handle;

use super::counts::{self, Side};
use super::give;
use super::lending::Lender;
use super::message::{Message, receive, send};
use super::sockets::Sockets;
use crate::shared::{Life, Shared};
use crate::{log, notify};

const ANSWER_MAX: Duration = Duration::from_secs(10);

#[derive(Debug, thiserror::Error)]
pub enum TakeError {
    #[error("no proxy to replace at {path} ({source}); start this one without --replace")]
    Nobody { path: String, source: io::Error },
    #[error("the running proxy refuses to be replaced: {0}")]
    Refused(String),
    #[error("hand-over: {0}")]
    Socket(#[from] io::Error),
}

/// The running proxy, which goes on if this end closes.
pub struct Before(OwnedFd);

pub fn ask(state_dir: &Path) -> Result<(Sockets, Before), TakeError> {
    let path = super::path(state_dir);
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None);
    let socket = socket.map_err(io::Error::from)?;
    let address = SocketAddrUnix::new(&path).map_err(io::Error::from)?;
    connect(&socket, &address).map_err(|source| TakeError::Nobody {
        path: path.display().to_string(),
        source: source.into(),
    })?;
    let version = env!("CARGO_PKG_VERSION").to_owned();
    let pid = std::process::id();
    let lends = true;
    send(&socket, &Message::Ask { pid, version, lends })?;
    let mut sockets = Vec::new();
    loop {
        match answer(&socket)? {
            (Message::Sockets { keys }, beside) if keys.len() == beside.len() => {
                sockets.extend(keys.into_iter().zip(beside));
            }
            (Message::All, _) => break,
            (Message::Refused { why }, _) => return Err(TakeError::Refused(why)),
            (message, _) => return Err(out_of_turn(&message).into()),
        }
    }
    Ok((Sockets::passed(sockets), Before(socket)))
}

impl Before {
    /// On a thread that may wait. Once this returns both accept; the other one is about to stop. Places are lent to it by
    /// tasks of `runtime`.
    pub fn serve_instead(self, shared: &Arc<Shared>, runtime: Handle) -> io::Result<()> {
        send(&self.0, &Message::Ready)?;
        loop {
            match answer(&self.0)?.0 {
                Message::Counts { machines, last } => shared.beside.take(shared, Side::Older, machines, last),
                Message::Yours => break,
                message => return Err(out_of_turn(&message)),
            }
        }
        let serves = shared.life.send_if_modified(|life| {
            let arriving = *life == Life::Arriving;
            *life = if arriving { Life::Serving } else { *life };
            arriving
        });
        if !serves {
            return Err(io::Error::other("told to end before it served"));
        }
        if let Err(error) = give::open(shared) {
            log::warning("this proxy cannot be replaced", &[("reason", &error)]);
        }
        // Before the other one ends: whoever keeps both running must know by then that this is the main process.
        notify::serving()?;
        send(&self.0, &Message::Serving)?;
        let (shared, socket) = (shared.clone(), Arc::new(self.0));
        shared.metrics.lending.fetch_add(1, Relaxed);
        let hearing = thread::Builder::new().name("handover".to_owned());
        hearing.spawn(move || {
            let (voice, words) = mpsc::channel();
            let lender = Lender::new(shared.clone(), runtime, voice);
            let exchanged = counts::exchange(&shared, Side::Older, socket, words, |message| match message {
                Message::Want { id, want } => lender.want(id, want),
                Message::Done { id } => lender.done(id),
                other => log::warning("said out of turn", &[("message", &format!("{other:?}"))]),
            });
            lender.end();
            shared.metrics.lending.fetch_sub(1, Relaxed);
            if let Err(error) = exchanged {
                log::warning("counts not exchanged", &[("reason", &error)]);
            }
        })?;
        Ok(())
    }
}

fn answer(socket: &OwnedFd) -> io::Result<(Message, Vec<OwnedFd>)> {
    receive(socket, Some(ANSWER_MAX))?.ok_or_else(|| io::Error::other("the running proxy ended"))
}

fn out_of_turn(message: &Message) -> io::Error {
    io::Error::other(format!("the running proxy said {message:?} out of turn"))
}
