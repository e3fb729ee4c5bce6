//! A running proxy is replaced by a new process without losing a request. Over a unix socket in `state_dir` the new one
//! gets every listening socket of the old one, says when it serves, and each tells the other what it has in flight on
//! this host's machines until the old one has ended.
//!
//! new: Ask → old: Sockets…, All → new: loads its view; Ready → old: Counts, Yours → new: serves; Serving → old: leaves

pub mod counts;
pub mod give;
pub mod message;
pub mod sockets;
pub mod take;

use std::path::{Path, PathBuf};

/// Beside the routing views; only its owner may connect.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("replace.sock")
}
