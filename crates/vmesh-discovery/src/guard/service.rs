//! The guard of one service.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmesh_model::text::show_duration;
use vmesh_model::{Endpoint, Health, Registration, ServiceName, State};

use super::config::GuardConfig;
use super::{HeldChange, HoldKind};
use crate::registrations::{Extent, ServiceView};

/// The circumstances, besides its own view, in which a service is judged.
pub(super) struct JudgementContext<'a> {
    pub(super) config: &'a GuardConfig,
    pub(super) source: &'a str,
    /// The fleet hold of the source, with its reason and start, if there is one.
    pub(super) fleet: Option<(&'a Arc<str>, Instant)>,
    pub(super) now: Instant,
}

/// One service that the guard believes to exist.
#[derive(Debug)]
pub(super) struct GuardedService {
    pub(super) served: ServiceView,
    /// The endpoints that are served but no longer listed, with the time of their removal from the source.
    missing: BTreeMap<SocketAddr, Instant>,
    /// The pending removal of the whole service: it is absent, or listed without endpoints.
    all_lost: Option<PendingRemoval>,
    /// The pending removal of a large part of the endpoints, with the number of endpoints before.
    most_lost: Option<(PendingRemoval, usize)>,
    /// The largest number of listed endpoints since the first one went missing; lowered when a smaller number
    /// is believed. The served endpoints do not tell it: they include both the missing endpoints and their
    /// replacements.
    peak: Option<usize>,
    health: HealthTracker,
    /// Since when the service is wholly or largely unreadable.
    unread_since: Option<Instant>,
    /// The kind of hold at the last judgement.
    pub(super) held: Option<HoldKind>,
}

/// A removal that is not believed until it has been reported for long enough and confirmed often enough.
#[derive(Debug)]
struct PendingRemoval {
    since: Instant,
    /// The number of confirming reads that reported the same.
    confirmed: u32,
    /// The last confirming read failed: when to read again, and the reason.
    failed: Option<(Instant, Arc<str>)>,
}

impl PendingRemoval {
    fn since(now: Instant) -> PendingRemoval {
        PendingRemoval { since: now, confirmed: 0, failed: None }
    }

    fn needs_more_reads(&self, hold: Duration, config: &GuardConfig) -> bool {
        !hold.is_zero() && self.confirmed < config.confirmations
    }

    fn is_over(&self, hold: Duration, config: &GuardConfig, now: Instant) -> bool {
        self.since + hold <= now && !self.needs_more_reads(hold, config)
    }

    /// Returns when the next confirming read is due, in equal steps up to the end of the hold, or when the
    /// hold ends.
    fn due(&self, hold: Duration, config: &GuardConfig) -> Instant {
        match &self.failed {
            _ if !self.needs_more_reads(hold, config) => self.since + hold,
            Some((again, _)) => *again,
            None => self.since + hold * (self.confirmed + 1) / config.confirmations.max(1),
        }
    }
}

/// The reported health of the endpoints of a service.
#[derive(Debug, Default)]
struct HealthTracker {
    /// The unhealthy endpoints: since when (`None` if for longer than the guard knows), and their health
    /// before.
    since: BTreeMap<SocketAddr, (Option<Instant>, Option<Health>)>,
    /// All endpoints became unhealthy within the window, and the guard does not believe it yet.
    pending_since: Option<Instant>,
    /// All endpoints are unhealthy, and the guard believes it.
    is_believed: bool,
}

impl HealthTracker {
    fn update(&mut self, reported: &[Endpoint], served: &[Endpoint], window: Duration, now: Instant) {
        let ill = |e: &&Endpoint| e.health == Health::Unhealthy;
        let mut any_recovered = false;
        self.since.retain(|address, _| {
            let reported = find_endpoint(reported, address);
            let is_ill = reported.as_ref().is_some_and(ill);
            any_recovered |= reported.is_some() && !is_ill;
            is_ill
        });
        for endpoint in reported.iter().filter(ill) {
            let before = find_endpoint(served, &endpoint.address).map(|served| served.health);
            self.since.entry(endpoint.address).or_insert_with(|| match before {
                Some(Health::Unhealthy) => (None, None),
                before => (Some(now), before),
            });
        }
        let alive = reported.iter().filter(|e| e.health != Health::Draining).count();
        let all_are = alive >= 2 && self.since.len() == alive && !window.is_zero();
        if any_recovered || self.since.is_empty() {
            // An endpoint recovered, so the health checks work.
            self.pending_since = None;
        }
        self.is_believed &= all_are;
        if all_are && self.pending_since.is_none() && !self.is_believed {
            let at_once =
                self.since.values().all(|(since, _)| since.is_some_and(|since| now <= since + window));
            let any_was_well = self.since.values().any(|(_, before)| before.is_some());
            self.pending_since = (at_once && any_was_well).then_some(now);
            self.is_believed = self.pending_since.is_none();
        }
        if self.pending_since.is_some_and(|since| since + window <= now) {
            self.pending_since = None;
            self.is_believed = true;
            self.since.values_mut().for_each(|(_, before)| *before = None);
        }
    }

    /// Returns `reported` with the previous health of the unhealthy endpoints.
    fn with_previous_health(&self, reported: &[Endpoint]) -> Vec<Endpoint> {
        let undo = |endpoint: &Endpoint| {
            let before = self.since.get(&endpoint.address).and_then(|(_, before)| *before);
            Endpoint { health: before.unwrap_or(endpoint.health), ..endpoint.clone() }
        };
        reported.iter().map(undo).collect()
    }
}

/// The result of judging a service.
pub(super) enum Judgement {
    /// The reported endpoints are served, with recently removed endpoints until `removal_hold` ends.
    NotHeld,
    /// A held change is believed from now on.
    Believed,
    Held(HeldChange),
}

impl GuardedService {
    pub(super) fn new(served: ServiceView) -> GuardedService {
        GuardedService {
            served,
            missing: BTreeMap::new(),
            all_lost: None,
            most_lost: None,
            peak: None,
            health: HealthTracker::default(),
            unread_since: None,
            held: None,
        }
    }

    /// Returns the number of endpoints that are served and not listed.
    pub(super) fn missing_count(&self) -> usize {
        self.missing.len()
    }

    /// Restarts every hold of this service, because the source was failing or frozen.
    pub(super) fn restart_holds(&mut self, now: Instant) {
        self.missing.values_mut().for_each(|since| *since = now);
        self.all_lost = self.all_lost.take().map(|_| PendingRemoval::since(now));
        self.most_lost = self.most_lost.take().map(|(_, of)| (PendingRemoval::since(now), of));
        self.health.pending_since = self.health.pending_since.map(|_| now);
    }

    /// Believes `reported`, because the operator accepted it. Returns `false` if the service is thereby removed.
    pub(super) fn accept(&mut self, reported: Option<&ServiceView>) -> bool {
        let Some(reported) = reported else { return false };
        let health = std::mem::take(&mut self.health);
        *self = GuardedService::new(reported.clone());
        self.health = HealthTracker {
            pending_since: None,
            is_believed: health.pending_since.is_some() || health.is_believed,
            ..health
        };
        true
    }

    /// Judges the reported state `reported`. Returns what to serve, or `None` if the service is removed, and the
    /// outcome.
    pub(super) fn judge(
        &mut self,
        name: &ServiceName,
        reported: Option<&ServiceView>,
        on_purpose: bool,
        rules: &JudgementContext<'_>,
    ) -> (Option<ServiceView>, Judgement) {
        let JudgementContext { config, now, .. } = *rules;
        if let Some(reported) = reported
            && self.is_settled()
            && reported.extent == Extent::Whole
            && Arc::ptr_eq(&reported.registration, &self.served.registration)
        {
            return (Some(reported.clone()), Judgement::NotHeld);
        }
        let listed = reported.map(|reported| &*reported.registration.endpoints).unwrap_or_default();
        let (target, mut is_believed) = self.judge_health(listed, rules);
        if let Some(reported) = reported.filter(|reported| reported.extent != Extent::Whole) {
            return self.judge_unreadable(name, reported, &target, rules);
        }
        if self.unread_since.take().is_some() {
            self.restart_holds(now);
        }
        let on_purpose = on_purpose || reported.is_some_and(|reported| reported.empty_on_purpose);
        let excused = target.is_empty() && on_purpose;
        let before = self.track_losses(&target, excused, config, now);
        if let Some((pending, hold, kind)) = self.pending_removal(reported, config) {
            if rules.fleet.is_some() || !pending.is_over(hold, config, now) {
                let held = self.hold_removal(name, reported, &target, before, (pending, hold, kind), rules);
                self.update_missing(&target, now);
                return held_view(self.merge_served(reported, &target, |_| true), held);
            }
            is_believed = true;
            self.peak = Some(count_undrained(&target));
        }
        self.all_lost = None;
        self.most_lost = None;
        let outcome = if is_believed { Judgement::Believed } else { Judgement::NotHeld };
        let Some(reported) = reported else { return (None, outcome) };
        if excused {
            self.missing.clear();
            self.peak = None;
            return (Some(reported.clone()), outcome);
        }
        let view = self.serve_with_missing(reported, &target, rules);
        match self.hold_fleet_or_health(name, target.len(), rules) {
            Some(held) => held_view(view, held),
            None => (Some(view), outcome),
        }
    }

    /// Judges the health of the listed endpoints. Returns them with the health to serve, and whether a held change
    /// of health is believed from now on.
    fn judge_health<'a>(
        &mut self,
        listed: &'a [Endpoint],
        rules: &JudgementContext<'_>,
    ) -> (Cow<'a, [Endpoint]>, bool) {
        let was_held = self.health.pending_since.is_some();
        let window = rules.config.confirm_unhealthy;
        self.health.update(listed, &self.served.registration.endpoints, window, rules.now);
        match self.health.pending_since {
            Some(_) => (self.health.with_previous_health(listed).into(), false),
            None => (listed.into(), was_held && self.health.is_believed),
        }
    }

    /// Starts, continues or ends the pending removals of the whole service and of a large part of it. Returns the
    /// number of endpoints before the loss. `excused`: the service is empty on purpose.
    fn track_losses(
        &mut self,
        target: &[Endpoint],
        excused: bool,
        config: &GuardConfig,
        now: Instant,
    ) -> usize {
        let peak = self.peak.unwrap_or_else(|| count_undrained(&self.served.registration.endpoints));
        let before = self.most_lost.as_ref().map_or(peak, |(_, of)| *of);
        self.peak = Some(peak.max(count_undrained(target)));
        let all_lost = target.is_empty() && before > 0 && !excused;
        #[expect(clippy::cast_precision_loss, reason = "no service has 2^52 endpoints")]
        let most_lost = before >= config.shrink_min
            && (target.len() as f64) < config.shrink_ratio * before as f64
            && !excused;
        self.all_lost = all_lost.then(|| self.all_lost.take().unwrap_or_else(|| PendingRemoval::since(now)));
        self.most_lost =
            most_lost.then(|| self.most_lost.take().unwrap_or_else(|| (PendingRemoval::since(now), before)));
        before
    }

    /// Returns the listed endpoints with those whose removal is too recent to be believed.
    fn serve_with_missing(
        &mut self,
        reported: &ServiceView,
        target: &[Endpoint],
        rules: &JudgementContext<'_>,
    ) -> ServiceView {
        // This includes a removal confirmed as a whole: its last endpoint may have disappeared only a moment
        // ago.
        self.update_missing(target, rules.now);
        let (hold, is_fleet) = (rules.config.removal_hold(), rules.fleet.is_some());
        let missing = std::mem::take(&mut self.missing);
        let stays = |endpoint: &Endpoint| {
            let since = missing.get(&endpoint.address);
            let in_time = since.is_some_and(|since| is_fleet || rules.now < *since + hold);
            endpoint.health != Health::Draining && in_time
        };
        let view = self.merge_served(Some(reported), target, stays);
        let served = &view.registration.endpoints;
        self.missing = missing;
        self.missing.retain(|address, _| find_endpoint(served, address).is_some());
        if self.missing.is_empty() {
            self.peak = None;
        }
        view
    }

    /// Returns the hold of missing endpoints by the fleet hold of the source, or else the hold of their health. `has`
    /// is the number of listed endpoints.
    fn hold_fleet_or_health(
        &self,
        name: &ServiceName,
        has: usize,
        rules: &JudgementContext<'_>,
    ) -> Option<HeldChange> {
        match (rules.fleet, self.health.pending_since) {
            (Some((because, since)), _) if !self.missing.is_empty() => Some(HeldChange {
                service: Some(name.clone()),
                kind: HoldKind::Fleet,
                since,
                until: None,
                had: has + self.missing.len(),
                has,
                confirmed: 0,
                confirmations: 0,
                because: because.clone(),
            }),
            (_, Some(since)) => Some(self.hold_health(name, has, since, rules)),
            _ => None,
        }
    }

    /// Judges a service that is unreadable, wholly or in part. Nothing that is served is removed.
    fn judge_unreadable(
        &mut self,
        name: &ServiceName,
        reported: &ServiceView,
        target: &[Endpoint],
        rules: &JudgementContext<'_>,
    ) -> (Option<ServiceView>, Judgement) {
        let since = *self.unread_since.get_or_insert(rules.now);
        (self.all_lost, self.most_lost) = (None, None);
        self.update_missing(target, rules.now);
        let view = self.merge_served(Some(reported), target, |endpoint| endpoint.health != Health::Draining);
        let served = &view.registration.endpoints;
        self.missing.retain(|address, _| find_endpoint(served, address).is_some());
        let has = if reported.extent == Extent::Nothing { 0 } else { target.len() };
        if served.len() == has {
            return (Some(view), Judgement::NotHeld);
        }
        let why = reported.because.as_deref().unwrap_or("it cannot be read");
        let because: Arc<str> = match has {
            0 => format!(
                "{why}; the last good state stays in force until the service can be read or the \
                          operator accepts its removal"
            )
            .into(),
            _ => format!(
                "{why}; {} unlisted endpoints stay in force until all records can be read or the operator \
                 accepts their removal",
                served.len() - has
            )
            .into(),
        };
        let held = HeldChange {
            service: Some(name.clone()),
            kind: HoldKind::Unreadable,
            since,
            until: None,
            had: served.len(),
            has,
            confirmed: 0,
            confirmations: 0,
            because: because.clone(),
        };
        let view = match reported.extent {
            Extent::Nothing => view,
            _ => ServiceView { state: State::Held, because: Some(because), ..view },
        };
        (Some(view), Judgement::Held(held))
    }

    fn is_settled(&self) -> bool {
        self.unread_since.is_none()
            && self.missing.is_empty()
            && self.all_lost.is_none()
            && self.most_lost.is_none()
            && self.health.pending_since.is_none()
    }

    /// Returns the pending removal, its hold, and the kind of the hold.
    fn pending_removal(
        &self,
        reported: Option<&ServiceView>,
        config: &GuardConfig,
    ) -> Option<(&PendingRemoval, Duration, HoldKind)> {
        let all_lost = if reported.is_some() { HoldKind::Empty } else { HoldKind::Absent };
        match (&self.all_lost, &self.most_lost) {
            (Some(pending), _) => Some((pending, config.confirm_empty, all_lost)),
            (None, Some((pending, _))) => Some((pending, config.confirm_shrink, HoldKind::Shrunk)),
            (None, None) => None,
        }
    }

    fn hold_removal(
        &self,
        name: &ServiceName,
        reported: Option<&ServiceView>,
        target: &[Endpoint],
        before: usize,
        (pending, hold, kind): (&PendingRemoval, Duration, HoldKind),
        rules: &JudgementContext<'_>,
    ) -> HeldChange {
        let held = HeldChange {
            service: Some(name.clone()),
            kind,
            since: pending.since,
            until: Some(pending.since + hold),
            had: before,
            has: target.len(),
            confirmed: pending.confirmed,
            confirmations: rules.config.confirmations,
            because: Arc::default(),
        };
        match rules.fleet {
            Some((because, since)) => {
                HeldChange { kind: HoldKind::Fleet, since, until: None, because: because.clone(), ..held }
            }
            None => HeldChange { because: removal_reason(rules.source, reported, before, hold), ..held },
        }
    }

    fn hold_health(
        &self,
        name: &ServiceName,
        has: usize,
        since: Instant,
        rules: &JudgementContext<'_>,
    ) -> HeldChange {
        let window = rules.config.confirm_unhealthy;
        let because = format!(
            "`{}` reports that all endpoints of this service ({}) became unhealthy within {}: \
             their previous health stays in force for the same time, in case the health checks are at fault",
            rules.source,
            self.health.since.len(),
            show_duration(window),
        );
        HeldChange {
            service: Some(name.clone()),
            kind: HoldKind::Unhealthy,
            since,
            until: Some(since + window),
            had: has,
            has,
            confirmed: 0,
            confirmations: 0,
            because: because.into(),
        }
    }

    /// Reports whether a confirming read is due.
    pub(super) fn needs_confirming_read(&self, config: &GuardConfig, now: Instant) -> bool {
        // The kind, which depends on the argument, is not used here.
        self.pending_removal(None, config).is_some_and(|(pending, hold, _)| {
            pending.needs_more_reads(hold, config) && pending.due(hold, config) <= now
        })
    }

    /// Counts a read that confirmed the removal. Returns the number of such reads.
    pub(super) fn count_confirming_read(&mut self) -> Option<u32> {
        let all_lost = self.all_lost.as_mut();
        let most_lost = self.most_lost.as_mut().map(|(pending, _)| pending);
        let pending = all_lost.into_iter().chain(most_lost).map(|pending| {
            pending.failed = None;
            pending.confirmed = pending.confirmed.saturating_add(1);
            pending.confirmed
        });
        // A pending removal of the whole service takes precedence.
        pending.collect::<Vec<_>>().first().copied()
    }

    /// Records that a confirming read failed. The next read is due one step later.
    pub(super) fn record_failed_read(&mut self, why: &Arc<str>, config: &GuardConfig, now: Instant) {
        let step = |hold: Duration| (hold / config.confirmations.max(1)).clamp(Self::SOONEST, Self::LATEST);
        if let Some(pending) = &mut self.all_lost {
            pending.failed = Some((now + step(config.confirm_empty), why.clone()));
        }
        if let Some((pending, _)) = &mut self.most_lost {
            pending.failed = Some((now + step(config.confirm_shrink), why.clone()));
        }
    }

    const SOONEST: Duration = Duration::from_millis(500);
    const LATEST: Duration = Duration::from_secs(30);

    /// Returns the reason why the last confirming read failed, if it failed.
    pub(super) fn failed_read_reason(&self) -> Option<&Arc<str>> {
        let most_lost = self.most_lost.as_ref().map(|(pending, _)| pending);
        let pending = self.all_lost.as_ref().or(most_lost)?;
        pending.failed.as_ref().map(|(_, why)| why)
    }

    /// Updates since when each endpoint is missing.
    fn update_missing(&mut self, target: &[Endpoint], now: Instant) {
        let missing = &mut self.missing;
        missing.retain(|address, _| find_endpoint(target, address).is_none());
        let is_listed = |e: &&Endpoint| find_endpoint(target, &e.address).is_some();
        for endpoint in self.served.registration.endpoints.iter().filter(|e| !is_listed(e)) {
            missing.entry(endpoint.address).or_insert(now);
        }
    }

    /// Returns the listed endpoints and those served endpoints for which `stays` returns `true`. An equal
    /// result shares the pointer of `reported` or of the view that is served.
    fn merge_served(
        &self,
        reported: Option<&ServiceView>,
        target: &[Endpoint],
        stays: impl Fn(&Endpoint) -> bool,
    ) -> ServiceView {
        let served = &self.served.registration;
        let is_listed = |e: &Endpoint| find_endpoint(target, &e.address).is_some();
        let kept: Vec<_> = served.endpoints.iter().filter(|e| !is_listed(e) && stays(e)).cloned().collect();
        let Some(reported) = reported else { return self.served.clone() };
        if kept.is_empty() && std::ptr::eq(target, &*reported.registration.endpoints) {
            return reported.clone();
        }
        let mut endpoints = target.to_vec();
        endpoints.extend(kept);
        endpoints.sort_by_key(|endpoint| endpoint.address);
        let merged = Registration { endpoints: endpoints.into(), ..(*reported.registration).clone() };
        let registration = if merged == **served { served.clone() } else { Arc::new(merged) };
        ServiceView { registration, empty_on_purpose: false, ..reported.clone() }
    }

    /// Returns the next time at which the judgement changes even if the source reports no change.
    pub(super) fn deadline(&self, config: &GuardConfig, is_fleet: bool) -> Option<Instant> {
        let ill = self.health.pending_since.map(|since| since + config.confirm_unhealthy);
        // Only the source or the operator ends a fleet hold or an unreadable state.
        if is_fleet || self.unread_since.is_some() {
            return ill;
        }
        let pending = self.pending_removal(None, config).map(|(pending, hold, _)| pending.due(hold, config));
        let missing = self.missing.values().min().map(|since| *since + config.removal_hold());
        // While a removal of the whole service is pending, single endpoints are not removed.
        [pending.or(missing), ill].into_iter().flatten().min()
    }
}

/// Returns the view to serve while `held` is held, and the judgement.
fn held_view(view: ServiceView, held: HeldChange) -> (Option<ServiceView>, Judgement) {
    let because = Some(held.because.clone());
    (Some(ServiceView { state: State::Held, because, ..view }), Judgement::Held(held))
}

/// Counts the endpoints that are not draining. The removal of a draining endpoint is expected, so it is no loss.
fn count_undrained(endpoints: &[Endpoint]) -> usize {
    endpoints.iter().filter(|endpoint| endpoint.health != Health::Draining).count()
}

fn find_endpoint<'a>(endpoints: &'a [Endpoint], address: &SocketAddr) -> Option<&'a Endpoint> {
    let at = endpoints.binary_search_by_key(address, |endpoint| endpoint.address).ok()?;
    endpoints.get(at)
}

fn removal_reason(source: &str, reported: Option<&ServiceView>, before: usize, hold: Duration) -> Arc<str> {
    let endpoints = |n: usize| if n == 1 { "1 endpoint".to_owned() } else { format!("{n} endpoints") };
    let change = match reported.map(|reported| reported.registration.endpoints.len()) {
        None => format!("no longer lists this service, which had {}", endpoints(before)),
        Some(0) => format!("lists no endpoint of this service, which had {}", endpoints(before)),
        Some(left) => format!("lists {} of this service, which had {before}", endpoints(left)),
    };
    let hold = show_duration(hold);
    format!(
        "`{source}` {change}: the last good state stays in force for at least {hold}, in case the removal is a mistake"
    )
    .into()
}
