//! What a client may say about the machine it wants (Fly.io: dynamic request routing): one machine or a list of regions, as a
//! wish or as a condition.

use crate::choose::{Choice, Knowledge, choose};
use crate::snapshot::Target;

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    pub prefer_instance: Option<String>,
    pub force_instance: Option<String>,
    pub prefer_region: Vec<String>,
    pub force_region: Vec<String>,
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

    pub fn choose(&self, targets: &[Target], known: &impl Knowledge) -> Wished {
        let found = |choice| Wished {
            choice: Some(choice),
            unavailable: None,
        };
        let is = |target: &&Target, id: &str| &*target.machine.id == id;
        if let Some(id) = &self.force_instance {
            let only: Vec<Target> = targets.iter().filter(|t| is(t, id)).cloned().collect();
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
            let only: Vec<Target> = targets.iter().filter(|t| is(t, id)).cloned().collect();
            match choose(&only, known) {
                choice @ (Choice::Use(_) | Choice::Wake(..)) => return found(choice),
                _ => unavailable = Some(id.clone()),
            }
        }
        let choice = self.by_region(targets, known);
        Wished { choice, unavailable }
    }

    fn by_region(&self, targets: &[Target], known: &impl Knowledge) -> Option<Choice> {
        let (regions, forced) = match self.force_region.is_empty() {
            true => (&self.prefer_region, false),
            false => (&self.force_region, true),
        };
        let mut last = None;
        for region in regions {
            let here = |t: &&Target| region == "any" || t.machine.region == *region;
            let only: Vec<Target> = targets.iter().filter(here).cloned().collect();
            match choose(&only, known) {
                choice @ (Choice::Use(_) | Choice::Wake(..)) => return Some(choice),
                _ if only.is_empty() => {}
                choice => last = Some(choice),
            }
        }
        if forced { last } else { Some(choose(targets, known)) }
    }
}
