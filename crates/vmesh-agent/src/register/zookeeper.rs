//! Registers a workload in ZooKeeper as an ephemeral node, while its application is healthy.

use std::time::{Duration, SystemTime};

use tokio::time::sleep;
use vmesh_daemon::Stop;
use vmesh_zookeeper::holder::{Standing, Wanted as Node};
use vmesh_zookeeper::{Config, Holder};

use super::record::{self, Instance, Znode};
use super::{InZookeeper, Report, State, Want, Wanted};

/// Longest wait for the deletion of a node. If it fails, the node disappears with its session.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Keeps `instance` registered while its application is healthy. At the stop, with `leave`, the instance is withdrawn: it drains for that
/// time first, or, if the format cannot express that, is deleted before that time.
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
        // Not dropped, since that would end the session and delete the node. The node then lasts until the session expires, and an agent
        // that starts before that takes it over.
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
