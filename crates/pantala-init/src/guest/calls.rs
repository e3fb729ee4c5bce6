//! The API socket (`/.fly/api`): what a machine may ask of the platform without a token. PID 1 only listens; each connection is handed as it
//! is to the agent, which knows by whose init it came which machine asks. While no agent is there, calls wait.

use std::fs;
use std::io::{self, ErrorKind, IoSlice};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags};
use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};

use super::peers::Peer;

#[derive(Default)]
pub struct Calls {
    listener: Option<UnixListener>,
    /// The connection that takes them; 0 before the first.
    pub taker: u64,
    /// One that was taken for a taker who was gone; it is the next one's.
    held: Option<UnixStream>,
}

impl Calls {
    /// Anybody in the machine may call.
    pub fn listen(&mut self, path: &Path) -> io::Result<()> {
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(path)?;
        fs::set_permissions(path, fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        self.listener = Some(listener);
        Ok(())
    }

    /// Nothing while nobody takes: what waits must not turn the loop.
    pub fn poll_fd(&self, peers: &[Peer]) -> Option<PollFd<'_>> {
        let listener = self.listener.as_ref()?;
        self.taker_among(peers)?;
        Some(PollFd::new(listener.as_fd(), PollFlags::POLLIN))
    }

    /// Give every waiting call to the taker, if it is still there.
    pub fn hand_over(&mut self, peers: &[Peer]) {
        let (Some(listener), Some(taker)) = (&self.listener, self.taker_among(peers)) else {
            return;
        };
        while let Some(call) = self.held.take().or_else(|| Some(listener.accept().ok()?.0)) {
            let descriptors = [call.as_raw_fd()];
            let rights = [ControlMessage::ScmRights(&descriptors)];
            let sent = sendmsg::<()>(
                taker.socket.as_raw_fd(),
                &[IoSlice::new(b"+")],
                &rights,
                MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL,
                None,
            );
            // What does not fit into the taker's buffer is closed: its caller sees an end and asks again.
            if sent.is_err_and(|errno| errno != Errno::EAGAIN) {
                self.held = Some(call);
                return;
            }
        }
    }

    fn taker_among<'a>(&self, peers: &'a [Peer]) -> Option<&'a Peer> {
        peers.iter().find(|peer| peer.id == self.taker)
    }
}
