//! The options and `main` of every bench, and the samples that they print.

use std::process::ExitCode;
use std::time::{Duration, SystemTime};

use clap::{Args, Parser};
use vmesh_daemon::report;
use vmesh_testkit::Result;

/// The timeout of every wait in a bench.
pub const BOUND: Duration = Duration::from_secs(300);

// The size of a mesh, and the number of changes. Not a doc comment, which clap would print as the description
// of the bench.
#[derive(Debug, Clone, Copy, Args)]
pub struct Size {
    #[arg(long, default_value_t = 1_000)]
    pub services: usize,
    /// Endpoints of each service.
    #[arg(long, default_value_t = 10)]
    pub endpoints: usize,
    /// Changes that are measured.
    #[arg(long, default_value_t = 50)]
    pub changes: usize,
}

/// Parses the options, runs the bench on a multi-threaded runtime, and reports its error.
pub fn run_main<O: Parser>(run: impl AsyncFnOnce(O) -> Result<()>) -> ExitCode {
    let options = O::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return report::failed(&error),
    };
    match runtime.block_on(run(options)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failed) => report::failed(&failed),
    }
}

/// Returns the time between `from` and `to`, or zero if the clock was set back.
pub fn duration_between(from: SystemTime, to: SystemTime) -> Duration {
    to.duration_since(from).unwrap_or_default()
}

pub fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}

pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Samples of one measurement.
#[derive(Debug)]
pub struct Samples<T>(pub Vec<T>);

/// Latencies of one measurement.
pub type Times = Samples<Duration>;

impl<T> Default for Samples<T> {
    fn default() -> Samples<T> {
        Samples(Vec::new())
    }
}

impl<T: Copy + Ord + Default> Samples<T> {
    /// Returns the percentile `share`: the smallest sample that at least this share of all samples does not
    /// exceed.
    pub fn p(&self, share: f64) -> T {
        let mut sorted = self.0.clone();
        sorted.sort();
        let at = ((sorted.len() as f64 * share).ceil() as usize).saturating_sub(1);
        sorted.get(at).copied().unwrap_or_default()
    }
}

impl Times {
    /// Returns the median and the 99th percentile as two columns.
    pub fn row(&self) -> String {
        format!("{:>9.2} ms {:>9.2} ms", millis(self.p(0.5)), millis(self.p(0.99)))
    }
}
