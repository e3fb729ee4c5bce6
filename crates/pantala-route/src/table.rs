//! Rows become a [`Snapshot`]. The one writer is the proxy's control thread; each change rebuilds the apps it touches and
//! shares the rest. A row that cannot be read is set aside: it stops nobody, and a readable older value stays in force.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;
use pantala_wire::feed::{
    AcmeRow, AddressKind, AddressRow, AppRow, CertRow, FeedRow, HostRow, MachineRow, MemberRow, NodeRow, OrgRow, Port,
    ServiceRow, TextRow, TicketRow,
};
use serde::de::DeserializeOwned;

use crate::gauge::Gauge;
use crate::names::normalise;
use crate::snapshot::{Address, App, Destination, Machine, Node, Offer, Phase, Service, Snapshot, Target};

/// `(stream, key)`
pub type RowKey = (String, String);

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("{0}")]
pub struct Unreadable(String);

fn unreadable(why: impl std::fmt::Display) -> Unreadable {
    Unreadable(why.to_string())
}

/// What a batch of rows changed beside the snapshot.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Changes {
    pub certs: bool,
    pub tickets: bool,
    /// gauges whose drain ended because the machine's row moved on
    pub undrained: Vec<String>,
}

struct MachineEntry {
    row: MachineRow,
    gauge: Arc<Gauge>,
    epoch: u32,
}

#[derive(Default)]
struct AppEntry {
    known: bool,
    network: Option<u64>,
    org: Option<Arc<str>>,
    services: BTreeMap<String, Arc<Service>>,
    /// boxed: the leaves of the map are allocated for many, and most apps have few
    machines: BTreeMap<String, Box<MachineEntry>>,
}

pub struct Table {
    node: String,
    revision: u64,
    /// every row in force, as it came: for the snapshot file, which is written beside the work that goes on
    rows: OrdMap<RowKey, Arc<str>>,
    set_aside: BTreeMap<RowKey, String>,
    /// values that are not read again (key, value): suspected of two crashes
    quarantine: BTreeSet<(RowKey, Arc<str>)>,
    apps: BTreeMap<String, AppEntry>,
    app_of_machine: HashMap<String, String>,
    certs: BTreeMap<String, Arc<CertRow>>,
    tickets: BTreeMap<String, TicketRow>,
    snapshot: Snapshot,
}

impl Table {
    pub fn new(node: &str) -> Table {
        Table {
            node: node.to_owned(),
            revision: 0,
            rows: OrdMap::new(),
            set_aside: BTreeMap::new(),
            quarantine: BTreeSet::new(),
            apps: BTreeMap::new(),
            app_of_machine: HashMap::new(),
            certs: BTreeMap::new(),
            tickets: BTreeMap::new(),
            snapshot: Snapshot::default(),
        }
    }

    pub fn snapshot(&self) -> Snapshot {
        self.snapshot.clone()
    }

    /// A row that did not change keeps its pointer.
    pub fn certs(&self) -> impl Iterator<Item = (&String, &Arc<CertRow>)> {
        self.certs.iter()
    }

    pub fn tickets(&self) -> impl Iterator<Item = (&String, &TicketRow)> {
        self.tickets.iter()
    }

    /// A copy that shares what it can: as cheap for a hundred thousand rows as for one.
    pub fn rows(&self) -> OrdMap<RowKey, Arc<str>> {
        self.rows.clone()
    }

    pub fn revision(&self) -> u64 {
        self.revision
    }

    /// Keys of rows that are not in force as they came, with the reason.
    pub fn set_aside(&self) -> impl Iterator<Item = (&str, &str)> {
        self.set_aside
            .iter()
            .map(|((_, key), why)| (key.as_str(), why.as_str()))
    }

    /// A row read well here that its user could not use (a certificate whose key does not parse).
    pub fn mark_set_aside(&mut self, stream: &str, key: &str, why: &str) {
        self.set_aside
            .insert((stream.to_owned(), key.to_owned()), why.to_owned());
        self.publish_set_aside();
    }

    pub fn quarantine(&mut self, key: RowKey, value: Arc<str>) {
        self.quarantine.insert((key, value));
    }

    /// A whole view: what it does not name is gone.
    pub fn replace(&mut self, revision: u64, rows: Vec<FeedRow>) -> Changes {
        let named: BTreeSet<RowKey> = rows.iter().map(|r| (r.stream.clone(), r.key.clone())).collect();
        let known = self.rows.keys().chain(self.set_aside.keys());
        let gone: Vec<RowKey> = known.filter(|key| !named.contains(*key)).cloned().collect();
        let deletions = gone.into_iter().map(|(stream, key)| FeedRow {
            stream,
            key,
            value: None,
        });
        self.apply(revision, deletions.chain(rows).collect())
    }

    pub fn apply(&mut self, revision: u64, rows: Vec<FeedRow>) -> Changes {
        let mut batch = Batch::default();
        for row in rows {
            self.apply_row(row, &mut batch);
        }
        for app in std::mem::take(&mut batch.apps) {
            self.rebuild(&app);
        }
        if batch.addresses {
            self.snapshot.own_addresses = Arc::new(own_addresses(&self.snapshot));
        }
        self.revision = revision;
        self.snapshot.revision = revision;
        self.publish_set_aside();
        batch.changes
    }

    /// The agent said that the machine is ready at `ip4`; its row says so a moment later.
    pub fn woken(&mut self, machine: &str, ip4: &str) {
        let Some(app) = self.app_of_machine.get(machine).cloned() else {
            return;
        };
        let Some(entry) = self.apps.get_mut(&app).and_then(|a| a.machines.get_mut(machine)) else {
            return;
        };
        if entry.row.state != "started" || entry.row.ip4 != ip4 {
            entry.epoch = entry.gauge.next_epoch();
        }
        entry.row.state = "started".to_owned();
        entry.row.ip4 = ip4.to_owned();
        entry.row.passing = vec![true; entry.row.services.len()];
        entry.gauge.undrain();
        self.rebuild(&app);
    }

    /// Gauge of a machine, for frames that name only its id.
    pub fn gauge(&self, machine: &str) -> Option<&Arc<Gauge>> {
        let app = self.app_of_machine.get(machine)?;
        self.apps.get(app)?.machines.get(machine).map(|entry| &entry.gauge)
    }

    fn apply_row(&mut self, row: FeedRow, batch: &mut Batch) {
        let key = (row.stream, row.key);
        let Some(value) = row.value else {
            self.rows.remove(&key);
            self.set_aside.remove(&key);
            return self.delete(&key, batch);
        };
        let text: Arc<str> = value.as_str().into();
        if self.rows.get(&key) == Some(&text) && !matches!(key.1.split_once('/'), Some(("m", _))) {
            self.set_aside.remove(&key); // the same again; machines are read anyway, because a wake may have overlaid them
            return;
        }
        let verdict = if self.quarantine.contains(&(key.clone(), text.clone())) {
            Err(unreadable("set aside after two crashes"))
        } else {
            self.read(&key, &text, batch)
        };
        match verdict {
            Ok(()) => {
                self.set_aside.remove(&key);
                self.rows.insert(key, text);
            }
            Err(why) => {
                self.set_aside.insert(key, why.to_string());
            }
        }
    }

    fn read(&mut self, (stream, key): &RowKey, value: &str, batch: &mut Batch) -> Result<(), Unreadable> {
        match (stream.as_str(), key.split_once('/')) {
            ("routes", Some(("app", name))) => {
                let row: AppRow = parse(value)?;
                same("app", &row.app, name)?;
                let app = self.apps.entry(name.to_owned()).or_default();
                (app.known, app.network, app.org) = (true, Some(row.network), Some(row.org.into()));
                batch.apps.insert(name.to_owned());
            }
            ("routes", Some(("org", slug))) => {
                let row: OrgRow = parse(value)?;
                self.snapshot.orgs.insert(slug.into(), row);
            }
            ("routes", Some(("host", name))) => {
                let destination = host_destination(&parse(value)?)?;
                let name = host_key(name).ok_or_else(|| unreadable("the key is no host name"))?;
                self.snapshot.hosts.insert(name, destination);
            }
            ("routes", Some(("acme", token))) => {
                let row: AcmeRow = parse(value)?;
                Arc::make_mut(&mut self.snapshot.acme).insert(token.to_owned(), row.authorization.into());
            }
            ("routes", Some(("txt", name))) => {
                let row: TextRow = parse(value)?;
                let name = normalise(name).ok_or_else(|| unreadable("the key is no DNS name"))?;
                Arc::make_mut(&mut self.snapshot.texts).insert(name, row.values);
            }
            ("routes", Some(("addr", ip))) => {
                let row: AddressRow = parse(value)?;
                let ip: IpAddr = ip.parse().map_err(|_| unreadable("the key is no IP address"))?;
                batch.addresses = true;
                let addresses = &mut self.snapshot.addresses;
                match (row.kind, row.app) {
                    (AddressKind::Shared, _) => drop(addresses.remove(&ip.to_canonical())),
                    (kind, Some(app)) => {
                        let address = Address {
                            app: app.into(),
                            private: kind == AddressKind::Private,
                            network: row.network,
                        };
                        addresses.insert(ip.to_canonical(), address);
                    }
                    (_, None) => return Err(unreadable("app: a dedicated or private address names its app")),
                }
            }
            ("routes", Some(("svc", rest))) => {
                let row: ServiceRow = parse(value)?;
                let (app, digest) = rest
                    .split_once('/')
                    .ok_or_else(|| unreadable("the key has no digest"))?;
                same("app", &row.app, app)?;
                check_ports(&row.ports)?;
                let service = Arc::new(Service::new(row));
                self.apps
                    .entry(app.to_owned())
                    .or_default()
                    .services
                    .insert(digest.to_owned(), service);
                batch.apps.insert(app.to_owned());
            }
            ("routes", Some(("m", id))) => self.read_machine(id, parse(value)?, batch)?,
            ("nodes", Some(("node", id))) => {
                let row: NodeRow = parse(value)?;
                same("id", &row.id, id)?;
                let node = Node {
                    mesh: mesh_address(&row.mesh)?,
                    region: row.region,
                };
                self.snapshot.nodes.insert(id.into(), node);
            }
            ("nodes", Some(("member", id))) => {
                same("id", &parse::<MemberRow>(value)?.id, id)?;
                self.snapshot.members.insert(id.into());
            }
            ("certs", Some(("cert", _))) => {
                let row: CertRow = parse(value)?;
                if row.names.is_empty() {
                    return Err(unreadable("names: a certificate needs one"));
                }
                self.certs.insert(key.clone(), Arc::new(row));
                batch.changes.certs = true;
            }
            ("certs", Some(("ticket", _))) => {
                self.tickets.insert(key.clone(), parse(value)?);
                batch.changes.tickets = true;
            }
            _ => {} // a row of a later version: kept, not used
        }
        Ok(())
    }

    fn read_machine(&mut self, id: &str, row: MachineRow, batch: &mut Batch) -> Result<(), Unreadable> {
        same("id", &row.id, id)?;
        if !row.ip4.is_empty() {
            row.ip4
                .parse::<IpAddr>()
                .map_err(|_| unreadable(format!("ip4: {:?} is no IP address", row.ip4)))?;
        }
        if row.passing.len() != row.services.len() {
            return Err(unreadable("passing: needs one flag for each service"));
        }
        let moved = self.app_of_machine.get(id).filter(|app| **app != row.app).cloned();
        let mut kept = moved.and_then(|app| {
            let entry = self.apps.get_mut(&app)?.machines.remove(id);
            batch.apps.insert(app);
            entry.map(|entry| entry.gauge)
        });
        let app = self.apps.entry(row.app.clone()).or_default();
        batch.apps.insert(row.app.clone());
        self.app_of_machine.insert(id.to_owned(), row.app.clone());
        match app.machines.get_mut(id) {
            None => {
                let gauge = kept.take().unwrap_or_default();
                let epoch = gauge.next_epoch();
                app.machines
                    .insert(id.to_owned(), Box::new(MachineEntry { row, gauge, epoch }));
            }
            Some(entry) => {
                let another = entry.row.instance_id != row.instance_id || entry.row.ip4 != row.ip4;
                let left = row.state != "started" && entry.row.state == "started";
                if another || left {
                    entry.epoch = entry.gauge.next_epoch();
                }
                if (another || row.state != "started") && entry.gauge.read().draining {
                    entry.gauge.undrain();
                    batch.changes.undrained.push(id.to_owned());
                }
                entry.row = row;
            }
        }
        Ok(())
    }

    fn delete(&mut self, (stream, key): &RowKey, batch: &mut Batch) {
        match (stream.as_str(), key.split_once('/')) {
            ("routes", Some(("app", name))) => {
                if let Some(app) = self.apps.get_mut(name) {
                    (app.known, app.network, app.org) = (false, None, None);
                    batch.apps.insert(name.to_owned());
                }
            }
            ("routes", Some(("org", slug))) => drop(self.snapshot.orgs.remove(slug)),
            ("routes", Some(("host", name))) => {
                if let Some(name) = host_key(name) {
                    self.snapshot.hosts.remove(&name);
                }
            }
            ("routes", Some(("acme", token))) => drop(Arc::make_mut(&mut self.snapshot.acme).remove(token)),
            ("routes", Some(("txt", name))) => {
                if let Some(name) = normalise(name) {
                    Arc::make_mut(&mut self.snapshot.texts).remove(&name);
                }
            }
            ("routes", Some(("addr", ip))) => {
                batch.addresses = true;
                if let Ok(ip) = ip.parse::<IpAddr>() {
                    self.snapshot.addresses.remove(&ip.to_canonical());
                }
            }
            ("routes", Some(("svc", rest))) => {
                if let Some((app, digest)) = rest.split_once('/')
                    && let Some(entry) = self.apps.get_mut(app)
                {
                    entry.services.remove(digest);
                    batch.apps.insert(app.to_owned());
                }
            }
            ("routes", Some(("m", id))) => {
                if let Some(app) = self.app_of_machine.remove(id) {
                    if let Some(entry) = self.apps.get_mut(&app).and_then(|a| a.machines.remove(id)) {
                        entry.gauge.next_epoch();
                        entry.gauge.undrain();
                        batch.changes.undrained.push(id.to_owned());
                    }
                    batch.apps.insert(app);
                }
            }
            ("nodes", Some(("node", id))) => drop(self.snapshot.nodes.remove(id)),
            ("nodes", Some(("member", id))) => drop(self.snapshot.members.remove(id)),
            ("certs", Some(("ticket", _))) => batch.changes.tickets |= self.tickets.remove(key).is_some(),
            ("certs", _) => batch.changes.certs |= self.certs.remove(key).is_some(),
            _ => {}
        }
    }

    fn rebuild(&mut self, name: &str) {
        let apps = &mut self.snapshot.apps;
        let Some(entry) = self.apps.get(name) else { return };
        if !entry.known && entry.services.is_empty() && entry.machines.is_empty() {
            self.apps.remove(name);
            apps.remove(name);
            return;
        }
        let app = build_app(name, entry, &self.node);
        apps.insert(app.name.clone(), Arc::new(app));
    }

    fn publish_set_aside(&mut self) {
        self.snapshot.set_aside = self.set_aside.keys().map(|(_, key)| key.clone()).collect();
    }
}

#[derive(Default)]
struct Batch {
    apps: BTreeSet<String>,
    addresses: bool,
    changes: Changes,
}

fn own_addresses(snapshot: &Snapshot) -> BTreeMap<Arc<str>, Vec<IpAddr>> {
    let mut own: BTreeMap<Arc<str>, Vec<IpAddr>> = BTreeMap::new();
    for (ip, address) in snapshot.addresses.iter().filter(|(_, address)| !address.private) {
        own.entry(address.app.clone()).or_default().push(*ip);
    }
    own.values_mut().for_each(|all| all.sort_unstable());
    own
}

fn build_app(name: &str, entry: &AppEntry, node: &str) -> App {
    let name: Arc<str> = name.into();
    let mut app = App {
        name: name.clone(),
        network: entry.network,
        org: entry.org.clone(),
        machines: Vec::new(),
        offers: Vec::new(),
    };
    let mut offers: BTreeMap<(u16, u16), Offer> = BTreeMap::new();
    for (id, machine) in &entry.machines {
        let MachineEntry { row, gauge, epoch } = &**machine;
        let machine = Arc::new(Machine {
            id: id.as_str().into(),
            app: name.clone(),
            region: row.region.clone(),
            node: row.node.as_str().into(),
            instance_id: row.instance_id.clone(),
            state: row.state.clone(),
            phase: Phase::of(&row.state),
            ip4: row.ip4.parse().ok(),
            cordoned: row.cordoned,
            ip6: row.ip6.parse().ok(),
            dns: row.dns,
            group: row.group.clone(),
            metadata: row.metadata.clone(),
            local: row.node == node,
            epoch: *epoch,
            gauge: gauge.clone(),
        });
        for (digest, passing) in row.services.iter().zip(&row.passing) {
            let Some(service) = entry.services.get(digest).filter(|s| s.row.protocol == "tcp") else {
                continue;
            };
            for port in &service.row.ports {
                let Some((start, end)) = range(port) else { continue };
                let offer = offers.entry((start, end));
                let offer = offer.or_insert_with(|| Offer {
                    start,
                    end,
                    port: port.clone(),
                    http: port.http_options.clone().map(Arc::new),
                    targets: Vec::new(),
                });
                if offer.targets.last().is_none_or(|last| last.machine.id != machine.id) {
                    let target = Target {
                        machine: machine.clone(),
                        service: service.clone(),
                        passing: *passing,
                        h2: port.http_options.as_ref().and_then(|o| o.h2_backend) == Some(true),
                    };
                    offer.targets.push(target);
                }
            }
        }
        app.machines.push(machine);
    }
    app.offers = offers.into_values().collect();
    for offer in &mut app.offers {
        offer
            .targets
            .sort_by(|a, b| (&a.machine.region, &a.machine.id).cmp(&(&b.machine.region, &b.machine.id)));
    }
    app
}

fn range(port: &Port) -> Option<(u16, u16)> {
    match (port.port, port.start_port, port.end_port) {
        (Some(one), _, _) => Some((one, one)),
        (None, Some(start), end) => Some((start, end.unwrap_or(start))),
        _ => None,
    }
}

fn check_ports(ports: &[Port]) -> Result<(), Unreadable> {
    for port in ports {
        match range(port) {
            Some((start, end)) if start > 0 && start <= end => {}
            Some((start, end)) => return Err(unreadable(format!("ports: {start}-{end} is no range of ports"))),
            None => return Err(unreadable("ports: each needs port, or start_port and end_port")),
        }
    }
    Ok(())
}

fn mesh_address(mesh: &str) -> Result<Option<SocketAddr>, Unreadable> {
    if mesh.is_empty() {
        return Ok(None);
    }
    let address = mesh.parse();
    address
        .map(Some)
        .map_err(|_| unreadable("mesh: not of the form ip:port"))
}

/// `*.parent` is kept as it is written: [`Snapshot::find`] asks for it when there is no exact name.
fn host_key(name: &str) -> Option<String> {
    match name.strip_prefix("*.") {
        Some(parent) => normalise(parent).map(|parent| format!("*.{parent}")),
        None => normalise(name),
    }
}

fn host_destination(row: &HostRow) -> Result<Destination, Unreadable> {
    match (&row.app, &row.backend) {
        (None, Some(backend)) => {
            let backend: SocketAddr = backend
                .parse()
                .map_err(|_| unreadable("backend: not of the form ip:port"))?;
            Ok(Destination::Backend(backend))
        }
        (Some(app), None) => Ok(Destination::App(app.as_str().into())),
        _ => Err(unreadable("a host names either app or backend")),
    }
}

fn parse<T: DeserializeOwned>(value: &str) -> Result<T, Unreadable> {
    // The error of serde quotes values; certificates carry keys, so only where it happened is told.
    serde_json::from_str(value).map_err(|e| unreadable(redact(&e.to_string())))
}

fn redact(message: &str) -> String {
    message
        .split(": string")
        .next()
        .unwrap_or_default()
        .chars()
        .take(120)
        .collect()
}

fn same(field: &str, value: &str, key: &str) -> Result<(), Unreadable> {
    if value == key {
        Ok(())
    } else {
        Err(unreadable(format!("{field}: {value:?} is not {key:?} of the key")))
    }
}
