//! Deserializes a tree into a type, strictly, and reports all problems of a document at once.
//!
//! serde stops at the first error. Therefore the value is read repeatedly, each time with the faulty part
//! left out, until nothing more is wrong or the limit of problems is reached. Two rules hide these repairs: a
//! field is not reported as missing if its value was left out as wrong, and a value that was read with any
//! part left out is never returned.

mod deserializer;
mod fault;
mod placeholder;

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::de::DeserializeOwned;

use self::deserializer::NodeDeserializer;
use self::fault::{Fault, FaultDetails, FaultKind};
use crate::yaml::Node;
use crate::{Place, Problem};

/// The limit of reported problems per document.
const MAX_PROBLEMS: usize = 20;

/// Reads the value at `node` as a `T`. The field `skip` of the outermost mapping is read by the caller.
pub fn read<T: DeserializeOwned>(
    file: &Arc<str>,
    subject: &Arc<str>,
    node: &Node,
    skip: Option<&str>,
) -> Result<T, Vec<Problem>> {
    let mut repairs = Repairs::default();
    if let Some(index) = node.entries().and_then(|all| all.iter().position(|e| Some(e.name()) == skip)) {
        repairs.omitted.insert((node.id, index), Omission::ReadByCaller);
    }
    let mut problems = Vec::new();
    // Each round leaves out one more part, and most rounds report a problem.
    for _ in 0..2 * MAX_PROBLEMS {
        let fault = match T::deserialize(NodeDeserializer { node, repairs: &repairs, field: None }) {
            Ok(value) if problems.is_empty() => return Ok(value),
            Ok(_) => break,
            Err(Fault(fault)) => *fault,
        };
        if !repairs.is_consequence(&fault) {
            let (line, column) =
                fault.at.as_ref().map_or((node.line, node.column), |at| (at.line, at.column));
            let place = Place::at(file.clone(), line, column);
            let message = fault.message().replace(char::is_control, " ");
            problems.push(Problem::new(place, subject.clone(), message));
        }
        if problems.len() >= MAX_PROBLEMS || !repairs.repair(fault) {
            break;
        }
    }
    if problems.is_empty() {
        // Should be unreachable, because a repair is made only after a problem was reported.
        let message = "this cannot be read".to_owned();
        problems.push(Problem::new(node.place(file), subject.clone(), message));
    }
    problems.sort();
    problems.dedup();
    Err(problems)
}

/// Returns the name among `known` that is most similar to `text`, if any is similar enough.
pub fn did_you_mean<'a>(text: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let similarity = |name: &str| strsim::jaro(&text.to_lowercase(), &name.to_lowercase());
    known
        .into_iter()
        .map(|name| (similarity(name), name))
        .filter(|(similarity, _)| *similarity > 0.7)
        .max_by(|(a, _), (b, _)| a.total_cmp(b))
        .map(|(_, name)| name)
}

/// Formats a choice for a message: ``one of `a`, `b` or `c` ``.
pub fn one_of<'a>(names: impl IntoIterator<Item = &'a str>) -> String {
    let mut names: Vec<_> = names.into_iter().map(|name| format!("`{name}`")).collect();
    match (names.pop(), names.is_empty()) {
        (None, _) => "nothing".to_owned(),
        (Some(only), true) => only,
        (Some(last), false) => format!("one of {} or {last}", names.join(", ")),
    }
}

/// The parts of a document that are left out or filled in so that the remaining parts can be read.
#[derive(Default)]
struct Repairs {
    /// The entries of mappings and items of lists that are left out, by the node of their container and their
    /// index.
    omitted: BTreeMap<(u32, usize), Omission>,
    /// The missing fields that get a placeholder value, by the node of their mapping.
    placeholders: BTreeMap<u32, Vec<&'static str>>,
}

enum Omission {
    /// The part was wrong. Contains the fields that it was probably meant to set.
    Wrong(Vec<String>),
    /// The part is read by the caller.
    ReadByCaller,
}

impl Repairs {
    fn omitted_in(&self, node: u32) -> impl Iterator<Item = &Omission> {
        self.omitted.range((node, 0)..=(node, usize::MAX)).map(|(_, omitted)| omitted)
    }

    /// Reports whether `fault` is only a consequence of earlier repairs.
    fn is_consequence(&self, fault: &FaultDetails) -> bool {
        let Some(at) = &fault.at else { return false };
        let wrong = |omitted: &Omission| matches!(omitted, Omission::Wrong(_));
        match &fault.kind {
            FaultKind::Placeholder => true,
            FaultKind::Missing(field) => self.omitted_in(at.node).any(|omitted| match omitted {
                Omission::Wrong(meant) => meant.iter().any(|name| name == field),
                Omission::ReadByCaller => false,
            }),
            _ => {
                at.is_container
                    && (self.omitted_in(at.node).any(wrong) || self.placeholders.contains_key(&at.node))
            }
        }
    }

    /// Makes a repair that lets the next attempt read further. Returns `false` if there is none.
    fn repair(&mut self, fault: FaultDetails) -> bool {
        if let (FaultKind::Missing(field), Some(at)) = (&fault.kind, &fault.at) {
            let placeholders = self.placeholders.entry(at.node).or_default();
            if !placeholders.contains(field) {
                placeholders.push(field);
                return true;
            }
        }
        let Some(target) = fault.target else { return false };
        let meant = match &fault.kind {
            FaultKind::UnknownField { name, known } => {
                did_you_mean(name, known.iter().copied()).map(str::to_owned).into_iter().collect()
            }
            _ => fault.field.iter().cloned().collect(),
        };
        self.omitted.insert(target, Omission::Wrong(meant)).is_none()
    }
}
