//! What is on the host, and why. One task owns all of it: the judgement is [`vmesh_capture::confirm`]'s, which is pure; here it
//! is told the time, written to disk, and made so.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::process::{Pid, test_kill_process};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, error, info, warn};
use vmesh_capture::apply::{Actual, Applier, Backend, Error, Ran, Tools};
use vmesh_capture::confirm::{Beat, Commit, Due, Proposed, State as Committed, is_routine, leaving};
use vmesh_capture::facts::{Own, Places, Session};
use vmesh_capture::host::{Host, Memory};
use vmesh_capture::spec::{INBOUND_PORT, Inward, OUTBOUND_PORT, Outward, Spec, Unit};
use vmesh_capture::{Plan, Program, Stage};
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, fsx, systemd};

use crate::probe::{self, Looks, SELF_TEST};
use crate::protocol::{Answer, Ask, Drift, Envoy, Redirects, State, Status, Want};
use crate::rules::Changed;

const TICK: Duration = Duration::from_secs(1);
/// How often everything is looked at though nobody said that it changed.
const LOOKS_EVERY: u64 = 60;
/// The same where changes are not told: units that were restarted have another control group, and iptables with its own part in
/// the kernel tells nobody.
const LOOKS_OFTEN_EVERY: u64 = 10;
/// Where others change their rules all the time, ours are looked at no more often than this.
const RESTS: Duration = Duration::from_secs(1);
/// What could not be done may be possible later: a lock is released, a disk has room.
const TRIES_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Endpoints that come and go are written together.
const SAVES_AFTER: Duration = Duration::from_secs(10);
/// Changes come in bursts: a firewall that loads its rules makes several.
const SETTLES: Duration = Duration::from_millis(50);
/// An agent that says nothing for so long is not well.
const AGENT_SPEAKS_WITHIN: Duration = Duration::from_secs(5);
/// On this host nobody takes longer to refuse a connection.
const SEEN_WITHIN: Duration = Duration::from_millis(500);
/// An agent that runs at all has spoken by then.
const AGENT_BEGINS_WITHIN: Duration = Duration::from_secs(120);
/// A trial may not be endless, nor too short for anybody to confirm it.
const PATIENCE: std::ops::RangeInclusive<u32> = 5..=3600;
const MAX_STATE: u64 = 16 << 20;

/// What this host is told at the start.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whichever works, if it is not said.
    pub backend: Option<Backend>,
    pub tools: Tools,
    pub places: Places,
    /// Envoy's user and the agent's.
    pub users: BTreeSet<u32>,
    /// Slices of vmesh that are never empty.
    pub slices: BTreeSet<Unit>,
    pub state_dir: PathBuf,
    /// How long connections through redirects are waited for when nothing is to be captured any more.
    pub drain: Duration,
}

impl Options {
    fn state_file(&self) -> PathBuf {
        self.state_dir.join("state.json")
    }

    /// What `/usr/lib/vmesh/bypass` writes.
    fn bypass_flag(&self) -> PathBuf {
        self.state_dir.join("bypass")
    }
}

/// A question, and where its answer goes.
pub struct Question {
    pub ask: Ask,
    /// Whoever asks, where the kernel says which process that is.
    pub pid: Option<i32>,
    pub answer: oneshot::Sender<Answer>,
}

/// What is on the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Kept {
    commit: Committed,
    known: Known,
    refused: Option<(Spec, String)>,
    memory: Memory,
}

pub struct Keeper {
    options: Options,
    applier: Option<Applier>,
    /// By what else there may be rules of an earlier process; none once it was seen that there are none.
    others: Vec<Applier>,
    /// What was captured is not known: until the agent says it, or this moment, the kernel's rules stay as they are.
    awaits_agent: Option<Instant>,
    commit: Commit,
    known: Known,
    trial: u64,
    /// The sessions from when the trial began.
    sessions: Vec<Session>,
    /// What was taken back, and why: it is not tried again until somebody says so.
    refused: Option<(Spec, String)>,
    /// Why the trial could not be confirmed so far.
    doubt: Option<String>,
    beat: Beat,
    /// When it was last ready for whatever comes next.
    turned: watch::Sender<Instant>,
    envoy: watch::Receiver<Envoy>,
    looks: watch::Sender<Looks>,
    /// Envoy was gone at the last look, too.
    was_gone: bool,
    /// The redirects were taken back before their time.
    withdrawn: bool,
    lapsed: bool,
    agent_spoke: Option<Instant>,
    /// The agent's process.
    agent: Option<i32>,
    leaving_since: Option<std::time::Instant>,
    stopping: bool,
    bypassed: bool,
    on_host: Option<Program>,
    /// What is known to be in the kernel, as long as nobody else changed anything.
    actual: Option<Actual>,
    /// What was read of the host last.
    host: Option<Host>,
    memory: Memory,
    /// When its rules were last looked at.
    looked: Option<Instant>,
    look_soon: bool,
    /// Open ones through a redirect, when somebody last asked.
    connections: usize,
    /// When endpoints that came and went are to be written to the disk.
    save_at: Option<Instant>,
    notes: Vec<String>,
    error: Option<String>,
    drift: Drift,
    drifted_at: Option<Instant>,
    changed_by: Option<(Instant, Changed)>,
}

/// What the agent knows of itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Known {
    ports: BTreeSet<u16>,
    control_planes: BTreeSet<SocketAddr>,
}

impl Keeper {
    /// Begins with what the disk has. Where that cannot be read, the rules stay as they are until the agent's next word.
    pub fn start(options: Options, envoy: watch::Receiver<Envoy>, looks: watch::Sender<Looks>) -> Keeper {
        let (kept, is_whole) = load(&options.state_file());
        let bypassed = options.bypass_flag().exists();
        let (commit, reverted) = Commit::start(kept.commit, bypassed);
        let mut refused = kept.refused;
        if let Some(spec) = reverted {
            warn!("what was on trial when vmesh-net ended is taken back");
            // It may be why.
            refused = Some((spec, "vmesh-net ended while it was on trial".to_owned()));
        }
        Keeper {
            applier: None,
            others: Vec::new(),
            awaits_agent: (!is_whole).then(|| Instant::now() + AGENT_BEGINS_WITHIN),
            beat: Beat::new(commit.wanted().0.dead_man.timeout.duration()),
            commit,
            known: kept.known,
            trial: 0,
            turned: watch::Sender::new(Instant::now()),
            sessions: Vec::new(),
            refused,
            doubt: None,
            envoy,
            looks,
            was_gone: false,
            withdrawn: false,
            lapsed: false,
            agent_spoke: None,
            agent: None,
            leaving_since: None,
            stopping: false,
            bypassed,
            on_host: None,
            actual: None,
            save_at: None,
            connections: 0,
            host: None,
            memory: kept.memory,
            looked: None,
            look_soon: false,
            notes: Vec::new(),
            error: None,
            drift: Drift::default(),
            drifted_at: None,
            changed_by: None,
            options,
        }
    }

    /// When it was last ready for whatever comes next: one for which this is long ago hangs.
    pub fn turned(&self) -> watch::Receiver<Instant> {
        self.turned.subscribe()
    }

    /// Keeps the host as it is wanted until `stop`, and then leaves it as it was. When `again` changes it ends as well, and leaves
    /// the rules to the process that comes next.
    pub async fn run(
        mut self,
        mut asked: mpsc::Receiver<Question>,
        mut changed: mpsc::Receiver<Changed>,
        mut again: watch::Receiver<bool>,
        mut stop: Stop,
    ) {
        self.bring().await;
        systemd::ready(&self.in_words());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count = 0;
        loop {
            self.turned.send_replace(Instant::now());
            tokio::select! {
                question = asked.recv() => match question {
                    Some(Question { ask, pid, answer }) => {
                        let said = match self.hears(&ask, pid) {
                            Ok(()) => self.answer(ask).await,
                            Err(why) => Answer::Refused(why),
                        };
                        // Whoever asked may have gone.
                        _ = answer.send(said);
                    }
                    None => stop.requested().await,
                },
                Some(change) = changed.recv() => {
                    sleep(SETTLES).await;
                    let mut all = vec![change];
                    while let Ok(later) = changed.try_recv() {
                        all.push(later);
                    }
                    all.retain(|change| !self.is_ours(change));
                    let Some(change) = all.pop() else { continue };
                    self.actual = None;
                    self.changed_by = Some((Instant::now(), change));
                    // The script sets its flag before it changes any rule, so that they are not mended behind its back.
                    if self.see_bypass() {
                        self.bring().await;
                    } else if !self.wanted().0.is_off() {
                        match self.looked.is_some_and(|looked| looked.elapsed() < RESTS) {
                            true => self.look_soon = true,
                            false => self.mend().await,
                        }
                    }
                }
                _ = ticks.tick() => {
                    count += 1;
                    self.tick(count % self.looks_every() == 0).await;
                }
                Ok(()) = again.changed() => return self.end_untried(),
                () = stop.requested() => break,
            }
        }
        self.end_untried();
        self.leave().await;
    }

    /// What is told to end in a trial does not end by it: it is not confirmed, and not refused either.
    fn end_untried(&mut self) {
        self.commit.revert();
        if let Err(error) = self.save() {
            warn!("after the next start an older state would be in force: {error}");
        }
    }

    async fn leave(&mut self) {
        self.stopping = true;
        self.leaving_since.get_or_insert_with(std::time::Instant::now);
        systemd::stopping();
        loop {
            self.turned.send_replace(Instant::now());
            self.bring().await;
            let gone = self.on_host.as_ref().is_some_and(Program::is_absent);
            if gone {
                info!("the host's rules are as they were");
                return;
            }
            if self.error.is_some()
                && self.leaving_since.is_some_and(|since| since.elapsed() > 2 * self.options.drain)
            {
                error!(
                    "the rules of vmesh could not be taken away: run /usr/lib/vmesh/bypass ({})",
                    self.error.as_deref().unwrap_or_default()
                );
                return;
            }
            sleep(TICK / 2).await;
        }
    }

    fn wanted(&self) -> (Spec, Stage) {
        match self.stopping {
            true => (Spec::default(), Stage::Confirmed),
            false => {
                let (spec, stage) = self.commit.wanted();
                (spec.clone(), stage)
            }
        }
    }

    async fn tick(&mut self, look: bool) {
        let again =
            self.error.is_some() && self.looked.is_none_or(|looked| looked.elapsed() >= TRIES_AGAIN_AFTER);
        let waited = self.awaits_agent.is_some_and(|until| Instant::now() >= until);
        let mut bring = self.see_bypass() || look || again || waited || self.leaving_since.is_some();
        if std::mem::take(&mut self.look_soon) && !bring {
            self.mend().await;
        }
        if let Some(spec) = self.commit.tick(std::time::Instant::now()) {
            let doubt = self.doubt.take().unwrap_or_else(|| "nobody confirmed it in time".to_owned());
            self.taken_back(spec, doubt);
            bring = true;
        }
        if bring {
            self.bring().await;
        }
        if self.save_at.is_some_and(|at| at <= Instant::now())
            && let Err(error) = self.save()
        {
            warn!("after a restart what was known before would be in force, until the agent speaks: {error}");
        }
        self.hold_off_dead_man().await;
        systemd::status(&self.in_words());
    }

    /// Whether the flag of the bypass came or went.
    fn see_bypass(&mut self) -> bool {
        let bypassed = self.options.bypass_flag().exists();
        let changed = std::mem::replace(&mut self.bypassed, bypassed) != bypassed;
        if changed {
            info!("{}", if bypassed { "bypassed: nothing is captured" } else { "the bypass is lifted" });
            self.commit.set_bypassed(bypassed);
        }
        changed
    }

    /// Remembers why; what is wanted is what it was before.
    fn taken_back(&mut self, spec: Spec, why: String) {
        warn!("a change of capture is taken back: {why}");
        self.refused = Some((spec, why));
        if let Err(error) = self.save() {
            warn!("{error}");
        }
    }

    async fn hold_off_dead_man(&mut self) {
        if !self.on_host.as_ref().is_some_and(Program::has_dead_man) {
            self.lapsed = false;
            return;
        }
        let (spec, _) = self.wanted();
        let timeout = spec.dead_man.timeout;
        let envoy = *self.envoy.borrow();
        let now = std::time::Instant::now();
        let gone = is_gone(envoy);
        if gone && self.was_gone {
            self.go_past_envoy_if_gone().await;
        }
        self.was_gone = gone;
        let mut well = envoy == Envoy::Well && self.agent_is_well();
        if well && self.withdrawn {
            // It may have been seen before it went.
            well = probe::look_at_all(looks(&spec), &self.options.users).await == Envoy::Well;
        }
        let Some(applier) = &self.applier else { return };
        match self.beat.due(now, well) {
            Due::Refresh => match applier.refresh(timeout).await {
                Ok(()) => {
                    if std::mem::take(&mut self.withdrawn) || std::mem::take(&mut self.lapsed) {
                        info!("Envoy and the agent are well: redirects hold again");
                    }
                    self.lapsed = false;
                    self.beat.refreshed(now);
                }
                Err(error) => {
                    self.error = Some(one_line(&error));
                    warn!("{}", one_line(&error));
                    self.bring().await;
                }
            },
            Due::Lapses(left) if left.is_zero() && !self.lapsed => {
                warn!(
                    "redirects have lapsed, since {}: new connections go past Envoy where that is allowed",
                    what_is_wrong(envoy)
                );
                self.lapsed = true;
            }
            Due::Lapses(_) | Due::Wait(_) => {}
        }
    }

    /// Takes the redirects back that may fail open, if Envoy is gone by now: what was seen of it may be a second old.
    async fn go_past_envoy_if_gone(&mut self) {
        let (spec, _) = self.wanted();
        if self.withdrawn || !self.on_host.as_ref().is_some_and(Program::has_dead_man) {
            return;
        }
        // One that is gone is so at once; whoever asks must not keep everything waiting for one that hangs.
        let looked = timeout(SEEN_WITHIN, probe::look_at_all(looks(&spec), &self.options.users)).await;
        let envoy = looked.unwrap_or(Envoy::Hangs);
        let Some(applier) = self.applier.as_ref().filter(|_| is_gone(envoy)) else { return };
        match applier.withdraw().await {
            Ok(()) => {
                warn!("{}: new connections go past it where that is allowed", what_is_wrong(envoy));
                self.withdrawn = true;
                self.beat = Beat::new(spec.dead_man.timeout.duration());
            }
            Err(error) => warn!("redirects lapse by themselves: {}", one_line(&error)),
        }
    }

    fn agent_is_well(&self) -> bool {
        self.agent_spoke.is_some_and(|spoke| spoke.elapsed() < AGENT_SPEAKS_WITHIN)
    }

    /// One agent at a time says what is wanted: of two, each would undo what the other has done.
    fn hears(&mut self, ask: &Ask, pid: Option<i32>) -> Result<(), String> {
        if !matches!(ask, Ask::Want(_) | Ask::Well) {
            return Ok(());
        }
        match (self.agent.filter(|_| self.agent_is_well()), pid) {
            (Some(agent), Some(pid)) if agent != pid && lives(agent) => Err(format!(
                "another agent (pid {agent}) says what is captured on this host, and this one (pid {pid}) is not heard: stop one \
                 of them"
            )),
            _ => {
                self.agent = pid;
                Ok(())
            }
        }
    }

    async fn answer(&mut self, ask: Ask) -> Answer {
        match ask {
            // The kernel walks all of its connections for this: not for what is asked every second.
            Ask::Status => self.connections = self.options.places.redirected(),
            Ask::Plan { want } => {
                return match self.plan(want).await {
                    Ok(text) => Answer::Plan(text),
                    Err(why) => Answer::Refused(why),
                };
            }
            Ask::Look => self.go_past_envoy_if_gone().await,
            Ask::Well => self.agent_spoke = Some(Instant::now()),
            Ask::Want(want) => {
                self.agent_spoke = Some(Instant::now());
                if let Err(why) = self.want(want).await {
                    return Answer::Refused(why);
                }
            }
            Ask::Confirm { trial } => {
                if let Err(why) = self.confirm(trial).await {
                    self.doubt = Some(why.clone());
                    return Answer::Refused(why);
                }
            }
            Ask::Revert { trial, why } => {
                let on_trial = if trial == self.trial { self.commit.revert() } else { None };
                let Some(spec) = on_trial else {
                    return Answer::Refused("nothing of that number is on trial".to_owned());
                };
                self.taken_back(spec, why);
                self.bring().await;
            }
            Ask::Retry => {
                self.refused = None;
                if let Err(error) = self.save() {
                    warn!("after a restart it would not be tried again: {error}");
                }
            }
        }
        Answer::Status(Box::new(self.status()))
    }

    async fn want(&mut self, want: Want) -> Result<(), String> {
        self.awaits_agent = None;
        let spec = with_self_test(want.spec);
        let known = Known { ports: want.ports, control_planes: want.control_planes };
        let known_changed = self.known != known;
        self.known = known;
        let is_refused = self.refused.as_ref().is_some_and(|(refused, _)| is_routine(refused, &spec));
        let spec = if is_refused { self.confirmed_with_endpoints_of(spec) } else { spec };
        let patience = want.confirm_within.clamp(*PATIENCE.start(), *PATIENCE.end());
        let now = std::time::Instant::now();
        let mut read = None;
        match self.commit.propose(spec, now, Duration::from_secs(patience.into())) {
            Proposed::Same if !known_changed => return Ok(()),
            // Of endpoints the agent speaks again at once after a restart: the disk is not written for each.
            Proposed::Routine if !self.commit.wanted().0.is_off() && !known_changed => {
                self.save_at.get_or_insert(Instant::now() + SAVES_AFTER);
                self.leaving_since = None;
                self.bring_endpoints().await;
                return Ok(());
            }
            Proposed::Same | Proposed::Routine => {
                if let Err(error) = self.save() {
                    warn!("after a restart an older state would be in force: {error}");
                }
            }
            Proposed::Trial => {
                self.trial += 1;
                self.doubt = None;
                self.refused = None;
                let host = self.host().await;
                self.sessions = self.options.places.ssh_sessions(&host.never.ssh);
                read = Some(host);
                if let Err(error) = self.save() {
                    // Then a process that dies in the trial would not know what to go back to.
                    self.commit.revert();
                    return Err(format!("the change is not tried: {error}"));
                }
                info!(trial = self.trial, "a change of capture is on trial for {patience} s");
            }
        }
        self.leaving_since = None;
        match read {
            Some(host) => self.bring_all(host).await,
            None => self.bring().await,
        }
        if let Some(error) = &self.error
            && let Some(spec) = self.commit.revert()
        {
            let why = format!("it could not be applied: {error}");
            self.taken_back(spec, why.clone());
            self.bring().await;
            return Err(why);
        }
        Ok(())
    }

    /// What is in force instead of what was taken back, with endpoints that live.
    fn confirmed_with_endpoints_of(&self, spec: Spec) -> Spec {
        let mut confirmed = self.commit.state().confirmed.clone();
        if confirmed.outbound.capture != Outward::Off {
            confirmed.outbound.vips = spec.outbound.vips;
            confirmed.outbound.addresses = spec.outbound.addresses;
        }
        confirmed
    }

    /// What this process can see for itself, before it believes whoever confirms.
    async fn confirm(&mut self, trial: u64) -> Result<(), String> {
        if trial != self.trial || self.commit.until().is_none() {
            return Err("nothing of that number is on trial".to_owned());
        }
        if self.bypassed {
            return Err(
                "the host is out of the mesh by its bypass: what is not on the host shows nothing".to_owned()
            );
        }
        let (spec, _) = self.wanted();
        let looks = looks(&spec);
        for (wanted, port) in [(looks.outbound, OUTBOUND_PORT), (looks.inbound, INBOUND_PORT)] {
            if !wanted {
                continue;
            }
            let seen = probe::look_at(port, &self.options.users).await;
            if seen != Envoy::Well {
                return Err(format!("Envoy does not serve its capture port {port}: {seen:?}"));
            }
        }
        if proves_itself(&spec) {
            let seen = probe::look(SELF_TEST).await;
            if seen != Envoy::Well {
                return Err(format!(
                    "a connection to {SELF_TEST} was not captured and served by Envoy: {seen:?}"
                ));
            }
        }
        let host = self.host().await;
        sessions_live(&self.sessions, &self.options.places.ssh_sessions(&host.never.ssh))?;
        self.commit.confirm();
        self.refused = None;
        self.doubt = None;
        info!(trial, "confirmed");
        if let Err(error) = self.save() {
            warn!("a restart would take back what was just confirmed: {error}");
        }
        self.bring_all(host).await;
        Ok(())
    }

    fn is_ours(&self, change: &Changed) -> bool {
        self.applier.as_ref().is_some_and(|applier| applier.ran.contains(change.pid))
    }

    fn looks_every(&self) -> u64 {
        let told = self.applier.as_ref().is_none_or(|applier| applier.backend == Backend::Nft);
        let out = &self.commit.wanted().0.outbound;
        let no_units =
            out.include.units.is_empty() && out.exclude.units.is_empty() && out.dial.units.is_empty();
        if told && no_units { LOOKS_EVERY } else { LOOKS_OFTEN_EVERY }
    }

    /// Endpoints came or went: what is known of the host and of its rules is what it was.
    async fn bring_endpoints(&mut self) {
        match self.host.clone() {
            Some(host) => self.bring_on(host).await,
            None => self.bring().await,
        }
    }

    /// The host as it is now: read anew.
    async fn host(&mut self) -> Host {
        let (spec, _) = self.wanted();
        let host = host(&self.options, &spec, &self.known, &self.memory).await;
        self.host = Some(host.clone());
        let before = self.memory.clone();
        self.memory.learn(&host);
        if self.memory != before {
            self.save_at.get_or_insert(Instant::now() + SAVES_AFTER);
        }
        host
    }

    /// Makes the host be as it is wanted, and remembers why not.
    async fn bring(&mut self) {
        let host = self.host().await;
        self.bring_all(host).await;
    }

    /// The same, where the host has just been read.
    async fn bring_all(&mut self, host: Host) {
        self.actual = None;
        self.bring_on(host).await;
    }

    /// The same, where somebody changed rules: what is known of the host is what it was.
    async fn mend(&mut self) {
        self.actual = None;
        self.bring_endpoints().await;
    }

    async fn bring_on(&mut self, host: Host) {
        if self.awaits_agent.is_some_and(|until| !self.stopping && !self.bypassed && Instant::now() < until) {
            return;
        }
        self.awaits_agent = None;
        self.looked = Some(Instant::now());
        match self.try_bring(host).await {
            Ok(()) => self.error = None,
            Err(why) => {
                if self.error.as_ref() != Some(&why) {
                    error!("the host is not as it is wanted: {why}");
                }
                self.error = Some(why);
            }
        }
    }

    async fn try_bring(&mut self, host: Host) -> Result<(), String> {
        let (spec, stage) = self.wanted();
        self.looks.send_if_modified(|looks| {
            let now = self::looks(&spec);
            std::mem::replace(looks, now) != now
        });
        let applier = match &self.applier {
            Some(applier) => applier.clone(),
            None => {
                let applier = applier(&self.options, host.ipv6).await.map_err(|error| one_line(&error))?;
                self.others = applier.others().await;
                self.applier.insert(applier).clone()
            }
        };
        if spec.is_off() {
            return self.take_away(&applier).await.map_err(|error| one_line(&error));
        }
        self.leaving_since = None;
        let (program, notes) = Program::new(&spec, &host, stage).map_err(|error| error.to_string())?;
        self.tell(notes.iter().map(ToString::to_string).collect());
        if self.commit.state().footprint.is_none()
            && let Some(footprint) = applier.footprint().await
            && self.on_host.as_ref().is_none_or(Program::is_absent)
        {
            self.commit.set_footprint(Some(footprint));
            self.save()?;
        }
        let mut seen = *self.envoy.borrow();
        if seen == Envoy::Unknown || self.withdrawn {
            seen = probe::look_at_all(looks(&spec), &self.options.users).await;
        }
        let well = seen == Envoy::Well && self.agent_is_well();
        let actual = match self.actual.take() {
            Some(actual) => actual,
            None => applier.read().await.map_err(|error| one_line(&error))?,
        };
        let plan = applier.plan(&program, &actual, well);
        if plan.is_empty() {
            self.actual = Some(actual);
        } else {
            if self.on_host.as_ref() == Some(&program) {
                self.drifted(&plan);
            }
            self.actual =
                applier.bring_elements(&program, &actual).await.map_err(|error| one_line(&error))?;
            if self.actual.is_none() {
                let alive = well.then_some(spec.dead_man.timeout);
                applier.bring(&program, alive).await.map_err(|error| one_line(&error))?;
                self.beat = Beat::new(spec.dead_man.timeout.duration());
                if well {
                    self.beat.refreshed(std::time::Instant::now());
                    self.lapsed = false;
                    self.withdrawn = false;
                }
            }
        }
        self.on_host = Some(program);
        // Not before what is to be there is: translated connections live as long as somebody's rules translate.
        self.end_others(&Program::absent()).await.map_err(|error| one_line(&error))
    }

    /// Makes what other backends have of ours be as `program` says.
    async fn end_others(&mut self, program: &Program) -> Result<(), Error> {
        for other in std::mem::take(&mut self.others) {
            match other.is_absent().await {
                Ok(true) => continue,
                Ok(false) if program.is_absent() => {
                    let ended = other.off(self.commit.state().footprint.as_ref()).await;
                    if let Err(error) = ended {
                        self.others.push(other);
                        return Err(error);
                    }
                    info!("rules that an earlier vmesh-net had by {} are taken away", other.backend);
                }
                Ok(false) => {
                    let drained = other.bring(program, None).await;
                    self.others.push(other);
                    drained?;
                }
                Err(Error::Slow { .. }) => self.others.push(other),
                // It is not here, or cannot do anything here: nobody has made rules with it.
                Err(error) => debug!("{} is not looked at again: {}", other.backend, one_line(&error)),
            }
        }
        Ok(())
    }

    async fn take_away(&mut self, applier: &Applier) -> Result<(), Error> {
        let since = *self.leaving_since.get_or_insert_with(std::time::Instant::now);
        let open = self.options.places.redirected();
        self.connections = open;
        let now = std::time::Instant::now();
        let program = leaving(open, since, now, self.options.drain, applier.ipv6);
        self.end_others(&program).await?;
        if program.is_absent() {
            if !self.on_host.as_ref().is_some_and(Program::is_absent) {
                let plan = applier.off(self.commit.state().footprint.as_ref()).await?;
                if !plan.is_empty() {
                    info!("the host's rules are as they were before vmesh");
                }
                self.commit.set_footprint(None);
                if let Err(error) = self.save() {
                    warn!("{error}");
                }
            }
            self.leaving_since = None;
        } else if self.on_host.as_ref() != Some(&program) {
            info!("nothing new is captured; {open} connections through redirects are left to end");
            applier.bring(&program, None).await?;
        }
        self.on_host = Some(program);
        self.notes.clear();
        Ok(())
    }

    fn tell(&mut self, notes: Vec<String>) {
        for note in notes.iter().filter(|note| !self.notes.contains(note)) {
            warn!("{note}");
        }
        self.notes = notes;
    }

    fn drifted(&mut self, plan: &Plan) {
        let by = self.changed_by.take().filter(|(when, _)| when.elapsed() < TICK).map(|(_, changed)| changed);
        let by = by.filter(|changed| !changed.by.is_empty());
        let by = by.map(|Changed { by, pid }| format!("{by} (pid {pid})"));
        let what: Vec<String> = plan.changes.iter().map(ToString::to_string).take(20).collect();
        warn!(
            by = by.as_deref().unwrap_or("somebody"),
            "rules of vmesh were changed and are mended: {}",
            what.join("; ")
        );
        self.drift = Drift { count: self.drift.count + 1, seconds_ago: None, what, by };
        self.drifted_at = Some(Instant::now());
    }

    async fn plan(&self, want: Option<Want>) -> Result<String, String> {
        let (spec, stage) = match &want {
            Some(want) => (with_self_test(want.spec.clone()), Stage::Confirmed),
            None => self.wanted(),
        };
        let known = want.map_or_else(
            || self.known.clone(),
            |want| Known { ports: want.ports, control_planes: want.control_planes },
        );
        plan(&self.options, &spec, stage, &known, &self.memory).await
    }

    fn state(&self) -> State {
        let (spec, stage) = self.commit.wanted();
        match (self.bypassed, spec.is_off(), stage) {
            _ if self.leaving_since.is_some() => State::Leaving,
            (true, _, _) => State::Bypassed,
            (false, true, _) => State::Off,
            (false, false, Stage::Trial) => State::Trial,
            (false, false, Stage::Confirmed) => State::Confirmed,
        }
    }

    fn status(&self) -> Status {
        let (mut spec, _) = self.wanted();
        let virtual_addresses = spec.outbound.vips.iter().filter(|vip| **vip != SELF_TEST).count();
        let real_addresses = spec.outbound.addresses.len();
        spec.outbound.vips.clear();
        spec.outbound.addresses.clear();
        let trial = self.commit.until();
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            backend: self.applier.as_ref().map(|applier| applier.backend.to_string()),
            state: self.state(),
            spec,
            virtual_addresses,
            real_addresses,
            trial: trial.map(|_| self.trial),
            trial_ends_in: trial
                .map(|until| until.saturating_duration_since(std::time::Instant::now()).as_secs()),
            reverted: self.refused.as_ref().map(|(_, why)| why.clone()),
            envoy: *self.envoy.borrow(),
            redirects: self.redirects(),
            agent_silent_for: self.agent_spoke.map(|spoke| spoke.elapsed().as_secs()),
            drift: Drift {
                seconds_ago: self.drifted_at.map(|at| at.elapsed().as_secs()),
                ..self.drift.clone()
            },
            notes: self.notes.clone(),
            error: self.error.clone(),
            connections: self.connections,
        }
    }

    /// What the kernel makes by now of redirects that may lapse.
    fn redirects(&self) -> Redirects {
        if !self.on_host.as_ref().is_some_and(Program::has_dead_man) {
            return Redirects::None;
        }
        match self.beat.due(std::time::Instant::now(), false) {
            Due::Lapses(left) if !left.is_zero() && !self.withdrawn => Redirects::Hold,
            _ => Redirects::Lapsed,
        }
    }

    /// What `systemctl status` shows.
    fn in_words(&self) -> String {
        let state = self.state();
        match &self.error {
            Some(error) => format!("{state}; {error}"),
            None if self.awaits_agent.is_some() => {
                "waits for the agent; rules are left as they are".to_owned()
            }
            None if self.redirects() == Redirects::Lapsed => format!("{state}; redirects have lapsed"),
            None => state.to_string(),
        }
    }

    fn save(&mut self) -> Result<(), String> {
        self.save_at = None;
        let kept = Kept {
            commit: self.commit.state().clone(),
            known: self.known.clone(),
            refused: self.refused.clone(),
            memory: self.memory.clone(),
        };
        let json = serde_json::to_vec(&kept).map_err(|error| error.to_string())?;
        fsx::write_atomically(&self.options.state_file(), &json, fsx::PRIVATE)
            .map_err(|error| one_line(&error))
    }
}

/// What is on the disk, and whether this version understands all of it. Of what it does not, the parts count that it does.
fn load(path: &Path) -> (Kept, bool) {
    let text = match fsx::read_capped(path, MAX_STATE) {
        Ok(text) => text,
        Err(error) if error.is_not_found() => return (Kept::default(), true),
        Err(error) => {
            warn!("what was captured is not known until the agent says it: {}", one_line(&error));
            return (Kept::default(), false);
        }
    };
    let error = match serde_json::from_slice(&text) {
        Ok(kept) => return (kept, true),
        Err(error) => error,
    };
    warn!(
        "{} is not what this version writes; what was captured is not known until the agent says it: {error}",
        path.display()
    );
    fn part<T: DeserializeOwned + Default>(of: &Value, name: &str) -> T {
        of.get(name).and_then(|part| T::deserialize(part).ok()).unwrap_or_default()
    }
    let all = serde_json::from_slice(&text).unwrap_or(Value::Null);
    let footprint = part(all.get("commit").unwrap_or(&Value::Null), "footprint");
    let commit = Committed { footprint, ..Committed::default() };
    let (known, refused, memory) = (part(&all, "known"), part(&all, "refused"), part(&all, "memory"));
    (Kept { commit, known, refused, memory }, false)
}

async fn applier(options: &Options, ipv6: bool) -> Result<Applier, Error> {
    match options.backend {
        Some(backend) => Ok(Applier { backend, tools: options.tools.clone(), ipv6, ran: Ran::default() }),
        None => Applier::detect(options.tools.clone(), ipv6).await,
    }
}

async fn host(options: &Options, spec: &Spec, known: &Known, memory: &Memory) -> Host {
    let own = Own {
        users: options.users.clone(),
        slices: options.slices.clone(),
        ports: known.ports.clone(),
        control_planes: known.control_planes.clone(),
    };
    options.places.host(spec, &own, memory).await
}

async fn plan(
    options: &Options,
    spec: &Spec,
    stage: Stage,
    known: &Known,
    memory: &Memory,
) -> Result<String, String> {
    let host = host(options, spec, known, memory).await;
    let applier = applier(options, host.ipv6).await.map_err(|error| one_line(&error))?;
    let (program, notes) = match spec.is_off() {
        true => (Program::absent(), Vec::new()),
        false => Program::new(spec, &host, stage).map_err(|error| error.to_string())?,
    };
    let actual = applier.read().await.map_err(|error| one_line(&error))?;
    let plan = applier.plan(&program, &actual, false);
    applier.check(&plan).await.map_err(|error| one_line(&error))?;
    let notes: String = notes.iter().map(|note| format!("note: {note}\n")).collect();
    Ok(format!("{notes}{plan}"))
}

/// What [`Ask::Plan`] answers, where nobody runs who could be asked. Needs the privileges that applying needs.
pub async fn plan_here(options: &Options, want: Want) -> Result<String, String> {
    let known = Known { ports: want.ports, control_planes: want.control_planes };
    plan(options, &with_self_test(want.spec), Stage::Confirmed, &known, &Memory::default()).await
}

fn with_self_test(mut spec: Spec) -> Spec {
    if spec.outbound.capture != Outward::Off {
        spec.outbound.vips.insert(SELF_TEST);
    }
    spec
}

/// Why redirects do not hold, by what was seen of Envoy.
fn what_is_wrong(envoy: Envoy) -> &'static str {
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

fn looks(spec: &Spec) -> Looks {
    Looks { outbound: spec.outbound.capture != Outward::Off, inbound: spec.inbound.capture != Inward::Off }
}

/// Whether connections of this process are captured, as anybody's are.
fn proves_itself(spec: &Spec) -> bool {
    let (include, exclude) = (&spec.outbound.include, &spec.outbound.exclude);
    let everybody = include.users.is_empty() && include.groups.is_empty() && include.units.is_empty();
    let nobody = exclude.users.is_empty() && exclude.groups.is_empty() && exclude.units.is_empty();
    spec.outbound.capture != Outward::Off && everybody && nobody
}

/// Whether those who worked on this host over SSH still can. Some may have ended; that all did, or that one gets no answer any
/// more, is this change's doing until proved otherwise.
fn sessions_live(before: &[Session], now: &[Session]) -> Result<(), String> {
    let still = |session: &&Session| now.iter().find(|later| later.inode == session.inode);
    let living: Vec<_> = before.iter().filter_map(|session| still(&session)).collect();
    if !before.is_empty() && living.is_empty() {
        return Err(format!(
            "the SSH sessions that were open ({}) have all ended since; if they were closed on purpose, try again",
            before.len()
        ));
    }
    let stuck = living.iter().filter(|session| session.stuck).count();
    if stuck > 0 {
        return Err(format!("{stuck} SSH sessions get no answer since"));
    }
    Ok(())
}

/// Whether there is such a process; one that must not be asked about is.
fn lives(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| test_kill_process(pid) != Err(rustix::io::Errno::SRCH))
}

/// Answers within `patience`, or says that the keeper is busy.
pub async fn asked(to: &mpsc::Sender<Question>, ask: Ask, pid: Option<i32>, patience: Duration) -> Answer {
    let (answer, said) = oneshot::channel();
    let exchange = async {
        to.send(Question { ask, pid, answer }).await.ok()?;
        said.await.ok()
    };
    match timeout(patience, exchange).await {
        Ok(Some(answer)) => answer,
        Ok(None) => Answer::Refused("vmesh-net is stopping".to_owned()),
        Err(_) => Answer::Refused("vmesh-net is busy changing rules: ask again".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn session(inode: u64, stuck: bool) -> Session {
        Session { inode, stuck }
    }

    #[test]
    fn sessions_that_end_one_by_one_are_nobodys_fault_and_all_at_once_are() {
        assert_eq!(sessions_live(&[], &[]), Ok(()));
        assert_eq!(sessions_live(&[session(1, false), session(2, true)], &[session(1, false)]), Ok(()));
        assert_eq!(sessions_live(&[], &[session(1, true)]), Ok(()));
        assert!(sessions_live(&[session(1, false)], &[session(3, false)]).unwrap_err().contains("all ended"));
        assert!(sessions_live(&[session(1, false)], &[session(1, true)]).unwrap_err().contains("no answer"));
    }
}
