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

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

use tokio::time::Instant;

use crate::client::Meta;

/// The state of one sequence of blocking queries.
#[derive(Debug, Clone)]
pub struct Cursor {
    /// The index for the next query; 0 reads the current value.
    ask: u64,
    /// The index of the last trusted answer.
    seen: u64,
    hash: Option<u64>,
    view: u64,
    /// Whether the leader must answer the next query.
    strong: bool,
    due: Instant,
    /// How many answers in a row came without blocking and without a change: the server's index also grows for
    /// unrelated reasons.
    idle: u32,
    allowance: Allowance,
    backoff: Backoff,
}

/// The meaning of an answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    News,
    /// The answer equals the previous one.
    Same,
    /// The answer may be outdated, for this reason, and must not be used. The next query goes to the leader.
    Doubtful(String),
}

impl Cursor {
    /// Makes a cursor whose first query is due `at`.
    pub fn new(at: Instant) -> Cursor {
        Cursor {
            ask: 0,
            seen: 0,
            hash: None,
            view: 0,
            strong: false,
            due: at,
            idle: 0,
            allowance: Allowance::new(at),
            backoff: Backoff::default(),
        }
    }

    /// Replaces the rate limit: `burst` queries at once, then one per interval `every`. Default: 5 and 500 ms.
    #[must_use]
    pub fn with_allowance(mut self, burst: u32, every: Duration) -> Cursor {
        self.allowance = Allowance { left: burst, burst, every, ..self.allowance };
        self
    }

    /// Returns the time of the next query.
    pub fn due(&self) -> Instant {
        self.due
    }

    /// Returns the index for the next query; 0 means that it does not block.
    pub fn index(&self) -> u64 {
        self.ask
    }

    /// Reports whether the next query must go to the leader, whatever consistency is configured.
    pub fn is_strong(&self) -> bool {
        self.strong
    }

    /// Returns the origin of the last answer: see [`Meta::origin`].
    pub fn view(&self) -> u64 {
        self.view
    }

    /// Returns the hash of the last trusted answer.
    pub fn hash(&self) -> Option<u64> {
        self.hash
    }

    /// Returns the index of the last trusted answer, or 0 if there was none.
    pub fn seen(&self) -> u64 {
        self.seen
    }

    /// Makes the next query read the current value instead of blocking, when it is due.
    pub fn read_again(&mut self) {
        self.ask = 0;
    }

    /// Makes the next query read the current value from the leader, when it is due: another answer has shown
    /// that the last one is outdated.
    pub fn ask_leader(&mut self) {
        self.ask = 0;
        self.strong = true;
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
        self.ask = 0;
        self.due = now;
    }

    /// Processes an answer. `asked_leader` says whether the query went to the leader; `resets` is increased if
    /// the index went back.
    pub fn took(
        &mut self,
        meta: &Meta,
        was_strong: bool,
        max_stale: Duration,
        now: Instant,
        resets: &mut u64,
    ) -> Verdict {
        self.backoff = Backoff::default();
        let asked = self.ask;
        let index = meta.index.unwrap_or_default();
        let went_back = index < self.seen || index == 0;
        if !was_strong {
            let doubt = if !meta.known_leader {
                Some("the server that answers knows of no leader".to_owned())
            } else if meta.last_contact > max_stale {
                let age = meta.last_contact.as_secs_f64();
                Some(format!("the server that answers has not heard of its leader for {age:.1} s"))
            } else if went_back && self.seen > 0 {
                Some(format!("the index went back from {} to {index}", self.seen))
            } else {
                None
            };
            if let Some(doubt) = doubt {
                self.ask = 0;
                self.strong = true;
                self.due = self.allowance.take(now, Duration::ZERO);
                return Verdict::Doubtful(doubt);
            }
        }
        if went_back {
            *resets += 1;
        }
        self.strong = false;
        self.seen = index;
        self.ask = index;
        self.view = meta.view;
        let is_same = self.hash.replace(meta.hash) == Some(meta.hash);
        let waited = is_same && index == asked && asked > 0;
        self.idle = if is_same && !waited && asked > 0 { (self.idle + 1).min(8) } else { 0 };
        self.due = if waited { now } else { self.allowance.take(now, pause(self.idle)) };
        if is_same { Verdict::Same } else { Verdict::News }
    }

    /// Notes that the caller could not use an answer: the same answer counts as a change again.
    pub fn refused(&mut self, now: Instant) {
        self.hash = None;
        self.failed(now);
    }

    /// Notes a failure: the next query waits for the back-off and reads the current value.
    pub fn failed(&mut self, now: Instant) {
        self.ask = 0;
        self.due = now + self.backoff.draw();
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
struct Allowance {
    left: u32,
    since: Instant,
    burst: u32,
    every: Duration,
}

impl Allowance {
    const BURST: u32 = 5;
    const EVERY: Duration = Duration::from_millis(500);

    fn new(now: Instant) -> Allowance {
        Allowance { left: Self::BURST, since: now, burst: Self::BURST, every: Self::EVERY }
    }

    /// Takes a token. Returns the time at which the next query may be sent, at least `pause` from now.
    fn take(&mut self, now: Instant, pause: Duration) -> Instant {
        let at = now + pause;
        let earned = at.saturating_duration_since(self.since).as_millis() / self.every.as_millis().max(1);
        let earned = u32::try_from(earned).unwrap_or(self.burst);
        if self.left.saturating_add(earned) >= self.burst {
            self.left = self.burst;
            self.since = at;
        } else {
            self.left += earned;
            self.since += self.every * earned;
        }
        match self.left.checked_sub(1) {
            Some(left) => {
                self.left = left;
                at
            }
            None => {
                self.since += self.every;
                self.since
            }
        }
    }
}

/// From 100 ms, twice as long each time, up to 30 s; half of it is drawn.
#[derive(Debug, Clone)]
struct Backoff(Duration);

impl Default for Backoff {
    fn default() -> Self {
        Backoff(Duration::from_millis(100))
    }
}

impl Backoff {
    const LONGEST: Duration = Duration::from_secs(30);

    fn draw(&mut self) -> Duration {
        let whole = self.0;
        self.0 = (whole * 2).min(Self::LONGEST);
        // The seed of a std hash map is random; nothing here depends on how random.
        let share = u32::try_from(RandomState::new().hash_one(0u8) >> 32).unwrap_or_default();
        whole / 2 + (whole / 2).mul_f64(f64::from(share) / f64::from(u32::MAX))
    }
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
            view: 1,
        }
    }

    struct Row {
        cursor: Cursor,
        now: Instant,
        resets: u64,
    }

    impl Row {
        async fn new() -> Row {
            let now = Instant::now();
            Row { cursor: Cursor::new(now), now, resets: 0 }
        }

        /// Returns the verdict on an answer, the index and consistency of the next query, and its delay in
        /// milliseconds.
        fn take(&mut self, meta: &Meta) -> (Verdict, u64, bool, u128) {
            let strong = self.cursor.is_strong();
            let max_stale = Duration::from_secs(10);
            let verdict = self.cursor.took(meta, strong, max_stale, self.now, &mut self.resets);
            let wait = self.cursor.due() - self.now;
            self.now = self.cursor.due();
            (verdict, self.cursor.index(), self.cursor.is_strong(), wait.as_millis())
        }
    }

    fn doubt(text: &str) -> Verdict {
        Verdict::Doubtful(text.to_owned())
    }

    #[tokio::test]
    async fn an_answer_is_news_only_if_it_says_something_else() {
        let mut row = Row::new().await;
        assert_eq!(row.take(&meta(10, 1)), (Verdict::News, 10, false, 0));
        assert_eq!(row.take(&meta(10, 1)), (Verdict::Same, 10, false, 0));
        // The index grows for unrelated reasons, so the pauses grow.
        assert_eq!(row.take(&meta(11, 1)), (Verdict::Same, 11, false, 200));
        assert_eq!(row.take(&meta(12, 1)), (Verdict::Same, 12, false, 400));
        assert_eq!(row.take(&meta(13, 2)), (Verdict::News, 13, false, 0));
        assert_eq!(row.resets, 0);
    }

    #[tokio::test]
    async fn an_index_that_goes_back_is_asked_of_the_leader_and_then_believed() {
        let mut row = Row::new().await;
        row.take(&meta(900, 1));
        let verdict = doubt("the index went back from 900 to 20");
        assert_eq!(row.take(&meta(20, 2)), (verdict, 0, true, 0));
        assert_eq!(row.take(&meta(20, 2)), (Verdict::News, 20, false, 0));
        assert_eq!(row.resets, 1);
    }

    #[tokio::test]
    async fn an_index_of_nothing_never_blocks_and_is_not_asked_for_all_the_time() {
        let mut row = Row::new().await;
        let nothing = Meta { index: None, ..meta(0, 1) };
        assert_eq!(row.take(&nothing).0, Verdict::News);
        let mut waits = Vec::new();
        for _ in 0..8 {
            let (verdict, index, _, wait) = row.take(&nothing);
            assert_eq!((verdict, index), (Verdict::Same, 0));
            waits.push(wait);
        }
        assert!(waits.iter().skip(4).all(|wait| *wait == 500), "{waits:?}");
    }

    #[tokio::test]
    async fn an_answer_without_a_leader_or_from_long_ago_is_doubtful() {
        let mut row = Row::new().await;
        let verdict = doubt("the server that answers knows of no leader");
        assert_eq!(row.take(&Meta { known_leader: false, ..meta(5, 1) }), (verdict, 0, true, 0));
        assert_eq!(row.take(&meta(5, 1)).0, Verdict::News);
        let verdict = doubt("the server that answers has not heard of its leader for 11.0 s");
        assert_eq!(
            row.take(&Meta { last_contact: Duration::from_secs(11), ..meta(6, 2) }),
            (verdict, 0, true, 0)
        );
        assert_eq!(row.cursor.hash(), Some(1));
    }

    #[tokio::test]
    async fn failures_are_further_and_further_apart_and_then_all_is_asked_for() {
        let mut row = Row::new().await;
        row.take(&meta(5, 1));
        let mut least = Duration::from_millis(50);
        for _ in 0..12 {
            row.cursor.failed(row.now);
            let wait = row.cursor.due() - row.now;
            assert!(wait >= least && wait <= least * 2, "{wait:?}");
            least = (least * 2).min(Duration::from_secs(15));
            row.now = row.cursor.due();
        }
        assert_eq!(row.cursor.index(), 0);
        assert_eq!(row.take(&meta(5, 1)).0, Verdict::Same);
    }

    #[tokio::test]
    async fn a_flood_of_news_is_asked_for_twice_a_second() {
        let mut row = Row::new().await;
        let started = row.now;
        for n in 1..=25 {
            assert_eq!(row.take(&meta(n, n)).0, Verdict::News);
        }
        let took = (row.now - started).as_secs();
        assert!((9..=11).contains(&took), "{took} s");
    }
}
