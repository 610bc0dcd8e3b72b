//! What is on the host, and why. One task on a thread of its own owns all of it: the judgement is [`vmesh_capture::confirm`]'s,
//! which is pure; here it is told the time, written to disk, and made so. It waits for disks, tools and `/proc`; the dead-man is
//! held off elsewhere: see [`crate::pulse`].

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tracing::{debug, error, info, warn};
use vmesh_capture::apply::{Actual, Applier, Backend, Error, Ran, Tools};
use vmesh_capture::confirm::{Commit, Proposed, is_routine, leaving, without_what_is_not_wanted};
use vmesh_capture::facts::{Own, Places, Session};
use vmesh_capture::foreign::{self, InboundJudge};
use vmesh_capture::host::{Host, Memory, Nursery};
use vmesh_capture::spec::{Inward, Outward, Spec, Unit};
use vmesh_capture::{Directions, Plan, Program, Stage};
use vmesh_daemon::report::one_line;
use vmesh_daemon::{Stop, systemd};

use crate::board::Board;
use crate::kept::{AgentFacts, SavedState};
use crate::probe::{self, Looks, SELF_TEST, Verdicts};
use crate::protocol::{Ask, Drift, Envoy, State, Status, Want};
use crate::pulse::{AgentWatch, Heartbeat, Order};
use crate::rules::Changed;

/// Ports of virtual addresses that are held against the rules of others.
const MAX_JUDGED_PORTS: usize = 256;
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
/// An agent that runs at all has spoken by then.
const AGENT_BEGINS_WITHIN: Duration = Duration::from_secs(120);
/// A trial may not be endless, nor too short for anybody to confirm it.
const PATIENCE: std::ops::RangeInclusive<u32> = 5..=3600;

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
    pub answer: oneshot::Sender<Reply>,
}

/// What the keeper answers. How things are now is put together by [`crate::board`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    Done,
    Plan(String),
    Refused(String),
}

/// How the keeper hears of the rest of the process, and tells it.
pub struct Links {
    pub verdicts: watch::Receiver<Verdicts>,
    pub looks: watch::Sender<Looks>,
    pub agent: AgentWatch,
    pub beats: watch::Receiver<Heartbeat>,
    pub orders: watch::Sender<Option<Order>>,
    pub board: watch::Sender<Board>,
    /// The control groups in which units start that are left out or have a share.
    pub nurseries: watch::Sender<BTreeSet<PathBuf>>,
}

pub struct Keeper {
    options: Options,
    applier: Option<Applier>,
    /// By what else there may be rules of an earlier process; none once it was seen that there are none.
    others: Vec<Applier>,
    /// What was captured is not known: until the agent says it, or this moment, the kernel's rules stay as they are.
    awaits_agent: Option<Instant>,
    commit: Commit,
    known: AgentFacts,
    /// What the agent last said that it wants, whatever became of it.
    agent_wants: Option<Spec>,
    trial: u64,
    /// The sessions from when the trial began.
    sessions: Vec<Session>,
    /// What was taken back, and why: it is not tried again until somebody says so.
    refused: Option<(Spec, String)>,
    /// Why the trial could not be confirmed so far.
    doubt: Option<String>,
    /// When it was last ready for whatever comes next.
    turned: watch::Sender<Instant>,
    links: Links,
    /// How often the rules were replaced whole: see [`Order::replaced`].
    replaced: u64,
    leaving_since: Option<std::time::Instant>,
    stopping: bool,
    bypassed: bool,
    /// What is on the host; `None` where that is not known: before the first look, and after a change that failed, of which anything
    /// may have been done.
    on_host: Option<Program>,
    /// What is known to be in the kernel, as long as nobody else changed anything.
    actual: Option<Actual>,
    /// What was read of the host last.
    host: Option<Host>,
    memory: Memory,
    /// When its rules were last looked at.
    looked: Option<Instant>,
    look_soon: bool,
    /// When endpoints that came and went are to be written to the disk.
    save_at: Option<Instant>,
    notes: Vec<String>,
    /// Why captured connections do not arrive, as far as this process can see.
    path_fault: Option<String>,
    /// Rules of others changed: what they do with captured connections is to be looked at.
    check_path_soon: bool,
    /// Caches the rules of others until somebody changes rules, and the verdict on inbound ports.
    foreign: InboundJudge,
    /// A unit has started since the rules were last looked at.
    bring_soon: bool,
    error: Option<String>,
    drift: Drift,
    drifted_at: Option<std::time::Instant>,
    changed_by: Option<(Instant, Changed)>,
}

impl Keeper {
    /// Begins with what the disk has. Where that cannot be read, the rules stay as they are until the agent's next word.
    pub fn start(options: Options, links: Links) -> Keeper {
        let (kept, is_whole) = SavedState::load(&options.state_file());
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
            commit,
            known: kept.known,
            agent_wants: None,
            trial: 0,
            turned: watch::Sender::new(Instant::now()),
            sessions: Vec::new(),
            refused,
            doubt: None,
            links,
            replaced: 0,
            leaving_since: None,
            stopping: false,
            bypassed,
            on_host: None,
            actual: None,
            save_at: None,
            host: None,
            memory: kept.memory,
            looked: None,
            look_soon: false,
            notes: Vec::new(),
            path_fault: None,
            check_path_soon: false,
            foreign: InboundJudge::default(),
            bring_soon: false,
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
        mut failed: mpsc::Receiver<String>,
        mut begun: mpsc::Receiver<()>,
        mut again: watch::Receiver<bool>,
        mut stop: Stop,
    ) {
        self.bring().await;
        self.publish();
        systemd::ready(&self.in_words());
        let mut ticks = interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut count = 0;
        loop {
            self.turned.send_replace(Instant::now());
            tokio::select! {
                question = asked.recv() => match question {
                    Some(Question { ask, answer }) => {
                        let reply = self.answer(ask).await;
                        // Before whoever asked looks at it.
                        self.publish();
                        // Whoever asked may have gone.
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
                    all.retain(|change| !self.is_ours(change));
                    let Some(change) = all.pop() else { continue };
                    self.forget_rules();
                    self.check_path_soon = true;
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
                Some(()) = begun.recv() => {
                    sleep(SETTLES).await;
                    _ = begun.try_recv();
                    if !self.wanted().0.is_off() {
                        match self.looked.is_some_and(|looked| looked.elapsed() < RESTS) {
                            true => self.bring_soon = true,
                            false => self.bring().await,
                        }
                    }
                }
                Some(why) = failed.recv() => {
                    warn!("{why}");
                    self.error = Some(why);
                    self.bring().await;
                }
                _ = ticks.tick() => {
                    count += 1;
                    self.tick(count % self.looks_every() == 0).await;
                }
                Ok(()) = again.changed() => return self.end_untried(),
                () = stop.requested() => break,
            }
            self.publish();
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
            self.publish();
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
            false => match self.commit.wanted() {
                (spec, Stage::Trial) => (spec.clone(), Stage::Trial),
                (spec, Stage::Confirmed) => (self.as_far_as_served(spec), Stage::Confirmed),
            },
        }
    }

    /// What was confirmed, as far as the agent's configuration still has it. Where a change was taken back, the agent goes on telling
    /// control planes its new configuration, and Envoy has listeners for that one only: what is not in it would lead nowhere.
    fn as_far_as_served(&self, confirmed: &Spec) -> Spec {
        let refused = self.refused.as_ref().map(|(spec, _)| spec);
        match self.agent_wants.as_ref().or(refused) {
            Some(wants) => without_what_is_not_wanted(confirmed, wants),
            None => confirmed.clone(),
        }
    }

    async fn tick(&mut self, look: bool) {
        let again =
            self.error.is_some() && self.looked.is_none_or(|looked| looked.elapsed() >= TRIES_AGAIN_AFTER);
        let waited = self.awaits_agent.is_some_and(|until| Instant::now() >= until);
        let begun = std::mem::take(&mut self.bring_soon);
        let mut bring = self.see_bypass() || begun || look || again || waited || self.leaving_since.is_some();
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
        if look || self.check_path_soon {
            self.check_path(self.check_path_soon).await;
        }
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

    async fn answer(&mut self, ask: Ask) -> Reply {
        match ask {
            // Answered without the keeper.
            Ask::Status | Ask::Look | Ask::Well => {}
            Ask::Plan { want } => {
                return match self.plan(want).await {
                    Ok(text) => Reply::Plan(text),
                    Err(why) => Reply::Refused(why),
                };
            }
            Ask::Want(want) => {
                if let Err(why) = self.want(want).await {
                    return Reply::Refused(why);
                }
            }
            Ask::Confirm { trial } => {
                if let Err(why) = self.confirm(trial).await {
                    self.doubt = Some(why.clone());
                    return Reply::Refused(why);
                }
            }
            Ask::Revert { trial, why } => {
                let on_trial = if trial == self.trial { self.commit.revert() } else { None };
                let Some(spec) = on_trial else {
                    return Reply::Refused("nothing of that number is on trial".to_owned());
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
        Reply::Done
    }

    async fn want(&mut self, want: Want) -> Result<(), String> {
        want.spec
            .limits()
            .map_err(|error| format!("this is not captured, and what was is as before: {error}"))?;
        self.awaits_agent = None;
        let spec = with_self_test(want.spec);
        let wants_another = self.agent_wants.as_ref().is_some_and(|before| !is_routine(before, &spec));
        self.agent_wants = Some(spec.clone());
        let known = AgentFacts { ports: want.ports, control_planes: want.control_planes };
        let known_changed = self.known != known;
        self.known = known;
        let is_refused = self.refused.as_ref().is_some_and(|(refused, _)| is_routine(refused, &spec));
        let spec = if is_refused { self.confirmed_with_endpoints_of(spec) } else { spec };
        let patience = want.confirm_within.clamp(*PATIENCE.start(), *PATIENCE.end());
        let now = std::time::Instant::now();
        let mut read = None;
        match self.commit.propose(spec, now, Duration::from_secs(patience.into())) {
            Proposed::Same if !known_changed && !wants_another => return Ok(()),
            // Of endpoints the agent speaks again at once after a restart: the disk is not written for each.
            Proposed::Routine if !self.commit.wanted().0.is_off() && !known_changed && !wants_another => {
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
        for direction in looks(&spec).iter() {
            let seen = probe::look_at(direction, &self.options.users).await;
            if seen != Envoy::Well {
                let port = probe::port(direction);
                return Err(format!("Envoy does not serve its capture port {port}: {seen:?}"));
            }
        }
        if proves_itself(&spec) {
            self.foreign.forget();
            self.path_is_open(&spec, true).await?;
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
        let root = self.options.places.cgroup.clone().unwrap_or_default();
        let dir = |nursery: &Nursery| match &nursery.parent {
            Some(parent) => root.join(parent.path.as_str()),
            None => root.clone(),
        };
        let dirs: BTreeSet<PathBuf> = host.nurseries.iter().map(dir).collect();
        self.links.nurseries.send_if_modified(|known| std::mem::replace(known, dirs.clone()) != dirs);
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
        self.forget_rules();
        self.bring_on(host).await;
    }

    /// The same, where somebody changed rules: what is known of the host is what it was.
    async fn mend(&mut self) {
        self.forget_rules();
        self.bring_endpoints().await;
    }

    /// What was read of rules, ours and others', counts no more.
    fn forget_rules(&mut self) {
        self.actual = None;
        self.foreign.forget();
    }

    /// Reads the rules of others, unless they are known.
    async fn read_foreign_rules(&mut self, applier: &Applier) {
        if self.foreign.rules().is_none() {
            let rules = applier.foreign_rules().await;
            self.foreign.read(rules);
        }
    }

    /// Leaves out the inbound ports that a redirect would open or close against the host's own filter, or of which that is not known, and
    /// says which.
    async fn leave_out_conflicts(&mut self, spec: &mut Spec, applier: &Applier) -> Vec<String> {
        if spec.inbound.capture != Inward::Redirect || spec.inbound.bypass_filter {
            return Vec::new();
        }
        self.read_foreign_rules(applier).await;
        let verdict = self.foreign.judge(&spec.inbound.ports, std::time::Instant::now());
        let outdated = verdict.outdated.iter().map(|why| {
            format!("inbound.ports: this host's own filter counts as it was last read, for 5 minutes at most: {why}")
        });
        let mut notes: Vec<String> = outdated.collect();
        for conflict in &verdict.conflicts {
            spec.inbound.leave_out(conflict.ports());
            notes.push(format!("inbound.ports: {} is not captured: {conflict}", conflict.ports()));
        }
        notes
    }

    /// Tries a captured connection from end to end, and looks for rules that are in its way.
    async fn check_path(&mut self, with_rules: bool) {
        self.check_path_soon = false;
        let (spec, stage) = self.wanted();
        let outbound_is_well = self.links.verdicts.borrow().outbound == Envoy::Well;
        let is_there = self.on_host.as_ref().is_some_and(|program| !program.is_absent());
        if stage == Stage::Trial || !proves_itself(&spec) || !outbound_is_well || !is_there {
            self.path_fault = None;
            return;
        }
        let fault = self.path_is_open(&spec, with_rules).await.err();
        if let Some(why) = fault.as_ref().filter(|why| self.path_fault.as_ref() != Some(why)) {
            warn!("{why}");
        }
        self.path_fault = fault;
    }

    /// Whether captured connections arrive: one is made, to an address that is there for this.
    async fn path_is_open(&mut self, spec: &Spec, with_rules: bool) -> Result<(), String> {
        let mut seen = probe::look(SELF_TEST).await;
        if seen != Envoy::Well {
            // One packet may be lost.
            seen = probe::look(SELF_TEST).await;
        }
        let Some(applier) = self.applier.clone() else { return Ok(()) };
        if seen != Envoy::Well {
            let suspects = foreign::suspects(&applier.foreign_rules().await, SELF_TEST.port());
            let suspects: Vec<String> = suspects.iter().take(3).map(ToString::to_string).collect();
            let rules = match suspects.is_empty() {
                true => String::new(),
                false => format!("; rules that may be in its way: {}", suspects.join(" | ")),
            };
            return Err(format!(
                "a connection to {SELF_TEST} was not captured and served by Envoy: {seen:?}{rules}"
            ));
        }
        if with_rules {
            let ports: BTreeSet<u16> =
                spec.outbound.vips.iter().map(SocketAddr::port).take(MAX_JUDGED_PORTS).collect();
            self.read_foreign_rules(&applier).await;
            let untracked = |port| Some((port, foreign::untracked(self.foreign.rules()?, port)?));
            let lost = ports.into_iter().find_map(untracked);
            if let Some((port, rule)) = lost {
                return Err(format!(
                    "connections to port {port} of virtual addresses lead nowhere: a rule keeps them from being tracked, and so from \
                     being captured ({rule})"
                ));
            }
        }
        Ok(())
    }

    async fn bring_on(&mut self, host: Host) {
        if self.awaits_agent.is_some_and(|until| !self.stopping && !self.bypassed && Instant::now() < until) {
            return;
        }
        self.awaits_agent = None;
        self.looked = Some(Instant::now());
        let has_units = !host.nurseries.is_empty();
        let mut brought = self.try_bring(host).await;
        if brought.is_err() && has_units {
            // A unit may have stopped since its control group was read: once more, with what is there now.
            self.forget_rules();
            let host = self.host().await;
            brought = self.try_bring(host).await;
        }
        match brought {
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
        self.links.looks.send_if_modified(|looks| {
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
        let mut spec = spec;
        let left_out = self.leave_out_conflicts(&mut spec, &applier).await;
        let (program, notes) = Program::new(&spec, &host, stage).map_err(|error| error.to_string())?;
        self.tell(notes.iter().map(ToString::to_string).chain(left_out).collect());
        if self.commit.state().footprint.is_none()
            && self.on_host.as_ref().is_none_or(Program::is_absent)
            && let Some(footprint) = applier.footprint().await.map_err(|error| one_line(&error))?
        {
            self.commit.set_footprint(Some(footprint));
            self.save()?;
        }
        let well = self.well(&spec).await;
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
            // Until it is known to be done: of a change that fails anything may be in the kernel.
            self.on_host = None;
            self.actual =
                applier.bring_elements(&program, &actual).await.map_err(|error| one_line(&error))?;
            if self.actual.is_none() {
                let alive = Some((spec.dead_man.timeout, well)).filter(|(_, well)| !well.is_empty());
                applier.bring_alive(&program, alive).await.map_err(|error| one_line(&error))?;
                self.replaced += 1;
                self.order(&applier, &spec, &program, well);
            }
        }
        // Replaced or not, these are the dead-men that are there; nothing changes if they are known.
        self.order(&applier, &spec, &program, Directions::NONE);
        self.on_host = Some(program);
        // Not before what is to be there is: translated connections live as long as somebody's rules translate.
        self.end_others(&Program::absent()).await.map_err(|error| one_line(&error))
    }

    /// The directions in which redirects may hold at once: Envoy's listener and the agent are well.
    async fn well(&self, spec: &Spec) -> Directions {
        if !self.links.agent.is_well() {
            return Directions::NONE;
        }
        let wanted = looks(spec);
        let mut seen = *self.links.verdicts.borrow();
        let withdrawn = self.links.beats.borrow().withdrawn();
        let unseen = |direction| seen.of(direction) == Envoy::Unknown || withdrawn.contains(direction);
        if wanted.iter().any(unseen) {
            seen = probe::look_at_all(wanted, &self.options.users).await;
        }
        seen.well().and(wanted)
    }

    /// Says what is in the kernel by now to whoever holds the dead-man off.
    fn order(&self, applier: &Applier, spec: &Spec, program: &Program, refreshed: Directions) {
        self.links.orders.send_if_modified(|order| {
            let dead_men = program.dead_men();
            let timeout = spec.dead_man.timeout;
            let is_same = order.as_ref().is_some_and(|order| {
                order.replaced == self.replaced && order.dead_men == dead_men && order.timeout == timeout
            });
            if is_same {
                return false;
            }
            *order = (!dead_men.is_empty()).then(|| Order {
                applier: applier.clone(),
                timeout,
                dead_men,
                replaced: self.replaced,
                refreshed,
                at: std::time::Instant::now(),
            });
            true
        });
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
        let now = std::time::Instant::now();
        let program = leaving(open, since, now, self.options.drain, applier.ipv6);
        self.end_others(&program).await?;
        if program.is_absent() {
            if !self.on_host.as_ref().is_some_and(Program::is_absent) {
                self.links.orders.send_replace(None);
                self.on_host = None;
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
            self.links.orders.send_replace(None);
            self.on_host = None;
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
        self.drifted_at = Some(std::time::Instant::now());
    }

    async fn plan(&self, want: Option<Want>) -> Result<String, String> {
        let (spec, stage) = match &want {
            Some(want) => {
                want.spec.limits().map_err(|error| error.to_string())?;
                (with_self_test(want.spec.clone()), Stage::Confirmed)
            }
            None => self.wanted(),
        };
        let known = want.map_or_else(
            || self.known.clone(),
            |want| AgentFacts { ports: want.ports, control_planes: want.control_planes },
        );
        plan(&self.options, &spec, stage, &known, &self.memory).await
    }

    /// Whether there may be rules of ours though nothing is wanted: they could not be taken away so far.
    fn may_have_rules(&self) -> bool {
        self.awaits_agent.is_none()
            && self.applier.is_some()
            && !self.on_host.as_ref().is_some_and(Program::is_absent)
    }

    fn state(&self) -> State {
        let (spec, stage) = self.commit.wanted();
        match (self.bypassed, spec.is_off(), stage) {
            _ if self.leaving_since.is_some() => State::Leaving,
            (true, _, _) => State::Bypassed,
            // Rules that could not be taken away are not gone.
            (false, true, _) if self.may_have_rules() => State::Leaving,
            (false, true, _) => State::Off,
            (false, false, Stage::Trial) => State::Trial,
            (false, false, Stage::Confirmed) => State::Confirmed,
        }
    }

    /// Lets the rest of the process see what there is now.
    fn publish(&self) {
        let (mut spec, _) = self.wanted();
        let looks = looks(&spec);
        let virtual_addresses = spec.outbound.vips.iter().filter(|vip| **vip != SELF_TEST).count();
        let real_addresses = spec.outbound.addresses.len();
        spec.outbound.vips.clear();
        spec.outbound.addresses.clear();
        let trial_until = self.commit.until();
        let status = Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            backend: self.applier.as_ref().map(|applier| applier.backend.to_string()),
            state: self.state(),
            spec,
            virtual_addresses,
            real_addresses,
            trial: trial_until.map(|_| self.trial),
            reverted: self.refused.as_ref().map(|(_, why)| why.clone()),
            drift: self.drift.clone(),
            notes: self.notes.iter().chain(&self.path_fault).cloned().collect(),
            error: self.error.clone(),
            ..Status::default()
        };
        self.links.board.send_replace(Board { status, trial_until, drifted_at: self.drifted_at, looks });
    }

    /// What `systemctl status` shows.
    fn in_words(&self) -> String {
        let state = self.state();
        match &self.error {
            Some(error) => format!("{state}; {error}"),
            None if self.awaits_agent.is_some() => {
                "waits for the agent; rules are left as they are".to_owned()
            }
            None => state.to_string(),
        }
    }

    fn save(&mut self) -> Result<(), String> {
        self.save_at = None;
        let state = SavedState {
            commit: self.commit.state().clone(),
            known: self.known.clone(),
            refused: self.refused.clone(),
            memory: self.memory.clone(),
        };
        state.save(&self.options.state_file())
    }
}

async fn applier(options: &Options, ipv6: bool) -> Result<Applier, Error> {
    match options.backend {
        Some(backend) => Ok(Applier { backend, tools: options.tools.clone(), ipv6, ran: Ran::default() }),
        None => Applier::detect(options.tools.clone(), ipv6).await,
    }
}

async fn host(options: &Options, spec: &Spec, known: &AgentFacts, memory: &Memory) -> Host {
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
    known: &AgentFacts,
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
    let known = AgentFacts { ports: want.ports, control_planes: want.control_planes };
    plan(options, &with_self_test(want.spec), Stage::Confirmed, &known, &Memory::default()).await
}

fn with_self_test(mut spec: Spec) -> Spec {
    if spec.outbound.capture != Outward::Off {
        spec.outbound.vips.insert(SELF_TEST);
    }
    spec
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

/// Answers within `patience`, or says that the keeper is busy.
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
