//! What a daemon tells systemd. Outside systemd (no `$NOTIFY_SOCKET`) all of this does nothing.

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

fn send(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        warn!("could not tell systemd the daemon's state through $NOTIFY_SOCKET: {error}");
    }
}
