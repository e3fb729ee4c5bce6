//! What many rows say alike is kept once: names (of apps, hosts, regions, orgs) and the options of ports, which most apps
//! leave as they are. Used by [`crate::table`] alone.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use pantala_wire::feed::{HTTPOptions, Port};

/// What nobody holds any more is looked for when there is twice as much as was left the last time, from so much on.
const FEW: usize = 1024;

pub struct Strings {
    known: HashSet<Arc<str>>,
    look_at: usize,
}

impl Default for Strings {
    fn default() -> Strings {
        Strings {
            known: HashSet::new(),
            look_at: FEW,
        }
    }
}

impl Strings {
    pub fn get(&mut self, text: &str) -> Arc<str> {
        if let Some(known) = self.known.get(text) {
            return known.clone();
        }
        if self.known.len() >= self.look_at {
            self.known.retain(|known| Arc::strong_count(known) > 1);
            self.look_at = FEW.max(2 * self.known.len());
        }
        let new: Arc<str> = text.into();
        self.known.insert(new.clone());
        new
    }
}

/// A port as services declare it.
#[derive(Clone, Debug)]
pub struct Declared {
    pub port: Arc<Port>,
    /// its own, once more: requests keep them
    pub http: Option<Arc<HTTPOptions>>,
}

impl Declared {
    fn new(port: Port) -> Declared {
        Declared {
            http: port.http_options.clone().map(Arc::new),
            port: Arc::new(port),
        }
    }
}

pub struct Ports {
    /// by all that they say
    known: HashMap<String, Declared>,
    look_at: usize,
}

impl Default for Ports {
    fn default() -> Ports {
        Ports {
            known: HashMap::new(),
            look_at: FEW,
        }
    }
}

impl Ports {
    pub fn get(&mut self, port: Port) -> Declared {
        let Ok(text) = serde_json::to_string(&port) else {
            return Declared::new(port); // it came as JSON, so this is for the compiler
        };
        if let Some(known) = self.known.get(&text) {
            return known.clone();
        }
        if self.known.len() >= self.look_at {
            self.known.retain(|_, known| Arc::strong_count(&known.port) > 1);
            self.look_at = FEW.max(2 * self.known.len());
        }
        let new = Declared::new(port);
        self.known.insert(text, new.clone());
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_is_kept_once_and_not_longer_than_needed() {
        let (mut strings, mut ports) = (Strings::default(), Ports::default());
        let port = |n: usize| Port {
            port: Some(n as u16),
            http_options: Some(HTTPOptions::default()),
            ..Port::default()
        };
        let (name, declared) = (strings.get("iad"), ports.get(port(1)));
        for n in 0..10 * FEW {
            strings.get(&n.to_string());
            ports.get(port(n));
        }
        assert!(Arc::ptr_eq(&name, &strings.get("iad")));
        assert!(Arc::ptr_eq(&declared.port, &ports.get(port(1)).port));
        assert_eq!(ports.get(port(2)).port.port, Some(2));
        assert!(strings.known.len() <= FEW + 1 && ports.known.len() <= FEW + 1);
    }
}
