//! The control plane: reads discovery sources and documents, compiles them, and serves xDS. Start reading at
//! [`run`].
//!
//! | task | wakes on | publishes |
//! |---|---|---|
//! | `discovery <source>` | the source, an operator's command | `watch<View>` |
//! | `documents` | the directory or registry, a timer | `watch<DocumentsView>` |
//! | `worlds` | any view, the documents, a node's report, an eviction | `watch<PublishedWorld>` |
//! | `compiler` | `watch<PublishedWorld>`, nodes that connect and disconnect | a store per class of nodes, to the hub, and `watch<Compilation>` |
//! | `state` | `watch<PublishedWorld>`, debounced | the last good state on disk |
//! | `xds` | connections | xDS responses; drains its clients at the end |
//! | `api`, `api socket` | connections | HTTP responses, each listener on a thread of its own |
//! | `forget nodes` | a timer | the removal of nodes that have been offline for too long |

mod api;
mod claim;
mod compilation;
mod config;
mod control;
mod discovery;
mod documents;
mod explain;
mod fleet;
mod known_nodes;
mod metrics;
mod overrides;
mod persist;
mod run;
mod streamed;
mod time;
mod worlds;

pub use run::main;
