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
//! | `mtls xds` | connections to `listen.xds` | the same, to nodes that proved their identity; certificates |
//! | `own certificate` | a timer, a new authority | the certificate that `listen.xds` shows |
//! | `audit` | events | the audit log |
//! | `bans` | a ban | the end of the node's streams |
//! | `xds` | connections | xDS responses; drains its clients at the end |
//! | `api`, `api socket` | connections | HTTP responses, each listener on a thread of its own |
//! | `forget nodes` | a timer | the removal of nodes that have been offline for too long |

mod api;
mod audit;
mod claim;
mod compilation;
mod config;
mod control;
mod discovery;
mod documents;
mod explain;
mod fleet;
mod identity;
mod known_nodes;
mod metrics;
mod overrides;
mod persist;
mod run;
mod streamed;
mod time;
mod worlds;

pub use run::main;
