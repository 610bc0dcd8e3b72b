//! A workload in ZooKeeper: an ephemeral node in the chosen format, there while the application is well.

use std::time::{Duration, SystemTime};

use tokio::time::sleep;
use vmesh_daemon::Stop;
use vmesh_zookeeper::holder::{Standing, Wanted as Node};
use vmesh_zookeeper::{Config, Holder};

use super::record::{self, Instance};
use super::{InZookeeper, Report, State, Want, Wanted};

/// How long a node may take to be deleted; what does not go then goes with its session.
const GONE_WITHIN: Duration = Duration::from_secs(10);

/// Keeps `instance` registered while it is wanted. At a stop it is withdrawn if there is something to `leave`: it is gone,
/// and the fleet has that time to learn of it.
pub(super) async fn keep(
    config: Config,
    instance: Instance,
    settings: InZookeeper,
    mut wanted: Wanted,
    report: Report,
    leave: Option<Duration>,
    mut stop: Stop,
) {
    let mut held: Option<Holder> = None;
    loop {
        let want = wanted.now();
        match (want, &held) {
            (Want::Well, None) => match start(&config, &instance, &settings) {
                Ok(holder) => held = Some(holder),
                Err(why) => report.set(State::Failing, Some(why)),
            },
            (Want::Ill | Want::Drained, Some(_)) => withdraw(&mut held, &report).await,
            _ => {}
        }
        match (want, held.as_ref().map(Holder::standing)) {
            (_, Some(Standing::Held(_))) => report.set(State::Registered, None),
            (_, Some(Standing::Waiting(why))) => report.set(State::Failing, Some(why.to_string())),
            (Want::Nothing, _) => report.set(State::Waiting, None),
            (Want::Ill, _) => report.set(State::Ill, None),
            (Want::Drained, _) => report.set(State::Draining, None),
            (Want::Well, _) => {}
        }
        tokio::select! {
            () = wanted.changed() => {}
            () = stands_otherwise(&mut held) => {}
            () = stop.requested() => break,
        }
    }
    match leave {
        Some(settle) => {
            let was_held = held.is_some();
            withdraw(&mut held, &report).await;
            report.set(State::Withdrawn, None);
            if was_held {
                sleep(settle).await;
            }
        }
        // Dropping it would end the session, and the node with it. So it lasts as long as the session does without us,
        // and an agent that starts within that time takes it over.
        None => std::mem::forget(held),
    }
}

fn start(config: &Config, instance: &Instance, settings: &InZookeeper) -> Result<Holder, String> {
    let node = record::znode(settings.format, instance, SystemTime::now());
    let path = format!("{}/{}", settings.path, node.child);
    let wanted = Node { path, data: node.data.into(), sequential: node.sequential };
    Holder::start(config.clone(), wanted, |_| {})
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
