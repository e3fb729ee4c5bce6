//! The network of a machine, made and removed in one short process: `pantala-init network`.
//!
//! What is made (names, addresses, routes, elements of sets) is decided by `pantala.net` and comes in the plan. Every part
//! is safe to repeat: what is there stays. It ends with its caller: another one may be at the same machine soon.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::mount::umount2;
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, setns};
use nix::sys::prctl;
use nix::sys::signal::Signal;
use nix::unistd::getppid;
use serde::Deserialize;

use super::namespaces::{self, Namespaces};
use super::netlink::{CREATE, EXCLUSIVE, Messages, Netlink, REPLACE};
use super::{Doing, HostError, Result, plan};

#[derive(Deserialize)]
struct Request {
    /// The process that reads the answer.
    caller: i32,
    #[serde(flatten)]
    plan: Plan,
}

#[derive(Deserialize)]
#[serde(tag = "do", rename_all = "lowercase")]
enum Plan {
    Join(Box<Join>),
    Leave(Leave),
}

#[derive(Deserialize)]
struct Join {
    /// To be made and pinned; else they are there.
    namespaces: Option<Namespaces>,
    /// The pin, as this process sees it.
    netns: PathBuf,
    link: Link,
    /// Another one of this name is in the way: its other end is in a namespace that nobody can name any more.
    replaces_link: bool,
    host: Side,
    machine: Side,
    elements: Vec<Element>,
}

#[derive(Deserialize)]
struct Leave {
    link: Option<String>,
    elements: Vec<Element>,
    /// Pins to unmount, and the mount namespace of this process's file that they are in.
    pins: Vec<PathBuf>,
    mount_namespace: Option<PathBuf>,
}

#[derive(Deserialize)]
struct Link {
    name: String,
    /// Its other end's, in the machine's namespace.
    peer: String,
    alias: String,
}

/// What one end of the link gets.
#[derive(Deserialize)]
struct Side {
    addresses: Vec<(IpAddr, u8)>,
    routes: Vec<Route>,
}

#[derive(Deserialize)]
struct Route {
    to: IpAddr,
    length: u8,
    via: Option<IpAddr>,
}

/// Of a set whose keys are an interface and an address, or a range of them.
#[derive(Deserialize)]
struct Element {
    table: String,
    set: String,
    interface: String,
    first: IpAddr,
    last: Option<IpAddr>,
    comment: String,
}

pub fn run() -> Result<()> {
    let Request { caller, plan } = plan()?;
    prctl::set_pdeathsig(Signal::SIGKILL).doing(|| "ask for the end with the caller".to_owned())?;
    if getppid().as_raw() != caller {
        return Err(HostError::Runtime("the caller is gone".to_owned()));
    }
    match plan {
        Plan::Join(plan) => join(&plan),
        Plan::Leave(plan) => leave(&plan),
    }
}

/// The firewall first: nothing may pass before it knows whose packets these are.
fn join(plan: &Join) -> Result<()> {
    add_elements(&plan.elements)?;
    if plan.replaces_link {
        delete_link(&plan.link.name)?;
    }
    let netns = match &plan.namespaces {
        Some(wanted) => namespaces::make(wanted)?,
        None => File::open(&plan.netns)
            .doing(|| format!("open {}", plan.netns.display()))?
            .into(),
    };
    let socket = Netlink::routes().doing(|| "open a netlink socket".to_owned())?;
    if find_link(&plan.link.name)?.is_none() {
        make_link(&socket, &plan.link, netns.as_fd()).doing(|| format!("make the link {}", plan.link.name))?;
    }
    furnish(&socket, &plan.link.name, &plan.host, Some(&plan.link.alias))
        .doing(|| format!("set up the link {}", plan.link.name))?;
    setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).doing(|| "enter the machine's network namespace".to_owned())?;
    let socket = Netlink::routes().doing(|| "open a netlink socket".to_owned())?;
    furnish(&socket, "lo", &Side::NOTHING, None).doing(|| "set up lo".to_owned())?;
    furnish(&socket, &plan.link.peer, &plan.machine, None).doing(|| format!("set up {}", plan.link.peer))
}

fn leave(plan: &Leave) -> Result<()> {
    if let Some(name) = &plan.link {
        delete_link(name)?;
    }
    remove_elements(&plan.elements)?;
    if let (Some(path), false) = (&plan.mount_namespace, plan.pins.is_empty()) {
        namespaces::enter_mounts(path)?;
    }
    for pin in &plan.pins {
        unpin(pin).doing(|| format!("unmount {}", pin.display()))?;
    }
    Ok(())
}

/// Not there is as good.
fn unpin(pin: &Path) -> io::Result<()> {
    match umount2(pin, nix::mount::MntFlags::empty()) {
        Err(Errno::EINVAL | Errno::ENOENT) => Ok(()),
        done => Ok(done?),
    }
}

// --- links -----------------------------------------------------------------------------------------------------------

const RTM_NEWLINK: u16 = 16;
const RTM_DELLINK: u16 = 17;
const RTM_NEWADDR: u16 = 20;
const RTM_NEWROUTE: u16 = 24;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_IFALIAS: u16 = 20;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const VETH_INFO_PEER: u16 = 1;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const ADDR_GEN_MODE_NONE: u8 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_F_NODAD: u8 = 2;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RT_TABLE_MAIN: u8 = 254;
const RTPROT_BOOT: u8 = 3;
const RT_SCOPE_LINK: u8 = 253;
const RTN_UNICAST: u8 = 1;

impl Side {
    const NOTHING: Side = Side {
        addresses: vec![],
        routes: vec![],
    };
}

fn family(address: IpAddr) -> u8 {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    family as u8
}

/// `struct ifinfomsg`.
fn link_header(index: u32, is_up: bool) -> [u8; 16] {
    let up = u32::from(is_up) * libc::IFF_UP as u32;
    let mut header = [0; 16];
    header[4..8].copy_from_slice(&index.to_ne_bytes());
    header[8..12].copy_from_slice(&up.to_ne_bytes());
    header[12..16].copy_from_slice(&up.to_ne_bytes());
    header
}

fn find_link(name: &str) -> Result<Option<u32>> {
    let text = CString::new(name).map_err(|_| HostError::Runtime(format!("{name:?} cannot name a link")))?;
    match if_nametoindex(text.as_c_str()) {
        Ok(index) => Ok(Some(index)),
        Err(Errno::ENODEV) => Ok(None),
        Err(errno) => Err(errno).doing(|| format!("look for the link {name}")),
    }
}

fn make_link(socket: &Netlink, link: &Link, netns: BorrowedFd<'_>) -> io::Result<()> {
    let mut messages = Messages::new();
    let peer_header = link_header(0, false);
    messages
        .begin(RTM_NEWLINK, CREATE | EXCLUSIVE, &link_header(0, false))
        .text(IFLA_IFNAME, &link.name)
        .nested(IFLA_LINKINFO, |info| {
            info.text(IFLA_INFO_KIND, "veth").nested(IFLA_INFO_DATA, |data| {
                data.nested(VETH_INFO_PEER, |peer| {
                    peer.plain(&peer_header)
                        .text(IFLA_IFNAME, &link.peer)
                        .number(IFLA_NET_NS_FD, netns.as_raw_fd() as u32);
                });
            });
        });
    socket.send_all(&messages)
}

/// Addresses and routes of a link that is there, and up. `alias`: whose it is; such a link gives itself no address.
fn furnish(socket: &Netlink, name: &str, side: &Side, alias: Option<&str>) -> io::Result<()> {
    let index = if_nametoindex(name)?;
    let mut messages = Messages::new();
    if let Some(alias) = alias {
        messages
            .begin(RTM_NEWLINK, 0, &link_header(index, false))
            .attribute(IFLA_IFALIAS, alias.as_bytes())
            .nested(IFLA_AF_SPEC, |all| {
                all.nested(libc::AF_INET6 as u16, |ours| {
                    ours.attribute(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]);
                });
            });
    }
    for (address, length) in &side.addresses {
        // Nothing waits for duplicates to be found: addresses are given.
        let flags = if address.is_ipv6() { IFA_F_NODAD } else { 0 };
        let mut header = [family(*address), *length, flags, 0, 0, 0, 0, 0];
        header[4..].copy_from_slice(&index.to_ne_bytes());
        messages
            .begin(RTM_NEWADDR, CREATE | REPLACE, &header)
            .address(IFA_LOCAL, *address)
            .address(IFA_ADDRESS, *address);
    }
    messages.begin(RTM_NEWLINK, 0, &link_header(index, true));
    for route in &side.routes {
        let is_direct = route.via.is_none() && route.to.is_ipv4();
        let scope = if is_direct { RT_SCOPE_LINK } else { 0 };
        let mut header = [0; 12];
        header[..2].copy_from_slice(&[family(route.to), route.length]);
        header[4..8].copy_from_slice(&[RT_TABLE_MAIN, RTPROT_BOOT, scope, RTN_UNICAST]);
        messages.begin(RTM_NEWROUTE, CREATE | REPLACE, &header);
        if route.length > 0 {
            messages.address(RTA_DST, route.to);
        }
        messages.number(RTA_OIF, index);
        if let Some(via) = route.via {
            messages.address(RTA_GATEWAY, via);
        }
    }
    socket.send_all(&messages)
}

fn delete_link(name: &str) -> Result<()> {
    let Some(index) = find_link(name)? else { return Ok(()) };
    let mut messages = Messages::new();
    messages.begin(RTM_DELLINK, 0, &link_header(index, false));
    let socket = Netlink::routes().doing(|| "open a netlink socket".to_owned())?;
    match socket.send_all(&messages) {
        // Gone with its namespace in between.
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => Ok(()),
        done => done.doing(|| format!("delete the link {name}")),
    }
}

// --- the firewall ----------------------------------------------------------------------------------------------------

const NFNL_MSG_BATCH_BEGIN: u16 = 0x10;
const NFNL_MSG_BATCH_END: u16 = 0x11;
const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFPROTO_INET: u8 = 1;
const NFT_MSG_NEWSETELEM: u16 = NFNL_SUBSYS_NFTABLES << 8 | 12;
const NFT_MSG_DELSETELEM: u16 = NFNL_SUBSYS_NFTABLES << 8 | 14;
const NFTA_SET_ELEM_LIST_TABLE: u16 = 1;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_LIST_ELEM: u16 = 1;
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_USERDATA: u16 = 6;
const NFTA_SET_ELEM_KEY_END: u16 = 10;
const NFTA_DATA_VALUE: u16 = 1;
const UDATA_COMMENT: u8 = 0;
const INTERFACE_BYTES: usize = 16;

fn add_elements(elements: &[Element]) -> Result<()> {
    send_elements(elements, &[NFT_MSG_NEWSETELEM]).doing(|| "add to the firewall's sets".to_owned())
}

/// Added first, because removing what is not there would fail. No table, no elements.
fn remove_elements(elements: &[Element]) -> Result<()> {
    match send_elements(elements, &[NFT_MSG_NEWSETELEM, NFT_MSG_DELSETELEM]) {
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        done => done.doing(|| "remove from the firewall's sets".to_owned()),
    }
}

/// All in one transaction.
fn send_elements(elements: &[Element], kinds: &[u16]) -> io::Result<()> {
    if elements.is_empty() {
        return Ok(());
    }
    let [high, low] = NFNL_SUBSYS_NFTABLES.to_be_bytes();
    let mut messages = Messages::new();
    messages.begin_quietly(NFNL_MSG_BATCH_BEGIN, 0, &[0, 0, high, low]);
    for kind in kinds {
        for element in elements {
            let key = |address: IpAddr| {
                let mut key = element.interface.clone().into_bytes();
                key.resize(INTERFACE_BYTES, 0);
                match address {
                    IpAddr::V4(address) => key.extend(address.octets()),
                    IpAddr::V6(address) => key.extend(address.octets()),
                }
                key
            };
            let flags = if *kind == NFT_MSG_NEWSETELEM { CREATE } else { 0 };
            messages
                .begin(*kind, flags, &[NFPROTO_INET, 0, 0, 0])
                .text(NFTA_SET_ELEM_LIST_TABLE, &element.table)
                .text(NFTA_SET_ELEM_LIST_SET, &element.set)
                .nested(NFTA_SET_ELEM_LIST_ELEMENTS, |list| {
                    list.nested(NFTA_LIST_ELEM, |one| {
                        let value = |bytes: Vec<u8>| {
                            move |data: &mut Messages| {
                                data.attribute(NFTA_DATA_VALUE, &bytes);
                            }
                        };
                        one.nested(NFTA_SET_ELEM_KEY, value(key(element.first)));
                        if let Some(last) = element.last {
                            one.nested(NFTA_SET_ELEM_KEY_END, value(key(last)));
                        }
                        if *kind == NFT_MSG_NEWSETELEM {
                            one.attribute(NFTA_SET_ELEM_USERDATA, &comment(&element.comment));
                        }
                    });
                });
        }
    }
    messages.begin_quietly(NFNL_MSG_BATCH_END, 0, &[0, 0, high, low]);
    let last = (1 + kinds.len() * elements.len()) as u32;
    Netlink::firewall()?.send(&messages, last)
}

/// As `nft` keeps a comment: kind, length, text with its end.
fn comment(text: &str) -> Vec<u8> {
    let text = &text.as_bytes()[..text.len().min(127)];
    let mut bytes = vec![UDATA_COMMENT, text.len() as u8 + 1];
    bytes.extend(text);
    bytes.push(0);
    bytes
}
