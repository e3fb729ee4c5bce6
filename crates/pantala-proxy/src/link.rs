//! The unix socket to the agent: one JSON document a line both ways, connected again for ever.

use std::path::PathBuf;
use std::time::Duration;

use pantala_wire::feed::{AgentFrame, FEED_PROTOCOL, ProxyFrame};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::mpsc;
use tokio::time::sleep;

use crate::log;

const PAUSE_FIRST: Duration = Duration::from_millis(20);
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// A snapshot frame of thousands of rows is far below.
const LINE_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Frames that wait for a slow agent; beyond it the connection is given up.
const FRAMES_MAX: usize = 4096;

pub enum Event {
    Up(mpsc::Sender<ProxyFrame>),
    Frame(AgentFrame),
    Down,
    /// nobody listens
    Absent,
}

#[derive(Debug, thiserror::Error)]
enum LinkError {
    #[error("{0}")]
    Socket(#[from] std::io::Error),
    #[error("a line of more than {LINE_BYTES_MAX} bytes")]
    TooLong,
    #[error("the agent speaks feed protocol {0}, this proxy {FEED_PROTOCOL}")]
    Protocol(u32),
    #[error("the agent closed the connection")]
    Closed,
}

pub async fn run(socket: PathBuf, events: mpsc::Sender<Event>) {
    let mut pause = PAUSE_FIRST;
    let mut told = String::new();
    loop {
        let why = match UnixStream::connect(&socket).await {
            Ok(stream) => {
                pause = PAUSE_FIRST;
                told.clear();
                let why = session(stream, &events).await;
                if events.send(Event::Down).await.is_err() {
                    return;
                }
                why
            }
            Err(error) => {
                if told.is_empty() && events.send(Event::Absent).await.is_err() {
                    return;
                }
                error.into()
            }
        };
        let why = why.to_string();
        if why != told {
            log::warning("agent away", &[("socket", &socket.display()), ("reason", &why)]);
            told = why;
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Returns why it ended.
async fn session(stream: UnixStream, events: &mpsc::Sender<Event>) -> LinkError {
    let (read, write) = stream.into_split();
    let (frames, outgoing) = mpsc::channel(FRAMES_MAX);
    let hello = ProxyFrame::Hello {
        protocol: FEED_PROTOCOL,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        pid: std::process::id(),
    };
    if frames.try_send(hello).is_err() || events.send(Event::Up(frames)).await.is_err() {
        return LinkError::Closed;
    }
    tokio::select! {
        result = send(write, outgoing) => result.err().unwrap_or(LinkError::Closed),
        result = receive(read, events) => result.err().unwrap_or(LinkError::Closed),
    }
}

async fn send(mut write: OwnedWriteHalf, mut outgoing: mpsc::Receiver<ProxyFrame>) -> Result<(), LinkError> {
    while let Some(frame) = outgoing.recv().await {
        let mut line = serde_json::to_vec(&frame).map_err(std::io::Error::from)?;
        line.push(b'\n');
        write.write_all(&line).await?;
    }
    Ok(())
}

async fn receive(read: OwnedReadHalf, events: &mpsc::Sender<Event>) -> Result<(), LinkError> {
    let mut reader = BufReader::with_capacity(64 * 1024, read);
    let mut line = Vec::new();
    while next_line(&mut reader, &mut line).await? {
        match serde_json::from_slice::<AgentFrame>(&line) {
            Ok(AgentFrame::Hello { protocol, .. }) if protocol != FEED_PROTOCOL => {
                return Err(LinkError::Protocol(protocol));
            }
            Ok(frame) => {
                if events.send(Event::Frame(frame)).await.is_err() {
                    return Ok(());
                }
            }
            // A frame of a later version; what it would have changed comes with the next snapshot.
            Err(error) => log::warning(
                "frame not understood",
                &[("line", &error.line()), ("column", &error.column())],
            ),
        }
    }
    Ok(())
}

async fn next_line(reader: &mut BufReader<OwnedReadHalf>, line: &mut Vec<u8>) -> Result<bool, LinkError> {
    line.clear();
    loop {
        let buffer = reader.fill_buf().await?;
        if buffer.is_empty() {
            return Ok(false);
        }
        let end = buffer.iter().position(|b| *b == b'\n');
        let taken = end.map_or(buffer.len(), |at| at + 1);
        line.extend_from_slice(&buffer[..taken]);
        reader.consume(taken);
        if end.is_some() {
            return Ok(true);
        }
        if line.len() > LINE_BYTES_MAX {
            return Err(LinkError::TooLong);
        }
    }
}
