//! Discovery sources, and what keeps a dead or a confused one from emptying the mesh.
//!
//! | module | what is in it |
//! |---|---|
//! | [`source`] | trait [`Source`]: whole views, never deltas; [`follow`], which keeps the last good one |
//! | [`guard`] | [`Guard`]: whether to believe a source that says less than it did |
//! | [`format`](mod@format) | what files say: pure parsers, from text to services |

pub mod format;
pub mod guard;
pub mod source;

pub use guard::{Guard, GuardConfig};
pub use source::{Registrations, Seen, Source, SourceError, State, View, follow};
