//! Plans: the changes to make on a host, with the reasons, as text.

use std::fmt;

/// A program that changes rules. [`crate::apply::Tools`] has its path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Tool {
    Nft,
    IptablesRestore,
    Ip6tablesRestore,
}

impl Tool {
    pub fn name(self) -> &'static str {
        match self {
            Tool::Nft => "nft",
            Tool::IptablesRestore => "iptables-restore",
            Tool::Ip6tablesRestore => "ip6tables-restore",
        }
    }

    pub fn arguments(self) -> &'static [&'static str] {
        match self {
            Tool::Nft => &["-f", "-"],
            // Other programs change these tables too: `-w` waits for the lock that all programs share.
            Tool::IptablesRestore | Tool::Ip6tablesRestore => &["--noflush", "-w", "5"],
        }
    }
}

/// One transaction, which the kernel applies whole or not at all.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    pub tool: Tool,
    pub input: String,
}

/// One difference between the installed rules and the program.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Change {
    pub kind: ChangeKind,
    /// The chain and rule (`outbound/vips4`) or the set (`set captured_vips4`); with iptables the family
    /// comes first.
    pub place: String,
}

/// The kind of a difference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ChangeKind {
    /// The rule or set is missing.
    Missing,
    /// The rule or set is installed, and the program does not have it.
    Unwanted,
    /// The rule or set has the right name and the wrong content.
    Different,
    /// The rule does not belong to vmesh.
    Foreign,
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = match self.kind {
            ChangeKind::Missing => "+",
            ChangeKind::Unwanted => "-",
            ChangeKind::Different => "~",
            ChangeKind::Foreign => "!",
        };
        write!(f, "{sign} {}", self.place)
    }
}

/// The changes that make a host match a program, and the steps that apply them. An empty plan means that the
/// host matches. If nobody changed the spec, the changes of a plan are drift.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    pub changes: Vec<Change>,
    pub steps: Vec<Step>,
}

impl Plan {
    pub fn is_empty(&self) -> bool {
        self.steps.is_empty()
    }
}

/// Formats a plan as `--dry-run` prints it.
impl fmt::Display for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_empty() {
            return writeln!(f, "nothing to do");
        }
        for change in &self.changes {
            writeln!(f, "{change}")?;
        }
        for step in &self.steps {
            writeln!(f, "\n{} {} <<'.'", step.tool.name(), step.tool.arguments().join(" "))?;
            f.write_str(&step.input)?;
            writeln!(f, ".")?;
        }
        Ok(())
    }
}

/// The comment that identifies a rule: its name and a hash of its text. The hash makes rules comparable
/// although versions of a tool list the same rule in different words.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Label {
    pub(crate) name: String,
    pub(crate) hash: String,
}

const MARK: &str = "vmesh";

impl Label {
    pub(crate) fn of(name: &str, text: &str) -> Label {
        let hash = xxhash_rust::xxh3::xxh3_64(text.as_bytes());
        Label { name: name.to_owned(), hash: format!("{:08x}", hash & 0xffff_ffff) }
    }

    pub(crate) fn parse(comment: &str) -> Option<Label> {
        let mut words = comment.split(' ');
        let (mark, name, hash) = (words.next()?, words.next()?, words.next()?);
        let whole = mark == MARK && words.next().is_none();
        whole.then(|| Label { name: name.to_owned(), hash: hash.to_owned() })
    }
}

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{MARK} {} {}", self.name, self.hash)
    }
}

/// Compares the labels of the wanted and the installed rules of a chain. `None` stands for a rule without a
/// label.
pub(crate) fn compare_rules(chain: &str, wanted: &[Label], actual: &[Option<Label>]) -> Vec<Change> {
    let mut changes = Vec::new();
    let mut change = |kind, place: String| changes.push(Change { kind, place });
    for label in wanted {
        let same_name = || actual.iter().flatten().filter(|other| other.name == label.name);
        if same_name().next().is_none() {
            change(ChangeKind::Missing, format!("{chain}/{}", label.name));
        } else if !same_name().any(|other| other.hash == label.hash) {
            change(ChangeKind::Different, format!("{chain}/{}", label.name));
        }
    }
    let mut names = std::collections::BTreeSet::new();
    for label in actual {
        match label {
            None => change(ChangeKind::Foreign, format!("{chain}: a rule that is not vmesh's")),
            Some(label) if !wanted.iter().any(|other| other.name == label.name) => {
                change(ChangeKind::Unwanted, format!("{chain}/{}", label.name));
            }
            Some(label) if !names.insert(&label.name) => {
                change(ChangeKind::Unwanted, format!("{chain}/{}: once more", label.name));
            }
            Some(_) => {}
        }
    }
    let order: Vec<&Label> = actual.iter().flatten().collect();
    if changes.is_empty() && !order.iter().copied().eq(wanted) {
        changes
            .push(Change { kind: ChangeKind::Different, place: format!("{chain}: the order of its rules") });
    }
    changes
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    /// Each rule is written as `name:hash`; `?` stands for a foreign rule.
    fn check(wanted: &str, actual: &str, expected: Expect) {
        let label = |text: &str| {
            let (name, hash) = text.split_once(':')?;
            Some(Label { name: name.to_owned(), hash: hash.to_owned() })
        };
        let wanted: Vec<Label> = wanted.split_whitespace().filter_map(label).collect();
        let actual: Vec<Option<Label>> = actual.split_whitespace().map(label).collect();
        let changes = compare_rules("c", &wanted, &actual);
        expected.assert_eq(&changes.iter().map(|change| format!("{change}; ")).collect::<String>());
    }

    #[test]
    fn every_rule_that_differs_is_named() {
        check("a:1 b:2", "a:1 b:2", expect![[""]]);
        check("a:1 b:2", "a:1", expect![["+ c/b; "]]);
        check("a:1 b:2", "a:1 b:3", expect![["~ c/b; "]]);
        check("a:1 b:2", "b:2 a:1", expect![["~ c: the order of its rules; "]]);
        check("a:1", "a:1 a:1", expect![["- c/a: once more; "]]);
        check("a:1", "? a:1 z:9", expect![["! c: a rule that is not vmesh's; - c/z; "]]);
        check("", "a:1", expect![["- c/a; "]]);
    }

    #[test]
    fn a_label_is_read_back_from_its_comment() {
        let label = Label::of("outbound", "text");
        assert_eq!(Label::parse(&label.to_string()), Some(label));
        assert_eq!(Label::parse("something else"), None);
        assert_eq!(Label::parse("vmesh a b c"), None);
    }
}
