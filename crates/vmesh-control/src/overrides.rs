//! What the operator has said of discovery and what outranks every source: frozen sources, evicted endpoints. It is
//! kept on the disk beside the last good state, and holds over a restart.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use vmesh_discovery::Registrations;
use vmesh_discovery::guard::{Evicted, Evictions, Notice, What};
use vmesh_discovery::source::Events;

use crate::persist::{Disk, PersistError};

/// The name of its part of the state.
pub(crate) const PART: &str = "overrides";

/// As it is kept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Kept {
    /// By source, since when; in seconds of Unix time.
    pub(crate) frozen: BTreeMap<Arc<str>, u64>,
    pub(crate) evicted: Evictions,
}

impl Kept {
    pub(crate) fn frozen_since(&self, source: &str) -> Option<SystemTime> {
        self.frozen.get(source).map(|since| UNIX_EPOCH + Duration::from_secs(*since))
    }
}

/// Shared by the API, which changes it, and the worlds, which obey it.
#[derive(Debug)]
pub(crate) struct Overrides {
    kept: watch::Sender<Kept>,
    disk: Disk,
    /// Held while it is written, so that the last word is what stays on the disk.
    saving: Mutex<()>,
    /// What happened that concerns no single source.
    pub(crate) events: Events,
}

impl Overrides {
    pub(crate) fn new(kept: Kept, disk: Disk) -> Arc<Overrides> {
        let kept = watch::Sender::new(kept);
        Arc::new(Overrides { kept, disk, saving: Mutex::default(), events: Events::default() })
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Kept> {
        self.kept.subscribe()
    }

    pub(crate) fn kept(&self) -> Kept {
        self.kept.borrow().clone()
    }

    /// Changes what holds from now on, if `change` says that it did. [`Overrides::save`] makes it last.
    pub(crate) fn change(&self, change: impl FnOnce(&mut Kept) -> bool) -> bool {
        self.kept.send_if_modified(change)
    }

    /// Writes what holds now to the disk, and waits until that is done.
    pub(crate) async fn save(self: &Arc<Self>) -> Result<(), PersistError> {
        let this = self.clone();
        let saved = tokio::task::spawn_blocking(move || {
            let _one_at_a_time = this.saving.lock().unwrap_or_else(PoisonError::into_inner);
            this.disk.save(PART, &this.kept())
        });
        // It is only cancelled when the process ends, which waits for nothing.
        saved.await.unwrap_or(Ok(()))
    }

    /// Writes what is known of a source that is frozen: what was frozen is what comes back after a restart, and the state
    /// is else written a moment after a change.
    pub(crate) async fn save_frozen(
        self: &Arc<Self>,
        source: &str,
        last_good: Arc<Registrations>,
    ) -> Result<(), PersistError> {
        let (this, source) = (self.clone(), source.to_owned());
        let saved = tokio::task::spawn_blocking(move || this.disk.save_source(&source, &last_good));
        saved.await.unwrap_or(Ok(()))
    }

    /// Remembers and logs what became of an endpoint.
    pub(crate) fn tell(&self, what: What, evicted: &Evicted, why: &str) {
        let Evicted { service, address, .. } = evicted;
        let text = format!("{address}: {why}").into();
        let notice = Notice { what, service: Some(service.clone()), kind: None, text };
        for event in self.events.record(vec![notice], SystemTime::now()) {
            tracing::warn!("service `{service}`: {}: {}", event.what.as_str(), event.text);
        }
    }
}

/// Now, in seconds of Unix time.
pub(crate) fn unix_now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
