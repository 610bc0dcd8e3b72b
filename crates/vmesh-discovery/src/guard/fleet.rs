//! How much a source has lost as a whole within a while.
//!
//! What is judged is what is left after additions: what came within the window makes up for what goes, so instances
//! that are replaced by others, at once or with both there for a while, are a deployment. What took its leave, by
//! draining or because the source says in as many words that there is nothing, is not lost.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmesh_model::{Health, Registration, ServiceName, join};

use super::config::FleetConfig;
use crate::source::{Registrations, Seen};

/// What a source knew, and what of it is gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loss {
    /// Of endpoints: how many were known, and how many are left.
    pub(super) endpoints: (usize, usize),
    /// The same of services.
    pub(super) services: (usize, usize),
}

/// The losses of one source.
#[derive(Debug, Default)]
pub(super) struct Fleet {
    endpoints: Tide,
    services: Tide,
}

impl Fleet {
    /// What was believed before a restart was known all along.
    pub(super) fn knowing(told: &Registrations) -> Fleet {
        let alive = |seen: &Seen| alive(&seen.registration);
        let endpoints = told.services.values().map(alive).sum();
        let services = told.services.values().filter(|seen| alive(seen) > 0).count();
        Fleet { endpoints: Tide::of(endpoints), services: Tide::of(services) }
    }

    /// The source said `before`, and says `told` now. Services for which `excused` holds may lose everything.
    pub(super) fn turn(
        &mut self,
        before: &Registrations,
        told: &Registrations,
        excused: impl Fn(&ServiceName) -> bool,
        now: Instant,
    ) {
        let (mut endpoints, mut services) = (Turn::default(), Turn::default());
        for (name, old, new) in differing(before, told) {
            let new_alive = new.map_or(0, |new| alive(&new.registration));
            let old_alive = old.map_or(0, |old| alive(&old.registration));
            let is_excused = excused(name) || new.is_some_and(|new| new.empty_on_purpose);
            let left = match (old, new) {
                _ if new_alive == 0 && is_excused => old_alive,
                (Some(old), Some(new)) => drained(&old.registration, &new.registration),
                _ => 0,
            };
            endpoints.count(old_alive, new_alive, left);
            let present = |alive: usize| usize::from(alive > 0);
            let has_left = new_alive == 0 && left == old_alive;
            services.count(
                present(old_alive),
                present(new_alive),
                present(old_alive) * usize::from(has_left),
            );
        }
        self.endpoints.turn(endpoints, now);
        self.services.turn(services, now);
    }

    /// Forgets what is longer ago than `window`. Not called while anything waits for a word of the operator.
    pub(super) fn age(&mut self, window: Duration, now: Instant) {
        self.endpoints.age(window, now);
        self.services.age(window, now);
    }

    /// What is gone, if it is too much.
    pub(super) fn judge(&self, config: &FleetConfig) -> Option<Loss> {
        let Loss { endpoints, services } = self.loss();
        let is_more = |(had, has): (usize, usize), share: f64| {
            #[expect(clippy::cast_precision_loss, reason = "no source has 2^52 endpoints")]
            let is_more = (had - has) as f64 > share * had as f64;
            is_more
        };
        let several = services.0 - services.1 > 1;
        // A registry that was started again without its content says that nothing is there, however little there was.
        let is_fleet = endpoints.0 >= config.min || (several && endpoints.1 == 0);
        let too_much =
            is_more(endpoints, config.endpoints) || (several && is_more(services, config.services));
        (is_fleet && too_much).then_some(Loss { endpoints, services })
    }

    pub(super) fn loss(&self) -> Loss {
        Loss { endpoints: self.endpoints.loss(), services: self.services.loss() }
    }

    /// What is there now is what was ever known: what is gone was meant to go.
    pub(super) fn accept(&mut self) {
        self.endpoints = Tide::of(self.endpoints.known);
        self.services = Tide::of(self.services.known);
    }
}

/// Those that have not taken their leave.
fn alive(registration: &Registration) -> usize {
    registration.endpoints.iter().filter(|endpoint| endpoint.health != Health::Draining).count()
}

/// How many were not draining before and do now.
fn drained(before: &Registration, now: &Registration) -> usize {
    let is_alive_before = |address| {
        let found = before.endpoints.binary_search_by_key(&address, |e| e.address).ok();
        found.and_then(|at| before.endpoints.get(at)).is_some_and(|e| e.health != Health::Draining)
    };
    now.endpoints.iter().filter(|e| e.health == Health::Draining && is_alive_before(e.address)).count()
}

/// The services of which the two do not have the same pointer, by name.
fn differing<'a>(
    before: &'a Registrations,
    now: &'a Registrations,
) -> impl Iterator<Item = (&'a ServiceName, Option<&'a Seen>, Option<&'a Seen>)> {
    join(&before.services, &now.services).filter(|(_, was, is)| {
        !matches!((was, is), (Some(was), Some(is)) if Arc::ptr_eq(&was.registration, &is.registration)
            && was.empty_on_purpose == is.empty_on_purpose)
    })
}

/// What changes of a number at once.
#[derive(Debug, Default)]
struct Turn {
    came: usize,
    went: usize,
    left: usize,
}

impl Turn {
    /// `left` of the `old` went on purpose.
    fn count(&mut self, old: usize, new: usize, left: usize) {
        let old = old.saturating_sub(left);
        self.came += new.saturating_sub(old);
        self.went += old.saturating_sub(new);
        self.left += left;
    }
}

/// A number of things that come and go.
#[derive(Debug, Default)]
struct Tide {
    known: usize,
    /// What went and was not made up for, and when.
    gone: VecDeque<(Instant, usize)>,
    /// What came and makes up for what goes within the window.
    came: VecDeque<(Instant, usize)>,
    /// What came first was there before it was known.
    has_begun: bool,
}

impl Tide {
    fn of(known: usize) -> Tide {
        Tide { known, has_begun: true, ..Tide::default() }
    }

    fn turn(&mut self, turn: Turn, now: Instant) {
        let Turn { came, went, left } = turn;
        self.known = (self.known + came).saturating_sub(went + left);
        if !self.has_begun {
            self.has_begun = true;
        } else if came > went {
            let rest = settle(&mut self.gone, came - went);
            remember(&mut self.came, rest, now);
        } else {
            let rest = settle(&mut self.came, went - came);
            remember(&mut self.gone, rest, now);
        }
    }

    fn age(&mut self, window: Duration, now: Instant) {
        for queue in [&mut self.gone, &mut self.came] {
            while queue.front().is_some_and(|(at, _)| *at + window <= now) {
                queue.pop_front();
            }
        }
    }

    /// How many were known, and how many are left.
    fn loss(&self) -> (usize, usize) {
        let gone: usize = self.gone.iter().map(|(_, number)| number).sum();
        (self.known + gone, self.known)
    }
}

/// Takes `number` off what happened last; returns what is left of it.
fn settle(queue: &mut VecDeque<(Instant, usize)>, mut number: usize) -> usize {
    while number > 0 {
        let Some((_, last)) = queue.back_mut() else { break };
        let taken = number.min(*last);
        *last -= taken;
        number -= taken;
        if *last == 0 {
            queue.pop_back();
        }
    }
    number
}

fn remember(queue: &mut VecDeque<(Instant, usize)>, number: usize, now: Instant) {
    match queue.back_mut() {
        _ if number == 0 => {}
        Some((at, last)) if *at == now => *last += number,
        _ => queue.push_back((now, number)),
    }
}
