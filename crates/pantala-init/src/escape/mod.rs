//! `pantala-init escape`: attempts to get out of a machine, made inside one by the program that is PID 1 of all others.
//!
//! The agent (`src/pantala/agent/escape.py`) runs it twice: with `--survey` on the host, which says what there is that
//! an attempt could aim at, and then as the app of a machine that is made like any other. Each attempt is a line of
//! JSON on stdout. It is *held* only where the kernel refused it, by the errno that the line names; where the host has
//! no such thing it is *not applicable*; what ended in any other way is *unclear*. None does harm where it gets
//! through: what would be written is what was read, what could end something is asked with arguments that cannot.

mod attempt;
mod files;
mod kernel;
mod mounts;
mod processes;
mod reach;
mod survey;

use std::io::Write;
use std::process::ExitCode;

use serde::{Deserialize, Serialize};

use attempt::Attempt;
pub use survey::Survey;

/// What the agent says of the host. The paths and numbers are the host's own.
#[derive(Default, Deserialize)]
#[serde(default)]
pub struct Aims {
    /// A file of the host that holds `secret`, and nothing else.
    pub canary: String,
    pub secret: String,
    /// A file of the image, in its lowest layer.
    pub image_file: String,
    /// Files of the host that are the platform's own, such as the journal of all its machines.
    pub files: Vec<String>,
    /// A process of the host, outside of every machine.
    pub pid: i32,
    /// Addresses of the host, the first one its end of this machine's link.
    pub host: Vec<String>,
    /// What machines may reach at the host: `address port`.
    pub open: Vec<String>,
    /// Addresses of machines of other networks.
    pub neighbours: Vec<String>,
    /// What `--survey` said on the host.
    pub survey: Survey,
}

#[derive(Serialize)]
struct Line<'a> {
    name: &'a str,
    outcome: &'a str,
    detail: &'a str,
}

pub fn run(arguments: &[String]) -> ExitCode {
    match arguments {
        [word] if word == "--whoami" => return files::whoami(),
        [word, text] if word == "--survey" => match serde_json::from_str(text) {
            Ok(aims) => return say(&survey::take(&aims, &attempts())),
            Err(error) => eprintln!("pantala-init: escape: {error}"),
        },
        [text] => match serde_json::from_str(text) {
            Ok(aims) => return attack(&aims),
            Err(error) => eprintln!("pantala-init: escape: {error}"),
        },
        _ => eprintln!("usage: pantala-init escape [--survey] JSON"),
    }
    ExitCode::from(2)
}

/// Every attempt there is, in the order in which they are made.
fn attempts() -> Vec<Attempt> {
    let mut all = mounts::attempts();
    all.extend(processes::attempts());
    all.extend(kernel::attempts());
    all.extend(files::attempts());
    all.extend(reach::attempts());
    all
}

fn attack(aims: &Aims) -> ExitCode {
    if let Err(error) = std::fs::create_dir_all(attempt::SCRATCH) {
        eprintln!("pantala-init: escape: {}: {error}", attempt::SCRATCH);
        return ExitCode::FAILURE;
    }
    for attempt in attempts() {
        let tried = attempt.make(aims);
        let missing = aims.survey.missing.get(attempt.name);
        let (outcome, detail) = tried.judged(missing.map(String::as_str));
        let line = Line {
            name: attempt.name,
            outcome,
            detail: &detail,
        };
        if say(&line) != ExitCode::SUCCESS {
            return ExitCode::FAILURE;
        }
    }
    ExitCode::SUCCESS
}

fn say(document: &impl Serialize) -> ExitCode {
    let written = serde_json::to_string(document)
        .map_err(std::io::Error::other)
        .and_then(|text| writeln!(std::io::stdout(), "{text}"));
    match written {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("pantala-init: escape: {error}");
            ExitCode::FAILURE
        }
    }
}
