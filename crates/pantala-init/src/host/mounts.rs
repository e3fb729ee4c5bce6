//! Mounts that need newer calls than `mount(2)`: clones of directories, read-only and with mapped ids.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A private copy of the mount at `source` (an open `O_PATH` descriptor), attached nowhere yet.
pub fn clone(source: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    open_tree(source, 0)
}

/// The same with all that is mounted below.
pub fn clone_all(source: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    open_tree(source, libc::AT_RECURSIVE as libc::c_uint)
}

fn open_tree(source: BorrowedFd<'_>, more: libc::c_uint) -> io::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint | more;
    // SAFETY: a valid descriptor and an empty NUL-terminated path; the result is a new descriptor that we own.
    unsafe {
        let fd = libc::syscall(libc::SYS_open_tree, source.as_raw_fd(), c"".as_ptr(), flags);
        owned(fd)
    }
}

/// Make a detached mount read-only; with `userns`, ids on disk appear through its map.
pub fn restrict(tree: &OwnedFd, userns: Option<BorrowedFd<'_>>) -> io::Result<()> {
    let mut attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    if let Some(userns) = userns {
        attributes.attr_set |= libc::MOUNT_ATTR_IDMAP;
        attributes.userns_fd = userns.as_raw_fd() as u64;
    }
    // SAFETY: the struct lives through the call and its size is passed with it.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// Attach a detached mount at `target`.
pub fn attach(tree: &OwnedFd, target: &Path) -> io::Result<()> {
    let target = CString::new(target.as_os_str().as_bytes()).map_err(|_| io::ErrorKind::InvalidInput)?;
    move_mount(tree, libc::AT_FDCWD, &target, 0)
}

/// Attach a detached mount over what `target` (an open `O_PATH` descriptor) is.
pub fn attach_to(tree: &OwnedFd, target: &OwnedFd) -> io::Result<()> {
    const MOVE_MOUNT_T_EMPTY_PATH: libc::c_uint = 0x40;
    move_mount(tree, target.as_raw_fd(), c"", MOVE_MOUNT_T_EMPTY_PATH)
}

fn move_mount(tree: &OwnedFd, at: libc::c_int, target: &CStr, flags: libc::c_uint) -> io::Result<()> {
    const MOVE_MOUNT_F_EMPTY_PATH: libc::c_uint = 4;
    // SAFETY: both paths are NUL-terminated and live through the call.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_fd().as_raw_fd(),
            c"".as_ptr(),
            at,
            target.as_ptr(),
            MOVE_MOUNT_F_EMPTY_PATH | flags,
        )
    };
    if done < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(())
    }
}

/// # Safety
/// `fd` must be the fresh result of a system call that returns a descriptor or -1.
unsafe fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    match i32::try_from(fd) {
        // SAFETY: by this function's contract nobody else owns it.
        Ok(fd) if fd >= 0 => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
        _ => Err(io::Error::last_os_error()),
    }
}
