//! Into a container's root and back. PID 1 can neither mount nor make namespaces; it has one thread, as the SSH server has,
//! so it changes its own root for as long as it prepares and starts a program there: users, files, the program and its interpreter are then
//! those of the container, links included.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use nix::unistd::{chdir, chroot, fchdir};

/// The root of the container as long as this lives, the machine's afterwards.
pub struct Entered {
    outside: OwnedFd,
}

impl Entered {
    pub fn enter(root: &str) -> io::Result<Self> {
        let entered = Entered {
            outside: File::open("/")?.into(),
        };
        chroot(root)?;
        chdir("/")?;
        Ok(entered)
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        if fchdir(&self.outside).and_then(|()| chroot(".")).is_err() {
            // In the wrong root nothing that follows would be right; the machine ends and its policy starts it again.
            std::process::abort();
        }
    }
}
