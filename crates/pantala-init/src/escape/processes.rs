//! Attempts on processes: PID 1 of this machine, which belongs to the platform, and processes of the host.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::path::Path;

use nix::errno::Errno;

use super::attempt::{Attempt, NO, Need, Tried, address, judge, syscall};
use super::{Aims, files};

const GONE: &[Errno] = &[Errno::ESRCH, Errno::ENOENT];
const PTRACE_SEIZE: libc::c_long = 0x4206;

pub fn attempts() -> Vec<Attempt> {
    let one = |name, act| Attempt {
        name,
        need: Need::Nothing,
        act,
    };
    vec![
        one("ptrace-init", |_| traced(1)),
        one("ptrace-host", |aims| hosts(aims, traced)),
        one("write-memory-of-init", |_| written(1)),
        one("write-memory-of-host", |aims| hosts(aims, written)),
        one("memory-file-of-init", |_| {
            opened("/proc/1/mem", OpenOptions::new().read(true).write(true))
        }),
        one("environment-of-init", |_| {
            opened("/proc/1/environ", OpenOptions::new().read(true))
        }),
        one("descriptors-of-init", |_| {
            listed("/proc/1/fd", |path| File::open(path).map(|_| ()))
        }),
        one("root-of-init", |aims| {
            files::look(&format!("/proc/1/root/../../..{}", aims.canary), &aims.secret)
        }),
        one("directory-of-init", |aims| {
            files::look(&format!("/proc/1/cwd/../../../..{}", aims.canary), &aims.secret)
        }),
        one("root-of-host-process", |aims| {
            files::look(&format!("/proc/{}/root{}", aims.pid, aims.canary), &aims.secret)
        }),
        Attempt {
            name: "take-descriptor-of-init",
            need: Need::Call(libc::SYS_pidfd_getfd, [-1, -1, 0, 0, 0]),
            act: |_| {
                let taken = syscall(libc::SYS_pidfd_open, [1, 0, 0, 0, 0])
                    .and_then(|pidfd| syscall(libc::SYS_pidfd_getfd, [pidfd, 3, 0, 0, 0]));
                judge("pidfd_getfd", &[NO], taken.map(|_| "its socket is here".to_owned()))
            },
        },
        one("signal-host", |aims| {
            hosts(aims, |pid| {
                // Signal 0 asks whether it could be sent.
                let sent = syscall(libc::SYS_kill, [pid.into(), 0, 0, 0, 0]);
                judge("kill", &[NO, GONE], sent.map(|_| "it can be signalled".to_owned()))
            })
        }),
        one("overwrite-init", |_| {
            // Its own mode: where this is allowed, so is another, and new contents by a new name.
            let path = "/proc/self/exe";
            let changed = fs::canonicalize(path).and_then(|file| {
                let mode = fs::metadata(&file)?.permissions();
                fs::set_permissions(&file, mode)
            });
            judge(
                "chmod",
                &[NO],
                changed.map(|()| "the file that hosts run can be changed".to_owned()),
            )
        }),
        one("inherited-descriptors", inherited),
    ]
}

/// On a process of the host, unless this machine has one of that number by chance.
fn hosts(aims: &Aims, act: fn(i32) -> Tried) -> Tried {
    if aims.pid <= 0 {
        return Tried::Nothing("no process of the host was named".to_owned());
    }
    if Path::new(&format!("/proc/{}", aims.pid)).exists() && aims.survey.pid_namespace != own_namespace() {
        return Tried::Nothing(format!("this machine has a process {} of its own", aims.pid));
    }
    act(aims.pid)
}

/// Of PIDs: two processes that show the same see the same numbers.
pub fn own_namespace() -> String {
    fs::read_link("/proc/self/ns/pid").map_or_else(|_| String::new(), |path| path.to_string_lossy().into_owned())
}

fn traced(pid: i32) -> Tried {
    let seized = syscall(libc::SYS_ptrace, [PTRACE_SEIZE, pid.into(), 0, 0, 0]);
    judge("ptrace", &[NO, GONE], seized.map(|_| "it can be traced".to_owned()))
}

/// To an address where nothing is: who may write learns that, who may not does not even learn that.
fn written(pid: i32) -> Tried {
    let byte = [0u8; 1];
    let local = [address(&byte), 1];
    let remote: [libc::c_long; 2] = [0, 1];
    let arguments = [pid.into(), address(&local), 1, address(&remote), 1];
    match syscall(libc::SYS_process_vm_writev, arguments) {
        Err(error) if error.raw_os_error() == Some(libc::EFAULT) => {
            Tried::Through("its memory can be written".to_owned())
        }
        other => judge(
            "process_vm_writev",
            &[NO, GONE],
            other.map(|_| "its memory can be written".to_owned()),
        ),
    }
}

fn opened(path: &str, how: &OpenOptions) -> Tried {
    judge(
        &format!("open {path}"),
        &[NO, GONE],
        how.open(path).map(|_| "it opens".to_owned()),
    )
}

fn listed(folder: &str, each: fn(&Path) -> io::Result<()>) -> Tried {
    let entries = fs::read_dir(folder).and_then(|entries| entries.collect::<io::Result<Vec<_>>>());
    match entries {
        Err(error) => judge(&format!("list {folder}"), &[NO], Err(error)),
        Ok(entries) => {
            let mut last = io::Error::from_raw_os_error(libc::EACCES);
            for entry in entries {
                match each(&entry.path()) {
                    Ok(()) => return Tried::Through(format!("{} opens", entry.path().display())),
                    Err(error) => last = error,
                }
            }
            judge(&format!("open what is in {folder}"), &[NO, GONE], Err(last))
        }
    }
}

/// Directories that somebody left open are ways out, whatever the root is.
fn inherited(aims: &Aims) -> Tried {
    let mut said = Tried::Unclear("it has no descriptors".to_owned());
    for number in 0..1024 {
        let Ok(target) = fs::read_link(format!("/proc/self/fd/{number}")) else {
            continue;
        };
        if number > 2 && !target.to_string_lossy().starts_with("pipe:") {
            return Tried::Through(format!("descriptor {number} is {}", target.display()));
        }
        said = files::look(
            &format!("/proc/self/fd/{number}/../../../../..{}", aims.canary),
            &aims.secret,
        );
        if matches!(said, Tried::Through(_)) {
            break;
        }
    }
    said
}
