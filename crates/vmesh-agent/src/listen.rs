//! Ports that any user of the host could take before the agent does. The agent runs without a port that is taken, logs that, and
//! retries: no other program may keep the agent from feeding Envoy.

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::{info, warn};
use vmesh_daemon::Stop;

/// Pause between two attempts to bind an address that another program has.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// Whether the agent listens where its configuration says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Listening {
    pub address: SocketAddr,
    pub bound: bool,
    /// Why it does not.
    pub reason: Option<String>,
}

impl Listening {
    /// Nothing is bound yet.
    pub fn at(address: SocketAddr) -> Listening {
        Listening { address, bound: false, reason: None }
    }

    pub(crate) fn set_bound(&mut self) {
        (self.bound, self.reason) = (true, None);
    }
}

/// Binds what is to be listened on for `purpose`, however long that takes, and returns it; `None` when the daemon is to stop.
pub(crate) async fn keep_trying<T, Bound: Future<Output = io::Result<T>>>(
    purpose: &str,
    bind: impl Fn() -> Bound,
    listening: &watch::Sender<Listening>,
    stop: &mut Stop,
) -> Option<T> {
    let address = listening.borrow().address;
    loop {
        match bind().await {
            Ok(bound) => {
                if listening.borrow().reason.is_some() {
                    info!("{address} is free by now: it is listened on for {purpose}");
                }
                listening.send_modify(Listening::set_bound);
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
