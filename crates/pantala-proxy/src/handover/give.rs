//! The running proxy's end: listens for the one that is to replace it, and goes on as if nothing had happened until that
//! one says that it serves.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::SeqCst;
use std::sync::mpsc::{self, Sender};
use std::thread;
use std::time::Duration;

use pantala_route::turn::Reason;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with};

use super::asking;
use super::counts::{self, Side};
use super::message::{Message, SOCKETS_MAX, receive, send, send_with};
use crate::log;
use crate::shared::{Life, Shared};

const ASK_MAX: Duration = Duration::from_secs(2);
/// For the new one to read its view and to hear from the agent.
const READY_MAX: Duration = Duration::from_secs(60);
const SERVING_MAX: Duration = Duration::from_secs(5);
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Takes the path over, from a process that is gone or from the one that was just replaced.
pub fn open(shared: &Arc<Shared>) -> io::Result<()> {
    let path = super::path(Path::new(&shared.settings.wire.state_dir));
    let new = path.with_extension("new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    bind(&listener, &SocketAddrUnix::new(&new)?)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    listen(&listener, 8)?;
    fs::rename(&new, &path)?;
    let shared = shared.clone();
    // Ends with the process: it is never in the middle of something that must be finished.
    thread::Builder::new()
        .name("handover".to_owned())
        .spawn(move || accept(&shared, &listener))?;
    Ok(())
}

fn accept(shared: &Arc<Shared>, listener: &OwnedFd) {
    while *shared.life.borrow() < Life::Ending {
        let Ok(socket) = accept_with(listener, SocketFlags::CLOEXEC) else {
            thread::sleep(ACCEPT_PAUSE);
            continue;
        };
        let shared = shared.clone();
        let serving = thread::Builder::new().name("handover".to_owned());
        if let Err(error) = serving.spawn(move || serve(&shared, socket)) {
            log::warning("hand-over not begun", &[("reason", &error)]);
        }
    }
}

/// Whoever only looks who is here says nothing.
fn serve(shared: &Arc<Shared>, socket: OwnedFd) {
    let Ok(Some((Message::Ask { pid, version, lends }, _))) = receive(&socket, Some(ASK_MAX)) else {
        return;
    };
    let why = if shared.leaving() {
        Some("this proxy is leaving already")
    } else if shared.handing_over.swap(true, SeqCst) {
        Some("another process is being started to replace this proxy; wait until it serves or has failed")
    } else {
        None
    };
    if let Some(why) = why {
        let _ = send(&socket, &Message::Refused { why: why.to_owned() });
        return;
    }
    log::info("replacement begins", &[("pid", &pid), ("version", &version)]);
    let (voice, words) = mpsc::channel();
    match hand_over(shared, &socket, lends.then(|| voice.clone())) {
        Ok(()) => {
            log::info("replaced", &[("pid", &pid)]);
            shared.handed_over.send_replace(true);
            let exchanged = counts::exchange(shared, Side::Newer, Arc::new(socket), words, |message| {
                hear(shared, message)
            });
            if let Err(error) = exchanged {
                log::warning("counts not exchanged", &[("reason", &error)]);
            }
            asking::end(shared);
        }
        Err(error) => {
            asking::end(shared);
            log::warning(
                "replacement failed; this proxy goes on",
                &[("pid", &pid), ("reason", &error)],
            );
            shared.handing_over.store(false, SeqCst);
        }
    }
    drop(voice);
}

fn hear(shared: &Shared, message: Message) {
    match message {
        Message::Lent { id, machine } => shared.asking.lent(id, machine),
        Message::Denied {
            id,
            reason,
            happened,
            in_flight,
        } => shared.asking.denied(id, Reason::of(&reason), happened, in_flight),
        other => log::warning("said out of turn", &[("message", &format!("{other:?}"))]),
    }
}

/// `voice`: to ask by, if the new one lends.
fn hand_over(shared: &Shared, socket: &OwnedFd, voice: Option<Sender<Message>>) -> io::Result<()> {
    {
        let listening = shared.listening();
        for chunk in listening.chunks(SOCKETS_MAX) {
            let keys = chunk.iter().map(|(key, _)| *key).collect();
            let beside: Vec<_> = chunk.iter().map(|(_, socket)| socket).collect();
            send_with(socket, &Message::Sockets { keys }, &beside)?;
        }
    }
    send(socket, &Message::All)?;
    expect(socket, READY_MAX, |message| matches!(message, Message::Ready))?;
    if let Some(voice) = voice {
        asking::begin(shared, voice);
    }
    counts::tell(socket, &counts::share(shared, Side::Newer))?;
    send(socket, &Message::Yours)?;
    expect(socket, SERVING_MAX, |message| matches!(message, Message::Serving))
}

fn expect(socket: &OwnedFd, within: Duration, wanted: impl Fn(&Message) -> bool) -> io::Result<()> {
    match receive(socket, Some(within))? {
        Some((message, _)) if wanted(&message) => Ok(()),
        Some((message, _)) => Err(io::Error::other(format!("it said {message:?} out of turn"))),
        None => Err(io::Error::other("it ended before it served")),
    }
}
