//! `pantala-init`: PID 1 of every machine, and on the host the few system calls that bring one there.
//!
//! Without arguments it is PID 1 (`guest`): started by the container runtime inside the machine's namespaces with a
//! socket, a ring file and an exit record at descriptors 3, 4 and 5. `enclose`, `furnish` and `network` (`host`) run on the
//! host, called by `pantala.drivers.container` and `pantala.net`: they need calls that Python cannot make safely from
//! a process with threads (unshare, setns, idmapped mounts). One program, so that both ends of the inherited
//! descriptors always have the same version. `escape` tries to get out of a machine and says what held. `statics` is the file server beside an app, `probe` the question of a health
//! check, `ssh` and `sftp` are for who logs in; all are begun inside the machine, by PID 1.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod escape;
mod facts;
mod guest;
mod host;
mod probe;
mod sftp;
mod ssh;
mod statics;
mod trust;

use std::process::ExitCode;

fn main() -> ExitCode {
    let mut arguments = std::env::args().skip(1);
    match arguments.next().as_deref() {
        None => guest::run(),
        Some("--version") => {
            println!("pantala-init {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        Some("enclose") => host::report(host::enclose::run()),
        Some("statics") => statics::run(&arguments.collect::<Vec<_>>()),
        Some("ssh") => ssh::run(),
        Some("sftp") => sftp::run(),
        Some("escape") => escape::run(&arguments.collect::<Vec<_>>()),
        Some("probe") => probe::run(&arguments.collect::<Vec<_>>()),
        Some("furnish") => host::report(host::containers::furnish(&arguments.collect::<Vec<_>>())),
        Some("network") => host::report(host::network::run()),
        Some(other) => {
            eprintln!(
                "pantala-init: unknown command {other}; it is PID 1 without arguments, or: enclose, escape, furnish, \
                 network, probe, sftp, ssh, statics"
            );
            ExitCode::from(2)
        }
    }
}
