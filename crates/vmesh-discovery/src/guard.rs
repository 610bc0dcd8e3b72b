//! Whether to believe a source that says less than it did.
//!
//! What appears is believed at once. What disappears may have been taken away, or a generator, a registry or a mount
//! may have had an accident, and proxies that lose the endpoints of a service cannot do without them.
//!
//! | what a source does | what is believed | [`Kind`] |
//! |---|---|---|
//! | fails | what it said last; nothing that is held is confirmed by the time that passes | |
//! | no longer names an endpoint | that, after `removal_hold`; at once if it drained | |
//! | no longer names a service | that, after `confirm_empty` and two more readings | [`Kind::Absent`] |
//! | names no endpoint of it | the same | [`Kind::Empty`] |
//! | names less than half of five or more | that, after `confirm_shrink` and two more readings | [`Kind::Shrunk`] |
//! | says that all of two or more became unhealthy at once | that, after `confirm_unhealthy` | [`Kind::Unhealthy`] |
//! | loses much of all that it named at once | no removal, until it names enough again or that is accepted | [`Kind::Fleet`] |
//! | names a service of which all or too much cannot be read | additions and health, and no removal, until it can be read or that is accepted | [`Kind::Unreadable`] |
//!
//! The evidence: kingpin refuses less than half of at least five, Finagle removes one epoch (10 s) late, Synapse and
//! Dubbo keep the previous backends over an empty answer, Eureka stops expiring below 85 % of renewals. What is judged
//! is what is left after additions, and not what was removed: replacing ten instances by ten others is a deployment.
//!
//! The operator's word outranks it: [`Guard::accept`], [`Guard::freeze`], [`Guard::thaw`].

mod config;
mod evict;
mod fleet;
mod watched;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use vmesh_model::text::show_duration;
use vmesh_model::{Place, Problem, Registration, ServiceName, State, join};

use crate::format::subject_of;
use crate::source::{Extent, Registrations, Seen};

pub(crate) use config::duration;
pub use config::{FleetConfig, GuardConfig};
pub use evict::{Absences, Evicted, Evictions};
use fleet::{Fleet, Loss};
use watched::{Outcome, Rules, Watched};

/// Why something is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// The service is named, without an endpoint.
    Empty,
    /// It has too few of the endpoints that it had.
    Shrunk,
    /// It is not named any more.
    Absent,
    /// All its endpoints became unhealthy at once.
    Unhealthy,
    /// Too much of all that the source named is gone at once.
    Fleet,
    /// All of it, or too much, cannot be read: what is not named may be there.
    Unreadable,
}

impl Kind {
    pub const ALL: [Kind; 6] =
        [Kind::Empty, Kind::Shrunk, Kind::Absent, Kind::Unhealthy, Kind::Fleet, Kind::Unreadable];

    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Empty => "empty",
            Kind::Shrunk => "shrunk",
            Kind::Absent => "absent",
            Kind::Unhealthy => "unhealthy",
            Kind::Fleet => "fleet",
            Kind::Unreadable => "unreadable",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Something that is said and not believed yet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// `None`: the source as a whole, with [`Kind::Fleet`].
    pub service: Option<ServiceName>,
    pub kind: Kind,
    pub since: Instant,
    /// When it may be believed at the earliest; `None`: when it is accepted, or the source names enough again.
    pub until: Option<Instant>,
    /// How many endpoints there were, and how many the source names now.
    pub had: usize,
    pub has: usize,
    /// How many readings that were asked for said the same, and how many have to.
    pub confirmed: u32,
    pub confirmations: u32,
    /// In words for an operator.
    pub because: Arc<str>,
}

/// What happened to something that was said.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum What {
    /// It is held from now on.
    Held,
    /// A reading that was asked for said the same.
    Confirmed,
    /// It was said for long and often enough, and is believed.
    Believed,
    /// It was never believed: what was missing is back.
    Returned,
    /// It is believed by the operator's word.
    Accepted,
    /// No change of the source is taken, by the operator's word.
    Frozen,
    Thawed,
    /// The source does not answer.
    Failing,
    Answering,
    /// It has not for so long that what was known is given up (`max_stale`).
    GivenUp,
    /// An endpoint is not used, by the operator's word.
    Evicted,
    Admitted,
}

impl What {
    pub fn as_str(self) -> &'static str {
        match self {
            What::Held => "held",
            What::Confirmed => "confirmed",
            What::Believed => "believed",
            What::Returned => "returned",
            What::Accepted => "accepted",
            What::Frozen => "frozen",
            What::Thawed => "thawed",
            What::Failing => "failing",
            What::Answering => "answering",
            What::GivenUp => "given up",
            What::Evicted => "evicted",
            What::Admitted => "admitted",
        }
    }
}

/// One thing that happened, to be told to the operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub what: What,
    /// `None`: the source as a whole.
    pub service: Option<ServiceName>,
    /// How it is or was held.
    pub kind: Option<Kind>,
    pub text: Arc<str>,
}

/// Why there is nothing to accept.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotAccepted {
    #[error("nothing is held")]
    NothingHeld,
    #[error("the source is frozen: thaw it first")]
    Frozen,
}

/// What is believed of one source. Pure: it is told the time.
#[derive(Debug)]
pub struct Guard {
    source: Arc<str>,
    config: GuardConfig,
    told: Registrations,
    services: BTreeMap<ServiceName, Watched>,
    /// Services that cannot be read and are not served any more, by the operator's word, and what was known of them.
    dropped: BTreeMap<ServiceName, Arc<Registration>>,
    fleet: Fleet,
    /// Nothing of the source is taken away.
    fleet_hold: Option<FleetHold>,
    /// Since when the source does not answer, so that nothing is confirmed by the time that passes.
    failing_since: Option<Instant>,
    /// What was known was given up, and nothing has been said since.
    given_up: bool,
    /// No change is taken, by the operator's word.
    frozen: Option<SystemTime>,
    held: Vec<Held>,
    notices: Vec<Notice>,
}

#[derive(Debug)]
struct FleetHold {
    since: Instant,
    /// What was known when it began.
    had: usize,
    because: Arc<str>,
}

impl Guard {
    /// `source` is its name, for messages: `file:/etc/vmesh/services.d`.
    pub fn new(source: impl Into<Arc<str>>, config: GuardConfig) -> Guard {
        Guard {
            source: source.into(),
            config,
            told: Registrations::default(),
            services: BTreeMap::new(),
            dropped: BTreeMap::new(),
            fleet: Fleet::default(),
            fleet_hold: None,
            failing_since: None,
            given_up: false,
            frozen: None,
            held: Vec::new(),
            notices: Vec::new(),
        }
    }

    /// A guard that believes what was believed before a restart.
    pub fn restored(source: impl Into<Arc<str>>, config: GuardConfig, last_good: &Registrations) -> Guard {
        let mut guard = Guard::new(source, config);
        let watched = |(name, seen): (&ServiceName, &Seen)| (name.clone(), Watched::new(seen.clone()));
        guard.services = last_good.services.iter().map(watched).collect();
        guard.fleet = Fleet::knowing(last_good);
        guard.told = last_good.clone();
        guard
    }

    pub fn source(&self) -> &Arc<str> {
        &self.source
    }

    /// Takes what the source says now.
    pub fn see(&mut self, told: Registrations, now: Instant) {
        if self.failing_since.take().is_some() {
            self.begin_again(now);
        }
        self.given_up = false;
        let Guard { config, fleet, .. } = self;
        let excused = |name: &ServiceName| config.allow_empty.contains(name) || told.emptied.contains(name);
        if self.fleet_hold.is_none() && self.frozen.is_none() {
            fleet.age(config.fleet.window, now);
        }
        fleet.turn(&self.told, &told, excused, now);
        self.told = told;
        self.judge_fleet(now);
    }

    /// The source does not answer: what it said last stands, and nothing that is held is confirmed meanwhile.
    pub fn source_failed(&mut self, now: Instant) {
        self.failing_since.get_or_insert(now);
    }

    fn begin_again(&mut self, now: Instant) {
        self.services.values_mut().for_each(|watched| watched.begin_again(now));
    }

    fn judge_fleet(&mut self, now: Instant) {
        match (self.fleet.judge(&self.config.fleet), &self.fleet_hold) {
            (Some(loss), None) if self.frozen.is_none() => {
                let because = self.too_much(&loss);
                self.note(What::Held, None, Some(Kind::Fleet), because.clone());
                self.fleet_hold = Some(FleetHold { since: now, had: loss.endpoints.0, because });
            }
            (None, Some(_)) => {
                self.fleet_hold = None;
                self.begin_again(now);
                let text =
                    format!("`{}` names enough again: what is still missing goes as ever", self.source);
                self.note(What::Returned, None, Some(Kind::Fleet), text);
            }
            _ => {}
        }
    }

    fn too_much(&self, loss: &Loss) -> Arc<str> {
        let Loss { endpoints, services } = loss;
        format!(
            "`{}` names {} of the {} endpoints and {} of the {} services that it named within the last {}: nothing of it \
             is taken away until it names enough again or that is accepted",
            self.source,
            endpoints.1,
            endpoints.0,
            services.1,
            services.0,
            show_duration(self.config.fleet.window)
        )
        .into()
    }

    /// What to believe at `now`.
    pub fn believed(&mut self, now: Instant) -> Registrations {
        if self.frozen.is_some() && !self.services.is_empty() {
            return self.as_it_was();
        }
        if let (Some(since), Some(most)) = (self.failing_since, self.config.max_stale)
            && since + most <= now
        {
            return self.give_up(most);
        }
        let now = self.failing_since.unwrap_or(now);
        let mut believed = Registrations { problems: self.told.problems.clone(), ..Registrations::default() };
        let told = &self.told.services;
        self.dropped.retain(|name, known| {
            let told = told.get(name);
            told.is_some_and(|told| told.extent == Extent::Nothing && told.registration == *known)
        });
        let dropped = &self.dropped;
        let new: Vec<_> = join(&self.services, told)
            .filter_map(|(name, known, told)| if known.is_none() { Some((name, told?)) } else { None })
            .filter(|(name, _)| !dropped.contains_key(*name))
            .map(|(name, told)| (name.clone(), Watched::new(told.clone())))
            .collect();
        self.services.extend(new);
        let Guard { source, config, told, services, held, notices, fleet_hold, .. } = self;
        held.clear();
        if let Some(hold) = fleet_hold {
            held.push(Held {
                service: None,
                kind: Kind::Fleet,
                since: hold.since,
                until: None,
                had: hold.had,
                has: told.services.values().map(|seen| seen.registration.endpoints.len()).sum(),
                confirmed: 0,
                confirmations: 0,
                because: hold.because.clone(),
            });
        }
        let fleet = fleet_hold.as_ref().map(|hold| (&hold.because, hold.since));
        let rules = Rules { config, source, fleet, now };
        // Both are sorted by name.
        let mut told_services = told.services.iter().peekable();
        let mut shown = Vec::with_capacity(services.len());
        services.retain(|name, watched| {
            let on_purpose = config.allow_empty.contains(name) || told.emptied.contains(name);
            while told_services.next_if(|(told, _)| *told < name).is_some() {}
            let told = told_services.next_if(|(told, _)| *told == name).map(|(_, told)| told);
            let (seen, outcome) = watched.judge(name, told, on_purpose, &rules);
            let was = watched.held.take();
            let mut note = |what, kind, text: Arc<str>| {
                notices.push(Notice { what, service: Some(name.clone()), kind: Some(kind), text });
            };
            match (was, outcome) {
                (None, Outcome::Plain | Outcome::Believed) => {}
                (Some(kind), Outcome::Believed) => {
                    note(What::Believed, kind, format!("`{source}` keeps to what it says").into());
                }
                (Some(kind), Outcome::Plain) => {
                    let text = match kind {
                        Kind::Unhealthy => format!("`{source}` says that not all are unhealthy"),
                        Kind::Unreadable => format!("what `{source}` says of it can be read again"),
                        _ => format!("`{source}` names what was missing again"),
                    };
                    note(What::Returned, kind, text.into());
                }
                (was, Outcome::Held(now)) => {
                    if was != Some(now.kind) {
                        note(What::Held, now.kind, now.because.clone());
                    }
                    // A problem of the source says it for all of them, or why it cannot be read.
                    let is_said = now.kind == Kind::Fleet || (now.kind == Kind::Unreadable && now.has == 0);
                    if !is_said && let Some(seen) = &seen {
                        let place = seen.registration.place.clone();
                        believed.problems.push(Problem::new(place, subject_of(name), &*now.because));
                    }
                    watched.held = Some(now.kind);
                    held.push(now);
                }
            }
            let Some(seen) = seen else { return false };
            watched.shown = seen.clone();
            shown.push((name.clone(), seen));
            true
        });
        believed.services = shown.into_iter().collect();
        if held.iter().filter(|held| held.kind == Kind::Fleet).count() == 1 && fleet_hold.is_some() {
            // What was missing has been accepted piece by piece.
            self.fleet.accept();
            self.fleet_hold = None;
            self.held.retain(|held| held.kind != Kind::Fleet);
        }
        if let Some(hold) = &self.fleet_hold {
            let subject = format!("discovery source `{}`", self.source);
            believed.problems.push(Problem::new(Place::file(self.source.clone()), subject, &*hold.because));
        }
        believed
    }

    /// What is shown while no change is taken.
    fn as_it_was(&mut self) -> Registrations {
        let mut shown = Registrations { problems: self.told.problems.clone(), ..Registrations::default() };
        let because: Arc<str> = format!(
            "`{}` says something else of it now, and is frozen: no change of it is taken until it is thawed",
            self.source
        )
        .into();
        for (name, watched) in &self.services {
            let same = self.told.services.get(name).filter(|told| {
                Arc::ptr_eq(&told.registration, &watched.shown.registration)
                    || told.registration == watched.shown.registration
            });
            let because = Some(because.clone());
            let seen = match same {
                Some(told) => told.clone(),
                None => Seen { state: State::Held, because, ..watched.shown.clone() },
            };
            shown.services.insert(name.clone(), seen);
        }
        self.held.clear();
        shown
    }

    /// What is left of a source that has not answered for longer than `most`.
    fn give_up(&mut self, most: Duration) -> Registrations {
        if !self.given_up {
            self.given_up = true;
            let text = format!(
                "`{}` has not answered for {}: what was known of it is given up (`guard.max_stale`)",
                self.source,
                show_duration(most)
            );
            self.note(What::GivenUp, None, None, text);
        }
        self.services.clear();
        self.dropped.clear();
        self.held.clear();
        self.told = Registrations::default();
        self.fleet = Fleet::default();
        self.fleet_hold = None;
        Registrations::default()
    }

    /// When [`Guard::believed`] will say something else, or [`Guard::to_confirm`] will, although the source says the
    /// same.
    pub fn deadline(&self) -> Option<Instant> {
        if let Some(since) = self.failing_since {
            let give_up = self.config.max_stale.map(|most| since + most);
            return give_up.filter(|_| !self.given_up && self.frozen.is_none());
        }
        if self.frozen.is_some() {
            return None;
        }
        let is_fleet = self.fleet_hold.is_some();
        self.services.values().filter_map(|watched| watched.deadline(&self.config, is_fleet)).min()
    }

    /// The services that lost most or all of what they had and are to be read again now, as strongly as the source
    /// can, to find out whether that is so.
    pub fn to_confirm(&self, now: Instant) -> BTreeSet<ServiceName> {
        if self.failing_since.is_some() || self.frozen.is_some() || self.fleet_hold.is_some() {
            return BTreeSet::new();
        }
        let due =
            |at| self.services.iter().filter(move |(_, watched)| watched.wants_reading(&self.config, at));
        if due(now).next().is_none() {
            return BTreeSet::new();
        }
        // One reading for those that are due a moment later too.
        due(now + Self::TOGETHER).map(|(name, _)| name.clone()).collect()
    }

    const TOGETHER: Duration = Duration::from_millis(500);

    /// Takes the reading that [`Guard::to_confirm`] asked for.
    pub fn confirmed(&mut self, services: &BTreeSet<ServiceName>, told: Registrations, now: Instant) {
        self.see(told, now);
        // What is said now decides what is still doubted.
        self.believed(now);
        for name in services {
            let Some(watched) = self.services.get_mut(name) else { continue };
            if let Some(why) = self.told.services.get(name).and_then(unreadable) {
                watched.not_confirmed(&why, &self.config, now);
                continue;
            }
            if let (Some(times), Some(kind)) = (watched.confirm(), watched.held) {
                let of = self.config.confirmations;
                let text = format!("`{}` was read again and says the same: {times} of {of}", self.source);
                self.note(What::Confirmed, Some(name.clone()), Some(kind), text);
            }
        }
    }

    /// That reading failed, and confirms nothing.
    pub fn not_confirmed(&mut self, services: &BTreeSet<ServiceName>, why: &Arc<str>, now: Instant) {
        for name in services {
            if let Some(watched) = self.services.get_mut(name) {
                watched.not_confirmed(why, &self.config, now);
            }
        }
    }

    /// What is held as of the last [`Guard::believed`]: the source as a whole first, then by service.
    pub fn held(&self) -> Vec<Held> {
        let mut all = self.held.clone();
        for held in &mut all {
            let watched = held.service.as_ref().and_then(|name| self.services.get(name));
            if let Some(watched) = watched
                && let Some(why) = watched.reading_failed()
            {
                held.because =
                    format!("{}; reading it again to be sure has failed: {why}", held.because).into();
            }
        }
        all
    }

    /// How many endpoints are shown that are not told any more.
    pub fn missing(&self) -> usize {
        self.services.values().map(Watched::missing).sum()
    }

    /// Believes what is told of `service`, or of all that is held. What was held is returned.
    pub fn accept(&mut self, service: Option<&ServiceName>) -> Result<Vec<ServiceName>, NotAccepted> {
        if self.frozen.is_some() {
            return Err(NotAccepted::Frozen);
        }
        let is_meant = |name: &ServiceName, watched: &Watched| match service {
            Some(service) => service == name && (watched.held.is_some() || watched.missing() > 0),
            None => watched.held.is_some() || (self.fleet_hold.is_some() && watched.missing() > 0),
        };
        let meant: Vec<_> = self
            .services
            .iter()
            .filter(|(name, watched)| is_meant(name, watched))
            .map(|(name, _)| name.clone())
            .collect();
        if meant.is_empty() && (service.is_some() || self.fleet_hold.is_none()) {
            return Err(NotAccepted::NothingHeld);
        }
        for name in &meant {
            let told = self.told.services.get(name);
            let Some(watched) = self.services.get_mut(name) else { continue };
            let kind = watched.held.take();
            let told = match told {
                Some(unread) if unread.extent == Extent::Nothing => {
                    self.dropped.insert(name.clone(), unread.registration.clone());
                    None
                }
                told => told,
            };
            if !watched.accept(told) {
                self.services.remove(name);
            }
            self.note(What::Accepted, Some(name.clone()), kind, "by the operator's word".to_owned());
        }
        if service.is_none() {
            if self.fleet_hold.take().is_some() {
                let text = "by the operator's word: what is gone may go".to_owned();
                self.note(What::Accepted, None, Some(Kind::Fleet), text);
            }
            self.fleet.accept();
        }
        Ok(meant)
    }

    /// Takes no change of the source from now on, additions neither; `since` is for the operator. `false` if that was
    /// so before.
    pub fn freeze(&mut self, since: SystemTime) -> bool {
        let is_news = self.frozen.is_none();
        if is_news {
            self.frozen = Some(since);
            let text = "no change of it is taken, by the operator's word".to_owned();
            self.note(What::Frozen, None, None, text);
        }
        is_news
    }

    /// Takes changes again. `false` if it was not frozen.
    pub fn thaw(&mut self, now: Instant) -> bool {
        let is_news = self.frozen.take().is_some();
        if is_news {
            self.note(What::Thawed, None, None, "its changes are taken again".to_owned());
            self.begin_again(now);
            self.judge_fleet(now);
        }
        is_news
    }

    pub fn frozen(&self) -> Option<SystemTime> {
        self.frozen
    }

    /// What happened since this was last asked.
    pub fn take_notices(&mut self) -> Vec<Notice> {
        std::mem::take(&mut self.notices)
    }

    fn note(
        &mut self,
        what: What,
        service: Option<ServiceName>,
        kind: Option<Kind>,
        text: impl Into<Arc<str>>,
    ) {
        self.notices.push(Notice { what, service, kind, text: text.into() });
    }
}

/// Why nothing is told of a service, if that is because it could not be read: this confirms nothing.
fn unreadable(told: &Seen) -> Option<Arc<str>> {
    let is_unread = told.state == State::Stale && told.registration.endpoints.is_empty();
    is_unread.then(|| told.because.clone().unwrap_or_else(|| "it could not be read".into()))
}

#[cfg(test)]
mod tests;
