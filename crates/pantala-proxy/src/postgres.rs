//! Phase 2, `pg_tls`: Postgres clients ask in clear whether there is TLS and begin it only when told so. Everything else that
//! they may say first is answered as a server does that takes TLS only.
//! Source: the Postgres documentation, "Message Formats" (SSLRequest, GSSENCRequest, ErrorResponse).

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::{Instant, timeout_at};

use crate::hello::{Failed, HANDSHAKE_RECORD};

const SSL_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x2f];
const GSS_REQUEST: [u8; 8] = [0, 0, 0, 8, 0x04, 0xd2, 0x16, 0x30];
/// invalid_authorization_specification, as a server says that has only `hostssl` lines
const SQLSTATE: &str = "28000";
const REFUSAL: &str = "this server takes TLS connections only; set sslmode=require (or stricter)";

/// Returns when the next byte is the first of a ClientHello. `first`: a byte that was seen, not taken.
pub async fn ask(stream: &mut TcpStream, first: u8, by: Instant) -> Result<(), Failed> {
    if first == HANDSHAKE_RECORD {
        return Ok(()); // newer clients do not ask
    }
    match timeout_at(by, answer(stream)).await {
        Ok(Ok(true)) => Ok(()),
        Ok(Ok(false)) => Err(Failed {
            code: "PT04",
            why: "the client wanted to speak without TLS; set sslmode=require in its connection string".to_owned(),
        }),
        Ok(Err(_)) => Err(Failed {
            code: "PT03",
            why: "the client left before it asked for TLS".to_owned(),
        }),
        Err(_) => Err(Failed {
            code: "PT08",
            why: "the client did not ask for TLS in time".to_owned(),
        }),
    }
}

async fn answer(stream: &mut TcpStream) -> std::io::Result<bool> {
    let mut said = [0; 8];
    stream.read_exact(&mut said).await?;
    if said == GSS_REQUEST {
        stream.write_all(b"N").await?;
        stream.read_exact(&mut said).await?;
    }
    if said == SSL_REQUEST {
        // Nothing may have come behind the question in clear: what follows is read as TLS and nothing else.
        stream.write_all(b"S").await?;
        return Ok(true);
    }
    stream.write_all(&refusal()).await?;
    stream.shutdown().await?;
    Ok(false)
}

fn refusal() -> Vec<u8> {
    let fields = format!("SFATAL\0VFATAL\0C{SQLSTATE}\0M{REFUSAL}\0\0");
    let length = u32::try_from(fields.len() + 4).unwrap_or_default();
    [b"E", &length.to_be_bytes()[..], fields.as_bytes()].concat()
}
