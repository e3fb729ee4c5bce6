//! An app of the routing view from what [`crate::table`] keeps of its rows. What did not change is shared with the view before.

use std::collections::BTreeMap;
use std::sync::Arc;

use pantala_wire::feed::{MachineRow, Port};

use crate::buckets;
use crate::gauge::Gauge;
use crate::intern::Strings;
use crate::snapshot::{App, Machine, Offer, Phase, Service, Target};

/// What rows say of one machine.
pub struct MachineEntry {
    pub machine: Arc<Machine>,
    pub instance_id: Box<str>,
    /// digests, and whether the machine passes their checks
    pub services: Box<[(Arc<str>, bool)]>,
}

impl MachineEntry {
    /// `node`: the host of this proxy.
    pub fn new(row: MachineRow, gauge: Arc<Gauge>, epoch: u32, node: &str, strings: &mut Strings) -> MachineEntry {
        let services = row.services.iter().map(|digest| strings.get(digest));
        let services = services.zip(row.passing).collect();
        let machine = Machine {
            id: row.id.into(),
            app: strings.get(&row.app),
            region: strings.get(&row.region),
            local: row.node == node,
            node: strings.get(&row.node),
            phase: Phase::of(&row.state),
            ip4: row.ip4.parse().ok(),
            cordoned: row.cordoned,
            ip6: row.ip6.parse().ok(),
            dns: row.dns,
            group: strings.get(&row.group),
            metadata: row.metadata,
            epoch,
            gauge,
        };
        MachineEntry {
            machine: Arc::new(machine),
            instance_id: row.instance_id.into(),
            services,
        }
    }

    /// Ready at `ip4`, ahead of its row.
    pub fn woken(&mut self, ip4: &str) {
        let mut machine = Machine::clone(&self.machine);
        let ip4 = ip4.parse().ok();
        if machine.phase != Phase::Running || machine.ip4 != ip4 {
            machine.epoch = machine.gauge.next_epoch();
        }
        (machine.phase, machine.ip4) = (Phase::Running, ip4);
        self.machine = Arc::new(machine);
        self.services.iter_mut().for_each(|(_, passing)| *passing = true);
    }
}

/// What rows say of one app. Most have one service and few machines: sorted lists take a tenth of what trees would.
#[derive(Default)]
pub struct AppEntry {
    pub known: bool,
    pub network: Option<u64>,
    pub org: Option<Arc<str>>,
    services: Vec<(Arc<str>, Arc<Service>)>,
    machines: Vec<MachineEntry>,
}

impl AppEntry {
    pub fn is_empty(&self) -> bool {
        !self.known && self.services.is_empty() && self.machines.is_empty()
    }

    fn place_of(&self, machine: &str) -> Result<usize, usize> {
        self.machines.binary_search_by(|entry| (*entry.machine.id).cmp(machine))
    }

    pub fn machine(&self, id: &str) -> Option<&MachineEntry> {
        self.place_of(id).ok().map(|place| &self.machines[place])
    }

    pub fn machine_mut(&mut self, id: &str) -> Option<&mut MachineEntry> {
        self.place_of(id).ok().map(|place| &mut self.machines[place])
    }

    pub fn remove_machine(&mut self, id: &str) -> Option<MachineEntry> {
        self.place_of(id).ok().map(|place| self.machines.remove(place))
    }

    pub fn put_machine(&mut self, entry: MachineEntry) {
        match self.place_of(&entry.machine.id) {
            Ok(place) => self.machines[place] = entry,
            Err(place) => {
                one_more(&mut self.machines);
                self.machines.insert(place, entry);
            }
        }
    }

    fn service(&self, digest: &str) -> Option<&Arc<Service>> {
        let place = self.services.binary_search_by(|(key, _)| (**key).cmp(digest));
        place.ok().map(|place| &self.services[place].1)
    }

    pub fn put_service(&mut self, digest: Arc<str>, service: Arc<Service>) {
        match self.services.binary_search_by(|(key, _)| key.cmp(&digest)) {
            Ok(place) => self.services[place].1 = service,
            Err(place) => {
                one_more(&mut self.services);
                self.services.insert(place, (digest, service));
            }
        }
    }

    pub fn remove_service(&mut self, digest: &str) {
        self.services.retain(|(key, _)| **key != *digest);
    }

    pub fn assemble(&self, name: &Arc<str>) -> App {
        let mut offers: BTreeMap<(u16, u16), Offer> = BTreeMap::new();
        for MachineEntry { machine, services, .. } in &self.machines {
            for (digest, passing) in services {
                let Some(service) = self.service(digest).filter(|service| service.tcp) else {
                    continue;
                };
                for declared in &service.ports {
                    let Some((start, end)) = range(&declared.port) else {
                        continue;
                    };
                    let offer = offers.entry((start, end)).or_insert_with(|| Offer {
                        start,
                        end,
                        port: declared.port.clone(),
                        http: declared.http.clone(),
                        buckets: None,
                        targets: Vec::with_capacity(self.machines.len()),
                    });
                    if offer.targets.last().is_none_or(|last| last.machine.id != machine.id) {
                        let target = Target {
                            machine: machine.clone(),
                            service: service.clone(),
                            passing: *passing,
                            h2: declared.http.as_ref().and_then(|options| options.h2_backend) == Some(true),
                        };
                        offer.targets.push(target);
                    }
                }
            }
        }
        let mut offers: Vec<Offer> = offers.into_values().collect();
        for offer in &mut offers {
            offer
                .targets
                .sort_by(|a, b| (&a.machine.region, &a.machine.id).cmp(&(&b.machine.region, &b.machine.id)));
            offer.targets.shrink_to_fit();
            offer.buckets = buckets::of(&offer.targets);
        }
        App {
            name: name.clone(),
            network: self.network,
            org: self.org.clone(),
            machines: self.machines.iter().map(|entry| entry.machine.clone()).collect(),
            offers,
        }
    }
}

/// Room for few is exact: a hundred thousand apps have one machine each.
fn one_more<T>(list: &mut Vec<T>) {
    if list.len() < 4 {
        list.reserve_exact(1);
    }
}

pub fn range(port: &Port) -> Option<(u16, u16)> {
    match (port.port, port.start_port, port.end_port) {
        (Some(one), _, _) => Some((one, one)),
        (None, Some(start), end) => Some((start, end.unwrap_or(start))),
        _ => None,
    }
}
