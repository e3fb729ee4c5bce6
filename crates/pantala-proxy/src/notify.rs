//! Tells whoever keeps this process running (systemd's `sd_notify`, at `$NOTIFY_SOCKET`) that it serves, and that it is the
//! main process of its unit from now on. Where nobody wants to know it, nothing is said.

use std::env;
use std::ffi::OsString;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

const SEND_MAX: Duration = Duration::from_secs(5);

pub fn serving() -> io::Result<()> {
    say(
        env::var_os("NOTIFY_SOCKET"),
        &format!("READY=1\nMAINPID={}", std::process::id()),
    )
}

pub fn stopping() -> io::Result<()> {
    say(env::var_os("NOTIFY_SOCKET"), "STOPPING=1")
}

fn say(to: Option<OsString>, what: &str) -> io::Result<()> {
    let Some(to) = to.filter(|to| !to.is_empty()) else {
        return Ok(());
    };
    let address = match to.as_bytes().strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(&to)?,
    };
    let socket = UnixDatagram::unbound()?;
    socket.set_write_timeout(Some(SEND_MAX))?;
    socket.send_to_addr(what.as_bytes(), &address).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn to_an_abstract_socket_too() {
        let name = format!("pantala-notify-{}", std::process::id());
        let address = SocketAddr::from_abstract_name(&name).unwrap();
        let heard = UnixDatagram::bind_addr(&address).unwrap();
        say(Some(format!("@{name}").into()), "READY=1").unwrap();
        let mut text = [0; 16];
        let read = heard.recv(&mut text).unwrap();
        assert_eq!(&text[..read], b"READY=1");
        say(None, "READY=1").unwrap();
        assert!(say(Some("/nobody/there".into()), "READY=1").is_err());
    }
}
