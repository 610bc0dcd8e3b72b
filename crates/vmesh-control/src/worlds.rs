//! Builds worlds from views, documents and node reports. The task owns the [`Catalog`].

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tokio_stream::StreamExt;
use tokio_stream::StreamMap;
use tokio_stream::wrappers::WatchStream;
use vmesh_api::Source;
use vmesh_catalog::{Catalog, SourceService, SourceView, World};
use vmesh_discovery::guard::{EvictionExpiry, Evictions, NoticeKind};
use vmesh_discovery::source::NOT_ANSWERED_YET;
use vmesh_discovery::{Handle, Registrations, View};
use vmesh_model::State;
use vmesh_model::{NodeName, NodeReport, Place, Problem, ServiceName};

use crate::documents::DocumentsView;
use crate::overrides::Overrides;
use crate::time::wait_until;

/// How long a source may neither answer nor fail before its last good state is served.
const SILENCE_LIMIT: Duration = Duration::from_secs(10);
/// How long the first world waits for a source that is not `required`.
const OPTIONAL_SOURCE_LIMIT: Duration = Duration::from_secs(30);
/// The shortest time after which an eviction ends if no source lists the endpoint. A longer `removal_hold`
/// extends it.
const MIN_EVICTION_HOLD: Duration = Duration::from_secs(10);

/// The input of the compiler and the API.
#[derive(Debug, Clone)]
pub(crate) struct PublishedWorld {
    pub(crate) world: Arc<World>,
    /// The inputs that have neither answered nor left a last good state. If empty, the world is complete.
    pub(crate) waiting: Arc<[String]>,
}

/// An event from a node's stream.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    Report(NodeReport),
    Forget(NodeName),
}

/// The sources in the configured order.
#[derive(Debug, Clone)]
pub(crate) struct Sources(Arc<[ConfiguredSource]>);

#[derive(Debug)]
pub(crate) struct ConfiguredSource {
    pub(crate) handle: Handle,
    /// The last good state from the disk with which the source's view began.
    restored: Option<Arc<Registrations>>,
    pub(crate) is_required: bool,
    removal_hold: Duration,
    /// The first world no longer waits for this source, although it never answered.
    is_given_up: AtomicBool,
}

impl ConfiguredSource {
    pub(crate) fn new(
        handle: Handle,
        restored: Option<Arc<Registrations>>,
        is_required: bool,
        removal_hold: Duration,
    ) -> ConfiguredSource {
        ConfiguredSource { handle, restored, is_required, removal_hold, is_given_up: AtomicBool::new(false) }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.handle.name
    }

    pub(crate) fn view(&self) -> View {
        self.handle.views.borrow().clone()
    }

    fn waiting(&self, may_be_silent: bool) -> Option<String> {
        if self.is_given_up.load(Relaxed) {
            return None;
        }
        let view = self.handle.views.borrow();
        if let Some(because) = &view.unusable {
            return Some(format!("discovery source `{}` ({because})", self.name()));
        }
        let failed = view.stale_because.as_deref();
        let answered = view.last_good.is_some() && failed.is_none();
        // The restored state is used once the source has failed, or has been silent for too long.
        let silent = failed.is_none_or(|because| because == NOT_ANSWERED_YET);
        if answered || (self.restored.is_some() && !(silent && may_be_silent)) {
            return None;
        }
        Some(match failed {
            Some(because) => format!("discovery source `{}` ({because})", self.name()),
            None => format!("discovery source `{}`", self.name()),
        })
    }
}

impl ConfiguredSource {
    fn absence_message(&self) -> String {
        format!(
            "discovery source `{}` has not answered within {} s of the start, and is not `required`: its services are \
             missing until it answers",
            self.name(),
            OPTIONAL_SOURCE_LIMIT.as_secs()
        )
    }
}

impl Sources {
    pub(crate) fn new(known: Vec<ConfiguredSource>) -> Sources {
        Sources(known.into())
    }

    /// Returns the state of each source, for the API.
    pub(crate) fn status(&self) -> Vec<Source> {
        self.0
            .iter()
            .map(|known| {
                let view = known.handle.views.borrow();
                let stale_because = view.stale_because.as_ref().or(view.unusable.as_ref());
                let (state, because) = match (view.frozen, stale_because, view.held.len()) {
                    (Some(_), ..) => (State::Held, Some("it is frozen: see `vmeshctl discovery`".into())),
                    (None, Some(because), _) => (State::Stale, Some(because.clone())),
                    (None, None, 0) => (State::Fresh, None),
                    (None, None, _) => {
                        (State::Held, Some("something is held back: see `vmeshctl discovery`".into()))
                    }
                };
                let answered = known.handle.counters.last_answer();
                Source {
                    name: known.name().clone(),
                    state,
                    because,
                    age_seconds: answered.map(|at| at.elapsed().unwrap_or_default().as_secs()),
                    services: view.last_good.as_ref().map_or(0, |last_good| last_good.services.len()),
                }
            })
            .collect()
    }

    pub(crate) fn all(&self) -> &[ConfiguredSource] {
        &self.0
    }

    /// Returns the last good view of each source that has answered since the start; a restored view is on the
    /// disk already. A source that failed since is included, because its view is being served and must
    /// survive a restart. A view that was emptied by `max_stale` is not included, because the saved one is
    /// better for the next start.
    pub(crate) fn last_good(&self) -> Vec<(Arc<str>, Arc<Registrations>)> {
        let good = self.0.iter().filter_map(|known| {
            let view = known.handle.views.borrow();
            let last_good = view.last_good.clone()?;
            let is_restored = known.restored.as_ref().is_some_and(|before| Arc::ptr_eq(before, &last_good));
            let is_given_up = view.stale_because.is_some() && last_good.services.is_empty();
            // A view that may not be served now must not be restored by the next start.
            let is_unusable = view.unusable.is_some();
            (!is_restored && !is_given_up && !is_unusable).then(|| (known.name().clone(), last_good))
        });
        good.collect()
    }

    /// Reports whether the view of any source contains the endpoint.
    pub(crate) fn contains_endpoint(&self, service: &ServiceName, address: &SocketAddr) -> bool {
        self.0.iter().any(|known| {
            let view = known.handle.views.borrow();
            let service_view = view.last_good.as_ref().and_then(|last_good| last_good.services.get(service));
            service_view.is_some_and(|service_view| {
                service_view.registration.endpoints.iter().any(|endpoint| endpoint.address == *address)
            })
        })
    }

    /// Reports whether every source answers. Only then does an endpoint missing from all views mean that no
    /// source lists it.
    fn all_answer(&self) -> bool {
        self.0.iter().all(|known| {
            let view = known.handle.views.borrow();
            view.last_good.is_some() && view.stale_because.is_none()
        })
    }

    /// Returns how long an evicted endpoint must be missing from all sources before its eviction ends.
    fn eviction_hold(&self) -> Duration {
        self.0.iter().map(|known| known.removal_hold).fold(MIN_EVICTION_HOLD, Duration::max)
    }

    /// Stops waiting for the sources that are not required.
    fn give_up_waiting(&self) {
        for known in self.0.iter().filter(|known| !known.is_required) {
            let is_waited_for = {
                let view = known.handle.views.borrow();
                view.last_good.is_none() || view.unusable.is_some()
            };
            if is_waited_for {
                known.is_given_up.store(true, Relaxed);
                tracing::warn!("{}", known.absence_message());
            }
        }
    }

    fn waiting(&self, may_be_silent: bool) -> Arc<[String]> {
        self.0.iter().filter_map(|known| known.waiting(may_be_silent)).collect()
    }
}

/// Publishes a world for each change of a view, the documents, a node's report, or the overrides.
pub(crate) async fn publish(
    mut catalog: Catalog,
    sources: Sources,
    overrides: Arc<Overrides>,
    mut documents: watch::Receiver<DocumentsView>,
    mut nodes: mpsc::Receiver<NodeEvent>,
    published: watch::Sender<PublishedWorld>,
) {
    let mut views: StreamMap<usize, WatchStream<View>> = StreamMap::new();
    for (index, known) in sources.0.iter().enumerate() {
        views.insert(index, WatchStream::new(known.handle.views.clone()));
    }
    let (silence_limit, optional_limit) =
        (tokio::time::sleep(SILENCE_LIMIT), tokio::time::sleep(OPTIONAL_SOURCE_LIMIT));
    tokio::pin!(silence_limit, optional_limit);
    let (mut may_be_silent, mut waits_for_optional) = (true, true);
    let mut overridden = overrides.subscribe();
    let mut evicted = overridden.borrow_and_update().evicted.clone();
    let mut expiry = EvictionExpiry::default();
    let hold = sources.eviction_hold();
    apply_documents(&mut catalog, &documents.borrow_and_update().clone());
    loop {
        let forget_at = expiry.deadline(hold);
        tokio::select! {
            view = views.next(), if !views.is_empty() => {
                if let Some((index, view)) = view
                    && let Some(known) = sources.0.get(index)
                {
                    apply_view(&mut catalog, index, known, &view, &evicted);
                }
            }
            Ok(()) = documents.changed() => {
                let now = documents.borrow_and_update().clone();
                apply_documents(&mut catalog, &now);
            }
            event = nodes.recv() => match event {
                Some(event) => {
                    apply_node_event(&mut catalog, event);
                    // When a fleet reconnects, up to 1,000 reports are combined into one world.
                    for _ in 0..1_000 {
                        let Ok(event) = nodes.try_recv() else { break };
                        apply_node_event(&mut catalog, event);
                    }
                }
                None => return,
            },
            Ok(()) = overridden.changed() => {
                let now = overridden.borrow_and_update().evicted.clone();
                if now != evicted {
                    evicted = now;
                    apply_all_views(&mut catalog, &sources, &evicted);
                }
            }
            () = wait_until(forget_at.map(Instant::from_std)) => {}
            () = &mut silence_limit, if may_be_silent => may_be_silent = false,
            () = &mut optional_limit, if waits_for_optional => {
                waits_for_optional = false;
                sources.give_up_waiting();
                apply_all_views(&mut catalog, &sources, &evicted);
            }
        }
        end_evictions(&mut expiry, &sources, &overrides, &evicted, hold).await;
        let documents_wait = documents.borrow().waiting.clone().map(|why| why.to_string());
        let waiting = sources.waiting(may_be_silent).iter().cloned().chain(documents_wait).collect();
        published.send_if_modified(|last| {
            let is_change = !Arc::ptr_eq(&last.world, catalog.world()) || last.waiting != waiting;
            *last = PublishedWorld { world: catalog.world().clone(), waiting };
            is_change
        });
    }
}

/// Ends the evictions of endpoints that no source lists any more.
async fn end_evictions(
    expiry: &mut EvictionExpiry,
    sources: &Sources,
    overrides: &Arc<Overrides>,
    evicted: &Evictions,
    hold: Duration,
) {
    if evicted.is_empty() {
        return;
    }
    if !sources.all_answer() {
        expiry.restart();
        return;
    }
    let now = Instant::now().into_std();
    let over =
        expiry.expired(evicted, |service, address| sources.contains_endpoint(service, address), hold, now);
    for evicted in &over {
        overrides.change(|saved| saved.evicted.admit(&evicted.service, &evicted.address));
        overrides.record(
            NoticeKind::Admitted,
            evicted,
            "no source lists it any more, so its eviction has ended",
        );
    }
    if !over.is_empty()
        && let Err(error) = overrides.save().await
    {
        tracing::error!("{}", vmesh_daemon::report::one_line(&error));
    }
}

fn apply_all_views(catalog: &mut Catalog, sources: &Sources, evicted: &Evictions) {
    for (index, known) in sources.0.iter().enumerate() {
        apply_view(catalog, index, known, &known.view(), evicted);
    }
}

fn apply_view(
    catalog: &mut Catalog,
    index: usize,
    known: &ConfiguredSource,
    view: &View,
    evicted: &Evictions,
) {
    let mut problems = view.last_good.as_ref().map_or_else(Vec::new, |last_good| last_good.problems.clone());
    let mut problem = |message: String| {
        let subject = format!("discovery source `{}`", known.name());
        problems.push(Problem::new(Place::file(known.name().clone()), subject, message));
    };
    if let Some(because) = &view.stale_because
        && **because != *NOT_ANSWERED_YET
    {
        problem(because.to_string());
    }
    if let Some(because) = &view.unusable {
        problem(because.to_string());
    }
    if view.last_good.is_none() && known.is_given_up.load(Relaxed) {
        problem(known.absence_message());
    }
    let services = view
        .services()
        .map(|(name, service_view)| {
            let vmesh_discovery::ServiceView { registration, state, because, .. } = service_view;
            let registration = evicted.apply(registration);
            (name.clone(), SourceService { registration, state, because })
        })
        .collect();
    catalog.on_view(index, SourceView { services, problems });
}

fn apply_documents(catalog: &mut Catalog, view: &DocumentsView) {
    catalog.on_documents(view.documents.clone(), view.hash, view.problems.to_vec());
}

fn apply_node_event(catalog: &mut Catalog, event: NodeEvent) {
    match event {
        NodeEvent::Report(report) => _ = catalog.on_node(report),
        NodeEvent::Forget(name) => _ = catalog.forget_node(&name),
    }
}

#[cfg(test)]
mod tests {
    use vmesh_discovery::ServiceView;
    use vmesh_discovery::source::link;
    use vmesh_model::Registration;

    use super::*;

    fn registrations(service: &str) -> Arc<Registrations> {
        let service: ServiceName = service.parse().unwrap();
        let registration = Registration {
            service: service.clone(),
            protocol: None,
            port: None,
            endpoints: Arc::from([]),
            place: Place::file("test"),
        };
        let services = std::iter::once((service, ServiceView::fresh(registration.into()))).collect();
        Arc::new(Registrations { services, ..Registrations::default() })
    }

    #[test]
    fn what_was_served_is_kept_though_the_source_has_failed_since_and_what_was_kept_is_not_written_again() {
        let before = registrations("before");
        let (handle, link) = link("test".into(), View::restored(before.clone()));
        let known = ConfiguredSource::new(handle, Some(before), true, Duration::ZERO);
        let sources = Sources::new(vec![known]);
        let kept = || sources.last_good().into_iter().map(|(_, good)| good).next();
        assert_eq!(kept(), None);
        let failing = |view: &mut View| view.stale_because = Some("it does not answer".into());
        link.views.send_modify(failing);
        assert_eq!(kept(), None);
        // The source answers, and fails before the answer is written.
        let now = registrations("now");
        link.views.send_replace(View { last_good: Some(now.clone()), ..View::default() });
        link.views.send_modify(failing);
        assert_eq!(kept(), Some(now));
        // A view emptied by `max_stale` does not replace the saved one, which is the best state for the next
        // start.
        link.views.send_modify(|view| view.last_good = Some(Arc::default()));
        assert_eq!(kept(), None);
    }
}
