//! Measures the loss of a whole source within a time window. The measure is what is left after additions: an
//! addition within the window compensates a loss, so a deployment that replaces instances, at once or with
//! both running for a while, is no loss. An endpoint that drained, or a service that the source states
//! explicitly to be empty, is not lost either.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmesh_model::{Health, Registration, ServiceName, join};

use super::config::FleetConfig;
use crate::registrations::{Registrations, ServiceView};

/// The loss of a source within the window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Loss {
    /// The number of endpoints at the start of the window, and the number left.
    pub(super) endpoints: (usize, usize),
    /// The number of services at the start of the window, and the number left.
    pub(super) services: (usize, usize),
}

/// The losses of one source within the window.
#[derive(Debug, Default)]
pub(super) struct FleetTracker {
    endpoints: LossWindow,
    services: LossWindow,
}

impl FleetTracker {
    /// Creates the measure of a source that listed `reported` before a restart.
    pub(super) fn restored(reported: &Registrations) -> FleetTracker {
        let alive_count = |view: &ServiceView| alive_count(&view.registration);
        let endpoints = reported.services.values().map(alive_count).sum();
        let services = reported.services.values().filter(|view| alive_count(view) > 0).count();
        FleetTracker {
            endpoints: LossWindow::starting_at(endpoints),
            services: LossWindow::starting_at(services),
        }
    }

    /// Records that the source listed `before` and lists `reported` now. Services for which `excused` returns
    /// `true` may lose everything.
    pub(super) fn record_view(
        &mut self,
        before: &Registrations,
        reported: &Registrations,
        excused: impl Fn(&ServiceName) -> bool,
        now: Instant,
    ) {
        let (mut endpoints, mut services) = (CountChange::default(), CountChange::default());
        for (name, old, new) in changed_services(before, reported) {
            let new_alive = new.map_or(0, |new| alive_count(&new.registration));
            let old_alive = old.map_or(0, |old| alive_count(&old.registration));
            let is_excused = excused(name) || new.is_some_and(|new| new.empty_on_purpose);
            let removed_on_purpose = match (old, new) {
                _ if new_alive == 0 && is_excused => old_alive,
                (Some(old), Some(new)) => newly_draining(&old.registration, &new.registration),
                _ => 0,
            };
            endpoints.count(old_alive, new_alive, removed_on_purpose);
            let present = |alive_count: usize| usize::from(alive_count > 0);
            let has_left = new_alive == 0 && removed_on_purpose == old_alive;
            services.count(
                present(old_alive),
                present(new_alive),
                present(old_alive) * usize::from(has_left),
            );
        }
        self.endpoints.apply(endpoints, now);
        self.services.apply(services, now);
    }

    /// Forgets losses and additions that are older than `window`. Not called during a fleet hold, which waits
    /// for the operator.
    pub(super) fn expire(&mut self, window: Duration, now: Instant) {
        self.endpoints.expire(window, now);
        self.services.expire(window, now);
    }

    /// Returns the loss if it exceeds the configured limits.
    pub(super) fn judge(&self, config: &FleetConfig) -> Option<Loss> {
        let Loss { endpoints, services } = self.loss();
        let is_more = |(had, has): (usize, usize), share: f64| {
            #[expect(clippy::cast_precision_loss, reason = "no source has 2^52 endpoints")]
            let is_more = (had - has) as f64 > share * had as f64;
            is_more
        };
        let several = services.0 - services.1 > 1;
        // A registry that restarted without its content lists nothing, which is suspicious even for a small
        // source.
        let is_fleet = endpoints.0 >= config.min || (several && endpoints.1 == 0);
        let too_much =
            is_more(endpoints, config.endpoints) || (several && is_more(services, config.services));
        (is_fleet && too_much).then_some(Loss { endpoints, services })
    }

    pub(super) fn loss(&self) -> Loss {
        Loss { endpoints: self.endpoints.loss(), services: self.services.loss() }
    }

    /// Accepts every loss so far: the present counts become the reference.
    pub(super) fn accept(&mut self) {
        self.endpoints = LossWindow::starting_at(self.endpoints.count);
        self.services = LossWindow::starting_at(self.services.count);
    }
}

/// Returns the number of endpoints that are not draining.
fn alive_count(registration: &Registration) -> usize {
    registration.endpoints.iter().filter(|endpoint| endpoint.health != Health::Draining).count()
}

/// Returns how many endpoints started to drain between `before` and `now`.
fn newly_draining(before: &Registration, now: &Registration) -> usize {
    let is_alive_before = |address| {
        let found = before.endpoints.binary_search_by_key(&address, |e| e.address).ok();
        found.and_then(|at| before.endpoints.get(at)).is_some_and(|e| e.health != Health::Draining)
    };
    now.endpoints.iter().filter(|e| e.health == Health::Draining && is_alive_before(e.address)).count()
}

/// Returns the services whose registration does not have the same pointer in both views, ordered by name.
fn changed_services<'a>(
    before: &'a Registrations,
    now: &'a Registrations,
) -> impl Iterator<Item = (&'a ServiceName, Option<&'a ServiceView>, Option<&'a ServiceView>)> {
    join(&before.services, &now.services).filter(|(_, was, is)| {
        !matches!((was, is), (Some(was), Some(is)) if Arc::ptr_eq(&was.registration, &is.registration)
            && was.empty_on_purpose == is.empty_on_purpose)
    })
}

/// How a count changes between two views.
#[derive(Debug, Default)]
struct CountChange {
    additions: usize,
    removed: usize,
    removed_on_purpose: usize,
}

impl CountChange {
    /// Adds the change of one service from `old` to `new`, of which `removed_on_purpose` were removed on purpose.
    fn count(&mut self, old: usize, new: usize, removed_on_purpose: usize) {
        let old = old.saturating_sub(removed_on_purpose);
        self.additions += new.saturating_sub(old);
        self.removed += old.saturating_sub(new);
        self.removed_on_purpose += removed_on_purpose;
    }
}

/// A count, and its losses and additions within the window.
#[derive(Debug, Default)]
struct LossWindow {
    count: usize,
    /// Losses that no addition has compensated, with their times.
    losses: VecDeque<(Instant, usize)>,
    /// Additions that compensate later losses within the window, with their times.
    additions: VecDeque<(Instant, usize)>,
    /// Set once the first view was counted. The content of the first view is no addition: it existed before
    /// the source was first read.
    has_begun: bool,
}

impl LossWindow {
    fn starting_at(count: usize) -> LossWindow {
        LossWindow { count, has_begun: true, ..LossWindow::default() }
    }

    fn apply(&mut self, change: CountChange, now: Instant) {
        let CountChange { additions, removed, removed_on_purpose } = change;
        self.count = (self.count + additions).saturating_sub(removed + removed_on_purpose);
        if !self.has_begun {
            self.has_begun = true;
        } else if additions > removed {
            let rest = compensate(&mut self.losses, additions - removed);
            push_entry(&mut self.additions, rest, now);
        } else {
            let rest = compensate(&mut self.additions, removed - additions);
            push_entry(&mut self.losses, rest, now);
        }
    }

    fn expire(&mut self, window: Duration, now: Instant) {
        for queue in [&mut self.losses, &mut self.additions] {
            while queue.front().is_some_and(|(at, _)| *at + window <= now) {
                queue.pop_front();
            }
        }
    }

    /// Returns the count before the losses in the window, and the present count.
    fn loss(&self) -> (usize, usize) {
        let losses: usize = self.losses.iter().map(|(_, number)| number).sum();
        (self.count + losses, self.count)
    }
}

/// Subtracts `number` from the latest entries of `queue`. Returns the part of `number` that exceeds them.
fn compensate(queue: &mut VecDeque<(Instant, usize)>, mut number: usize) -> usize {
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

fn push_entry(queue: &mut VecDeque<(Instant, usize)>, number: usize, now: Instant) {
    match queue.back_mut() {
        _ if number == 0 => {}
        Some((at, last)) if *at == now => *last += number,
        _ => queue.push_back((now, number)),
    }
}
