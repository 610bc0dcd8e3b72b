//! The resource usage of a process, from the kernel's counters.

use std::time::Duration;

use vmesh_testkit::{Failed, Result};

/// Returns the user and system time of a process, including that of ended threads, in steps of 10 ms.
pub fn cpu_of(pid: u32) -> Result<Duration> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // The second field is a name in parentheses, which may contain any character.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64((ticks(11) + ticks(12)) as f64 / per_second as f64))
}

/// Returns the CPU time of the current threads of a process, in nanoseconds. For changes that take less than
/// a step of [`cpu_of`].
pub fn cpu_of_threads(pid: u32) -> Result<Duration> {
    let tasks = format!("/proc/{pid}/task");
    let entries = std::fs::read_dir(&tasks).map_err(Failed::to(format!("could not list {tasks}")))?;
    // The file of a thread disappears when the thread ends.
    let times =
        entries.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok());
    let nanos = times.filter_map(|stat| stat.split_whitespace().next()?.parse::<u64>().ok()).sum();
    Ok(Duration::from_nanos(nanos))
}

/// The bytes that a process has written.
#[derive(Debug, Clone, Copy)]
pub struct WrittenBytes {
    /// The bytes that reached a file system (`write_bytes`).
    pub to_disk: u64,
    /// The bytes passed to `write` calls (`wchar`).
    pub by_calls: u64,
}

pub fn written_by(pid: u32) -> Result<WrittenBytes> {
    let io = read(&format!("/proc/{pid}/io"))?;
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.and_then(|number| number.parse().ok())
            .ok_or_else(|| Failed::new(format!("/proc/{pid}/io has no `{name}`")))
    };
    Ok(WrittenBytes { to_disk: field("write_bytes")?, by_calls: field("wchar")? })
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(Failed::to(format!("could not read {path}")))
}
