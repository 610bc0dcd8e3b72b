//! Performs the actions of [`vmesh_capture::machine`] on this host: runs tools, reads `/proc`, writes the
//! state, dials Envoy. All decisions are the machine's.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

use tracing::{debug, error, info, warn};
use vmesh_capture::Directions;
use vmesh_capture::Program;
use vmesh_capture::apply::{Applier, Backend, Error, InstalledRules, RecentRuns};
use vmesh_capture::arrivals::{ArrivalLosses, IpFamily};
use vmesh_capture::facts::OwnTraffic;
use vmesh_capture::foreign::{self, ForeignRule, InboundSuspects, Ruleset};
use vmesh_capture::generations::Generation;
use vmesh_capture::host::{Host, HostMemory, ParentCgroup};
use vmesh_capture::iptables::Footprint;
use vmesh_capture::machine::{
    Action, AgentFacts, ApplyResult, DeadManTimers, Event, LogLevel, PathTest, RulesetChange,
};
use vmesh_capture::spec::{INBOUND_PORT, Seconds, Spec};
use vmesh_daemon::report::one_line;

use crate::heartbeat::{InstalledTimers, explain_lapse};
use crate::keeper::{KeeperChannels, Options};
use crate::probe;
use crate::protocol::EnvoyHealth;
use crate::state_file;

/// The number of failed attempts to list the rules of another backend, after which it is ignored. An idle
/// host tries once a minute.
const LISTED_AT_MOST: u32 = 10;

/// The connection between the machine and this host.
pub(crate) struct Executor {
    pub(crate) options: Options,
    pub(crate) channels: KeeperChannels,
    applier: Option<Applier>,
    /// Other backends that may still hold rules from an earlier process, with the number of failed attempts
    /// to list their rules. A backend is removed once its rules are verified absent.
    others: Vec<(Applier, u32)>,
    /// The rules of vmesh in the kernel; `None` once another program may have changed them.
    actual: Option<InstalledRules>,
    losses: ArrivalLosses,
}

impl Executor {
    pub(crate) fn new(options: Options, channels: KeeperChannels) -> Executor {
        Executor {
            options,
            channels,
            applier: None,
            others: Vec::new(),
            actual: None,
            losses: ArrivalLosses::default(),
        }
    }

    pub(crate) fn backend(&self) -> Option<Backend> {
        self.applier.as_ref().map(|applier| applier.backend)
    }

    /// Reports whether a tool of this process made the change.
    pub(crate) fn is_ours(&self, change: &Generation) -> bool {
        self.applier.as_ref().is_some_and(|applier| applier.recent_runs.contains(change))
    }

    /// Performs an action. Returns the result if the machine waits for it.
    pub(crate) async fn perform(&mut self, action: Action) -> Option<Event> {
        Some(match action {
            Action::ReadHost { spec, agent_facts, memory } => {
                let host = read_host(&self.options, &spec, &agent_facts, &memory).await;
                self.watch_parent_cgroups(&host);
                Event::HostRead(Box::new(host))
            }
            Action::Detect { ipv6 } => Event::Detected(self.detect(ipv6).await),
            Action::ReadFilter => Event::FilterRead(self.read_filter().await),
            Action::TakeFootprint => Event::FootprintTaken(match self.applier() {
                Ok(applier) => applier.footprint().await.map_err(|error| one_line(&error)),
                Err(why) => Err(why),
            }),
            Action::Save(state) => Event::Saved(state_file::save(&state, &self.options.state_file())),
            Action::ReadSessions(ports) => Event::SessionsRead(self.options.host_paths.ssh_sessions(&ports)),
            Action::CheckEnvoy(wanted) => Event::EnvoyChecked(self.check_envoy(wanted).await),
            Action::CheckListeners(directions) => {
                Event::ListenersChecked(self.check_listeners(directions).await)
            }
            Action::TryPath(test) => Event::PathTried(self.try_path(&test).await),
            Action::CountConnections => Event::ConnectionsCounted(self.options.host_paths.count_redirected()),
            Action::Apply { program, timeout, well } => {
                Event::Applied(self.apply(&program, timeout, well).await)
            }
            Action::CleanOtherBackends { program, footprint } => {
                let ended = self.clean_other_backends(&program, footprint.as_ref()).await;
                Event::OtherBackendsCleaned(ended.map_err(|error| one_line(&error)))
            }
            Action::RemoveRules { footprint } => {
                self.actual = None;
                Event::RulesRemoved(match self.applier() {
                    Ok(applier) => match applier.off(footprint.as_ref()).await {
                        Ok(plan) => Ok(!plan.is_empty()),
                        Err(error) => Err(one_line(&error)),
                    },
                    Err(why) => Err(why),
                })
            }
            Action::ForgetRules => {
                self.actual = None;
                return None;
            }
            Action::Watch(directions) => {
                self.channels
                    .probed
                    .send_if_modified(|looks| std::mem::replace(looks, directions) != directions);
                return None;
            }
            Action::SetTimers(dead_man_timers) => {
                self.publish_timers(dead_man_timers);
                return None;
            }
            Action::Log(level, text) => {
                match level {
                    LogLevel::Info => info!("{text}"),
                    LogLevel::Warn => warn!("{text}"),
                    LogLevel::Error => error!("{text}"),
                }
                return None;
            }
            // The keeper handles these itself.
            Action::Reply(_) | Action::Exit => return None,
        })
    }

    fn applier(&self) -> Result<Applier, String> {
        self.applier
            .clone()
            .ok_or_else(|| "vmesh-net has not found a tool that can change rules on this host yet".to_owned())
    }

    async fn detect(&mut self, ipv6: bool) -> Result<(Backend, bool), String> {
        let applier = applier(&self.options, ipv6).await.map_err(|error| one_line(&error))?;
        self.others = applier.other_backends().await.into_iter().map(|other| (other, 0)).collect();
        let backend = applier.backend;
        self.applier = Some(applier);
        Ok((backend, ipv6))
    }

    fn watch_parent_cgroups(&self, host: &Host) {
        let root = self.options.host_paths.cgroup.clone().unwrap_or_default();
        let dir = |parent: &ParentCgroup| match &parent.cgroup {
            Some(cgroup) => root.join(cgroup.path.as_str()),
            None => root.clone(),
        };
        let dirs: BTreeSet<PathBuf> = host.parent_cgroups.iter().map(dir).collect();
        self.channels.parent_cgroups.send_if_modified(|known| std::mem::replace(known, dirs.clone()) != dirs);
    }

    async fn read_filter(&self) -> Ruleset {
        match self.applier() {
            Ok(applier) => applier.foreign_rules().await,
            Err(why) => {
                let mut rules = Ruleset::default();
                rules.add_gap(why);
                rules
            }
        }
    }

    /// Returns the directions in which Envoy's listener and the agent are well, so that redirects may hold at
    /// once.
    async fn check_envoy(&self, wanted: Directions) -> Directions {
        if !self.channels.agent.is_well() {
            return Directions::NONE;
        }
        let mut health = *self.channels.probe_results.borrow();
        let withdrawn = self.channels.timers.borrow().withdrawn();
        let is_unknown =
            |direction| health.of(direction) == EnvoyHealth::Unknown || withdrawn.contains(direction);
        if wanted.iter().any(is_unknown) {
            health = probe::probe_listeners(wanted, &self.options.users).await;
        }
        health.well().and(wanted)
    }

    async fn check_listeners(&self, directions: Directions) -> Result<(), String> {
        for direction in directions.iter() {
            let health = probe::probe_listener(direction, &self.options.users).await;
            if health != EnvoyHealth::Well {
                let port = probe::port(direction);
                return Err(format!(
                    "Envoy does not serve its capture port {port}: {}",
                    explain_lapse(health)
                ));
            }
        }
        Ok(())
    }

    /// Tests whether captured connections arrive at Envoy: dials test addresses, and counts connections of
    /// other hosts.
    async fn try_path(&mut self, test: &PathTest) -> Result<(), String> {
        let mut faults = Vec::new();
        for address in &test.dial {
            faults.extend(self.dial_captured(*address).await.err());
        }
        if !test.inbound.is_empty() {
            faults.extend(self.count_arrivals(test).await);
        }
        if faults.is_empty() { Ok(()) } else { Err(faults.join("; ")) }
    }

    /// Dials an address of the self-test, which is captured like a virtual address.
    async fn dial_captured(&self, address: SocketAddr) -> Result<(), String> {
        let mut health = probe::dial(address).await;
        if health != EnvoyHealth::Well {
            // A single lost packet does not count as a failure.
            health = probe::dial(address).await;
        }
        // Without an IPv6 route, no program gets as far as being captured; all use IPv4.
        if health == EnvoyHealth::Well || (address.is_ipv6() && !probe::has_ipv6_route(address)) {
            return Ok(());
        }
        let suspects =
            foreign::outbound_suspects(&self.read_filter().await, address.port(), address.is_ipv4());
        let rules = match suspects.is_empty() {
            true => String::new(),
            false => format!("; rules that may drop it: {}", listed(&suspects)),
        };
        Err(format!("a test connection to {address} did not reach Envoy: {}{rules}", explain_dial(health)))
    }

    /// Describes the address families whose redirected connections do not pass the host's own filter.
    async fn count_arrivals(&mut self, test: &PathTest) -> Vec<String> {
        let counted = match self.applier() {
            Ok(applier) => applier.arrivals().await.map_err(|error| one_line(&error)),
            Err(why) => Err(why),
        };
        let counts = match counted {
            Ok(counts) => counts,
            Err(why) => {
                // Rules without any redirect have no counters. If they are being changed, the next test
                // counts again.
                debug!("could not count connections from outside: {why}");
                return Vec::new();
            }
        };
        if test.is_afresh {
            self.losses.begin_at(counts);
        }
        let lost = self.losses.observe(counts);
        if lost.is_empty() {
            return Vec::new();
        }
        let rules = self.read_filter().await;
        let fault = |(family, lost): &(IpFamily, u64)| {
            let suspects = foreign::inbound_suspects(&rules, &test.inbound, *family == IpFamily::V4);
            let why = match suspects {
                InboundSuspects::Unwanted => return None,
                InboundSuspects::Rules(rules) if rules.is_empty() => {
                    "vmesh knows no rule that drops them, see `nft list ruleset`".to_owned()
                }
                InboundSuspects::Rules(rules) => {
                    format!("rules that may drop them: {}", listed(&rules))
                }
            };
            Some(format!(
                "this host's own filter dropped the last {lost} connections of {family} from outside that were redirected to Envoy's port \
                 {INBOUND_PORT}: {why}. Accept TCP port {INBOUND_PORT} in the filter, or use `capture.inbound: {{capture: tproxy}}`"
            ))
        };
        lost.iter().filter_map(fault).collect()
    }

    async fn apply(&mut self, program: &Program, timeout: Seconds, well: Directions) -> ApplyResult {
        let not_attempted = |why| ApplyResult { changes: None, outcome: Err(why) };
        let applier = match self.applier() {
            Ok(applier) => applier,
            Err(why) => return not_attempted(why),
        };
        let actual = match self.actual.take() {
            Some(actual) => actual,
            None => match applier.read().await {
                Ok(actual) => actual,
                Err(error) => return not_attempted(one_line(&error)),
            },
        };
        let plan = applier.plan(program, &actual, well);
        if plan.is_empty() {
            self.actual = Some(actual);
            return ApplyResult { changes: None, outcome: Ok(RulesetChange::Elements) };
        }
        if !program.is_absent_or_drained() && self.options.bypass_flag().exists() {
            return ApplyResult { changes: None, outcome: Ok(RulesetChange::Bypassed) };
        }
        let changes = plan.changes.iter().map(ToString::to_string).collect();
        let outcome = match applier.reconcile_elements(program, &actual).await {
            Ok(Some(then)) => {
                self.actual = Some(then);
                Ok(RulesetChange::Elements)
            }
            Ok(None) => {
                let alive = Some((timeout, well)).filter(|(_, well)| !well.is_empty());
                applier.reconcile_with_timers(program, alive).await.map(|_| RulesetChange::Replaced)
            }
            Err(error) => Err(error),
        };
        ApplyResult { changes: Some(changes), outcome: outcome.map_err(|error| one_line(&error)) }
    }

    /// Publishes the dead-man timers in the kernel for the heartbeat task.
    fn publish_timers(&self, dead_man_timers: Option<DeadManTimers>) {
        self.channels.installed.send_if_modified(|installed| {
            let Some((dead_man_timers, applier)) = dead_man_timers.zip(self.applier.as_ref()) else {
                return installed.take().is_some();
            };
            let is_same = installed.as_ref().is_some_and(|installed| {
                installed.replaced == dead_man_timers.replaced
                    && installed.directions == dead_man_timers.directions
                    && installed.timeout == dead_man_timers.timeout
            });
            if is_same {
                return false;
            }
            *installed = Some(InstalledTimers {
                applier: applier.clone(),
                timeout: dead_man_timers.timeout,
                directions: dead_man_timers.directions,
                replaced: dead_man_timers.replaced,
                refreshed: dead_man_timers.refreshed,
                at: Instant::now(),
            });
            true
        });
    }

    /// Makes the rules of vmesh that other backends hold match `program`.
    async fn clean_other_backends(
        &mut self,
        program: &Program,
        footprint: Option<&Footprint>,
    ) -> Result<(), Error> {
        let mut failed = None;
        for (other, failures) in std::mem::take(&mut self.others) {
            match other.is_absent().await {
                Ok(true) => continue,
                Ok(false) if program.is_absent() => match other.off(footprint).await {
                    Ok(_) => {
                        info!("removed the rules that an earlier vmesh-net installed with {}", other.backend);
                    }
                    Err(error) => {
                        self.others.push((other, 0));
                        failed = failed.or(Some(error));
                    }
                },
                Ok(false) => {
                    failed = failed.or(other.reconcile(program, None).await.err());
                    self.others.push((other, 0));
                }
                Err(Error::Slow { .. }) => self.others.push((other, failures)),
                // A lock may be held, or the kernel may permanently lack a feature that this tool needs.
                Err(error) if !error.is_not_installed() && failures < LISTED_AT_MOST => {
                    debug!(
                        "could not list the rules of {}, and tries again: {}",
                        other.backend,
                        one_line(&error)
                    );
                    self.others.push((other, failures + 1));
                }
                // A tool that is missing or cannot work here has not added any rules.
                Err(error) => debug!(
                    "could not list the rules of {}, and does not try again: {}",
                    other.backend,
                    one_line(&error)
                ),
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Describes the failure of a test connection.
fn explain_dial(health: EnvoyHealth) -> &'static str {
    match health {
        EnvoyHealth::Gone => "it was refused, or another program answered",
        EnvoyHealth::Hangs => "nothing answered in time",
        EnvoyHealth::Well | EnvoyHealth::WrongUser | EnvoyHealth::Unknown | EnvoyHealth::Other => {
            "its result is unknown"
        }
    }
}

/// Joins the first three rules for a message.
fn listed(rules: &[ForeignRule]) -> String {
    let rules: Vec<String> = rules.iter().take(3).map(ToString::to_string).collect();
    rules.join(" | ")
}

pub(crate) async fn applier(options: &Options, ipv6: bool) -> Result<Applier, Error> {
    match options.backend {
        Some(backend) => {
            Ok(Applier { backend, tools: options.tools.clone(), ipv6, recent_runs: RecentRuns::default() })
        }
        None => Applier::detect(options.tools.clone(), ipv6).await,
    }
}

pub(crate) async fn read_host(
    options: &Options,
    spec: &Spec,
    agent_facts: &AgentFacts,
    memory: &HostMemory,
) -> Host {
    let own = OwnTraffic {
        users: options.users.clone(),
        slices: options.slices.clone(),
        ports: agent_facts.ports.clone(),
        control_planes: agent_facts.control_planes.clone(),
    };
    options.host_paths.read_host(spec, &own, memory).await
}
