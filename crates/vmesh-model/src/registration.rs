//! One service as one discovery source lists it.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Endpoint, Place, Protocol, ServiceName};

/// One service in the listing of one source. It always contains the complete set of endpoints, never a difference.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    pub service: ServiceName,
    /// The protocol according to the source. A `Service` document takes precedence; without either it is TCP.
    pub protocol: Option<Protocol>,
    /// The port at the service's virtual address, if it differs from the port of the endpoints.
    pub port: Option<u16>,
    /// Sorted by address, without duplicates.
    pub endpoints: Arc<[Endpoint]>,
    /// The place of the entry in the source.
    pub place: Place,
}

/// The degree to which the endpoints of a service are known to be current.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    #[default]
    Fresh,
    /// The source cannot be read; these are its last endpoints.
    Stale,
    /// The source lists other endpoints, but the change is suspicious and not accepted yet.
    Held,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            State::Fresh => "fresh",
            State::Stale => "stale",
            State::Held => "held",
        })
    }
}
