//! Random delays and back-off for retries.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// A source of jitter, random enough to spread the nodes of a fleet. Not for secrets.
#[derive(Debug)]
pub(crate) struct JitterSource(u64);

impl JitterSource {
    pub(crate) fn new() -> JitterSource {
        // The standard library seeds its hash maps from the operating system's random numbers.
        JitterSource(RandomState::new().hash_one(0u8) | 1)
    }

    fn next_random(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }

    /// Returns a number below `end`, or 0 if `end` is 0.
    fn below(&mut self, end: u64) -> u64 {
        self.next_random().checked_rem(end).unwrap_or(0)
    }

    /// Returns a duration below `end`.
    pub(crate) fn time_below(&mut self, end: Duration) -> Duration {
        Duration::from_micros(self.below(u64::try_from(end.as_micros()).unwrap_or(u64::MAX)))
    }

    pub(crate) fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            let other = self.below(last as u64 + 1) as usize;
            items.swap(last, other);
        }
    }
}

impl Default for JitterSource {
    fn default() -> Self {
        JitterSource::new()
    }
}

/// Growing pauses with "decorrelated jitter": each is a random one from a range that depends on its predecessor. Nodes that lost their
/// control plane together do not reconnect together.
#[derive(Debug)]
pub(crate) struct Backoff {
    shortest: Duration,
    longest: Duration,
    last: Duration,
    jitter: JitterSource,
}

impl Backoff {
    pub(crate) fn new(shortest: Duration, longest: Duration) -> Backoff {
        Backoff { shortest, longest, last: shortest, jitter: JitterSource::new() }
    }

    /// Returns the next pause.
    pub(crate) fn pause(&mut self) -> Duration {
        let span = (self.last * 3).saturating_sub(self.shortest);
        self.last = (self.shortest + self.jitter.time_below(span)).min(self.longest);
        self.last
    }

    pub(crate) fn reset(&mut self) {
        self.last = self.shortest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pauses_stay_between_the_shortest_and_the_longest_and_differ_between_nodes() {
        let (shortest, longest) = (Duration::from_millis(200), Duration::from_secs(5));
        let pauses = || {
            let mut backoff = Backoff::new(shortest, longest);
            (0..200).map(|_| backoff.pause()).collect::<Vec<_>>()
        };
        let (one, two) = (pauses(), pauses());
        assert!(one.iter().chain(&two).all(|pause| (shortest..=longest).contains(pause)));
        assert!(one.iter().any(|pause| *pause > longest / 2));
        assert_ne!(one, two);
        assert!(one[0] < Duration::from_millis(600));
    }

    #[test]
    fn a_shuffle_loses_nothing_and_begins_anywhere() {
        let mut jitter = JitterSource::new();
        let mut firsts = [0; 3];
        for _ in 0..600 {
            let mut items = [0, 1, 2];
            jitter.shuffle(&mut items);
            firsts[items[0]] += 1;
            items.sort();
            assert_eq!(items, [0, 1, 2]);
        }
        assert!(firsts.iter().all(|count| *count > 100), "{firsts:?}");
    }
}
