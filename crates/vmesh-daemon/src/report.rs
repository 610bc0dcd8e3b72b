//! The printer of error chains, and the exit codes.

use std::error::Error;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// The exit code for an invalid command line or configuration (`EX_USAGE` of sysexits.h).
pub const USAGE: u8 = 64;
/// The exit code for all other failures.
pub const FAILURE: u8 = 1;

/// Displays an error with its causes, one `because:` line each.
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        causes(self.0).try_for_each(|cause| write!(f, "\n  because: {cause}"))
    }
}

/// Returns an error with its causes in one line, for logs and JSON.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    for cause in causes(error) {
        line.push_str("; because: ");
        line.push_str(&cause);
    }
    line
}

/// Returns the texts of the causes of `error`. Texts that only repeat the text above are left out: some libraries print their cause and
/// return it as well.
fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = String> + 'a {
    let mut above = error.to_string();
    std::iter::successors(error.source(), |cause| (*cause).source()).filter_map(move |cause| {
        let text = cause.to_string();
        if above.contains(&text) {
            return None;
        }
        above = text.clone();
        Some(text)
    })
}

/// Prints the chain to stderr.
pub fn print(error: &(dyn Error + 'static)) {
    // A closed stderr is no reason to panic.
    _ = writeln!(std::io::stderr(), "{}", Chain(error));
}

/// Prints the chain, and returns the exit code of a failure.
pub fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    print(error);
    FAILURE.into()
}

/// Prints the chain, and returns the exit code of invalid input.
pub fn refused(error: &(dyn Error + 'static)) -> ExitCode {
    print(error);
    USAGE.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("discovery source `consul:dc1` could not list services at https://10.0.0.5:8501")]
    struct ListFailed(#[source] TokenRefused);

    #[derive(Debug, thiserror::Error)]
    #[error("Consul refused the token (HTTP 403): {0}")]
    struct TokenRefused(#[source] std::io::Error);

    #[test]
    fn a_chain_says_each_thing_once() {
        let error = ListFailed(TokenRefused(std::io::Error::other("it needs `service:read`")));
        assert_eq!(
            Chain(&error).to_string(),
            "discovery source `consul:dc1` could not list services at https://10.0.0.5:8501\n  \
             because: Consul refused the token (HTTP 403): it needs `service:read`"
        );
        assert!(
            one_line(&error)
                .ends_with("8501; because: Consul refused the token (HTTP 403): it needs `service:read`")
        );
    }
}
