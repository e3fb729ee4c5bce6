//! `pantala-relay`: the distances between the regions of a box. Started by the box in its router's namespace.
//!
//! The router's firewall hands every packet that goes from one region to another to a netlink queue (NFQUEUE); the
//! packet itself stays in the kernel. The relay learns by which device it came and by which it will leave, holds it for
//! half of the round trip between the two regions, and lets it go (or loses it). One thread: it sleeps until the next
//! packet arrives or the next one is due. While it does not run, packets pass without delay.
#![forbid(unsafe_code)]

mod config;
mod control;
mod delays;
mod queue;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::config::Config;
use crate::control::{Command, Control};
use crate::delays::Delays;
use crate::queue::{Queue, Verdict};

const USAGE: &str = "usage: pantala-relay --settings FILE | --version";
/// Packets taken in one turn, so that those that are due never wait for a flood.
const TURN_MAX: usize = 128;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let settings = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["--version"] => {
            println!("pantala-relay {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        ["--settings", file] => PathBuf::from(file),
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match run(&settings) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pantala-relay: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run(settings: &std::path::Path) -> Result<(), Box<dyn std::error::Error>> {
    // A timer of this thread may fire a nanosecond late, not the usual 50 microseconds.
    rustix::thread::set_current_timer_slack(Some(std::num::NonZeroU64::MIN))?;
    let config = Config::read(settings)?;
    let mut queue = Queue::open(config.queue)?;
    let control = Control::listen(&config.control)?;
    let mut delays = Delays::new(config.table());
    let mut due: Vec<Verdict> = Vec::new();
    loop {
        wait(&queue, &control, delays.next())?;
        for _ in 0..TURN_MAX {
            let Some(packet) = queue.receive()? else { break };
            let now = Instant::now();
            if let Some(verdict) = delays.take(&packet, now, fastrand::f64()) {
                due.push(verdict);
            }
        }
        delays.release(Instant::now(), &mut due);
        queue.send(&due)?;
        due.clear();
        if let Some(mut asked) = control.accept() {
            match asked.command() {
                Command::Stats => asked.answer(&delays.stats()),
                Command::Reload => match Config::read(settings) {
                    Ok(fresh) => {
                        delays.replace(fresh.table());
                        asked.answer(&delays.stats());
                    }
                    // The old distances hold on; whoever asked is told.
                    Err(error) => asked.answer(&serde_json::json!({ "error": error.to_string() })),
                },
                Command::Unknown => asked.answer(&serde_json::json!({ "error": "say stats or reload" })),
            }
        }
    }
}

/// Until a packet or a question is there, or a packet is due.
fn wait(queue: &Queue, control: &Control, until: Option<Instant>) -> Result<(), Errno> {
    let timeout = until.map(|at| timespec(at.saturating_duration_since(Instant::now())));
    let mut watched = [PollFd::new(queue, PollFlags::IN), PollFd::new(control, PollFlags::IN)];
    match poll(&mut watched, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

fn timespec(duration: Duration) -> Timespec {
    Timespec {
        tv_sec: i64::try_from(duration.as_secs()).unwrap_or(i64::MAX),
        tv_nsec: i64::from(duration.subsec_nanos()),
    }
}
