//! Notifications to systemd. Outside systemd (without `$NOTIFY_SOCKET`), these functions do nothing.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

/// Notifies that the daemon serves. `status` is shown by `systemctl status`.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

pub fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// Notifies that the daemon is stopping.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// Notifies that the daemon is stopping, and extends the unit's `TimeoutStopSec=` to `longest` if that is longer.
pub fn stopping_within(longest: Duration) {
    let microseconds = u32::try_from(longest.as_micros()).unwrap_or(u32::MAX);
    send(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(microseconds)]);
}

/// Notifies the watchdog while the runtime runs its tasks. Without a watchdog, waits for ever.
pub async fn watchdog() {
    watchdog_while(|| true).await;
}

/// Notifies the watchdog while `is_well` returns true: see [`watchdog`].
pub async fn watchdog_while(is_well: impl Fn() -> bool) {
    let Some(limit) = sd_notify::watchdog_enabled() else {
        return std::future::pending().await;
    };
    // Half the limit is what sd_watchdog_enabled(3) recommends.
    let mut ticks = tokio::time::interval((limit / 2).max(std::time::Duration::from_millis(1)));
    loop {
        ticks.tick().await;
        if is_well() {
            send(&[NotifyState::Watchdog]);
        }
    }
}

/// Stores `socket` under `name` in systemd while this unit restarts, so that requests wait in its queue. Has no effect for a unit without
/// `FileDescriptorStoreMax=`.
pub fn keep_socket(name: &str, socket: impl AsFd) {
    let states = [NotifyState::FdStore, NotifyState::FdName(name)];
    if let Err(error) = sd_notify::notify_with_fds(&states, &[socket.as_fd()]) {
        warn!("systemd does not keep the socket `{name}` while this daemon restarts: {error}");
    }
}

/// Removes the sockets stored under `name`, which closes them.
pub fn forget_socket(name: &str) {
    send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Returns the sockets that systemd stored or opened for this unit, with their names. Call it once, at the start: a second call would
/// return the same descriptors, with two owners.
#[expect(unsafe_code, reason = "descriptors that are inherited become owned")]
pub fn inherited_sockets() -> Vec<(String, OwnedFd)> {
    let sockets = match sd_notify::listen_fds_with_names() {
        Ok(sockets) => sockets,
        Err(error) => {
            warn!("the sockets that systemd kept for this daemon are not used: {error}");
            return Vec::new();
        }
    };
    // SAFETY: sd_listen_fds(3) verifies by the process id that these descriptors were passed to this process, and nothing else owns them.
    sockets.map(|(socket, name)| (name, unsafe { OwnedFd::from_raw_fd(socket) })).collect()
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("could not tell systemd the daemon's state through $NOTIFY_SOCKET: {error}");
    }
}
