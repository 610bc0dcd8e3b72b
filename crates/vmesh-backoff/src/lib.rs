//! Pauses between attempts that grow with each failure, and random durations that spread the members of a fleet.
//!
//! **Invariant:** no clock and no runtime: this crate computes durations, and its callers wait.

use std::hash::{BuildHasher, RandomState};
use std::time::Duration;

/// The pauses between the attempts of one task.
///
/// Call [`Backoff::next_pause`] after each failure and wait for as long as it says; call [`Backoff::reset`] after a success.
/// Two clones draw different pauses.
#[derive(Clone, Debug)]
pub struct Backoff {
    growth: Growth,
    shortest: Duration,
    longest: Duration,
    /// The next pause before jitter, or the last pause with jitter, depending on `growth`.
    current: Duration,
}

#[derive(Clone, Copy, Debug)]
enum Growth {
    Doubling,
    Decorrelated,
}

impl Backoff {
    /// Makes a back-off whose pause doubles from `first` up to `longest`. The upper half of each pause is random, so the
    /// first one lasts between half of `first` and `first`.
    pub fn doubling(first: Duration, longest: Duration) -> Backoff {
        Backoff { growth: Growth::Doubling, shortest: first, longest, current: first }
    }

    /// Makes a back-off with "decorrelated jitter": each pause is random between `shortest` and three times the previous
    /// one, and at most `longest`.
    pub fn decorrelated(shortest: Duration, longest: Duration) -> Backoff {
        Backoff { growth: Growth::Decorrelated, shortest, longest, current: shortest }
    }

    /// Returns the next pause, and grows the one after it.
    pub fn next_pause(&mut self) -> Duration {
        match self.growth {
            Growth::Doubling => {
                let whole = self.current;
                self.current = (whole * 2).min(self.longest);
                whole / 2 + jitter(whole / 2)
            }
            Growth::Decorrelated => {
                let span = (self.current * 3).saturating_sub(self.shortest);
                self.current = (self.shortest + jitter(span)).min(self.longest);
                self.current
            }
        }
    }

    /// Starts again with the shortest pause.
    pub fn reset(&mut self) {
        self.current = self.shortest;
    }
}

/// Returns a random duration below `end`, or zero if `end` is zero.
pub fn jitter(end: Duration) -> Duration {
    match u64::try_from(end.as_nanos()).unwrap_or(u64::MAX) {
        0 => Duration::ZERO,
        end => Duration::from_nanos(generator().u64(0..end)),
    }
}

/// Shuffles `items`, so that the members of a fleet do not all choose the same one.
pub fn shuffle<T>(items: &mut [T]) {
    generator().shuffle(items);
}

/// Makes a generator whose seed comes from the operating system, by way of the keys of the standard library's
/// hash maps. The output is unsuitable for secrets.
fn generator() -> fastrand::Rng {
    fastrand::Rng::with_seed(RandomState::new().hash_one(0u8))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MILLI: Duration = Duration::from_millis(1);

    #[test]
    fn a_doubling_pause_grows_to_its_limit_and_starts_again_after_a_success() {
        let mut backoff = Backoff::doubling(100 * MILLI, 30_000 * MILLI);
        for attempt in 0..12 {
            let (whole, pause) = ((100 * MILLI * (1 << attempt)).min(30_000 * MILLI), backoff.next_pause());
            assert!(pause >= whole / 2 && pause <= whole, "{attempt}: {pause:?}");
        }
        backoff.reset();
        assert!(backoff.next_pause() <= 100 * MILLI);
    }

    #[test]
    fn decorrelated_pauses_stay_between_the_shortest_and_the_longest_and_differ_between_nodes() {
        let (shortest, longest) = (200 * MILLI, 5_000 * MILLI);
        let pauses = || {
            let mut backoff = Backoff::decorrelated(shortest, longest);
            (0..200).map(|_| backoff.next_pause()).collect::<Vec<_>>()
        };
        let (one, two) = (pauses(), pauses());
        assert!(one.iter().chain(&two).all(|pause| (shortest..=longest).contains(pause)));
        assert!(one.iter().any(|pause| *pause > longest / 2));
        assert_ne!(one, two);
        assert!(one[0] < 600 * MILLI);
    }

    #[test]
    fn clones_draw_different_pauses() {
        let backoff = Backoff::doubling(10_000 * MILLI, 10_000 * MILLI);
        let pauses: std::collections::BTreeSet<_> = (0..20).map(|_| backoff.clone().next_pause()).collect();
        assert!(pauses.len() > 10, "{pauses:?}");
    }

    #[test]
    fn jitter_reaches_all_of_its_range_and_nothing_beyond() {
        let drawn: Vec<_> = (0..1000).map(|_| jitter(100 * MILLI)).collect();
        assert!(drawn.iter().all(|jitter| *jitter < 100 * MILLI));
        assert!(drawn.iter().any(|jitter| *jitter < 10 * MILLI));
        assert!(drawn.iter().any(|jitter| *jitter > 90 * MILLI));
        assert_eq!(jitter(Duration::ZERO), Duration::ZERO);
    }

    #[test]
    fn a_shuffle_loses_nothing_and_begins_anywhere() {
        let mut firsts = [0; 3];
        for _ in 0..600 {
            let mut items = [0, 1, 2];
            shuffle(&mut items);
            firsts[items[0]] += 1;
            items.sort();
            assert_eq!(items, [0, 1, 2]);
        }
        assert!(firsts.iter().all(|count| *count > 100), "{firsts:?}");
    }
}
