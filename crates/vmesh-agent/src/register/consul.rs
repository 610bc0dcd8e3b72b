//! Registers a workload with the Consul agent of this host, and renews its TTL check.

use std::time::Duration;

use tokio::time::sleep;
use vmesh_consul::{CheckStatus, Client, ConsulError, ErrorKind};
use vmesh_daemon::Stop;
use vmesh_daemon::report::one_line;

use super::record::{self, Instance};
use super::{ConsulSettings, DesiredState, RegistrationInputs, RegistrationState, StatusPublisher};
use vmesh_backoff::Backoff;

/// What Consul has acknowledged, as far as the agent knows.
#[derive(Default)]
struct ConsulState {
    is_registered: bool,
    drained: Option<bool>,
}

/// Keeps `instance` registered until the stop. With `leave`, the instance is then drained, and deregistered after that time.
pub(super) async fn maintain(
    client: Client,
    instance: Instance,
    settings: ConsulSettings,
    mut inputs: RegistrationInputs,
    report: StatusPublisher,
    leave: Option<Duration>,
    mut stop: Stop,
) {
    let mut known = ConsulState::default();
    let mut backoff = Backoff::decorrelated(Duration::from_millis(200), Duration::from_secs(10));
    loop {
        let desired = inputs.desired();
        let pause = match update_consul(&client, &instance, &settings, desired, &mut known).await {
            Ok(()) => {
                backoff.reset();
                report.set(status_for(desired), None);
                settings.ttl.0 / 3
            }
            Err(error) => {
                // Start over after any error: a Consul agent that was restarted without its state has forgotten the instance.
                known = ConsulState::default();
                report.set(RegistrationState::Failing, Some(one_line(&error)));
                backoff.next_pause()
            }
        };
        tokio::select! {
            () = inputs.changed() => {}
            () = sleep(pause) => {}
            () = stop.requested() => break,
        }
    }
    let Some(settle) = leave else { return };
    if known.is_registered {
        // Drained before it is deregistered, so that clients stop sending new requests to it.
        if let Err(error) = client.maintenance(&instance.id, true, "vmesh-agent stops").await {
            report.set(RegistrationState::Failing, Some(one_line(&error)));
        }
        report.set(RegistrationState::Draining, None);
        sleep(settle).await;
        match client.deregister(&instance.id).await {
            Ok(()) => report.set(RegistrationState::Withdrawn, None),
            Err(error) => report.set(RegistrationState::Failing, Some(one_line(&error))),
        }
    }
}

fn status_for(desired: DesiredState) -> RegistrationState {
    match desired {
        DesiredState::Unknown => RegistrationState::Waiting,
        DesiredState::Healthy => RegistrationState::Registered,
        DesiredState::Unhealthy => RegistrationState::Unhealthy,
        DesiredState::Draining => RegistrationState::Draining,
    }
}

async fn update_consul(
    client: &Client,
    instance: &Instance,
    settings: &ConsulSettings,
    desired: DesiredState,
    known: &mut ConsulState,
) -> Result<(), ConsulError> {
    let (status, output) = match desired {
        // A registration of an earlier agent stays until the application has been checked.
        DesiredState::Unknown => return Ok(()),
        DesiredState::Healthy => (CheckStatus::Passing, "the application answers"),
        DesiredState::Unhealthy => (CheckStatus::Critical, "the application does not answer as it should"),
        DesiredState::Draining => (CheckStatus::Passing, "the application drains"),
    };
    if !known.is_registered {
        client.register(&record::consul_registration(instance, settings, status)).await?;
        known.is_registered = true;
    }
    let drained = desired == DesiredState::Draining;
    if known.drained != Some(drained) {
        client.maintenance(&instance.id, drained, "a file in the drain directory of vmesh-agent").await?;
        known.drained = Some(drained);
    }
    client.update_check(&record::check_id(instance), status, output).await.inspect_err(|error| {
        if let ErrorKind::NotFound(_) = error.kind {
            known.is_registered = false;
        }
    })
}
