//! What somebody who logged in runs: a shell, a command, or the file server; as whom, with what, and to what end.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::{AccessFlags, Pid, access};
use russh::server::{Handle, Msg};
use russh::{ChannelId, ChannelWriteHalf, Sig};
use tokio::process::{Child, Command};
use tokio::sync::oneshot;

use super::input::{Input, Source, queue};
use super::terminal::{Size, Terminal};
use crate::guest::app;
use crate::guest::command::{CODE_CANNOT_RUN, CannotRun, PATH_DEFAULT, resolve};
use crate::guest::roots::Entered;
use crate::guest::users::Identity;

/// Output that somebody else holds open is waited for so long after the last word.
const LINGER: Duration = Duration::from_millis(500);
/// From the hang-up to SIGKILL.
const GRACE: Duration = Duration::from_secs(2);
/// What an interactive user would type at the end.
const END_OF_INPUT: &[u8] = b"\x04";

pub enum Kind {
    Shell,
    Command(String),
    Files,
}

pub struct Asked<'a> {
    pub kind: Kind,
    pub login: &'a str,
    /// Of a container; None: the machine's own.
    pub root: Option<&'a str>,
    pub env: BTreeMap<String, String>,
    /// Its name and size.
    pub terminal: Option<(String, Size)>,
}

/// A program as the connection holds it; dropping it hangs up.
pub struct Running {
    /// None after the client said that this was all.
    pub input: Option<Input>,
    pub terminal: Option<Terminal>,
    pub pid: i32,
    pub present: oneshot::Sender<()>,
}

pub struct Reply {
    pub handle: Handle,
    pub channel: ChannelId,
    pub writer: ChannelWriteHalf<Msg>,
}

pub fn begin(asked: Asked<'_>, reply: Reply) -> Result<Running, (CannotRun, Reply)> {
    match spawn(asked) {
        Ok((child, pid, terminal)) => {
            let (input, source) = queue();
            let (present, gone) = oneshot::channel();
            tokio::spawn(attend(child, pid, terminal.clone(), source, reply, gone));
            Ok(Running {
                input: Some(input),
                terminal,
                pid,
                present,
            })
        }
        Err(error) => Err((error, reply)),
    }
}

/// Say why nothing runs, the way a program would.
pub async fn apologize(error: CannotRun, reply: Reply) {
    let line = format!("{}\r\n", error.reason);
    let _ = reply.writer.extended_data_bytes(1, line.into_bytes()).await;
    let _ = reply.writer.exit_status(u32::try_from(error.code).unwrap_or(1)).await;
    let _ = reply.writer.eof().await;
    let _ = reply.writer.close().await;
}

fn spawn(asked: Asked<'_>) -> Result<(Child, i32, Option<Terminal>), CannotRun> {
    let refuse = |error: io::Error| CannotRun::new(CODE_CANNOT_RUN, format!("it cannot be run: {error}"));
    // Until it runs: accounts, shell, folders and terminal are then those of the container.
    let _inside = asked.root.map(Entered::enter).transpose().map_err(refuse)?;
    let identity = identify(asked.login)?;
    let shell = shell_of(identity.uid);
    let home = Path::new(&identity.home);
    let cwd = if home.is_dir() { home } else { Path::new("/") };

    let mut env = asked.env;
    env.remove("HOME");
    env.entry("PATH".to_owned()).or_insert_with(|| PATH_DEFAULT.to_owned());
    for (name, value) in [("USER", asked.login), ("LOGNAME", asked.login)] {
        env.insert(name.to_owned(), value.to_owned());
    }
    if let Some(shell) = &shell {
        env.insert("SHELL".to_owned(), shell.display().to_string());
    }
    if let Some((name, _)) = &asked.terminal {
        env.insert("TERM".to_owned(), name.clone());
    }

    let (program, argv) = match (asked.kind, shell) {
        (Kind::Files, _) => (
            "/proc/self/exe".into(),
            vec!["pantala-init".to_owned(), "sftp".to_owned()],
        ),
        (Kind::Shell, Some(shell)) => {
            let name = shell.file_name().unwrap_or_default().to_string_lossy().into_owned();
            (shell, vec![format!("-{name}")])
        }
        (Kind::Command(text), Some(shell)) => {
            let argv = vec![shell.display().to_string(), "-c".to_owned(), text];
            (shell, argv)
        }
        (Kind::Shell, None) => {
            let reason = "the image has no shell (no /bin/sh): run one of its programs as the command";
            return Err(CannotRun::new(CODE_CANNOT_RUN, reason));
        }
        // Without a shell, words are all that can be told apart.
        (Kind::Command(text), None) => {
            let argv: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
            let name = argv.first().map_or("", String::as_str);
            (resolve(name, env.get("PATH").map(String::as_str), cwd)?, argv)
        }
    };
    let mut command = app::command_for(&program, &argv, &env, &identity, cwd).map_err(refuse)?;
    let terminal = match asked.terminal {
        Some((_, size)) => {
            let no_terminal = |error| {
                CannotRun::new(
                    CODE_CANNOT_RUN,
                    format!("the machine has no terminal for this: {error}"),
                )
            };
            let (terminal, program_end) = Terminal::open(size, identity.uid).map_err(no_terminal)?;
            let another = || program_end.try_clone().map(Stdio::from);
            command.stdin(another().map_err(refuse)?);
            command.stdout(another().map_err(refuse)?);
            command.stderr(Stdio::from(program_end));
            Some(terminal)
        }
        None => {
            command
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped());
            None
        }
    };
    let child = Command::from(command).spawn().map_err(refuse)?;
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok()).unwrap_or(-1);
    Ok((child, pid, terminal))
}

/// An image without accounts still has a root.
fn identify(login: &str) -> Result<Identity, CannotRun> {
    let found = app::identify(login);
    let found = if login == "root" {
        found.or_else(|_| app::identify("0"))
    } else {
        found
    };
    found.map_err(|error| CannotRun::new(error.code, error.reason.replace("the app", "this session")))
}

/// The shell of this user if it can be run, else /bin/sh. Accounts of services have one that only says no; who may log in
/// is the certificate's business here.
fn shell_of(uid: u32) -> Option<PathBuf> {
    let passwd = app::table("/etc/passwd");
    let own = passwd.lines().find_map(|line| {
        let fields: Vec<&str> = line.split(':').collect();
        let [_, _, id, _, _, _, shell] = fields[..] else {
            return None;
        };
        (id.parse() == Ok(uid)).then(|| PathBuf::from(shell.trim()))
    });
    let refuses = |path: &PathBuf| path.ends_with("nologin") || path.ends_with("false");
    let candidates = own
        .into_iter()
        .filter(|path| !refuses(path))
        .chain([PathBuf::from("/bin/sh")]);
    candidates
        .into_iter()
        .find(|path| path.is_absolute() && path.is_file() && access(path, AccessFlags::X_OK).is_ok())
}

/// Carry input and output until it ended; its end is the channel's, and the client's is its own.
async fn attend(
    mut child: Child,
    pid: i32,
    terminal: Option<Terminal>,
    source: Source,
    reply: Reply,
    mut gone: oneshot::Receiver<()>,
) {
    let gauge = source.gauge.clone();
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    let feeding = async {
        match (terminal.clone(), stdin) {
            (Some(terminal), _) => source.feed(terminal, END_OF_INPUT).await,
            (None, Some(stdin)) => source.feed(stdin, b"").await,
            (None, None) => {}
        }
        std::future::pending::<()>().await;
    };
    let saying = async {
        let said = async {
            match (terminal.clone(), stdout) {
                (Some(terminal), _) => gauge.say(terminal, reply.writer.make_writer()).await,
                (None, Some(stdout)) => gauge.say(stdout, reply.writer.make_writer()).await,
                (None, None) => {}
            }
        };
        let complained = async {
            if let Some(stderr) = stderr {
                gauge.say(stderr, reply.writer.make_writer_ext(Some(1))).await;
            }
        };
        tokio::join!(said, complained);
    };
    let ending = async {
        let status = child.wait().await;
        // What it left behind may still have something to say, but not for ever.
        let silence = async {
            loop {
                tokio::time::sleep(LINGER).await;
                if !gauge.is_talking() {
                    return;
                }
            }
        };
        (status, silence)
    };
    tokio::pin!(feeding, saying, ending);
    let mut said = false;
    let mut ended = None;
    while ended.is_none() {
        tokio::select! {
            _ = &mut gone => break,
            () = &mut feeding => {}
            () = &mut saying, if !said => said = true,
            found = &mut ending => ended = Some(found),
        }
    }
    let Some((status, silence)) = ended else {
        hang_up(pid).await;
        return;
    };
    if !said {
        tokio::select! {
            _ = &mut gone => {}
            () = &mut saying => {}
            () = silence => {}
        }
    }
    signal_session(pid, Signal::SIGKILL);
    tell_end(status, &reply).await;
}

async fn tell_end(status: io::Result<ExitStatus>, reply: &Reply) {
    let signal = status
        .as_ref()
        .ok()
        .and_then(ExitStatus::signal)
        .and_then(|number| Signal::try_from(number).ok());
    if let Some(signal) = signal {
        let name = Sig::Custom(signal.as_str().trim_start_matches("SIG").to_owned());
        let _ = reply
            .handle
            .exit_signal_request(reply.channel, name, false, String::new(), String::new())
            .await;
    } else {
        let code = status.ok().and_then(|status| status.code()).unwrap_or(255);
        let _ = reply.writer.exit_status(u32::try_from(code).unwrap_or(255)).await;
    }
    let _ = reply.writer.eof().await;
    let _ = reply.writer.close().await;
}

/// The client is gone: so is all that it ran, after a moment to save what can be saved.
async fn hang_up(pid: i32) {
    signal_session(pid, Signal::SIGHUP);
    signal_session(pid, Signal::SIGCONT);
    tokio::time::sleep(GRACE).await;
    signal_session(pid, Signal::SIGKILL);
}

/// A signal that the client asked for: to the program and those of its group.
pub fn signal_group(pid: i32, signal: Signal) {
    if pid > 1 {
        let _ = nix::sys::signal::killpg(Pid::from_raw(pid), signal);
    }
}

/// A signal to every process of the session that `leader` began (a shell makes a group for each job).
fn signal_session(leader: i32, signal: Signal) {
    let Ok(entries) = fs::read_dir("/proc") else { return };
    for entry in entries.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        let Ok(stat) = fs::read_to_string(entry.path().join("stat")) else {
            continue;
        };
        if leader > 1 && pid > 1 && session_of(&stat) == Some(leader) {
            let _ = kill(Pid::from_raw(pid), signal);
        }
    }
}

/// `pid (name) state ppid pgrp session …`; the name may hold anything.
fn session_of(stat: &str) -> Option<i32> {
    let (_, rest) = stat.rsplit_once(')')?;
    rest.split_whitespace().nth(3)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_session_is_read_whatever_the_name() {
        assert_eq!(session_of("7 (a) b) S 1 5 42 0 -1"), Some(42));
        assert_eq!(session_of("7 nothing"), None);
    }
}
