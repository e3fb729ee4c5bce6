//! `pantala-proxy`: TLS, HTTP, TCP and DNS around the decisions of `pantala-route`. The README beside lists the steps of a
//! request with their files; started by the box or by systemd, told what to serve by the agent of its host.
#![forbid(unsafe_code)]

mod accept;
mod admin;
mod api;
mod body;
mod certificates;
mod codes;
mod compress;
mod connection;
mod control;
mod conversation;
mod dates;
mod dns;
mod drains;
mod expect;
mod forward;
mod gather;
mod generations;
mod h2c;
mod handover;
mod headers;
mod hello;
mod hints;
mod http;
mod http2;
mod ids;
mod instruction;
mod limits;
mod link;
mod log;
mod mesh;
mod notify;
mod objects;
mod park;
mod pool;
mod postgres;
mod queue;
mod raw;
mod remember;
mod replay;
mod request;
mod respond;
mod room;
mod select;
mod service;
mod settings;
mod shared;
mod shutdown;
mod slot;
mod statics;
mod store;
mod tickets;
mod timing;
mod tls;
mod trace;
mod tunnels;
mod upgrade;
mod wait;
mod wakes;
mod watched;
mod websocket;

use std::error::Error;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::sync::mpsc;
use tokio::time::timeout;

use crate::handover::sockets::{Key, Kind, Sockets};
use crate::handover::take::Before;
use crate::handover::{give, take};
use crate::shared::{Life, Shared};

/// A request is some forty small allocations.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

const USAGE: &str = "usage: pantala-proxy --settings FILE [--replace] | --version";
/// Frames of the agent that wait to be applied; it is slowed down beyond.
const EVENTS_MAX: usize = 64;
const INFORMED_WITHIN: Duration = Duration::from_secs(5);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (settings, replace) = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => {
            println!("pantala-proxy {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--settings", file] => (PathBuf::from(file), false),
        ["--settings", file, "--replace"] => (PathBuf::from(file), true),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&settings, replace) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pantala-proxy: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &std::path::Path, replace: bool) -> Result<(), Box<dyn Error>> {
    let settings = settings::read(settings)?;
    die_as_one();
    raise_descriptor_limit();
    let workers = thread::available_parallelism().map_or(1, usize::from);
    let (mut sockets, before) = match replace {
        true => take::ask(settings.wire.state_dir.as_ref()).map(|(sockets, before)| (sockets, Some(before)))?,
        false => (Sockets::default(), None),
    };
    let bound = accept::bind(&settings.listeners, workers, &mut sockets)?;
    let mesh_bound = settings
        .mesh_listen
        .map(|address| mesh::listen::bind(address, workers, &mut sockets));
    let mut mesh_bound = mesh_bound.transpose()?.unwrap_or_default().into_iter();
    let side = SideListeners::bind(&settings, &mut sockets)?;
    let dns = dns::bind(&settings, &mut sockets)?;
    let generations = generations::Generations::open(settings.wire.state_dir.as_ref())
        .map_err(|e| format!("state_dir: cannot use {}: {e}", settings.wire.state_dir))?;
    let life = if replace { Life::Arriving } else { Life::Serving };
    let (shared, commands) = Shared::new(settings, tls::Tls::new()?, life, sockets.into_kept(), workers);

    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let control = control::Control::new(shared.clone(), generations)?;
    let mut threads = Vec::new();
    for (index, bound) in bound.into_iter().enumerate() {
        let (shared, mesh_bound) = (shared.clone(), mesh_bound.next().unwrap_or_default());
        let work = move || accept::work(shared, index, bound, mesh_bound);
        threads.push(thread::Builder::new().name(format!("worker-{index}")).spawn(work)?);
    }
    let (asked, dns_thread) = (shared.clone(), thread::Builder::new().name("dns".to_owned()));
    threads.push(dns_thread.spawn(move || dns::work(asked, dns))?);
    if let Some(mesh) = shared.mesh.clone() {
        let (shared, mesh_thread) = (shared.clone(), thread::Builder::new().name("mesh".to_owned()));
        threads.push(mesh_thread.spawn(move || mesh::ping::work(shared, mesh))?);
    }
    let wire = &shared.settings.wire;
    log::info(
        "proxy started",
        &[("node", &wire.node), ("region", &wire.region), ("workers", &workers)],
    );
    runtime.block_on(serve(shared.clone(), side, control, commands, before))?;
    for thread in threads {
        thread.join().map_err(|_| "a worker ended badly")??;
    }
    log::info("proxy ended", &[]);
    Ok(())
}

/// Everything that is not a request runs on the main thread.
async fn serve(
    shared: Arc<Shared>,
    side: SideListeners,
    control: control::Control,
    commands: mpsc::Receiver<shared::Command>,
    before: Option<Before>,
) -> Result<(), Box<dyn Error>> {
    let (events, received) = mpsc::channel(EVENTS_MAX);
    let link = tokio::spawn(link::run(shared.settings.wire.agent_socket.clone().into(), events));
    let ending = tokio::spawn(shutdown::watch(shared.clone())?);
    if let Some(listener) = side.admin {
        tokio::spawn(admin::run(shared.clone(), listener));
    }
    for (listener, to) in side.api {
        tokio::spawn(api::run(shared.clone(), listener, to));
    }
    match before {
        Some(before) => {
            let mut replacing = tokio::spawn(replace_it(shared.clone(), before));
            let mut control = std::pin::pin!(control.run(received, commands));
            tokio::select! {
                replaced = &mut replacing => {
                    replaced??;
                    control.await;
                }
                () = control.as_mut() => {}
            }
        }
        None => {
            if let Err(error) = give::open(&shared) {
                log::warning("this proxy cannot be replaced", &[("reason", &error)]);
            }
            if let Err(error) = notify::serving() {
                log::warning("not said that this proxy serves", &[("reason", &error)]);
            }
            control.run(received, commands).await;
        }
    }
    link.abort();
    ending.abort();
    debug_assert!(*shared.life.borrow() == Life::Ending);
    Ok(())
}

/// Once the agent has told its rows, or is not there to tell them.
async fn replace_it(shared: Arc<Shared>, before: Before) -> std::io::Result<()> {
    let mut informed = shared.informed.subscribe();
    // The view on disk is a good one, should the agent be slow.
    let _ = timeout(INFORMED_WITHIN, informed.wait_for(|informed| *informed)).await;
    let serving = shared.clone();
    let runtime = tokio::runtime::Handle::current();
    tokio::task::spawn_blocking(move || before.serve_instead(&serving, runtime)).await?
}

/// Listeners beside the public ones, bound before anything is served.
struct SideListeners {
    admin: Option<TcpListener>,
    api: Vec<(TcpListener, SocketAddr)>,
}

impl SideListeners {
    fn bind(settings: &settings::Settings, sockets: &mut Sockets) -> std::io::Result<SideListeners> {
        let mut listen = |kind, address, early| {
            sockets.one(Key { kind, address }, || {
                accept::listen(address, false, early).map_err(|e| accept::named(e, address))
            })
        };
        let admin = settings
            .admin_listen
            .map(|socket| listen(Kind::Admin, socket, false))
            .transpose()?;
        let pairs = settings
            .api_forward
            .into_iter()
            .flat_map(|to| settings.api_listen.iter().map(move |from| (*from, to)));
        let api = pairs
            .map(|(from, to)| Ok((listen(Kind::Api, from, true)?, to)))
            .collect::<std::io::Result<_>>()?;
        Ok(SideListeners { admin, api })
    }
}

/// A thread that panics takes the process along: half a proxy would look alive.
fn die_as_one() {
    let usual = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        usual(info);
        std::process::abort();
    }));
}

/// Each connection is two descriptors; the usual soft limit is 1024.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(
        Resource::Nofile,
        Rlimit {
            current: limit.maximum,
            ..limit
        },
    ) {
        log::warning("descriptor limit not raised", &[("reason", &error)]);
    }
}
