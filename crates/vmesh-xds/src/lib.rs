//! The xDS v3 protocol, without I/O: it moves (type, name, version, bytes) and knows no noun of the mesh.
//!
//! ```text
//! Resource -> Group -> Store --(Scope)--> Snapshot -> Session -> Response     the server's end of one stream
//!                        ^                               |
//!                        └──────────── Relay <───────────┘                    both ends, in the agent of every node
//!                                        |
//!                                    Subscriber                               the client's end of one stream
//! ```
//!
//! - [`Resource`]: one named xDS resource, encoded once when it is made; every stream sends the same bytes.
//! - [`Group`], [`Store`]: the resources that are set and removed together (such as those of one service), and
//!   all groups at one moment. A new store shares every unchanged group with the store that it was made from.
//! - [`Scope`], [`Snapshot`]: which groups of a store one client may see, and the store seen through that
//!   scope.
//! - [`Session`]: the protocol state of a server for one stream. [`Subscriber`]: the protocol state of a
//!   client.
//! - [`Relay`]: a subscriber towards the control plane, a store for the sessions towards Envoy, and the record
//!   of what Envoy accepted.
//!
//! **Invariant:** no socket, no task, no clock: time is an argument, and `cargo tree -p vmesh-xds -e normal`
//! lists no `tokio`. The drivers that need these are behind the features `server` and `client`.
//!
//! Rule numbers (R25) refer to `RULES.md` in this crate's folder; tests carry them in their names (`r25_..`).

#[cfg(any(feature = "client", feature = "server"))]
mod grpc;
mod kind;
mod relay;
mod resource;
mod session;
mod snapshot;
mod store;
mod subscriber;
mod summary;

#[cfg(feature = "client")]
pub mod client;
#[cfg(feature = "server")]
pub mod server;

#[cfg(any(feature = "client", feature = "server"))]
pub use grpc::Failure;
pub use kind::{Kind, PerKind, second_assignment};
pub use relay::{CheckLocal, ClientId, Relay};
pub use resource::{Resource, encodings};
pub use session::{
    Bounds, Event, KindStatus, Protocol, Rejection, Request, Response, Session, SessionError, SessionStatus,
    State,
};
pub use snapshot::{Groups, Scope, Snapshot};
pub use store::{Group, Store};
pub use subscriber::{Subscriber, Ticket, Update};
pub use summary::ResponseSummary;
