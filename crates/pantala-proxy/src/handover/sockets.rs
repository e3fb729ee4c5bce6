//! Listening sockets by what they are for: those that came from the process before, and those that the next one gets.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    Public,
    /// transparent: every port, as the firewall leads it here
    Entry,
    Mesh,
    Admin,
    Api,
    DnsUdp,
    DnsTcp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Key {
    pub kind: Kind,
    pub address: SocketAddr,
}

/// A port shared by all worker threads has as many sockets under one key.
#[derive(Default)]
pub struct Sockets {
    passed: HashMap<Key, Vec<OwnedFd>>,
    kept: Vec<(Key, OwnedFd)>,
}

impl Sockets {
    pub fn passed(sockets: Vec<(Key, OwnedFd)>) -> Sockets {
        let mut passed: HashMap<Key, Vec<OwnedFd>> = HashMap::new();
        for (key, socket) in sockets {
            passed.entry(key).or_default().push(socket);
        }
        Sockets {
            passed,
            kept: Vec::new(),
        }
    }

    /// The one that was passed, or a new one.
    pub fn one<S>(&mut self, key: Key, bind: impl FnOnce() -> io::Result<S>) -> io::Result<S>
    where
        S: AsFd + From<OwnedFd>,
    {
        let socket = match self.passed.get_mut(&key).and_then(Vec::pop) {
            Some(passed) => passed.into(),
            None => bind()?,
        };
        self.keep(key, &socket)?;
        Ok(socket)
    }

    /// At least one for each of `workers`; more when more were passed, for what waits in their queues must be served.
    /// `probe` shows whether a port that was not passed is free.
    pub fn of_workers<S>(
        &mut self,
        key: Key,
        workers: usize,
        probe: impl FnOnce() -> io::Result<S>,
        bind: impl Fn() -> io::Result<S>,
    ) -> io::Result<Vec<Vec<S>>>
    where
        S: AsFd + From<OwnedFd>,
    {
        let passed = self.passed.remove(&key).unwrap_or_default();
        if passed.is_empty() {
            drop(probe()?);
        }
        let mut all: Vec<S> = passed.into_iter().map(S::from).collect();
        while all.len() < workers {
            all.push(bind()?);
        }
        let mut by_worker: Vec<Vec<S>> = (0..workers).map(|_| Vec::new()).collect();
        for (index, socket) in all.into_iter().enumerate() {
            self.keep(key, &socket)?;
            by_worker[index % workers].push(socket);
        }
        Ok(by_worker)
    }

    fn keep(&mut self, key: Key, socket: &impl AsFd) -> io::Result<()> {
        self.kept.push((key, socket.as_fd().try_clone_to_owned()?));
        Ok(())
    }

    /// For the next process. What was passed and has no place in the settings any more is closed here.
    pub fn into_kept(self) -> Vec<(Key, OwnedFd)> {
        self.kept
    }
}
