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
use crate::source::{Extent, ServiceView};

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
    pub(super) shown: ServiceView,
    /// The endpoints that are served but no longer listed, with the time of their removal from the source.
    missing: BTreeMap<SocketAddr, Instant>,
    /// The pending removal of the whole service: it is absent, or listed without endpoints.
    none: Option<PendingRemoval>,
    /// The pending removal of a large part of the endpoints, with the number of endpoints before.
    few: Option<(PendingRemoval, usize)>,
    /// The largest number of listed endpoints since the first one went missing; lowered when a smaller number
    /// is believed. The served endpoints do not tell it: they include both the missing endpoints and their
    /// replacements.
    peak: Option<usize>,
    illness: HealthTracker,
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

    fn needs_readings(&self, hold: Duration, config: &GuardConfig) -> bool {
        !hold.is_zero() && self.confirmed < config.confirmations
    }

    fn is_over(&self, hold: Duration, config: &GuardConfig, now: Instant) -> bool {
        self.since + hold <= now && !self.needs_readings(hold, config)
    }

    /// Returns when the next confirming read is due, in equal steps up to the end of the hold, or when the
    /// hold ends.
    fn due(&self, hold: Duration, config: &GuardConfig) -> Instant {
        match &self.failed {
            _ if !self.needs_readings(hold, config) => self.since + hold,
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
    doubt: Option<Instant>,
    /// All endpoints are unhealthy, and the guard believes it.
    believed: bool,
}

impl HealthTracker {
    fn see(&mut self, told: &[Endpoint], shown: &[Endpoint], window: Duration, now: Instant) {
        let ill = |e: &&Endpoint| e.health == Health::Unhealthy;
        let mut any_recovered = false;
        self.since.retain(|address, _| {
            let told = find(told, address);
            let is_ill = told.as_ref().is_some_and(ill);
            any_recovered |= told.is_some() && !is_ill;
            is_ill
        });
        for endpoint in told.iter().filter(ill) {
            let before = find(shown, &endpoint.address).map(|shown| shown.health);
            self.since.entry(endpoint.address).or_insert_with(|| match before {
                Some(Health::Unhealthy) => (None, None),
                before => (Some(now), before),
            });
        }
        let alive = told.iter().filter(|e| e.health != Health::Draining).count();
        let all_are = alive >= 2 && self.since.len() == alive && !window.is_zero();
        if any_recovered || self.since.is_empty() {
            // An endpoint recovered, so the health checks work.
            self.doubt = None;
        }
        self.believed &= all_are;
        if all_are && self.doubt.is_none() && !self.believed {
            let at_once =
                self.since.values().all(|(since, _)| since.is_some_and(|since| now <= since + window));
            let any_was_well = self.since.values().any(|(_, before)| before.is_some());
            self.doubt = (at_once && any_was_well).then_some(now);
            self.believed = self.doubt.is_none();
        }
        if self.doubt.is_some_and(|since| since + window <= now) {
            self.doubt = None;
            self.believed = true;
            self.since.values_mut().for_each(|(_, before)| *before = None);
        }
    }

    /// Returns `told` with the previous health of the unhealthy endpoints.
    fn undone(&self, told: &[Endpoint]) -> Vec<Endpoint> {
        let undo = |endpoint: &Endpoint| {
            let before = self.since.get(&endpoint.address).and_then(|(_, before)| *before);
            Endpoint { health: before.unwrap_or(endpoint.health), ..endpoint.clone() }
        };
        told.iter().map(undo).collect()
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
    pub(super) fn new(shown: ServiceView) -> GuardedService {
        GuardedService {
            shown,
            missing: BTreeMap::new(),
            none: None,
            few: None,
            peak: None,
            illness: HealthTracker::default(),
            unread_since: None,
            held: None,
        }
    }

    /// Returns the number of endpoints that are served and not listed.
    pub(super) fn missing(&self) -> usize {
        self.missing.len()
    }

    /// Restarts every hold of this service, because the source was failing or frozen.
    pub(super) fn begin_again(&mut self, now: Instant) {
        self.missing.values_mut().for_each(|since| *since = now);
        self.none = self.none.take().map(|_| PendingRemoval::since(now));
        self.few = self.few.take().map(|(_, of)| (PendingRemoval::since(now), of));
        self.illness.doubt = self.illness.doubt.map(|_| now);
    }

    /// Believes `told`, because the operator accepted it. Returns `false` if the service is thereby removed.
    pub(super) fn accept(&mut self, told: Option<&ServiceView>) -> bool {
        let Some(told) = told else { return false };
        let illness = std::mem::take(&mut self.illness);
        *self = GuardedService::new(told.clone());
        self.illness =
            HealthTracker { doubt: None, believed: illness.doubt.is_some() || illness.believed, ..illness };
        true
    }

    /// Judges the reported state `told`. Returns what to serve, or `None` if the service is removed, and the
    /// outcome.
    pub(super) fn judge(
        &mut self,
        name: &ServiceName,
        told: Option<&ServiceView>,
        on_purpose: bool,
        rules: &JudgementContext<'_>,
    ) -> (Option<ServiceView>, Judgement) {
        let JudgementContext { config, now, .. } = *rules;
        if let Some(told) = told
            && self.is_settled()
            && told.extent == Extent::Whole
            && Arc::ptr_eq(&told.registration, &self.shown.registration)
        {
            return (Some(told.clone()), Judgement::NotHeld);
        }
        let target: &[Endpoint] = told.map(|told| &*told.registration.endpoints).unwrap_or_default();
        let was_ill = self.illness.doubt.is_some();
        self.illness.see(target, &self.shown.registration.endpoints, config.confirm_unhealthy, now);
        let mut believed = was_ill && self.illness.doubt.is_none() && self.illness.believed;
        let target: Cow<'_, [Endpoint]> = match self.illness.doubt {
            Some(_) => self.illness.undone(target).into(),
            None => target.into(),
        };

        if let Some(told) = told.filter(|told| told.extent != Extent::Whole) {
            return self.judge_unread(name, told, &target, rules);
        }
        if self.unread_since.take().is_some() {
            self.begin_again(now);
        }
        let on_purpose = on_purpose || told.is_some_and(|told| told.empty_on_purpose);
        // The removal of a draining endpoint is expected, so it does not count as a loss.
        let counts =
            |endpoints: &[Endpoint]| endpoints.iter().filter(|e| e.health != Health::Draining).count();
        let peak = self.peak.unwrap_or_else(|| counts(&self.shown.registration.endpoints));
        let before = self.few.as_ref().map_or(peak, |(_, of)| *of);
        self.peak = Some(peak.max(counts(&target)));
        let excused = target.is_empty() && on_purpose;
        let none = target.is_empty() && before > 0 && !excused;
        #[expect(clippy::cast_precision_loss, reason = "no service has 2^52 endpoints")]
        let few = before >= config.shrink_min
            && (target.len() as f64) < config.shrink_ratio * before as f64
            && !excused;
        self.none = none.then(|| self.none.take().unwrap_or_else(|| PendingRemoval::since(now)));
        self.few = few.then(|| self.few.take().unwrap_or_else(|| (PendingRemoval::since(now), before)));

        if let Some((doubt, hold, kind)) = self.doubt(told, config) {
            if rules.fleet.is_some() || !doubt.is_over(hold, config, now) {
                let held = self.held_as(name, told, &target, before, (doubt, hold, kind), rules);
                self.missed(&target, now);
                let shown = self.merged(told, &target, |_| true);
                let because = Some(held.because.clone());
                return (Some(ServiceView { state: State::Held, because, ..shown }), Judgement::Held(held));
            }
            believed = true;
            self.peak = Some(counts(&target));
        }
        self.none = None;
        self.few = None;
        let outcome = |believed: bool| if believed { Judgement::Believed } else { Judgement::NotHeld };
        let Some(told) = told else { return (None, outcome(believed)) };
        if excused {
            self.missing.clear();
            self.peak = None;
            return (Some(told.clone()), outcome(believed));
        }
        // This includes a removal confirmed as a whole: its last endpoint may have disappeared only a moment
        // ago.
        self.missed(&target, now);
        let (hold, fleet) = (config.removal_hold(), rules.fleet);
        let missing = std::mem::take(&mut self.missing);
        let stays = |endpoint: &Endpoint| {
            let since = missing.get(&endpoint.address);
            let in_time = since.is_some_and(|since| fleet.is_some() || now < *since + hold);
            endpoint.health != Health::Draining && in_time
        };
        let has = target.len();
        let seen = self.merged(Some(told), &target, stays);
        let shown = &seen.registration.endpoints;
        self.missing = missing;
        self.missing.retain(|address, _| find(shown, address).is_some());
        if self.missing.is_empty() {
            self.peak = None;
        }
        let held = match (fleet, self.illness.doubt) {
            (Some((because, since)), _) if !self.missing.is_empty() => HeldChange {
                service: Some(name.clone()),
                kind: HoldKind::Fleet,
                since,
                until: None,
                had: has + self.missing.len(),
                has,
                confirmed: 0,
                confirmations: 0,
                because: because.clone(),
            },
            (_, Some(since)) => self.held_ill(name, has, since, rules),
            _ => return (Some(seen), outcome(believed)),
        };
        let because = Some(held.because.clone());
        (Some(ServiceView { state: State::Held, because, ..seen }), Judgement::Held(held))
    }

    /// Judges a service that is unreadable, wholly or in part. Nothing that is served is removed.
    fn judge_unread(
        &mut self,
        name: &ServiceName,
        told: &ServiceView,
        target: &[Endpoint],
        rules: &JudgementContext<'_>,
    ) -> (Option<ServiceView>, Judgement) {
        let since = *self.unread_since.get_or_insert(rules.now);
        (self.none, self.few) = (None, None);
        self.missed(target, rules.now);
        let seen = self.merged(Some(told), target, |endpoint| endpoint.health != Health::Draining);
        let shown = &seen.registration.endpoints;
        self.missing.retain(|address, _| find(shown, address).is_some());
        let has = if told.extent == Extent::Nothing { 0 } else { target.len() };
        if shown.len() == has {
            return (Some(seen), Judgement::NotHeld);
        }
        let why = told.because.as_deref().unwrap_or("it cannot be read");
        let because: Arc<str> = match has {
            0 => format!("{why}; what was known stays until it can be read or that is accepted").into(),
            _ => format!(
                "{why}; {} endpoints that are not named stay until all can be read or that is accepted",
                shown.len() - has
            )
            .into(),
        };
        let held = HeldChange {
            service: Some(name.clone()),
            kind: HoldKind::Unreadable,
            since,
            until: None,
            had: shown.len(),
            has,
            confirmed: 0,
            confirmations: 0,
            because: because.clone(),
        };
        let seen = match told.extent {
            Extent::Nothing => seen,
            _ => ServiceView { state: State::Held, because: Some(because), ..seen },
        };
        (Some(seen), Judgement::Held(held))
    }

    fn is_settled(&self) -> bool {
        self.unread_since.is_none()
            && self.missing.is_empty()
            && self.none.is_none()
            && self.few.is_none()
            && self.illness.doubt.is_none()
    }

    /// Returns the pending removal, its hold, and the kind of the hold.
    fn doubt(
        &self,
        told: Option<&ServiceView>,
        config: &GuardConfig,
    ) -> Option<(&PendingRemoval, Duration, HoldKind)> {
        let none = if told.is_some() { HoldKind::Empty } else { HoldKind::Absent };
        match (&self.none, &self.few) {
            (Some(doubt), _) => Some((doubt, config.confirm_empty, none)),
            (None, Some((doubt, _))) => Some((doubt, config.confirm_shrink, HoldKind::Shrunk)),
            (None, None) => None,
        }
    }

    fn held_as(
        &self,
        name: &ServiceName,
        told: Option<&ServiceView>,
        target: &[Endpoint],
        before: usize,
        (doubt, hold, kind): (&PendingRemoval, Duration, HoldKind),
        rules: &JudgementContext<'_>,
    ) -> HeldChange {
        let held = HeldChange {
            service: Some(name.clone()),
            kind,
            since: doubt.since,
            until: Some(doubt.since + hold),
            had: before,
            has: target.len(),
            confirmed: doubt.confirmed,
            confirmations: rules.config.confirmations,
            because: Arc::default(),
        };
        match rules.fleet {
            Some((because, since)) => {
                HeldChange { kind: HoldKind::Fleet, since, until: None, because: because.clone(), ..held }
            }
            None => HeldChange { because: reason(rules.source, told, before, hold), ..held },
        }
    }

    fn held_ill(
        &self,
        name: &ServiceName,
        has: usize,
        since: Instant,
        rules: &JudgementContext<'_>,
    ) -> HeldChange {
        let window = rules.config.confirm_unhealthy;
        let because = format!(
            "`{}` says that all its endpoints ({}) became unhealthy within {}: \
             what was known of their health stays for as long, in case it is the checks that fail",
            rules.source,
            self.illness.since.len(),
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
    pub(super) fn wants_reading(&self, config: &GuardConfig, now: Instant) -> bool {
        // The kind, which depends on the argument, is not used here.
        self.doubt(None, config).is_some_and(|(doubt, hold, _)| {
            doubt.needs_readings(hold, config) && doubt.due(hold, config) <= now
        })
    }

    /// Counts a read that confirmed the removal. Returns the number of such reads.
    pub(super) fn confirm(&mut self) -> Option<u32> {
        let none = self.none.as_mut();
        let few = self.few.as_mut().map(|(doubt, _)| doubt);
        let doubts = none.into_iter().chain(few).map(|doubt| {
            doubt.failed = None;
            doubt.confirmed = doubt.confirmed.saturating_add(1);
            doubt.confirmed
        });
        // A pending removal of the whole service takes precedence.
        doubts.collect::<Vec<_>>().first().copied()
    }

    /// Records that a confirming read failed. The next read is due one step later.
    pub(super) fn not_confirmed(&mut self, why: &Arc<str>, config: &GuardConfig, now: Instant) {
        let step = |hold: Duration| (hold / config.confirmations.max(1)).clamp(Self::SOONEST, Self::LATEST);
        if let Some(doubt) = &mut self.none {
            doubt.failed = Some((now + step(config.confirm_empty), why.clone()));
        }
        if let Some((doubt, _)) = &mut self.few {
            doubt.failed = Some((now + step(config.confirm_shrink), why.clone()));
        }
    }

    const SOONEST: Duration = Duration::from_millis(500);
    const LATEST: Duration = Duration::from_secs(30);

    /// Returns the reason why the last confirming read failed, if it failed.
    pub(super) fn reading_failed(&self) -> Option<&Arc<str>> {
        let few = self.few.as_ref().map(|(doubt, _)| doubt);
        let doubt = self.none.as_ref().or(few)?;
        doubt.failed.as_ref().map(|(_, why)| why)
    }

    /// Updates since when each endpoint is missing.
    fn missed(&mut self, target: &[Endpoint], now: Instant) {
        let missing = &mut self.missing;
        missing.retain(|address, _| find(target, address).is_none());
        let is_told = |e: &&Endpoint| find(target, &e.address).is_some();
        for endpoint in self.shown.registration.endpoints.iter().filter(|e| !is_told(e)) {
            missing.entry(endpoint.address).or_insert(now);
        }
    }

    /// Returns the listed endpoints and those served endpoints for which `stays` returns `true`. An equal
    /// result shares the pointer of `told` or of the view that is served.
    fn merged(
        &self,
        told: Option<&ServiceView>,
        target: &[Endpoint],
        stays: impl Fn(&Endpoint) -> bool,
    ) -> ServiceView {
        let shown = &self.shown.registration;
        let is_told = |e: &Endpoint| find(target, &e.address).is_some();
        let kept: Vec<_> = shown.endpoints.iter().filter(|e| !is_told(e) && stays(e)).cloned().collect();
        let Some(told) = told else { return self.shown.clone() };
        if kept.is_empty() && std::ptr::eq(target, &*told.registration.endpoints) {
            return told.clone();
        }
        let mut endpoints = target.to_vec();
        endpoints.extend(kept);
        endpoints.sort_by_key(|endpoint| endpoint.address);
        let merged = Registration { endpoints: endpoints.into(), ..(*told.registration).clone() };
        let registration = if merged == **shown { shown.clone() } else { Arc::new(merged) };
        ServiceView { registration, empty_on_purpose: false, ..told.clone() }
    }

    /// Returns the next time at which the judgement changes even if the source reports no change.
    pub(super) fn deadline(&self, config: &GuardConfig, is_fleet: bool) -> Option<Instant> {
        let ill = self.illness.doubt.map(|since| since + config.confirm_unhealthy);
        // Only the source or the operator ends a fleet hold or an unreadable state.
        if is_fleet || self.unread_since.is_some() {
            return ill;
        }
        let doubt = self.doubt(None, config).map(|(doubt, hold, _)| doubt.due(hold, config));
        let missing = self.missing.values().min().map(|since| *since + config.removal_hold());
        // While a removal of the whole service is pending, single endpoints are not removed.
        [doubt.or(missing), ill].into_iter().flatten().min()
    }
}

fn find<'a>(endpoints: &'a [Endpoint], address: &SocketAddr) -> Option<&'a Endpoint> {
    let at = endpoints.binary_search_by_key(address, |endpoint| endpoint.address).ok()?;
    endpoints.get(at)
}

fn reason(source: &str, told: Option<&ServiceView>, before: usize, hold: Duration) -> Arc<str> {
    let endpoints = |n: usize| if n == 1 { "1 endpoint".to_owned() } else { format!("{n} endpoints") };
    let said = match told.map(|told| told.registration.endpoints.len()) {
        None => format!("no longer names it, and it had {}", endpoints(before)),
        Some(0) => format!("names no endpoint of it any more, and it had {}", endpoints(before)),
        Some(left) => format!("names {} of it, and it had {before}", endpoints(left)),
    };
    let stay =
        format!("what was known stays for {} at least, in case that is a mistake", show_duration(hold));
    format!("`{source}` {said}: {stay}").into()
}
