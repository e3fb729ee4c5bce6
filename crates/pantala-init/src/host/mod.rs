//! The host's side: system calls around a container runtime and around a machine's namespaces.
//!
//! Called by Python with a JSON plan on stdin; success is exit code 0 and, where there is one, a JSON result on stdout;
//! a failure is one sentence on stderr and exit code 1.

pub mod containers;
pub mod enclose;
mod facts;
mod loops;
mod mounts;
mod namespaces;
mod netlink;
pub mod network;

use std::io::{self, Read};
use std::process::ExitCode;

use serde::de::DeserializeOwned;

#[derive(Debug, thiserror::Error)]
pub enum HostError {
    #[error("the plan on stdin cannot be read")]
    Plan(#[source] serde_json::Error),
    #[error("{what}")]
    Call { what: String, source: io::Error },
    #[error("{0}")]
    Runtime(String),
}

pub type Result<T> = std::result::Result<T, HostError>;

/// Say what was being done when a call failed.
pub trait Doing<T> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T>;
}

impl<T, E: Into<io::Error>> Doing<T> for std::result::Result<T, E> {
    fn doing(self, what: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|error| HostError::Call {
            what: what(),
            source: error.into(),
        })
    }
}

fn plan<T: DeserializeOwned>() -> Result<T> {
    let mut text = Vec::new();
    io::stdin().read_to_end(&mut text).doing(|| "read stdin".to_owned())?;
    serde_json::from_slice(&text).map_err(HostError::Plan)
}

pub fn report(result: Result<()>) -> ExitCode {
    let Err(error) = result else { return ExitCode::SUCCESS };
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(inner) = cause {
        text = format!("{text}: {inner}");
        cause = inner.source();
    }
    eprintln!("{text}");
    ExitCode::FAILURE
}
