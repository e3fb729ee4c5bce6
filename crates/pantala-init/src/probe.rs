//! `pantala-init probe`: one question to a port of the machine, begun by PID 1 for a container's health check.
//!
//! Exit code 0 and a line on stdout: well. No deadline of its own: PID 1 ends it.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::process::ExitCode;

use pantala_wire::guest::{GuestHealthcheck, Tls};

use crate::trust::{self, Trust};

const STATUS_LINE_BYTES_MAX: u64 = 4096;

/// What PID 1 runs for a check of a port.
pub fn arguments(check: &GuestHealthcheck) -> Vec<String> {
    let mut words = vec!["/proc/self/exe".to_owned(), "probe".to_owned()];
    if check.tcp_port != 0 {
        words.extend(["tcp".to_owned(), check.tcp_port.to_string()]);
        return words;
    }
    match check.tls {
        Tls::Off => words.push("http".to_owned()),
        // A name in front of the port, since those who are not verified may do without one.
        how => words.extend([
            if how == Tls::Verified {
                "https"
            } else {
                "https-unverified"
            }
            .to_owned(),
            check.tls_server_name.clone(),
        ]),
    }
    words.push(check.http_port.to_string());
    words.extend([check.http_method.clone(), check.http_path.clone()]);
    words.extend(
        check
            .http_headers
            .iter()
            .map(|(name, value)| format!("{name}: {value}")),
    );
    words
}

/// `tcp PORT`, `http PORT METHOD PATH [HEADER]...`, or `https NAME PORT METHOD PATH [HEADER]...`
pub fn run(arguments: &[String]) -> ExitCode {
    let outcome = match arguments {
        [kind, port] if kind == "tcp" => connect(port).map(|_| (true, "Success".to_owned())),
        [kind, port, method, path, headers @ ..] if kind == "http" => {
            connect(port).and_then(|stream| ask(stream, port, &request(port, method, path, headers)))
        }
        [kind, name, port, method, path, headers @ ..] if kind == "https" || kind == "https-unverified" => {
            let trust = if kind == "https" {
                Trust::public()
            } else {
                Trust::Anyone
            };
            connect(port)
                .and_then(|stream| trust::secure(stream, name, trust))
                .and_then(|stream| ask(stream, port, &request(port, method, path, headers)))
        }
        _ => Err(io::Error::other(
            "usage: pantala-init probe tcp PORT | http PORT METHOD PATH [HEADER]... | https NAME PORT METHOD PATH \
             [HEADER]...",
        )),
    };
    match outcome {
        Ok((good, said)) => {
            println!("{said}");
            ExitCode::from(u8::from(!good))
        }
        Err(error) => {
            println!("{error}");
            ExitCode::FAILURE
        }
    }
}

fn connect(port: &str) -> io::Result<TcpStream> {
    let port: u16 = port.parse().map_err(io::Error::other)?;
    TcpStream::connect(SocketAddr::from((Ipv4Addr::LOCALHOST, port)))
        .or_else(|first| TcpStream::connect(SocketAddr::from((Ipv6Addr::LOCALHOST, port))).map_err(|_| first))
        .map_err(|error| io::Error::other(format!("port {port}: {error}")))
}

fn request(port: &str, method: &str, path: &str, headers: &[String]) -> String {
    let mut head = format!("{method} {path} HTTP/1.1\r\nConnection: close\r\n");
    if !headers
        .iter()
        .any(|line| line.to_ascii_lowercase().starts_with("host:"))
    {
        head += &format!("Host: localhost:{port}\r\n");
    }
    for line in headers {
        head += &format!("{line}\r\n");
    }
    format!("{head}\r\n")
}

fn ask(mut stream: impl Read + Write, port: &str, request: &str) -> io::Result<(bool, String)> {
    stream.write_all(request.as_bytes())?;
    let mut line = String::new();
    BufReader::new(stream.take(STATUS_LINE_BYTES_MAX)).read_line(&mut line)?;
    let status: u16 = line
        .strip_prefix("HTTP/")
        .and_then(|rest| rest.split_whitespace().nth(1))
        .and_then(|word| word.parse().ok())
        .ok_or_else(|| io::Error::other(format!("port {port} does not speak HTTP")))?;
    Ok(((100..400).contains(&status), line.trim().to_owned()))
}
