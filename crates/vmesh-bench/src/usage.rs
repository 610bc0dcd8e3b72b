//! What a process has cost so far, as the kernel counts it.

use std::time::Duration;

use vmesh_testkit::{Failed, Result};

/// User and system time of a process so far, in steps of 10 ms; that of ended threads is in it.
pub fn cpu_of(pid: u32) -> Result<Duration> {
    let stat = read(&format!("/proc/{pid}/stat"))?;
    // The second field is in parentheses and may hold anything.
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<u64>().ok()).unwrap_or_default();
    let per_second = rustix::param::clock_ticks_per_second();
    Ok(Duration::from_secs_f64((ticks(11) + ticks(12)) as f64 / per_second as f64))
}

/// CPU time of the threads that a process has now, in nanoseconds: for changes that take less than a step of [`cpu_of`].
pub fn cpu_of_threads(pid: u32) -> Result<Duration> {
    let tasks = format!("/proc/{pid}/task");
    let entries = std::fs::read_dir(&tasks).map_err(Failed::to(format!("could not list {tasks}")))?;
    // A thread that ended since then has no file any more.
    let times =
        entries.flatten().filter_map(|task| std::fs::read_to_string(task.path().join("schedstat")).ok());
    let nanos = times.filter_map(|stat| stat.split_whitespace().next()?.parse::<u64>().ok()).sum();
    Ok(Duration::from_nanos(nanos))
}

/// What a process has written so far.
#[derive(Debug, Clone, Copy)]
pub struct Written {
    /// Bytes that went to a file system (`write_bytes`).
    pub to_disk: u64,
    /// Bytes that it passed to `write` (`wchar`).
    pub by_calls: u64,
}

pub fn written_by(pid: u32) -> Result<Written> {
    let io = read(&format!("/proc/{pid}/io"))?;
    let field = |name: &str| {
        let line = io.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.and_then(|number| number.parse().ok())
            .ok_or_else(|| Failed::new(format!("/proc/{pid}/io has no `{name}`")))
    };
    Ok(Written { to_disk: field("write_bytes")?, by_calls: field("wchar")? })
}

fn read(path: &str) -> Result<String> {
    std::fs::read_to_string(path).map_err(Failed::to(format!("could not read {path}")))
}
