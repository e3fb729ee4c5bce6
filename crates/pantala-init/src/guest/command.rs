//! Which file `argv[0]` means, and in words why one cannot be run.

use std::ffi::CString;
use std::fs::OpenOptions;
use std::io::{self, Read};
use std::os::unix::fs::OpenOptionsExt;
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
            Judgement::Absent => Err(CannotRun::new(CODE_NOT_FOUND, absent(name, &program))),
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
    let kind = Kind::of(program);
    match error.raw_os_error() {
        Some(libc::ENOENT) => CannotRun::new(
            CODE_NOT_FOUND,
            match kind {
                Kind::Script(line) if line.ends_with('\r') => format!(
                    "{shown} cannot run: its #! line names {:?} and ends with a carriage return; save it with Unix line ends",
                    line.trim()
                ),
                Kind::Script(line) => format!(
                    "{shown} cannot run: the interpreter of its #! line, {}, is not in the image",
                    interpreter(&line)
                ),
                Kind::Binary {
                    loader: Some(loader), ..
                } => format!(
                    "{shown} cannot run: its dynamic loader {loader} is not in the image (it is linked against another C \
                     library, or its base image has none)"
                ),
                _ => format!("{shown} cannot run: what it needs to be loaded is not in the image"),
            },
        ),
        Some(libc::ENOEXEC) => CannotRun::new(
            CODE_CANNOT_RUN,
            match kind {
                Kind::Binary { machine, .. } if machine != HERE => format!(
                    "{shown} cannot run: it is built for {}, this host is {}",
                    processor(machine),
                    processor(HERE)
                ),
                Kind::Binary { .. } => format!("{shown} cannot run: it is a damaged program file"),
                Kind::Script(line) => format!(
                    "{shown} cannot run: the interpreter of its #! line, {}, is built for another processor",
                    interpreter(&line)
                ),
                Kind::Empty => format!("{shown} cannot run: the file is empty"),
                Kind::Other => {
                    format!("{shown} cannot run: it is neither a program of this processor nor a script with a #! line")
                }
            },
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

fn absent(name: &str, program: &Path) -> String {
    match std::fs::read_link(program) {
        Ok(target) => format!(
            "the command {name:?} was not found: {} is a link to {}, which is not there",
            program.display(),
            target.display()
        ),
        Err(_) => format!(
            "the command {name:?} was not found: there is no file {}",
            program.display()
        ),
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

const X86_64: u16 = 62;
const AARCH64: u16 = 183;
const HERE: u16 = if cfg!(target_arch = "aarch64") { AARCH64 } else { X86_64 };
const HEAD_BYTES: usize = 64 * 1024;

/// What a program file is, by its first bytes.
#[derive(Debug, PartialEq, Eq)]
enum Kind {
    /// Its first line after `#!`.
    Script(String),
    /// ELF: the number of its processor, and the dynamic loader that it names.
    Binary {
        machine: u16,
        loader: Option<String>,
    },
    Empty,
    Other,
}

impl Kind {
    fn of(program: &Path) -> Kind {
        let mut head = Vec::new();
        // Whoever looks is PID 1: a pipe in the place of a program must not hold it up.
        let opened = OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(program);
        let read = opened.and_then(|file| file.take(HEAD_BYTES as u64).read_to_end(&mut head));
        match (read, head.as_slice()) {
            (Err(_), _) => Kind::Other,
            (_, []) => Kind::Empty,
            (_, [b'#', b'!', rest @ ..]) => {
                let line = rest.split(|&byte| byte == b'\n').next().unwrap_or_default();
                Kind::Script(String::from_utf8_lossy(line).into_owned())
            }
            (_, head) => binary(head).unwrap_or(Kind::Other),
        }
    }
}

/// Little-endian ELF of 64 bits; of any other only the processor is told.
fn binary(head: &[u8]) -> Option<Kind> {
    const PT_INTERP: u32 = 3;
    if !head.starts_with(b"\x7fELF") {
        return None;
    }
    let number = |at: usize, size: usize| -> Option<usize> {
        let bytes = head.get(at..at.checked_add(size)?)?;
        let value = bytes
            .iter()
            .rev()
            .fold(0u64, |value, &byte| value << 8 | u64::from(byte));
        usize::try_from(value).ok()
    };
    let big_endian = head.get(5) == Some(&2);
    let machine = match big_endian {
        true => usize::from(u16::from_be_bytes([*head.get(18)?, *head.get(19)?])),
        false => number(18, 2)?,
    };
    let loader = || -> Option<String> {
        let (table, size, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
        let segment = (0..count)
            .filter_map(|index| table.checked_add(index.checked_mul(size)?))
            .find(|&at| number(at, 4) == Some(PT_INTERP as usize))?;
        let (offset, length) = (
            number(segment.checked_add(8)?, 8)?,
            number(segment.checked_add(32)?, 8)?,
        );
        let path = head.get(offset..offset.checked_add(length)?)?;
        Some(String::from_utf8_lossy(path).trim_end_matches('\0').to_owned())
    };
    Some(Kind::Binary {
        machine: u16::try_from(machine).ok()?,
        loader: if head.get(4) == Some(&2) && !big_endian {
            loader()
        } else {
            None
        },
    })
}

fn interpreter(line: &str) -> &str {
    line.split_whitespace().next().unwrap_or("(none)")
}

fn processor(machine: u16) -> String {
    let name = match machine {
        3 => "i386",
        8 => "mips",
        20 | 21 => "powerpc",
        22 => "s390x",
        40 => "arm (32 bits)",
        X86_64 => "amd64 (x86_64)",
        AARCH64 => "arm64 (aarch64)",
        243 => "riscv64",
        258 => "loongarch64",
        other => return format!("a processor of the ELF number {other}"),
    };
    name.to_owned()
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

    fn said(content: &[u8], code: i32) -> String {
        let folder = tempfile::tempdir().unwrap();
        let program = folder.path().join("app");
        std::fs::write(&program, content).unwrap();
        explain(&program, &io::Error::from_raw_os_error(code)).reason
    }

    /// The head of an ELF file with one segment, which names a loader.
    fn elf(machine: u16, loader: &str) -> Vec<u8> {
        let mut head = vec![0u8; 120];
        head[..6].copy_from_slice(b"\x7fELF\x02\x01");
        head[18..20].copy_from_slice(&machine.to_le_bytes());
        head[32..40].copy_from_slice(&64u64.to_le_bytes());
        head[54..56].copy_from_slice(&56u16.to_le_bytes());
        head[56..58].copy_from_slice(&1u16.to_le_bytes());
        head[64..68].copy_from_slice(&3u32.to_le_bytes());
        head[72..80].copy_from_slice(&120u64.to_le_bytes());
        head[96..104].copy_from_slice(&(loader.len() as u64).to_le_bytes());
        head.extend_from_slice(loader.as_bytes());
        head
    }

    #[test]
    fn kernel_errors_become_sentences() {
        let explained = |code| explain(Path::new("/none"), &io::Error::from_raw_os_error(code));
        assert_eq!(explained(libc::ENOENT).code, 127);
        assert_eq!(explained(libc::ENOEXEC).code, 126);
        assert_eq!(explained(libc::EACCES).code, 126);
    }

    #[test]
    fn what_is_missing_is_named() {
        assert!(said(b"#!/usr/bin/ruby -w\nputs", libc::ENOENT).contains("its #! line, /usr/bin/ruby, is not in"));
        assert!(said(b"#!/bin/sh\r\necho", libc::ENOENT).contains("\"/bin/sh\" and ends with a carriage return"));
        assert!(said(&elf(HERE, "/lib/ld-musl.so.1\0"), libc::ENOENT).contains("loader /lib/ld-musl.so.1 is not"));
        let other = if HERE == X86_64 { AARCH64 } else { X86_64 };
        let built_for = format!("it is built for {}, this host is {}", processor(other), processor(HERE));
        assert!(said(&elf(other, ""), libc::ENOEXEC).contains(&built_for));
        assert!(said(b"", libc::ENOEXEC).contains("the file is empty"));
        assert!(said(b"echo hello", libc::ENOEXEC).contains("nor a script with a #! line"));
    }

    #[test]
    fn damaged_heads_are_read_without_a_fault() {
        let whole = elf(HERE, "/lib/ld.so\0");
        for length in 0..whole.len() {
            binary(&whole[..length]);
            let mut damaged = whole.clone();
            damaged[length..].fill(0xff);
            binary(&damaged);
        }
    }
}
