//! The driver of [`Session`](crate::Session)s: ADS over HTTP/2, on TCP or a Unix socket.
//!
//! | part           | what it owns                                                                                 |
//! |----------------|----------------------------------------------------------------------------------------------|
//! | [`Hub`]        | the latest store of each class of clients, and which streams a changed group concerns        |
//! | [`AdsService`] | one session per request, inside the response's body: no task, no channel, no second encoding |
//! | [`serve_bounded`] | the connections of one listener, how many there may be and for how long                   |
//!
//! Whoever may connect, and what it sees, is the business of an [`Admission`].

mod authority;
mod body;
mod connection;
mod hub;
mod serve;
mod service;

pub use body::AdsBody;
pub use hub::{Feed, FeedControl, Hub, Publication};
pub use serve::{Bounded, Listener, serve, serve_bounded, serve_connection};
pub use service::{Admission, Admitted, AdsService, Counters, Observer, PeerInfo, Refusal};
