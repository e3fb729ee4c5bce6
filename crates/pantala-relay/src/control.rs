//! Questions to the relay on a unix socket: a word in (`stats`, `reload`), a line of JSON out.

use std::io::{Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

/// Whoever connects has its word ready; packets must not wait for one who has not.
const PATIENCE: Duration = Duration::from_millis(5);

pub enum Command {
    Stats,
    Reload,
    Unknown,
}

pub struct Control {
    listener: UnixListener,
}

impl AsFd for Control {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.listener.as_fd()
    }
}

impl Control {
    pub fn listen(path: &Path) -> std::io::Result<Control> {
        match std::fs::remove_file(path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => {} // that of a relay that was killed; the queue has made sure that none runs
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        listener.set_nonblocking(true)?;
        Ok(Control { listener })
    }

    pub fn accept(&self) -> Option<Asked> {
        let (stream, _) = self.listener.accept().ok()?;
        stream.set_nonblocking(false).ok()?;
        stream.set_read_timeout(Some(PATIENCE)).ok()?;
        stream.set_write_timeout(Some(PATIENCE)).ok()?;
        Some(Asked { stream })
    }
}

pub struct Asked {
    stream: UnixStream,
}

impl Asked {
    pub fn command(&mut self) -> Command {
        let mut word = [0; 16];
        let length = self.stream.read(&mut word).unwrap_or(0);
        match word[..length].trim_ascii() {
            b"stats" => Command::Stats,
            b"reload" => Command::Reload,
            _ => Command::Unknown,
        }
    }

    /// One who does not listen any more loses only its answer.
    pub fn answer(&mut self, value: &serde_json::Value) {
        let _ = self.stream.write_all(format!("{value}\n").as_bytes());
    }
}
