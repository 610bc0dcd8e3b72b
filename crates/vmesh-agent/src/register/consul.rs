//! A workload in Consul: registered with the agent of this host, its check kept from lapsing.

use std::time::Duration;

use tokio::time::sleep;
use vmesh_consul::{CheckStatus, Client, ConsulError, ErrorKind};
use vmesh_daemon::Stop;
use vmesh_daemon::report::one_line;

use super::record::{self, Instance};
use super::{InConsul, Report, State, Want, Wanted};
use crate::retry::Backoff;

/// What Consul has been told, as far as it is known.
#[derive(Default)]
struct Told {
    registered: bool,
    drained: Option<bool>,
}

/// Keeps `instance` registered for as long as the agent runs. At a stop it is withdrawn if there is something to `leave`:
/// first it drains, and after that time it is gone.
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
                // Whatever it was: an agent that was restarted without its state knows nothing of us.
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
        // Readers see that it drains, and send it nothing new, before it is gone.
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
        // What an earlier agent registered is left as it is until the application has been asked.
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
