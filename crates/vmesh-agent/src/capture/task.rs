//! The task that talks to vmesh-net.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use serde::Serialize;
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};
use tracing::{debug, info, warn};
use vmesh_capture::spec::{INBOUND_PORT, OUTBOUND_PORT};
use vmesh_daemon::Tasks;
use vmesh_daemon::report::one_line;
use vmesh_net::client::{Client, ClientError};
use vmesh_net::probe;
use vmesh_net::protocol::{self, EnvoyHealth, Request, Response};

use super::desired;
use super::probes::{self, ProbeResults};
use super::settings::Confirmer;
use crate::config::Config;
use crate::destinations::Destinations;

const SECOND: Duration = Duration::from_secs(1);
/// Delay that combines a burst of changes. Each change of rules costs a run of nft or iptables.
const SETTLES: Duration = Duration::from_millis(50);
/// Interval at which the control planes' names are resolved again.
const RESOLVES_EVERY: Duration = Duration::from_secs(60);
/// Pause before a rejected request is repeated. The reason may be temporary, such as a full disk or a busy vmesh-net.
const ASKS_AGAIN_AFTER: Duration = Duration::from_secs(10);
/// Time between a change and the first probe, so that its effects show.
const WATCHES_FOR: Duration = Duration::from_secs(2);

const AWAITS_ENVOY: &str = "Envoy does not serve its capture ports yet: nothing is captured before";

/// The status of capture on this host.
#[derive(Debug, Clone, Default, Serialize)]
pub struct CaptureStatus {
    /// Reports whether the configuration asks for any capture.
    pub wanted: bool,
    /// Reports whether connections are captured now.
    pub captures: bool,
    /// The last status that vmesh-net sent.
    pub net: Option<Box<protocol::Status>>,
    /// The reason why the status is unknown, or the last rejection.
    pub reason: Option<String>,
    #[serde(serialize_with = "crate::status::optional_epoch_seconds")]
    pub confirmed: Option<SystemTime>,
}

/// Starts the task. It also runs if nothing is to be captured, so that vmesh-net removes what an earlier configuration captured.
pub fn spawn(
    tasks: &mut Tasks,
    config: Arc<Config>,
    destinations: watch::Receiver<Arc<Destinations>>,
    has_all: watch::Receiver<bool>,
    status: watch::Sender<CaptureStatus>,
) {
    let wanted = config.capture.outbound() || config.capture.inbound() || !config.capture.spec.is_off();
    status.send_modify(|status| status.wanted = wanted);
    if !wanted && !config.capture.socket.exists() {
        return;
    }
    let client = CaptureClient {
        config,
        destinations,
        has_all,
        status,
        control_planes: BTreeSet::new(),
        looked_up: None,
        refused: None,
        awaits_envoy: false,
        may_retry: false,
        before: None,
        on_trial: None,
    };
    tasks.spawn("capture", client.run());
}

struct CaptureClient {
    config: Arc<Config>,
    destinations: watch::Receiver<Arc<Destinations>>,
    has_all: watch::Receiver<bool>,
    status: watch::Sender<CaptureStatus>,
    control_planes: BTreeSet<SocketAddr>,
    looked_up: Option<Instant>,
    /// Time and reason of vmesh-net's last rejection.
    refused: Option<(Instant, String)>,
    /// Nothing is captured, and Envoy does not serve its capture ports yet. A trial would only run into its timeout.
    awaits_envoy: bool,
    /// An operator has allowed another attempt after a rollback.
    may_retry: bool,
    /// Results of the probes while no trial was in progress.
    before: Option<ProbeResults>,
    on_trial: Option<(u64, Instant)>,
}

impl CaptureClient {
    async fn run(mut self) {
        let mut pause = Duration::from_millis(200);
        loop {
            let error = match Client::connect(&self.config.capture.socket).await {
                Ok(mut client) => {
                    pause = Duration::from_millis(200);
                    // `exchange` returns only with an error.
                    let Err(error) = self.exchange(&mut client).await;
                    error
                }
                Err(error) => error,
            };
            let why = one_line(&error);
            let is_new = self.status.borrow().reason.as_ref() != Some(&why);
            if is_new && self.status.borrow().wanted {
                warn!("vmesh-net cannot be reached, so the host's redirects are not renewed: {why}");
            }
            self.status.send_modify(|status| {
                status.net = None;
                status.captures = false;
                status.reason = Some(why);
            });
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_secs(5));
        }
    }

    async fn exchange(&mut self, client: &mut Client) -> Result<std::convert::Infallible, ClientError> {
        self.resolve_control_planes().await;
        let answer = client.ask(&Request::Status).await?;
        let on_trial = matches!(&answer, Response::Status(net) if net.trial.is_some());
        self.on_answer(answer);
        if self.before.is_none() {
            // The agent started during a trial, so it does not know what worked before: every probe counts.
            self.before =
                Some(if on_trial { ProbeResults::new() } else { probes::run_all(&self.config).await });
        }
        self.send_desired(client).await?;
        let mut ticks = interval(SECOND);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                changed = self.destinations.changed() => {
                    if changed.is_err() {
                        // The relay has ended, and the agent ends soon: the current rules stay.
                        std::future::pending::<()>().await;
                    }
                    sleep(SETTLES).await;
                    self.send_desired(client).await?;
                }
                Ok(()) = self.has_all.changed() => self.send_desired(client).await?,
                _ = ticks.tick() => {
                    let answer = client.ask(&Request::Well).await?;
                    self.on_answer(answer);
                    let again = self.refused.as_ref().is_some_and(|(when, _)| when.elapsed() >= ASKS_AGAIN_AFTER);
                    if self.resolve_control_planes().await || again || self.awaits_envoy || self.may_retry {
                        self.send_desired(client).await?;
                    }
                    self.check_trial(client).await?;
                }
            }
        }
    }

    async fn send_desired(&mut self, client: &mut Client) -> Result<(), ClientError> {
        // The destinations are not complete yet, while Envoy may serve all of them: an incomplete set would end the capture of the others.
        if self.config.capture.outbound() && !*self.has_all.borrow_and_update() {
            return Ok(());
        }
        self.awaits_envoy = self.captures_nothing() && !envoy_serves(&self.config).await;
        if self.awaits_envoy {
            self.status.send_modify(|status| status.reason = Some(AWAITS_ENVOY.to_owned()));
            return Ok(());
        }
        let destinations = self.destinations.borrow_and_update().clone();
        let want = desired(&self.config, &destinations, self.control_planes.clone());
        let answer = client.ask(&Request::Want(want)).await?;
        self.may_retry = false;
        self.refused = match &answer {
            Response::Refused(why) => Some((Instant::now(), why.clone())),
            _ => None,
        };
        self.on_answer(answer);
        Ok(())
    }

    fn captures_nothing(&self) -> bool {
        self.status.borrow().net.as_ref().is_some_and(|net| net.state == protocol::State::Off)
    }

    /// Resolves the control planes' addresses if it is time to. Returns whether they changed.
    async fn resolve_control_planes(&mut self) -> bool {
        if self.looked_up.is_some_and(|when| when.elapsed() < RESOLVES_EVERY) {
            return false;
        }
        self.looked_up = Some(Instant::now());
        let now = probes::control_plane_addresses(&self.config).await;
        // An empty result means that the resolver failed, not that the control planes are gone.
        let differ = !now.is_empty() && now != self.control_planes;
        if differ {
            self.control_planes = now;
        }
        differ
    }

    /// Probes, and then confirms or rolls back, if a trial is in progress.
    async fn check_trial(&mut self, client: &mut Client) -> Result<(), ClientError> {
        let net = self.status.borrow().net.clone();
        // During a bypass, nothing of the trial is in force.
        let net = net.filter(|net| net.state != protocol::State::Bypassed);
        let Some(trial) = net.and_then(|net| net.trial) else {
            self.on_trial = None;
            return Ok(());
        };
        let began = match self.on_trial {
            Some((known, began)) if known == trial => began,
            _ => {
                let began = Instant::now();
                self.on_trial = Some((trial, began));
                began
            }
        };
        if self.config.capture.confirm.by == Confirmer::Operator || began.elapsed() < WATCHES_FOR {
            return Ok(());
        }
        let found = probes::run_all(&self.config).await;
        let before = self.before.clone().unwrap_or_default();
        let answer = match probes::newly_failing(&before, &found) {
            Some(lost) => {
                debug!(trial, "not confirmed yet: {lost}");
                // The probes may just be slow; after half of the time they count as failed.
                let patience = self.config.capture.confirm.within.0 / 2;
                if began.elapsed() < patience {
                    return Ok(());
                }
                client.ask(&Request::Revert { trial, why: lost }).await?
            }
            None => client.ask(&Request::Confirm { trial }).await?,
        };
        match &answer {
            Response::Status(status) if status.trial.is_none() && status.reverted.is_none() => {
                info!(trial, "confirmed the change of capture");
                self.before = Some(found);
                self.status.send_modify(|status| status.confirmed = Some(SystemTime::now()));
            }
            Response::Refused(why) => debug!(trial, "not confirmed yet: {why}"),
            _ => {}
        }
        self.on_answer(answer);
        Ok(())
    }

    fn on_answer(&mut self, answer: Response) {
        match answer {
            Response::Status(net) => {
                let was_reverted =
                    self.status.borrow().net.as_ref().is_some_and(|net| net.reverted.is_some());
                self.may_retry |= was_reverted && net.reverted.is_none();
                if let Some(why) = &net.reverted
                    && self.status.borrow().net.as_ref().and_then(|net| net.reverted.as_ref()) != Some(why)
                {
                    warn!(
                        "a change of capture was rolled back: {why}; `vmeshctl capture retry` tries it again"
                    );
                }
                let reason = match &self.refused {
                    _ if self.awaits_envoy => Some(AWAITS_ENVOY.to_owned()),
                    refused => refused.as_ref().map(|(_, why)| why.clone()),
                };
                self.status.send_if_modified(|status| {
                    let captures = net.captures();
                    let changed =
                        status.captures != captures || status.net.is_none() || status.reason != reason;
                    status.captures = captures;
                    status.reason = reason;
                    status.net = Some(net);
                    changed
                });
            }
            Response::Refused(why) => {
                let is_new = self.status.borrow().reason.as_ref() != Some(&why);
                if is_new {
                    warn!("vmesh-net refused: {why}");
                }
                self.status.send_modify(|status| status.reason = Some(why));
            }
            Response::Plan(_) => {}
        }
    }
}

/// Reports whether Envoy serves its capture ports.
async fn envoy_serves(config: &Config) -> bool {
    let capture = &config.capture;
    for (wanted, port) in [(capture.outbound(), OUTBOUND_PORT), (capture.inbound(), INBOUND_PORT)] {
        if wanted && probe::dial((Ipv4Addr::LOCALHOST, port).into()).await != EnvoyHealth::Well {
            return false;
        }
    }
    true
}
