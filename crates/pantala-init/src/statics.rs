//! The file server of a machine's `statics`: a process of its own beside the app, asked by the proxy of the machine's host
//! before the app is. It answers for files only; for everything else it says so, and the request goes to the app.
//!
//! Listens on the machine's IPv4, which is closed to all but its host. No path leaves the folder that it was given: the
//! kernel refuses `..` and symbolic links (`openat2`).

use std::fs::File;
use std::io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::MetadataExt;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};
use std::thread;
use std::time::Duration;

use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use pantala_wire::guest::{STATICS_MISSING, StaticPath, Statics};

const CONNECTIONS_MAX: usize = 128;
const HEAD_BYTES_MAX: usize = 32 * 1024;
/// What is written at once.
const BLOCK: usize = 64 * 1024;
/// The proxy keeps connections for about 4 s.
const SILENCE_MAX: Duration = Duration::from_secs(30);

/// Begins the process; it ends with the machine.
pub fn start(statics: &Statics) -> io::Result<()> {
    let mut command = Command::new("/proc/self/exe");
    command.arg("statics").arg(&statics.listen);
    for path in &statics.paths {
        command.arg(&path.url_prefix).arg(&path.guest_path);
    }
    command
        .env_clear()
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    command.spawn().map(drop)
}

/// `pantala-init statics LISTEN [PREFIX FOLDER]...`
pub fn run(arguments: &[String]) -> ExitCode {
    let [listen, paths @ ..] = arguments else {
        eprintln!("usage: pantala-init statics IP:PORT [URL_PREFIX FOLDER]...");
        return ExitCode::from(2);
    };
    let pairs = paths.chunks_exact(2).map(|pair| StaticPath {
        url_prefix: pair[0].clone(),
        guest_path: pair[1].clone(),
    });
    match serve(listen, pairs.collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pantala-init: statics on {listen}: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(listen: &str, paths: Vec<StaticPath>) -> io::Result<()> {
    let address: SocketAddr = listen.parse().map_err(io::Error::other)?;
    let listener = TcpListener::bind(address)?;
    let (paths, open) = (Arc::new(paths), Arc::new(AtomicUsize::new(0)));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if open.fetch_add(1, SeqCst) >= CONNECTIONS_MAX {
            open.fetch_sub(1, SeqCst);
            continue; // closed: the proxy asks the app instead
        }
        let (paths, open) = (paths.clone(), open.clone());
        thread::spawn(move || {
            // Its errors are the end of one connection.
            let _ = converse(stream, &paths);
            open.fetch_sub(1, SeqCst);
        });
    }
    Ok(())
}

fn converse(stream: TcpStream, paths: &[StaticPath]) -> io::Result<()> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(SILENCE_MAX))?;
    stream.set_write_timeout(Some(SILENCE_MAX))?;
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut writer = BufWriter::with_capacity(BLOCK, stream);
    while let Some(asked) = Asked::read(&mut reader)? {
        answer(&asked, paths, &mut writer)?;
        writer.flush()?;
    }
    Ok(())
}

#[derive(Debug, Default)]
struct Asked {
    method: String,
    path: String,
    range: String,
    if_range: String,
    if_none_match: String,
    if_modified_since: String,
}

impl Asked {
    /// None at the end of the connection.
    fn read(reader: &mut impl Read) -> io::Result<Option<Asked>> {
        let mut head = Vec::new();
        let mut byte = [0];
        while !head.ends_with(b"\r\n\r\n") {
            if reader.read(&mut byte)? == 0 {
                return Ok(None);
            }
            head.push(byte[0]);
            if head.len() > HEAD_BYTES_MAX {
                return Err(io::ErrorKind::InvalidData.into());
            }
        }
        let head = String::from_utf8_lossy(&head);
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap_or_default().split(' ');
        let mut asked = Asked {
            method: first.next().unwrap_or_default().to_owned(),
            path: first.next().unwrap_or_default().to_owned(),
            ..Asked::default()
        };
        for (name, value) in lines.filter_map(|line| line.split_once(':')) {
            let field = match name.to_ascii_lowercase().as_str() {
                "range" => &mut asked.range,
                "if-range" => &mut asked.if_range,
                "if-none-match" => &mut asked.if_none_match,
                "if-modified-since" => &mut asked.if_modified_since,
                _ => continue,
            };
            value.trim().clone_into(field);
        }
        Ok(Some(asked))
    }
}

fn answer(asked: &Asked, paths: &[StaticPath], out: &mut impl Write) -> io::Result<()> {
    let Some((mut file, name)) = find(&asked.path, paths) else {
        return write!(
            out,
            "HTTP/1.1 404 Not Found\r\n{STATICS_MISSING}: 1\r\nContent-Length: 0\r\n\r\n"
        );
    };
    let metadata = file.metadata()?;
    let size = metadata.size();
    let tag = format!("\"{size:x}-{:x}-{:x}\"", metadata.mtime(), metadata.mtime_nsec());
    let modified = http_date(metadata.mtime());
    let about = format!("ETag: {tag}\r\nLast-Modified: {modified}\r\nAccept-Ranges: bytes\r\n");
    if unchanged(asked, &tag, &modified) {
        return write!(out, "HTTP/1.1 304 Not Modified\r\n{about}\r\n");
    }
    let ranged = asked.if_range.is_empty() || asked.if_range == tag || asked.if_range == modified;
    let part = if ranged { part(&asked.range, size) } else { Part::Whole };
    let (status, from, length, range) = match part {
        Part::Whole => ("200 OK", 0, size, String::new()),
        Part::Some(from, to) => {
            let range = format!("Content-Range: bytes {from}-{to}/{size}\r\n");
            ("206 Partial Content", from, to - from + 1, range)
        }
        Part::None => {
            let range = format!("Content-Range: bytes */{size}\r\n");
            ("416 Range Not Satisfiable", 0, 0, range)
        }
    };
    let kind = pantala_wire::media::content_type(&name);
    write!(
        out,
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\n{range}{about}\r\n"
    )?;
    if asked.method != "HEAD" && length > 0 {
        file.seek(SeekFrom::Start(from))?;
        let copied = io::copy(&mut file.take(length), out)?;
        if copied < length {
            return Err(io::ErrorKind::UnexpectedEof.into()); // it shrank: the connection ends instead
        }
    }
    Ok(())
}

fn unchanged(asked: &Asked, tag: &str, modified: &str) -> bool {
    if asked.if_none_match.is_empty() {
        return asked.if_modified_since == modified;
    }
    let weak = |known: &str| known.trim().strip_prefix("W/").unwrap_or(known.trim()).to_owned();
    asked
        .if_none_match
        .split(',')
        .any(|known| known.trim() == "*" || weak(known) == tag)
}

/// The file of a path, with its last name.
fn find(path: &str, paths: &[StaticPath]) -> Option<(File, String)> {
    let path = path.split(['?', '#']).next().unwrap_or_default();
    let (folder, rest) = paths.iter().find_map(|one| {
        let rest = path.strip_prefix(one.url_prefix.trim_end_matches('/'))?;
        Some((&one.guest_path, rest.strip_prefix('/')?))
    })?;
    let names: Option<Vec<String>> = rest.split('/').map(plain).collect();
    let names = names?;
    let folder = File::open(folder).ok()?;
    let how = OpenHow::new()
        .flags(OFlag::O_RDONLY | OFlag::O_CLOEXEC | OFlag::O_NONBLOCK | OFlag::O_NOCTTY)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
    let file = File::from(openat2(&folder, names.join("/").as_str(), how).ok()?);
    let regular = file.metadata().is_ok_and(|metadata| metadata.is_file());
    regular.then(|| (file, names.last().cloned().unwrap_or_default()))
}

/// One name of a path, decoded; none for what only tricks write.
fn plain(name: &str) -> Option<String> {
    let bytes = name.as_bytes();
    let (mut decoded, mut at) = (Vec::with_capacity(bytes.len()), 0);
    while at < bytes.len() {
        if bytes[at] == b'%' {
            let digits = name.get(at + 1..at + 3)?;
            decoded.push(u8::from_str_radix(digits, 16).ok()?);
            at += 3;
        } else {
            decoded.push(bytes[at]);
            at += 1;
        }
    }
    let name = String::from_utf8(decoded).ok()?;
    let trick = name.is_empty() || name == "." || name == ".." || name.contains(['/', '\0', '\\']);
    (!trick).then_some(name)
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Whole,
    /// from and to, both included
    Some(u64, u64),
    None,
}

/// One range; several are answered with the whole.
fn part(range: &str, size: u64) -> Part {
    let Some(range) = range.strip_prefix("bytes=").filter(|range| !range.contains(',')) else {
        return Part::Whole;
    };
    let Some((from, to)) = range.trim().split_once('-') else {
        return Part::Whole;
    };
    match (from.parse::<u64>(), to.parse::<u64>()) {
        (Ok(from), Ok(to)) if from > to => Part::Whole,
        (Ok(from), _) if from >= size => Part::None,
        (Ok(from), Ok(to)) => Part::Some(from, to.min(size - 1)),
        (Ok(from), Err(_)) if to.is_empty() => Part::Some(from, size - 1),
        (Err(_), Ok(last)) if from.is_empty() && last > 0 && size > 0 => {
            Part::Some(size.saturating_sub(last), size - 1)
        }
        (Err(_), Ok(_)) if from.is_empty() => Part::None,
        _ => Part::Whole,
    }
}

/// `Sun, 06 Nov 1994 08:49:37 GMT`
fn http_date(seconds: i64) -> String {
    const DAYS: [&str; 7] = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"];
    const MONTHS: [&str; 12] = [
        "Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec",
    ];
    let (days, time) = (seconds.div_euclid(86_400), seconds.rem_euclid(86_400));
    // Counted from 1 March 0000, so that the day of a leap year is a year's last.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted.div_euclid(146_097), shifted.rem_euclid(146_097));
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 2 } else { month - 10 };
    let year = year_of_era + era * 400 + i64::from(month < 2);
    format!(
        "{}, {day:02} {} {year:04} {:02}:{:02}:{:02} GMT",
        DAYS[days.rem_euclid(7) as usize],
        MONTHS[month as usize],
        time / 3_600,
        time / 60 % 60,
        time % 60
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    fn site() -> (tempfile::TempDir, Vec<StaticPath>) {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("public");
        fs::create_dir_all(root.join("css")).unwrap();
        fs::write(root.join("css/a b.css"), "body{}").unwrap();
        fs::write(folder.path().join("secret"), "no").unwrap();
        symlink("../secret", root.join("link")).unwrap();
        symlink("css", root.join("folder")).unwrap();
        let path = StaticPath {
            url_prefix: "/static/".into(),
            guest_path: root.to_str().unwrap().into(),
        };
        (folder, vec![path])
    }

    #[test]
    fn files_and_nothing_else() {
        let (_folder, paths) = site();
        assert_eq!(find("/static/css/a%20b.css?v=1", &paths).unwrap().1, "a b.css");
        for missing in [
            "/static",
            "/static/",
            "/static/css",
            "/static/css/",
            "/static/none",
            "/staticcss/a%20b.css",
            "/static//css/a%20b.css",
            "/static/../secret",
            "/static/%2e%2e/secret",
            "/static/css/..%2f..%2fsecret",
            "/static/css/%2e%2e/%2e%2e/secret",
            "/static/link",
            "/static/folder/a%20b.css",
            "/static/css/a%00b",
            "/static/css/%zz",
            "/static/css/%e4",
        ] {
            assert!(find(missing, &paths).is_none(), "{missing}");
        }
    }

    #[test]
    fn ranges() {
        for (range, wanted) in [
            ("", Part::Whole),
            ("bytes=0-3", Part::Some(0, 3)),
            ("bytes=4-", Part::Some(4, 9)),
            ("bytes=-3", Part::Some(7, 9)),
            ("bytes=-30", Part::Some(0, 9)),
            ("bytes=8-99", Part::Some(8, 9)),
            ("bytes=10-", Part::None),
            ("bytes=-0", Part::None),
            ("bytes=5-2", Part::Whole),
            ("bytes=0-1,3-4", Part::Whole),
            ("lines=0-1", Part::Whole),
            ("bytes=x-1", Part::Whole),
        ] {
            assert_eq!(part(range, 10), wanted, "{range}");
        }
        assert_eq!(part("bytes=0-", 0), Part::None);
    }

    #[test]
    fn dates() {
        assert_eq!(http_date(784_111_777), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(http_date(951_782_400), "Tue, 29 Feb 2000 00:00:00 GMT");
        assert_eq!(http_date(0), "Thu, 01 Jan 1970 00:00:00 GMT");
    }
}
