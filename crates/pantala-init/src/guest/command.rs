//! Which file `argv[0]` means, and in words why one cannot be run.

use std::ffi::CString;
use std::io;
use std::path::{Path, PathBuf};

pub const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Exit codes of shells: found but cannot be run, not found.
pub const CODE_CANNOT_RUN: i32 = 126;
pub const CODE_NOT_FOUND: i32 = 127;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct CannotRun {
    pub code: i32,
    pub reason: String,
}

impl CannotRun {
    pub fn new(code: i32, reason: impl Into<String>) -> Self {
        CannotRun {
            code,
            reason: reason.into(),
        }
    }
}

/// The program to execute: a name with a slash is a path (relative to `cwd`), any other is searched in `path`.
pub fn resolve(name: &str, path: Option<&str>, cwd: &Path) -> Result<PathBuf, CannotRun> {
    if name.is_empty() {
        return Err(CannotRun::new(
            CODE_NOT_FOUND,
            "the command is empty; the image has neither entrypoint nor cmd",
        ));
    }
    if name.contains('/') {
        let program = cwd.join(name);
        return match judge(&program) {
            Judgement::Runs => Ok(program),
            Judgement::Absent => Err(CannotRun::new(
                CODE_NOT_FOUND,
                format!(
                    "the command {name:?} was not found: there is no file {}",
                    program.display()
                ),
            )),
            Judgement::Folder => Err(CannotRun::new(
                CODE_CANNOT_RUN,
                format!("the command {name:?} is a directory, not a program"),
            )),
            Judgement::NotExecutable => Err(not_executable(name, &program)),
        };
    }
    let path = path.unwrap_or(PATH_DEFAULT);
    let mut refused = None;
    for folder in path.split(':').filter(|folder| !folder.is_empty()) {
        let program = cwd.join(folder).join(name);
        match judge(&program) {
            Judgement::Runs => return Ok(program),
            Judgement::NotExecutable => refused = refused.or(Some(program)),
            Judgement::Absent | Judgement::Folder => {}
        }
    }
    Err(match refused {
        Some(program) => not_executable(name, &program),
        None => CannotRun::new(
            CODE_NOT_FOUND,
            format!("the command {name:?} was not found in PATH ({path})"),
        ),
    })
}

/// What the kernel's refusal to execute `program` means to the owner of the image.
pub fn explain(program: &Path, error: &io::Error) -> CannotRun {
    let shown = program.display();
    match error.raw_os_error() {
        Some(libc::ENOENT) => CannotRun::new(
            CODE_NOT_FOUND,
            format!(
                "{shown} cannot run: the interpreter that it names (its #! line or dynamic loader) is not in the image"
            ),
        ),
        Some(libc::ENOEXEC) => CannotRun::new(
            CODE_CANNOT_RUN,
            format!("{shown} cannot run: it is built for another processor, or is a script without a #! line"),
        ),
        Some(libc::EACCES | libc::EPERM) => CannotRun::new(
            CODE_CANNOT_RUN,
            format!("{shown} cannot run: permission denied for the user of the machine"),
        ),
        Some(libc::E2BIG) => CannotRun::new(
            CODE_CANNOT_RUN,
            format!("{shown} cannot run: arguments and environment are too large"),
        ),
        _ => CannotRun::new(CODE_CANNOT_RUN, format!("{shown} cannot run: {error}")),
    }
}

fn not_executable(name: &str, program: &Path) -> CannotRun {
    CannotRun::new(
        CODE_CANNOT_RUN,
        format!(
            "the command {name:?} is not executable: {} lacks the x permission",
            program.display()
        ),
    )
}

enum Judgement {
    Runs,
    Absent,
    Folder,
    NotExecutable,
}

fn judge(program: &Path) -> Judgement {
    use std::os::unix::fs::PermissionsExt;
    match std::fs::metadata(program) {
        Err(_) => Judgement::Absent,
        Ok(metadata) if metadata.is_dir() => Judgement::Folder,
        Ok(metadata) if metadata.permissions().mode() & 0o111 == 0 => Judgement::NotExecutable,
        Ok(_) if CString::new(program.as_os_str().as_encoded_bytes()).is_err() => Judgement::Absent,
        Ok(_) => Judgement::Runs,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    fn image() -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (path, mode) in [
            ("bin/app", 0o755),
            ("sbin/app", 0o644),
            ("sbin/data", 0o644),
            ("run.sh", 0o755),
        ] {
            let path = root.path().join(path);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, b"x").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        }
        root
    }

    #[test]
    fn a_bare_name_is_searched_in_path_and_skips_what_cannot_run() {
        let root = image();
        let path = format!("{0}/none:{0}/sbin:{0}/bin", root.path().display());
        assert_eq!(
            resolve("app", Some(&path), Path::new("/")).unwrap(),
            root.path().join("bin/app")
        );
    }

    #[test]
    fn a_path_is_relative_to_the_working_directory() {
        let root = image();
        assert_eq!(
            resolve("./run.sh", None, root.path()).unwrap(),
            root.path().join("./run.sh")
        );
    }

    #[test]
    fn refusals_name_the_cause() {
        let root = image();
        let path = format!("{}/sbin", root.path().display());
        let refuse = |name: &str| resolve(name, Some(&path), root.path()).unwrap_err();
        assert_eq!((refuse("nothing").code, refuse("data").code), (127, 126));
        assert!(refuse("data").reason.contains("x permission"));
        assert!(refuse("./nothing").reason.contains("not found"));
        assert!(refuse("/").reason.contains("directory"));
        assert_eq!(refuse("").code, 127);
    }

    #[test]
    fn kernel_errors_become_sentences() {
        let explained = |code| explain(Path::new("/a"), &io::Error::from_raw_os_error(code));
        assert_eq!(explained(libc::ENOENT).code, 127);
        assert!(explained(libc::ENOEXEC).reason.contains("another processor"));
        assert_eq!(explained(libc::EACCES).code, 126);
    }
}
