//! Public names: asked of the operator's resolvers, over UDP and, when the answer does not fit, over TCP.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::timeout;

const UDP_TIMEOUT: Duration = Duration::from_millis(1500);
const TCP_TIMEOUT: Duration = Duration::from_secs(3);
const ROUNDS: usize = 2;
const TRUNCATED: u8 = 0x02;

/// The first answer that comes, with the asker's id.
pub async fn ask(query: &[u8], resolvers: &[SocketAddr]) -> Option<Vec<u8>> {
    let asked_id = query.get(..2)?.to_vec();
    let mut query = query.to_vec();
    for resolver in (0..ROUNDS).flat_map(|_| resolvers) {
        // An id of our own and a port of its own for each question: answers are hard to forge.
        query[..2].copy_from_slice(&fastrand::u16(..).to_be_bytes());
        let Ok(Ok(mut answer)) = timeout(UDP_TIMEOUT, over_udp(&query, *resolver)).await else {
            continue;
        };
        if answer[2] & TRUNCATED != 0
            && let Ok(Ok(whole)) = timeout(TCP_TIMEOUT, over_tcp(&query, *resolver)).await
        {
            answer = whole;
        }
        answer[..2].copy_from_slice(&asked_id);
        return Some(answer);
    }
    None
}

async fn over_udp(query: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
    let local: SocketAddr = match resolver {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(local).await?;
    socket.connect(resolver).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; 4096];
    loop {
        let length = socket.recv(&mut buffer).await?;
        if answers(query, &buffer[..length]) {
            buffer.truncate(length);
            return Ok(buffer);
        }
    }
}

async fn over_tcp(query: &[u8], resolver: SocketAddr) -> io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(resolver).await?;
    let length = u16::try_from(query.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes()[..], query].concat()).await?;
    let length = stream.read_u16().await?;
    let mut answer = vec![0; usize::from(length)];
    stream.read_exact(&mut answer).await?;
    if answers(query, &answer) {
        Ok(answer)
    } else {
        Err(io::Error::other("not an answer to this query"))
    }
}

/// Same id, a response, and the same question.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    const HEADER: usize = 12;
    let Some(question) = question_end(query).map(|end| &query[HEADER..end]) else {
        return false;
    };
    let repeated = answer.get(HEADER..HEADER + question.len());
    answer.len() >= HEADER
        && answer[..2] == query[..2]
        && answer[2] & 0x80 != 0
        && repeated.is_some_and(|repeated| repeated.eq_ignore_ascii_case(question))
}

fn question_end(message: &[u8]) -> Option<usize> {
    let mut at = 12;
    loop {
        let length = usize::from(*message.get(at)?);
        at += 1 + length;
        if length == 0 {
            return (at + 4 <= message.len()).then_some(at + 4);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_answer_to_the_question() {
        let query = b"\x01\x02\x01\0\0\x01\0\0\0\0\0\0\x03web\x04test\0\0\x01\0\x01";
        let mut answer = query.to_vec();
        answer[2] |= 0x80;
        assert!(answers(query, &answer));
        for (at, byte) in [(0, 9), (2, 1), (14, b'x')] {
            let mut other = answer.clone();
            other[at] = byte;
            assert!(!answers(query, &other), "byte {at}");
        }
        assert!(!answers(query, b"short"));
    }
}
