//! Waiting for a value, with a time limit.

use std::fmt::Display;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::{Failed, Result};

/// The result of a probe: the value, or what it found instead.
pub trait ProbeResult {
    type Value;
    fn into_result(self) -> Result<Self::Value, String>;
}

impl<T> ProbeResult for Option<T> {
    type Value = T;
    fn into_result(self) -> Result<T, String> {
        self.ok_or_else(|| "nothing yet".to_owned())
    }
}

impl<T, E: Display> ProbeResult for Result<T, E> {
    type Value = T;
    fn into_result(self) -> Result<T, String> {
        self.map_err(|error| error.to_string())
    }
}

/// Calls the probe until it returns a value. After `bound`, fails with the last result of the probe.
///
/// ```
/// # use std::time::Duration;
/// # use vmesh_testkit::wait_for;
/// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
/// let count = std::cell::Cell::new(0);
/// let three = wait_for("three", Duration::from_secs(5), async || {
///     count.set(count.get() + 1);
///     if count.get() == 3 { Ok("three") } else { Err(count.get()) }
/// });
/// assert_eq!(three.await.unwrap(), "three");
/// # });
/// ```
pub async fn wait_for<S: ProbeResult>(
    what: impl Display,
    bound: Duration,
    mut probe: impl AsyncFnMut() -> S,
) -> Result<S::Value> {
    let deadline = Instant::now() + bound;
    let mut last = "no answer".to_owned();
    while let Ok(answer) = timeout_at(deadline, probe()).await {
        match answer.into_result() {
            Ok(value) => return Ok(value),
            Err(state) => last = state,
        }
        if Instant::now() >= deadline {
            break;
        }
        // The time limit is checked only after a probe, so at least one probe runs.
        sleep(Duration::from_millis(10)).await;
    }
    Err(Failed::new(format!("waited {bound:?} for {what}; last seen: {last}")))
}
