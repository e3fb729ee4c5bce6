//! How many tasks a machine has, as its own `/proc` shows them to PID 1.

use std::fs;

/// `newest`: the last process id that was given. PID 1 runs in place of whoever asks and waits for it.
#[derive(Debug, PartialEq, Eq)]
pub struct Tasks {
    pub running: usize,
    pub all: usize,
    pub newest: u32,
}

pub fn count() -> Tasks {
    let mut tasks = Tasks {
        running: 0,
        all: 0,
        newest: 0,
    };
    for pid in numbers("/proc") {
        tasks.newest = tasks.newest.max(pid);
        for task in numbers(&format!("/proc/{pid}/task")) {
            // Gone between two looks is as good as never seen.
            let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/task/{task}/stat")) else {
                continue;
            };
            tasks.all += 1;
            tasks.running += usize::from(is_running(&stat));
        }
    }
    if let Ok(last) = fs::read_to_string("/proc/sys/kernel/ns_last_pid") {
        tasks.newest = last.trim().parse().unwrap_or(tasks.newest);
    }
    tasks
}

fn numbers(folder: &str) -> impl Iterator<Item = u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

/// The state is the first field after the name, which may hold anything.
fn is_running(stat: &str) -> bool {
    stat.rsplit_once(") ").is_some_and(|(_, rest)| rest.starts_with('R'))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_does_not_say_that_it_runs() {
        assert!(is_running("7 (sh) R 1 7 7 0"));
        assert!(!is_running("7 (a) R b) S 1 7 7 0"));
        assert!(!is_running(""));
    }

    #[test]
    fn this_one_runs() {
        let tasks = count();
        assert!(tasks.running >= 1 && tasks.all >= tasks.running, "{tasks:?}");
        assert!(tasks.newest > 0);
    }
}
