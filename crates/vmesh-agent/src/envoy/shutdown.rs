//! Drains and stops an Envoy.

use std::path::Path;
use std::time::Duration;

use rustix::process::Signal;
use tokio::time::{Instant, sleep, timeout, timeout_at};
use tracing::{error, info, warn};
use vmesh_daemon::report::one_line;

use super::admin;
use super::process::Process;

pub(crate) const POLL_SOON: Duration = Duration::from_millis(50);
/// Extra time for connections that were accepted while the listeners closed.
pub(crate) const LAST_IN: Duration = Duration::from_millis(500);
pub(crate) const EXITS_WITHIN: Duration = Duration::from_secs(5);

/// Drains Envoy for at most `limit`, then stops it.
pub(crate) async fn drain_and_stop(envoy: &mut Process, socket: &Path, limit: Duration) {
    drain(envoy, socket, limit, LAST_IN).await;
    stop(envoy).await;
}

/// Drains Envoy for at most `drain`. Connections that are still open by then get another `stay`.
pub(crate) async fn drain(envoy: &mut Process, socket: &Path, drain: Duration, stay: Duration) {
    let deadline = Instant::now() + drain;
    info!(pid = envoy.pid(), "draining Envoy for at most {drain:?}");
    let leaves = async {
        for path in ["/healthcheck/fail", "/drain_listeners?graceful"] {
            post_until_answered(socket, path).await;
        }
        wait_until_idle(socket).await;
    };
    tokio::select! {
        _ = timeout_at(deadline, leaves) => {}
        _ = envoy.exited() => return,
    }
    // The listeners still accept after a graceful drain. Close them first, or SIGTERM would cut off the latest clients.
    _ = admin::post(socket, "/drain_listeners").await;
    tokio::select! {
        _ = timeout(stay, wait_until_idle(socket)) => {}
        _ = envoy.exited() => {}
    }
}

/// Repeats the request until Envoy has answered: on a busy host that may take a while. Gives up if the admin interface no longer listens.
async fn post_until_answered(socket: &Path, path: &str) {
    while let Err(error) = admin::post(socket, path).await {
        warn!("could not tell Envoy to drain: {}", one_line(&error));
        if error.is_connect() {
            return;
        }
        sleep(POLL_SOON).await;
    }
}

/// Stops Envoy without draining: SIGTERM, then SIGKILL.
pub(crate) async fn stop(envoy: &mut Process) {
    envoy.signal(Signal::TERM);
    if timeout(EXITS_WITHIN, envoy.exited()).await.is_err() {
        warn!(pid = envoy.pid(), "Envoy ignores SIGTERM and is killed");
        kill(envoy).await;
    }
}

pub(crate) async fn kill(envoy: &mut Process) {
    envoy.signal(Signal::KILL);
    if timeout(EXITS_WITHIN, envoy.exited()).await.is_err() {
        error!(pid = envoy.pid(), "Envoy survives SIGKILL: it hangs in the kernel");
    }
}

/// Waits until no client is connected. A timeout of the admin interface does not count as idle.
async fn wait_until_idle(socket: &Path) {
    loop {
        match admin::connections(socket).await {
            Ok(0) => return,
            Err(error) if error.is_connect() => return,
            Ok(_) | Err(_) => sleep(POLL_SOON).await,
        }
    }
}

/// Waits until the process `pid` answers on its admin socket; `false` at the deadline.
pub(crate) async fn wait_until_answers(socket: &Path, pid: i32, deadline: Instant) -> bool {
    while Instant::now() < deadline {
        if admin::listening_pid(socket).await == Some(pid) && admin::server_info(socket).await.is_ok() {
            return true;
        }
        sleep(POLL_SOON).await;
    }
    false
}
