//! Registers a workload with the Consul agent of this host, and renews its TTL check.

use std::time::Duration;

use tokio::time::sleep;
use vmesh_consul::{CheckStatus, Client, ConsulError, ErrorKind};
use vmesh_daemon::Stop;
use vmesh_daemon::report::one_line;

use super::record::{self, Instance};
use super::{InConsul, Report, State, Want, Wanted};
use crate::retry::Backoff;

/// What Consul has acknowledged, as far as the agent knows.
#[derive(Default)]
struct Told {
    registered: bool,
    drained: Option<bool>,
}

/// Keeps `instance` registered until the stop. With `leave`, the instance is then drained, and deregistered after that time.
pub(super) async fn keep(
    client: Client,
    instance: Instance,
    settings: InConsul,
    mut wanted: Wanted,
    report: Report,
    leave: Option<Duration>,
    mut stop: Stop,
) {
    let mut told = Told::default();
    let mut backoff = Backoff::new(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        let want = wanted.now();
        let pause = match tell(&client, &instance, &settings, want, &mut told).await {
            Ok(()) => {
                backoff.reset();
                report.set(state(want), None);
                settings.ttl.0 / 3
            }
            Err(error) => {
                // Start over after any error: a Consul agent that was restarted without its state has forgotten the instance.
                told = Told::default();
                report.set(State::Failing, Some(one_line(&error)));
                backoff.pause()
            }
        };
        tokio::select! {
            () = wanted.changed() => {}
            () = sleep(pause) => {}
            () = stop.requested() => break,
        }
    }
    let Some(settle) = leave else { return };
    if told.registered {
        // Drained before it is deregistered, so that clients stop sending new requests to it.
        if let Err(error) = client.maintenance(&instance.id, true, "vmesh-agent stops").await {
            report.set(State::Failing, Some(one_line(&error)));
        }
        report.set(State::Draining, None);
        sleep(settle).await;
        match client.deregister(&instance.id).await {
            Ok(()) => report.set(State::Withdrawn, None),
            Err(error) => report.set(State::Failing, Some(one_line(&error))),
        }
    }
}

fn state(want: Want) -> State {
    match want {
        Want::Nothing => State::Waiting,
        Want::Well => State::Registered,
        Want::Ill => State::Ill,
        Want::Drained => State::Draining,
    }
}

async fn tell(
    client: &Client,
    instance: &Instance,
    settings: &InConsul,
    want: Want,
    told: &mut Told,
) -> Result<(), ConsulError> {
    let (status, output) = match want {
        // A registration of an earlier agent stays until the application has been checked.
        Want::Nothing => return Ok(()),
        Want::Well => (CheckStatus::Passing, "the application answers"),
        Want::Ill => (CheckStatus::Critical, "the application does not answer as it should"),
        Want::Drained => (CheckStatus::Passing, "the application drains"),
    };
    if !told.registered {
        client.register(&record::consul(instance, settings, status)).await?;
        told.registered = true;
    }
    let drained = want == Want::Drained;
    if told.drained != Some(drained) {
        client.maintenance(&instance.id, drained, "a file in the drain directory of vmesh-agent").await?;
        told.drained = Some(drained);
    }
    client.update_check(&record::check_id(instance), status, output).await.inspect_err(|error| {
        if let ErrorKind::NotFound(_) = error.kind {
            told.registered = false;
        }
    })
}
