//! The xDS v3 protocol, without I/O: it moves (type, name, version, bytes) and knows no noun of the mesh.
//!
//! ```text
//! Resource -> Group -> Store --(Scope)--> Snapshot -> Session -> Response     a server's end of one stream
//!                        ^                               |
//!                        └──────────── Relay <───────────┘                    between the two, on every node
//!                                        |
//!                                    Subscriber                               a client's end of one stream
//! ```
//!
//! - [`Resource`]: encoded once, when it is made; every stream sends the same bytes.
//! - [`Group`], [`Store`]: what comes and goes together, and all of it at one moment; a change shares the rest.
//! - [`Scope`], [`Snapshot`]: what one client may see.
//! - [`Session`]: a server's end of one stream. [`Subscriber`]: a client's.
//! - [`Relay`]: a subscriber above, sessions below, and what the client below accepted.
//!
//! **Invariant:** no socket, no task, no clock: time is an argument, and `cargo tree -p vmesh-xds -e normal` lists no
//! `tokio`. The drivers that have them are behind the features `server` and `client`.
//!
//! Rule numbers (R25) are those of `reference/xds-rules.md`.

mod glance;
#[cfg(any(feature = "client", feature = "server"))]
mod grpc;
mod kind;
mod relay;
mod resource;
mod session;
mod snapshot;
mod store;
mod subscriber;

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;

pub use glance::Glance;
#[cfg(any(feature = "client", feature = "server"))]
pub use grpc::Failure;
pub use kind::{Kind, PerKind};
pub use relay::{CheckLocal, ClientId, Relay};
pub use resource::{Resource, encodings};
pub use session::{
    Bounds, Event, KindStatus, Protocol, Rejection, Request, Response, Session, SessionError, SessionStatus,
    State,
};
pub use snapshot::{Groups, Scope, Snapshot};
pub use store::{Group, Store};
pub use subscriber::{Subscriber, Ticket, Update};
