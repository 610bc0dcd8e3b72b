//! The keeper task, which drives [`vmesh_capture::machine`]: it turns requests, ticks and reports of the
//! kernel into events, and has [`crate::executor`] perform the resulting actions. The task has a thread of
//! its own, because it waits for disks, tools and `/proc`. The heartbeat runs elsewhere: see
//! [`crate::pulse`].

use std::collections::{BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use vmesh_capture::apply::{Backend, Tools};
use vmesh_capture::facts::Places;
use vmesh_capture::foreign::InboundJudge;
use vmesh_capture::generations::Generation;
use vmesh_capture::host::Memory;
use vmesh_capture::machine::{Action, AgentFacts, Event, Life, Machine, State as Decided, TICK, directions};
use vmesh_capture::spec::{Outward, SELF_TESTS, Spec, Unit};
use vmesh_capture::{Program, Stage};
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, systemd};

use crate::board::Board;
use crate::executor::{Executor, applier, read_host};
use crate::kept;
use crate::probe::{Looks, Verdicts};
use crate::protocol::{Ask, Drift, Envoy, State, Status, Want};
use crate::pulse::{AgentWatch, Heartbeat, Order};

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
    pub places: Places,
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
pub struct Question {
    pub ask: Ask,
    pub answer: oneshot::Sender<Reply>,
}

/// The keeper's reply. The status that a client gets is built by [`crate::board`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    Plan(String),
    Refused(String),
}

/// The channels between the keeper and the other tasks of the process.
pub struct Links {
    pub verdicts: watch::Receiver<Verdicts>,
    pub looks: watch::Sender<Looks>,
    pub agent: AgentWatch,
    pub beats: watch::Receiver<Heartbeat>,
    pub orders: watch::Sender<Option<Order>>,
    pub board: watch::Sender<Board>,
    /// The control groups in which units with an exclusion or a share of their own are started.
    pub nurseries: watch::Sender<BTreeSet<PathBuf>>,
}

/// The task that maintains the rules of the host.
pub struct Keeper {
    machine: Machine,
    executor: Executor,
    /// The time of the task's last wait for an event.
    turned: watch::Sender<Instant>,
    /// Set once the machine has asked for the end of the process.
    has_ended: bool,
}

impl Keeper {
    /// Begins with the state from the disk. If that cannot be read, the rules stay as they are until the
    /// agent connects.
    pub fn start(options: Options, links: Links) -> Keeper {
        let (saved, is_whole) = kept::load(&options.state_file());
        let bypassed = options.bypass_flag().exists();
        let machine = Machine::start(saved, is_whole, bypassed, options.drain, now());
        Keeper {
            machine,
            executor: Executor::new(options, links),
            turned: watch::Sender::new(Instant::now()),
            has_ended: false,
        }
    }

    /// Returns the time when the keeper was last ready for an event. A keeper for which this is long ago
    /// hangs.
    pub fn turned(&self) -> watch::Receiver<Instant> {
        self.turned.subscribe()
    }

    /// Maintains the rules until `stop` is requested, then drains and removes them. If `again` changes, ends
    /// at once and leaves the rules to the next process.
    pub async fn run(
        mut self,
        mut asked: mpsc::Receiver<Question>,
        mut changed: mpsc::Receiver<Generation>,
        mut failed: mpsc::Receiver<String>,
        mut begun: mpsc::Receiver<()>,
        mut again: watch::Receiver<bool>,
        mut stop: Stop,
    ) {
        self.take(Event::Started).await;
        systemd::ready(&self.in_words());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.turned.send_replace(Instant::now());
            tokio::select! {
                question = asked.recv() => match question {
                    Some(Question { ask, answer }) => {
                        let reply = self.answer(ask).await;
                        // The client may have gone.
                        _ = answer.send(reply);
                    }
                    None => stop.requested().await,
                },
                Some(change) = changed.recv() => {
                    sleep(SETTLES).await;
                    let mut all = vec![change];
                    while let Ok(later) = changed.try_recv() {
                        all.push(later);
                    }
                    all.retain(|change| !self.executor.is_ours(change));
                    let Some(Generation { by, pid, .. }) = all.pop() else { continue };
                    let by = (!by.is_empty()).then(|| format!("{by} (pid {pid})"));
                    let bypassed = self.is_bypassed();
                    self.take(Event::RulesChanged { by, bypassed }).await;
                }
                Some(()) = begun.recv() => {
                    sleep(SETTLES).await;
                    _ = begun.try_recv();
                    self.take(Event::UnitsStarted).await;
                }
                Some(why) = failed.recv() => {
                    self.take(Event::RefreshFailed(why)).await;
                }
                _ = ticks.tick() => self.tick().await,
                Ok(()) = again.changed() => {
                    self.take(Event::Handover).await;
                    return;
                }
                () = stop.requested() => break,
            }
        }
        systemd::stopping();
        self.take(Event::Stop).await;
        while !self.has_ended {
            self.turned.send_replace(Instant::now());
            sleep(TICK / 2).await;
            self.tick().await;
        }
    }

    fn is_bypassed(&self) -> bool {
        self.executor.options.bypass_flag().exists()
    }

    async fn tick(&mut self) {
        let outbound_is_well = self.executor.links.verdicts.borrow().outbound == Envoy::Well;
        let bypassed = self.is_bypassed();
        self.take(Event::Tick { bypassed, outbound_is_well }).await;
        systemd::status(&self.in_words());
    }

    /// Passes an event to the machine, performs all resulting actions, and publishes the new status. Returns
    /// the machine's reply if the event was a request.
    async fn take(&mut self, event: Event) -> Option<Result<(), String>> {
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

    async fn answer(&mut self, ask: Ask) -> Reply {
        let event = match ask {
            // The server answers these requests without the keeper.
            Ask::Status | Ask::Look | Ask::Well => return Reply::Done,
            Ask::Plan { want } => {
                return match self.plan(want).await {
                    Ok(text) => Reply::Plan(text),
                    Err(why) => Reply::Refused(why),
                };
            }
            Ask::Want(want) => {
                let patience = want.confirm_within.clamp(*PATIENCE.start(), *PATIENCE.end());
                Event::Want {
                    spec: Box::new(with_self_test(want.spec)),
                    known: AgentFacts { ports: want.ports, control_planes: want.control_planes },
                    patience: Duration::from_secs(patience.into()),
                }
            }
            Ask::Confirm { trial } => Event::Confirm { trial },
            Ask::Revert { trial, why } => Event::Revert { trial, why },
            Ask::Retry => Event::Retry,
        };
        match self.take(event).await {
            Some(Ok(())) => Reply::Done,
            Some(Err(why)) => Reply::Refused(why),
            None => Reply::Refused("vmesh-net has no answer to this: see its log".to_owned()),
        }
    }

    async fn plan(&self, want: Option<Want>) -> Result<String, String> {
        let (spec, stage) = match &want {
            Some(want) => {
                want.spec.limits().map_err(|error| error.to_string())?;
                (with_self_test(want.spec.clone()), Stage::Confirmed)
            }
            None => self.machine.wanted(),
        };
        let known = want.map_or_else(
            || self.machine.known().clone(),
            |want| AgentFacts { ports: want.ports, control_planes: want.control_planes },
        );
        let judge = self.machine.filter();
        plan(&self.executor.options, spec, stage, &known, self.machine.memory(), judge).await
    }

    fn state(&self) -> State {
        match self.machine.state() {
            Decided::Off => State::Off,
            Decided::Leaving => State::Leaving,
            Decided::Trial => State::Trial,
            Decided::Confirmed => State::Confirmed,
            Decided::Bypassed => State::Bypassed,
        }
    }

    /// Publishes the status for the other tasks.
    fn publish(&self) {
        let (mut spec, _) = self.machine.wanted();
        let looks = directions(&spec);
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
                what: drift.what.clone(),
                by: drift.by.clone(),
            },
            notes: self.machine.notes().cloned().collect(),
            path_fault: self.machine.path_fault().map(str::to_owned),
            error: self.machine.error().map(str::to_owned),
            ..Status::default()
        };
        let (trial_until, drifted_at) = (trial.map(|(_, until)| until), drift.at);
        self.executor.links.board.send_replace(Board { status, trial_until, drifted_at, looks });
    }

    /// Returns the text that `systemctl status` shows.
    fn in_words(&self) -> String {
        let state = self.state();
        match self.machine.error() {
            Some(error) => format!("{state}; {error}"),
            None if matches!(self.machine.life(), Life::AwaitsAgent { .. }) => {
                "waits for the agent; rules are left as they are".to_owned()
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
    known: &AgentFacts,
    memory: &Memory,
    judge: &InboundJudge,
) -> Result<String, String> {
    let host = read_host(options, &spec, known, memory).await;
    let applier = applier(options, host.ipv6).await.map_err(|error| one_line(&error))?;
    let judged = spec.inbound.ports_under_the_filter();
    let left_out = match judged.is_empty() {
        true => Vec::new(),
        false => judge.judge_by(applier.foreign_rules().await, &judged, now()).leave_out(&mut spec),
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

/// Plans like [`Ask::Plan`], in this process, for a host without a running vmesh-net. Needs the same
/// privileges as applying.
pub async fn plan_here(options: &Options, want: Want) -> Result<String, String> {
    let known = AgentFacts { ports: want.ports, control_planes: want.control_planes };
    let (spec, judge) = (with_self_test(want.spec), InboundJudge::default());
    plan(options, spec, Stage::Confirmed, &known, &Memory::default(), &judge).await
}

fn with_self_test(mut spec: Spec) -> Spec {
    let out = &mut spec.outbound;
    if out.capture != Outward::Off {
        // If nothing of IPv6 is captured, Envoy may have no IPv6 listener.
        let has_ipv6 = out.capture == Outward::All
            || out.vips.iter().chain(out.addresses.keys()).any(SocketAddr::is_ipv6);
        out.vips.extend(SELF_TESTS.into_iter().filter(|address| address.is_ipv4() || has_ipv6));
    }
    spec
}

/// Sends a request to the keeper. Replies that the keeper is busy if it takes longer than `patience`.
pub async fn asked(to: &mpsc::Sender<Question>, ask: Ask, patience: Duration) -> Reply {
    let (answer, said) = oneshot::channel();
    let exchange = async {
        to.send(Question { ask, answer }).await.ok()?;
        said.await.ok()
    };
    match timeout(patience, exchange).await {
        Ok(Some(reply)) => reply,
        Ok(None) => Reply::Refused("vmesh-net is stopping".to_owned()),
        Err(_) => Reply::Refused("vmesh-net is busy changing rules: ask again".to_owned()),
    }
}
