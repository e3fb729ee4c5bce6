//! What the kernel counts of a machine, read from files of its control groups (version 1 or 2) that were opened on the host.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};

const FILE_BYTES_MAX: usize = 16 * 1024;

/// By what they are for; what a host does not count is not there.
#[derive(Serialize, Deserialize, Default)]
pub struct Counters<T> {
    pub memory_used: T,
    pub memory_limit: T,
    pub memory_stat: T,
    pub cpu: T,
    pub swap_used: Option<T>,
    pub swap_limit: Option<T>,
}

impl<T> Counters<T> {
    pub fn try_map<U, E>(&self, mut open: impl FnMut(&T) -> Result<U, E>) -> Result<Counters<U>, E> {
        Ok(Counters {
            memory_used: open(&self.memory_used)?,
            memory_limit: open(&self.memory_limit)?,
            memory_stat: open(&self.memory_stat)?,
            cpu: open(&self.cpu)?,
            swap_used: self.swap_used.as_ref().and_then(|one| open(one).ok()),
            swap_limit: self.swap_limit.as_ref().and_then(|one| open(one).ok()),
        })
    }
}

/// In bytes.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Memory {
    pub total: u64,
    pub used: u64,
    pub swap_total: u64,
    pub swap_used: u64,
    /// By the names of version 2.
    pub parts: BTreeMap<String, u64>,
}

/// In hundredths of a second, since the machine was prepared.
#[derive(Default, Debug, PartialEq, Eq)]
pub struct Cpu {
    pub user: u64,
    pub system: u64,
}

impl Counters<File> {
    /// `size` and `beside` in bytes: what the machine has, and what its limit holds besides.
    pub fn memory(&self, unified: bool, size: u64, beside: u64) -> Memory {
        let limit = number(&self.memory_limit).unwrap_or(u64::MAX);
        let used = number(&self.memory_used).unwrap_or(0);
        let swap_used = self.swap_used.as_ref().and_then(number).unwrap_or(0);
        let swap_limit = self.swap_limit.as_ref().and_then(number).unwrap_or(0);
        let (swap_total, swap_used) = match unified {
            true => (swap_limit, swap_used),
            // Version 1 counts swap together with memory.
            false => (swap_limit.saturating_sub(limit), swap_used.saturating_sub(used)),
        };
        let swap_total = swap_total.min(swap_of_the_host());
        Memory {
            total: limit.saturating_sub(beside).min(size),
            used,
            swap_total,
            swap_used: swap_used.min(swap_total),
            parts: pairs(&text(&self.memory_stat))
                .filter_map(|(name, value)| {
                    Some((if unified { name } else { name_of_version_2(name)? }.to_owned(), value))
                })
                .collect(),
        }
    }

    pub fn cpu(&self, unified: bool) -> Cpu {
        let text = text(&self.cpu);
        let mut cpu = Cpu::default();
        for (name, value) in pairs(&text) {
            match (unified, name) {
                (false, "user") => cpu.user = value,
                (false, "system") => cpu.system = value,
                (true, "user_usec") => cpu.user = value / 10_000,
                (true, "system_usec") => cpu.system = value / 10_000,
                _ => {}
            }
        }
        cpu
    }
}

/// With what is counted in groups below: a runtime may have made some.
fn name_of_version_2(name: &str) -> Option<&str> {
    Some(match name.strip_prefix("total_")? {
        "cache" => "file",
        "rss" => "anon",
        "mapped_file" => "file_mapped",
        "dirty" => "file_dirty",
        "writeback" => "file_writeback",
        same => same,
    })
}

fn text(file: &File) -> String {
    let mut buffer = vec![0; FILE_BYTES_MAX];
    let length = file.read_at(&mut buffer, 0).unwrap_or(0);
    buffer.truncate(length);
    String::from_utf8_lossy(&buffer).into_owned()
}

/// None: it cannot be read, or says "max".
fn number(file: &File) -> Option<u64> {
    text(file).trim().parse().ok()
}

fn pairs(text: &str) -> impl Iterator<Item = (&str, u64)> {
    text.lines().filter_map(|line| {
        let (name, value) = line.split_once(' ')?;
        Some((name, value.trim().parse().ok()?))
    })
}

fn swap_of_the_host() -> u64 {
    // SAFETY: a struct of numbers, of which all zeros are valid, and the call that fills it.
    unsafe {
        let mut info: libc::sysinfo = std::mem::zeroed();
        if libc::sysinfo(&raw mut info) < 0 {
            return 0;
        }
        info.totalswap.saturating_mul(u64::from(info.mem_unit))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    fn file(text: &str) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    }

    fn counters(used: &str, limit: &str, stat: &str, cpu: &str) -> Counters<File> {
        Counters {
            memory_used: file(used),
            memory_limit: file(limit),
            memory_stat: file(stat),
            cpu: file(cpu),
            swap_used: None,
            swap_limit: None,
        }
    }

    #[test]
    fn both_versions_tell_the_same() {
        let first = counters(
            "900\n",
            "1100\n",
            "cache 1\nrss 1\ntotal_cache 300\ntotal_rss 200\n",
            "user 12\nsystem 3\n",
        );
        let second = counters(
            "900\n",
            "1100\n",
            "anon 200\nfile 300\n",
            "user_usec 120000\nsystem_usec 30000\n",
        );
        let expected = Memory {
            total: 1000,
            used: 900,
            parts: [("anon".to_owned(), 200), ("file".to_owned(), 300)].into(),
            ..Memory::default()
        };
        assert_eq!(first.memory(false, 1000, 100), expected);
        assert_eq!(second.memory(true, 1000, 100), expected);
        assert_eq!(first.cpu(false), Cpu { user: 12, system: 3 });
        assert_eq!(second.cpu(true), Cpu { user: 12, system: 3 });
    }

    #[test]
    fn a_changed_limit_shows_and_one_that_is_none_does_not() {
        assert_eq!(counters("1", "600", "", "").memory(true, 1000, 100).total, 500);
        assert_eq!(counters("1", "max", "", "").memory(true, 1000, 100).total, 1000);
        assert_eq!(counters("1", "", "", "").memory(true, 1000, 100).total, 1000);
    }
}
