//! The privileged part of a vmesh node: it installs and maintains the rules that send connections through
//! Envoy.
//!
//! ```text
//! agent --(a spec, "I am well", "the trial works")--> net.sock --> Keeper --(Event)--> vmesh_capture's Machine
//!                                                          executor <--(Action)--'
//!                                                             '--> Applier --> the kernel
//! ```
//!
//! | module | contents |
//! |---|---|
//! | [`protocol`] | the requests and responses on the socket, one line of JSON each |
//! | [`client`] | [`client::Client`]: the client side of the socket, for the agent and `vmeshctl` |
//! | [`keeper`] | [`keeper::Keeper`]: passes events to [`vmesh_capture::machine`] and has its actions performed |
//! | `executor` | performs the actions with tools, disk, `/proc` and Envoy |
//! | [`heartbeat`] | [`heartbeat::HeartbeatTask`]: the heartbeat, which renews the dead-man timer of each direction |
//! | [`status`] | [`status::StatusSource`]: builds the status that clients ask for |
//! | [`probe`] | tests whether Envoy accepts connections, and whether capture works from end to end |
//! | [`cgroups`] | waits for the kernel to report new control groups, that is, started units |
//! | [`rules`] | waits for the kernel to report changes of rules, and who made them |
//! | [`server`] | the socket, and the permissions of its clients |
//!
//! | task | thread | wakes on | publishes |
//! |---|---|---|---|
//! | `keeper` | its own | requests, a tick each second, changes of rules | [`status::KeeperReport`], [`heartbeat::InstalledTimers`] |
//! | `dead-man` | main | a tick each second, new rules, a question whether Envoy is gone | [`heartbeat::TimerStates`] |
//! | `envoy probe` | main | a tick each second while something is captured | [`probe::ProbeResults`] |
//! | `control groups` | main | inotify events | started units, to `keeper` |
//! | `rules` | main | netlink messages | changes of rules, to `keeper` |
//! | `socket` | main | connections | requests, to `keeper` and `dead-man` |
//!
//! Nothing on the main thread waits for a disk or reads all of `/proc`. So neither a full disk, nor a slow
//! one, nor a thousand clients can make redirects lapse.
//!
//! vmesh-net accepts a [`vmesh_capture::Spec`], never rules, and it finds out by itself what must never be
//! captured. It reads no configuration file and opens no port. It takes orders from the agent's user and from
//! root; other local users who can reach the socket may only read the status.
//!
//! **Who dies, and what happens to the rules.** If the agent or Envoy dies, the dead-man timer is no longer
//! renewed, and redirects that may fail open lapse; if Envoy is seen to be gone, they lapse at once. If
//! vmesh-net dies, the kernel's clock lets them lapse. If vmesh-net is told to stop, it captures nothing new,
//! lets redirected connections drain, and removes its rules.

pub mod cgroups;
pub mod client;
mod executor;
pub mod heartbeat;
pub mod keeper;
mod owner;
pub mod probe;
pub mod protocol;
pub mod rules;
pub mod server;
mod state_file;
pub mod status;

/// The default path of the socket.
pub const SOCKET: &str = "/run/vmesh-net/net.sock";
/// The default directory of the state and of the bypass flag.
pub const STATE_DIR: &str = "/var/lib/vmesh-net";
