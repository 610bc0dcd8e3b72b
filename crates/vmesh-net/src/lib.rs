//! The one part of vmesh with privileges on a host: it keeps the rules that send connections through Envoy.
//!
//! ```text
//! agent --(a typed spec, "I am well", "it works")--> net.sock --> Keeper: Event -> vmesh_capture's Machine -> Action --> executor
//!                                                                                                       --> Applier --> the kernel
//! ```
//!
//! | module | what is in it |
//! |---|---|
//! | [`protocol`] | what is asked and answered on the socket: one line of JSON each |
//! | [`client`] | [`client::Client`]: the other end, for the agent and `vmeshctl` |
//! | [`keeper`] | [`keeper::Keeper`]: gives events to [`vmesh_capture::machine`], which decides, and has its actions done |
//! | `executor` | does them: tools, disk, `/proc`, Envoy |
//! | [`pulse`] | [`pulse::Pulse`]: holds the dead-man off, one for each direction |
//! | [`board`] | [`board::StatusSource`]: what is answered to whoever asks how things are |
//! | [`probe`] | whether Envoy takes connections, whether a capture works from end to end |
//! | [`cgroups`] | that units have started, told by the kernel |
//! | [`rules`] | who changed the host's rules, told by the kernel |
//! | [`server`] | the socket: who may ask what |
//!
//! | task | thread | wakes on | publishes |
//! |---|---|---|---|
//! | `keeper` | its own | what is asked, a second's tick, a change of rules | [`board::Board`], [`pulse::Order`] |
//! | `dead-man` | main | a second's tick, an order, a question whether Envoy is gone | [`pulse::Heartbeat`] |
//! | `envoy probe` | main | a second's tick, while something is captured | [`probe::Verdicts`] |
//! | `control groups` | main | the kernel's notices | that units have started, to `keeper` |
//! | `rules` | main | the kernel's notices | who changed rules |
//! | `socket` | main | connections | what is asked, to `keeper` and `dead-man` |
//!
//! Nothing on the main thread waits for a disk or walks through `/proc`: a full disk, a slow one or a thousand who ask let no
//! redirect lapse.
//!
//! It takes no rules, only a [`vmesh_capture::Spec`]; what may never be captured it finds out itself. It reads no configuration,
//! opens no port, and does what the agent's user and root say; others who get to the socket may look.
//!
//! **Who dies, and what becomes of the rules.** The agent or Envoy: nobody refreshes the dead-man, and what may fail open lapses;
//! an Envoy that is seen to be gone is not waited for. This process: the same, by the kernel's clock. Told to stop, it captures
//! nothing new, waits for the connections that go through redirects, and leaves the host as it was.

pub mod board;
pub mod cgroups;
pub mod client;
mod executor;
pub mod keeper;
mod kept;
mod owner;
pub mod probe;
pub mod protocol;
pub mod pulse;
pub mod rules;
pub mod server;

/// Where the socket is.
pub const SOCKET: &str = "/run/vmesh-net/net.sock";
/// Where the state and the flag of the bypass are.
pub const STATE_DIR: &str = "/var/lib/vmesh-net";
