//! Owned, named tasks.

use std::collections::HashMap;
use std::error::Error;
use std::fmt;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::task::{AbortHandle, Id, JoinError, JoinHandle, JoinSet};
use tokio::time::{Instant, timeout_at};
use tracing::error;

type BoxError = Box<dyn Error + Send + Sync>;

/// A set of named tasks of a daemon. Dropping the set drops its tasks.
///
/// ```
/// # use std::time::Duration;
/// # use vmesh_daemon::Tasks;
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
/// let mut tasks = Tasks::new();
/// tasks.spawn("clock", std::future::pending::<()>()); // Dropped at stop.
/// tasks.spawn_draining("server", |mut stop| async move { stop.requested().await }); // Drains.
/// let late = tasks.stop_within(Duration::from_secs(1)).await;
/// assert!(late.is_empty());
/// # });
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Tasks {
    running: JoinSet<Result<(), BoxError>>,
    entries: HashMap<Id, TaskEntry>,
    stop: watch::Sender<bool>,
}

struct TaskEntry {
    name: Arc<str>,
    drains: bool,
    abort: AbortHandle,
}

/// The request to stop, which a draining task awaits beside its work.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Waits until the daemon must stop. Returns at once if the stop was requested before. Cancel-safe.
    pub async fn requested(&mut self) {
        // An error means that the owner is gone, which has the same meaning.
        _ = self.0.wait_for(|stop| *stop).await;
    }

    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }
}

/// The reason why a task ended unexpectedly.
#[derive(Debug)]
pub enum TaskFailure {
    Failed(BoxError),
    Panicked(String),
}

impl fmt::Display for TaskFailure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // The error is shown alone, since it already names the failed operation.
            TaskFailure::Failed(error) => error.fmt(f),
            TaskFailure::Panicked(message) => write!(f, "it panicked (a bug in vmesh): {message}"),
        }
    }
}

impl Error for TaskFailure {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            TaskFailure::Failed(error) => error.source(),
            TaskFailure::Panicked(_) => None,
        }
    }
}

/// The return type of a task: nothing, or a result.
pub trait Outcome: Send + 'static {
    fn outcome(self) -> Result<(), BoxError>;
}

impl Outcome for () {
    fn outcome(self) -> Result<(), BoxError> {
        Ok(())
    }
}

impl Outcome for std::convert::Infallible {
    fn outcome(self) -> Result<(), BoxError> {
        match self {}
    }
}

impl<E: Into<BoxError> + Send + 'static> Outcome for Result<(), E> {
    fn outcome(self) -> Result<(), BoxError> {
        self.map_err(Into::into)
    }
}

impl Default for Tasks {
    fn default() -> Self {
        Tasks { running: JoinSet::new(), entries: HashMap::new(), stop: watch::Sender::new(false) }
    }
}

impl Tasks {
    pub fn new() -> Tasks {
        Tasks::default()
    }

    /// Runs `task` until it ends or the daemon stops, which drops the task at its current await.
    pub fn spawn<F>(&mut self, name: impl Into<Arc<str>>, task: F)
    where
        F: Future + Send + 'static,
        F::Output: Outcome,
    {
        self.start(name.into(), false, task);
    }

    /// Runs a task that drains: at the stop it is notified, and has until the deadline to end by itself.
    pub fn spawn_draining<F>(&mut self, name: impl Into<Arc<str>>, task: impl FnOnce(Stop) -> F)
    where
        F: Future + Send + 'static,
        F::Output: Outcome,
    {
        let stop = Stop(self.stop.subscribe());
        self.start(name.into(), true, task(stop));
    }

    fn start<F>(&mut self, name: Arc<str>, drains: bool, task: F)
    where
        F: Future + Send + 'static,
        F::Output: Outcome,
    {
        let abort = self.running.spawn(async move { task.await.outcome() });
        self.entries.insert(abort.id(), TaskEntry { name, drains, abort });
    }

    /// Waits for the first task to end, for whatever reason: a daemon's tasks should run for ever. Waits for ever without tasks.
    /// Cancel-safe.
    pub async fn first_exit(&mut self) -> (Arc<str>, Result<(), TaskFailure>) {
        match self.running.join_next_with_id().await {
            Some(ended) => self.name_end(ended),
            None => std::future::pending().await,
        }
    }

    fn name_end(
        &mut self,
        ended: Result<(Id, Result<(), BoxError>), JoinError>,
    ) -> (Arc<str>, Result<(), TaskFailure>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result.map_err(TaskFailure::Failed)),
            Err(error) => (error.id(), failure_of(error)),
        };
        let name = self.entries.remove(&id).map_or_else(|| "unnamed".into(), |entries| entries.name);
        (name, result)
    }

    /// Stops all tasks, and returns the names of those that were still running at the deadline. The draining tasks end first, while the
    /// others still run; then those are dropped.
    pub async fn stop_within(mut self, deadline: Duration) -> Vec<Arc<str>> {
        let deadline = Instant::now() + deadline;
        self.stop.send_replace(true);
        while self.entries.values().any(|task| task.drains) {
            match timeout_at(deadline, self.running.join_next_with_id()).await {
                Ok(Some(ended)) => {
                    let (name, result) = self.name_end(ended);
                    if let Err(died) = result {
                        error!(task = %name, "the task failed while stopping: {}", crate::report::one_line(&died));
                    }
                }
                Ok(None) => break,
                Err(_) => break,
            }
        }
        let late = self.entries.values().filter(|task| task.drains).map(|task| task.name.clone()).collect();
        for task in self.entries.values() {
            task.abort.abort();
        }
        // An aborted task ends at its next await. A task that computes or blocks is not waited for.
        let grace = Instant::now() + Duration::from_millis(200);
        while let Ok(Some(_)) = timeout_at(grace, self.running.join_next()).await {}
        self.running.detach_all();
        late
    }
}

fn failure_of(error: JoinError) -> Result<(), TaskFailure> {
    match error.try_into_panic() {
        Ok(panic) => Err(TaskFailure::Panicked(panic_message(&*panic))),
        // A task that its owner aborted has not failed.
        Err(_) => Ok(()),
    }
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

/// Runs work that blocks, such as a write to the disk, on a thread for such work, and waits for it. The work goes on if the future is
/// dropped. A panic of the work becomes a panic of the caller.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await.map_err(JoinError::try_into_panic) {
        Ok(done) => done,
        Err(Ok(panic)) => std::panic::resume_unwind(panic),
        // The runtime stops, and nobody waits for the result.
        Err(Err(_)) => std::future::pending().await,
    }
}

/// The reason why work on a separate thread failed.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    #[error("could not start a thread of its own")]
    Start(#[source] std::io::Error),
    #[error("its thread panicked (a bug in vmesh)")]
    Panicked,
}

/// Runs the future that `work` returns on a thread and a runtime of its own, and waits for it: a long computation then does not delay the
/// tasks of this runtime. Dropping the returned future does not stop the thread, so the work must end by a [`Stop`].
pub async fn on_own_thread<F, T>(
    name: &str,
    work: impl FnOnce() -> F + Send + 'static,
) -> Result<T, ThreadError>
where
    F: Future<Output = T>,
    T: Send + 'static,
{
    let (done, is_done) = tokio::sync::oneshot::channel();
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ThreadError::Start)?;
    let run = move || {
        let outcome = runtime.block_on(async { work().await });
        _ = done.send(outcome);
        // Work that was given up must not keep the thread alive.
        runtime.shutdown_background();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(ThreadError::Start)?;
    is_done.await.map_err(|_| ThreadError::Panicked)
}

/// Starts a future and returns its handle: for tests, and for code that hands the handle on. A daemon's tasks belong in [`Tasks`].
#[expect(clippy::disallowed_methods, reason = "this is the wrapper that the lint points to")]
pub fn spawn_handle<F>(future: F) -> JoinHandle<F::Output>
where
    F: Future + Send + 'static,
    F::Output: Send + 'static,
{
    tokio::spawn(future)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOON: Duration = Duration::from_secs(5);

    #[tokio::test]
    async fn a_task_that_ends_is_named() {
        let mut tasks = Tasks::new();
        tasks.spawn("waits", std::future::pending::<()>());
        tasks.spawn("ends", async { Err::<(), _>(std::io::Error::other("no disk")) });
        let (name, result) = tasks.first_exit().await;
        assert_eq!((&*name, result.unwrap_err().to_string().as_str()), ("ends", "no disk"));
    }

    #[tokio::test]
    async fn work_on_a_thread_of_its_own_is_waited_for_and_its_panic_is_seen() {
        let here = std::thread::current().id();
        let there = on_own_thread("there", async || std::thread::current().id()).await.unwrap();
        assert_ne!(here, there);
        let panicked = on_own_thread("there", async move || assert_eq!(here, there)).await;
        assert!(matches!(panicked, Err(ThreadError::Panicked)));
    }

    #[tokio::test]
    async fn a_panic_ends_in_first_exit_with_its_message() {
        let mut tasks = Tasks::new();
        tasks.spawn("compiler", async {
            let one = 1;
            assert_eq!(one + 1, 3, "arithmetic");
        });
        let (name, result) = tasks.first_exit().await;
        let died = result.unwrap_err().to_string();
        assert_eq!(&*name, "compiler");
        assert!(died.starts_with("it panicked (a bug in vmesh): ") && died.contains("arithmetic"), "{died}");
    }

    #[tokio::test]
    async fn a_draining_task_takes_its_leave_while_the_others_still_work_for_it() {
        let mut tasks = Tasks::new();
        let (ask, mut asked) = tokio::sync::mpsc::channel::<tokio::sync::oneshot::Sender<()>>(1);
        tasks.spawn("helper", async move {
            while let Some(answer) = asked.recv().await {
                _ = answer.send(());
            }
        });
        let (done, mut is_done) = watch::channel(false);
        tasks.spawn_draining("server", move |mut stop| async move {
            stop.requested().await;
            let (answer, answered) = tokio::sync::oneshot::channel();
            ask.send(answer).await.unwrap();
            answered.await.unwrap();
            done.send_replace(true);
        });
        assert!(tasks.stop_within(SOON).await.is_empty());
        assert!(*is_done.borrow_and_update());
    }

    #[tokio::test]
    async fn a_task_that_does_not_take_its_leave_in_time_is_named_and_dropped() {
        struct DropFlag(watch::Sender<bool>);
        impl Drop for DropFlag {
            fn drop(&mut self) {
                self.0.send_replace(true);
            }
        }
        let (dropped, is_dropped) = watch::channel(false);
        let dropped = DropFlag(dropped);
        let mut tasks = Tasks::new();
        tasks.spawn("idle", std::future::pending::<()>());
        tasks.spawn_draining("stuck", move |_| async move {
            let _dropped = dropped;
            std::future::pending::<()>().await;
        });
        assert_eq!(tasks.stop_within(Duration::from_millis(30)).await, [Arc::from("stuck")]);
        assert!(*is_dropped.borrow());
    }
}
