//! The operator's overrides, which take precedence over every source: frozen sources and evicted endpoints.
//! They are saved in the state directory and survive a restart.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use vmesh_discovery::Registrations;
use vmesh_discovery::guard::{Eviction, Evictions, Notice, NoticeKind};
use vmesh_discovery::source::Events;

use crate::persist::{Disk, PersistError};

/// The name of the overrides' state file.
pub(crate) const PART: &str = "overrides";

/// The overrides in the form in which they are saved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct SavedOverrides {
    /// The Unix time, in seconds, since which each source is frozen.
    pub(crate) frozen: BTreeMap<Arc<str>, u64>,
    pub(crate) evicted: Evictions,
}

impl SavedOverrides {
    pub(crate) fn frozen_since(&self, source: &str) -> Option<SystemTime> {
        self.frozen.get(source).map(|since| UNIX_EPOCH + Duration::from_secs(*since))
    }
}

/// The overrides in force. The API changes them, and the `worlds` task applies them.
#[derive(Debug)]
pub(crate) struct Overrides {
    current: watch::Sender<SavedOverrides>,
    disk: Disk,
    /// Held while the overrides are written, so that the latest ones stay on the disk.
    saving: Mutex<()>,
    /// The events that concern no single source.
    pub(crate) events: Events,
}

impl Overrides {
    pub(crate) fn new(saved: SavedOverrides, disk: Disk) -> Arc<Overrides> {
        let current = watch::Sender::new(saved);
        Arc::new(Overrides { current, disk, saving: Mutex::default(), events: Events::default() })
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<SavedOverrides> {
        self.current.subscribe()
    }

    pub(crate) fn current(&self) -> SavedOverrides {
        self.current.borrow().clone()
    }

    /// Changes the overrides at once; `change` returns whether it changed anything. [`Overrides::save`]
    /// persists them.
    pub(crate) fn change(&self, change: impl FnOnce(&mut SavedOverrides) -> bool) -> bool {
        self.current.send_if_modified(change)
    }

    /// Writes the overrides to the disk, and waits until they are synced.
    pub(crate) async fn save(self: &Arc<Self>) -> Result<(), PersistError> {
        let this = self.clone();
        let saved = tokio::task::spawn_blocking(move || {
            let _one_at_a_time = this.saving.lock().unwrap_or_else(PoisonError::into_inner);
            this.disk.save(PART, &this.current())
        });
        // The blocking task is cancelled only when the process ends.
        saved.await.unwrap_or(Ok(()))
    }

    /// Writes the view of a source at the moment it was frozen, so that a restart restores exactly this view.
    /// The debounced write of the state could come too late.
    pub(crate) async fn save_frozen(
        self: &Arc<Self>,
        source: &str,
        last_good: Arc<Registrations>,
    ) -> Result<(), PersistError> {
        let (this, source) = (self.clone(), source.to_owned());
        let saved = tokio::task::spawn_blocking(move || this.disk.save_source(&source, &last_good));
        saved.await.unwrap_or(Ok(()))
    }

    /// Records and logs what happened to an endpoint.
    pub(crate) fn record(&self, kind: NoticeKind, evicted: &Eviction, why: &str) {
        let Eviction { service, address, .. } = evicted;
        let text = format!("{address}: {why}").into();
        let notice = Notice { kind, service: Some(service.clone()), hold: None, text };
        for event in self.events.record(vec![notice], SystemTime::now()) {
            tracing::warn!("service `{service}`: {}: {}", event.kind.as_str(), event.text);
        }
    }
}
