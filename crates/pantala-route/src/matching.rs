//! Whom a connection or request is for: the address first (dedicated ones belong to one app), then SNI or `Host`.

use std::net::IpAddr;
use std::sync::Arc;

use crate::snapshot::{App, Destination, Snapshot};

#[derive(Clone, Debug)]
pub enum Matched {
    App(Arc<App>),
    Backend(std::net::SocketAddr),
    /// the name is known, the app has no row, service or machine here yet
    Bare(Arc<str>),
    Unknown,
}

impl Snapshot {
    /// An exact name before a wildcard, which stands for one label.
    fn host(&self, name: &str) -> Option<&Destination> {
        self.hosts.get(name).or_else(|| {
            let (_, parent) = name.split_once('.')?;
            self.hosts.get(format!("*.{parent}").as_str())
        })
    }

    /// `host` as [`crate::names::normalise`] spells it.
    pub fn find(&self, local: IpAddr, host: Option<&str>) -> Matched {
        let local = local.to_canonical();
        let destination = match self.addresses.get(&local) {
            Some(address) => Some(Destination::App(address.app.clone())),
            None => host.and_then(|name| self.host(name)).cloned(),
        };
        match destination {
            None => Matched::Unknown,
            Some(Destination::Backend(backend)) => Matched::Backend(*backend),
            Some(Destination::App(name)) => match self.apps.get(&name) {
                Some(app) => Matched::App(app.clone()),
                None => Matched::Bare(name),
            },
        }
    }
}
