//! `.internal` names of the private network, answered from the view. Who asks decides what there is: only apps of the
//! asker's own network exist for it. Addresses are those of started machines, the nearest first.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv6Addr};

use crate::snapshot::{App, Machine, Phase, Snapshot};

/// An answer over TCP holds 64 KiB; this many addresses fit.
const ADDRESSES_MAX: usize = 1_000;
const TEXT_BYTES_MAX: usize = 48 * 1024;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wanted {
    Addresses,
    Text,
    /// another type: the name may exist, there is nothing of that type
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Records {
    Addresses(Vec<Ipv6Addr>),
    Text(String),
}

/// One network as its members see it. `distance`: how far a region is, any unit.
pub struct Network<'a> {
    pub id: u64,
    pub snapshot: &'a Snapshot,
    pub distance: &'a dyn Fn(&str) -> u32,
}

/// The network of a 6PN address: the 32 bits after `fdaa`. None for any other address.
pub fn network_of(asker: IpAddr) -> Option<u64> {
    match asker {
        IpAddr::V6(ip) if ip.segments()[0] == 0xfdaa => {
            Some(u64::from(ip.segments()[1]) << 16 | u64::from(ip.segments()[2])).filter(|id| *id > 0)
        }
        _ => None,
    }
}

/// What a name stands for.
enum Meaning<'a> {
    Machines(Vec<&'a Machine>),
    Text(String),
    Nothing,
}

impl<'a> Network<'a> {
    /// `name` in lower case, without `.internal` and final dots. None: there is no such name. An empty answer: it exists,
    /// and has no record of this type.
    pub fn answer(&self, name: &str, wanted: Wanted) -> Option<Records> {
        let labels: Vec<&str> = name.split('.').collect();
        let meaning = self.meaning(&labels)?;
        Some(match (wanted, meaning) {
            (Wanted::Addresses, Meaning::Machines(machines)) => Records::Addresses(self.addresses(machines)),
            (Wanted::Text, Meaning::Text(text)) => Records::Text(text),
            (Wanted::Text, _) => Records::Text(String::new()),
            _ => Records::Addresses(Vec::new()),
        })
    }

    /// `<app>.flycast`: its private addresses that machines of this network may use. None: there is no such app here.
    pub fn flycast(&self, app: &str, wanted: Wanted) -> Option<Records> {
        let of = self.snapshot.addresses.iter().filter(|(_, address)| {
            let own = || self.snapshot.apps.get(&address.app).and_then(|app| app.network);
            address.private && *address.app == *app && address.network.or_else(own) == Some(self.id)
        });
        let mut found: Vec<Ipv6Addr> = of
            .filter_map(|(ip, _)| match ip {
                IpAddr::V6(ip) => Some(*ip),
                IpAddr::V4(_) => None,
            })
            .collect();
        if found.is_empty() {
            self.app(app)?;
        }
        found.sort();
        Some(match wanted {
            Wanted::Addresses => Records::Addresses(found),
            _ => Records::Addresses(Vec::new()),
        })
    }

    fn meaning(&self, labels: &[&str]) -> Option<Meaning<'a>> {
        Some(match labels {
            ["_apps"] => Meaning::Text(self.app_names()),
            ["_instances"] => Meaning::Text(self.instances(false)),
            ["all", "_instances"] => Meaning::Text(self.instances(true)),
            ["_peer"] => Meaning::Text(String::new()),
            [_, "_peer"] => return None,
            [app] => Meaning::Machines(started(self.app(app)?)),
            ["global", app] => Meaning::Machines(started(self.app(app)?)),
            ["vms", app] => Meaning::Text(vms(&started(self.app(app)?))),
            ["all", "vms", app] => Meaning::Text(vms(&registered(self.app(app)?))),
            ["regions", app] => Meaning::Text(regions(&started(self.app(app)?))),
            ["all", "regions", app] => Meaning::Text(regions(&registered(self.app(app)?))),
            [machine, "vm", app] => {
                let named = |m: &&Machine| *m.id == **machine;
                if !registered(self.app(app)?).iter().any(named) {
                    return None;
                }
                only(started(self.app(app)?), |m| named(&m))
            }
            [group, "process", app] => only(started(self.app(app)?), |m| *m.group == **group),
            [count, "nearest", "of", app] => {
                let count: usize = count.strip_prefix("top")?.parse().ok().filter(|n| *n > 0)?;
                let mut machines = started(self.app(app)?);
                self.nearest_first(&mut machines);
                machines.truncate(count);
                Meaning::Machines(machines)
            }
            [value @ .., key, "kv", "_metadata", app] if !value.is_empty() => {
                let value = value.join(".");
                only(started(self.app(app)?), |m| {
                    m.metadata
                        .iter()
                        .any(|(k, v)| k.eq_ignore_ascii_case(key) && v.eq_ignore_ascii_case(&value))
                })
            }
            [region, app] if is_region(region) => only(started(self.app(app)?), |m| *m.region == **region),
            ["kv" | "vm" | "process", _] => Meaning::Nothing,
            _ => return None,
        })
    }

    fn app(&self, name: &str) -> Option<&'a App> {
        let app = self.snapshot.apps.get(name)?;
        (app.network == Some(self.id)).then_some(&**app)
    }

    fn apps(&self) -> Vec<&'a App> {
        let mut apps: Vec<&App> = self.snapshot.apps.values().map(|app| &**app).collect();
        apps.retain(|app| app.network == Some(self.id));
        apps.sort_by(|a, b| a.name.cmp(&b.name));
        apps
    }

    fn app_names(&self) -> String {
        joined(self.apps().iter().map(|app| app.name.to_string()), ",")
    }

    fn instances(&self, all: bool) -> String {
        let of = |app: &&'a App| if all { registered(app) } else { started(app) };
        let texts = self.apps().into_iter().flat_map(|app| of(&app)).map(|m| {
            let ip = m.ip6.map(|ip| ip.to_string()).unwrap_or_default();
            format!("instance={},app={},ip={ip},region={}", m.id, m.app, m.region)
        });
        joined(texts, ";")
    }

    fn nearest_first(&self, machines: &mut [&Machine]) {
        machines.sort_by_key(|m| ((self.distance)(&m.region), m.id.clone()));
    }

    fn addresses(&self, mut machines: Vec<&Machine>) -> Vec<Ipv6Addr> {
        self.nearest_first(&mut machines);
        machines.iter().filter_map(|m| m.ip6).take(ADDRESSES_MAX).collect()
    }
}

fn only<'a>(machines: Vec<&'a Machine>, wanted: impl Fn(&'a Machine) -> bool) -> Meaning<'a> {
    Meaning::Machines(machines.into_iter().filter(|m| wanted(m)).collect())
}

fn registered(app: &App) -> Vec<&Machine> {
    let there = |m: &&Machine| m.dns && m.phase != Phase::Gone;
    app.machines.iter().map(|m| &**m).filter(there).collect()
}

fn started(app: &App) -> Vec<&Machine> {
    let mut machines = registered(app);
    machines.retain(|m| m.phase == Phase::Running);
    machines
}

fn vms(machines: &[&Machine]) -> String {
    joined(machines.iter().map(|m| format!("{} {}", m.id, m.region)), ",")
}

fn regions(machines: &[&Machine]) -> String {
    let regions: BTreeSet<&str> = machines.iter().map(|m| &*m.region).collect();
    joined(regions.into_iter().map(str::to_owned), ",")
}

/// As many as fit.
fn joined(items: impl Iterator<Item = String>, separator: &str) -> String {
    let mut text = String::new();
    for item in items {
        if text.len() + item.len() > TEXT_BYTES_MAX {
            break;
        }
        if !text.is_empty() {
            text.push_str(separator);
        }
        text.push_str(&item);
    }
    text
}

fn is_region(label: &str) -> bool {
    label.len() == 3 && label.bytes().all(|b| b.is_ascii_lowercase())
}
