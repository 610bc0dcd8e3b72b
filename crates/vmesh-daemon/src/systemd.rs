//! What a daemon tells systemd. Outside systemd (no `$NOTIFY_SOCKET`) all of this does nothing.

use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::time::Duration;

use sd_notify::NotifyState;
use tracing::warn;

/// The daemon serves. `status` is what `systemctl status` shows.
pub fn ready(status: &str) {
    send(&[NotifyState::Ready, NotifyState::Status(status)]);
}

pub fn status(status: &str) {
    send(&[NotifyState::Status(status)]);
}

/// The daemon takes its leave.
pub fn stopping() {
    send(&[NotifyState::Stopping]);
}

/// The daemon takes its leave, which may last for so long although `TimeoutStopSec=` of its unit is shorter.
pub fn stopping_within(longest: Duration) {
    let microseconds = u32::try_from(longest.as_micros()).unwrap_or(u32::MAX);
    send(&[NotifyState::Stopping, NotifyState::ExtendTimeoutUsec(microseconds)]);
}

/// Tells systemd's watchdog that the runtime still runs its tasks; without a watchdog it waits for ever.
pub async fn watchdog() {
    watchdog_while(|| true).await;
}

/// Tells systemd's watchdog that all is well, as long as it is: see [`watchdog`].
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

/// Has systemd keep `socket` under `name` while this unit restarts: what clients send meanwhile waits in it. A unit without
/// `FileDescriptorStoreMax=` keeps none.
pub fn keep_socket(name: &str, socket: impl AsFd) {
    let states = [NotifyState::FdStore, NotifyState::FdName(name)];
    if let Err(error) = sd_notify::notify_with_fds(&states, &[socket.as_fd()]) {
        warn!("systemd does not keep the socket `{name}` while this daemon restarts: {error}");
    }
}

/// Has systemd close what it keeps under `name`.
pub fn forget_socket(name: &str) {
    send(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)]);
}

/// Returns the sockets that systemd kept for this unit or opened for it, with their names. To be called once, at the start:
/// a second call would return the same descriptors, which then have two owners.
#[expect(unsafe_code, reason = "descriptors that are inherited become owned")]
pub fn inherited_sockets() -> Vec<(String, OwnedFd)> {
    let sockets = match sd_notify::listen_fds_with_names() {
        Ok(sockets) => sockets,
        Err(error) => {
            warn!("the sockets that systemd kept for this daemon are not used: {error}");
            return Vec::new();
        }
    };
    // SAFETY: sd_listen_fds(3): these descriptors were passed to this very process, by its id, and nothing else owns them.
    sockets.map(|(socket, name)| (name, unsafe { OwnedFd::from_raw_fd(socket) })).collect()
}

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("could not tell systemd the daemon's state through $NOTIFY_SOCKET: {error}");
    }
}
