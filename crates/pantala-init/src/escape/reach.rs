//! Attempts to reach what listens elsewhere: sockets of the host, of the agent, the proxy and other machines, and the
//! network itself.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixStream};
use std::time::Duration;

use nix::errno::Errno;

use super::attempt::{Attempt, NO, Need, Tried, address, each, judge, syscall};

const ANSWERS_WITHIN: Duration = Duration::from_millis(500);
/// A kernel sends its refusals to one machine at a rate, some at once and then one a second; the network asks again.
const REFUSED_WITHIN: Duration = Duration::from_secs(4);
const CLOSED: &[Errno] = &[Errno::EHOSTUNREACH, Errno::ENETUNREACH, Errno::EADDRNOTAVAIL];
const NOT_HERE: &[Errno] = &[Errno::ECONNREFUSED];
const NO_FAMILY: &[Errno] = &[Errno::EAFNOSUPPORT, Errno::EPROTONOSUPPORT, Errno::EPROTOTYPE];
const AF_XDP: libc::c_int = 44;
const ABSENT: &[Errno] = &[Errno::ENOENT, Errno::ENOTDIR, Errno::ECONNREFUSED];
const SSH_PORT: u16 = 22;

pub fn attempts() -> Vec<Attempt> {
    let one = |name, act| Attempt {
        name,
        need: Need::Nothing,
        act,
    };
    let family = |name, family, act| Attempt {
        name,
        need: Need::Family(family),
        act,
    };
    vec![
        one("raw-socket", |_| {
            socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_ICMP)
        }),
        one("raw-socket-6", |_| {
            socket(libc::AF_INET6, libc::SOCK_RAW, libc::IPPROTO_ICMPV6)
        }),
        family("packet-socket", libc::AF_PACKET, |_| {
            socket(libc::AF_PACKET, libc::SOCK_RAW, 0x0300)
        }),
        family("crypto-socket", libc::AF_ALG, |_| {
            socket(libc::AF_ALG, libc::SOCK_SEQPACKET, 0)
        }),
        family("vsock-socket", libc::AF_VSOCK, |_| {
            socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0)
        }),
        family("xdp-socket", AF_XDP, |_| socket(AF_XDP, libc::SOCK_RAW, 0)),
        one("add-route", |_| asked_of_the_network(libc::RTM_NEWROUTE)),
        one("add-address", |_| asked_of_the_network(libc::RTM_NEWADDR)),
        one("add-link", |_| asked_of_the_network(libc::RTM_NEWLINK)),
        one("tcp-of-host", |aims| {
            let doors = aims.survey.doors.iter().filter(|door| !door.ip().is_loopback());
            each(doors, "no TCP socket of the host listens there", |door| {
                connected(door, &[NO, CLOSED, NOT_HERE])
            })
        }),
        one("tcp-of-host-loopback", |aims| {
            let doors = aims.survey.doors.iter().filter(|door| door.ip().is_loopback());
            each(doors, "no TCP socket of the host listens on loopback", |door| {
                connected(door, &[NO, CLOSED, NOT_HERE])
            })
        }),
        one("tcp-of-neighbours", |aims| {
            // Whether something listens there is not known: who says that nothing does has been reached.
            let doors: Vec<SocketAddr> = aims
                .neighbours
                .iter()
                .filter_map(|text| Some(SocketAddr::new(text.parse().ok()?, SSH_PORT)))
                .collect();
            each(
                doors.iter(),
                "this host has no other machines",
                |door| match connected(door, &[NO, CLOSED]) {
                    Tried::Unclear(detail) if detail.ends_with("ECONNREFUSED") => Tried::Through(detail),
                    other => other,
                },
            )
        }),
        one("unix-sockets-of-host", |aims| {
            let paths = aims.survey.sockets.iter().filter(|name| name.starts_with('/'));
            each(paths, "no socket of the host listens at a path", |path| {
                let result = UnixStream::connect(path.as_str()).map(|_| format!("{path} was reached"));
                judge(path, &[NO, ABSENT], result)
            })
        }),
        one("abstract-sockets-of-host", |aims| {
            let names = aims.survey.sockets.iter().filter(|name| name.starts_with('@'));
            each(names, "the host has no such sockets", |name| {
                let result = UnixAddress::from_abstract_name(&name.as_bytes()[1..])
                    .and_then(|address| UnixStream::connect_addr(&address));
                judge(name, &[NO, NOT_HERE], result.map(|_| format!("{name} was reached")))
            })
        }),
    ]
}

fn connected(door: &SocketAddr, refusals: &[&[Errno]]) -> Tried {
    match TcpStream::connect_timeout(door, REFUSED_WITHIN) {
        Err(error) if error.raw_os_error().is_none() => Tried::Unclear(format!("{door}: {error}")),
        result => judge(
            &door.to_string(),
            refusals,
            result.map(|_| format!("{door} was reached")),
        ),
    }
}

/// Whether the host's own connection to it is accepted: only then a refusal inside proves something.
pub fn answers(door: &SocketAddr) -> bool {
    TcpStream::connect_timeout(door, ANSWERS_WITHIN).is_ok()
}

fn open_socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes three numbers and gives a descriptor, which is nobody else's.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn socket(family: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> Tried {
    let result = open_socket(family, kind, protocol);
    judge("socket", &[NO, NO_FAMILY], result.map(|_| "it was made".to_owned()))
}

/// Whether this kernel has sockets of this family at all.
pub fn has_family(family: libc::c_int) -> bool {
    [
        libc::SOCK_STREAM,
        libc::SOCK_SEQPACKET,
        libc::SOCK_RAW,
        libc::SOCK_DGRAM,
    ]
    .into_iter()
    .any(|kind| open_socket(family, kind, 0).is_ok())
}

/// An order to the kernel's network without contents: rights are looked at before those.
fn asked_of_the_network(order: u16) -> Tried {
    const REQUEST_AND_ACK: u16 = 1 | 4;
    let (kind, flags) = (order.to_ne_bytes(), REQUEST_AND_ACK.to_ne_bytes());
    let mut message = [0u8; 32];
    message[0] = 32;
    (message[4], message[5]) = (kind[0], kind[1]);
    (message[6], message[7]) = (flags[0], flags[1]);
    let result = open_socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE).and_then(|socket| {
        let fd: libc::c_long = socket.as_raw_fd().into();
        syscall(libc::SYS_sendto, [fd, address(&message), 32, 0, 0])?;
        let mut answer = [0u8; 256];
        let place = answer.as_mut_ptr() as libc::c_long;
        syscall(libc::SYS_read, [fd, place, 256, 0, 0])?;
        let code = i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]);
        Ok(-code)
    });
    match result {
        Err(error) => judge("netlink", &[NO], Err(error)),
        Ok(0) => Tried::Through("it was done".to_owned()),
        Ok(code) if code == libc::EPERM || code == libc::EACCES => {
            judge("netlink", &[NO], Err(io::Error::from_raw_os_error(code)))
        }
        Ok(code) => Tried::Through(format!(
            "rights were not asked for; it failed with {:?}",
            Errno::from_raw(code)
        )),
    }
}
