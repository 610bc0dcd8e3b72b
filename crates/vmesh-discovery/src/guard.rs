//! The guard: decides when to believe that a source has lost services or endpoints.
//!
//! A new service or endpoint is believed at once. A missing one may have been removed on purpose, or a
//! generator, a registry or a mount may have failed; a proxy that loses all endpoints of a service cannot
//! serve it.
//!
//! | what the source does | what the guard believes | [`HoldKind`] |
//! |---|---|---|
//! | fails | its last view; the time of an outage does not count towards any hold | |
//! | no longer lists an endpoint | the removal, after `removal_hold`; at once if the endpoint was draining | |
//! | no longer lists a service | the removal, after `confirm_empty` and two more reads | [`HoldKind::Absent`] |
//! | lists a service without endpoints | the removal, after `confirm_empty` and two more reads | [`HoldKind::Empty`] |
//! | lists less than half of five or more endpoints | the removal, after `confirm_shrink` and two more reads | [`HoldKind::Shrunk`] |
//! | reports that two or more endpoints, all of a service, became unhealthy at once | their health, after `confirm_unhealthy` | [`HoldKind::Unhealthy`] |
//! | loses a large part of all its endpoints or services at once | no removal, until enough is listed again or the operator accepts | [`HoldKind::Fleet`] |
//! | lists a service that is wholly or largely unreadable | additions and health but no removal, until it is readable or the operator accepts | [`HoldKind::Unreadable`] |
//!
//! Other systems do the same: kingpin refuses an update with less than half of at least five endpoints,
//! Finagle delays a removal by one epoch (10 s), Synapse and Dubbo keep the previous backends over an empty
//! answer, Eureka stops expiring below 85 % of renewals. The guard judges what is left after additions, not
//! what was removed: a deployment that replaces ten instances by ten others is not held.
//!
//! The operator overrides the guard with [`Guard::accept`], [`Guard::freeze`] and [`Guard::thaw`].

mod config;
mod evict;
mod fleet;
mod service;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use vmesh_model::text::show_duration;
use vmesh_model::{Place, Problem, Registration, ServiceName, State, join};

use crate::format::subject_of;
use crate::registrations::{Extent, Registrations, ServiceView};

pub use config::{FleetConfig, GuardConfig};
pub use evict::{Eviction, EvictionExpiry, Evictions};
use fleet::{FleetTracker, Loss};
use service::{GuardedService, Judgement, JudgementContext};

/// The reason why a change is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum HoldKind {
    /// The service is listed without endpoints.
    Empty,
    /// The service has too few of its previous endpoints.
    Shrunk,
    /// The service is no longer listed.
    Absent,
    /// All endpoints of the service became unhealthy at once.
    Unhealthy,
    /// The source lost too large a part of all its services or endpoints at once.
    Fleet,
    /// The service is wholly or largely unreadable, so a missing endpoint may still exist.
    Unreadable,
}

impl HoldKind {
    pub const ALL: [HoldKind; 6] = [
        HoldKind::Empty,
        HoldKind::Shrunk,
        HoldKind::Absent,
        HoldKind::Unhealthy,
        HoldKind::Fleet,
        HoldKind::Unreadable,
    ];

    pub fn as_str(self) -> &'static str {
        match self {
            HoldKind::Empty => "empty",
            HoldKind::Shrunk => "shrunk",
            HoldKind::Absent => "absent",
            HoldKind::Unhealthy => "unhealthy",
            HoldKind::Fleet => "fleet",
            HoldKind::Unreadable => "unreadable",
        }
    }
}

impl fmt::Display for HoldKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A change that the source reports and the guard does not believe yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeldChange {
    /// The service concerned; `None` for the source as a whole, with [`HoldKind::Fleet`].
    pub service: Option<ServiceName>,
    pub kind: HoldKind,
    pub since: Instant,
    /// The earliest time at which the change may be believed. `None` if it waits for the operator, or for the
    /// source to list enough again.
    pub until: Option<Instant>,
    /// The number of endpoints before the change, and the number that the source lists at present.
    pub had: usize,
    pub has: usize,
    /// The number of confirming reads that reported the same, and the number required.
    pub confirmed: u32,
    pub confirmations: u32,
    /// The reason, in words for an operator.
    pub because: Arc<str>,
}

/// The kind of an [`Event`](crate::source::Event).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum NoticeKind {
    /// The guard started to hold a change.
    Held,
    /// A confirming read reported the same change.
    Confirmed,
    /// A held change was reported for long enough and confirmed often enough, and is now believed.
    Believed,
    /// A held change was never believed: the missing services or endpoints came back.
    Returned,
    /// The operator accepted a held change.
    Accepted,
    /// The operator froze the source; its changes are not applied.
    Frozen,
    Thawed,
    /// The source does not answer.
    Failing,
    Answering,
    /// The source has not answered for so long that its last good view was dropped (`max_stale`).
    GivenUp,
    /// The operator evicted an endpoint; it is not used.
    Evicted,
    Admitted,
}

impl NoticeKind {
    pub fn as_str(self) -> &'static str {
        match self {
            NoticeKind::Held => "held",
            NoticeKind::Confirmed => "confirmed",
            NoticeKind::Believed => "believed",
            NoticeKind::Returned => "returned",
            NoticeKind::Accepted => "accepted",
            NoticeKind::Frozen => "frozen",
            NoticeKind::Thawed => "thawed",
            NoticeKind::Failing => "failing",
            NoticeKind::Answering => "answering",
            NoticeKind::GivenUp => "given up",
            NoticeKind::Evicted => "evicted",
            NoticeKind::Admitted => "admitted",
        }
    }
}

/// Something that happened, for the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub kind: NoticeKind,
    /// The service concerned; `None` for the source as a whole.
    pub service: Option<ServiceName>,
    /// The kind of the hold that began, changed or ended.
    pub hold: Option<HoldKind>,
    pub text: Arc<str>,
}

/// The reason why nothing was accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum AcceptError {
    #[error("nothing is held")]
    NothingHeld,
    #[error("the source is frozen: thaw it first")]
    Frozen,
}

/// The guard of one source. The guard is pure: each method takes the time as an argument.
///
/// Pass each view to [`Guard::observe`] and each failure to [`Guard::source_failed`], then call
/// [`Guard::judge`] for the view to publish. Call `judge` again at [`Guard::deadline`]. If
/// [`Guard::services_to_confirm`] then names services, read them again and pass the result to [`Guard::record_confirming_read`] or
/// [`Guard::record_failed_read`].
#[derive(Debug)]
pub struct Guard {
    source: Arc<str>,
    config: GuardConfig,
    reported: Registrations,
    services: BTreeMap<ServiceName, GuardedService>,
    /// Services that cannot be read and that the operator dropped, with their last good registration.
    dropped: BTreeMap<ServiceName, Arc<Registration>>,
    fleet: FleetTracker,
    /// While set, no removal of the source is believed.
    fleet_hold: Option<FleetHold>,
    /// The start of the current outage of the source. The time of an outage does not count towards any hold.
    failing_since: Option<Instant>,
    /// The last good view was dropped, and the source has not answered since.
    has_given_up: bool,
    /// When the operator froze the source.
    frozen: Option<SystemTime>,
    held: Vec<HeldChange>,
    notices: Vec<Notice>,
}

#[derive(Debug)]
struct FleetHold {
    since: Instant,
    /// The number of endpoints when the hold began.
    had: usize,
    because: Arc<str>,
}

impl Guard {
    /// Creates a guard that believes nothing yet. `source` is the name of the source in messages, for example
    /// `file:/etc/vmesh/services.d`.
    pub fn new(source: impl Into<Arc<str>>, config: GuardConfig) -> Guard {
        Guard {
            source: source.into(),
            config,
            reported: Registrations::default(),
            services: BTreeMap::new(),
            dropped: BTreeMap::new(),
            fleet: FleetTracker::default(),
            fleet_hold: None,
            failing_since: None,
            has_given_up: false,
            frozen: None,
            held: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// Creates a guard that believes `last_good`, the view from before a restart.
    pub fn restored(source: impl Into<Arc<str>>, config: GuardConfig, last_good: &Registrations) -> Guard {
        let mut guard = Guard::new(source, config);
        let watched =
            |(name, view): (&ServiceName, &ServiceView)| (name.clone(), GuardedService::new(view.clone()));
        guard.services = last_good.services.iter().map(watched).collect();
        guard.fleet = FleetTracker::restored(last_good);
        guard.reported = last_good.clone();
        guard
    }

    pub fn source(&self) -> &Arc<str> {
        &self.source
    }

    /// Stores a new view of the source and judges the fleet loss.
    pub fn observe(&mut self, reported: Registrations, now: Instant) {
        if self.failing_since.take().is_some() {
            self.restart_holds(now);
        }
        self.has_given_up = false;
        let Guard { config, fleet, .. } = self;
        let excused =
            |name: &ServiceName| config.allow_empty.contains(name) || reported.emptied.contains(name);
        if self.fleet_hold.is_none() && self.frozen.is_none() {
            fleet.expire(config.fleet.window, now);
        }
        fleet.record_view(&self.reported, &reported, excused, now);
        self.reported = reported;
        self.judge_fleet(now);
    }

    /// Records that the source does not answer. Its last view stays, and the time of the outage does not
    /// count towards any hold.
    pub fn source_failed(&mut self, now: Instant) {
        self.failing_since.get_or_insert(now);
    }

    fn restart_holds(&mut self, now: Instant) {
        self.services.values_mut().for_each(|watched| watched.restart_holds(now));
    }

    fn judge_fleet(&mut self, now: Instant) {
        match (self.fleet.judge(&self.config.fleet), &self.fleet_hold) {
            (Some(loss), None) if self.frozen.is_none() => {
                let because = self.fleet_loss_reason(&loss);
                self.add_notice(NoticeKind::Held, None, Some(HoldKind::Fleet), because.clone());
                self.fleet_hold = Some(FleetHold { since: now, had: loss.endpoints.0, because });
            }
            (None, Some(_)) => {
                self.fleet_hold = None;
                self.restart_holds(now);
                let text = format!(
                    "`{}` lists enough again: each missing service is judged on its own",
                    self.source
                );
                self.add_notice(NoticeKind::Returned, None, Some(HoldKind::Fleet), text);
            }
            _ => {}
        }
    }

    fn fleet_loss_reason(&self, loss: &Loss) -> Arc<str> {
        let Loss { endpoints, services } = loss;
        format!(
            "`{}` lists {} of the {} endpoints and {} of the {} services that it listed within the last \
             {}: none of them is removed until it lists enough again or the operator accepts the loss",
            self.source,
            endpoints.1,
            endpoints.0,
            services.1,
            services.0,
            show_duration(self.config.fleet.window)
        )
        .into()
    }

    /// Judges the last view at `now` and returns what to believe of it.
    pub fn judge(&mut self, now: Instant) -> Registrations {
        if self.frozen.is_some() && !self.services.is_empty() {
            return self.frozen_view();
        }
        if let (Some(since), Some(most)) = (self.failing_since, self.config.max_stale)
            && since + most <= now
        {
            return self.drop_last_view(most);
        }
        let now = self.failing_since.unwrap_or(now);
        self.add_new_services();
        let mut believed = self.judge_services(now);
        if self.held.iter().filter(|held| held.kind == HoldKind::Fleet).count() == 1
            && self.fleet_hold.is_some()
        {
            // The operator accepted every missing service one by one, which ends the fleet hold.
            self.fleet.accept();
            self.fleet_hold = None;
            self.held.retain(|held| held.kind != HoldKind::Fleet);
        }
        if let Some(hold) = &self.fleet_hold {
            let subject = format!("discovery source `{}`", self.source);
            believed.problems.push(Problem::new(Place::file(self.source.clone()), subject, &*hold.because));
        }
        believed
    }

    /// Starts to guard the services that the source lists for the first time. An unreadable service that the operator
    /// dropped is not new.
    fn add_new_services(&mut self) {
        let reported = &self.reported.services;
        self.dropped.retain(|name, known| {
            let reported = reported.get(name);
            reported
                .is_some_and(|reported| reported.extent == Extent::Nothing && reported.registration == *known)
        });
        let dropped = &self.dropped;
        let new: Vec<_> = join(&self.services, reported)
            .filter_map(
                |(name, known, reported)| if known.is_none() { Some((name, reported?)) } else { None },
            )
            .filter(|(name, _)| !dropped.contains_key(*name))
            .map(|(name, reported)| (name.clone(), GuardedService::new(reported.clone())))
            .collect();
        self.services.extend(new);
    }

    /// Judges each service, and records what is held.
    fn judge_services(&mut self, now: Instant) -> Registrations {
        let fleet_change = self.fleet_hold.as_ref().map(|hold| self.fleet_change(hold));
        let Guard { source, config, reported, services, held, notices, fleet_hold, .. } = self;
        held.clear();
        held.extend(fleet_change);
        let mut problems = reported.problems.clone();
        let fleet = fleet_hold.as_ref().map(|hold| (&hold.because, hold.since));
        let rules = JudgementContext { config, source, fleet, now };
        // Both maps are sorted by name.
        let mut reported_services = reported.services.iter().peekable();
        let mut served = Vec::with_capacity(services.len());
        services.retain(|name, watched| {
            let on_purpose = config.allow_empty.contains(name) || reported.emptied.contains(name);
            while reported_services.next_if(|(reported, _)| *reported < name).is_some() {}
            let reported =
                reported_services.next_if(|(reported, _)| *reported == name).map(|(_, reported)| reported);
            let (view, judgement) = watched.judge(name, reported, on_purpose, &rules);
            let notice = judgement_notice(source, watched.held.take(), &judgement);
            notices.extend(notice.map(|(kind, hold, text)| Notice {
                kind,
                service: Some(name.clone()),
                hold: Some(hold),
                text,
            }));
            if let Judgement::Held(change) = judgement {
                // The reason of a fleet hold is one problem for the whole source, and the source itself reports
                // why a service is unreadable.
                let is_reported_already = change.kind == HoldKind::Fleet
                    || (change.kind == HoldKind::Unreadable && change.has == 0);
                if !is_reported_already && let Some(view) = &view {
                    let place = view.registration.place.clone();
                    problems.push(Problem::new(place, subject_of(name), &*change.because));
                }
                watched.held = Some(change.kind);
                held.push(change);
            }
            let Some(view) = view else { return false };
            watched.served = view.clone();
            served.push((name.clone(), view));
            true
        });
        Registrations { services: served.into_iter().collect(), problems, ..Registrations::default() }
    }

    fn fleet_change(&self, hold: &FleetHold) -> HeldChange {
        HeldChange {
            service: None,
            kind: HoldKind::Fleet,
            since: hold.since,
            until: None,
            had: hold.had,
            has: self.reported.services.values().map(|view| view.registration.endpoints.len()).sum(),
            confirmed: 0,
            confirmations: 0,
            because: hold.because.clone(),
        }
    }

    /// Returns the view to serve while the source is frozen.
    fn frozen_view(&mut self) -> Registrations {
        let mut served =
            Registrations { problems: self.reported.problems.clone(), ..Registrations::default() };
        let because: Arc<str> = format!(
            "`{}` reports a change of this service and is frozen: no change is applied until the operator \
             thaws the source",
            self.source
        )
        .into();
        for (name, watched) in &self.services {
            let same = self.reported.services.get(name).filter(|reported| {
                Arc::ptr_eq(&reported.registration, &watched.served.registration)
                    || reported.registration == watched.served.registration
            });
            let because = Some(because.clone());
            let view = match same {
                Some(reported) => reported.clone(),
                None => ServiceView { state: State::Held, because, ..watched.served.clone() },
            };
            served.services.insert(name.clone(), view);
        }
        self.held.clear();
        served
    }

    /// Drops the last good view of a source that has not answered for longer than `most`.
    fn drop_last_view(&mut self, most: Duration) -> Registrations {
        if !self.has_given_up {
            self.has_given_up = true;
            let text = format!(
                "`{}` has not answered for {}: its last good view is dropped (`guard.max_stale`)",
                self.source,
                show_duration(most)
            );
            self.add_notice(NoticeKind::GivenUp, None, None, text);
        }
        self.services.clear();
        self.dropped.clear();
        self.held.clear();
        self.reported = Registrations::default();
        self.fleet = FleetTracker::default();
        self.fleet_hold = None;
        Registrations::default()
    }

    /// Returns the next time at which [`Guard::judge`] or [`Guard::services_to_confirm`] changes even if the source
    /// reports no change.
    pub fn deadline(&self) -> Option<Instant> {
        if let Some(since) = self.failing_since {
            let give_up = self.config.max_stale.map(|most| since + most);
            return give_up.filter(|_| !self.has_given_up && self.frozen.is_none());
        }
        if self.frozen.is_some() {
            return None;
        }
        let is_fleet = self.fleet_hold.is_some();
        self.services.values().filter_map(|watched| watched.deadline(&self.config, is_fleet)).min()
    }

    /// Returns the services that lost most or all of their endpoints and whose confirming read is due. The
    /// source reads them with its strongest consistency.
    pub fn services_to_confirm(&self, now: Instant) -> BTreeSet<ServiceName> {
        if self.failing_since.is_some() || self.frozen.is_some() || self.fleet_hold.is_some() {
            return BTreeSet::new();
        }
        let due = |at| {
            self.services.iter().filter(move |(_, watched)| watched.needs_confirming_read(&self.config, at))
        };
        if due(now).next().is_none() {
            return BTreeSet::new();
        }
        // Services whose read is due a moment later share one read.
        due(now + Self::TOGETHER).map(|(name, _)| name.clone()).collect()
    }

    const TOGETHER: Duration = Duration::from_millis(500);

    /// Takes the result of the read that [`Guard::services_to_confirm`] asked for.
    pub fn record_confirming_read(
        &mut self,
        services: &BTreeSet<ServiceName>,
        reported: Registrations,
        now: Instant,
    ) {
        self.observe(reported, now);
        // Judging the new view first updates which removals are still pending.
        self.judge(now);
        for name in services {
            let Some(watched) = self.services.get_mut(name) else { continue };
            if let Some(why) = self.reported.services.get(name).and_then(unreadable_reason) {
                watched.record_failed_read(&why, &self.config, now);
                continue;
            }
            if let (Some(times), Some(kind)) = (watched.count_confirming_read(), watched.held) {
                let of = self.config.confirmations;
                let text = format!(
                    "`{}` was read again and reports the same: confirming read {times} of {of}",
                    self.source
                );
                self.add_notice(NoticeKind::Confirmed, Some(name.clone()), Some(kind), text);
            }
        }
    }

    /// Records that the read that [`Guard::services_to_confirm`] asked for failed, so it confirms nothing.
    pub fn record_failed_read(&mut self, services: &BTreeSet<ServiceName>, why: &Arc<str>, now: Instant) {
        for name in services {
            if let Some(watched) = self.services.get_mut(name) {
                watched.record_failed_read(why, &self.config, now);
            }
        }
    }

    /// Returns what is held as of the last [`Guard::judge`]: the source as a whole first, then each
    /// service.
    pub fn held_changes(&self) -> Vec<HeldChange> {
        let mut all = self.held.clone();
        for held in &mut all {
            let watched = held.service.as_ref().and_then(|name| self.services.get(name));
            if let Some(watched) = watched
                && let Some(why) = watched.failed_read_reason()
            {
                held.because = format!("{}; the confirming read failed: {why}", held.because).into();
            }
        }
        all
    }

    /// Returns the number of endpoints that are served although the source no longer lists them.
    pub fn missing_endpoints(&self) -> usize {
        self.services.values().map(GuardedService::missing_count).sum()
    }

    /// Believes the reported state of `service`, or of everything that is held. Returns the services
    /// concerned.
    pub fn accept(&mut self, service: Option<&ServiceName>) -> Result<Vec<ServiceName>, AcceptError> {
        if self.frozen.is_some() {
            return Err(AcceptError::Frozen);
        }
        let is_meant = |name: &ServiceName, watched: &GuardedService| match service {
            Some(service) => service == name && (watched.held.is_some() || watched.missing_count() > 0),
            None => watched.held.is_some() || (self.fleet_hold.is_some() && watched.missing_count() > 0),
        };
        let meant: Vec<_> = self
            .services
            .iter()
            .filter(|(name, watched)| is_meant(name, watched))
            .map(|(name, _)| name.clone())
            .collect();
        if meant.is_empty() && (service.is_some() || self.fleet_hold.is_none()) {
            return Err(AcceptError::NothingHeld);
        }
        for name in &meant {
            let reported = self.reported.services.get(name);
            let Some(watched) = self.services.get_mut(name) else { continue };
            let kind = watched.held.take();
            let reported = match reported {
                Some(unread) if unread.extent == Extent::Nothing => {
                    self.dropped.insert(name.clone(), unread.registration.clone());
                    None
                }
                reported => reported,
            };
            if !watched.accept(reported) {
                self.services.remove(name);
            }
            self.add_notice(
                NoticeKind::Accepted,
                Some(name.clone()),
                kind,
                "the operator accepted the change".to_owned(),
            );
        }
        if service.is_none() {
            if self.fleet_hold.take().is_some() {
                let text = "the operator accepted the loss of the source".to_owned();
                self.add_notice(NoticeKind::Accepted, None, Some(HoldKind::Fleet), text);
            }
            self.fleet.accept();
        }
        Ok(meant)
    }

    /// Freezes the source: no change of it is applied from now on, not even an addition. `since` is shown to
    /// the operator. Returns `false` if it was frozen already.
    pub fn freeze(&mut self, since: SystemTime) -> bool {
        let is_news = self.frozen.is_none();
        if is_news {
            self.frozen = Some(since);
            let text = "the operator froze the source: its changes are not applied".to_owned();
            self.add_notice(NoticeKind::Frozen, None, None, text);
        }
        is_news
    }

    /// Applies changes of the source again. Returns `false` if it was not frozen.
    pub fn thaw(&mut self, now: Instant) -> bool {
        let is_news = self.frozen.take().is_some();
        if is_news {
            let text = "the operator thawed the source: its changes are applied again".to_owned();
            self.add_notice(NoticeKind::Thawed, None, None, text);
            self.restart_holds(now);
            self.judge_fleet(now);
        }
        is_news
    }

    pub fn frozen_since(&self) -> Option<SystemTime> {
        self.frozen
    }

    /// Returns the notices since the previous call.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    fn add_notice(
        &mut self,
        kind: NoticeKind,
        service: Option<ServiceName>,
        hold: Option<HoldKind>,
        text: impl Into<Arc<str>>,
    ) {
        self.notices.push(Notice { kind, service, hold, text: text.into() });
    }
}

/// Returns the notice for the operator if the judgement of a service starts, changes or ends a hold. `was` is the
/// hold before.
fn judgement_notice(
    source: &str,
    was: Option<HoldKind>,
    judgement: &Judgement,
) -> Option<(NoticeKind, HoldKind, Arc<str>)> {
    match (was, judgement) {
        (Some(kind), Judgement::Believed) => {
            let text = format!("`{source}` kept reporting the change, which is now applied");
            Some((NoticeKind::Believed, kind, text.into()))
        }
        (Some(kind), Judgement::NotHeld) => {
            let text = match kind {
                HoldKind::Unhealthy => format!("`{source}` no longer reports all endpoints as unhealthy"),
                HoldKind::Unreadable => format!("the service can be read from `{source}` again"),
                _ => format!("`{source}` lists the missing endpoints again"),
            };
            Some((NoticeKind::Returned, kind, text.into()))
        }
        (was, Judgement::Held(change)) if was != Some(change.kind) => {
            Some((NoticeKind::Held, change.kind, change.because.clone()))
        }
        _ => None,
    }
}

/// Returns the reason if a service is listed without endpoints because it could not be read. Such a read
/// confirms no removal.
fn unreadable_reason(reported: &ServiceView) -> Option<Arc<str>> {
    let is_unread = reported.state == State::Stale && reported.registration.endpoints.is_empty();
    is_unread.then(|| reported.because.clone().unwrap_or_else(|| "it could not be read".into()))
}

#[cfg(test)]
mod tests;
