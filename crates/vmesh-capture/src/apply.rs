//! Applies plans: runs `nft`, `iptables-save` and `iptables-restore`, and reads back the resulting rules.

use std::collections::VecDeque;
use std::fmt;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::time::timeout;

use crate::arrivals::{ArrivalCounts, IpFamily};
use crate::foreign::{self, Ruleset};
use crate::generations::{self, Generation};
use crate::iptables::{self, FamilyRules, Footprint};
use crate::nft;
use crate::plan::{Plan, Tool};
use crate::program::{ARRIVED, ARRIVING, Directions, Program};
use crate::programs;
use crate::spec::Seconds;

/// The tool family that manages the rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Backend {
    Nft,
    Iptables,
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Backend::Nft => "nft",
            Backend::Iptables => "iptables",
        })
    }
}

/// The programs to run, each by path or by a name that [`programs::find`] looks up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tools {
    pub nft: PathBuf,
    pub iptables_save: PathBuf,
    pub iptables_restore: PathBuf,
    pub ip6tables_save: PathBuf,
    pub ip6tables_restore: PathBuf,
    /// The directory in which the kernel shows the lists of iptables' `recent` match.
    pub recent: PathBuf,
    /// The time limit of one call. A program that takes longer is killed. The lock of iptables is waited for
    /// up to 5 s.
    pub timeout: Duration,
}

impl Default for Tools {
    fn default() -> Self {
        Tools {
            nft: "nft".into(),
            iptables_save: "iptables-save".into(),
            iptables_restore: "iptables-restore".into(),
            ip6tables_save: "ip6tables-save".into(),
            ip6tables_restore: "ip6tables-restore".into(),
            recent: "/proc/net/xt_recent".into(),
            timeout: Duration::from_secs(10),
        }
    }
}

/// The rules of vmesh that the host has.
#[derive(Debug, Clone, PartialEq)]
pub enum InstalledRules {
    Nft(nft::NftRules),
    Iptables(iptables::IptablesRules),
}

/// A failure of a tool: it could not be run, or the resulting rules differ from the wanted ones.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(
        "could not run `{command}` to {purpose}; check that it is installed and that this process may run it"
    )]
    NotRun {
        command: String,
        purpose: &'static str,
        #[source]
        cause: std::io::Error,
    },
    #[error(
        "could not {purpose}: `{command}` did not end within {after:?} and was killed; another program may hold the lock of \
             the rules"
    )]
    Slow { command: String, purpose: &'static str, after: Duration },
    #[error("could not {purpose}: `{command}` failed: {output}{hint}")]
    Failed { command: String, purpose: &'static str, output: String, hint: &'static str },
    #[error("could not read the installed rules")]
    InvalidListing(#[from] nft::InvalidListing),
    #[error("could not renew the dead-man timer in {path}; new connections go past Envoy once it lapses")]
    Recent {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error(
        "`{tool}` reported success, and the installed rules still differ: {changes}; another program may change them at the \
             same time"
    )]
    NotDone { tool: &'static str, changes: String },
}

impl Error {
    /// Reports whether the program is not installed on this host.
    pub fn is_not_installed(&self) -> bool {
        matches!(self, Error::NotRun { cause, .. } if cause.kind() == ErrorKind::NotFound)
    }
}

/// Formats the error and its causes on one line.
fn one_line(error: &Error) -> String {
    let mut line = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(inner) = cause {
        line = format!("{line}: {inner}");
        cause = inner.source();
    }
    line
}

/// Reads and changes the rules of this host through one backend. Needs CAP_NET_ADMIN; with iptables also
/// CAP_NET_RAW.
#[derive(Debug, Clone)]
pub struct Applier {
    pub backend: Backend,
    pub tools: Tools,
    /// True if the host has IPv6: see [`crate::Host::ipv6`].
    pub ipv6: bool,
    /// The last programs that this process ran, whose changes are not reported as drift.
    pub recent_runs: RecentRuns,
}

/// The last programs that this process ran, and the generations of nftables that they made.
///
/// The kernel reports the process that made a generation by its process id in the initial pid namespace. In
/// another namespace ids cannot be compared, and generation numbers alone are used: a run that produced
/// exactly as many generations as it has transactions is taken as their author.
#[derive(Debug, Clone, Default)]
pub struct RecentRuns(Arc<Mutex<RecentRunsState>>);

#[derive(Debug, Default)]
struct RecentRunsState {
    pids: VecDeque<u32>,
    generations: VecDeque<u32>,
}

impl RecentRuns {
    const KEPT: usize = 32;

    /// Reports whether one of the recorded programs made this generation.
    pub fn contains(&self, made: &Generation) -> bool {
        let runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        made.number.is_some_and(|number| runs.generations.contains(&number))
            || (generations::has_initial_pids() && runs.pids.contains(&made.pid))
    }

    fn add(&self, pid: Option<u32>) {
        let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        keep_last(&mut runs.pids, pid, Self::KEPT);
    }

    /// Records the generations of a run with `transactions` transactions, unless another program made some at
    /// the same time.
    fn add_generations(&self, before: Option<u32>, after: Option<u32>, transactions: usize) {
        let (Some(before), Some(after)) = (before, after) else { return };
        let made = after.wrapping_sub(before);
        if u32::try_from(transactions).is_ok_and(|transactions| made == transactions)
            && transactions <= Self::KEPT
        {
            let mut runs = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            let numbers = (1..=made).map(|step| before.wrapping_add(step));
            keep_last(&mut runs.generations, numbers, Self::KEPT);
        }
    }
}

fn keep_last(list: &mut VecDeque<u32>, more: impl IntoIterator<Item = u32>, kept: usize) {
    list.extend(more);
    let surplus = list.len().saturating_sub(kept);
    list.drain(..surplus);
}

const LIST_RULES: &str = "list the rules";
/// The limit of a tool's output, enough for rules with some hundred thousand destinations. The unit of
/// vmesh-net has a memory limit of 256 MiB.
const MAX_OUTPUT: u64 = 32 << 20;

impl Applier {
    /// Returns the backend that works on this host: nftables, or else iptables. Checks sample rules with the
    /// kernel, and changes nothing.
    ///
    /// # Errors The error of nftables if neither backend works, since nftables is the one to install.
    /// [`Error::Slow`] if nftables does not answer in time.
    pub async fn detect(tools: Tools, ipv6: bool) -> Result<Applier, Error> {
        let nftables = Applier { backend: Backend::Nft, tools, ipv6, recent_runs: RecentRuns::default() };
        let wrong = match nftables.check_usable().await {
            Ok(()) => return Ok(nftables),
            // nftables is there but busy. With a fallback to iptables the host would end up with rules of
            // both.
            Err(slow @ Error::Slow { .. }) => return Err(slow),
            Err(wrong) => wrong,
        };
        let iptables = Applier { backend: Backend::Iptables, ..nftables };
        iptables.check_usable().await.map(|()| iptables).map_err(|_| wrong)
    }

    async fn check_usable(&self) -> Result<(), Error> {
        self.read().await?;
        let nothing = match self.backend {
            Backend::Nft => InstalledRules::Nft(nft::NftRules::absent()),
            Backend::Iptables => InstalledRules::Iptables(iptables::IptablesRules::absent(self.ipv6)),
        };
        self.check(&self.plan(&Program::sample(self.ipv6), &nothing, true)).await
    }

    /// Returns the other backends that may still hold rules of vmesh: an earlier process may have used
    /// another backend or the other kind of iptables (nft or legacy), and no tool lists what another one
    /// added.
    pub async fn other_backends(&self) -> Vec<Applier> {
        let of_kind = |kind: &str| {
            let named =
                |family: &str, path: &Path, verb: &str| path.with_file_name(format!("{family}{kind}-{verb}"));
            let tools = Tools {
                iptables_save: named("iptables", &self.tools.iptables_save, "save"),
                iptables_restore: named("iptables", &self.tools.iptables_restore, "restore"),
                ip6tables_save: named("ip6tables", &self.tools.ip6tables_save, "save"),
                ip6tables_restore: named("ip6tables", &self.tools.ip6tables_restore, "restore"),
                ..self.tools.clone()
            };
            Applier { backend: Backend::Iptables, tools, ..self.clone() }
        };
        if self.backend == Backend::Nft {
            return ["", "-nft", "-legacy"].map(of_kind).into();
        }
        let version =
            self.run(&self.tools.iptables_save, &["--version"], "find out the kind of iptables", None).await;
        let other_kind = match version {
            Ok(version) if version.contains("nf_tables") => Some("-legacy"),
            Ok(_) => Some("-nft"),
            Err(_) => None,
        };
        let nftables = Applier { backend: Backend::Nft, ..self.clone() };
        other_kind.map(of_kind).into_iter().chain([nftables]).collect()
    }

    /// Reports whether this backend has no rules of vmesh.
    pub async fn is_absent(&self) -> Result<bool, Error> {
        Ok(self.plan(&Program::absent(), &self.read().await?, false).is_empty())
    }

    /// Reads the rules of vmesh that are installed.
    pub async fn read(&self) -> Result<InstalledRules, Error> {
        match self.backend {
            Backend::Nft => self.read_nft().await.map(InstalledRules::Nft),
            Backend::Iptables => {
                let v4 = self.run(&self.tools.iptables_save, &[], LIST_RULES, None).await?;
                let v6 = match self.ipv6 {
                    true => Some(self.run(&self.tools.ip6tables_save, &[], LIST_RULES, None).await?),
                    false => None,
                };
                let (v4, v6) = (FamilyRules::parse(&v4), v6.map(|text| FamilyRules::parse(&text)));
                Ok(InstalledRules::Iptables(iptables::IptablesRules { v4, v6 }))
            }
        }
    }

    async fn read_nft(&self) -> Result<nft::NftRules, Error> {
        let nft = &self.tools.nft;
        match self.run(nft, &["-j", "list", "table", "inet", "vmesh"], LIST_RULES, None).await {
            Ok(json) => Ok(nft::NftRules::parse(&json)?),
            Err(failed @ Error::Failed { .. }) => {
                // nft reports a missing table in words that differ between its versions, so the table is
                // looked up in the list.
                let tables = self.run(nft, &["list", "tables"], LIST_RULES, None).await?;
                let is_there = tables.lines().any(|line| line.trim() == "table inet vmesh");
                if is_there { Err(failed) } else { Ok(nft::NftRules::absent()) }
            }
            Err(failed) => Err(failed),
        }
    }

    /// Reads the counters of redirected connections from outside.
    ///
    /// # Errors
    /// If the rules have no inbound redirect, and so no counters.
    pub async fn arrivals(&self) -> Result<ArrivalCounts, Error> {
        let purpose = "count connections from outside";
        let mut counts = ArrivalCounts::default();
        match self.backend {
            Backend::Nft => {
                // `ARRIVED` is read last, so that a connection between the two readings does not count as
                // lost.
                for chain in [ARRIVING, ARRIVED] {
                    let arguments = ["-j", "list", "chain", "inet", "vmesh", chain];
                    counts.add_nft(&self.run(&self.tools.nft, &arguments, purpose, None).await?);
                }
            }
            Backend::Iptables => {
                let families =
                    [(IpFamily::V4, &self.tools.iptables_save), (IpFamily::V6, &self.tools.ip6tables_save)];
                for (family, save) in
                    families.into_iter().filter(|(family, _)| self.ipv6 || *family == IpFamily::V4)
                {
                    for table in ["mangle", "nat"] {
                        let saved = self.run(save, &["-c", "-t", table], purpose, None).await?;
                        counts.add_iptables(family, &saved);
                    }
                }
            }
        }
        Ok(counts)
    }

    /// Reads the foreign rules with every tool that is installed. An installed tool that fails, is slow or
    /// prints too much leaves a gap: see [`Ruleset::gaps`].
    pub async fn foreign_rules(&self) -> Ruleset {
        let tools = &self.tools;
        let legacy = |save: &Path, name: &str| save.with_file_name(name);
        let (legacy_v4, legacy_v6) = (
            legacy(&tools.iptables_save, "iptables-legacy-save"),
            legacy(&tools.ip6tables_save, "ip6tables-legacy-save"),
        );
        let (nft, v4, v6, legacy_v4, legacy_v6) = tokio::join!(
            self.native_rules(),
            self.run(&tools.iptables_save, &[], LIST_RULES, None),
            self.run(&tools.ip6tables_save, &[], LIST_RULES, None),
            self.run(&legacy_v4, &[], LIST_RULES, None),
            self.run(&legacy_v6, &[], LIST_RULES, None),
        );
        let mut rules = Ruleset::default();
        match nft {
            Ok(Some(json)) => rules.add_nft(&json),
            Ok(None) => {}
            Err(error) => rules.add_gap(one_line(&error)),
        }
        // A kernel without IPv6 refuses every question about it.
        let families = [("ip", v4, legacy_v4, true), ("ip6", v6, legacy_v6, self.ipv6)];
        for (family, saved, legacy, is_there) in families {
            // `iptables-save` may itself be `iptables-legacy-save`, whose rules must not count twice.
            let is_legacy =
                saved.as_ref().is_ok_and(|saved| !saved.is_empty() && !foreign::is_iptables_over_nft(saved));
            for saved in [Some(saved), Some(legacy).filter(|_| !is_legacy)].into_iter().flatten() {
                match saved {
                    Ok(saved) => rules.add_iptables(family, &saved),
                    Err(error) if is_there && !error.is_not_installed() => rules.add_gap(one_line(&error)),
                    Err(_) => {}
                }
            }
        }
        rules
    }

    /// Returns the ruleset that nft lists. `None` if nft is not installed, or if it cannot list the rules but
    /// reports that all tables belong to vmesh.
    async fn native_rules(&self) -> Result<Option<String>, Error> {
        let nft = &self.tools.nft;
        let failed = match self.run(nft, &["-j", "list", "ruleset"], LIST_RULES, None).await {
            Ok(json) => return Ok(Some(json)),
            Err(missing) if missing.is_not_installed() => return Ok(None),
            Err(slow @ Error::Slow { .. }) => return Err(slow),
            Err(failed) => failed,
        };
        let tables = self.run(nft, &["list", "tables"], LIST_RULES, None).await?;
        let is_ours = |line: &str| line.is_empty() || line == "table inet vmesh";
        if tables.lines().all(|line| is_ours(line.trim())) { Ok(None) } else { Err(failed) }
    }

    /// Plans the changes that make the host match `program`. Redirects that lapse hold at once in the
    /// directions of `alive`.
    pub fn plan(&self, program: &Program, actual: &InstalledRules, alive: impl Into<Directions>) -> Plan {
        match actual {
            InstalledRules::Nft(actual) => nft::plan(program, actual, alive),
            InstalledRules::Iptables(actual) => iptables::plan(program, actual),
        }
    }

    /// Checks that the kernel and the tools accept a plan. Changes nothing.
    pub async fn check(&self, plan: &Plan) -> Result<(), Error> {
        for step in &plan.steps {
            let test = if step.tool == Tool::Nft { "-c" } else { "--test" };
            let arguments: Vec<&str> = [test].iter().chain(step.tool.arguments()).copied().collect();
            self.run(self.path(step.tool), &arguments, "check new rules", Some(&step.input)).await?;
        }
        Ok(())
    }

    /// Runs the steps of a plan in order. Each step is atomic. If one fails, the steps before it stay in
    /// force.
    pub async fn apply(&self, plan: &Plan) -> Result<(), Error> {
        for step in &plan.steps {
            self.change(step.tool, "change the rules", &step.input).await?;
        }
        Ok(())
    }

    async fn change(&self, tool: Tool, purpose: &'static str, input: &str) -> Result<(), Error> {
        let before = generations::current();
        self.run(self.path(tool), tool.arguments(), purpose, Some(input)).await?;
        let transactions = match tool {
            Tool::Nft => 1,
            Tool::IptablesRestore | Tool::Ip6tablesRestore => {
                input.lines().filter(|line| *line == "COMMIT").count()
            }
        };
        self.recent_runs.add_generations(before, generations::current(), transactions);
        Ok(())
    }

    /// Makes the host match `program`, reads the rules back, and returns the plan that was applied. Changes
    /// nothing if the host already matches. With `alive`, renews all dead-man timers at the end.
    pub async fn reconcile(&self, program: &Program, alive: Option<Seconds>) -> Result<Plan, Error> {
        let alive = alive.map(|timeout| (timeout, Directions::BOTH));
        self.reconcile_with_timers(program, alive).await
    }

    /// Does the same as [`Applier::reconcile`], but renews the dead-man timers of the given directions only.
    pub async fn reconcile_with_timers(
        &self,
        program: &Program,
        alive: Option<(Seconds, Directions)>,
    ) -> Result<Plan, Error> {
        let directions = alive.map_or(Directions::NONE, |(_, directions)| directions);
        let actual = self.read().await?;
        let plan = self.plan(program, &actual, directions);
        self.apply(&plan).await?;
        if !plan.is_empty() {
            let left = self.plan(program, &self.read().await?, directions);
            if !left.is_empty() {
                let tool = if self.backend == Backend::Nft { "nft" } else { "iptables-restore" };
                let changes: Vec<String> = left.changes.iter().map(ToString::to_string).collect();
                return Err(Error::NotDone { tool, changes: changes.join("; ") });
            }
        }
        if let Some((timeout, directions)) = alive {
            self.renew_timers(timeout, directions.and(program.dead_man_timers())).await?;
        }
        Ok(plan)
    }

    /// Does the same as [`Applier::reconcile`], for a program that differs from the known rules in set elements
    /// only. The change is a single, atomic run of nft, so the rules are not read back. Returns the resulting
    /// rules; `None`, and nothing is changed, if more than set elements differ.
    pub async fn reconcile_elements(
        &self,
        program: &Program,
        known: &InstalledRules,
    ) -> Result<Option<InstalledRules>, Error> {
        let InstalledRules::Nft(actual) = known else { return Ok(None) };
        let Some(then) = actual.with_elements_of(program) else { return Ok(None) };
        self.apply(&self.plan(program, known, false)).await?;
        Ok(Some(InstalledRules::Nft(then)))
    }

    /// Lists the chains and tables that exist before the first rule of vmesh, to be kept until
    /// [`Applier::off`]. `None` where no cleanup is needed or possible: with nftables, with legacy iptables,
    /// and without an nft to list and delete them.
    ///
    /// # Errors
    /// If the list is needed and cannot be read. Going on without it would leave chains and tables behind.
    pub async fn footprint(&self) -> Result<Option<Footprint>, Error> {
        if self.backend == Backend::Nft {
            return Ok(None);
        }
        let listed = async {
            let chains = self.run(&self.tools.nft, &["-j", "list", "chains"], LIST_RULES, None).await?;
            let tables = self.run(&self.tools.nft, &["-j", "list", "tables"], LIST_RULES, None).await?;
            Ok(Footprint::parse(&[&chains, &tables]))
        };
        match listed.await {
            Ok(footprint) => Ok(footprint),
            Err(Error::NotRun { .. }) => Ok(None),
            Err(failed) => {
                let version = self
                    .run(&self.tools.iptables_save, &["--version"], "find out the kind of iptables", None)
                    .await?;
                if version.contains("nf_tables") { Err(failed) } else { Ok(None) }
            }
        }
    }

    /// Removes all rules of vmesh, and the chains and tables that came with them. Connections through a
    /// redirect are reset, so apply [`Program::drained`] first and wait until none is left.
    pub async fn off(&self, before: Option<&Footprint>) -> Result<Plan, Error> {
        let mut plan = self.reconcile(&Program::absent(), None).await?;
        if let Some(before) = before
            && let Some(now) = self.footprint().await?
            && let InstalledRules::Iptables(actual) = self.read().await?
        {
            let more = iptables::leftovers(before, &now, &actual);
            self.apply(&more).await?;
            plan.changes.extend(more.changes);
            plan.steps.extend(more.steps);
        }
        Ok(plan)
    }

    /// Renews the dead-man timers for another `timeout`. Call this only after Envoy has just accepted a
    /// connection.
    pub async fn renew_all_timers(&self, timeout: Seconds) -> Result<(), Error> {
        let directions = match self.backend {
            Backend::Nft => self.read_nft().await?.dead_man_timers(),
            Backend::Iptables => Directions::BOTH,
        };
        self.renew_timers(timeout, directions).await
    }

    /// Does the same as [`Applier::renew_all_timers`], for those directions that have a dead-man timer and a healthy
    /// listener.
    pub async fn renew_timers(&self, timeout: Seconds, directions: Directions) -> Result<(), Error> {
        if directions.is_empty() {
            return Ok(());
        }
        match self.backend {
            Backend::Nft => self.run_timer_transaction(&nft::renew(timeout, directions)).await,
            Backend::Iptables => self.write_recent_lists(directions, |address| format!("+{address}\n")),
        }
    }

    /// Lets the dead-man timers lapse now, because Envoy is known to be dead. Directions without a timer are
    /// ignored.
    pub async fn expire_timers(&self, directions: Directions) -> Result<(), Error> {
        match self.backend {
            Backend::Iptables => match self.write_recent_lists(directions, |_| "/\n".to_owned()) {
                Err(Error::Recent { cause, .. }) if cause.kind() == ErrorKind::NotFound => Ok(()),
                done => done,
            },
            Backend::Nft => {
                let Err(failed) = self.run_timer_transaction(&nft::expire(directions)).await else {
                    return Ok(());
                };
                let there = self.read_nft().await?.dead_man_timers().and(directions);
                match there.is_empty() {
                    true => Ok(()),
                    false if there == directions => Err(failed),
                    false => self.run_timer_transaction(&nft::expire(there)).await,
                }
            }
        }
    }

    async fn run_timer_transaction(&self, input: &str) -> Result<(), Error> {
        self.change(Tool::Nft, "renew the dead-man timer", input).await
    }

    /// Writes to the `recent` list of each family. A list is missing where no rule of that family uses it.
    fn write_recent_lists(&self, directions: Directions, line: impl Fn(&str) -> String) -> Result<(), Error> {
        let families: &[bool] = if self.ipv6 { &[true, false] } else { &[true] };
        let mut written = false;
        let mut absent = None;
        let lists = directions.iter().flat_map(|direction| families.iter().map(move |v4| (direction, *v4)));
        for (direction, v4) in lists {
            let (name, anybody) = iptables::recent(direction, v4);
            let path = self.tools.recent.join(name);
            match std::fs::write(&path, line(anybody)) {
                Ok(()) => written = true,
                Err(cause) if cause.kind() == ErrorKind::NotFound => {
                    absent = Some(Error::Recent { path, cause })
                }
                Err(cause) => return Err(Error::Recent { path, cause }),
            }
        }
        absent.filter(|_| !written).map_or(Ok(()), Err)
    }

    fn path(&self, tool: Tool) -> &Path {
        match tool {
            Tool::Nft => &self.tools.nft,
            Tool::IptablesRestore => &self.tools.iptables_restore,
            Tool::Ip6tablesRestore => &self.tools.ip6tables_restore,
        }
    }

    async fn run(
        &self,
        program: &Path,
        arguments: &[&str],
        purpose: &'static str,
        input: Option<&str>,
    ) -> Result<String, Error> {
        let command = [&[program.to_string_lossy().as_ref()], arguments].concat().join(" ");
        let run = async {
            let mut run = programs::command(program)?;
            run.args(arguments);
            programs::run(run, input, MAX_OUTPUT, |pid| self.recent_runs.add(pid)).await
        };
        let output = match timeout(self.tools.timeout, run).await {
            Err(_) => return Err(Error::Slow { command, purpose, after: self.tools.timeout }),
            Ok(Err(cause)) => return Err(Error::NotRun { command, purpose, cause }),
            Ok(Ok(output)) => output,
        };
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let errors = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<&str> =
            errors.lines().map(str::trim).filter(|line| !line.is_empty()).take(4).collect();
        let output = if lines.is_empty() { output.status.to_string() } else { lines.join(" / ") };
        let hint = hint(&output);
        Err(Error::Failed { command, purpose, output, hint })
    }
}

/// Returns the advice that fits a tool's error message, or nothing.
fn hint(output: &str) -> &'static str {
    let has = |words: &[&str]| words.iter().any(|word| output.contains(word));
    if has(&["Operation not permitted", "Permission denied", "must be root"]) {
        "; it needs CAP_NET_ADMIN (and CAP_NET_RAW for iptables)"
    } else if has(&["JSON support not compiled"]) {
        "; this nft cannot print JSON: install one that can, or use the iptables backend"
    } else if has(&["cgroup"]) {
        "; a control group in the rules no longer exists: plan again"
    } else if has(&[
        "Could not process rule: No such file",
        "No such file or directory",
        "Couldn't load match",
        "Protocol not",
    ]) {
        "; the kernel may lack a module, or another program changed the rules meanwhile: plan again"
    } else if has(&["incompatible, use 'nft' tool"]) {
        "; its tables contain rules that iptables cannot show: use the nftables backend"
    } else if has(&["xtables lock"]) {
        "; another program holds the lock of iptables"
    } else {
        ""
    }
}
