//! From views, documents and reports to worlds: the task that owns the [`Catalog`].

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{mpsc, watch};
use tokio_stream::StreamExt;
use tokio_stream::StreamMap;
use tokio_stream::wrappers::WatchStream;
use vmesh_api::Source;
use vmesh_catalog::{Catalog, Seen, SourceView, World};
use vmesh_discovery::View;
use vmesh_model::State;
use vmesh_model::{NodeName, NodeReport, Place, Problem};

use crate::documents::DocumentsView;

/// How long a source may stay silent, neither answering nor failing, before what it said last is served.
const PATIENCE: Duration = Duration::from_secs(10);

/// What the compiler and the API read.
#[derive(Debug, Clone)]
pub(crate) struct Published {
    pub(crate) world: Arc<World>,
    /// The sources that have neither answered nor left a last good state; empty is complete.
    pub(crate) waiting: Arc<[String]>,
}

/// What a node's stream tells.
#[derive(Debug)]
pub(crate) enum NodeEvent {
    Report(NodeReport),
    Forget(NodeName),
}

/// The sources by their names, in the configured order, and what was known of each before the start.
#[derive(Debug, Clone)]
pub(crate) struct Sources(Arc<[Known]>);

#[derive(Debug)]
pub(crate) struct Known {
    pub(crate) name: Arc<str>,
    pub(crate) view: watch::Receiver<View>,
    /// Whether `view` began with a last good state from the disk.
    pub(crate) restored: bool,
    answered: Mutex<Option<Instant>>,
}

impl Known {
    pub(crate) fn new(name: Arc<str>, view: watch::Receiver<View>, restored: bool) -> Known {
        Known { name, view, restored, answered: Mutex::default() }
    }

    fn waiting(&self, patient: bool) -> Option<String> {
        let view = self.view.borrow();
        let failed = view.stale_because.as_deref();
        let answered = view.last_good.is_some() && failed.is_none();
        // A state from before holds once the source has shown that it will not answer.
        let silent = failed.is_none_or(|because| because == vmesh_discovery::source::NOT_ANSWERED_YET);
        if answered || (self.restored && !(silent && patient)) {
            return None;
        }
        Some(match failed {
            Some(because) => format!("discovery source `{}` ({because})", self.name),
            None => format!("discovery source `{}`", self.name),
        })
    }
}

impl Sources {
    pub(crate) fn new(known: Vec<Known>) -> Sources {
        Sources(known.into())
    }

    /// For the API.
    pub(crate) fn status(&self) -> Vec<Source> {
        self.0
            .iter()
            .map(|known| {
                let view = known.view.borrow();
                let state = match (&view.stale_because, view.held) {
                    (Some(_), _) => State::Stale,
                    (None, 0) => State::Fresh,
                    (None, _) => State::Held,
                };
                let because = match view.held {
                    0 => view.stale_because.clone(),
                    held => Some(format!("{held} services are held back: see `vmeshctl services`").into()),
                };
                let answered = *known.answered.lock().unwrap_or_else(PoisonError::into_inner);
                Source {
                    name: known.name.clone(),
                    state,
                    because,
                    age_seconds: answered.map(|at| at.elapsed().as_secs()),
                    services: view.last_good.as_ref().map_or(0, |last_good| last_good.services.len()),
                }
            })
            .collect()
    }

    /// What each source last said that was good and that it has said itself: what was restored is on the disk already.
    pub(crate) fn last_good(&self) -> Vec<(Arc<str>, Arc<vmesh_discovery::Registrations>)> {
        let good = self.0.iter().filter_map(|known| {
            let view = known.view.borrow();
            let last_good = view.last_good.clone().filter(|_| view.stale_because.is_none())?;
            Some((known.name.clone(), last_good))
        });
        good.collect()
    }

    fn answered(&self, index: usize) {
        if let Some(known) = self.0.get(index) {
            *known.answered.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
        }
    }

    fn waiting(&self, patient: bool) -> Arc<[String]> {
        self.0.iter().filter_map(|known| known.waiting(patient)).collect()
    }
}

/// Publishes a world for each change of a view, the documents, or what nodes report.
pub(crate) async fn publish(
    mut catalog: Catalog,
    sources: Sources,
    mut documents: watch::Receiver<DocumentsView>,
    mut nodes: mpsc::UnboundedReceiver<NodeEvent>,
    published: watch::Sender<Published>,
) {
    let mut views: StreamMap<usize, WatchStream<View>> = StreamMap::new();
    for (index, known) in sources.0.iter().enumerate() {
        views.insert(index, WatchStream::new(known.view.clone()));
    }
    let patience = tokio::time::sleep(PATIENCE);
    tokio::pin!(patience);
    let mut patient = true;
    take_documents(&mut catalog, &documents.borrow_and_update().clone());
    loop {
        tokio::select! {
            view = views.next(), if !views.is_empty() => {
                if let Some((index, view)) = view {
                    take_view(&mut catalog, &sources, index, &view);
                }
            }
            Ok(()) = documents.changed() => {
                let now = documents.borrow_and_update().clone();
                take_documents(&mut catalog, &now);
            }
            event = nodes.recv() => match event {
                Some(event) => {
                    take_node(&mut catalog, event);
                    // A fleet that reconnects reports all at once: one world for as many as there are.
                    for _ in 0..1_000 {
                        let Ok(event) = nodes.try_recv() else { break };
                        take_node(&mut catalog, event);
                    }
                }
                None => return,
            },
            () = &mut patience, if patient => patient = false,
        }
        let waiting = sources.waiting(patient);
        published.send_if_modified(|last| {
            let is_news = !Arc::ptr_eq(&last.world, catalog.world()) || last.waiting != waiting;
            *last = Published { world: catalog.world().clone(), waiting };
            is_news
        });
    }
}

fn take_view(catalog: &mut Catalog, sources: &Sources, index: usize, view: &View) {
    if view.last_good.is_some() && view.stale_because.is_none() {
        sources.answered(index);
    }
    let mut problems = view.last_good.as_ref().map_or_else(Vec::new, |last_good| last_good.problems.clone());
    if let (Some(because), Some(known)) = (&view.stale_because, sources.0.get(index))
        && **because != *vmesh_discovery::source::NOT_ANSWERED_YET
    {
        let subject = format!("discovery source `{}`", known.name);
        problems.push(Problem::new(Place::file(known.name.clone()), subject, because.to_string()));
    }
    let services = view
        .services()
        .map(|(name, seen)| {
            let vmesh_discovery::Seen { registration, state, because, .. } = seen;
            (name.clone(), Seen { registration, state, because })
        })
        .collect();
    catalog.on_view(index, SourceView { services, problems });
}

fn take_documents(catalog: &mut Catalog, view: &DocumentsView) {
    catalog.on_documents(view.documents.clone(), view.hash, view.problems.to_vec());
}

fn take_node(catalog: &mut Catalog, event: NodeEvent) {
    match event {
        NodeEvent::Report(report) => _ = catalog.on_node(report),
        NodeEvent::Forget(name) => _ = catalog.forget_node(&name),
    }
}
