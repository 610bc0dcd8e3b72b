//! `cargo xtask fuzz`: runs the targets of `vmesh-fuzz` under libFuzzer, as many in parallel as the machine
//! has cores.
//!
//! A run starts from the corpus in the repository and from inputs found by earlier runs
//! (`target/fuzz-findings/NAME/corpus`). An input that breaks a target is saved in
//! `target/fuzz-findings/NAME`, and the command fails.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::thread;

use vmesh_testkit::{Failed, Result};

use crate::build;

#[derive(Debug, clap::Args)]
pub(crate) struct FuzzOptions {
    /// The targets to run; all by default.
    targets: Vec<String>,
    /// Seconds for each target.
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// Build with optimisations (and the checks of a debug build): slower to build, but several times as many
    /// runs.
    #[arg(long)]
    optimised: bool,
}

/// Selects the target in the fuzzing process, see `vmesh_fuzz::ENVIRONMENT`.
const ENVIRONMENT: &str = "VMESH_FUZZ_TARGET";
/// The size limit of an input, in bytes.
const MAX_LEN: usize = 4096;
/// The timeout of one run, in seconds: a thousand times the duration of the slowest.
const RUN_TIMEOUT: u32 = 20;
/// The memory limit of a target, in MiB. Every parser promises to stay far below.
const MEMORY: u32 = 1024;

pub(crate) fn run(options: &FuzzOptions) -> Result<()> {
    let targets = select_targets(&options.targets)?;
    let binary = compile(options.optimised)?;
    let workers = thread::available_parallelism().map_or(1, usize::from).min(targets.len());
    println!("{} targets, {} s each, {workers} at once", targets.len(), options.seconds);
    let queue = Mutex::new(targets.into_iter());
    let next = || queue.lock().unwrap_or_else(std::sync::PoisonError::into_inner).next();
    let failures: Vec<Failed> = thread::scope(|scope| {
        let work = || {
            let mut failures = Vec::new();
            while let Some(target) = next() {
                match fuzz_target(&target, &binary, options.seconds) {
                    Ok(summary) => println!("{target:<12} {summary}"),
                    Err(failed) => {
                        println!("{target:<12} BROKEN: {failed}");
                        failures.push(failed);
                    }
                }
            }
            failures
        };
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(work)).collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    });
    match failures.into_iter().next() {
        None => Ok(()),
        Some(first) => Err(first),
    }
}

/// Returns the directory of the seeds. A test of `vmesh-fuzz` checks that each directory in it has the name
/// of a target.
fn corpus() -> PathBuf {
    build::root().join("crates/vmesh-fuzz/corpus")
}

fn select_targets(names: &[String]) -> Result<Vec<String>> {
    let corpus = corpus();
    let entries =
        fs::read_dir(&corpus).map_err(Failed::to(format!("could not list {}", corpus.display())))?;
    let mut all: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    all.sort();
    if let Some(unknown) = names.iter().find(|name| !all.contains(name)) {
        return Err(Failed::new(format!("there is no fuzz target `{unknown}`, only {}", all.join(", "))));
    }
    Ok(if names.is_empty() { all } else { names.to_vec() })
}

fn compile(optimised: bool) -> Result<PathBuf> {
    let wrapper = build::root().join("crates/vmesh-fuzz/instrumented.sh");
    let mut args = vec!["build", "--package", "vmesh-fuzz", "--bin", "fuzz", "--features", "libfuzzer"];
    if optimised {
        args.extend(["--profile", "fuzz"]);
    }
    let wrapper = wrapper.display().to_string();
    build::cargo_with("build the fuzz targets", &args, &[("RUSTC_WORKSPACE_WRAPPER", &wrapper)])?;
    Ok(build::target()?.join(if optimised { "fuzz" } else { "debug" }).join("fuzz"))
}

/// Runs one target, and returns libFuzzer's final statistics.
fn fuzz_target(target: &str, binary: &Path, seconds: u32) -> Result<String> {
    let dir = build::target()?.join("fuzz-findings").join(target);
    let found = dir.join("corpus");
    fs::create_dir_all(&found).map_err(Failed::to(format!("could not make {}", found.display())))?;
    let log_path = dir.join("log");
    let log =
        File::create(&log_path).map_err(Failed::to(format!("could not write {}", log_path.display())))?;
    let mut command = Command::new(binary);
    command
        .env(ENVIRONMENT, target)
        .arg(format!("-max_total_time={seconds}"))
        .arg(format!("-max_len={MAX_LEN}"))
        .arg(format!("-timeout={RUN_TIMEOUT}"))
        .arg(format!("-rss_limit_mb={MEMORY}"))
        .arg(format!("-artifact_prefix={}/", dir.display()))
        .args(["-print_final_stats=1", "-use_value_profile=1"])
        .arg(&found)
        .arg(corpus().join(target))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log);
    let status = command.status().map_err(Failed::to(format!("could not start {}", binary.display())))?;
    let log = fs::read(&log_path).map_err(Failed::to(format!("could not read {}", log_path.display())))?;
    let log = String::from_utf8_lossy(&log);
    if status.success() {
        return Ok(summary(&log));
    }
    let findings: Vec<&str> = log
        .lines()
        .filter(|line| {
            line.contains("panicked at") || line.starts_with("SUMMARY") || line.contains("Test unit written")
        })
        .collect();
    Err(Failed::new(format!(
        "the fuzz target `{}` was broken by an input in {}: mend the cause, and copy the input to {} ({})",
        target,
        dir.display(),
        corpus().join(target).display(),
        findings.join("; ")
    )))
}

fn summary(log: &str) -> String {
    let stat = |name: &str| log.lines().find_map(|line| line.strip_prefix(name)).map_or("?", str::trim);
    let coverage =
        log.lines().rev().find_map(|line| line.split("cov: ").nth(1)?.split(' ').next()).unwrap_or("?");
    format!(
        "{:>9} runs, {:>5} new inputs, {coverage:>5} edges covered, {:>4} MiB at most",
        stat("stat::number_of_executed_units:"),
        stat("stat::new_units_added:"),
        stat("stat::peak_rss_mb:")
    )
}
