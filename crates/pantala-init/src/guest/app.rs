//! Bringing the app up: identity, working directory, files, environment, execution.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use base64::Engine;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::unistd::{Gid, Uid, execve, setgid, setgroups, setsid, setuid};
use pantala_wire::guest::{GuestFile, Start};

use super::command::{self, CODE_CANNOT_RUN, CannotRun};
use super::users::{self, Identity};

const TABLE_BYTES_MAX: u64 = 4 * 1024 * 1024;

pub struct Running {
    pub pid: i32,
    pub stdout: OwnedFd,
    pub stderr: OwnedFd,
}

/// Run the app of `start` and what is to run beside it, the app first. Whatever cannot be done is a sentence for the
/// owner of the image; what had begun by then ends with the machine.
pub fn start(start: &Start) -> Result<Vec<Running>, CannotRun> {
    take_hostname(&start.hostname);
    let mut running = vec![begin(&start.argv, &start.env, &start.user, &start.cwd, &start.files)?];
    for process in &start.processes {
        running.push(begin(&process.argv, &process.env, &process.user, &process.cwd, &[])?);
    }
    Ok(running)
}

/// A program with its files, as its user, in its working directory.
pub fn begin(
    argv: &[String],
    env: &BTreeMap<String, String>,
    user: &str,
    cwd: &str,
    files: &[GuestFile],
) -> Result<Running, CannotRun> {
    let identity = identify(user)?;
    make_cwd(folder(cwd), &identity)?;
    for file in files {
        write_file(file)?;
    }
    run(argv, env, &identity, folder(cwd), Stdio::null())
}

fn folder(cwd: &str) -> &Path {
    Path::new(if cwd.is_empty() { "/" } else { cwd })
}

pub fn identify(user: &str) -> Result<Identity, CannotRun> {
    users::identify(user, &table("/etc/passwd"), &table("/etc/group"))
        .map_err(|error| CannotRun::new(CODE_CANNOT_RUN, format!("the app cannot run as user {user:?}: {error}")))
}

/// A file of the image that PID 1 reads itself: what is no file, or endless, is as good as absent.
pub fn table(path: &str) -> String {
    let mut text = Vec::new();
    let opened = fs::OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path);
    let read = opened.and_then(|file| match file.metadata()?.is_file() {
        true => file.take(TABLE_BYTES_MAX).read_to_end(&mut text),
        false => Ok(0),
    });
    read.map_or_else(|_| String::new(), |_| String::from_utf8_lossy(&text).into_owned())
}

/// A program in a session of its own, with the ends of its output that we read.
pub fn run(
    argv: &[String],
    env: &BTreeMap<String, String>,
    identity: &Identity,
    cwd: &Path,
    stdin: Stdio,
) -> Result<Running, CannotRun> {
    let name = argv.first().map_or("", String::as_str);
    let program = command::resolve(name, env.get("PATH").map(String::as_str), cwd)?;
    spawn(&program, argv, env, identity, cwd, stdin).map_err(|error| command::explain(&program, &error))
}

fn spawn(
    program: &Path,
    argv: &[String],
    env: &BTreeMap<String, String>,
    identity: &Identity,
    cwd: &Path,
    stdin: Stdio,
) -> io::Result<Running> {
    let (out_read, out_write) = pipe()?;
    let (err_read, err_write) = pipe()?;
    let mut command = command_for(program, argv, env, identity, cwd)?;
    command.stdin(stdin).stdout(out_write).stderr(err_write);
    let child = command.spawn()?;
    // The write ends live in `command`; the pipes must end when the app ends.
    drop(command);
    Ok(Running {
        pid: i32::try_from(child.id()).unwrap_or(i32::MAX),
        stdout: out_read,
        stderr: err_read,
    })
}

/// The program as that user, in a session of its own, whose terminal is its input if that is one.
pub fn command_for(
    program: &Path,
    argv: &[String],
    env: &BTreeMap<String, String>,
    identity: &Identity,
    cwd: &Path,
) -> io::Result<Command> {
    let path = CString::new(program.as_os_str().as_bytes())?;
    let words = argv.iter().map(|word| CString::new(word.as_str()));
    let words = words.collect::<Result<Vec<_>, _>>()?;
    let mut env = env.clone();
    env.entry("HOME".to_owned()).or_insert_with(|| identity.home.clone());
    let env = env.iter().map(|(name, value)| CString::new(format!("{name}={value}")));
    let env = env.collect::<Result<Vec<_>, _>>()?;
    let mut command = Command::new(program);
    command.current_dir(cwd);
    let (uid, gid) = (Uid::from_raw(identity.uid), Gid::from_raw(identity.gid));
    let groups: Vec<Gid> = identity.groups.iter().map(|&id| Gid::from_raw(id)).collect();
    let become_the_app = move || {
        // A session of its own: no terminal signal of ours reaches it. The group before the user: afterwards it
        // would no longer be allowed.
        setsid()?;
        // SAFETY: asks about descriptor 0 and takes it; no memory of ours is involved.
        unsafe {
            if libc::isatty(0) == 1 && libc::ioctl(0, libc::TIOCSCTTY, 0) < 0 {
                return Err(io::Error::last_os_error());
            }
        }
        default_signals()?;
        setgroups(&groups)?;
        setgid(gid)?;
        setuid(uid)?;
        // Not by `Command`, which has a shell run what the kernel does not: a program of another processor, say.
        match execve(&path, &words, &env)? {}
    };
    // SAFETY: runs in the forked child of a process with one thread, so that no lock is held, also not the allocator's
    // (PID 1 and `ssh` have one).
    unsafe { command.pre_exec(become_the_app) };
    Ok(command)
}

/// None is ignored because whoever started the host's agent did so (a shell, for what it has in its background): a
/// shell in the machine could not even trap the signal that is to stop it.
fn default_signals() -> nix::Result<()> {
    for number in 1..=libc::SIGRTMAX() {
        // SAFETY: no handler of ours is involved. What cannot be set (SIGKILL, those of the C library) needs no setting.
        unsafe { libc::signal(number, libc::SIG_DFL) };
    }
    unblock_signals()
}

pub fn unblock_signals() -> nix::Result<()> {
    let empty = nix::sys::signal::SigSet::empty();
    nix::sys::signal::sigprocmask(nix::sys::signal::SigmaskHow::SIG_SETMASK, Some(&empty), None)
}

/// A pipe whose read end does not block (init has one thread) while the app's end does.
fn pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&read, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

/// The other way round: for what a program reads.
pub fn input_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC)?;
    fcntl(&write, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    Ok((read, write))
}

/// Where the runtime has set the name already (containers may not do it themselves) a refusal changes nothing.
pub fn take_hostname(name: &str) {
    if !name.is_empty() {
        let _ = nix::unistd::sethostname(name);
    }
}

fn make_cwd(cwd: &Path, identity: &Identity) -> Result<(), CannotRun> {
    let refuse = |error: io::Error| {
        CannotRun::new(
            CODE_CANNOT_RUN,
            format!("the working directory {} cannot be made: {error}", cwd.display()),
        )
    };
    if !cwd.is_absolute() {
        return Err(CannotRun::new(
            CODE_CANNOT_RUN,
            format!("the working directory {} is not an absolute path", cwd.display()),
        ));
    }
    match fs::metadata(cwd) {
        Ok(metadata) if metadata.is_dir() => Ok(()),
        Ok(_) => Err(CannotRun::new(
            CODE_CANNOT_RUN,
            format!("the working directory {} is a file", cwd.display()),
        )),
        Err(_) => {
            fs::create_dir_all(cwd).map_err(refuse)?;
            chown(cwd, Some(identity.uid), Some(identity.gid)).map_err(refuse)
        }
    }
}

fn write_file(file: &GuestFile) -> Result<(), CannotRun> {
    let refuse = |error: &dyn std::fmt::Display| {
        CannotRun::new(
            CODE_CANNOT_RUN,
            format!("the file {} cannot be written: {error}", file.path),
        )
    };
    let path = Path::new(&file.path);
    if !path.is_absolute() {
        return Err(refuse(&"its path is not absolute"));
    }
    let content = base64::engine::general_purpose::STANDARD
        .decode(&file.content_base64)
        .map_err(|error| refuse(&error))?;
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).map_err(|error| refuse(&error))?;
    }
    // Made private first: the content may be a secret and the final mode comes after it.
    let written = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut out| {
            out.write_all(&content)?;
            out.set_permissions(fs::Permissions::from_mode(file.mode & 0o7777))
        });
    written.map_err(|error| refuse(&error))
}

/// Close-on-exec for what the runtime handed us: nothing of it reaches the app.
pub fn close_on_exec(fd: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: sets a flag on a descriptor that the caller owns.
    let done = unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_SETFD, libc::FD_CLOEXEC) };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}
