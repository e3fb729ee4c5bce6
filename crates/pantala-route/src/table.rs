//! Rows become a [`Snapshot`]. The one writer is the proxy's control thread; each change rebuilds the apps it touches and
//! shares the rest. A row that cannot be read is set aside: it stops nobody, and a readable older value stays in force.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use imbl::OrdMap;
use pantala_wire::feed::{
    AcmeRow, AddressKind, AddressRow, AppRow, CertRow, FeedRow, HostRow, MachineRow, MemberRow, NodeRow, OrgRow, Port,
    ServiceRow, TextRow, TicketRow,
};
use serde::de::DeserializeOwned;

use crate::assemble::{AppEntry, MachineEntry, range};
use crate::gauge::Gauge;
use crate::intern::{Ports, Strings};
use crate::names::normalise;
use crate::snapshot::{Address, Destination, Node, Phase, Service, Snapshot};

/// `(stream, key)`
pub type RowKey = (Arc<str>, Arc<str>);

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

pub struct Table {
    node: String,
    revision: u64,
    /// every row in force, as it came: for the snapshot file, which is written beside the work that goes on
    rows: OrdMap<RowKey, Arc<str>>,
    set_aside: BTreeMap<RowKey, String>,
    /// values that are not read again (key, value): suspected of two crashes
    quarantine: BTreeSet<(RowKey, Arc<str>)>,
    apps: BTreeMap<Arc<str>, AppEntry>,
    app_of_machine: HashMap<Arc<str>, Arc<str>>,
    strings: Strings,
    ports: Ports,
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
            strings: Strings::default(),
            ports: Ports::default(),
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
        self.set_aside.iter().map(|((_, key), why)| (&**key, why.as_str()))
    }

    /// A row read well here that its user could not use (a certificate whose key does not parse).
    pub fn mark_set_aside(&mut self, stream: &str, key: &str, why: &str) {
        self.set_aside.insert((stream.into(), key.into()), why.to_owned());
        self.publish_set_aside();
    }

    pub fn quarantine(&mut self, key: RowKey, value: Arc<str>) {
        self.quarantine.insert((key, value));
    }

    /// A whole view: what it does not name is gone.
    pub fn replace(&mut self, revision: u64, rows: Vec<FeedRow>) -> Changes {
        let named: HashSet<(&str, &str)> = rows.iter().map(|r| (r.stream.as_str(), r.key.as_str())).collect();
        let known = self.rows.keys().chain(self.set_aside.keys());
        let gone = known.filter(|(stream, key)| !named.contains(&(&**stream, &**key)));
        let deletions: Vec<FeedRow> = gone
            .map(|(stream, key)| FeedRow {
                stream: stream.to_string(),
                key: key.to_string(),
                value: None,
            })
            .collect();
        drop(named);
        self.apply_all(revision, deletions.into_iter().chain(rows))
    }

    pub fn apply(&mut self, revision: u64, rows: Vec<FeedRow>) -> Changes {
        self.apply_all(revision, rows.into_iter())
    }

    fn apply_all(&mut self, revision: u64, rows: impl Iterator<Item = FeedRow>) -> Changes {
        let mut batch = Batch::default();
        for row in rows {
            self.apply_row(row, &mut batch);
        }
        for app in std::mem::take(&mut batch.apps) {
            self.rebuild(&app);
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
        let Some(entry) = self.apps.get_mut(&app).and_then(|a| a.machine_mut(machine)) else {
            return;
        };
        entry.woken(ip4);
        entry.machine.gauge.undrain();
        self.rebuild(&app);
    }

    /// Gauge of a machine, for frames that name only its id.
    pub fn gauge(&self, machine: &str) -> Option<&Arc<Gauge>> {
        let app = self.app_of_machine.get(machine)?;
        self.apps.get(app)?.machine(machine).map(|entry| &entry.machine.gauge)
    }

    fn apply_row(&mut self, row: FeedRow, batch: &mut Batch) {
        let key = (self.strings.get(&row.stream), row.key.as_str().into());
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
        match (&**stream, key.split_once('/')) {
            ("routes", Some(("app", name))) => {
                let row: AppRow = parse(value)?;
                same("app", &row.app, name)?;
                let (name, org) = (self.strings.get(name), self.strings.get(&row.org));
                let app = self.apps.entry(name.clone()).or_default();
                (app.known, app.network, app.org) = (true, Some(row.network), Some(org));
                batch.apps.insert(name);
            }
            ("routes", Some(("org", slug))) => {
                let row: OrgRow = parse(value)?;
                self.snapshot.orgs.insert(slug.into(), row);
            }
            ("routes", Some(("host", name))) => {
                let destination = host_destination(&parse(value)?, &mut self.strings)?;
                let name = host_key(name).ok_or_else(|| unreadable("the key is no host name"))?;
                self.snapshot.hosts.insert(name.into(), destination);
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
                match (row.kind, row.app) {
                    (AddressKind::Shared, _) => self.snapshot.lead(ip, None),
                    (kind, Some(app)) => {
                        let address = Address {
                            app: self.strings.get(&app),
                            private: kind == AddressKind::Private,
                            network: row.network,
                        };
                        self.snapshot.lead(ip, Some(address));
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
                let service = Arc::new(Service::new(row, &mut self.ports));
                let (app, digest) = (self.strings.get(app), self.strings.get(digest));
                let entry = self.apps.entry(app.clone()).or_default();
                entry.put_service(digest, service);
                batch.apps.insert(app);
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
                self.certs.insert(key.to_string(), Arc::new(row));
                batch.changes.certs = true;
            }
            ("certs", Some(("ticket", _))) => {
                self.tickets.insert(key.to_string(), parse(value)?);
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
        let name = self.strings.get(&row.app);
        let moved = self.app_of_machine.get(id).filter(|app| **app != name).cloned();
        let mut kept = moved.and_then(|app| {
            let entry = self.apps.get_mut(&app)?.remove_machine(id);
            batch.apps.insert(app);
            entry.map(|entry| entry.machine.gauge.clone())
        });
        let app = self.apps.entry(name.clone()).or_default();
        let (gauge, epoch) = match app.machine(id) {
            None => {
                let gauge = kept.take().unwrap_or_default();
                let epoch = gauge.next_epoch();
                (gauge, epoch)
            }
            Some(entry) => {
                let (before, gauge) = (&entry.machine, entry.machine.gauge.clone());
                let another = *entry.instance_id != *row.instance_id || before.ip4 != row.ip4.parse().ok();
                let left = row.state != "started" && before.phase == Phase::Running;
                let epoch = if another || left {
                    gauge.next_epoch()
                } else {
                    before.epoch
                };
                if (another || row.state != "started") && gauge.read().draining {
                    gauge.undrain();
                    batch.changes.undrained.push(id.to_owned());
                }
                (gauge, epoch)
            }
        };
        let entry = MachineEntry::new(row, gauge, epoch, &self.node, &mut self.strings);
        self.app_of_machine.insert(entry.machine.id.clone(), name.clone());
        app.put_machine(entry);
        batch.apps.insert(name);
        Ok(())
    }

    fn delete(&mut self, (stream, key): &RowKey, batch: &mut Batch) {
        match (&**stream, key.split_once('/')) {
            ("routes", Some(("app", name))) => {
                if let Some(app) = self.apps.get_mut(name) {
                    (app.known, app.network, app.org) = (false, None, None);
                    batch.apps.insert(name.into());
                }
            }
            ("routes", Some(("org", slug))) => drop(self.snapshot.orgs.remove(slug)),
            ("routes", Some(("host", name))) => {
                if let Some(name) = host_key(name) {
                    self.snapshot.hosts.remove(name.as_str());
                }
            }
            ("routes", Some(("acme", token))) => drop(Arc::make_mut(&mut self.snapshot.acme).remove(token)),
            ("routes", Some(("txt", name))) => {
                if let Some(name) = normalise(name) {
                    Arc::make_mut(&mut self.snapshot.texts).remove(&name);
                }
            }
            ("routes", Some(("addr", ip))) => {
                if let Ok(ip) = ip.parse::<IpAddr>() {
                    self.snapshot.lead(ip, None);
                }
            }
            ("routes", Some(("svc", rest))) => {
                if let Some((app, digest)) = rest.split_once('/')
                    && let Some(entry) = self.apps.get_mut(app)
                {
                    entry.remove_service(digest);
                    batch.apps.insert(app.into());
                }
            }
            ("routes", Some(("m", id))) => {
                if let Some(app) = self.app_of_machine.remove(id) {
                    if let Some(entry) = self.apps.get_mut(&app).and_then(|a| a.remove_machine(id)) {
                        entry.machine.gauge.next_epoch();
                        entry.machine.gauge.undrain();
                        batch.changes.undrained.push(id.to_owned());
                    }
                    batch.apps.insert(app);
                }
            }
            ("nodes", Some(("node", id))) => drop(self.snapshot.nodes.remove(id)),
            ("nodes", Some(("member", id))) => drop(self.snapshot.members.remove(id)),
            ("certs", Some(("ticket", _))) => batch.changes.tickets |= self.tickets.remove(&**key).is_some(),
            ("certs", _) => batch.changes.certs |= self.certs.remove(&**key).is_some(),
            _ => {}
        }
    }

    fn rebuild(&mut self, name: &str) {
        let apps = &mut self.snapshot.apps;
        let Some((name, entry)) = self.apps.get_key_value(name) else {
            return;
        };
        if entry.is_empty() {
            apps.remove(name);
            let name = name.clone();
            self.apps.remove(&name);
            return;
        }
        apps.insert(name.clone(), Arc::new(entry.assemble(name)));
    }

    fn publish_set_aside(&mut self) {
        self.snapshot.set_aside = self.set_aside.keys().map(|(_, key)| key.to_string()).collect();
    }
}

#[derive(Default)]
struct Batch {
    apps: BTreeSet<Arc<str>>,
    changes: Changes,
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

fn host_destination(row: &HostRow, strings: &mut Strings) -> Result<Destination, Unreadable> {
    match (&row.app, &row.backend) {
        (None, Some(backend)) => {
            let backend: SocketAddr = backend
                .parse()
                .map_err(|_| unreadable("backend: not of the form ip:port"))?;
            Ok(Destination::Backend(Box::new(backend)))
        }
        (Some(app), None) => Ok(Destination::App(strings.get(app))),
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
