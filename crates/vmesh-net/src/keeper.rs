//! The keeper task, which drives [`vmesh_capture::machine`]: it turns requests, ticks and reports of the
//! kernel into events, and has [`crate::executor`] perform the resulting actions. The task has a thread of
//! its own, because it waits for disks, tools and `/proc`. The heartbeat runs elsewhere: see
//! [`crate::heartbeat`].

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use vmesh_capture::apply::{Backend, Tools};
use vmesh_capture::facts::HostPaths;
use vmesh_capture::foreign::InboundJudge;
use vmesh_capture::generations::Generation;
use vmesh_capture::host::HostMemory;
use vmesh_capture::machine::{
    Action, AgentFacts, CaptureState as MachineState, Event, Lifecycle, Machine, TICK, directions,
};
use vmesh_capture::spec::{OutboundCapture, SELF_TESTS, Spec, Unit};
use vmesh_capture::{Program, Stage};
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, systemd};

use crate::executor::{Executor, applier, read_host};
use crate::heartbeat::{AgentWatch, InstalledTimers, TimerStates};
use crate::probe::{ProbeResults, ProbedDirections};
use crate::protocol::{CaptureRequest, Drift, EnvoyHealth, Request, State, Status};
use crate::rules;
use crate::state_file;
use crate::status::KeeperReport;

/// The delay in which the keeper collects further changes after the first one. A firewall makes several when
/// it loads its rules.
const SETTLES: Duration = Duration::from_millis(50);
/// The limits of a trial's duration in seconds: a longer one could last forever, in a shorter one no client
/// could confirm it.
const PATIENCE: std::ops::RangeInclusive<u32> = 5..=3600;

/// The settings of the keeper.
#[derive(Debug, Clone)]
pub struct Options {
    /// The backend to use; `None` takes the one that works.
    pub backend: Option<Backend>,
    pub tools: Tools,
    pub host_paths: HostPaths,
    /// The users of Envoy and of the agent.
    pub users: BTreeSet<u32>,
    /// The slices of vmesh that are never empty.
    pub slices: BTreeSet<Unit>,
    pub state_dir: PathBuf,
    /// The time for which redirected connections may drain after capture is switched off.
    pub drain: Duration,
}

impl Options {
    pub(crate) fn state_file(&self) -> PathBuf {
        self.state_dir.join("state.json")
    }

    /// The file that `/usr/lib/vmesh/bypass` creates.
    pub(crate) fn bypass_flag(&self) -> PathBuf {
        self.state_dir.join("bypass")
    }
}

/// A request for the keeper, and the channel for its reply.
pub struct KeeperRequest {
    pub ask: Request,
    pub answer: oneshot::Sender<KeeperReply>,
}

/// The keeper's reply. The status that a client gets is built by [`crate::status`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeeperReply {
    Done,
    Plan(String),
    Refused(String),
}

/// The channels between the keeper and the other tasks of the process.
pub struct KeeperChannels {
    pub probe_results: watch::Receiver<ProbeResults>,
    pub probed: watch::Sender<ProbedDirections>,
    pub agent: AgentWatch,
    pub timers: watch::Receiver<TimerStates>,
    pub installed: watch::Sender<Option<InstalledTimers>>,
    pub report: watch::Sender<KeeperReport>,
    /// The control groups in which units with an exclusion or a share of their own are started.
    pub parent_cgroups: watch::Sender<BTreeSet<PathBuf>>,
}

/// The task that maintains the rules of the host.
pub struct Keeper {
    machine: Machine,
    executor: Executor,
    /// The time of the task's last wait for an event.
    last_ready: watch::Sender<Instant>,
    /// Set once the machine has asked for the end of the process.
    has_ended: bool,
}

impl Keeper {
    /// Begins with the state from the disk. If that cannot be read, the rules stay as they are until the
    /// agent connects.
    pub fn start(options: Options, channels: KeeperChannels) -> Keeper {
        let (saved, is_whole) = state_file::load(&options.state_file());
        let bypassed = options.bypass_flag().exists();
        let machine = Machine::start(saved, is_whole, bypassed, options.drain, now());
        Keeper {
            machine,
            executor: Executor::new(options, channels),
            last_ready: watch::Sender::new(Instant::now()),
            has_ended: false,
        }
    }

    /// Returns the time when the keeper was last ready for an event. A keeper for which this is long ago
    /// hangs.
    pub fn last_ready(&self) -> watch::Receiver<Instant> {
        self.last_ready.subscribe()
    }

    /// Maintains the rules until `stop` is requested, then drains and removes them. If `again` changes, ends
    /// at once and leaves the rules to the next process.
    pub async fn run(
        mut self,
        mut asked: mpsc::Receiver<KeeperRequest>,
        mut changed: mpsc::Receiver<Generation>,
        mut failed: mpsc::Receiver<String>,
        mut begun: mpsc::Receiver<()>,
        mut again: watch::Receiver<bool>,
        mut stop: Stop,
    ) {
        self.handle(Event::Started).await;
        systemd::ready(&self.status_text());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.last_ready.send_replace(Instant::now());
            tokio::select! {
                question = asked.recv() => match question {
                    Some(KeeperRequest { ask, answer }) => {
                        let reply = self.answer(ask).await;
                        // The client may have gone.
                        _ = answer.send(reply);
                    }
                    None => stop.requested().await,
                },
                Some(change) = changed.recv() => {
                    sleep(SETTLES).await;
                    let mut all = vec![change];
                    while all.len() < rules::MAX_PENDING
                        && let Ok(later) = changed.try_recv()
                    {
                        all.push(later);
                    }
                    all.retain(|change| !self.executor.is_ours(change));
                    let Some(Generation { by, pid, .. }) = all.pop() else { continue };
                    let by = (!by.is_empty()).then(|| format!("{by} (pid {pid})"));
                    let bypassed = self.is_bypassed();
                    self.handle(Event::RulesChanged { by, bypassed }).await;
                }
                Some(()) = begun.recv() => {
                    sleep(SETTLES).await;
                    _ = begun.try_recv();
                    self.handle(Event::UnitsStarted).await;
                }
                Some(why) = failed.recv() => {
                    self.handle(Event::RefreshFailed(why)).await;
                }
                _ = ticks.tick() => self.tick().await,
                Ok(()) = again.changed() => {
                    self.handle(Event::Handover).await;
                    return;
                }
                () = stop.requested() => break,
            }
        }
        systemd::stopping();
        self.handle(Event::Stop).await;
        while !self.has_ended {
            self.last_ready.send_replace(Instant::now());
            sleep(TICK / 2).await;
            self.tick().await;
        }
    }

    fn is_bypassed(&self) -> bool {
        self.executor.options.bypass_flag().exists()
    }

    async fn tick(&mut self) {
        let outbound_is_well = self.executor.channels.probe_results.borrow().outbound == EnvoyHealth::Well;
        let bypassed = self.is_bypassed();
        self.handle(Event::Tick { bypassed, outbound_is_well }).await;
        systemd::status(&self.status_text());
    }

    /// Passes an event to the machine, performs all resulting actions, and publishes the new status. Returns
    /// the machine's reply if the event was a request.
    async fn handle(&mut self, event: Event) -> Option<Result<(), String>> {
        let mut reply = None;
        let mut actions = VecDeque::from(self.machine.on(event, now()));
        while let Some(action) = actions.pop_front() {
            match action {
                Action::Reply(answer) => reply = Some(answer),
                Action::Exit => self.has_ended = true,
                action => {
                    if let Some(result) = self.executor.perform(action).await {
                        actions.extend(self.machine.on(result, now()));
                    }
                }
            }
        }
        self.publish();
        reply
    }

    async fn answer(&mut self, ask: Request) -> KeeperReply {
        let event = match ask {
            // The server answers these requests without the keeper.
            Request::Status | Request::Look | Request::Well => return KeeperReply::Done,
            Request::Plan { want } => {
                return match self.plan(want).await {
                    Ok(text) => KeeperReply::Plan(text),
                    Err(why) => KeeperReply::Refused(why),
                };
            }
            Request::Want(want) => {
                let patience = want.confirm_within.clamp(*PATIENCE.start(), *PATIENCE.end());
                Event::Want {
                    spec: Box::new(with_self_test(want.spec)),
                    agent_facts: AgentFacts { ports: want.ports, control_planes: want.control_planes },
                    patience: Duration::from_secs(patience.into()),
                }
            }
            Request::Confirm { trial } => Event::Confirm { trial },
            Request::Revert { trial, why } => Event::Revert { trial, why },
            Request::Retry => Event::Retry,
        };
        match self.handle(event).await {
            Some(Ok(())) => KeeperReply::Done,
            Some(Err(why)) => KeeperReply::Refused(why),
            None => KeeperReply::Refused(
                "vmesh-net could not handle the request; see `journalctl -u vmesh-net`".to_owned(),
            ),
        }
    }

    async fn plan(&self, want: Option<CaptureRequest>) -> Result<String, String> {
        let (spec, stage) = match &want {
            Some(want) => {
                want.spec.limits().map_err(|error| error.to_string())?;
                (with_self_test(want.spec.clone()), Stage::Confirmed)
            }
            None => self.machine.wanted(),
        };
        let agent_facts = want.map_or_else(
            || self.machine.agent_facts().clone(),
            |want| AgentFacts { ports: want.ports, control_planes: want.control_planes },
        );
        let judge = self.machine.filter();
        plan(&self.executor.options, spec, stage, &agent_facts, self.machine.memory(), judge).await
    }

    fn state(&self) -> State {
        match self.machine.state() {
            MachineState::Off => State::Off,
            MachineState::Leaving => State::Leaving,
            MachineState::Trial => State::Trial,
            MachineState::Confirmed => State::Confirmed,
            MachineState::Bypassed => State::Bypassed,
        }
    }

    /// Publishes the status for the other tasks.
    fn publish(&self) {
        let (mut spec, _) = self.machine.wanted();
        let captured = directions(&spec);
        let virtual_addresses = spec.outbound.vips.iter().filter(|vip| !SELF_TESTS.contains(*vip)).count();
        let real_addresses = spec.outbound.addresses.len();
        spec.outbound.vips.clear();
        spec.outbound.addresses.clear();
        let trial = self.machine.trial();
        let drift = self.machine.drift();
        let status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            backend: self.executor.backend().map(|backend| backend.to_string()),
            state: self.state(),
            spec,
            virtual_addresses,
            real_addresses,
            trial: trial.map(|(number, _)| number),
            reverted: self.machine.reverted().map(str::to_owned),
            drift: Drift {
                count: drift.count,
                seconds_ago: None,
                what: drift.changes.clone(),
                by: drift.by.clone(),
            },
            notes: self.machine.notes().cloned().collect(),
            path_fault: self.machine.path_fault().map(str::to_owned),
            error: self.machine.error().map(str::to_owned),
            ..Status::default()
        };
        let (trial_until, drifted_at) = (trial.map(|(_, until)| until), drift.at);
        self.executor.channels.report.send_replace(KeeperReport {
            status,
            trial_until,
            drifted_at,
            directions: captured,
        });
    }

    /// Returns the text that `systemctl status` shows.
    fn status_text(&self) -> String {
        let state = self.state();
        match self.machine.error() {
            Some(error) => format!("{state}; {error}"),
            None if matches!(self.machine.life(), Lifecycle::AwaitsAgent { .. }) => {
                "waits for the agent and leaves all rules unchanged, because its own state could not be read"
                    .to_owned()
            }
            None => state.to_string(),
        }
    }
}

fn now() -> std::time::Instant {
    std::time::Instant::now()
}

async fn plan(
    options: &Options,
    mut spec: Spec,
    stage: Stage,
    agent_facts: &AgentFacts,
    memory: &HostMemory,
    judge: &InboundJudge,
) -> Result<String, String> {
    let host = read_host(options, &spec, agent_facts, memory).await;
    let applier = applier(options, host.ipv6).await.map_err(|error| one_line(&error))?;
    let judged = spec.inbound.ports_under_the_filter();
    let left_out = match judged.is_empty() {
        true => Vec::new(),
        false => judge.judge_with(applier.foreign_rules().await, &judged, now()).remove_conflicts(&mut spec),
    };
    let (program, notes) = match spec.is_off() {
        true => (Program::absent(), Vec::new()),
        false => Program::new(&spec, &host, stage).map_err(|error| error.to_string())?,
    };
    let actual = applier.read().await.map_err(|error| one_line(&error))?;
    let plan = applier.plan(&program, &actual, false);
    applier.check(&plan).await.map_err(|error| one_line(&error))?;
    let notes = notes.iter().map(ToString::to_string).chain(left_out);
    let notes: String = notes.map(|note| format!("note: {note}\n")).collect();
    Ok(format!("{notes}{plan}"))
}

/// Plans like [`Request::Plan`], in this process, for a host without a running vmesh-net. Needs the same
/// privileges as applying.
pub async fn plan_here(options: &Options, want: CaptureRequest) -> Result<String, String> {
    let agent_facts = AgentFacts { ports: want.ports, control_planes: want.control_planes };
    let (spec, judge) = (with_self_test(want.spec), InboundJudge::default());
    plan(options, spec, Stage::Confirmed, &agent_facts, &HostMemory::default(), &judge).await
}

fn with_self_test(mut spec: Spec) -> Spec {
    let out = &mut spec.outbound;
    if out.capture != OutboundCapture::Off {
        // If nothing of IPv6 is captured, Envoy may have no IPv6 listener.
        let has_ipv6 = out.capture == OutboundCapture::All
            || out.vips.iter().chain(out.addresses.keys()).any(SocketAddr::is_ipv6);
        out.vips.extend(SELF_TESTS.into_iter().filter(|address| address.is_ipv4() || has_ipv6));
    }
    spec
}

/// Sends a request to the keeper. Replies that the keeper is busy if it takes longer than `patience`.
pub async fn ask_keeper(to: &mpsc::Sender<KeeperRequest>, ask: Request, patience: Duration) -> KeeperReply {
    let (answer, reply) = oneshot::channel();
    let exchange = async {
        to.send(KeeperRequest { ask, answer }).await.ok()?;
        reply.await.ok()
    };
    match timeout(patience, exchange).await {
        Ok(Some(reply)) => reply,
        Ok(None) => {
            KeeperReply::Refused("vmesh-net is stopping; send the request again once it runs".to_owned())
        }
        Err(_) => KeeperReply::Refused(
            "vmesh-net is busy with a change of rules; send the request again".to_owned(),
        ),
    }
}
