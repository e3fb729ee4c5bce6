//! What a client, or an app that has a request replayed, may say about the machine it wants (Fly.io: dynamic request
//! routing): one machine or a list of regions, as a wish or as a condition.

use crate::choose::{Choice, Knowledge, choose};
use crate::geography;
use crate::snapshot::{Machine, Target};

#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Wishes {
    pub prefer_instance: Option<String>,
    pub force_instance: Option<String>,
    pub prefer_region: Vec<String>,
    pub force_region: Vec<String>,
    /// not this machine
    pub exclude: Option<String>,
}

#[derive(Clone, Debug)]
pub struct Wished {
    /// none: a condition excludes every machine
    pub choice: Option<Choice>,
    /// the preferred machine that does not serve at this moment
    pub unavailable: Option<String>,
}

impl Wishes {
    pub fn any(&self) -> bool {
        *self != Wishes::default()
    }

    /// Only some machines of the app will do, so that no other may stand in for them.
    pub fn conditions(&self) -> bool {
        self.force_instance.is_some() || !self.force_region.is_empty() || self.exclude.is_some()
    }

    /// Without what is only preferred.
    pub fn demands(&self) -> Wishes {
        Wishes {
            prefer_instance: None,
            prefer_region: Vec::new(),
            ..self.clone()
        }
    }

    /// No condition excludes the machine.
    pub fn admit(&self, machine: &Machine) -> bool {
        self.force_instance.as_ref().is_none_or(|id| **id == *machine.id)
            && self.exclude.as_ref().is_none_or(|id| **id != *machine.id)
            && self.in_region(machine)
    }

    pub fn choose(&self, targets: &[Target], known: &impl Knowledge) -> Wished {
        let Some(excluded) = &self.exclude else {
            return self.choose_among(targets, known);
        };
        let others = targets.iter().filter(|target| *target.machine.id != **excluded);
        self.choose_among(&others.cloned().collect::<Vec<_>>(), known)
    }

    fn choose_among(&self, targets: &[Target], known: &impl Knowledge) -> Wished {
        let found = |choice| Wished {
            choice: Some(choice),
            unavailable: None,
        };
        let is = |target: &&Target, id: &str| &*target.machine.id == id;
        if let Some(id) = &self.force_instance {
            // With both conditions both must hold.
            let only: Vec<Target> = targets
                .iter()
                .filter(|t| is(t, id) && self.in_region(&t.machine))
                .cloned()
                .collect();
            return if only.is_empty() {
                Wished {
                    choice: None,
                    unavailable: None,
                }
            } else {
                found(choose(&only, known))
            };
        }
        let mut unavailable = None;
        if let Some(id) = &self.prefer_instance {
            let only: Vec<Target> = targets
                .iter()
                .filter(|t| is(t, id) && self.in_region(&t.machine))
                .cloned()
                .collect();
            match choose(&only, known) {
                choice @ (Choice::Use(_) | Choice::Wake(..)) => return found(choice),
                _ => unavailable = Some(id.clone()),
            }
        }
        let choice = self.by_region(targets, known);
        Wished { choice, unavailable }
    }

    fn in_region(&self, machine: &Machine) -> bool {
        let region = &machine.region;
        self.force_region.is_empty()
            || self
                .force_region
                .iter()
                .any(|wanted| geography::includes(wanted, region))
    }

    fn by_region(&self, targets: &[Target], known: &impl Knowledge) -> Option<Choice> {
        let (regions, forced) = match self.force_region.is_empty() {
            true => (&self.prefer_region, false),
            false => (&self.force_region, true),
        };
        for region in regions {
            let here = |t: &&Target| geography::includes(region, &t.machine.region);
            let only: Vec<Target> = targets.iter().filter(here).cloned().collect();
            if let choice @ (Choice::Use(_) | Choice::Wake(..)) = choose(&only, known) {
                return Some(choice);
            }
        }
        if !forced {
            return Some(choose(targets, known));
        }
        let only: Vec<Target> = targets.iter().filter(|t| self.in_region(&t.machine)).cloned().collect();
        (!only.is_empty()).then(|| choose(&only, known))
    }
}
