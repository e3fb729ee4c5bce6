//! Attempts on the kernel itself: calls that change it or look into it, and the large parts of it that machines are
//! kept away from.

use std::fs;
use std::io;

use nix::errno::Errno;

use super::attempt::{Attempt, NO, Need, Tried, address, apart, judge, syscall};
use super::mounts::past;

const KEYCTL_GET_KEYRING_ID: libc::c_long = 0;
const SESSION_KEYRING: libc::c_long = -3;
const SYSLOG_READ_ALL: libc::c_long = 3;
const REBOOT_MAGIC: [libc::c_long; 2] = [0xfee1_dead, 0x2812_1969];
const CTRL_ALT_DEL_OFF: libc::c_long = 0;
const KEXEC_NO_SUCH_FLAG: libc::c_long = 0x0000_8000;
const Q_SYNC_ALL: libc::c_long = 0x80_0001 << 8;
const CAPABILITY_VERSION_3: u32 = 0x2008_0522;
const NOWHERE: libc::c_long = 1;

pub fn attempts() -> Vec<Attempt> {
    let call = |name, number, harmless, act| Attempt {
        name,
        need: Need::Call(number, harmless),
        act,
    };
    let mut all = vec![
        call("bpf", libc::SYS_bpf, [-1, 0, 0, 0, 0], |_| {
            // A map of one byte.
            let attributes: [u32; 32] = std::array::from_fn(|at| [2, 4, 1, 1].get(at).copied().unwrap_or(0));
            verdict(
                "bpf",
                syscall(libc::SYS_bpf, [0, address(&attributes), 128, 0, 0]),
                "a map was made",
            )
        }),
        call("perf-event-open", libc::SYS_perf_event_open, [0, 0, -1, -1, 0], |_| {
            let mut event = [0u32; 32];
            (event[0], event[1]) = (1, 128);
            let result = syscall(libc::SYS_perf_event_open, [address(&event), 0, -1, -1, 0]);
            verdict("perf_event_open", result, "an event is counted")
        }),
        call("keyctl", libc::SYS_keyctl, [-1, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_keyctl, [KEYCTL_GET_KEYRING_ID, SESSION_KEYRING, 0, 0, 0]);
            verdict("keyctl", result, "a keyring of the host is named")
        }),
        call("add-key", libc::SYS_add_key, [0, 0, 0, 0, 0], |_| {
            let result = syscall(
                libc::SYS_add_key,
                [address(c"user"), address(c"escape"), address(b"x"), 1, -2],
            );
            verdict("add_key", result, "a key was kept in the host's kernel")
        }),
        call(
            "kexec-load",
            libc::SYS_kexec_load,
            [0, 0, 0, KEXEC_NO_SUCH_FLAG, 0],
            |_| {
                let result = syscall(libc::SYS_kexec_load, [0, 0, 0, KEXEC_NO_SUCH_FLAG, 0]);
                past("kexec_load", result, &[Errno::EINVAL])
            },
        ),
        call("kexec-file-load", libc::SYS_kexec_file_load, [-1, -1, 0, 0, -1], |_| {
            let result = syscall(libc::SYS_kexec_file_load, [-1, -1, 0, 0, -1]);
            past("kexec_file_load", result, &[Errno::EINVAL, Errno::EBADF])
        }),
        call("init-module", libc::SYS_init_module, [0, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_init_module, [0, 0, 0, 0, 0]);
            past("init_module", result, &[Errno::ENOEXEC, Errno::EFAULT, Errno::EINVAL])
        }),
        call("finit-module", libc::SYS_finit_module, [-1, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_finit_module, [-1, address(c""), 0, 0, 0]);
            past("finit_module", result, &[Errno::EBADF, Errno::ENOEXEC, Errno::EINVAL])
        }),
        call("delete-module", libc::SYS_delete_module, [0, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_delete_module, [address(c"no-such-module"), 0, 0, 0, 0]);
            past("delete_module", result, &[Errno::ENOENT, Errno::EFAULT])
        }),
        call("reboot", libc::SYS_reboot, [0, 0, 0, 0, 0], |_| {
            let [first, second] = REBOOT_MAGIC;
            let result = syscall(libc::SYS_reboot, [first, second, CTRL_ALT_DEL_OFF, 0, 0]);
            past("reboot", result, &[Errno::EINVAL])
        }),
        call("clock-settime", libc::SYS_clock_settime, [-1, 0, 0, 0, 0], |_| {
            set_clock()
        }),
        call("settimeofday", libc::SYS_settimeofday, [NOWHERE, 0, 0, 0, 0], |_| {
            // A time zone of zero, which is what it is.
            let zone = [0i32; 2];
            let result = syscall(libc::SYS_settimeofday, [0, address(&zone), 0, 0, 0]);
            verdict("settimeofday", result, "the zone of the host's clock was set")
        }),
        call("kernel-log", libc::SYS_syslog, [-1, 0, 0, 0, 0], |_| {
            let mut text = [0u8; 256];
            let place = text.as_mut_ptr() as libc::c_long;
            let result = syscall(libc::SYS_syslog, [SYSLOG_READ_ALL, place, 256, 0, 0]);
            verdict("syslog", result, "the host's kernel log was read")
        }),
        call("swapon", libc::SYS_swapon, [0, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_swapon, [address(c"/no-such-file"), 0, 0, 0, 0]);
            past("swapon", result, &[Errno::ENOENT, Errno::EINVAL])
        }),
        call("acct", libc::SYS_acct, [NOWHERE, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_acct, [address(c"/no-such-file"), 0, 0, 0, 0]);
            past("acct", result, &[Errno::ENOENT])
        }),
        call("quotactl", libc::SYS_quotactl, [-1, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_quotactl, [Q_SYNC_ALL, 0, 0, 0, 0]);
            verdict("quotactl", result, "quotas of the host were written out")
        }),
        call("userfaultfd", libc::SYS_userfaultfd, [-1, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_userfaultfd, [libc::O_CLOEXEC.into(), 0, 0, 0, 0]);
            verdict("userfaultfd", result, "a descriptor was made")
        }),
        call("io-uring-setup", libc::SYS_io_uring_setup, [0, 0, 0, 0, 0], |_| {
            let mut parameters = [0u8; 120];
            let place = parameters.as_mut_ptr() as libc::c_long;
            let result = syscall(libc::SYS_io_uring_setup, [1, place, 0, 0, 0]);
            verdict("io_uring_setup", result, "a ring was made")
        }),
        call("fanotify-init", libc::SYS_fanotify_init, [-1, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_fanotify_init, [0, 0, 0, 0, 0]);
            verdict("fanotify_init", result, "a group was made")
        }),
        call("open-by-handle", libc::SYS_open_by_handle_at, [-1, 0, 0, 0, 0], |_| {
            by_handle()
        }),
        call("raise-capabilities", libc::SYS_capget, [0, 0, 0, 0, 0], |_| {
            let header = [CAPABILITY_VERSION_3, 0];
            let all = [u32::MAX; 6];
            let result = syscall(libc::SYS_capset, [address(&header), address(&all), 0, 0, 0]);
            verdict("capset", result, "every capability was taken")
        }),
    ];
    #[cfg(target_arch = "x86_64")]
    all.extend([
        call("port-access", libc::SYS_iopl, [99, 0, 0, 0, 0], |_| {
            let result = syscall(libc::SYS_iopl, [3, 0, 0, 0, 0]);
            verdict("iopl", result, "the machine may speak to devices")
        }),
        Attempt {
            name: "calls-of-32-bits",
            need: Need::Asked(
                || matches!(apart(of_32_bits), Tried::Through(_)),
                "this kernel runs no programs of 32 bits",
            ),
            act: |_| of_32_bits(),
        },
        Attempt {
            name: "calls-of-x32",
            need: Need::Asked(
                || syscall(X32 | libc::SYS_getpid, [0; 5]).is_ok(),
                "this kernel has no x32 calls",
            ),
            act: |_| {
                verdict(
                    "getpid of x32",
                    syscall(X32 | libc::SYS_getpid, [0; 5]),
                    "it was answered",
                )
            },
        },
    ]);
    all
}

#[cfg(target_arch = "x86_64")]
const X32: libc::c_long = 0x4000_0000;

fn verdict(what: &str, result: io::Result<libc::c_long>, got: &str) -> Tried {
    judge(what, &[NO], result.map(|_| got.to_owned()))
}

/// To what it shows: where that is allowed, nothing changes by more than a moment.
fn set_clock() -> Tried {
    let result = nix::time::clock_gettime(nix::time::ClockId::CLOCK_REALTIME)
        .map_err(io::Error::from)
        .and_then(|now| syscall(libc::SYS_clock_settime, [0, address(now.as_ref()), 0, 0, 0]));
    verdict("clock_settime", result, "the host's clock was set")
}

/// A handle can be made up: of the root of the file system that /etc/hosts is on, a file of the host.
fn by_handle() -> Tried {
    let file = match fs::File::open("/etc/hosts") {
        Ok(file) => file,
        Err(error) => return Tried::Unclear(format!("/etc/hosts: {error}")),
    };
    // 8 bytes of a handle of type 1: inode 2, generation 0.
    let handle: [u32; 4] = [8, 1, 2, 0];
    use std::os::fd::AsRawFd;
    let result = syscall(
        libc::SYS_open_by_handle_at,
        [file.as_raw_fd().into(), address(&handle), 0, 0, 0],
    );
    past("open_by_handle_at", result, &[Errno::ESTALE, Errno::EINVAL])
}

/// By the gate of 32-bit programs, whose numbers a filter for 64 bits would misread.
#[cfg(target_arch = "x86_64")]
fn of_32_bits() -> Tried {
    const GETPID: i32 = 20;
    let answer: i32;
    // SAFETY: asks for the number of this process; the gate leaves all registers but eax as they were, r8 to r11 aside.
    unsafe {
        std::arch::asm!(
            "int 0x80",
            inlateout("eax") GETPID => answer,
            out("r8") _, out("r9") _, out("r10") _, out("r11") _,
        );
    }
    if answer < 0 {
        return judge("getpid of 32 bits", &[NO], Err(io::Error::from_raw_os_error(-answer)));
    }
    Tried::Through("it was answered".to_owned())
}
