//! What the host has that attempts could aim at, asked by the host's own agent with all its rights.

use std::collections::BTreeMap;
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::attempt::{Attempt, Need, syscall};
use super::{Aims, processes, reach};

const DOORS_MAX: usize = 16;
const SOCKETS_MAX: usize = 256;
const LISTENS: &str = "0A";
const ACCEPTS_CONNECTIONS: &str = "00010000";

/// `missing`: attempts that aim at what this host does not have, and why. `doors`: where TCP is accepted; `sockets`:
/// Unix sockets that listen, those without a path with an `@`.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Survey {
    pub missing: BTreeMap<String, String>,
    pub doors: Vec<SocketAddr>,
    pub sockets: Vec<String>,
    pub pid_namespace: String,
}

pub fn take(aims: &Aims, attempts: &[Attempt]) -> Survey {
    let filesystems = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    let missing = attempts
        .iter()
        .filter_map(|attempt| Some((attempt.name.to_owned(), lacks(&attempt.need, &filesystems)?)))
        .collect();
    Survey {
        missing,
        doors: doors(aims),
        sockets: sockets(&fs::read_to_string("/proc/net/unix").unwrap_or_default()),
        pid_namespace: processes::own_namespace(),
    }
}

fn lacks(need: &Need, filesystems: &str) -> Option<String> {
    match need {
        Need::Nothing => None,
        Need::Call(number, harmless) => {
            let errno = syscall(*number, *harmless).err().and_then(|error| error.raw_os_error());
            (errno == Some(libc::ENOSYS)).then(|| "this kernel has no such call".to_owned())
        }
        Need::Path(path) if !Path::new(path).exists() => Some(format!("this host has no {path}")),
        Need::Path(path) => {
            let is_empty = fs::read_dir(path).is_ok_and(|mut entries| entries.next().is_none());
            is_empty.then(|| format!("on this host {path} is empty"))
        }
        Need::Filesystem(kind) => {
            let known = filesystems
                .lines()
                .any(|line| line.split_whitespace().last() == Some(kind));
            (!known).then(|| format!("this kernel has no {kind}"))
        }
        Need::Family(family) => (!reach::has_family(*family)).then(|| "this kernel has no such sockets".to_owned()),
        Need::Asked(there, why) => (!there()).then(|| (*why).to_owned()),
    }
}

/// Where the host accepts a connection that a machine should not get.
fn doors(aims: &Aims) -> Vec<SocketAddr> {
    let host: Vec<IpAddr> = aims.host.iter().filter_map(|text| text.parse().ok()).collect();
    let open: Vec<SocketAddr> = aims.open.iter().filter_map(|text| text.parse().ok()).collect();
    let mut found = Vec::new();
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text = fs::read_to_string(table).unwrap_or_default();
        for listener in text.lines().filter_map(listener) {
            for door in at(listener, &host) {
                if !found.contains(&door) && !open.contains(&door) {
                    found.push(door);
                }
            }
        }
    }
    found.retain(reach::answers);
    found.truncate(DOORS_MAX);
    found
}

/// Where a listener can be found: one that takes all addresses, at each of the host's and on loopback.
fn at(listener: SocketAddr, host: &[IpAddr]) -> Vec<SocketAddr> {
    if !listener.ip().is_unspecified() {
        return vec![listener];
    }
    let loopback = match listener {
        SocketAddr::V4(_) => IpAddr::from(Ipv4Addr::LOCALHOST),
        SocketAddr::V6(_) => IpAddr::from(Ipv6Addr::LOCALHOST),
    };
    // One on `::` mostly takes IPv4 too; whether it does is tried.
    let all = host.iter().copied().chain([loopback]);
    all.filter(|address| address.is_ipv4() || listener.is_ipv6())
        .map(|address| SocketAddr::new(address, listener.port()))
        .collect()
}

/// A line of /proc/net/tcp or tcp6, when it listens.
fn listener(line: &str) -> Option<SocketAddr> {
    let mut words = line.split_whitespace().skip(1);
    let local = words.next()?;
    if words.nth(1)? != LISTENS {
        return None;
    }
    let (address, port) = local.split_once(':')?;
    let port = u16::from_str_radix(port, 16).ok()?;
    let words: Option<Vec<u32>> = (0..address.len() / 8)
        .map(|at| u32::from_str_radix(address.get(at * 8..at * 8 + 8)?, 16).ok())
        .collect();
    let bytes: Vec<u8> = words?.into_iter().flat_map(u32::to_ne_bytes).collect();
    let ip = match bytes.len() {
        4 => IpAddr::from(<[u8; 4]>::try_from(bytes).ok()?),
        16 => IpAddr::from(<[u8; 16]>::try_from(bytes).ok()?),
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

/// Names of the sockets in /proc/net/unix that take connections.
fn sockets(table: &str) -> Vec<String> {
    let names = table.lines().skip(1).filter_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        let accepts = words.get(3) == Some(&ACCEPTS_CONNECTIONS);
        words.get(7).filter(|_| accepts).map(|name| (*name).to_owned())
    });
    names.take(SOCKETS_MAX).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn listeners_are_read_and_found_at_every_address_of_the_host() {
        let four = "   0: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 1";
        assert_eq!(listener(four), Some("0.0.0.0:8080".parse().unwrap()));
        let six = "   1: 00000000000000000000000001000000:0050 0:0 0A 0:0 00:0 0 0 0 2";
        assert_eq!(listener(six), Some("[::1]:80".parse().unwrap()));
        let connected = "   2: 0100007F:1F90 0100007F:9999 01 0:0 00:0 0 0 0 3";
        assert_eq!(listener(connected), None);

        let host = ["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let doors: Vec<String> = at("0.0.0.0:80".parse().unwrap(), &host)
            .iter()
            .map(ToString::to_string)
            .collect();
        assert_eq!(doors, ["10.0.0.1:80", "127.0.0.1:80"]);
        let doors = at("[::]:80".parse().unwrap(), &host);
        assert_eq!(doors.len(), 3);
        let one: SocketAddr = "127.0.0.1:4222".parse().unwrap();
        assert_eq!(at(one, &host), [one]);
    }

    #[test]
    fn sockets_that_listen_are_known_by_path_or_name() {
        let table = "Num RefCount Protocol Flags Type St Inode Path\n\
                     0: 00000002 00000000 00010000 0001 01 5 /run/agent.sock\n\
                     0: 00000003 00000000 00000000 0001 03 6 /run/agent.sock\n\
                     0: 00000002 00000000 00010000 0001 01 7 @bus\n\
                     0: 00000002 00000000 00010000 0001 01 8\n";
        assert_eq!(sockets(table), ["/run/agent.sock", "@bus"]);
    }
}
