//! A running proxy is replaced by a new process without losing a request. Over a unix socket in `state_dir` the new one
//! gets every listening socket of the old one, says when it serves, and each tells the other what it has in flight on
//! this host's machines until the old one has ended. Meanwhile only the new one gives places on them, so that no limit is
//! passed; requests on connections of the old one ask it.
//!
//! new: Ask → old: Sockets…, All → new: loads its view; Ready → old: Counts, Yours → new: serves; Serving → old: leaves;
//! then Counts both ways, old: Want → new: Lent or Denied, old: Done

pub mod asking;
pub mod counts;
pub mod give;
pub mod lending;
pub mod message;
pub mod sockets;
pub mod take;

use std::path::{Path, PathBuf};

/// Beside the routing views; only its owner may connect.
pub fn path(state_dir: &Path) -> PathBuf {
    state_dir.join("replace.sock")
}
