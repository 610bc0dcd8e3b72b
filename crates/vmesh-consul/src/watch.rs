//! A sequence of blocking queries for one path.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::time::{Instant, sleep_until};

use crate::client::{Answer, Body, Client, Consistency, Query};
use crate::cursor::{Cursor, Verdict};
use crate::error::{ConsulError, ErrorKind};

/// The parameters of a [`Watch`].
#[derive(Debug, Clone)]
pub struct WatchOptions {
    /// The time for which a query blocks; Consul's limit is 10 min.
    pub wait: Duration,
    /// The servers that may answer.
    pub consistency: Consistency,
    /// The maximum age of a stale answer. An older one is discarded, and the leader is asked.
    pub max_stale: Duration,
}

impl Default for WatchOptions {
    fn default() -> Self {
        WatchOptions {
            wait: Duration::from_secs(60),
            consistency: Consistency::Stale,
            max_stale: Duration::from_secs(10),
        }
    }
}

impl WatchOptions {
    /// Returns the next query of `cursor`, which blocks for at most `wait`.
    pub fn query(&self, cursor: &Cursor, wait: Duration) -> Query {
        let consistency = match self.consistency {
            Consistency::Stale if cursor.needs_leader() => Consistency::Leader,
            consistency => consistency,
        };
        let wait = if cursor.index() > 0 { wait.min(self.wait) } else { Duration::ZERO };
        Query { index: cursor.index(), wait, origin: cursor.origin(), consistency, ..Query::default() }
    }
}

type QueryFuture = Pin<Box<dyn Future<Output = Result<Answer<Option<Body>>, ConsulError>> + Send>>;

/// Watches one path: [`Watch::next`] returns each value that differs from the previous one.
pub struct Watch<T> {
    client: Client,
    path: String,
    query: Query,
    options: WatchOptions,
    cursor: Cursor,
    read: fn(Option<&[u8]>) -> Result<T, String>,
    /// The query in flight and whether the leader answers it. Dropping the future of [`Watch::next`] keeps it.
    in_flight: Option<(bool, QueryFuture)>,
    /// Whether the last returned result was an error.
    has_failed: bool,
}

impl<T> Watch<T> {
    /// Makes a watch for `path`. `read` parses a body; it gets `None` for the status 404.
    pub fn new(
        client: Client,
        path: String,
        query: Query,
        options: WatchOptions,
        read: fn(Option<&[u8]>) -> Result<T, String>,
    ) -> Watch<T> {
        let cursor = Cursor::new(Instant::now());
        Watch { client, path, query, options, cursor, read, in_flight: None, has_failed: false }
    }

    /// Waits for the next value that differs from the last one, or for the first value after an error. Dropping
    /// the future loses no value. After an error the next call waits for the back-off and queries again; the
    /// last value stays valid meanwhile.
    ///
    /// # Errors
    ///
    /// Returns an error each time a query has no answer that can be trusted.
    pub async fn next(&mut self) -> Result<Answer<T>, ConsulError> {
        loop {
            let (asked_leader, in_flight) = match &mut self.in_flight {
                Some((asked_leader, in_flight)) => (*asked_leader, in_flight),
                None => {
                    sleep_until(self.cursor.due()).await;
                    let query = self.query();
                    let (client, path) = (self.client.clone(), self.path.clone());
                    let in_flight: QueryFuture =
                        Box::pin(async move { client.get_or_nothing(&path, &query).await });
                    let asked_leader = self.asks_leader();
                    let (_, in_flight) = self.in_flight.insert((asked_leader, in_flight));
                    (asked_leader, in_flight)
                }
            };
            let outcome = in_flight.await;
            self.in_flight = None;
            let taken = self.process(outcome, asked_leader);
            self.has_failed = taken.is_err() || (self.has_failed && matches!(taken, Ok(None)));
            if let Some(answer) = taken? {
                return Ok(answer);
            }
        }
    }

    /// Reads the value now, with the strongest consistency. The state of [`Watch::next`] does not change.
    pub async fn confirm(&mut self) -> Result<Answer<T>, ConsulError> {
        let query = Query {
            index: 0,
            wait: Duration::ZERO,
            consistency: Consistency::Consistent,
            ..self.query.clone()
        };
        let answer = self.client.get_or_nothing(&self.path, &query).await?;
        let value =
            (self.read)(answer.value.as_deref()).map_err(|wrong| self.client.bad_body(&self.path, &wrong))?;
        Ok(Answer { value, meta: answer.meta })
    }

    fn asks_leader(&self) -> bool {
        self.cursor.needs_leader() || self.options.consistency != Consistency::Stale
    }

    fn query(&self) -> Query {
        let Query { index, wait, origin, consistency, .. } =
            self.options.query(&self.cursor, self.options.wait);
        Query { index, wait, origin, consistency, ..self.query.clone() }
    }

    /// Returns the value of an answer if it is a change.
    fn process(
        &mut self,
        outcome: Result<Answer<Option<Body>>, ConsulError>,
        asked_leader: bool,
    ) -> Result<Option<Answer<T>>, ConsulError> {
        let now = Instant::now();
        let answer = match outcome {
            Ok(answer) => answer,
            Err(error) => {
                self.cursor.on_failure(now);
                return Err(error);
            }
        };
        let mut resets = 0;
        let before = self.cursor.clone();
        let verdict =
            self.cursor.on_answer(&answer.meta, asked_leader, self.options.max_stale, now, &mut resets);
        self.client.counters().index_resets.fetch_add(resets, Ordering::Relaxed);
        match verdict {
            Verdict::Unchanged if !self.has_failed => Ok(None),
            Verdict::Doubtful(doubt) => {
                tracing::debug!("{}: {doubt}; asking the leader", self.path);
                Ok(None)
            }
            // After an error the value is returned even if it is unchanged, to end the caller's outage.
            Verdict::Changed | Verdict::Unchanged => match (self.read)(answer.value.as_deref()) {
                Ok(value) => Ok(Some(Answer { value, meta: answer.meta })),
                Err(wrong) => {
                    // An unusable answer counts as not received, so any later answer is a change.
                    self.cursor = before;
                    self.cursor.on_failure(now);
                    let error = self.client.bad_body(&self.path, &wrong);
                    Err(ConsulError { kind: ErrorKind::BadBody(wrong), ..error })
                }
            },
        }
    }
}
