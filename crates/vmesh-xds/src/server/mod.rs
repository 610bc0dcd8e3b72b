//! The driver of [`Session`](crate::Session)s: ADS over HTTP/2, on TCP or a Unix socket.
//!
//! | part                | responsibility                                                                               |
//! |---------------------|----------------------------------------------------------------------------------------------|
//! | [`Hub`]             | the latest store of each class of clients, and the streams that see a changed group          |
//! | [`AdsService`]      | one session per request, inside the response's body: no task, no channel, no second encoding |
//! | [`serve_connections`] | the connections of one listener, with limits for their number and age                      |
//!
//! An [`Admission`] decides which clients are served and what each of them sees.

mod authority;
mod body;
mod connection;
mod hub;
mod serve;
mod service;

pub use body::AdsBody;
pub use hub::{Feed, FeedControl, Hub, Publication};
pub use serve::{
    ConnectionLimits, Handshake, Listener, NoHandshake, serve, serve_after_handshake, serve_connection,
    serve_connections,
};
pub use service::{Admission, Admitted, AdsService, Counters, Observer, OtherRequests, PeerInfo, Refusal};
