//! [`Registrations`]: the services of one source, each with how far its report can be trusted.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmesh_model::{Problem, Registration, ServiceName, State};

use crate::resolve::UnresolvedNames;

/// The complete view of one source. A service that did not change since the previous view keeps its pointer.
///
/// Each service has its own outcome: it is present with endpoints; it is present without endpoints, possibly
/// on purpose ([`ServiceView::empty_on_purpose`]); it is absent, possibly on purpose ([`Registrations::emptied`]);
/// or it could not be read, and then its last good state is present and marked [`State::Stale`]. A source
/// that cannot be read at all, or that seems to have lost its content, gives a [`SourceError`](crate::SourceError) instead of a
/// view.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registrations {
    pub services: BTreeMap<ServiceName, ServiceView>,
    pub problems: Vec<Problem>,
    /// Services that are absent because the source states explicitly that they have nothing.
    #[serde(skip)]
    pub emptied: BTreeSet<ServiceName>,
    /// Parts of the source (files, directories, services, host names) that could not be read and have no last
    /// good state, each with the reason. A view with such parts must not be the first view that is served: it
    /// would remove services that other replicas still serve.
    #[serde(skip)]
    pub unusable: Vec<Arc<str>>,
    /// Records that were read and left out, because they are invalid or their service name is, and that have
    /// no last good state, each with the reason. Such a record delays the first view only if the source has
    /// no usable record at all.
    #[serde(skip)]
    pub left_out: Vec<Arc<str>>,
    /// Host names of endpoints that do not resolve at present.
    #[serde(skip)]
    pub unresolved: UnresolvedNames,
}

/// One service as one source reports it, with how far the report can be trusted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ServiceView {
    pub registration: Arc<Registration>,
    #[serde(default)]
    pub state: State,
    /// The reason why the service is not fresh, in words for an operator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub because: Option<Arc<str>>,
    /// The service has no endpoints, and the source states this explicitly, for example with `endpoints: []`.
    #[serde(default)]
    pub empty_on_purpose: bool,
    /// The extent of the service that this view covers.
    #[serde(skip)]
    pub extent: Extent,
}

/// The extent of a service that its source reports at present.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Extent {
    /// The source reports the complete service.
    #[default]
    Whole,
    /// The endpoints in this view are right, but the source may have more that cannot be read. A missing
    /// endpoint must not be taken for removed.
    Part,
    /// Nothing the source reports at present is usable; this view holds the last good state.
    Nothing,
}

impl ServiceView {
    pub fn fresh(registration: Arc<Registration>) -> ServiceView {
        ServiceView {
            registration,
            state: State::Fresh,
            because: None,
            empty_on_purpose: false,
            extent: Extent::Whole,
        }
    }

    pub fn stale(registration: Arc<Registration>, because: impl Into<Arc<str>>) -> ServiceView {
        ServiceView { state: State::Stale, because: Some(because.into()), ..ServiceView::fresh(registration) }
    }
}
