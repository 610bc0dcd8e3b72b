//! The heartbeat task, which renews the dead-man timers. The task shares the thread of the socket and of the
//! probe, where nothing blocks. The keeper is on another thread, because it waits for disks and reads
//! `/proc`.
//!
//! The keeper publishes an [`InstalledTimers`], which tells which timers the kernel has. This task publishes a
//! [`TimerStates`], the state of each timer since then.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, test_kill_process};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};
use vmesh_capture::apply::Applier;
use vmesh_capture::confirm::{Heartbeat, HeartbeatStep};
use vmesh_capture::spec::Seconds;
use vmesh_capture::{Direction, Directions};
use vmesh_daemon::report::one_line;

use crate::probe::{self, ProbeResults};
use crate::protocol::{EnvoyHealth, RedirectState};

const TICK: Duration = Duration::from_secs(1);
/// The silence after which the agent counts as hanging.
const AGENT_SPEAKS_WITHIN: Duration = Duration::from_secs(5);
/// The limit of a local connection attempt; a closed port refuses much faster.
const SEEN_WITHIN: Duration = Duration::from_millis(500);

/// The dead-man timers in the kernel, as the keeper installed them.
#[derive(Debug, Clone)]
pub struct InstalledTimers {
    pub applier: Applier,
    pub timeout: Seconds,
    /// The directions that have a timer.
    pub directions: Directions,
    /// Counts how often the whole ruleset was replaced, which restarts all timers.
    pub replaced: u64,
    /// The timers that the keeper renewed when it replaced the rules, at the time `at`.
    pub refreshed: Directions,
    pub at: Instant,
}

/// The state of one dead-man timer.
#[derive(Debug, Clone, Copy)]
struct TimerState {
    beat: Heartbeat,
    /// Whether Envoy's listener was gone at the previous check as well.
    was_gone: bool,
    /// Whether this task let the redirects lapse early, because Envoy was gone.
    is_withdrawn: bool,
    has_lapsed: bool,
}

impl TimerState {
    fn new(timeout: Duration) -> TimerState {
        TimerState { beat: Heartbeat::new(timeout), was_gone: false, is_withdrawn: false, has_lapsed: false }
    }
}

/// The state of the dead-man timers of both directions.
#[derive(Debug, Clone, Default)]
pub struct TimerStates {
    replaced: u64,
    outbound: Option<TimerState>,
    inbound: Option<TimerState>,
}

impl TimerStates {
    fn slot(&mut self, direction: Direction) -> &mut Option<TimerState> {
        match direction {
            Direction::Outbound => &mut self.outbound,
            Direction::Inbound => &mut self.inbound,
        }
    }

    fn get(&self, direction: Direction) -> Option<&TimerState> {
        match direction {
            Direction::Outbound => self.outbound.as_ref(),
            Direction::Inbound => self.inbound.as_ref(),
        }
    }

    /// Returns the directions whose redirects this task let lapse early.
    pub fn withdrawn(&self) -> Directions {
        let is = |direction: &Direction| self.get(*direction).is_some_and(|dead_man| dead_man.is_withdrawn);
        Direction::BOTH.into_iter().filter(is).collect()
    }

    /// Returns the state of the timers after `installed` takes effect.
    fn after(&self, installed: &InstalledTimers) -> TimerStates {
        let mut next = self.clone();
        for direction in Direction::BOTH {
            if !installed.directions.contains(direction) {
                *next.slot(direction) = None;
                continue;
            }
            let is_new = self.replaced != installed.replaced || self.get(direction).is_none();
            if is_new {
                let before = self.get(direction);
                let mut dead_man = TimerState::new(installed.timeout.duration());
                if installed.refreshed.contains(direction) {
                    dead_man.beat.refreshed(installed.at);
                } else if let Some(before) = before {
                    dead_man.has_lapsed = before.has_lapsed;
                    dead_man.is_withdrawn = before.is_withdrawn;
                }
                *next.slot(direction) = Some(dead_man);
            }
        }
        next.replaced = installed.replaced;
        next
    }

    /// Returns whether the redirects of a direction are in force.
    pub fn redirects(
        &self,
        installed: Option<&InstalledTimers>,
        direction: Direction,
        now: Instant,
    ) -> RedirectState {
        let Some(installed) = installed else { return RedirectState::None };
        match self.after(installed).get(direction) {
            None => RedirectState::None,
            Some(dead_man) => match dead_man.beat.due(now, false) {
                HeartbeatStep::Lapses(left) if !left.is_zero() && !dead_man.is_withdrawn => {
                    RedirectState::Hold
                }
                _ => RedirectState::Lapsed,
            },
        }
    }
}

/// Records which process is the agent, and when it last sent a request.
#[derive(Debug, Clone, Default)]
pub struct AgentWatch(Arc<Mutex<AgentState>>);

#[derive(Debug, Default)]
struct AgentState {
    pid: Option<i32>,
    spoke: Option<Instant>,
    /// The number of the agent's unanswered requests. While the agent waits for a response, it cannot report
    /// that it is well.
    waits: usize,
}

impl AgentState {
    fn is_well(&self) -> bool {
        self.waits > 0 || self.spoke.is_some_and(|spoke| spoke.elapsed() < AGENT_SPEAKS_WITHIN)
    }
}

/// Counts as an unanswered request of the agent until it is dropped.
pub struct PendingRequest(AgentWatch);

impl Drop for PendingRequest {
    fn drop(&mut self) {
        self.0.change(|agent| {
            agent.waits = agent.waits.saturating_sub(1);
            agent.spoke = Some(Instant::now());
        });
    }
}

impl AgentWatch {
    fn change<T>(&self, change: impl FnOnce(&mut AgentState) -> T) -> T {
        change(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Records that the agent has just sent a request. vmesh-net accepts one agent at a time: two would undo
    /// each other's changes.
    ///
    /// # Errors
    /// If another process is the agent, and is alive and well.
    pub fn accept(&self, pid: Option<i32>) -> Result<(), String> {
        self.change(|agent| match (agent.pid.filter(|_| agent.is_well()), pid) {
            (Some(known), Some(pid)) if known != pid && lives(known) => Err(format!(
                "another agent (pid {known}) controls the capture of this host, so the request of this agent (pid {pid}) is refused: \
                 stop one of the two"
            )),
            _ => {
                agent.pid = pid;
                agent.spoke = Some(Instant::now());
                Ok(())
            }
        })
    }

    /// Counts the agent as well until the returned value is dropped.
    pub fn track_request(&self) -> PendingRequest {
        self.change(|agent| agent.waits += 1);
        PendingRequest(self.clone())
    }

    pub fn is_well(&self) -> bool {
        self.change(|agent| agent.is_well())
    }

    /// Reports whether this process is the agent.
    pub fn is_agent(&self, pid: Option<i32>) -> bool {
        pid.is_some() && self.change(|agent| agent.pid == pid)
    }

    /// Returns the time since the agent's last request.
    pub fn silent_for(&self) -> Option<Duration> {
        self.change(|agent| agent.spoke.map(|spoke| spoke.elapsed()))
    }
}

/// Reports whether a process is running. A process that this one may not signal counts as running.
fn lives(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// The heartbeat task, with the channels to the other tasks.
pub struct HeartbeatTask {
    pub installed: watch::Receiver<Option<InstalledTimers>>,
    pub probe_results: watch::Receiver<ProbeResults>,
    /// Requests to check whether Envoy is gone; each is answered after the check.
    pub looks: mpsc::Receiver<oneshot::Sender<()>>,
    pub timers: watch::Sender<TimerStates>,
    /// Reports to the keeper that a renewal failed, so that it reads the rules again.
    pub failed: mpsc::Sender<String>,
    pub agent: AgentWatch,
    /// The users of Envoy and of the agent.
    pub users: BTreeSet<u32>,
}

impl HeartbeatTask {
    /// Runs until the keeper has ended.
    pub async fn run(mut self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                changed = self.installed.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.adopt_installed_timers();
                }
                _ = ticks.tick() => self.run_heartbeat().await,
                Some(answer) = self.looks.recv() => {
                    let mut asked = vec![answer];
                    // One check answers all pending requests. Any local user may send them.
                    while let Ok(another) = self.looks.try_recv() {
                        asked.push(another);
                    }
                    self.adopt_installed_timers();
                    self.expire_if_envoy_gone(Directions::BOTH).await;
                    for answer in asked {
                        // The client may have gone.
                        _ = answer.send(());
                    }
                }
            }
        }
    }

    fn adopt_installed_timers(&mut self) {
        let installed = self.installed.borrow_and_update().clone();
        let next =
            installed.map_or_else(TimerStates::default, |installed| self.timers.borrow().after(&installed));
        self.timers.send_replace(next);
    }

    async fn run_heartbeat(&mut self) {
        let Some(installed) = self.installed.borrow().clone() else { return };
        let probe_results = *self.probe_results.borrow();
        let mut gone = Directions::NONE;
        self.timers.send_modify(|timers| {
            for direction in installed.directions.iter() {
                let Some(dead_man) = timers.slot(direction) else { continue };
                let is_gone = is_gone(probe_results.of(direction));
                if is_gone && dead_man.was_gone {
                    gone = gone.with(direction);
                }
                dead_man.was_gone = is_gone;
            }
        });
        if !gone.is_empty() {
            self.expire_if_envoy_gone(gone).await;
        }
        let mut refresh = Directions::NONE;
        let now = Instant::now();
        for direction in installed.directions.iter() {
            let Some(dead_man) = self.timers.borrow().get(direction).copied() else { continue };
            let mut envoy = probe_results.of(direction);
            if envoy == EnvoyHealth::Well && dead_man.is_withdrawn {
                // The probe's result may be from before Envoy ended.
                envoy = probe::probe_listener(direction, &self.users).await;
            }
            match dead_man.beat.due(now, envoy == EnvoyHealth::Well && self.agent.is_well()) {
                HeartbeatStep::Refresh => refresh = refresh.with(direction),
                HeartbeatStep::Lapses(left) if left.is_zero() && !dead_man.has_lapsed => {
                    warn!(
                        "{direction} redirects have lapsed ({}): new connections go past Envoy where `on_loss: open` allows it",
                        explain_lapse(envoy)
                    );
                    self.change(direction, |dead_man| dead_man.has_lapsed = true);
                }
                HeartbeatStep::Lapses(_) | HeartbeatStep::Wait(_) => {}
            }
        }
        if !refresh.is_empty() {
            self.refresh(&installed, refresh).await;
        }
    }

    async fn refresh(&mut self, installed: &InstalledTimers, directions: Directions) {
        match installed.applier.renew_timers(installed.timeout, directions).await {
            Ok(()) => {
                // The kernel restarted its clock before this moment, so a timer is never reported as lapsed
                // too early.
                let now = Instant::now();
                for direction in directions.iter() {
                    self.change(direction, |dead_man| {
                        if dead_man.is_withdrawn || dead_man.has_lapsed {
                            info!("Envoy and the agent are well again: {direction} redirects hold");
                        }
                        dead_man.is_withdrawn = false;
                        dead_man.has_lapsed = false;
                        dead_man.beat.refreshed(now);
                    });
                }
            }
            Err(error) => {
                // If the channel is full, a pending message already reports a failure.
                _ = self.failed.try_send(one_line(&error));
            }
        }
    }

    /// Lets redirects that may fail open lapse at once if Envoy's listener is gone. Checks the listener again
    /// first, because the probe's result may be a second old.
    async fn expire_if_envoy_gone(&mut self, directions: Directions) {
        let Some(installed) = self.installed.borrow().clone() else { return };
        let held = |direction: &Direction| {
            let timers = self.timers.borrow();
            directions.contains(*direction)
                && timers.get(*direction).is_some_and(|dead_man| !dead_man.is_withdrawn)
        };
        let held: Vec<Direction> = installed.directions.iter().filter(held).collect();
        for direction in held {
            // A closed port refuses at once. An Envoy that hangs must not delay the renewal of the other
            // timer.
            let looked = timeout(SEEN_WITHIN, probe::probe_listener(direction, &self.users)).await;
            let envoy = looked.unwrap_or(EnvoyHealth::Hangs);
            if !is_gone(envoy) {
                continue;
            }
            match installed.applier.expire_timers(Directions::only(direction)).await {
                Ok(()) => {
                    warn!(
                        "{direction} redirects have lapsed ({}): new connections go past Envoy where `on_loss: open` allows it",
                        explain_lapse(envoy)
                    );
                    self.change(direction, |dead_man| {
                        dead_man.is_withdrawn = true;
                        dead_man.beat = Heartbeat::new(installed.timeout.duration());
                    });
                }
                Err(error) => warn!(
                    "could not let {direction} redirects lapse at once; they lapse when their timer ends: {}",
                    one_line(&error)
                ),
            }
        }
    }

    fn change(&self, direction: Direction, change: impl FnOnce(&mut TimerState)) {
        self.timers.send_modify(|timers| {
            if let Some(dead_man) = timers.slot(direction) {
                change(dead_man);
            }
        });
    }
}

/// Explains why redirects do not hold, by the probe's result.
pub fn explain_lapse(envoy: EnvoyHealth) -> &'static str {
    match envoy {
        EnvoyHealth::Well => "the agent does not report that it is well",
        EnvoyHealth::Gone => "Envoy's capture port is closed",
        EnvoyHealth::WrongUser => "a program of another user listens on Envoy's capture port",
        EnvoyHealth::Hangs => "Envoy accepts connections and does not serve them",
        EnvoyHealth::Unknown | EnvoyHealth::Other => "Envoy was not probed",
    }
}

fn is_gone(envoy: EnvoyHealth) -> bool {
    matches!(envoy, EnvoyHealth::Gone | EnvoyHealth::WrongUser)
}
