"""Which system calls a machine may make: an allow-list.

What is known and refused fails with EPERM, everything else (also what a later kernel brings) with ENOSYS, so that C
libraries newer than this list fall back to older calls.

In the manner of the common container default, minus what a machine of ours has no use for. Left out on purpose:

- new namespaces and mounts (`unshare`, `setns`, `clone` with CLONE_NEW*, `mount`, `fsopen`, `open_tree`, `move_mount`,
  `pivot_root`, …): a new user namespace would hand out every capability over a large part of the kernel;
- `clone3`, whose flags lie in memory where a filter cannot see them: ENOSYS makes C libraries fall back to `clone`;
- keys (`keyctl`, `add_key`, `request_key`: not namespaced), `bpf`, `perf_event_open`, `userfaultfd`, `io_uring_*`,
  `open_by_handle_at`, modules, kexec, swap, clocks, ports, quota, accounting, `syslog`, `vhangup`;
- sockets of families above AF_NFC and AF_ALG with it (vsock, XDP, the kernel's crypto: attack surface only);
- foreign architectures: one native list, and 32-bit programs do not run (their `socketcall` could not be filtered).

`ptrace` and friends are there (debuggers, crash reporters): without CAP_SYS_PTRACE the kernel confines them to a
process's own user, and PID 1 is not dumpable.
"""

from __future__ import annotations

import errno
import platform
from typing import Any

_NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}

CLONE_NEW_ANY = 0x7E020000
AF_ALG = 38

ALLOWED = tuple(
    """
    accept accept4 access alarm arch_prctl bind brk cachestat capget capset chdir chmod chown chroot clock_getres
    clock_gettime clock_nanosleep close close_range connect copy_file_range creat dup dup2 dup3 epoll_create
    epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2 execve
    execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown
    fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatfs fsync ftruncate
    futex futex_requeue futex_wait futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid
    geteuid getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid
    getresuid getrlimit get_robust_list getrusage getsid getsockname getsockopt get_thread_area gettid gettimeofday
    getuid getxattr getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel ioctl
    io_destroy io_getevents io_pgetevents ioprio_get ioprio_set io_setup io_submit kcmp kill landlock_add_rule
    landlock_create_ruleset landlock_restrict_self lchown lgetxattr link linkat listen listxattr listxattrat
    llistxattr lremovexattr lseek lsetxattr lstat madvise map_shadow_stack membarrier memfd_create memfd_secret
    mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap modify_ldt mprotect mq_getsetattr mq_notify
    mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall
    munmap name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_getfd pidfd_open pidfd_send_signal
    pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64 preadv preadv2 prlimit64 process_madvise
    process_mrelease process_vm_readv process_vm_writev pselect6 ptrace pwrite64 pwritev pwritev2 read readahead
    readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr removexattrat rename renameat
    renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo
    rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam
    sched_get_priority_max sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_setaffinity
    sched_setattr sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop
    sendfile sendmmsg sendmsg sendto setfsgid setfsuid setgid setgroups setitimer setpgid setpriority setregid
    setresgid setresuid setreuid setrlimit set_robust_list setsid setsockopt set_thread_area set_tid_address setuid
    setxattr setxattrat shmat shmctl shmdt shmget shutdown sigaltstack signalfd signalfd4 socketpair splice stat
    statfs statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete
    timer_getoverrun timer_gettime timer_settime timerfd_create timerfd_gettime timerfd_settime times tkill truncate
    umask uname unlink unlinkat utime utimensat utimes vfork vmsplice wait4 waitid write writev
    """.split()
)

# Personalities that change nothing but the reported kernel version and the layout of memory.
_PERSONALITIES = (0x0, 0x0008, 0x20000, 0x20008, 0xFFFFFFFF)

# Known and refused. `clone3` and `io_uring_*` are not here: with ENOSYS their callers try an older way.
REFUSED = tuple(
    """
    acct add_key adjtimex bpf clock_adjtime clock_settime create_module delete_module fanotify_init finit_module
    fsconfig fsmount fsopen fspick get_kernel_syms get_mempolicy init_module ioperm iopl kexec_file_load kexec_load
    keyctl lookup_dcookie mbind migrate_pages mount mount_setattr move_mount move_pages nfsservctl open_by_handle_at
    open_tree perf_event_open pivot_root query_module quotactl quotactl_fd reboot request_key sethostname setdomainname
    set_mempolicy setns settimeofday stime swapoff swapon syslog _sysctl umount umount2 unshare uselib userfaultfd
    ustat vhangup
    """.split()
)


def profile(machine: str | None = None) -> dict[str, Any]:
    """The `linux.seccomp` part of a runtime specification for this processor."""
    native = _NATIVE.get(machine or platform.machine())
    if native is None:
        raise ValueError(f"no system call list for the processor {machine or platform.machine()}")
    return {
        "defaultAction": "SCMP_ACT_ERRNO",
        "defaultErrnoRet": errno.ENOSYS,
        "architectures": [native],
        "syscalls": [
            {"names": list(ALLOWED), "action": "SCMP_ACT_ALLOW"},
            {
                "names": ["clone"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": CLONE_NEW_ANY, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}],
            },
            {
                "names": ["socket"],
                "action": "SCMP_ACT_ALLOW",
                "args": [{"index": 0, "value": AF_ALG, "op": "SCMP_CMP_LT"}],
            },
            *(
                {
                    "names": ["personality"],
                    "action": "SCMP_ACT_ALLOW",
                    "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}],
                }
                for value in _PERSONALITIES
            ),
            {
                "names": ["socket"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": errno.EAFNOSUPPORT,
                "args": [{"index": 0, "value": AF_ALG, "op": "SCMP_CMP_GE"}],
            },
            {"names": list(REFUSED), "action": "SCMP_ACT_ERRNO", "errnoRet": errno.EPERM},
        ],
    }
