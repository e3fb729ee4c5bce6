//! Files as the kernel would write them for a computer of the machine's size. Pure; formats: proc(5).

use std::fmt::Write;

use super::counters::{Cpu, Memory};
use super::tasks::Tasks;

const LENGTH_STEP: usize = 256;

/// What the kernel counts only for a whole host (free lists, page tables of version 1 …) is 0 or left out.
pub fn meminfo(memory: &Memory) -> String {
    let part = |name: &str| memory.parts.get(name).copied().unwrap_or(0);
    let free = memory.total.saturating_sub(memory.used);
    let (file, shmem, anon) = (part("file"), part("shmem"), part("anon"));
    let slab = part("slab_reclaimable");
    // As the kernel estimates it: what is free and what would be given back for the asking.
    let available = (free + part("active_file") + part("inactive_file") + slab).min(memory.total);
    let lines = [
        ("MemTotal", memory.total),
        ("MemFree", free),
        ("MemAvailable", available),
        ("Buffers", 0),
        ("Cached", file),
        ("SwapCached", 0),
        ("Active", part("active_anon") + part("active_file")),
        ("Inactive", part("inactive_anon") + part("inactive_file")),
        ("Active(anon)", part("active_anon")),
        ("Inactive(anon)", part("inactive_anon")),
        ("Active(file)", part("active_file")),
        ("Inactive(file)", part("inactive_file")),
        ("Unevictable", part("unevictable")),
        ("Mlocked", 0),
        ("SwapTotal", memory.swap_total),
        ("SwapFree", memory.swap_total.saturating_sub(memory.swap_used)),
        ("Dirty", part("file_dirty")),
        ("Writeback", part("file_writeback")),
        ("AnonPages", anon),
        ("Mapped", part("file_mapped")),
        ("Shmem", shmem),
        ("KReclaimable", slab),
        ("Slab", slab + part("slab_unreclaimable")),
        ("SReclaimable", slab),
        ("SUnreclaim", part("slab_unreclaimable")),
        ("KernelStack", part("kernel_stack")),
        ("PageTables", part("pagetables")),
        ("CommitLimit", memory.total / 2 + memory.swap_total),
        ("Committed_AS", anon + shmem),
    ];
    let mut text = String::new();
    for (name, bytes) in lines {
        let _ = writeln!(text, "{:<16}{:>8} kB", format!("{name}:"), bytes / 1024);
    }
    text
}

pub fn swaps(memory: &Memory) -> String {
    let mut text = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n".to_owned();
    if memory.swap_total > 0 {
        let (total, used) = (memory.swap_total / 1024, memory.swap_used / 1024);
        let _ = writeln!(text, "{:<40}partition\t{total}\t\t{used}\t\t-2", "/dev/swap");
    }
    text
}

/// What `lived` so many hundredths of a second had of its CPUs, and did not use.
fn idle(cpus: u32, cpu: &Cpu, lived: u64) -> u64 {
    (lived * u64::from(cpus.max(1))).saturating_sub(cpu.user + cpu.system)
}

/// `since_boot` and `lived` in hundredths of a second; they differ where boot is the host's.
pub fn uptime(since_boot: u64, cpus: u32, cpu: &Cpu, lived: u64) -> String {
    let seconds = |time: u64| format!("{}.{:02}", time / 100, time % 100);
    format!("{} {}\n", seconds(since_boot), seconds(idle(cpus, cpu, lived)))
}

/// Averages would have to be sampled, by a timer in each machine; the kernel keeps none of a group.
pub fn loadavg(tasks: &Tasks) -> String {
    format!("0.00 0.00 0.00 {}/{} {}\n", tasks.running, tasks.all, tasks.newest)
}

/// `lived` in hundredths of a second. Which of its CPUs was busy nobody counts: each was as much as the others.
/// `booted_s` is from where start times of processes count.
pub fn stat(cpus: u32, cpu: &Cpu, lived: u64, booted_s: u64) -> String {
    let count = u64::from(cpus.max(1));
    let idle = idle(cpus, cpu, lived);
    let line = |name: &str, part: &dyn Fn(u64) -> u64| {
        let (user, system, idle) = (part(cpu.user), part(cpu.system), part(idle));
        format!("{name} {user} 0 {system} {idle} 0 0 0 0 0 0\n")
    };
    let mut text = line("cpu ", &|whole| whole);
    for index in 0..count {
        // The first ones have what is left over, so that the sum is the whole.
        text += &line(&format!("cpu{index}"), &|whole| {
            whole / count + u64::from(index < whole % count)
        });
    }
    let rest = "processes 0\nprocs_running 1\nprocs_blocked 0\nsoftirq 0 0 0 0 0 0 0 0 0 0 0\n";
    let _ = write!(text, "intr 0\nctxt 0\nbtime {booted_s}\n{rest}");
    text
}

/// To a length that seldom changes, by blanks at the end: the kernel learns the length and the text one after the other.
pub fn even(mut text: String) -> String {
    text.pop();
    let length = (text.len() + 1).next_multiple_of(LENGTH_STEP);
    format!("{text:<width$}\n", width = length - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1024 * 1024;

    fn value(text: &str, name: &str) -> u64 {
        let line = text.lines().find(|line| line.starts_with(&format!("{name}:"))).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn memory_in_use_is_not_free_and_files_are_available() {
        let parts = [("file", 60), ("active_file", 30), ("inactive_file", 20), ("anon", 40)];
        let memory = Memory {
            total: 256 * MIB,
            used: 100 * MIB,
            swap_total: 64 * MIB,
            swap_used: 16 * MIB,
            parts: parts.map(|(name, mib)| (name.to_owned(), mib * MIB)).into(),
        };
        let text = meminfo(&memory);
        assert_eq!(text.lines().next().unwrap(), "MemTotal:         262144 kB");
        let seen = ["MemFree", "MemAvailable", "Cached", "SwapTotal", "SwapFree"].map(|name| value(&text, name) / 1024);
        assert_eq!(seen, [156, 206, 60, 64, 48]);
        assert!(swaps(&memory).contains("partition\t65536\t\t16384"));
    }

    #[test]
    fn a_machine_over_its_size_has_nothing_free_and_less_than_nothing_is_never_said() {
        let memory = Memory {
            total: MIB,
            used: 5 * MIB,
            parts: [("active_file".to_owned(), 9 * MIB)].into(),
            ..Memory::default()
        };
        let text = meminfo(&memory);
        assert_eq!((value(&text, "MemFree"), value(&text, "MemAvailable")), (0, 1024));
        assert_eq!(swaps(&memory).lines().count(), 1);
    }

    #[test]
    fn a_length_changes_seldom() {
        let text = even("a 1\nb 2\n".to_owned());
        assert_eq!((text.len(), text.trim_end()), (LENGTH_STEP, "a 1\nb 2"));
        assert_eq!(text.lines().count(), 2);
        assert_eq!(even("x".repeat(LENGTH_STEP) + "\n").len(), 2 * LENGTH_STEP);
    }

    #[test]
    fn its_age_and_what_its_cpus_did_not_do_are_seconds() {
        let cpu = Cpu { user: 150, system: 50 };
        assert_eq!(uptime(1205, 2, &cpu, 1200), "12.05 22.00\n");
        assert_eq!(uptime(9_000_000, 1, &cpu, 100), "90000.00 0.00\n");
    }

    #[test]
    fn tasks_are_counted_and_nothing_is_averaged() {
        let tasks = Tasks {
            running: 2,
            all: 7,
            newest: 31,
        };
        assert_eq!(loadavg(&tasks), "0.00 0.00 0.00 2/7 31\n");
    }

    #[test]
    fn its_cpus_add_up_to_the_whole() {
        let text = stat(3, &Cpu { user: 10, system: 5 }, 100, 1_700_000_000);
        let numbers = |line: &str| -> Vec<u64> {
            let fields = line.split_whitespace().skip(1);
            fields.map(|field| field.parse().unwrap()).collect()
        };
        let lines: Vec<&str> = text.lines().filter(|line| line.starts_with("cpu")).collect();
        assert_eq!(lines.len(), 4);
        assert_eq!(numbers(lines[0])[..4], [10, 0, 5, 285]);
        for field in 0..4 {
            let sum: u64 = lines[1..].iter().map(|line| numbers(line)[field]).sum();
            assert_eq!(sum, numbers(lines[0])[field]);
        }
        assert!(text.contains("btime 1700000000\n"));
        assert!(stat(1, &Cpu { user: 900, system: 0 }, 100, 0).starts_with("cpu  900 0 0 0 "));
    }
}
