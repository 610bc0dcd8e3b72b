//! A workload in ZooKeeper: an ephemeral node in the chosen format, there while the application is well.

use std::time::{Duration, SystemTime};

use tokio::time::sleep;
use vmesh_daemon::Stop;
use vmesh_zookeeper::holder::{Standing, Wanted as Node};
use vmesh_zookeeper::{Config, Holder};

use super::record::{self, Instance, Znode};
use super::{InZookeeper, Report, State, Want, Wanted};

/// How long a node may take to be deleted; what does not go then goes with its session.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Keeps `instance` registered while it is wanted. At a stop it is withdrawn if there is something to `leave`: the fleet
/// has that time to learn that it drains, or that it is gone where the format cannot say so.
pub(super) async fn keep(
    config: Config,
    instance: Instance,
    settings: InZookeeper,
    mut wanted: Wanted,
    report: Report,
    leave: Option<Duration>,
    mut stop: Stop,
) {
    let since = SystemTime::now();
    let record = |drains| record::znode(settings.format, &instance, since, drains);
    let mut held: Option<Holder> = None;
    loop {
        let want = wanted.now();
        match (want, &held) {
            (Want::Well, None) => {
                let Znode { child, sequential, data } = record(false);
                let path = format!("{}/{child}", settings.path);
                let node = Node { path, data: data.into(), sequential };
                match Holder::start(config.clone(), node, |_| {}) {
                    Ok(holder) => held = Some(holder),
                    Err(why) => report.set(State::Failing, Some(why)),
                }
            }
            (Want::Well, Some(holder)) => holder.update(record(false).data.into()),
            (Want::Drained, Some(holder)) if settings.format.can_drain() => {
                holder.update(record(true).data.into());
            }
            (Want::Ill | Want::Drained, Some(_)) => withdraw(&mut held, &report).await,
            _ => {}
        }
        match (want, held.as_ref().map(Holder::standing)) {
            (_, Some(Standing::Waiting(why))) => report.set(State::Failing, Some(why.to_string())),
            (Want::Drained, _) => report.set(State::Draining, None),
            (_, Some(Standing::Held(_))) => report.set(State::Registered, None),
            (Want::Nothing, _) => report.set(State::Waiting, None),
            (Want::Ill, _) => report.set(State::Ill, None),
            (Want::Well, _) => {}
        }
        tokio::select! {
            () = wanted.changed() => {}
            () = stands_otherwise(&mut held) => {}
            () = stop.requested() => break,
        }
    }
    let Some(settle) = leave else {
        // Dropping it would end the session, and the node with it. So it lasts as long as the session does without us,
        // and an agent that starts within that time takes it over.
        std::mem::forget(held);
        return;
    };
    let Some(holder) = &held else {
        report.set(State::Withdrawn, None);
        return;
    };
    if settings.format.can_drain() {
        holder.update(record(true).data.into());
        report.set(State::Draining, None);
        sleep(settle).await;
        withdraw(&mut held, &report).await;
    } else {
        withdraw(&mut held, &report).await;
        sleep(settle).await;
    }
    report.set(State::Withdrawn, None);
}

async fn withdraw(held: &mut Option<Holder>, report: &Report) {
    if let Some(holder) = held.take()
        && let Err(error) = holder.withdraw(GONE_WITHIN).await
    {
        report.set(State::Failing, Some(error.line()));
    }
}

async fn stands_otherwise(held: &mut Option<Holder>) {
    match held {
        Some(holder) => _ = holder.changed().await,
        None => std::future::pending().await,
    }
}
