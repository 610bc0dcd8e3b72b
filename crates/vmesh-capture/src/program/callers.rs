//! Callers: the users, groups and control groups whose connections a rule selects.

use std::collections::{BTreeMap, BTreeSet};

use super::builder::ProgramBuilder;
use super::rules::{Chain, Match, Verdict};
use super::{INCLUDE, UnsafeCapture};
use crate::host::{AccountNumber, Cgroup};
use crate::spec::{Account, Percent, Selection, Unit};

/// The callers of a rule as user ids, group ids and control groups.
#[derive(Default)]
pub(super) struct Callers {
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
    cgroups: BTreeSet<Cgroup>,
}

impl Callers {
    pub(super) fn rules(self, chain: &mut Chain, name: &str, then: &Verdict) {
        if !self.users.is_empty() {
            chain.rule(format!("{name}_users"), [Match::Users(self.users)], then.clone());
        }
        if !self.groups.is_empty() {
            chain.rule(format!("{name}_groups"), [Match::Groups(self.groups)], then.clone());
        }
        cgroups(self.cgroups, chain, name, then);
    }
}

/// Adds one rule for each control group, since older kernels have no sets of control groups.
pub(super) fn cgroups(groups: BTreeSet<Cgroup>, chain: &mut Chain, name: &str, then: &Verdict) {
    for (number, group) in groups.into_iter().enumerate() {
        chain.rule(format!("{name}_unit_{number}"), [Match::Cgroup(group)], then.clone());
    }
}

impl ProgramBuilder<'_> {
    pub(super) fn callers(&mut self, subject: &'static str, of: &Selection) -> Callers {
        let mut callers = Callers::default();
        for account in &of.users {
            callers.users.extend(self.user(subject, account));
        }
        for account in &of.groups {
            callers.groups.extend(self.group(subject, account));
        }
        for unit in &of.units {
            callers.cgroups.extend(self.unit(subject, unit));
        }
        callers
    }

    pub(super) fn caller_shares(&mut self) -> BTreeMap<Percent, Callers> {
        let subject = "outbound.dial";
        let dial = &self.spec.outbound.dial;
        let mut caller_shares: BTreeMap<Percent, Callers> = BTreeMap::new();
        for (account, percent) in &dial.users {
            caller_shares.entry(*percent).or_default().users.extend(self.user(subject, account));
        }
        for (account, percent) in &dial.groups {
            caller_shares.entry(*percent).or_default().groups.extend(self.group(subject, account));
        }
        for (unit, percent) in &dial.units {
            caller_shares.entry(*percent).or_default().cgroups.extend(self.unit(subject, unit));
        }
        caller_shares.retain(|percent, _| *percent < Percent::ALL);
        caller_shares
    }

    fn user(&mut self, subject: &'static str, account: &Account) -> Option<u32> {
        self.number(subject, "passwd", "user", account, self.host.user(account))
    }

    fn group(&mut self, subject: &'static str, account: &Account) -> Option<u32> {
        self.number(subject, "group", "group", account, self.host.group(account))
    }

    fn number(
        &mut self,
        subject: &'static str,
        database: &'static str,
        kind: &str,
        account: &Account,
        number: Option<AccountNumber>,
    ) -> Option<u32> {
        match number {
            Some(AccountNumber::Now(number)) => Some(number),
            Some(AccountNumber::Last(number)) => {
                let message = format!(
                    "the host no longer knows the {kind} `{account}`, or its name service does not answer: its last number, {number}, is used"
                );
                self.note(subject, message);
                Some(number)
            }
            // An unknown name in `include` captures too little, which is harmless. An unknown name in
            // `exclude` or `dial` would capture too much.
            Some(AccountNumber::Unanswered) if subject == INCLUDE => {
                self.note(
                    subject,
                    format!(
                        "`getent {database} {account}` does not answer: `{account}` selects nothing until it does"
                    ),
                );
                None
            }
            Some(AccountNumber::Unanswered) => {
                let account = account.to_string();
                self.refused.get_or_insert(UnsafeCapture::Unanswered { subject, database, account });
                None
            }
            None => {
                self.note(
                    subject,
                    format!("there is no {kind} `{account}`: the name selects nothing until it exists"),
                );
                None
            }
        }
    }

    fn unit(&mut self, subject: &'static str, unit: &Unit) -> Option<Cgroup> {
        let found = self.host.units.get(unit).cloned();
        if found.is_none() {
            self.note(subject, format!("{unit} does not run: it selects nothing until it runs"));
        }
        found
    }
}
