//! Decides what a sequence of blocking queries asks next, and what each answer means. Pure: time is an
//! argument.
//!
//! The rules come from Consul's documentation (api-docs/features/blocking) and the experience of its clients:
//! an answer is not necessarily a change; after an index that went back, is 0, or is missing, the sequence
//! starts anew; after a failure the next query reads the current value instead of blocking.
//!
//! Call [`Cursor::due`] for the time of the next query and [`Cursor::index`], [`Cursor::needs_leader`] and
//! [`Cursor::origin`] for its parameters; then report its outcome with [`Cursor::on_answer`] or
//! [`Cursor::on_failure`].

use std::time::Duration;

use tokio::time::Instant;
use vmesh_backoff::Backoff;

use crate::client::Meta;

/// The state of one sequence of blocking queries.
#[derive(Debug, Clone)]
pub struct Cursor {
    /// The index for the next query; 0 reads the current value.
    next_index: u64,
    /// The index of the last trusted answer.
    last_index: u64,
    hash: Option<u64>,
    origin: u64,
    /// Whether the leader must answer the next query.
    needs_leader: bool,
    due: Instant,
    /// How many answers in a row came without blocking and without a change: the server's index also grows for
    /// unrelated reasons.
    idle: u32,
    rate_limit: TokenBucket,
    backoff: Backoff,
}

/// The meaning of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    Changed,
    /// The answer equals the previous one.
    Unchanged,
    /// The answer may be outdated, for this reason, and must not be used. The next query goes to the leader.
    Doubtful(String),
}

impl Cursor {
    /// Makes a cursor whose first query is due `at`.
    pub fn new(at: Instant) -> Cursor {
        Cursor {
            next_index: 0,
            last_index: 0,
            hash: None,
            origin: 0,
            needs_leader: false,
            due: at,
            idle: 0,
            rate_limit: TokenBucket::new(at),
            backoff: failure_backoff(),
        }
    }

    /// Replaces the rate limit: `burst` queries at once, then one per interval `every`. Default: 5 and 500 ms.
    #[must_use]
    pub fn with_rate_limit(mut self, burst: u32, every: Duration) -> Cursor {
        self.rate_limit = TokenBucket { tokens: burst, burst, every, ..self.rate_limit };
        self
    }

    /// Returns the time of the next query.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Returns the index for the next query; 0 means that it does not block.
    pub fn index(&self) -> u64 {
        self.next_index
    }

    /// Reports whether the next query must go to the leader, whatever consistency is configured.
    pub fn needs_leader(&self) -> bool {
        self.needs_leader
    }

    /// Returns the origin of the last answer: see [`Meta::origin`].
    pub fn origin(&self) -> u64 {
        self.origin
    }

    /// Returns the hash of the last trusted answer.
    pub fn hash(&self) -> Option<u64> {
        self.hash
    }

    /// Returns the index of the last trusted answer, or 0 if there was none.
    pub fn last_index(&self) -> u64 {
        self.last_index
    }

    /// Makes the next query read the current value instead of blocking, when it is due.
    pub fn read_again(&mut self) {
        self.next_index = 0;
    }

    /// Makes the next query read the current value from the leader, when it is due: another answer has shown
    /// that the last one is outdated.
    pub fn ask_leader(&mut self) {
        self.next_index = 0;
        self.needs_leader = true;
    }

    /// Moves the next query to `at`, unless it is due later.
    pub fn postpone(&mut self, at: Instant) {
        self.due = self.due.max(at);
    }

    /// Moves the next query to `at`, unless it is due earlier.
    pub fn hasten(&mut self, at: Instant) {
        self.due = self.due.min(at);
    }

    /// Makes the next query due now, and lets it read the current value.
    pub fn start_over(&mut self, now: Instant) {
        self.next_index = 0;
        self.due = now;
    }

    /// Processes an answer. `asked_leader` says whether the query went to the leader; `resets` is increased if
    /// the index went back.
    pub fn on_answer(
        &mut self,
        meta: &Meta,
        asked_leader: bool,
        max_stale: Duration,
        now: Instant,
        resets: &mut u64,
    ) -> Verdict {
        self.backoff.reset();
        let asked = self.next_index;
        let index = meta.index.unwrap_or_default();
        let went_back = index < self.last_index || index == 0;
        if !asked_leader {
            let doubt = if !meta.known_leader {
                Some("the server that answered has no leader".to_owned())
            } else if meta.last_contact > max_stale {
                let age = meta.last_contact.as_secs_f64();
                Some(format!("the server that answered has had no contact with its leader for {age:.1} s"))
            } else if went_back && self.last_index > 0 {
                Some(format!("the index went back from {} to {index}", self.last_index))
            } else {
                None
            };
            if let Some(doubt) = doubt {
                self.next_index = 0;
                self.needs_leader = true;
                self.due = self.rate_limit.take(now, Duration::ZERO);
                return Verdict::Doubtful(doubt);
            }
        }
        if went_back {
            *resets += 1;
        }
        self.needs_leader = false;
        self.last_index = index;
        self.next_index = index;
        self.origin = meta.origin;
        let is_same = self.hash.replace(meta.hash) == Some(meta.hash);
        let waited = is_same && index == asked && asked > 0;
        self.idle = if is_same && !waited && asked > 0 { (self.idle + 1).min(8) } else { 0 };
        self.due = if waited { now } else { self.rate_limit.take(now, pause(self.idle)) };
        if is_same { Verdict::Unchanged } else { Verdict::Changed }
    }

    /// Notes that the caller could not use an answer: the same answer counts as a change again.
    pub fn on_rejected(&mut self, now: Instant) {
        self.hash = None;
        self.on_failure(now);
    }

    /// Notes a failure: the next query waits for the back-off and reads the current value.
    pub fn on_failure(&mut self, now: Instant) {
        self.next_index = 0;
        self.due = now + self.backoff.next_pause();
    }
}

/// Returns the pause after answers without a change, so that writes elsewhere in a table do not cause endless
/// queries.
fn pause(idle: u32) -> Duration {
    match idle {
        0 => Duration::ZERO,
        n => Duration::from_millis(100 << n.min(6)).min(Duration::from_secs(5)),
    }
}

/// A token bucket: a burst of queries, then one per interval `every`.
#[derive(Debug, Clone)]
struct TokenBucket {
    tokens: u32,
    since: Instant,
    burst: u32,
    every: Duration,
}

impl TokenBucket {
    const BURST: u32 = 5;
    const EVERY: Duration = Duration::from_millis(500);

    fn new(now: Instant) -> TokenBucket {
        TokenBucket { tokens: Self::BURST, since: now, burst: Self::BURST, every: Self::EVERY }
    }

    /// Takes a token. Returns the time at which the next query may be sent, at least `pause` from now.
    fn take(&mut self, now: Instant, pause: Duration) -> Instant {
        let at = now + pause;
        let earned = at.saturating_duration_since(self.since).as_millis() / self.every.as_millis().max(1);
        let earned = u32::try_from(earned).unwrap_or(self.burst);
        if self.tokens.saturating_add(earned) >= self.burst {
            self.tokens = self.burst;
            self.since = at;
        } else {
            self.tokens += earned;
            self.since += self.every * earned;
        }
        match self.tokens.checked_sub(1) {
            Some(tokens) => {
                self.tokens = tokens;
                at
            }
            None => {
                self.since += self.every;
                self.since
            }
        }
    }
}

/// Makes the back-off after failures: 100 ms at first, doubled after each failure up to 30 s.
fn failure_backoff() -> Backoff {
    Backoff::doubling(Duration::from_millis(100), Duration::from_secs(30))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn meta(index: u64, hash: u64) -> Meta {
        Meta {
            index: Some(index),
            known_leader: true,
            last_contact: Duration::ZERO,
            filtered: false,
            translated: false,
            hash,
            origin: 1,
        }
    }

    struct QueryLoop {
        cursor: Cursor,
        now: Instant,
        resets: u64,
    }

    impl QueryLoop {
        async fn new() -> QueryLoop {
            let now = Instant::now();
            QueryLoop { cursor: Cursor::new(now), now, resets: 0 }
        }

        /// Returns the verdict on an answer, the index and consistency of the next query, and its delay in
        /// milliseconds.
        fn take(&mut self, meta: &Meta) -> (Verdict, u64, bool, u128) {
            let strong = self.cursor.needs_leader();
            let max_stale = Duration::from_secs(10);
            let verdict = self.cursor.on_answer(meta, strong, max_stale, self.now, &mut self.resets);
            let wait = self.cursor.due() - self.now;
            self.now = self.cursor.due();
            (verdict, self.cursor.index(), self.cursor.needs_leader(), wait.as_millis())
        }
    }

    fn doubtful(text: &str) -> Verdict {
        Verdict::Doubtful(text.to_owned())
    }

    #[tokio::test]
    async fn an_answer_is_news_only_if_it_says_something_else() {
        let mut queries = QueryLoop::new().await;
        assert_eq!(queries.take(&meta(10, 1)), (Verdict::Changed, 10, false, 0));
        assert_eq!(queries.take(&meta(10, 1)), (Verdict::Unchanged, 10, false, 0));
        // The index grows for unrelated reasons, so the pauses grow.
        assert_eq!(queries.take(&meta(11, 1)), (Verdict::Unchanged, 11, false, 200));
        assert_eq!(queries.take(&meta(12, 1)), (Verdict::Unchanged, 12, false, 400));
        assert_eq!(queries.take(&meta(13, 2)), (Verdict::Changed, 13, false, 0));
        assert_eq!(queries.resets, 0);
    }

    #[tokio::test]
    async fn an_index_that_goes_back_is_asked_of_the_leader_and_then_believed() {
        let mut queries = QueryLoop::new().await;
        queries.take(&meta(900, 1));
        let verdict = doubtful("the index went back from 900 to 20");
        assert_eq!(queries.take(&meta(20, 2)), (verdict, 0, true, 0));
        assert_eq!(queries.take(&meta(20, 2)), (Verdict::Changed, 20, false, 0));
        assert_eq!(queries.resets, 1);
    }

    #[tokio::test]
    async fn an_index_of_nothing_never_blocks_and_is_not_asked_for_all_the_time() {
        let mut queries = QueryLoop::new().await;
        let nothing = Meta { index: None, ..meta(0, 1) };
        assert_eq!(queries.take(&nothing).0, Verdict::Changed);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let (verdict, index, _, wait) = queries.take(&nothing);
            assert_eq!((verdict, index), (Verdict::Unchanged, 0));
            waits.push(wait);
        }
        assert!(waits.iter().skip(4).all(|wait| *wait == 500), "{waits:?}");
    }

    #[tokio::test]
    async fn an_answer_without_a_leader_or_from_long_ago_is_doubtful() {
        let mut queries = QueryLoop::new().await;
        let verdict = doubtful("the server that answered has no leader");
        assert_eq!(queries.take(&Meta { known_leader: false, ..meta(5, 1) }), (verdict, 0, true, 0));
        assert_eq!(queries.take(&meta(5, 1)).0, Verdict::Changed);
        let verdict = doubtful("the server that answered has had no contact with its leader for 11.0 s");
        assert_eq!(
            queries.take(&Meta { last_contact: Duration::from_secs(11), ..meta(6, 2) }),
            (verdict, 0, true, 0)
        );
        assert_eq!(queries.cursor.hash(), Some(1));
    }

    #[tokio::test]
    async fn failures_are_further_and_further_apart_and_then_all_is_asked_for() {
        let mut queries = QueryLoop::new().await;
        queries.take(&meta(5, 1));
        let mut least = Duration::from_millis(50);
        for _ in 0..12 {
            queries.cursor.on_failure(queries.now);
            let wait = queries.cursor.due() - queries.now;
            assert!(wait >= least && wait <= least * 2, "{wait:?}");
            least = (least * 2).min(Duration::from_secs(15));
            queries.now = queries.cursor.due();
        }
        assert_eq!(queries.cursor.index(), 0);
        assert_eq!(queries.take(&meta(5, 1)).0, Verdict::Unchanged);
    }

    #[tokio::test]
    async fn a_flood_of_news_is_asked_for_twice_a_second() {
        let mut queries = QueryLoop::new().await;
        let started = queries.now;
        for n in 1..=25 {
            assert_eq!(queries.take(&meta(n, n)).0, Verdict::Changed);
        }
        let took = (queries.now - started).as_secs();
        assert!((9..=11).contains(&took), "{took} s");
    }
}
