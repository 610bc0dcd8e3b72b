//! What one discovery source says of one service.

use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::{Endpoint, Place, Protocol, ServiceName};

/// One service as one source sees it: always all of its endpoints, never a change to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Registration {
    pub service: ServiceName,
    /// What the source says is spoken; a `Service` document outranks it, and without either it is TCP.
    pub protocol: Option<Protocol>,
    /// What clients dial in transparent mode, if it is not the endpoints' port.
    pub port: Option<u16>,
    /// Sorted by address, no two with the same one.
    pub endpoints: Arc<[Endpoint]>,
    /// Where the source says so.
    pub place: Place,
}

/// How far a service's endpoints can be trusted to be those of now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    #[default]
    Fresh,
    /// A source could not be read; this is the last that it said.
    Stale,
    /// A source says something else, which is suspicious and not believed yet.
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
