//! The one printer of error chains, and what exit codes mean.

use std::error::Error;
use std::fmt;
use std::io::Write;
use std::process::ExitCode;

/// The exit code for a command line or a configuration that is refused (`EX_USAGE` of sysexits.h).
pub const USAGE: u8 = 64;
/// The exit code for everything else that failed.
pub const FAILURE: u8 = 1;

/// Shows an error and why it happened, one `because:` line for each cause.
pub struct Chain<'a>(pub &'a (dyn Error + 'static));

impl fmt::Display for Chain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.0)?;
        causes(self.0).try_for_each(|cause| write!(f, "\n  because: {cause}"))
    }
}

/// The same in one line, for logs and JSON.
pub fn one_line(error: &(dyn Error + 'static)) -> String {
    let mut line = error.to_string();
    for cause in causes(error) {
        line.push_str("; because: ");
        line.push_str(&cause);
    }
    line
}

/// The texts below `error`, without those that only repeat what stands above them: some libraries print their
/// cause and return it as well.
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
    // Where nobody reads stderr, nobody is told; that is no reason to panic.
    _ = writeln!(std::io::stderr(), "{}", Chain(error));
}

/// Prints the chain and gives the code of a failure.
pub fn failed(error: &(dyn Error + 'static)) -> ExitCode {
    print(error);
    FAILURE.into()
}

/// Prints the chain and gives the code of input that is refused.
pub fn refused(error: &(dyn Error + 'static)) -> ExitCode {
    print(error);
    USAGE.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("discovery source `consul:dc1` could not list services at https://10.0.0.5:8501")]
    struct ListFailed(#[source] Refused);

    #[derive(Debug, thiserror::Error)]
    #[error("Consul refused the token (HTTP 403): {0}")]
    struct Refused(#[source] std::io::Error);

    #[test]
    fn a_chain_says_each_thing_once() {
        let error = ListFailed(Refused(std::io::Error::other("it needs `service:read`")));
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
