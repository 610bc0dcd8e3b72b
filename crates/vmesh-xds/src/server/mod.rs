//! The driver of [`Session`](crate::Session)s: ADS over HTTP/2, on TCP or a Unix socket.
//!
//! | part           | what it owns                                                                                 |
//! |----------------|----------------------------------------------------------------------------------------------|
//! | [`Hub`]        | the latest store of each class of clients, and which streams a changed group concerns        |
//! | [`AdsService`] | one session per request, inside the response's body: no task, no channel, no second encoding |
//! | [`serve`]      | the connections of one listener                                                              |
//!
//! Whoever may connect, and what it sees, is the business of an [`Admission`].

mod body;
mod hub;
mod serve;
mod service;

pub use body::AdsBody;
pub use hub::{Feed, FeedControl, Hub, Publication};
pub use serve::{Listener, serve, serve_connection};
pub use service::{Admission, Admitted, AdsService, Counters, Observer, PeerInfo, Refusal};
