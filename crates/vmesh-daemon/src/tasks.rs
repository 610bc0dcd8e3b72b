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

/// The tasks of a daemon (or of one of its parts). Dropping it drops them all.
///
/// ```
/// # use std::time::Duration;
/// # use vmesh_daemon::Tasks;
/// # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
/// let mut tasks = Tasks::new();
/// tasks.spawn("clock", std::future::pending::<()>()); // Dropped at stop.
/// tasks.spawn_draining("server", |mut stop| async move { stop.requested().await }); // Takes its leave.
/// let late = tasks.stop_within(Duration::from_secs(1)).await;
/// assert!(late.is_empty());
/// # });
/// # Ok::<(), std::io::Error>(())
/// ```
pub struct Tasks {
    running: JoinSet<Result<(), BoxError>>,
    known: HashMap<Id, Known>,
    stop: watch::Sender<bool>,
}

struct Known {
    name: Arc<str>,
    drains: bool,
    abort: AbortHandle,
}

/// What a draining task waits for beside its work.
#[derive(Clone, Debug)]
pub struct Stop(watch::Receiver<bool>);

impl Stop {
    /// Returns once the daemon is to stop, also when it was told so before. Cancel-safe.
    pub async fn requested(&mut self) {
        // An error means that the owner is gone, which is the same message.
        _ = self.0.wait_for(|stop| *stop).await;
    }

    pub fn is_requested(&self) -> bool {
        *self.0.borrow()
    }
}

/// Why a task ended that should not have.
#[derive(Debug)]
pub enum Died {
    Failed(BoxError),
    Panicked(String),
}

impl fmt::Display for Died {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            // Transparent: the task's own error says what it was doing.
            Died::Failed(error) => error.fmt(f),
            Died::Panicked(message) => write!(f, "it panicked (a bug in vmesh): {message}"),
        }
    }
}

impl Error for Died {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        match self {
            Died::Failed(error) => error.source(),
            Died::Panicked(_) => None,
        }
    }
}

/// What a task may return: nothing, or a result.
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
        Tasks { running: JoinSet::new(), known: HashMap::new(), stop: watch::Sender::new(false) }
    }
}

impl Tasks {
    pub fn new() -> Tasks {
        Tasks::default()
    }

    /// Runs `task` until it ends or the daemon stops; then it is dropped where it waits.
    pub fn spawn<F>(&mut self, name: impl Into<Arc<str>>, task: F)
    where
        F: Future + Send + 'static,
        F::Output: Outcome,
    {
        self.start(name.into(), false, task);
    }

    /// Runs a task that takes its leave: it is told to stop and has until the deadline to end by itself.
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
        self.known.insert(abort.id(), Known { name, drains, abort });
    }

    /// Waits for the first task to end, in whatever way: in a daemon none ends by itself. Waits for ever if there
    /// is no task. Cancel-safe.
    pub async fn first_exit(&mut self) -> (Arc<str>, Result<(), Died>) {
        match self.running.join_next_with_id().await {
            Some(ended) => self.name_end(ended),
            None => std::future::pending().await,
        }
    }

    fn name_end(
        &mut self,
        ended: Result<(Id, Result<(), BoxError>), JoinError>,
    ) -> (Arc<str>, Result<(), Died>) {
        let (id, result) = match ended {
            Ok((id, result)) => (id, result.map_err(Died::Failed)),
            Err(error) => (error.id(), died(error)),
        };
        let name = self.known.remove(&id).map_or_else(|| "unnamed".into(), |known| known.name);
        (name, result)
    }

    /// Stops every task and returns the names of those that were still running at the deadline. The draining ones
    /// go first, while the others keep working for them; whatever is left is dropped.
    pub async fn stop_within(mut self, deadline: Duration) -> Vec<Arc<str>> {
        let deadline = Instant::now() + deadline;
        self.stop.send_replace(true);
        while self.known.values().any(|task| task.drains) {
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
        let late = self.known.values().filter(|task| task.drains).map(|task| task.name.clone()).collect();
        for task in self.known.values() {
            task.abort.abort();
        }
        // An aborted task ends at its next await; one that computes or blocks is not waited for.
        let grace = Instant::now() + Duration::from_millis(200);
        while let Ok(Some(_)) = timeout_at(grace, self.running.join_next()).await {}
        self.running.detach_all();
        late
    }
}

fn died(error: JoinError) -> Result<(), Died> {
    match error.try_into_panic() {
        Ok(panic) => Err(Died::Panicked(panic_message(&*panic))),
        // Aborted by its owner, which is no failure.
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

/// Why a thread did not do its work.
#[derive(Debug, thiserror::Error)]
pub enum ThreadError {
    #[error("could not start a thread of its own")]
    Start(#[source] std::io::Error),
    #[error("its thread panicked (a bug in vmesh)")]
    Panicked,
}

/// Runs the future that `work` makes on a thread of its own with a runtime of its own, and waits for it: work that may be
/// much then takes nothing from the tasks of this runtime. The thread goes on if this is dropped, so that what it runs has
/// to end by a [`Stop`].
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
        // What has been given up must not keep the thread.
        runtime.shutdown_background();
    };
    std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(ThreadError::Start)?;
    is_done.await.map_err(|_| ThreadError::Panicked)
}

/// Starts a future whose end the caller watches through the handle: for tests, and for parts that have to hand a
/// handle on. A daemon's tasks belong in [`Tasks`].
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
        struct Dropped(watch::Sender<bool>);
        impl Drop for Dropped {
            fn drop(&mut self) {
                self.0.send_replace(true);
            }
        }
        let (dropped, is_dropped) = watch::channel(false);
        let dropped = Dropped(dropped);
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
