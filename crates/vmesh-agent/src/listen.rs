//! Binds ports that any user of the host could have taken first. The agent runs without a port that is taken, logs that, and retries: no
//! local user can keep the agent from serving Envoy.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};
use vmesh_daemon::Stop;

/// Pause between attempts to bind an address that another program uses.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The status of one listening address of the agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ListenStatus {
    pub address: SocketAddr,
    pub bound: bool,
    /// The reason why the socket is not bound.
    pub reason: Option<String>,
}

impl ListenStatus {
    /// Returns the status of an address before the first attempt to bind it.
    pub fn at(address: SocketAddr) -> ListenStatus {
        ListenStatus { address, bound: false, reason: None }
    }

    pub(crate) fn set_bound(&mut self) {
        (self.bound, self.reason) = (true, None);
    }
}

/// Calls `bind` until it succeeds, and returns its result. Returns `None` when the daemon is told to stop. `purpose` is for the log.
pub(crate) async fn keep_trying<T, Bound: Future<Output = io::Result<T>>>(
    purpose: &str,
    bind: impl Fn() -> Bound,
    listening: &watch::Sender<ListenStatus>,
    stop: &mut Stop,
) -> Option<T> {
    let address = listening.borrow().address;
    loop {
        match bind().await {
            Ok(bound) => {
                if listening.borrow().reason.is_some() {
                    info!("{address} is free now: listening on it for {purpose}");
                }
                listening.send_modify(ListenStatus::set_bound);
                return Some(bound);
            }
            Err(error) => {
                let reason = error.to_string();
                if listening.borrow().reason.as_ref() != Some(&reason) {
                    warn!(
                        "could not listen on {address} for {purpose}: {reason}; the agent goes on without it and tries again \
                         each second. If another program has it (`ss -lntup 'sport = :{}'`), stop that, or choose another port",
                        address.port()
                    );
                }
                listening.send_modify(|listening| listening.reason = Some(reason));
            }
        }
        tokio::select! {
            () = sleep(TRY_AGAIN) => {}
            () = stop.requested() => return None,
        }
    }
}
