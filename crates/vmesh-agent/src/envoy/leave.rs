//! How an Envoy takes leave of its clients.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};
use vmesh_daemon::report::one_line;

use super::admin;
use super::process::Process;

pub(crate) const LOOK_SOON: Duration = Duration::from_millis(50);
/// For those who were let in while the listeners closed.
pub(crate) const LAST_IN: Duration = Duration::from_millis(500);
pub(crate) const EXITS_WITHIN: Duration = Duration::from_secs(5);

/// Lets Envoy take leave of its clients, for `drain` at most, and ends it.
pub(crate) async fn retire(envoy: &mut Process, socket: &Path, drain: Duration) {
    take_leave(envoy, socket, drain, LAST_IN).await;
    end(envoy).await;
}

/// Lets Envoy take leave of its clients, for `drain` at most. Whoever is connected after that may stay for `stay`.
pub(crate) async fn take_leave(envoy: &mut Process, socket: &Path, drain: Duration, stay: Duration) {
    let deadline = Instant::now() + drain;
    info!(pid = envoy.pid(), "Envoy takes leave of its clients, {drain:?} at most");
    let leaves = async {
        for path in ["/healthcheck/fail", "/drain_listeners?graceful"] {
            tell(socket, path).await;
        }
        idle(socket).await;
    };
    tokio::select! {
        _ = timeout_at(deadline, leaves) => {}
        _ = envoy.exited() => return,
    }
    // Its listeners still accept: whoever was let in last would be cut off by the signal.
    _ = admin::post(socket, "/drain_listeners").await;
    tokio::select! {
        _ = timeout(stay, idle(socket)) => {}
        _ = envoy.exited() => {}
    }
}

/// Until it has understood: on a busy host it may take its time. One that listens no more cannot be told.
async fn tell(socket: &Path, path: &str) {
    while let Err(error) = admin::post(socket, path).await {
        warn!("Envoy does not take its leave: {}", one_line(&error));
        if error.is_connect() {
            return;
        }
        sleep(LOOK_SOON).await;
    }
}

/// Ends Envoy without taking leave of anybody.
pub(crate) async fn end(envoy: &mut Process) {
    envoy.signal(Signal::TERM);
    if timeout(EXITS_WITHIN, envoy.exited()).await.is_err() {
        warn!(pid = envoy.pid(), "Envoy ignores SIGTERM and is killed");
        kill(envoy).await;
    }
}

pub(crate) async fn kill(envoy: &mut Process) {
    envoy.signal(Signal::KILL);
    if timeout(EXITS_WITHIN, envoy.exited()).await.is_err() {
        error!(pid = envoy.pid(), "Envoy does not end when killed: it hangs in the kernel");
    }
}

/// Waits until no client is connected. That one does not answer in time says nothing of its clients.
async fn idle(socket: &Path) {
    loop {
        match admin::connections(socket).await {
            Ok(0) => return,
            Err(error) if error.is_connect() => return,
            Ok(_) | Err(_) => sleep(LOOK_SOON).await,
        }
    }
}

/// Whether the process with this pid answers on the socket.
pub(crate) async fn answers(socket: &Path, pid: i32, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        if admin::listening_pid(socket).await == Some(pid) && admin::server_info(socket).await.is_ok() {
            return true;
        }
        sleep(LOOK_SOON).await;
    }
    false
}
