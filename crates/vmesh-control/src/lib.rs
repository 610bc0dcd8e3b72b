//! The control plane: discovery and documents in, xDS out. Start reading at [`run`].
//!
//! | task | wakes on | publishes |
//! |---|---|---|
//! | `discovery <source>` | the source, the operator | `watch<View>` |
//! | `documents` | the directory, a timer | `watch<DocumentsView>` |
//! | `worlds` | any view, the documents, a node's report, an eviction | `watch<Published>` |
//! | `compiler` | `watch<Published>`, nodes that come and go | a store per view of nodes, to the hub, and `watch<Compilation>` |
//! | `state` | `watch<Published>`, debounced | the last good state on disk |
//! | `xds` | connections | responses; takes leave of its clients |
//! | `api`, `api socket` | connections | answers, on a thread of their own |
//! | `forget nodes` | a timer | that a node which has been offline for too long is forgotten |

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
mod worlds;

pub use run::main;
