//! Phase 2, TLS: the ClientHello is read before anything is decided, so that certificate, protocols and versions follow the
//! port that it names; then the handshake. Each way to fail has its code.

use std::cell::RefCell;
use std::io::{Error, ErrorKind};

use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};
use tokio_rustls::StartHandshake;
use tokio_rustls::rustls::server::{Accepted, Acceptor, ClientHello};
use tokio_rustls::rustls::{self, ServerConfig};
use tokio_rustls::server::TlsStream;

use crate::certificates::ACME;

/// The type of a record that carries a handshake.
pub const HANDSHAKE_RECORD: u8 = 22;
const READ_BYTES: usize = 16 * 1024;

thread_local! {
    /// Read into by one connection after the other, so that a connection has no buffer of its own.
    static SCRATCH: RefCell<Box<[u8; READ_BYTES]>> = RefCell::new(Box::new([0; READ_BYTES]));
}

/// Why there was no handshake.
#[derive(Debug)]
pub struct Failed {
    /// one of Fly Proxy's error codes
    pub code: &'static str,
    pub why: String,
}

fn failed(code: &'static str, why: impl ToString) -> Failed {
    Failed {
        code,
        why: why.to_string(),
    }
}

pub enum Heard {
    Hello(Box<Accepted>),
    /// the client does not speak TLS
    Other,
}

pub async fn listen(stream: &mut TcpStream, by: Instant) -> Result<Heard, Failed> {
    match timeout_at(by, hear(stream)).await {
        Ok(heard) => heard,
        Err(_) => Err(failed("PT08", "the client said no ClientHello in time")),
    }
}

async fn hear(stream: &mut TcpStream) -> Result<Heard, Failed> {
    let (mut acceptor, mut first) = (Acceptor::default(), true);
    loop {
        stream.readable().await.map_err(of_io)?;
        let taken = SCRATCH.with_borrow_mut(|scratch| match stream.try_read(&mut scratch[..]) {
            Ok(0) => Err(of_io(ErrorKind::UnexpectedEof.into())),
            Ok(_) if first && scratch[0] != HANDSHAKE_RECORD => Ok(None),
            Ok(count) => feed(&mut acceptor, &scratch[..count]).map(Some),
            Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(Some(0)),
            Err(error) => Err(of_io(error)),
        });
        match taken? {
            None => return Ok(Heard::Other),
            Some(0) => continue,
            Some(_) => first = false,
        }
        match acceptor.accept() {
            Ok(Some(accepted)) => return Ok(Heard::Hello(Box::new(accepted))),
            Ok(None) => {}
            Err((error, mut alert)) => {
                let mut bytes = Vec::new();
                // Neither can fail in a way that matters: the connection ends here.
                let _ = alert.write_all(&mut bytes);
                let _ = stream.write_all(&bytes).await;
                return Err(failed("PT04", error));
            }
        }
    }
}

fn feed(acceptor: &mut Acceptor, mut bytes: &[u8]) -> Result<usize, Failed> {
    let count = bytes.len();
    while !bytes.is_empty() {
        if acceptor.read_tls(&mut bytes).map_err(of_io)? == 0 {
            break;
        }
    }
    Ok(count)
}

pub async fn finish(
    accepted: Accepted,
    config: Arc<ServerConfig>,
    stream: TcpStream,
    by: Instant,
) -> Result<TlsStream<TcpStream>, Failed> {
    let named = accepted.client_hello().server_name().map(str::to_owned);
    let handshake = StartHandshake::from_parts(accepted, stream).into_stream(config);
    match timeout_at(by, handshake).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err(error)) => Err(of_handshake(&error, named.as_deref())),
        Err(_) => Err(failed("PT08", "the client did not end the handshake in time")),
    }
}

/// Asks for the proof that an authority wants to see, and for nothing else.
pub fn wants_validation(hello: &ClientHello<'_>) -> bool {
    let mut offered = hello.alpn().into_iter().flatten();
    offered.next() == Some(ACME.as_bytes()) && offered.next().is_none()
}

fn of_io(error: Error) -> Failed {
    match error.kind() {
        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset | ErrorKind::BrokenPipe => {
            failed("PT03", "the client left during the handshake")
        }
        _ => failed("PT07", error),
    }
}

fn of_handshake(error: &Error, name: Option<&str>) -> Failed {
    let tls = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
    match (tls, name) {
        (None, _) => of_io(Error::new(error.kind(), error.to_string())),
        // That no certificate was found comes as a text.
        (Some(rustls::Error::General(_)), Some(name)) => failed("PT05", format!("there is no certificate for {name}")),
        (Some(rustls::Error::General(_)), None) => failed(
            "PT06",
            "the client named no host, so there is no certificate; let it say whom it wants (SNI)",
        ),
        (Some(rustls::Error::AlertReceived(alert)), _) => failed("PT04", format!("the client refused it ({alert:?})")),
        (Some(error), _) => failed("PT04", error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_way_to_fail_has_its_code() {
        let tls = |error: rustls::Error| Error::new(ErrorKind::InvalidData, error);
        let none = || {
            tls(rustls::Error::General(
                "no server certificate chain resolved".to_owned(),
            ))
        };
        for (error, name, code) in [
            (none(), Some("web.test"), "PT05"),
            (none(), None, "PT06"),
            (tls(rustls::Error::NoApplicationProtocol), Some("web.test"), "PT04"),
            (
                tls(rustls::Error::AlertReceived(rustls::AlertDescription::UnknownCA)),
                None,
                "PT04",
            ),
            (ErrorKind::UnexpectedEof.into(), None, "PT03"),
            (ErrorKind::ConnectionReset.into(), None, "PT03"),
            (ErrorKind::OutOfMemory.into(), None, "PT07"),
        ] {
            assert_eq!(of_handshake(&error, name).code, code, "{error}");
        }
    }
}
