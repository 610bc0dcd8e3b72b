//! Whether to believe a source that says less than it did.
//!
//! What appears is believed at once. What disappears may have been taken away, or a generator, a registry or a mount
//! may have had an accident, and proxies that lose the endpoints of a service cannot do without them. So a service
//! that loses everything, or most of it, is held until the source has said the same for a while.
//!
//! The evidence: kingpin refuses less than half of at least five, Finagle removes one epoch (10 s) late, Synapse and
//! Dubbo keep the previous backends over an empty answer, Eureka stops expiring below 85 % of renewals. What is judged
//! is what is left after additions, and not what was removed: replacing ten instances by ten others is a deployment.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_model::text::{parse_duration, show_duration};
use vmesh_model::{Endpoint, Health, Problem, Registration, ServiceName};

use crate::format::subject_of;
use vmesh_model::State;

use crate::source::{Registrations, Seen};

/// When a removal is believed.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GuardConfig {
    /// An endpoint that is gone stays for so long. Built in: 10 s for registries, whose clients lose their sessions
    /// and come back; nothing for files, since an edit is deliberate.
    #[serde(deserialize_with = "some_duration")]
    pub removal_hold: Option<Duration>,
    /// A service that is gone, or has no endpoints left, stays as it was for so long.
    #[serde(deserialize_with = "duration")]
    pub confirm_empty: Duration,
    /// A service that shrinks below `shrink_ratio` keeps its endpoints for so long.
    #[serde(deserialize_with = "duration")]
    pub confirm_shrink: Duration,
    /// What share of its endpoints has to be left.
    #[serde(deserialize_with = "ratio")]
    pub shrink_ratio: f64,
    /// Services with fewer endpoints shrink as they like: one of two is half of them.
    pub shrink_min: usize,
    /// Services that may lose everything at once.
    pub allow_empty: Vec<ServiceName>,
}

impl Default for GuardConfig {
    fn default() -> Self {
        GuardConfig {
            removal_hold: None,
            confirm_empty: Duration::from_secs(30),
            confirm_shrink: Duration::from_secs(60),
            shrink_ratio: 0.5,
            shrink_min: 5,
            allow_empty: Vec::new(),
        }
    }
}

impl GuardConfig {
    const REMOVAL_HOLD: Duration = Duration::from_secs(10);

    /// The defaults of a source that is edited on purpose.
    pub fn for_files(mut self) -> GuardConfig {
        self.removal_hold.get_or_insert(Duration::ZERO);
        self
    }
}

pub(crate) fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    parse_duration(&String::deserialize(deserializer)?).map_err(de::Error::custom)
}

fn some_duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Duration>, D::Error> {
    duration(deserializer).map(Some)
}

fn ratio<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f64, D::Error> {
    let ratio = f64::deserialize(deserializer)?;
    if (0.0..=1.0).contains(&ratio) {
        Ok(ratio)
    } else {
        Err(de::Error::custom(format!("{ratio} is not a share: from 0 to 1")))
    }
}

/// What is believed of one source. Pure: it is told the time.
#[derive(Debug)]
pub struct Guard {
    source: Arc<str>,
    config: GuardConfig,
    told: Registrations,
    services: BTreeMap<ServiceName, Watched>,
    /// Since when the source does not answer, so that nothing is confirmed by the time that passes.
    failing_since: Option<Instant>,
}

/// One service that is believed to exist.
#[derive(Debug)]
struct Watched {
    shown: Seen,
    /// What of the endpoints shown is not told any more, and since when.
    missing: BTreeMap<SocketAddr, Instant>,
    /// Since when nothing is told of it, or no endpoint.
    none_since: Option<Instant>,
    /// Since when it is told to have too few endpoints, and how many it had.
    few_since: Option<(Instant, usize)>,
}

/// What is to be shown of a service.
enum Verdict {
    Gone,
    Show(Seen),
}

impl Guard {
    /// `source` is its name, for messages: `file:/etc/vmesh/services.d`.
    pub fn new(source: impl Into<Arc<str>>, config: GuardConfig) -> Guard {
        Guard {
            source: source.into(),
            config,
            told: Registrations::default(),
            services: BTreeMap::new(),
            failing_since: None,
        }
    }

    /// A guard that believes what was believed before a restart.
    pub fn restored(source: impl Into<Arc<str>>, config: GuardConfig, last_good: &Registrations) -> Guard {
        let mut guard = Guard::new(source, config);
        let watched = |(name, seen): (&ServiceName, &Seen)| (name.clone(), Watched::new(seen.clone()));
        guard.services = last_good.services.iter().map(watched).collect();
        guard.told = last_good.clone();
        guard
    }

    pub fn source(&self) -> &str {
        &self.source
    }

    /// Takes what the source says now.
    pub fn see(&mut self, told: Registrations, now: Instant) {
        if self.failing_since.take().is_some() {
            // What was held before the failure has to be said for the whole time again.
            for watched in self.services.values_mut() {
                watched.missing.values_mut().for_each(|since| *since = now);
                watched.none_since = watched.none_since.map(|_| now);
                watched.few_since = watched.few_since.map(|(_, of)| (now, of));
            }
        }
        self.told = told;
    }

    /// The source does not answer: what it said last stands, and nothing that is held is confirmed meanwhile.
    pub fn source_failed(&mut self, now: Instant) {
        self.failing_since.get_or_insert(now);
    }

    /// What to believe at `now`.
    pub fn believed(&mut self, now: Instant) -> Registrations {
        let now = self.failing_since.unwrap_or(now);
        let mut believed = Registrations { problems: self.told.problems.clone(), ..Registrations::default() };
        for (name, told) in &self.told.services {
            self.services.entry(name.clone()).or_insert_with(|| Watched::new(told.clone()));
        }
        let Guard { source, config, told, services, .. } = self;
        services.retain(|name, watched| {
            let on_purpose = config.allow_empty.contains(name) || told.emptied.contains(name);
            match watched.judge(told.services.get(name), on_purpose, config, source, now) {
                Verdict::Gone => false,
                Verdict::Show(seen) => {
                    watched.shown = seen.clone();
                    if let (State::Held, Some(because)) = (seen.state, &seen.because) {
                        let place = seen.registration.place.clone();
                        believed.problems.push(Problem::new(place, subject_of(name), &**because));
                    }
                    believed.services.insert(name.clone(), seen);
                    true
                }
            }
        });
        believed
    }

    /// When [`Guard::believed`] will say something else although the source says the same.
    pub fn deadline(&self) -> Option<Instant> {
        if self.failing_since.is_some() {
            return None;
        }
        self.services.values().filter_map(|watched| watched.deadline(&self.config)).min()
    }
}

impl Watched {
    fn new(shown: Seen) -> Watched {
        Watched { shown, missing: BTreeMap::new(), none_since: None, few_since: None }
    }

    fn judge(
        &mut self,
        told: Option<&Seen>,
        on_purpose: bool,
        config: &GuardConfig,
        source: &str,
        now: Instant,
    ) -> Verdict {
        let is_settled = self.missing.is_empty() && self.none_since.is_none() && self.few_since.is_none();
        if let Some(told) = told
            && is_settled
            && Arc::ptr_eq(&told.registration, &self.shown.registration)
        {
            return Verdict::Show(told.clone());
        }
        let target: &[Endpoint] = told.map(|told| &*told.registration.endpoints).unwrap_or_default();
        let on_purpose = on_purpose || told.is_some_and(|told| told.empty_on_purpose);
        // Those that drain have taken their leave: they are not missed.
        let counts =
            |endpoints: &[Endpoint]| endpoints.iter().filter(|e| e.health != Health::Draining).count();
        let before = self.few_since.map_or_else(|| counts(&self.shown.registration.endpoints), |(_, of)| of);
        let excused = target.is_empty() && on_purpose;
        let none = target.is_empty() && before > 0 && !excused;
        #[expect(clippy::cast_precision_loss, reason = "no service has 2^52 endpoints")]
        let few = before >= config.shrink_min
            && (target.len() as f64) < config.shrink_ratio * before as f64
            && !excused;
        self.none_since = none.then(|| self.none_since.unwrap_or(now));
        self.few_since = few.then(|| self.few_since.unwrap_or((now, before)));

        let held_until = match (self.none_since, self.few_since) {
            (Some(since), _) => Some((since + config.confirm_empty, config.confirm_empty)),
            (None, Some((since, _))) => Some((since + config.confirm_shrink, config.confirm_shrink)),
            (None, None) => None,
        };
        if let Some((until, hold)) = held_until
            && now < until
        {
            let because = self.reason(told, before, source, hold);
            self.missed(target, now);
            let shown = self.merged(told, target, |_| true);
            return Verdict::Show(Seen { state: State::Held, because: Some(because), ..shown });
        }
        self.none_since = None;
        self.few_since = None;
        let Some(told) = told else { return Verdict::Gone };
        if excused {
            self.missing.clear();
            return Verdict::Show(told.clone());
        }
        // Also what was confirmed as a whole: what went last has not been gone for long.
        self.missed(target, now);
        let hold = config.removal_hold.unwrap_or(GuardConfig::REMOVAL_HOLD);
        let missing = std::mem::take(&mut self.missing);
        let stays = |endpoint: &Endpoint| {
            let since = missing.get(&endpoint.address);
            endpoint.health != Health::Draining && since.is_some_and(|since| now < *since + hold)
        };
        let seen = self.merged(Some(told), target, stays);
        let shown = &seen.registration.endpoints;
        self.missing = missing;
        self.missing.retain(|address, _| shown.binary_search_by_key(address, |e| e.address).is_ok());
        Verdict::Show(seen)
    }

    /// Remembers since when which endpoint is missing.
    fn missed(&mut self, target: &[Endpoint], now: Instant) {
        let missing = &mut self.missing;
        let is_told = |address: &SocketAddr| target.binary_search_by_key(address, |e| e.address).is_ok();
        missing.retain(|address, _| !is_told(address));
        for endpoint in self.shown.registration.endpoints.iter().filter(|e| !is_told(&e.address)) {
            missing.entry(endpoint.address).or_insert(now);
        }
    }

    /// What is told, and of what was shown besides that what `stays`. Shares the pointer with either if it is equal.
    fn merged(&self, told: Option<&Seen>, target: &[Endpoint], stays: impl Fn(&Endpoint) -> bool) -> Seen {
        let shown = &self.shown.registration;
        let is_told = |address: &SocketAddr| target.binary_search_by_key(address, |e| e.address).is_ok();
        let kept: Vec<_> =
            shown.endpoints.iter().filter(|e| !is_told(&e.address) && stays(e)).cloned().collect();
        let Some(told) = told else { return self.shown.clone() };
        if kept.is_empty() {
            return told.clone();
        }
        let mut endpoints: Vec<_> = target.iter().cloned().chain(kept).collect();
        endpoints.sort_by_key(|endpoint| endpoint.address);
        let merged = Registration { endpoints: endpoints.into(), ..(*told.registration).clone() };
        let registration = if merged == **shown { shown.clone() } else { Arc::new(merged) };
        Seen { registration, empty_on_purpose: false, ..told.clone() }
    }

    fn reason(&self, told: Option<&Seen>, before: usize, source: &str, hold: Duration) -> Arc<str> {
        let endpoints = |n: usize| if n == 1 { "1 endpoint".to_owned() } else { format!("{n} endpoints") };
        let stay = format!("what was known stays for {}, in case that is a mistake", show_duration(hold));
        let left = told.map(|told| told.registration.endpoints.len());
        let said = match left {
            None => format!("no longer names it, and it had {}", endpoints(before)),
            Some(0) => format!("names no endpoint of it any more, and it had {}", endpoints(before)),
            Some(left) => format!("names {} of it, and it had {before}", endpoints(left)),
        };
        format!("`{source}` {said}: {stay}").into()
    }

    fn deadline(&self, config: &GuardConfig) -> Option<Instant> {
        let hold = match (self.none_since, self.few_since) {
            (Some(since), _) => return Some(since + config.confirm_empty),
            (None, Some((since, _))) => return Some(since + config.confirm_shrink),
            (None, None) => config.removal_hold.unwrap_or(GuardConfig::REMOVAL_HOLD),
        };
        self.missing.values().min().map(|since| *since + hold)
    }
}

#[cfg(test)]
mod tests;
