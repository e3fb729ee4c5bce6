//! The routing view that requests read: immutable, shared by all threads, replaced as a whole by [`crate::table`]. Its maps
//! share what a change leaves alone, so that a change costs the same among a hundred thousand apps as among ten.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use imbl::{HashMap, HashSet};
use pantala_wire::feed::{HTTPOptions, OrgRow, Port, ServiceRow, Static};

use crate::gauge::{Gauge, UNLIMITED};
use crate::intern::{Declared, Ports};

/// The states of `domain/machine.py`, grouped by what they mean for a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Phase {
    /// started
    Running,
    /// created, stopped, suspended: a request may wake it; the rank says which first
    Asleep(u8),
    /// starting: it will serve soon by itself
    Starting,
    /// updating, replacing, restarting, creating: the platform brings it back
    Changing,
    /// stopping, suspending: it will be asleep soon
    Ending,
    /// failed, destroyed, replaced, … or a word that this version does not know
    Gone,
}

impl Phase {
    pub fn of(state: &str) -> Phase {
        match state {
            "started" => Phase::Running,
            "suspended" => Phase::Asleep(0),
            "stopped" => Phase::Asleep(1),
            "created" => Phase::Asleep(2),
            "starting" => Phase::Starting,
            "updating" | "replacing" | "restarting" | "creating" => Phase::Changing,
            "stopping" | "suspending" => Phase::Ending,
            _ => Phase::Gone,
        }
    }
}

#[derive(Debug)]
pub struct Service {
    pub internal_port: u16,
    pub tcp: bool,
    pub autostart: bool,
    pub soft: u32,
    pub hard: u32,
    /// `type = "requests"`: upstream connections are kept; `connections`: one for each request
    pub pooled: bool,
    pub statics: Box<[Static]>,
    pub(crate) ports: Box<[Declared]>,
}

impl Service {
    pub(crate) fn new(row: ServiceRow, ports: &mut Ports) -> Service {
        let limits = row.concurrency;
        let hard = limits.hard_limit.filter(|n| *n > 0).unwrap_or(UNLIMITED).min(UNLIMITED);
        Service {
            internal_port: row.internal_port,
            tcp: row.protocol == "tcp",
            autostart: row.autostart,
            soft: limits.soft_limit.filter(|n| *n > 0).unwrap_or(20).min(hard),
            hard,
            pooled: limits.r#type.as_deref() == Some("requests"),
            statics: row.statics.into(),
            ports: row.ports.into_iter().map(|port| ports.get(port)).collect(),
        }
    }
}

#[derive(Clone, Debug)]
pub struct Machine {
    pub id: Arc<str>,
    pub app: Arc<str>,
    pub region: Arc<str>,
    pub node: Arc<str>,
    pub phase: Phase,
    /// none while it has no address yet
    pub ip4: Option<IpAddr>,
    pub cordoned: bool,
    /// in the private network; names there lead to it only with `dns`
    pub ip6: Option<Ipv6Addr>,
    pub dns: bool,
    pub group: Arc<str>,
    pub metadata: BTreeMap<String, String>,
    /// on the host of this proxy: only then can `ip4` be reached
    pub local: bool,
    /// the gauge's epoch when this view was made
    pub epoch: u32,
    pub gauge: Arc<Gauge>,
}

/// A machine as one service of it is reached.
#[derive(Clone, Debug)]
pub struct Target {
    pub machine: Arc<Machine>,
    pub service: Arc<Service>,
    pub passing: bool,
    /// the port wants HTTP/2 spoken to the app (`h2_backend`)
    pub h2: bool,
}

impl Target {
    pub fn socket(&self) -> Option<SocketAddr> {
        self.machine
            .ip4
            .map(|ip| SocketAddr::new(ip, self.service.internal_port))
    }
}

/// An external port (or range) of an app and the machines behind it.
#[derive(Debug)]
pub struct Offer {
    pub start: u16,
    pub end: u16,
    /// one for all that declare the same
    pub port: Arc<Port>,
    /// the port's: requests keep them
    pub http: Option<Arc<HTTPOptions>>,
    /// files of the app that are read from buckets, without a machine; none for nearly all
    pub buckets: Option<Arc<[Static]>>,
    /// by region, so that those of one stand together ([`crate::choose`] cuts them there), and by id within
    pub targets: Vec<Target>,
}

impl Offer {
    pub fn handles(&self, handler: &str) -> bool {
        let edge = |h: &String| h == handler || (handler == "http" && h == "edge_http");
        self.port.handlers.as_deref().unwrap_or_default().iter().any(edge)
    }

    pub fn target(&self, machine: &Machine) -> Option<&Target> {
        let order = |target: &Target| {
            let (other, id) = (&target.machine.region, &target.machine.id);
            other.cmp(&machine.region).then_with(|| id.cmp(&machine.id))
        };
        let at = self.targets.binary_search_by(order).ok()?;
        self.targets.get(at)
    }

    pub fn force_https(&self) -> bool {
        self.port.force_https == Some(true) && self.handles("http")
    }
}

#[derive(Debug)]
pub struct App {
    pub name: Arc<str>,
    /// the private network that it belongs to; none while only its machines are known
    pub network: Option<u64>,
    /// likewise
    pub org: Option<Arc<str>>,
    /// by id
    pub machines: Vec<Arc<Machine>>,
    pub offers: Vec<Offer>,
}

impl App {
    pub fn offer(&self, port: u16) -> Option<&Offer> {
        self.offer_index(port).map(|index| &self.offers[index])
    }

    /// An exact port before a range.
    pub fn offer_index(&self, port: u16) -> Option<usize> {
        let holds = |(_, o): &(usize, &Offer)| o.start <= port && port <= o.end;
        let offers = self.offers.iter().enumerate().filter(holds);
        offers.min_by_key(|(_, o)| o.end - o.start).map(|(index, _)| index)
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Destination {
    App(Arc<str>),
    /// boxed: there are few, and room is taken for the larger of both
    Backend(Box<SocketAddr>),
}

/// An address that belongs to one app alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address {
    pub app: Arc<str>,
    /// Flycast: for machines of `network` only, without one for those of the app's own
    pub private: bool,
    pub network: Option<u64>,
}

/// A host as its agent describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Node {
    pub region: String,
    /// where its proxy takes requests of other proxies
    pub mesh: Option<SocketAddr>,
}

#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    pub revision: u64,
    pub apps: HashMap<Arc<str>, Arc<App>>,
    pub hosts: HashMap<Arc<str>, Destination>,
    /// what orgs allow beyond the default
    pub orgs: HashMap<Arc<str>, OrgRow>,
    pub addresses: HashMap<IpAddr, Address>,
    pub nodes: HashMap<Arc<str>, Node>,
    /// hosts that belong to the cluster: control's word, without which a host's proxy is not spoken to
    pub members: HashSet<Arc<str>>,
    /// the other way round, public ones only: what the name of an app leads to
    pub own_addresses: HashMap<Arc<str>, Arc<[IpAddr]>>,
    /// answers to certificate authorities by token; empty while no certificate is ordered
    pub acme: Arc<BTreeMap<String, Arc<str>>>,
    /// TXT records of the platform's own names
    pub texts: Arc<BTreeMap<String, Vec<String>>>,
    pub set_aside: Vec<String>,
}

impl Snapshot {
    /// The address leads to this app from now on, or to none by itself.
    pub fn lead(&mut self, ip: IpAddr, to: Option<Address>) {
        let ip = ip.to_canonical();
        let public = |address: &Address| (!address.private).then(|| address.app.clone());
        let now = to.as_ref().and_then(public);
        let before = match to {
            Some(address) => self.addresses.insert(ip, address),
            None => self.addresses.remove(&ip),
        };
        let before = before.as_ref().and_then(public);
        if before == now {
            return;
        }
        if let Some(app) = before {
            let others = self.own_addresses.get(&app).into_iter().flat_map(|all| all.iter());
            let others: Arc<[IpAddr]> = others.copied().filter(|one| *one != ip).collect();
            match others.is_empty() {
                true => drop(self.own_addresses.remove(&app)),
                false => drop(self.own_addresses.insert(app, others)),
            }
        }
        if let Some(app) = now {
            let mut all: Vec<IpAddr> = self.own_addresses.get(&app).map_or_else(Vec::new, |all| all.to_vec());
            all.push(ip);
            all.sort_unstable();
            self.own_addresses.insert(app, all.into());
        }
    }
}
