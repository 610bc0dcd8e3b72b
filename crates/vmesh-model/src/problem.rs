//! What an operator has to mend, and where.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmesh_text::printable;

/// Where in the operator's own text something is. Line and column count from 1; a place without a line is the
/// whole file, and one without a file has no text behind it (a node's report, say).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Place {
    pub file: Arc<str>,
    pub line: u32,
    pub column: u32,
}

impl Place {
    pub fn file(file: impl Into<Arc<str>>) -> Place {
        Place { file: file.into(), line: 0, column: 0 }
    }

    pub fn at(file: impl Into<Arc<str>>, line: u32, column: u32) -> Place {
        Place { file: file.into(), line, column }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The file stays as it is named, to be found again; it is shown escaped.
        f.write_str(&printable(&self.file))?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        Ok(())
    }
}

/// One thing that is wrong with the input, which costs that input only. It stays listed until it is mended.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Problem {
    pub place: Place,
    /// What it concerns, in the operator's words: ``Route `orders` ``.
    pub subject: Arc<str>,
    /// What is wrong, why, and what to do next.
    pub message: String,
}

impl Problem {
    /// Subject and message may quote the input: characters that a terminal would act on are escaped here, for all who show
    /// a problem.
    pub fn new(place: Place, subject: impl Into<Arc<str>>, message: impl Into<String>) -> Problem {
        let (mut subject, mut message): (Arc<str>, String) = (subject.into(), message.into());
        if let Cow::Owned(shown) = printable(&subject) {
            subject = shown.into();
        }
        if let Cow::Owned(shown) = printable(&message) {
            message = shown;
        }
        Problem { place, subject, message }
    }

    /// Adds what it costs: `outcome`, which is a sentence but for its capital and its full stop.
    pub fn with_outcome(mut self, outcome: &str) -> Problem {
        let message = &mut self.message;
        match (message.ends_with('?'), outcome.split_at_checked(1)) {
            (true, Some((first, rest))) => {
                message.push(' ');
                message.push_str(&first.to_uppercase());
                message.push_str(rest);
            }
            _ => {
                message.push_str("; ");
                message.push_str(outcome);
            }
        }
        self
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.message)
    }
}
