//! The error type of the testkit: a text for the person who runs the test.

use std::error::Error;
use std::fmt;

use vmesh_daemon::report::Chain;

pub type Result<T, E = Failed> = std::result::Result<T, E>;

/// An error that tells the failed attempt, the reason and the remedy. `unwrap` prints it as plain text.
pub struct Failed {
    what: String,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Failed {
    pub fn new(what: impl Into<String>) -> Failed {
        Failed { what: what.into(), cause: None }
    }

    /// Returns a function for `map_err` that reports that `what` was attempted and failed because of the
    /// error.
    pub fn to<E: Into<Box<dyn Error + Send + Sync>>>(what: impl Into<String>) -> impl FnOnce(E) -> Failed {
        let what = what.into();
        move |cause| Failed { what, cause: Some(cause.into()) }
    }
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl fmt::Debug for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", Chain(self))
    }
}

impl Error for Failed {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}
