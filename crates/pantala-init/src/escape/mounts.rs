//! Attempts to change what is mounted, to enter or make other namespaces, and to leave the root.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::os::fd::AsRawFd;

use nix::errno::Errno;

use super::attempt::{Attempt, NO, Need, Tried, address, judge, syscall};

const PLACE: &str = "/tmp/pantala-escape/mount";
const PIT: &str = "/tmp/pantala-escape/pit";
const NEEDS_MOUNT: Need = Need::Call(libc::SYS_mount, [0, 0, 0, 0, 0]);
const OPEN_TREE_CLONE: libc::c_long = 1;
const MOUNT_ATTR_RDONLY: u64 = 1;
const PAST_THE_DOOR: &str = "the call went past the check of rights";

pub fn attempts() -> Vec<Attempt> {
    let mount = |name, kind, act| Attempt {
        name,
        need: Need::Filesystem(kind),
        act,
    };
    let call = |name, number, act| Attempt {
        name,
        need: Need::Call(number, [-1, 0, 0, 0, 0]),
        act,
    };
    vec![
        mount("mount-proc", "proc", |_| mounted("proc", 0, "")),
        mount("mount-sysfs", "sysfs", |_| mounted("sysfs", 0, "")),
        mount("mount-tmpfs", "tmpfs", |_| mounted("tmpfs", 0, "")),
        mount("mount-cgroup", "cgroup", |_| mounted("cgroup", 0, "memory")),
        mount("mount-cgroup2", "cgroup2", |_| mounted("cgroup2", 0, "")),
        mount("mount-overlay", "overlay", |_| {
            mounted("overlay", 0, "lowerdir=/etc:/dev")
        }),
        Attempt {
            name: "mount-bind-over-root",
            need: NEEDS_MOUNT,
            act: |_| mount_at("/proc", "/", "", libc::MS_BIND, ""),
        },
        Attempt {
            name: "mount-proc-sys-writable",
            need: NEEDS_MOUNT,
            act: |_| mount_at("", "/proc/sys", "", libc::MS_REMOUNT | libc::MS_BIND, ""),
        },
        Attempt {
            name: "mount-sys-writable",
            need: NEEDS_MOUNT,
            act: |_| mount_at("", "/sys", "", libc::MS_REMOUNT | libc::MS_BIND, ""),
        },
        call("unmount-a-mask", libc::SYS_umount2, |_| {
            let path = c"/proc/sys";
            verdict(
                "umount2",
                syscall(
                    libc::SYS_umount2,
                    [path.as_ptr() as i64, libc::MNT_DETACH.into(), 0, 0, 0],
                ),
            )
        }),
        call("fsopen", libc::SYS_fsopen, |_| {
            verdict("fsopen", syscall(libc::SYS_fsopen, [address(c"proc"), 0, 0, 0, 0]))
        }),
        call("open-tree", libc::SYS_open_tree, |_| {
            let here = libc::AT_FDCWD.into();
            verdict(
                "open_tree",
                syscall(libc::SYS_open_tree, [here, address(c"/"), OPEN_TREE_CLONE, 0, 0]),
            )
        }),
        call("move-mount", libc::SYS_move_mount, |_| {
            let here = libc::AT_FDCWD.into();
            verdict(
                "move_mount",
                syscall(
                    libc::SYS_move_mount,
                    [here, address(c"/proc"), here, address(c"/sys"), 0],
                ),
            )
        }),
        call("mount-setattr", libc::SYS_mount_setattr, |_| {
            let attributes: [u64; 4] = [0, MOUNT_ATTR_RDONLY, 0, 0];
            let here = libc::AT_FDCWD.into();
            let arguments = [here, address(c"/proc/sys"), 0, address(&attributes), 32];
            verdict("mount_setattr", syscall(libc::SYS_mount_setattr, arguments))
        }),
        call("pivot-root", libc::SYS_pivot_root, |_| {
            let result = syscall(libc::SYS_pivot_root, [address(c"/"), address(c"/"), 0, 0, 0]);
            verdict("pivot_root", result)
        }),
        call("unshare-user", libc::SYS_unshare, |_| unshared(libc::CLONE_NEWUSER)),
        call("unshare-mount", libc::SYS_unshare, |_| unshared(libc::CLONE_NEWNS)),
        call("unshare-network", libc::SYS_unshare, |_| unshared(libc::CLONE_NEWNET)),
        call("unshare-cgroup", libc::SYS_unshare, |_| unshared(libc::CLONE_NEWCGROUP)),
        Attempt {
            name: "clone-user",
            need: Need::Nothing,
            act: |_| cloned("clone", libc::SYS_clone, [flags(libc::CLONE_NEWUSER), 0, 0, 0, 0]),
        },
        call("clone3-user", libc::SYS_clone3, |_| {
            let mut arguments = [0u64; 11];
            arguments[0] = libc::CLONE_NEWUSER as u64;
            arguments[4] = libc::SIGCHLD as u64;
            let size = size_of_val(&arguments) as libc::c_long;
            cloned("clone3", libc::SYS_clone3, [address(&arguments), size, 0, 0, 0])
        }),
        call("setns-of-init", libc::SYS_setns, |_| entered("/proc/1/ns/mnt")),
        call("setns-of-host", libc::SYS_setns, |aims| {
            entered(&format!("/proc/{}/ns/user", aims.pid))
        }),
        call("setns", libc::SYS_setns, |_| entered("/proc/self/ns/net")),
        call("sethostname", libc::SYS_sethostname, |_| {
            verdict(
                "sethostname",
                syscall(libc::SYS_sethostname, [address(b"escaped"), 7, 0, 0, 0]),
            )
        }),
        Attempt {
            name: "chroot-and-climb",
            need: Need::Nothing,
            act: |aims| climb(&aims.canary, &aims.secret),
        },
    ]
}

/// Rights are looked at before the place: who is told that this one will not do could have named another.
fn verdict(what: &str, result: io::Result<libc::c_long>) -> Tried {
    past(what, result, &[Errno::EINVAL, Errno::EBUSY])
}

/// Of calls that look at rights first: what they say afterwards counts as through.
pub fn past(what: &str, result: io::Result<libc::c_long>, later: &[Errno]) -> Tried {
    match result {
        Err(error) if later.contains(&Errno::from_raw(error.raw_os_error().unwrap_or(0))) => {
            Tried::Through(format!("{PAST_THE_DOOR} and only then said {error}"))
        }
        other => judge(what, &[NO], other.map(|_| PAST_THE_DOOR.to_owned())),
    }
}

fn mounted(kind: &str, flags: libc::c_ulong, data: &str) -> Tried {
    if let Err(error) = fs::create_dir_all(PLACE) {
        return Tried::Unclear(format!("{PLACE} cannot be made: {error}"));
    }
    mount_at(kind, PLACE, kind, flags, data)
}

fn mount_at(source: &str, target: &str, kind: &str, flags: libc::c_ulong, data: &str) -> Tried {
    let words: Result<Vec<CString>, _> = [source, target, kind, data].into_iter().map(CString::new).collect();
    let Ok(words) = words else {
        return Tried::Unclear("a word with a zero in it".to_owned());
    };
    let pointer = |at: usize| {
        if words[at].is_empty() {
            0
        } else {
            words[at].as_ptr() as libc::c_long
        }
    };
    let arguments = [pointer(0), pointer(1), pointer(2), flags as libc::c_long, pointer(3)];
    verdict("mount", syscall(libc::SYS_mount, arguments))
}

fn unshared(flags: libc::c_int) -> Tried {
    verdict("unshare", syscall(libc::SYS_unshare, [flags.into(), 0, 0, 0, 0]))
}

fn flags(namespace: libc::c_int) -> libc::c_long {
    libc::c_long::from(namespace | libc::SIGCHLD)
}

/// The child, where there is one, goes on here and says the same as its parent; the first of them is heard.
fn cloned(what: &str, number: libc::c_long, arguments: [libc::c_long; 5]) -> Tried {
    verdict(what, syscall(number, arguments))
}

fn entered(path: &str) -> Tried {
    let absent: &[Errno] = &[Errno::ENOENT];
    match File::open(path) {
        Err(error) => judge(&format!("open {path}"), &[NO, absent], Err(error)),
        Ok(namespace) => verdict(
            "setns",
            syscall(libc::SYS_setns, [namespace.as_raw_fd().into(), 0, 0, 0, 0]),
        ),
    }
}

/// A directory that is kept open above a changed root is a way up to the root of the mount namespace, and no further.
fn climb(canary: &str, secret: &str) -> Tried {
    let dug = || -> io::Result<()> {
        fs::create_dir_all(PIT)?;
        let above = File::open("/")?;
        std::os::unix::fs::chroot(PIT)?;
        nix::unistd::fchdir(&above)?;
        for _ in 0..64 {
            std::env::set_current_dir("..")?;
        }
        std::os::unix::fs::chroot(".")
    };
    match dug() {
        Err(error) => judge("chroot", &[NO], Err(error)),
        Ok(()) => super::files::look(canary, secret),
    }
}
