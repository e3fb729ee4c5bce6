//! Where one may log in: PID 1 holds the listening socket, and begins `pantala-init ssh` (`crate::ssh`) when somebody
//! knocks. It ends when nobody was there for a while, so that a machine that nobody logs into pays for a socket only, and
//! what a visitor sends is read by another process than PID 1.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::net::{SocketAddr, TcpListener};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::memfd::{MFdFlags, memfd_create};
use pantala_wire::guest::Ssh;

use super::crew::Crew;
use crate::ssh::{Place, Settings};

/// After a server that failed.
const PAUSE: Duration = Duration::from_secs(2);

pub struct Door {
    ssh: Ssh,
    listener: TcpListener,
    server: Option<i32>,
    again_at: Option<Instant>,
}

impl Door {
    pub fn open(ssh: Ssh) -> io::Result<Self> {
        let address: SocketAddr = ssh
            .listen
            .parse()
            .map_err(|_| io::Error::other(format!("{} is no address", ssh.listen)))?;
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        Ok(Door {
            ssh,
            listener,
            server: None,
            again_at: None,
        })
    }

    /// Watched only while no server is there to accept.
    pub fn poll_fd(&self) -> Option<PollFd<'_>> {
        let watched = self.server.is_none() && self.again_at.is_none();
        watched.then(|| PollFd::new(self.listener.as_fd(), PollFlags::POLLIN))
    }

    pub fn wakes_at(&self) -> Option<Instant> {
        self.again_at
    }

    /// Begin the server if somebody knocks.
    pub fn answer(&mut self, app_env: &BTreeMap<String, String>, crew: Option<&Crew>) {
        if self.again_at.is_some_and(|at| Instant::now() >= at) {
            self.again_at = None;
        }
        let Some(fd) = self.poll_fd() else { return };
        if !poll(&mut [fd], PollTimeout::ZERO).is_ok_and(|ready| ready > 0) {
            return;
        }
        match self.begin(app_env, crew) {
            Ok(pid) => self.server = Some(pid),
            Err(_) => self.again_at = Some(Instant::now() + PAUSE), // no memory or processes: the next look may fare better
        }
    }

    /// A process of the machine ended.
    pub fn ended(&mut self, pid: i32, exit_code: i32) {
        if self.server == Some(pid) {
            self.server = None;
            self.again_at = (exit_code != 0).then(|| Instant::now() + PAUSE);
        }
    }

    /// Its input is the listening socket, its output the settings: neither arguments nor environment, which others see.
    fn begin(&self, app_env: &BTreeMap<String, String>, crew: Option<&Crew>) -> io::Result<i32> {
        let containers = crew.into_iter().flat_map(Crew::specs).map(|spec| {
            let place = Place {
                root: spec.root.clone(),
                env: spec.env.clone(),
            };
            (spec.name.clone(), place)
        });
        let settings = Settings {
            ssh: self.ssh.clone(),
            env: app_env.clone(),
            containers: containers.collect(),
        };
        let mut document = File::from(memfd_create("ssh", MFdFlags::MFD_CLOEXEC)?);
        document.write_all(&serde_json::to_vec(&settings)?)?;
        document.rewind()?;
        let mut command = Command::new("/proc/self/exe");
        command
            .arg("ssh")
            .env_clear()
            .stdin(Stdio::from(OwnedFd::from(self.listener.try_clone()?)))
            .stdout(Stdio::from(document))
            .stderr(Stdio::null());
        Ok(i32::try_from(command.spawn()?.id()).unwrap_or(i32::MAX))
    }
}
