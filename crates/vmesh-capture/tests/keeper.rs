//! Property tests of the state machine, against a model of a host on which actions fail, the process dies at
//! any moment, and other programs change the rules.

#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use vmesh_capture::apply::Backend;
use vmesh_capture::confirm::{self, is_routine};
use vmesh_capture::foreign::{self, Ruleset};
use vmesh_capture::host::{AccountNumber, Host, ParentCgroup};
use vmesh_capture::iptables::Footprint;
use vmesh_capture::machine::{
    Action, AgentFacts, ApplyResult, CaptureState, DeadManTimers, Event, Lifecycle, Machine, RulesetChange,
    SavedState, TICK, directions,
};
use vmesh_capture::{Directions, Program, Spec, Stage};
use vmesh_model::load::strict;

const DRAIN: Duration = Duration::from_secs(10);
const PATIENCE: Duration = Duration::from_secs(30);
/// A number of ticks that outlasts any trial, drain, rest and wait for the agent.
const LONG: u32 = 200;

const SPECS: [&str; 8] = [
    "{}",
    "{outbound: {capture: addresses, addresses: {\"10.0.0.9:8080\": {}}}}",
    "{outbound: {capture: all, on_loss: closed}}",
    "{inbound: {capture: redirect, ports: [8081, 8083]}}",
    "{outbound: {capture: vip}, inbound: {capture: redirect, on_loss: closed, ports: [8081]}}",
    "{outbound: {capture: vip}, inbound: {capture: redirect, bypass_filter: [8081], ports: [8081]}}",
    "{inbound: {strict: [9000]}}",
    // The host does not answer which user id `ghost` has.
    "{outbound: {capture: vip, exclude: {users: [ghost]}}}",
];

fn spec(number: usize, endpoints: u8) -> Spec {
    let mut spec: Spec = strict("spec.yaml", SPECS.get(number).unwrap()).unwrap();
    if directions(&spec).outbound {
        spec.outbound.vips =
            (0..=endpoints).map(|last| format!("240.0.0.{last}:80").parse().unwrap()).collect();
    }
    spec
}

/// The kind of a simulated failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Failure {
    /// The action fails at its first reading, before it changes anything.
    Unread,
    /// The action changes nothing and fails.
    Undone,
    /// The action does all of its work and reports a failure.
    Done,
    /// The action does a part of its work and fails.
    Half,
}

/// A change of rules by another program.
#[derive(Debug, Clone, Copy)]
enum ForeignChange {
    TakesOurs,
    MakesOursOther,
    ClosesAPort,
    OpensIt,
    CannotBeRead,
}

/// One step of a generated sequence.
#[derive(Debug, Clone)]
enum ModelStep {
    Want {
        spec: usize,
        endpoints: u8,
    },
    Confirm,
    Revert,
    Retry,
    Ticks(u8),
    Bypass(bool),
    /// The bypass script runs just before an action: the one after the next `after` ones.
    BypassAmid {
        after: u8,
    },
    Connections(usize),
    Others(ForeignChange),
    UnitsStarted,
    RefreshFailed,
    /// An action fails: the one after the next `after` ones.
    Fail {
        after: u8,
        failure: Failure,
    },
    /// The process is killed at an action, before or after the work of that action.
    Kill {
        after: u8,
        done: bool,
    },
    /// The state file is damaged, and the process is killed.
    Damage,
    Stop,
    Handover,
}

fn op() -> impl Strategy<Value = ModelStep> {
    let failure =
        prop_oneof![Just(Failure::Unread), Just(Failure::Undone), Just(Failure::Done), Just(Failure::Half)];
    let change = prop_oneof![
        Just(ForeignChange::TakesOurs),
        Just(ForeignChange::MakesOursOther),
        Just(ForeignChange::ClosesAPort),
        Just(ForeignChange::OpensIt),
        Just(ForeignChange::CannotBeRead),
    ];
    prop_oneof![
        8 => (0..SPECS.len(), 0..3_u8).prop_map(|(spec, endpoints)| ModelStep::Want { spec, endpoints }),
        6 => Just(ModelStep::Confirm),
        1 => Just(ModelStep::Revert),
        1 => Just(ModelStep::Retry),
        5 => (1..40_u8).prop_map(ModelStep::Ticks),
        1 => any::<bool>().prop_map(ModelStep::Bypass),
        1 => (0..14_u8).prop_map(|after| ModelStep::BypassAmid { after }),
        1 => (0..2_usize).prop_map(ModelStep::Connections),
        3 => change.prop_map(ModelStep::Others),
        1 => Just(ModelStep::UnitsStarted),
        1 => Just(ModelStep::RefreshFailed),
        6 => (0..14_u8, failure).prop_map(|(after, failure)| ModelStep::Fail { after, failure }),
        3 => (0..14_u8, any::<bool>()).prop_map(|(after, done)| ModelStep::Kill { after, done }),
        1 => Just(ModelStep::Damage),
        1 => Just(ModelStep::Stop),
        1 => Just(ModelStep::Handover),
    ]
}

/// The rules of vmesh in the kernel of the model.
#[derive(Debug, Clone, PartialEq)]
enum KernelState {
    None,
    Are(Program),
    /// Rules of unknown content, left by a change that failed halfway.
    Broken,
}

/// A host, and the vmesh-net that runs on it.
struct HostModel {
    machine: Machine,
    now: Instant,
    rules: KernelState,
    /// Empty chains that came with the first rule, as iptables creates them.
    has_leftovers: bool,
    /// Another backend has rules of vmesh.
    has_others: bool,
    ordered: Option<DeadManTimers>,
    disk: Option<SavedState>,
    is_damaged: bool,
    /// Until this moment the process does not know the captured traffic, and must not change anything.
    unknown_until: Option<Instant>,
    facts: Host,
    closes_a_port: bool,
    cannot_be_read: bool,
    /// The last reading of the foreign rules failed.
    is_filter_missed: bool,
    open: usize,
    is_bypassed: bool,
    fail: Option<(u8, Failure)>,
    kill: Option<(u8, bool)>,
    bypass: Option<u8>,
    /// The kernel has not yet reported the changes of the bypass script.
    has_notice: bool,
    /// The host has changed in a way that the machine notices at its next tick.
    is_disturbed: bool,
    has_exited: bool,
    /// The spec that was last confirmed, according to the replies.
    confirmed: Spec,
}

fn start(disk: Option<&SavedState>, is_damaged: bool, is_bypassed: bool, now: Instant) -> Machine {
    let saved = match disk {
        // vmesh-net takes only the footprint from a damaged file.
        Some(saved) if is_damaged => SavedState {
            commit: confirm::CommitRecord { footprint: saved.commit.footprint.clone(), ..Default::default() },
            ..SavedState::default()
        },
        Some(saved) => {
            // The state is written and parsed, as it would be on a disk.
            serde_json::from_str(&serde_json::to_string(saved).unwrap()).unwrap()
        }
        None => SavedState::default(),
    };
    Machine::start(saved, disk.is_none() || !is_damaged, is_bypassed, DRAIN, now)
}

impl HostModel {
    fn new(has_units: bool, has_others: bool) -> HostModel {
        let now = Instant::now();
        let mut facts = Host { ipv6: true, ..Host::default() };
        facts.never.users.insert(4000);
        facts.users.insert("ghost".to_owned(), AccountNumber::Unanswered);
        if has_units {
            facts.parent_cgroups.push(ParentCgroup { cgroup: None, children: Default::default() });
        }
        let mut model = HostModel {
            machine: start(None, false, false, now),
            now,
            rules: KernelState::None,
            has_leftovers: false,
            has_others,
            ordered: None,
            disk: None,
            is_damaged: false,
            unknown_until: None,
            facts,
            closes_a_port: false,
            cannot_be_read: false,
            is_filter_missed: false,
            open: 0,
            is_bypassed: false,
            fail: None,
            kill: None,
            bypass: None,
            has_notice: false,
            is_disturbed: false,
            has_exited: false,
            confirmed: Spec::default(),
        };
        model.deliver(Event::Started);
        model
    }

    fn restart(&mut self) {
        self.kill = None;
        self.ordered = None;
        self.has_exited = false;
        self.machine = start(self.disk.as_ref(), self.is_damaged, self.is_bypassed, self.now);
        self.confirmed = self.machine.commit().confirmed.clone();
        self.unknown_until =
            (self.is_damaged && !self.is_bypassed).then(|| self.now + Duration::from_secs(120));
        self.deliver(Event::Started);
    }

    /// Passes an event to the machine and performs all actions. Returns the reply; `None` also if the process
    /// was killed.
    fn deliver(&mut self, event: Event) -> Option<Result<(), String>> {
        let says_what_is_wanted = match &event {
            Event::Want { .. } | Event::Stop => true,
            Event::Tick { bypassed, .. } | Event::RulesChanged { bypassed, .. } => *bypassed,
            _ => false,
        };
        // A bypass is on the disk, so the next process knows of it too.
        if says_what_is_wanted {
            self.unknown_until = None;
        }
        let mut reply = None;
        let mut actions = VecDeque::from(self.machine.on(event, self.now));
        while let Some(action) = actions.pop_front() {
            let awaits = action.awaits_result();
            assert!(!awaits || actions.is_empty(), "an action that awaits a result is the last: {actions:?}");
            if let Some((after, done)) = self.kill.filter(|_| awaits) {
                if after == 0 {
                    if done {
                        self.perform(action, None);
                    }
                    self.restart();
                    return None;
                }
                self.kill = Some((after - 1, done));
            }
            match self.bypass.filter(|_| awaits) {
                Some(0) => self.run_bypass(),
                Some(after) => self.bypass = Some(after - 1),
                None => {}
            }
            let failure = match self.fail.filter(|_| awaits) {
                Some((0, failure)) => {
                    self.fail = None;
                    Some(failure)
                }
                Some((after, failure)) => {
                    self.fail = Some((after - 1, failure));
                    None
                }
                None => None,
            };
            match action {
                Action::Reply(answer) => {
                    assert!(reply.is_none(), "answered twice");
                    reply = Some(answer);
                }
                Action::Exit => self.has_exited = true,
                action => {
                    if let Some(result) = self.perform(action, failure) {
                        actions.extend(self.machine.on(result, self.now));
                    }
                }
            }
        }
        assert!(self.machine.is_idle());
        reply
    }

    /// Does what `/usr/lib/vmesh/bypass` does.
    fn run_bypass(&mut self) {
        self.bypass = None;
        (self.is_bypassed, self.is_disturbed, self.has_notice) = (true, true, true);
        self.rules = KernelState::None;
    }

    fn take_notice(&mut self) {
        if std::mem::take(&mut self.has_notice) {
            self.deliver(Event::RulesChanged { by: None, bypassed: self.is_bypassed });
        }
    }

    fn perform(&mut self, action: Action, failure: Option<Failure>) -> Option<Event> {
        let is_done = is_done(failure);
        if matches!(
            action,
            Action::Apply { .. }
                | Action::RemoveRules { .. }
                | Action::CleanOtherBackends { .. }
                | Action::Save(_)
        ) {
            let is_known = self.unknown_until.is_none_or(|until| self.now >= until);
            assert!(is_known, "{action:?} before anybody knows what is wanted");
        }
        Some(match action {
            Action::ReadHost { .. } => Event::HostRead(Box::new(self.facts.clone())),
            Action::Detect { .. } => Event::Detected(result(failure, (Backend::Iptables, true))),
            Action::ReadFilter => {
                self.is_filter_missed = failure.is_some();
                Event::FilterRead(if failure.is_some() { unreadable() } else { self.filter() })
            }
            Action::TakeFootprint => {
                Event::FootprintTaken(result(failure, Footprint::parse(&[self.chains_of_iptables()])))
            }
            Action::Save(state) => {
                if is_done {
                    self.disk = Some(*state);
                    self.is_damaged = false;
                }
                Event::Saved(result(failure, ()))
            }
            Action::ReadSessions(_) => Event::SessionsRead(Vec::new()),
            Action::CheckEnvoy(wanted) => {
                Event::EnvoyChecked(if failure.is_none() { wanted } else { Directions::NONE })
            }
            Action::CheckListeners(_) => Event::ListenersChecked(result(failure, ())),
            Action::TryPath(_) => Event::PathTried(result(failure, ())),
            Action::CountConnections => Event::ConnectionsCounted(self.open),
            Action::Apply { program, .. } => Event::Applied(self.apply(program, failure)),
            Action::CleanOtherBackends { program, .. } => {
                if is_done && failure != Some(Failure::Half) && program.is_absent() {
                    self.has_others = false;
                }
                Event::OtherBackendsCleaned(result(failure, ()))
            }
            Action::RemoveRules { footprint } => {
                Event::RulesRemoved(result(failure, self.remove_rules(footprint, failure)))
            }
            Action::SetTimers(dead_man_timers) => {
                self.ordered = dead_man_timers;
                return None;
            }
            Action::ForgetRules | Action::Watch(_) | Action::Log(..) => return None,
            Action::Reply(_) | Action::Exit => return None,
        })
    }

    /// Lists the chains that iptables leaves behind, as nft prints them.
    fn chains_of_iptables(&self) -> &'static str {
        match self.has_leftovers {
            true => r#"{"nftables": [{"chain": {"family": "ip", "table": "nat", "name": "OUTPUT"}}]}"#,
            false => r#"{"nftables": []}"#,
        }
    }

    fn apply(&mut self, program: Program, failure: Option<Failure>) -> ApplyResult {
        self.check_before_apply(&program);
        let is_absent_or_drained = program.is_absent_or_drained();
        let then = if program.is_absent() { KernelState::None } else { KernelState::Are(program) };
        if self.rules == then || failure == Some(Failure::Unread) {
            return ApplyResult { changes: None, outcome: result(failure, RulesetChange::Elements) };
        }
        if self.is_bypassed && !is_absent_or_drained {
            return ApplyResult { changes: None, outcome: Ok(RulesetChange::Bypassed) };
        }
        if is_done(failure) {
            self.has_leftovers = true;
            self.rules = if failure == Some(Failure::Half) { KernelState::Broken } else { then };
        }
        let outcome = result(failure, RulesetChange::Replaced);
        ApplyResult { changes: Some(vec!["~ all".to_owned()]), outcome }
    }

    /// Removes the rules. Returns `true` if there were any.
    fn remove_rules(&mut self, footprint: Option<Footprint>, failure: Option<Failure>) -> bool {
        let had = self.rules != KernelState::None;
        if is_done(failure) {
            self.rules = if failure == Some(Failure::Half) { KernelState::Broken } else { KernelState::None };
            let clean = footprint.is_some_and(|before| before == Footprint::default());
            if clean && failure != Some(Failure::Half) {
                self.has_leftovers = false;
            }
        }
        had
    }

    fn filter(&self) -> Ruleset {
        if self.cannot_be_read {
            return unreadable();
        }
        let mut rules = Ruleset::default();
        if self.closes_a_port {
            let saved = "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 8081 -m conntrack ! --ctstate DNAT -j DROP\nCOMMIT\n";
            rules.add_iptables("ip", saved);
        }
        rules
    }

    /// Checks that the next process could roll back and clean up if this process died now.
    fn check_before_apply(&self, program: &Program) {
        let disk = self.disk.clone().unwrap_or_default().commit;
        let commit = self.machine.commit();
        if let (Some(trial), (_, Stage::Trial)) = (&commit.trial, self.machine.wanted()) {
            let on_disk = disk.trial.as_ref().is_some_and(|on_disk| is_routine(on_disk, trial));
            assert!(on_disk, "a trial is applied that is not on the disk");
            assert!(is_routine(&disk.confirmed, &commit.confirmed), "the disk goes back to something else");
        }
        if !program.is_absent() {
            assert!(
                self.is_damaged || disk.footprint.is_some(),
                "rules before what was there is on the disk"
            );
        }
    }

    /// Checks that the host has the wanted rules, unless the machine reports why not.
    fn check(&self) {
        let (spec, stage) = self.machine.wanted();
        if self.machine.error().is_some()
            || self.is_disturbed
            || self.has_exited
            || matches!(self.machine.life(), Lifecycle::AwaitsAgent { .. })
        {
            return;
        }
        if self.machine.state() == CaptureState::Off {
            self.check_nothing_is_left();
        }
        let ordered = self.ordered.map_or(Directions::NONE, |dead_man_timers| dead_man_timers.directions);
        if spec.is_off() {
            let drained = KernelState::Are(Program::drained(true));
            assert!(self.rules == KernelState::None || self.rules == drained, "{:?}", self.rules);
            assert!(ordered.is_empty(), "{ordered:?}");
            return;
        }
        assert!(!self.has_others, "rules by two backends");
        let program = self.program(spec, stage);
        assert_eq!(ordered, program.dead_man_timers());
        let expected = if program.is_absent() { KernelState::None } else { KernelState::Are(program) };
        assert_eq!(self.rules, expected);
    }

    fn program(&self, mut spec: Spec, stage: Stage) -> Program {
        let inbound = &mut spec.inbound;
        if (self.cannot_be_read || self.is_filter_missed)
            && directions(&Spec { inbound: inbound.clone(), ..Spec::default() }).inbound
        {
            // The port is captured according to the last verdict, or not at all. A unit test of the judge
            // checks which.
            return match &self.rules {
                KernelState::Are(program) => program.clone(),
                _ => Program::absent(),
            };
        }
        for conflict in foreign::inbound_conflicts(&self.filter(), &inbound.ports_under_the_filter()) {
            inbound.remove_ports(conflict.ports());
        }
        Program::new(&spec, &self.facts, stage).unwrap().0
    }

    fn check_nothing_is_left(&self) {
        assert_eq!(self.rules, KernelState::None);
        assert!(!self.has_leftovers, "empty chains are left");
        assert!(!self.has_others, "another backend's rules are left");
        assert_eq!(self.ordered, None);
    }

    fn tick(&mut self) {
        self.take_notice();
        self.now += TICK;
        let event = Event::Tick { bypassed: self.is_bypassed, outbound_is_well: true };
        // If the process is killed in this tick, the changes stay unnoticed.
        self.is_disturbed = false;
        self.deliver(event);
        self.check();
    }

    fn until(&mut self, awaited: &str, holds: impl Fn(&HostModel) -> bool) {
        for _ in 0..LONG {
            if holds(self) {
                return;
            }
            self.tick();
        }
        panic!("{awaited}: {:?}, {:?}, {:?}", self.machine.state(), self.machine.error(), self.rules);
    }

    fn run(&mut self, op: &ModelStep) {
        self.take_notice();
        let on_trial = self.machine.commit().trial.clone();
        let number = self.machine.trial().map_or(0, |(number, _)| number);
        match op.clone() {
            ModelStep::Want { spec: which, endpoints } => self.want(spec(which, endpoints), number),
            ModelStep::Confirm => {
                if self.deliver(Event::Confirm { trial: number }) == Some(Ok(())) {
                    self.confirmed = on_trial.unwrap();
                }
            }
            ModelStep::Revert => {
                self.deliver(Event::Revert { trial: number, why: "it does not work".to_owned() });
            }
            ModelStep::Retry => _ = self.deliver(Event::Retry),
            ModelStep::Ticks(ticks) => (0..ticks).for_each(|_| self.tick()),
            ModelStep::Bypass(bypassed) => {
                self.is_disturbed = true;
                self.is_bypassed = bypassed;
            }
            ModelStep::BypassAmid { after } => self.bypass = Some(after),
            ModelStep::Connections(open) => {
                self.is_disturbed = true;
                self.open = open;
            }
            ModelStep::Others(change) => self.change_by_another_program(change),
            ModelStep::UnitsStarted => {
                self.is_disturbed = true;
                self.deliver(Event::UnitsStarted);
            }
            ModelStep::RefreshFailed => _ = self.deliver(Event::RefreshFailed("no list".to_owned())),
            ModelStep::Fail { after, failure } => self.fail = Some((after, failure)),
            ModelStep::Kill { after, done } => self.kill = Some((after, done)),
            ModelStep::Damage => {
                self.is_damaged = self.disk.is_some();
                self.restart();
            }
            ModelStep::Stop => {
                self.kill = None;
                self.deliver(Event::Stop);
                self.until("the process to end", |model| model.has_exited);
                self.restart();
            }
            ModelStep::Handover => {
                (self.kill, self.bypass) = (None, None);
                let before = self.rules.clone();
                self.deliver(Event::Handover);
                assert_eq!(self.rules, before, "a handover changes no rule");
                self.restart();
            }
        }
        let now_confirmed = &self.machine.commit().confirmed;
        assert!(
            is_routine(now_confirmed, &self.confirmed),
            "{op:?} confirmed {now_confirmed:?}, and it was {:?}",
            self.confirmed
        );
        self.check();
    }

    /// Asks for `spec`. `number` is the number of the trial before.
    fn want(&mut self, spec: Spec, number: u64) {
        let agent_facts = AgentFacts::default();
        let answer =
            self.deliver(Event::Want { spec: Box::new(spec.clone()), agent_facts, patience: PATIENCE });
        let confirmed = &self.machine.commit().confirmed;
        if confirmed.is_off() && spec.is_off() || is_routine(&self.confirmed, confirmed) {
            self.confirmed = confirmed.clone();
        }
        let is_new = self.machine.trial().is_some_and(|(trial, _)| trial != number);
        let is_refused = matches!(answer, Some(Err(_)));
        assert!(!(is_new && is_refused), "what was refused is not tried");
        assert!(!(is_new && self.machine.error().is_some()), "what could not be applied is not tried");
    }

    fn change_by_another_program(&mut self, change: ForeignChange) {
        match change {
            ForeignChange::TakesOurs => self.rules = KernelState::None,
            ForeignChange::MakesOursOther if self.rules != KernelState::None => {
                self.rules = KernelState::Broken
            }
            ForeignChange::MakesOursOther => {}
            ForeignChange::ClosesAPort => self.closes_a_port = true,
            ForeignChange::OpensIt => (self.closes_a_port, self.cannot_be_read) = (false, false),
            ForeignChange::CannotBeRead => self.cannot_be_read = true,
        }
        self.is_disturbed = true;
        self.deliver(Event::RulesChanged { by: None, bypassed: self.is_bypassed });
    }

    /// Ends the sequence: nothing fails any more, and no trial is confirmed.
    fn settle(&mut self) {
        (self.fail, self.kill, self.bypass) = (None, None, None);
        (self.open, self.is_bypassed, self.cannot_be_read) = (0, false, false);
        self.deliver(Event::RulesChanged { by: None, bypassed: false });
        (0..LONG).for_each(|_| self.tick());
        assert_eq!(self.machine.trial(), None, "nobody confirmed it");
        let (spec, stage) = self.machine.wanted();
        assert_eq!(stage, Stage::Confirmed);
        assert!(confirm::restrict_to(&self.confirmed, &spec) == spec, "{spec:?} was never confirmed");
        assert!(!matches!(self.machine.life(), Lifecycle::AwaitsAgent { .. }));
    }
}

/// Reports whether an action with this failure does its work, or a part of it.
fn is_done(failure: Option<Failure>) -> bool {
    !matches!(failure, Some(Failure::Undone | Failure::Unread))
}

fn result<T>(failure: Option<Failure>, value: T) -> Result<T, String> {
    if failure.is_none() { Ok(value) } else { Err("sabotaged".to_owned()) }
}

fn unreadable() -> Ruleset {
    let mut rules = Ruleset::default();
    rules.add_gap("nft is slow");
    rules
}

/// Runs generated sequences of steps, each followed by `end`.
fn check(cases: u32, end: impl Fn(&mut HostModel)) {
    let config = ProptestConfig {
        failure_persistence: None,
        max_shrink_iters: 20_000,
        ..ProptestConfig::with_cases(cases)
    };
    let sequences = (any::<bool>(), any::<bool>(), proptest::collection::vec(op(), 1..30));
    let result = TestRunner::new(config).run(&sequences, |(has_units, has_others, ops)| {
        let mut model = HostModel::new(has_units, has_others);
        for op in &ops {
            model.run(op);
        }
        end(&mut model);
        Ok(())
    });
    if let Err(error) = result {
        panic!("{error}");
    }
}

#[test]
fn whatever_fails_a_host_ends_as_it_is_wanted_or_as_it_was_and_never_in_between() {
    check(3000, HostModel::settle);
}

#[test]
fn whatever_failed_before_off_leaves_nothing() {
    check(1500, |model| {
        (model.fail, model.kill, model.bypass) = (None, None, None);
        (model.open, model.is_bypassed) = (0, false);
        model.tick();
        model.run(&ModelStep::Want { spec: 0, endpoints: 0 });
        model.until("the rules to go", |model| {
            model.machine.state() == CaptureState::Off && model.machine.error().is_none()
        });
        model.check_nothing_is_left();
        assert_eq!(model.machine.commit().footprint, None);
    });
}

#[test]
fn whatever_failed_before_a_process_that_is_stopped_leaves_nothing() {
    check(1500, |model| {
        (model.fail, model.kill, model.bypass, model.open) = (None, None, None, 0);
        model.deliver(Event::Stop);
        model.until("the process to end", |model| model.has_exited);
        model.check_nothing_is_left();
    });
}
