//! Registers a workload in ZooKeeper as an ephemeral node, while its application is healthy.

use std::time::{Duration, SystemTime};

use tokio::time::sleep;
use vmesh_daemon::Stop;
use vmesh_zookeeper::holder::{HolderStatus, NodeSpec};
use vmesh_zookeeper::{Config, Holder};

use super::record::{self, Instance, Znode};
use super::{DesiredState, RegistrationInputs, RegistrationState, StatusPublisher, ZookeeperSettings};

/// Longest wait for the deletion of a node. If it fails, the node disappears with its session.
const DELETED_WITHIN: Duration = Duration::from_secs(10);

/// Keeps `instance` registered while its application is healthy. At the stop, with `leave`, the instance is withdrawn: it drains for that
/// time first, or, if the format cannot express that, is deleted before that time.
pub(super) async fn maintain(
    config: Config,
    instance: Instance,
    settings: ZookeeperSettings,
    mut inputs: RegistrationInputs,
    report: StatusPublisher,
    leave: Option<Duration>,
    mut stop: Stop,
) {
    let since = SystemTime::now();
    let record = |drains| record::znode(settings.format, &instance, since, drains);
    let mut held: Option<Holder> = None;
    loop {
        let desired = inputs.desired();
        match (desired, &held) {
            (DesiredState::Healthy, None) => {
                let Znode { child, sequential, data } = record(false);
                let path = format!("{}/{child}", settings.path);
                let node = NodeSpec { path, data: data.into(), sequential };
                match Holder::start(config.clone(), node, |_| {}) {
                    Ok(holder) => held = Some(holder),
                    Err(why) => report.set(RegistrationState::Failing, Some(why)),
                }
            }
            (DesiredState::Healthy, Some(holder)) => holder.update(record(false).data.into()),
            (DesiredState::Draining, Some(holder)) if settings.format.can_drain() => {
                holder.update(record(true).data.into());
            }
            (DesiredState::Unhealthy | DesiredState::Draining, Some(_)) => withdraw(&mut held, &report).await,
            _ => {}
        }
        match (desired, held.as_ref().map(Holder::status)) {
            (_, Some(HolderStatus::Waiting(why))) => {
                report.set(RegistrationState::Failing, Some(why.to_string()))
            }
            (DesiredState::Draining, _) => report.set(RegistrationState::Draining, None),
            (_, Some(HolderStatus::Held(_))) => report.set(RegistrationState::Registered, None),
            (DesiredState::Unknown, _) => report.set(RegistrationState::Waiting, None),
            (DesiredState::Unhealthy, _) => report.set(RegistrationState::Unhealthy, None),
            (DesiredState::Healthy, _) => {}
        }
        tokio::select! {
            () = inputs.changed() => {}
            () = wait_for_change(&mut held) => {}
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
        report.set(RegistrationState::Withdrawn, None);
        return;
    };
    if settings.format.can_drain() {
        holder.update(record(true).data.into());
        report.set(RegistrationState::Draining, None);
        sleep(settle).await;
        withdraw(&mut held, &report).await;
    } else {
        withdraw(&mut held, &report).await;
        sleep(settle).await;
    }
    report.set(RegistrationState::Withdrawn, None);
}

async fn withdraw(held: &mut Option<Holder>, report: &StatusPublisher) {
    if let Some(holder) = held.take()
        && let Err(error) = holder.withdraw(DELETED_WITHIN).await
    {
        report.set(RegistrationState::Failing, Some(error.line()));
    }
}

async fn wait_for_change(held: &mut Option<Holder>) {
    match held {
        Some(holder) => _ = holder.changed().await,
        None => std::future::pending().await,
    }
}
