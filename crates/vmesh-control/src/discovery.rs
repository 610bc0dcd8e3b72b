//! The operator's view of discovery, and the operator's actions on it: accept, freeze, thaw, evict and admit.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use tokio::sync::oneshot;
use vmesh_api::{
    Discovery, DiscoverySource, Event, EvictedEndpoint, HeldRemoval, SourceCounters, SourceState,
    UnresolvedName,
};
use vmesh_discovery::guard::{self, AcceptError, NoticeKind};
use vmesh_discovery::source::{Events, HoldCounts};
use vmesh_discovery::{Command, Counters, View};
use vmesh_model::ServiceName;
use vmesh_model::strict::did_you_mean;

use crate::overrides::Overrides;
use crate::persist::PersistError;
use crate::time::unix_now;
use crate::worlds::{ConfiguredSource, Sources};

/// The reason why an operator's action was not performed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ActionError {
    /// The source, service or endpoint does not exist.
    #[error("{0}")]
    Unknown(String),
    #[error("{0}")]
    Conflict(String),
}

/// The operator's actions on sources and endpoints, for the API.
#[derive(Debug)]
pub(crate) struct OperatorActions {
    sources: Sources,
    overrides: Arc<Overrides>,
    /// The `vmeshctl` command line up to the action, with the socket on which the API accepts changes.
    ctl: String,
}

impl OperatorActions {
    /// Creates the actions. `socket` is the path of the API socket.
    pub(crate) fn new(sources: Sources, overrides: Arc<Overrides>, socket: &Path) -> OperatorActions {
        let socket = std::path::absolute(socket).unwrap_or_else(|_| socket.to_owned());
        let ctl = format!("vmeshctl --api {} discovery", shell_word(&format!("unix:{}", socket.display())));
        OperatorActions { sources, overrides, ctl }
    }

    pub(crate) fn show(&self) -> Discovery {
        let evicted = self.overrides.current().evicted;
        let evicted = evicted.all().map(|guard::Eviction { service, address, since }| EvictedEndpoint {
            command: format!("{} admit {service} {address}", self.ctl),
            age_seconds: unix_now().saturating_sub(since),
            service,
            address,
        });
        Discovery {
            sources: self.sources.all().iter().map(|known| self.source(known)).collect(),
            evicted: evicted.collect(),
        }
    }

    fn source(&self, known: &ConfiguredSource) -> DiscoverySource {
        let (view, counters) = (known.view(), &known.handle.counters);
        let (state, because) = source_state(&view);
        let answered = counters.last_answer();
        let name = shell_word(known.name());
        let services = view.last_good.iter().flat_map(|last_good| last_good.services.values());
        DiscoverySource {
            state,
            because,
            required: known.is_required,
            age_seconds: answered.map(|at| at.elapsed().unwrap_or_default().as_secs()),
            answered_at: answered.map(|at| unix(at).as_secs()),
            frozen_at: view.frozen.map(|since| unix(since).as_secs()),
            command: view.frozen.map(|_| format!("{} thaw {name}", self.ctl)),
            services: view.last_good.as_ref().map_or(0, |last_good| last_good.services.len()),
            endpoints: services.map(|service_view| service_view.registration.endpoints.len()).sum(),
            missing: counters.missing.load(Relaxed),
            held: view.held.iter().map(|held| self.held(&name, held)).collect(),
            unresolved: view.unresolved.count,
            unresolved_names: view.unresolved.first.iter().map(api_unresolved_name).collect(),
            counters: source_counters(counters),
            name: known.name().clone(),
        }
    }

    fn held(&self, source: &str, held: &guard::HeldChange) -> HeldRemoval {
        let now = Instant::now();
        let service = held.service.as_ref().map_or_else(String::new, |service| format!(" {service}"));
        HeldRemoval {
            service: held.service.clone(),
            kind: held.kind.as_str().into(),
            age_seconds: now.saturating_duration_since(held.since).as_secs(),
            remaining_seconds: held.until.map(|until| {
                // Rounded up, so that a held removal never shows 0 s remaining.
                until.saturating_duration_since(now).as_secs_f64().ceil() as u64
            }),
            had: held.had,
            has: held.has,
            confirmed: held.confirmed,
            confirmations: held.confirmations,
            because: held.because.clone(),
            command: format!("{} accept {source}{service}", self.ctl),
        }
    }

    /// Returns the events of all sources, the oldest first.
    pub(crate) fn events(&self) -> Vec<Event> {
        let of = |source: Option<&Arc<str>>, events: &Events| {
            let source = source.cloned();
            events.all().into_iter().map(move |event| (event.at, api_event(source.clone(), event)))
        };
        let own = of(None, &self.overrides.events);
        let sources =
            self.sources.all().iter().flat_map(|known| of(Some(known.name()), &known.handle.events));
        let mut all: Vec<_> = own.chain(sources).collect();
        all.sort_by_key(|(at, _)| *at);
        all.into_iter().map(|(_, event)| event).collect()
    }

    fn find_source(&self, source: &str) -> Result<&ConfiguredSource, ActionError> {
        let all = self.sources.all();
        if let Some(known) = all.iter().find(|known| **known.name() == *source) {
            return Ok(known);
        }
        let names: Vec<_> = all.iter().map(|known| &**known.name()).collect();
        Err(ActionError::Unknown(match did_you_mean(source, names.iter().copied()) {
            Some(meant) => format!("there is no discovery source `{source}`: did you mean `{meant}`?"),
            None => format!("there is no discovery source `{source}`: there is {}", quoted(&names)),
        }))
    }

    /// Accepts the held removals of `service` from a source, or all of them.
    pub(crate) async fn accept(
        &self,
        source: &str,
        service: Option<ServiceName>,
    ) -> Result<String, ActionError> {
        let known = self.find_source(source)?;
        let (done, answer) = oneshot::channel();
        send_command(known, Command::Accept { service: service.clone(), done }).await?;
        match received(known, answer.await)? {
            Ok(accepted) => {
                let names: Vec<_> = accepted.iter().map(ServiceName::as_str).collect();
                Ok(match names.as_slice() {
                    [] => format!("accepted what `{source}` lists now"),
                    names => format!("accepted what `{source}` lists now for {}", quoted(names)),
                })
            }
            Err(AcceptError::NothingHeld) => Err(ActionError::Unknown(match service {
                Some(service) => {
                    format!("nothing of `{service}` is held of `{source}`: `vmeshctl discovery` says what is")
                }
                None => format!("nothing of `{source}` is held"),
            })),
            Err(AcceptError::Frozen) => Err(ActionError::Conflict(format!(
                "`{source}` is frozen, and nothing of it is taken: thaw it first, with `{} thaw {}`",
                self.ctl,
                shell_word(source)
            ))),
        }
    }

    /// Freezes a source, or all: none of its changes is applied.
    pub(crate) async fn freeze(&self, source: Option<&str>) -> Result<String, ActionError> {
        let mut messages = Vec::new();
        for known in self.select_sources(source)? {
            let name = known.name();
            // The override is changed first, so that a process that crashes here restarts with the source
            // frozen.
            let since = unix_now();
            self.overrides.change(|saved| {
                let is_change = !saved.frozen.contains_key(name);
                saved.frozen.entry(name.clone()).or_insert(since);
                is_change
            });
            let (done, answer) = oneshot::channel();
            send_command(known, Command::Freeze { since: UNIX_EPOCH + Duration::from_secs(since), done })
                .await?;
            let is_change = received(known, answer.await)?;
            messages.push(match is_change {
                true => format!("`{name}` is frozen: its changes are not applied"),
                false => format!("`{name}` was frozen already"),
            });
            if let (true, Some(last_good)) = (is_change, known.view().last_good)
                && let Err(error) = self.overrides.save_frozen(name, last_good).await
            {
                messages.push(describe_save_error(&error));
            }
        }
        Ok(self.save_overrides(messages).await)
    }

    /// Thaws a source, or all: its changes are applied again.
    pub(crate) async fn thaw(&self, source: Option<&str>) -> Result<String, ActionError> {
        let mut messages = Vec::new();
        for known in self.select_sources(source)? {
            let name = known.name();
            self.overrides.change(|saved| saved.frozen.remove(name).is_some());
            let (done, answer) = oneshot::channel();
            send_command(known, Command::Thaw { done }).await?;
            messages.push(match received(known, answer.await)? {
                true => format!("`{name}` is thawed: its changes are applied and guarded again"),
                false => format!("`{name}` was not frozen"),
            });
        }
        Ok(self.save_overrides(messages).await)
    }

    fn select_sources(&self, source: Option<&str>) -> Result<Vec<&ConfiguredSource>, ActionError> {
        match source {
            Some(source) => Ok(vec![self.find_source(source)?]),
            None => Ok(self.sources.all().iter().collect()),
        }
    }

    /// Evicts an endpoint: it is no longer used, whichever source lists it.
    pub(crate) async fn evict(
        &self,
        service: &ServiceName,
        address: SocketAddr,
    ) -> Result<String, ActionError> {
        let is_evicted = self.overrides.current().evicted.contains(service, &address);
        if !is_evicted && !self.sources.contains_endpoint(service, &address) {
            return Err(ActionError::Unknown(self.describe_unknown_endpoint(service, address)));
        }
        let is_change =
            self.overrides.change(|saved| saved.evicted.evict(service.clone(), address, unix_now()));
        if !is_change {
            return Ok(self
                .save_overrides(vec![format!("{address} of `{service}` was evicted already")])
                .await);
        }
        let evicted = guard::Eviction { service: service.clone(), address, since: unix_now() };
        self.overrides.record(
            NoticeKind::Evicted,
            &evicted,
            "evicted by the operator; it is not used any more",
        );
        let left = match self.count_remaining_endpoints(service) {
            0 => "; it was the last, and requests to the service fail now",
            _ => "",
        };
        Ok(self.save_overrides(vec![format!("{address} of `{service}` is not used any more{left}")]).await)
    }

    /// Admits an evicted endpoint: it is used again.
    pub(crate) async fn admit(
        &self,
        service: &ServiceName,
        address: SocketAddr,
    ) -> Result<String, ActionError> {
        if !self.overrides.change(|saved| saved.evicted.admit(service, &address)) {
            return Err(ActionError::Unknown(format!(
                "{address} of `{service}` is not evicted: `vmeshctl discovery` lists what is"
            )));
        }
        let evicted = guard::Eviction { service: service.clone(), address, since: unix_now() };
        self.overrides.record(NoticeKind::Admitted, &evicted, "admitted by the operator; it is used again");
        Ok(self.save_overrides(vec![format!("{address} of `{service}` is used again")]).await)
    }

    fn count_remaining_endpoints(&self, service: &ServiceName) -> usize {
        let evicted = self.overrides.current().evicted;
        let views = self.sources.all().iter().map(ConfiguredSource::view);
        let registrations = views.filter_map(|view| {
            let last_good = view.last_good?;
            last_good.services.get(service).map(|service_view| service_view.registration.clone())
        });
        let left = registrations.map(|registration| evicted.apply(registration).endpoints.len());
        left.sum()
    }

    fn describe_unknown_endpoint(&self, service: &ServiceName, address: SocketAddr) -> String {
        let views: Vec<_> = self.sources.all().iter().filter_map(|known| known.view().last_good).collect();
        let mut names = views.iter().flat_map(|view| view.services.keys());
        if names.clone().any(|name| name == service) {
            return format!(
                "no source names {address} of `{service}`: `vmeshctl services {service}` lists its endpoints"
            );
        }
        match did_you_mean(service.as_str(), names.by_ref().map(ServiceName::as_str)) {
            Some(meant) => format!("no source names the service `{service}`: did you mean `{meant}`?"),
            None => format!("no source names the service `{service}`: `vmeshctl services` lists them"),
        }
    }

    /// Saves the overrides. Returns the messages in `messages`, and a warning if saving failed.
    async fn save_overrides(&self, mut messages: Vec<String>) -> String {
        if let Err(error) = self.overrides.save().await {
            messages.push(describe_save_error(&error));
        }
        messages.join("\n")
    }
}

fn describe_save_error(error: &PersistError) -> String {
    let error = vmesh_daemon::report::one_line(error);
    tracing::error!("{error}");
    format!("but a restart of the control plane forgets that: {error}")
}

async fn send_command(known: &ConfiguredSource, command: Command) -> Result<(), ActionError> {
    known.handle.commands.send(command).await.map_err(|_| source_ended(known))
}

fn received<T>(
    known: &ConfiguredSource,
    answer: Result<T, oneshot::error::RecvError>,
) -> Result<T, ActionError> {
    answer.map_err(|_| source_ended(known))
}

/// Returns the error for a source whose task ended, which happens only while the process stops.
fn source_ended(known: &ConfiguredSource) -> ActionError {
    ActionError::Conflict(format!("discovery source `{}` is not followed any more", known.name()))
}

fn source_state(view: &View) -> (SourceState, Option<Arc<str>>) {
    let frozen = view.frozen.map(|_| {
        let services = view.last_good.iter().flat_map(|last_good| last_good.services.values());
        let differ = services.filter(|service_view| service_view.state == vmesh_model::State::Held).count();
        let failing = view.stale_because.as_ref().map_or_else(String::new, |why| format!("; and {why}"));
        format!(
            "the operator froze the source: its changes are not applied; it now reports \
             changes of {differ} services in use{failing}"
        )
    });
    match (frozen, view.stale_because.as_ref().or(view.unusable.as_ref()), view.held.first()) {
        (Some(frozen), ..) => (SourceState::Frozen, Some(frozen.into())),
        (None, Some(because), _) => (SourceState::Stale, Some(because.clone())),
        (None, None, Some(held)) => {
            let because = match held.service {
                None => held.because.clone(),
                Some(_) => format!("its changes of {} services are held", view.held.len()).into(),
            };
            (SourceState::Held, Some(because))
        }
        (None, None, None) if view.last_good.is_none() => {
            (SourceState::Stale, Some("it has not answered yet".into()))
        }
        (None, None, None) => match view.unresolved.without_answer {
            0 => (SourceState::Fresh, None),
            names => {
                let because = format!("no name server answers for {names} of its host names");
                (SourceState::Unresolved, Some(because.into()))
            }
        },
    }
}

fn api_unresolved_name(name: &vmesh_discovery::UnresolvedName) -> UnresolvedName {
    UnresolvedName {
        name: name.name.clone(),
        age_seconds: name.since.elapsed().as_secs(),
        because: name.because.clone(),
        in_use: name.is_in_use,
    }
}

fn source_counters(counters: &Counters) -> SourceCounters {
    let by_kind = |counts: &HoldCounts| counts.all().map(|(kind, n)| (kind.as_str().into(), n)).collect();
    SourceCounters {
        reads: counters.reads.load(Relaxed),
        failed_reads: counters.failed_reads.load(Relaxed),
        bad_records: counters.bad_records.load(Relaxed),
        index_resets: counters.index_resets.load(Relaxed),
        sessions_expired: counters.sessions_expired.load(Relaxed),
        connects: counters.connects.load(Relaxed),
        connections: counters.connections.load(Relaxed),
        held: by_kind(&counters.held),
        rejected: by_kind(&counters.rejected),
    }
}

fn api_event(source: Option<Arc<str>>, event: vmesh_discovery::source::Event) -> Event {
    let at = unix(event.at);
    Event {
        at_millis: u64::try_from(at.as_millis()).unwrap_or(u64::MAX),
        age_seconds: event.at.elapsed().unwrap_or_default().as_secs(),
        source,
        what: event.kind.as_str().into(),
        service: event.service,
        kind: event.hold.map(|kind| kind.as_str().into()),
        text: event.text,
    }
}

fn unix(at: SystemTime) -> Duration {
    at.duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn quoted(names: &[&str]) -> String {
    let all: Vec<_> = names.iter().take(5).map(|name| format!("`{name}`")).collect();
    match names.len() {
        n @ 6.. => format!("{} and {} more", all.join(", "), n - all.len()),
        _ => all.join(", "),
    }
}

/// Quotes `text` as one word of a shell command.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "._:-/@%+=,".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_survives_the_shell() {
        assert_eq!(shell_word("file:/etc/vmesh/services.d"), "file:/etc/vmesh/services.d");
        assert_eq!(shell_word("file:my services"), "'file:my services'");
        assert_eq!(shell_word("it's"), r"'it'\''s'");
        assert_eq!(shell_word(""), "''");
    }
}
