//! Attempts on files: settings and devices of the host's kernel, files of the host, of the image and of other machines.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};

use nix::errno::Errno;
use nix::sys::stat::{Mode, SFlag, makedev, mknod};

use super::Aims;
use super::attempt::{Attempt, NO, Need, Tried, each, judge};

/// As a path: it is not to be seen from here.
const ABSENT: &[Errno] = &[Errno::ENOENT, Errno::ENOTDIR, Errno::ENXIO, Errno::ENODEV];
const IS_ROOT: u8 = 10;
const IS_NOT_ROOT: u8 = 11;
const ANOTHER_USER: u32 = 1000;

pub fn attempts() -> Vec<Attempt> {
    let path = |name, path, act| Attempt {
        name,
        need: Need::Path(path),
        act,
    };
    let one = |name, act| Attempt {
        name,
        need: Need::Nothing,
        act,
    };
    vec![
        path("write-panic-setting", "/proc/sys/kernel/panic", |_| {
            rewrite("/proc/sys/kernel/panic")
        }),
        path("write-core-pattern", "/proc/sys/kernel/core_pattern", |_| {
            rewrite("/proc/sys/kernel/core_pattern")
        }),
        path("write-modprobe-path", "/proc/sys/kernel/modprobe", |_| {
            rewrite("/proc/sys/kernel/modprobe")
        }),
        path("write-file-limit", "/proc/sys/fs/file-max", |_| {
            rewrite("/proc/sys/fs/file-max")
        }),
        path("register-binary-format", "/proc/sys/fs/binfmt_misc/register", |_| {
            opened("/proc/sys/fs/binfmt_misc/register", OpenOptions::new().write(true))
        }),
        path("sysrq", "/proc/sysrq-trigger", |_| {
            // `h`: the kernel prints its help.
            let said = OpenOptions::new()
                .write(true)
                .open("/proc/sysrq-trigger")
                .and_then(|mut file| file.write_all(b"h"));
            judge(
                "write /proc/sysrq-trigger",
                &[NO, ABSENT],
                said.map(|()| "the host's kernel did as told".to_owned()),
            )
        }),
        path("write-uevent-helper", "/sys/kernel/uevent_helper", |_| {
            rewrite("/sys/kernel/uevent_helper")
        }),
        path(
            "write-huge-pages",
            "/sys/kernel/mm/transparent_hugepage/khugepaged/defrag",
            |_| rewrite("/sys/kernel/mm/transparent_hugepage/khugepaged/defrag"),
        ),
        path("release-agent", "/sys/fs/cgroup/memory/release_agent", |_| {
            rewrite("/sys/fs/cgroup/memory/release_agent")
        }),
        path("leave-cgroup", "/sys/fs/cgroup/pids/cgroup.procs", |_| {
            opened("/sys/fs/cgroup/pids/cgroup.procs", OpenOptions::new().write(true))
        }),
        path("leave-cgroup2", "/sys/fs/cgroup/cgroup.procs", |_| {
            opened("/sys/fs/cgroup/cgroup.procs", OpenOptions::new().write(true))
        }),
        path("debugfs", "/sys/kernel/debug", |_| filled("/sys/kernel/debug")),
        path("firmware", "/sys/firmware", |_| filled("/sys/firmware")),
        path("kernel-memory", "/proc/kcore", |_| readable("/proc/kcore")),
        path("kernel-keys", "/proc/keys", |_| readable("/proc/keys")),
        path("kernel-timers", "/proc/timer_list", |_| readable("/proc/timer_list")),
        path("kernel-log-file", "/proc/kmsg", |_| readable("/proc/kmsg")),
        one("make-block-device", |_| made(SFlag::S_IFBLK, 7, 0)),
        one("make-memory-device", |_| made(SFlag::S_IFCHR, 1, 1)),
        one("make-kmsg-device", |_| made(SFlag::S_IFCHR, 1, 11)),
        path("device-mem", "/dev/mem", |_| device("/dev/mem")),
        path("device-kmem", "/dev/kmem", |_| device("/dev/kmem")),
        path("device-port", "/dev/port", |_| device("/dev/port")),
        path("device-kmsg", "/dev/kmsg", |_| device("/dev/kmsg")),
        path("device-sda", "/dev/sda", |_| device("/dev/sda")),
        path("device-vda", "/dev/vda", |_| device("/dev/vda")),
        path("device-nvme", "/dev/nvme0n1", |_| device("/dev/nvme0n1")),
        path("device-loop", "/dev/loop0", |_| device("/dev/loop0")),
        path("device-loop-control", "/dev/loop-control", |_| {
            device("/dev/loop-control")
        }),
        path("device-kvm", "/dev/kvm", |_| device("/dev/kvm")),
        path("device-fuse", "/dev/fuse", |_| device("/dev/fuse")),
        path("device-tun", "/dev/net/tun", |_| device("/dev/net/tun")),
        one("file-of-host", |aims| look(&aims.canary, &aims.secret)),
        one("file-of-host-above-root", |aims| {
            look(&format!("/../../../..{}", aims.canary), &aims.secret)
        }),
        one("file-of-host-by-proc-root", |aims| {
            look(&format!("/proc/self/root/../../..{}", aims.canary), &aims.secret)
        }),
        one("file-of-host-by-link", linked),
        one("files-of-platform", |aims| {
            each(aims.files.iter(), "no file of the platform was named", |path| {
                device(path)
            })
        }),
        one("write-image-layer", layer),
        one("set-user-id", |_| set_user_id()),
        one("file-capabilities", |_| file_capabilities()),
    ]
}

/// Write what it says already.
fn rewrite(path: &str) -> Tried {
    let written = || -> io::Result<String> {
        let mut text = Vec::new();
        // Some say nothing to those who may still write.
        let _ = File::open(path).and_then(|file| file.take(4096).read_to_end(&mut text));
        let mut file = OpenOptions::new().write(true).open(path)?;
        file.write_all(&text)?;
        Ok(format!("{path} can be written"))
    };
    judge(&format!("write {path}"), &[NO, ABSENT], written())
}

fn opened(path: &str, how: &OpenOptions) -> Tried {
    judge(
        &format!("open {path}"),
        &[NO, ABSENT],
        how.open(path).map(|_| format!("{path} opens")),
    )
}

/// What has no name here cannot be opened by one; that a number cannot be made a device is an attempt of its own.
fn device(path: &str) -> Tried {
    opened(path, OpenOptions::new().read(true))
}

/// A file with nothing in it where the host has one with something: it is covered.
fn readable(path: &str) -> Tried {
    let mut byte = [0u8; 1];
    match File::open(path).and_then(|mut file| file.read(&mut byte)) {
        Ok(0) => Tried::Refused(format!("read {path}: covered by an empty file")),
        other => judge(
            &format!("read {path}"),
            &[NO, ABSENT],
            other.map(|_| format!("{path} can be read")),
        ),
    }
}

fn filled(path: &str) -> Tried {
    match fs::read_dir(path).map(Iterator::count) {
        Ok(0) => Tried::Refused(format!("list {path}: covered by an empty folder")),
        other => judge(
            &format!("list {path}"),
            &[NO, ABSENT],
            other.map(|count| format!("{path} shows {count} entries")),
        ),
    }
}

fn made(kind: SFlag, major: u64, minor: u64) -> Tried {
    let path = "/tmp/pantala-escape/device";
    let mode = Mode::S_IRUSR | Mode::S_IWUSR;
    let opened = mknod(path, kind, mode, makedev(major, minor))
        .map_err(io::Error::from)
        .and_then(|()| File::open(path));
    judge(
        "mknod",
        &[NO],
        opened.map(|_| "the device was made and opens".to_owned()),
    )
}

/// Whether the host's file can be read at this path.
pub fn look(path: &str, secret: &str) -> Tried {
    if secret.is_empty() {
        return Tried::Nothing("no file of the host was named".to_owned());
    }
    match fs::read_to_string(path) {
        Ok(text) if text == secret => Tried::Through(format!("{path} is the host's")),
        Ok(_) => Tried::Unclear(format!("{path} is another file")),
        Err(error) => judge(&format!("open {path}"), &[NO, ABSENT], Err(error)),
    }
}

/// Links that lead out are followed inside.
fn linked(aims: &Aims) -> Tried {
    let path = "/tmp/pantala-escape/link";
    let _ = fs::remove_file(path);
    let target = format!("/proc/1/root{}", aims.canary);
    match std::os::unix::fs::symlink(target, path) {
        Ok(()) => look(path, &aims.secret),
        Err(error) => judge("symlink", &[NO], Err(error)),
    }
}

/// Contents, owner and mode of a file of the image, which other machines start from as well.
fn layer(aims: &Aims) -> Tried {
    if aims.image_file.is_empty() {
        return Tried::Nothing("no file of the image was named".to_owned());
    }
    let path = &aims.image_file;
    let changed = || -> io::Result<()> {
        OpenOptions::new().append(true).open(path)?.write_all(b"escaped")?;
        fs::set_permissions(path, Permissions::from_mode(0o4777))?;
        chown(path, Some(ANOTHER_USER), Some(ANOTHER_USER))
    };
    match changed() {
        Ok(()) => Tried::HostSees("it was written, its mode and owner changed".to_owned()),
        Err(error) => judge(&format!("write {path}"), &[NO], Err(error)),
    }
}

/// A program that belongs to root and would run as root for everybody.
fn set_user_id() -> Tried {
    let path = "/tmp/pantala-escape/set-user-id";
    let placed = fs::copy("/proc/self/exe", path)
        .and_then(|_| fs::set_permissions(path, Permissions::from_mode(0o4755)))
        .and_then(|()| {
            let mut command = Command::new(path);
            command.args(["escape", "--whoami"]).uid(ANOTHER_USER).gid(ANOTHER_USER);
            command.status()
        });
    match placed.map(|ended| ended.code()) {
        Ok(Some(code)) if code == i32::from(IS_ROOT) => Tried::Through("another user became root".to_owned()),
        Ok(Some(code)) if code == i32::from(IS_NOT_ROOT) => {
            Tried::Refused("execve: no new privileges, the user stays who he is".to_owned())
        }
        Ok(code) => Tried::Unclear(format!("the program ended with {code:?}")),
        Err(error) => judge("execve", &[NO], Err(error)),
    }
}

pub fn whoami() -> ExitCode {
    let is_root = nix::unistd::geteuid().is_root();
    ExitCode::from(if is_root { IS_ROOT } else { IS_NOT_ROOT })
}

/// A program to which the file system gives every capability.
fn file_capabilities() -> Tried {
    let path = c"/tmp/pantala-escape/capable";
    if let Err(error) = File::create("/tmp/pantala-escape/capable") {
        return Tried::Unclear(format!("a file cannot be made: {error}"));
    }
    // Of version 2: effective, all permitted, none inheritable.
    let value: [u32; 5] = [0x0200_0001, u32::MAX, 0, u32::MAX, 0];
    let (name, bytes) = (c"security.capability", size_of_val(&value));
    // SAFETY: the path, the name and the value live until the call returns.
    let done = unsafe { libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), bytes, 0) };
    let result = if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    };
    judge(
        "setxattr",
        &[NO],
        result.map(|()| "a file has every capability".to_owned()),
    )
}
