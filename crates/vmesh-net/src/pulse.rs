//! The heartbeat task, which renews the dead-man timers. The task shares the thread of the socket and of the
//! probe, where nothing blocks. The keeper is on another thread, because it waits for disks and reads
//! `/proc`.
//!
//! The keeper publishes an [`Order`], which tells which timers the kernel has. This task publishes a
//! [`Heartbeat`], the state of each timer since then.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use rustix::process::{Pid, test_kill_process};
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{MissedTickBehavior, interval, timeout};
use tracing::{info, warn};
use vmesh_capture::apply::Applier;
use vmesh_capture::confirm::{Beat, Due};
use vmesh_capture::spec::Seconds;
use vmesh_capture::{Direction, Directions};
use vmesh_daemon::report::one_line;

use crate::probe::{self, Verdicts};
use crate::protocol::{Envoy, Redirects};

const TICK: Duration = Duration::from_secs(1);
/// The silence after which the agent counts as hanging.
const AGENT_SPEAKS_WITHIN: Duration = Duration::from_secs(5);
/// The limit of a local connection attempt; a closed port refuses much faster.
const SEEN_WITHIN: Duration = Duration::from_millis(500);

/// The dead-man timers in the kernel, as the keeper installed them.
#[derive(Debug, Clone)]
pub struct Order {
    pub applier: Applier,
    pub timeout: Seconds,
    /// The directions that have a timer.
    pub dead_men: Directions,
    /// Counts how often the whole ruleset was replaced, which restarts all timers.
    pub replaced: u64,
    /// The timers that the keeper renewed when it replaced the rules, at the time `at`.
    pub refreshed: Directions,
    pub at: Instant,
}

/// The state of one dead-man timer.
#[derive(Debug, Clone, Copy)]
struct DeadMan {
    beat: Beat,
    /// Whether Envoy's listener was gone at the previous check as well.
    was_gone: bool,
    /// Whether this task let the redirects lapse early, because Envoy was gone.
    is_withdrawn: bool,
    has_lapsed: bool,
}

impl DeadMan {
    fn new(timeout: Duration) -> DeadMan {
        DeadMan { beat: Beat::new(timeout), was_gone: false, is_withdrawn: false, has_lapsed: false }
    }
}

/// The state of the dead-man timers of both directions.
#[derive(Debug, Clone, Default)]
pub struct Heartbeat {
    replaced: u64,
    outbound: Option<DeadMan>,
    inbound: Option<DeadMan>,
}

impl Heartbeat {
    fn of(&mut self, direction: Direction) -> &mut Option<DeadMan> {
        match direction {
            Direction::Outbound => &mut self.outbound,
            Direction::Inbound => &mut self.inbound,
        }
    }

    fn get(&self, direction: Direction) -> Option<&DeadMan> {
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

    /// Returns the state of the timers after `order` takes effect.
    fn after(&self, order: &Order) -> Heartbeat {
        let mut next = self.clone();
        for direction in Direction::BOTH {
            if !order.dead_men.contains(direction) {
                *next.of(direction) = None;
                continue;
            }
            let is_new = self.replaced != order.replaced || self.get(direction).is_none();
            if is_new {
                let before = self.get(direction);
                let mut dead_man = DeadMan::new(order.timeout.duration());
                if order.refreshed.contains(direction) {
                    dead_man.beat.refreshed(order.at);
                } else if let Some(before) = before {
                    dead_man.has_lapsed = before.has_lapsed;
                    dead_man.is_withdrawn = before.is_withdrawn;
                }
                *next.of(direction) = Some(dead_man);
            }
        }
        next.replaced = order.replaced;
        next
    }

    /// Returns whether the redirects of a direction are in force.
    pub fn redirects(&self, order: Option<&Order>, direction: Direction, now: Instant) -> Redirects {
        let Some(order) = order else { return Redirects::None };
        match self.after(order).get(direction) {
            None => Redirects::None,
            Some(dead_man) => match dead_man.beat.due(now, false) {
                Due::Lapses(left) if !left.is_zero() && !dead_man.is_withdrawn => Redirects::Hold,
                _ => Redirects::Lapsed,
            },
        }
    }
}

/// Records which process is the agent, and when it last sent a request.
#[derive(Debug, Clone, Default)]
pub struct AgentWatch(Arc<Mutex<Agent>>);

#[derive(Debug, Default)]
struct Agent {
    pid: Option<i32>,
    spoke: Option<Instant>,
    /// The number of the agent's unanswered requests. While the agent waits for a response, it cannot report
    /// that it is well.
    waits: usize,
}

impl Agent {
    fn is_well(&self) -> bool {
        self.waits > 0 || self.spoke.is_some_and(|spoke| spoke.elapsed() < AGENT_SPEAKS_WITHIN)
    }
}

/// Counts as an unanswered request of the agent until it is dropped.
pub struct Waits(AgentWatch);

impl Drop for Waits {
    fn drop(&mut self) {
        self.0.change(|agent| {
            agent.waits = agent.waits.saturating_sub(1);
            agent.spoke = Some(Instant::now());
        });
    }
}

impl AgentWatch {
    fn change<T>(&self, change: impl FnOnce(&mut Agent) -> T) -> T {
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
                "another agent (pid {known}) says what is captured on this host, and this one (pid {pid}) is not heard: stop one \
                 of them"
            )),
            _ => {
                agent.pid = pid;
                agent.spoke = Some(Instant::now());
                Ok(())
            }
        })
    }

    /// Counts the agent as well until the returned value is dropped.
    pub fn waits(&self) -> Waits {
        self.change(|agent| agent.waits += 1);
        Waits(self.clone())
    }

    pub fn is_well(&self) -> bool {
        self.change(|agent| agent.is_well())
    }

    /// Reports whether this process is the agent.
    pub fn is(&self, pid: Option<i32>) -> bool {
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
pub struct Pulse {
    pub orders: watch::Receiver<Option<Order>>,
    pub verdicts: watch::Receiver<Verdicts>,
    /// Requests to check whether Envoy is gone; each is answered after the check.
    pub looks: mpsc::Receiver<oneshot::Sender<()>>,
    pub beats: watch::Sender<Heartbeat>,
    /// Reports to the keeper that a renewal failed, so that it reads the rules again.
    pub failed: mpsc::Sender<String>,
    pub agent: AgentWatch,
    /// The users of Envoy and of the agent.
    pub users: BTreeSet<u32>,
}

impl Pulse {
    /// Runs until the keeper has ended.
    pub async fn run(mut self) {
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                biased;
                changed = self.orders.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    self.adopt();
                }
                _ = ticks.tick() => self.attend().await,
                Some(answer) = self.looks.recv() => {
                    let mut asked = vec![answer];
                    // One check answers all pending requests. Any local user may send them.
                    while let Ok(another) = self.looks.try_recv() {
                        asked.push(another);
                    }
                    self.adopt();
                    self.go_past_envoy_if_gone(Directions::BOTH).await;
                    for answer in asked {
                        // The client may have gone.
                        _ = answer.send(());
                    }
                }
            }
        }
    }

    fn adopt(&mut self) {
        let order = self.orders.borrow_and_update().clone();
        let next = order.map_or_else(Heartbeat::default, |order| self.beats.borrow().after(&order));
        self.beats.send_replace(next);
    }

    async fn attend(&mut self) {
        let Some(order) = self.orders.borrow().clone() else { return };
        let verdicts = *self.verdicts.borrow();
        let mut gone = Directions::NONE;
        self.beats.send_modify(|beats| {
            for direction in order.dead_men.iter() {
                let Some(dead_man) = beats.of(direction) else { continue };
                let is_gone = is_gone(verdicts.of(direction));
                if is_gone && dead_man.was_gone {
                    gone = gone.with(direction);
                }
                dead_man.was_gone = is_gone;
            }
        });
        if !gone.is_empty() {
            self.go_past_envoy_if_gone(gone).await;
        }
        let mut refresh = Directions::NONE;
        let now = Instant::now();
        for direction in order.dead_men.iter() {
            let Some(dead_man) = self.beats.borrow().get(direction).copied() else { continue };
            let mut envoy = verdicts.of(direction);
            if envoy == Envoy::Well && dead_man.is_withdrawn {
                // The probe's result may be from before Envoy ended.
                envoy = probe::look_at(direction, &self.users).await;
            }
            match dead_man.beat.due(now, envoy == Envoy::Well && self.agent.is_well()) {
                Due::Refresh => refresh = refresh.with(direction),
                Due::Lapses(left) if left.is_zero() && !dead_man.has_lapsed => {
                    warn!(
                        "{direction} redirects have lapsed, since {}: new connections go past Envoy where that is allowed",
                        why_not(envoy)
                    );
                    self.change(direction, |dead_man| dead_man.has_lapsed = true);
                }
                Due::Lapses(_) | Due::Wait(_) => {}
            }
        }
        if !refresh.is_empty() {
            self.refresh(&order, refresh).await;
        }
    }

    async fn refresh(&mut self, order: &Order, directions: Directions) {
        match order.applier.refresh_only(order.timeout, directions).await {
            Ok(()) => {
                // The kernel restarted its clock before this moment, so a timer is never reported as lapsed
                // too early.
                let now = Instant::now();
                for direction in directions.iter() {
                    self.change(direction, |dead_man| {
                        if dead_man.is_withdrawn || dead_man.has_lapsed {
                            info!("Envoy and the agent are well: {direction} redirects hold again");
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
    async fn go_past_envoy_if_gone(&mut self, directions: Directions) {
        let Some(order) = self.orders.borrow().clone() else { return };
        let held = |direction: &Direction| {
            let beats = self.beats.borrow();
            directions.contains(*direction)
                && beats.get(*direction).is_some_and(|dead_man| !dead_man.is_withdrawn)
        };
        let held: Vec<Direction> = order.dead_men.iter().filter(held).collect();
        for direction in held {
            // A closed port refuses at once. An Envoy that hangs must not delay the renewal of the other
            // timer.
            let looked = timeout(SEEN_WITHIN, probe::look_at(direction, &self.users)).await;
            let envoy = looked.unwrap_or(Envoy::Hangs);
            if !is_gone(envoy) {
                continue;
            }
            match order.applier.withdraw(Directions::only(direction)).await {
                Ok(()) => {
                    warn!("{}: new {direction} connections go past it where that is allowed", why_not(envoy));
                    self.change(direction, |dead_man| {
                        dead_man.is_withdrawn = true;
                        dead_man.beat = Beat::new(order.timeout.duration());
                    });
                }
                Err(error) => warn!("{direction} redirects lapse by themselves: {}", one_line(&error)),
            }
        }
    }

    fn change(&self, direction: Direction, change: impl FnOnce(&mut DeadMan)) {
        self.beats.send_modify(|beats| {
            if let Some(dead_man) = beats.of(direction) {
                change(dead_man);
            }
        });
    }
}

/// Explains why redirects do not hold, by the probe's result.
pub fn why_not(envoy: Envoy) -> &'static str {
    match envoy {
        Envoy::Well => "the agent says nothing",
        Envoy::Gone => "Envoy is gone",
        Envoy::Stranger => "somebody else's program has Envoy's capture port",
        Envoy::Hangs => "Envoy takes connections and does not serve them",
        Envoy::Unknown | Envoy::Other => "Envoy has not been looked at",
    }
}

fn is_gone(envoy: Envoy) -> bool {
    matches!(envoy, Envoy::Gone | Envoy::Stranger)
}
