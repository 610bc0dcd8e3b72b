//! The error of strict deserialization: what is wrong, where, and which part to leave out.

use std::fmt;

use serde::de::{self, Expected, Unexpected};

use super::{did_you_mean, one_of};
use crate::yaml::{Node, short};

/// The error of a deserializer. Boxed, because every step returns it.
pub(super) struct Fault(pub(super) Box<FaultDetails>);

pub(super) struct FaultDetails {
    pub(super) kind: FaultKind,
    /// The place of the error; `None` until the first reader that knows it adds it.
    pub(super) at: Option<FaultPosition>,
    /// The innermost named field that contains the error.
    pub(super) field: Option<String>,
    /// The part to leave out in the next attempt: the node of its container, and its index.
    pub(super) target: Option<(u32, usize)>,
}

pub(super) struct FaultPosition {
    pub(super) node: u32,
    pub(super) line: u32,
    pub(super) column: u32,
    /// The error concerns a list or mapping as a whole, so it may be caused by a part left out of it.
    pub(super) is_container: bool,
}

pub(super) enum FaultKind {
    UnknownField {
        name: String,
        known: &'static [&'static str],
    },
    Missing(&'static str),
    UnknownVariant {
        name: String,
        known: &'static [&'static str],
    },
    /// The reader replaces `found` by a description of the text in the document.
    Unexpected {
        expected: String,
        found: String,
    },
    Message(String),
    /// A placeholder value was not accepted.
    Placeholder,
}

impl Fault {
    pub(super) fn new(kind: FaultKind) -> Fault {
        Fault(Box::new(FaultDetails { kind, at: None, field: None, target: None }))
    }

    /// Sets the place of the error, unless an inner reader has set it.
    pub(super) fn with_place(mut self, node: &Node) -> Fault {
        self.0.at.get_or_insert_with(|| FaultPosition {
            node: node.id,
            line: node.line,
            column: node.column,
            is_container: node.text().is_none(),
        });
        self
    }

    /// Sets the part to leave out in the next attempt, unless an inner reader has set it.
    pub(super) fn with_target(mut self, container: u32, index: usize, field: Option<&str>) -> Fault {
        self.0.target.get_or_insert((container, index));
        self.with_field(field)
    }

    pub(super) fn with_field(mut self, field: Option<&str>) -> Fault {
        if let (None, Some(field)) = (&self.0.field, field) {
            self.0.field = Some(field.to_owned());
        }
        self
    }
}

impl FaultDetails {
    pub(super) fn message(&self) -> String {
        let field = self.field.as_deref().map(short);
        let about = |message: &str| match &field {
            Some(field) => format!("`{field}`: {message}"),
            None => message.to_owned(),
        };
        match &self.kind {
            FaultKind::UnknownField { name, known } => {
                let shown = short(name);
                match did_you_mean(name, known.iter().copied()) {
                    Some(meant) => format!("unknown field `{shown}`, did you mean `{meant}`?"),
                    None => format!("unknown field `{shown}`: expected {}", one_of(known.iter().copied())),
                }
            }
            FaultKind::Missing(missing) => match &field {
                Some(field) => format!("`{missing}` is missing in `{field}`"),
                None => format!("`{missing}` is missing"),
            },
            FaultKind::UnknownVariant { name, known } => {
                let shown = short(name);
                about(&match did_you_mean(name, known.iter().copied()) {
                    Some(meant) => format!("`{shown}` is not known here, did you mean `{meant}`?"),
                    None => format!("expected {}, found `{shown}`", one_of(known.iter().copied())),
                })
            }
            FaultKind::Unexpected { expected, found } => {
                about(&format!("expected {expected}, found {found}"))
            }
            FaultKind::Message(message) => about(message),
            FaultKind::Placeholder => about("this cannot be read"),
        }
    }
}

impl fmt::Debug for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message())
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message())
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Fault::new(FaultKind::Message(message.to_string()))
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Fault::new(FaultKind::Unexpected { expected: expected.to_string(), found: found.to_string() })
    }

    fn invalid_value(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Fault::invalid_type(found, expected)
    }

    fn invalid_length(length: usize, expected: &dyn Expected) -> Self {
        Fault::new(FaultKind::Unexpected {
            expected: expected.to_string(),
            found: format!("{length} values"),
        })
    }

    fn unknown_variant(name: &str, known: &'static [&'static str]) -> Self {
        Fault::new(FaultKind::UnknownVariant { name: name.to_owned(), known })
    }

    fn unknown_field(name: &str, known: &'static [&'static str]) -> Self {
        Fault::new(FaultKind::UnknownField { name: name.to_owned(), known })
    }

    fn missing_field(field: &'static str) -> Self {
        Fault::new(FaultKind::Missing(field))
    }

    fn duplicate_field(field: &'static str) -> Self {
        // Occurs only with aliases of a field: the YAML parser already rejects equal keys.
        Fault::new(FaultKind::Message(format!("`{field}` is given twice")))
    }
}
