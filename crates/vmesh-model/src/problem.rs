//! Errors in the operator's input, with their location.

use std::borrow::Cow;
use std::fmt;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmesh_text::printable;

/// A location in the operator's input. Line and column count from 1. A place without a line refers to the
/// whole file, and one without a file to something that has no text, such as a node's report.
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
        // The file name is stored unescaped, so that the file can be found, and escaped for display.
        f.write_str(&printable(&self.file))?;
        if self.line > 0 {
            write!(f, ":{}:{}", self.line, self.column)?;
        }
        Ok(())
    }
}

/// An error in the input. It affects only that input, and is listed until the operator fixes it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Problem {
    pub place: Place,
    /// The object with the problem, in the operator's terms: ``Route `orders` ``.
    pub subject: Arc<str>,
    /// The error, its reason, and the next step.
    pub message: String,
}

impl Problem {
    /// Creates a problem. `subject` and `message` may quote the input, so characters that a terminal would
    /// interpret are escaped here.
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

    /// Appends the consequence of the problem. `outcome` is a sentence without its capital letter and full
    /// stop.
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
