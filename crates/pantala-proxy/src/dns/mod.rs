//! DNS on a thread of its own, so that neither can slow the other: for machines (`.internal`, and public names forwarded)
//! and for a box (its own names). Each asker has a rate, all forwarding together a bound.

mod answers;
mod forward;
mod rate;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use hickory_proto::op::{Message, ResponseCode};
use pantala_route::internal::{Network, network_of};
use socket2::{Domain, Protocol, Socket, Type};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use crate::dns::answers::{Decision, Public, Zone};
use crate::dns::rate::Rates;
use crate::handover::sockets::{Key, Kind, Sockets};
use crate::settings::Settings;
use crate::shared::{Life, Shared};

const FORWARDED_MAX: usize = 512;
const TCP_CONNECTIONS_MAX: usize = 256;
const TCP_IDLE_MAX: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(20);
/// Without EDNS an answer over UDP has at most this; with it we go no further than what passes unfragmented.
const UDP_BYTES: u16 = 512;
const UDP_BYTES_MAX: u16 = 1232;

/// Bound before anything is served.
pub struct Bound {
    sockets: Vec<(Zone, std::net::UdpSocket, std::net::TcpListener)>,
}

pub fn bind(settings: &Settings, passed: &mut Sockets) -> io::Result<Bound> {
    let zones = [
        (Zone::Machines, &settings.dns_listen),
        (Zone::Public, &settings.dns_public_listen),
    ];
    let mut sockets = Vec::new();
    for (zone, addresses) in zones {
        for address in addresses {
            let named = |e| crate::accept::named(e, *address);
            let key = |kind| Key {
                kind,
                address: *address,
            };
            let udp = passed.one(key(Kind::DnsUdp), || {
                socket(*address, Type::DGRAM).map(Into::into).map_err(named)
            })?;
            let tcp = passed.one(key(Kind::DnsTcp), || {
                let tcp = socket(*address, Type::STREAM).map_err(named)?;
                tcp.listen(128).map_err(named)?;
                Ok(tcp.into())
            })?;
            sockets.push((zone, udp, tcp));
        }
    }
    Ok(Bound { sockets })
}

fn socket(address: SocketAddr, kind: Type) -> io::Result<Socket> {
    let protocol = if kind == Type::DGRAM {
        Protocol::UDP
    } else {
        Protocol::TCP
    };
    let socket = Socket::new(Domain::for_address(address), kind, Some(protocol))?;
    if kind == Type::STREAM {
        socket.set_reuse_address(true)?;
    }
    if address.is_ipv6() {
        socket.set_only_v6(true)?;
        socket.set_freebind_v6(true)?; // the agent may add the address a moment later
    } else {
        socket.set_freebind_v4(true)?;
    }
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket)
}

struct Server {
    shared: Arc<Shared>,
    rates: Rates,
    forwarding: Arc<Semaphore>,
}

/// The whole life of the DNS thread.
pub fn work(shared: Arc<Shared>, bound: Bound) -> io::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let per_s = shared.settings.wire.dns.queries_per_s_max;
        let server = Server {
            shared: shared.clone(),
            rates: Rates::new(per_s),
            forwarding: Arc::new(Semaphore::new(FORWARDED_MAX)),
        };
        let server = Arc::new(server);
        let connections = Arc::new(Semaphore::new(TCP_CONNECTIONS_MAX));
        shared.serving().await;
        for (zone, udp, tcp) in bound.sockets {
            tokio::spawn(serve_udp(server.clone(), zone, Arc::new(UdpSocket::from_std(udp)?)));
            tokio::spawn(serve_tcp(
                server.clone(),
                zone,
                TcpListener::from_std(tcp)?,
                connections.clone(),
            ));
        }
        let mut life = shared.life.subscribe();
        let _ = life.wait_for(|life| *life == Life::Ending).await;
        Ok(())
    })
}

async fn serve_udp(server: Arc<Server>, zone: Zone, socket: Arc<UdpSocket>) {
    let mut buffer = vec![0; 4096];
    loop {
        let received = tokio::select! {
            () = server.shared.replaced() => return,
            received = socket.recv_from(&mut buffer) => received,
        };
        let Ok((length, asker)) = received else {
            sleep(PAUSE).await; // an ICMP error of an earlier answer, or no memory
            continue;
        };
        let query = buffer[..length].to_vec();
        match server.judge(zone, &query, asker) {
            Some(Decision::Answer(answer)) => send_udp(&socket, &answer, &query, asker).await,
            Some(Decision::Forward) => {
                let (server, socket) = (server.clone(), socket.clone());
                tokio::spawn(async move {
                    if let Some(answer) = server.forward(&query).await {
                        send_udp(&socket, &answer, &query, asker).await;
                    }
                });
            }
            None => {}
        }
    }
}

/// Lost answers are asked for again.
async fn send_udp(socket: &UdpSocket, answer: &[u8], query: &[u8], asker: SocketAddr) {
    let fits = usize::from(answers::udp_bytes(query).clamp(UDP_BYTES, UDP_BYTES_MAX));
    if answer.len() <= fits {
        let _ = socket.send_to(answer, asker).await;
    } else if let Some(truncated) = answers::truncated(query) {
        let _ = socket.send_to(&truncated, asker).await;
    }
}

async fn serve_tcp(server: Arc<Server>, zone: Zone, listener: TcpListener, connections: Arc<Semaphore>) {
    loop {
        let accepted = tokio::select! {
            () = server.shared.replaced() => return,
            accepted = listener.accept() => accepted,
        };
        let Ok((stream, asker)) = accepted else {
            sleep(PAUSE).await;
            continue;
        };
        let Ok(place) = connections.clone().try_acquire_owned() else {
            continue;
        }; // over the bound: closed
        let server = server.clone();
        tokio::spawn(async move {
            // A broken connection concerns only its asker.
            let _ = converse(&server, zone, stream, asker).await;
            drop(place);
        });
    }
}

async fn converse(server: &Server, zone: Zone, mut stream: TcpStream, asker: SocketAddr) -> io::Result<()> {
    loop {
        let length = timeout(TCP_IDLE_MAX, stream.read_u16()).await??;
        let mut query = vec![0; usize::from(length)];
        timeout(TCP_IDLE_MAX, stream.read_exact(&mut query)).await??;
        let answer = match server.judge(zone, &query, asker) {
            Some(Decision::Answer(answer)) => answer,
            Some(Decision::Forward) => match server.forward(&query).await {
                Some(answer) => answer,
                None => return Ok(()),
            },
            None => return Ok(()),
        };
        let Ok(length) = u16::try_from(answer.len()) else {
            return Ok(());
        };
        let framed = [&length.to_be_bytes()[..], &answer].concat();
        timeout(TCP_IDLE_MAX, stream.write_all(&framed)).await??;
    }
}

impl Server {
    /// Nothing for what is no query.
    fn judge(&self, zone: Zone, query: &[u8], asker: SocketAddr) -> Option<Decision> {
        let metrics = &self.shared.metrics;
        metrics.dns_queries.fetch_add(1, Relaxed);
        if !self.rates.allow(asker.ip()) {
            metrics.dns_refused.fetch_add(1, Relaxed);
            return answers::refusal(query, ResponseCode::Refused).map(Decision::Answer);
        }
        let message = Message::from_vec(query).ok()?;
        let view = self.shared.view();
        let distance = |region: &str| self.distance(region);
        let network = network_of(asker.ip()).map(|id| Network {
            id,
            snapshot: &view.snapshot,
            distance: &distance,
        });
        let settings = &self.shared.settings;
        let public = Public {
            names: &settings.dns_public_names,
            texts: &view.snapshot.texts,
            app_domain: &settings.wire.app_domain,
            own_addresses: &view.snapshot.own_addresses,
        };
        answers::decide(zone, &message, public, network.as_ref())
    }

    fn distance(&self, region: &str) -> u32 {
        match &self.shared.mesh {
            _ if region == self.shared.settings.wire.region => 0,
            Some(mesh) => mesh.peers.distance(region),
            None => u32::MAX,
        }
    }

    async fn forward(&self, query: &[u8]) -> Option<Vec<u8>> {
        let resolvers = &self.shared.settings.dns_forward;
        let answer = match self.forwarding.try_acquire() {
            Ok(_place) => forward::ask(query, resolvers).await,
            Err(_) => None,
        };
        answer.or_else(|| answers::refusal(query, ResponseCode::ServFail))
    }
}
