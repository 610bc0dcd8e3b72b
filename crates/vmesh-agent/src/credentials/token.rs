//! The join token of this node: the file that holds it, and what becomes of that file.

use std::path::{Path, PathBuf};

use vmesh_daemon::fsx::{self, FileError};
use vmesh_identity::JoinToken;
use vmesh_identity::token::NotAToken;
use zeroize::Zeroizing;

/// The name of the systemd credential that holds the token: `LoadCredential=vmesh-join-token:/path`.
pub const CREDENTIAL: &str = "vmesh-join-token";
/// The most bytes of a token file; a token has 104.
const MAX_FILE: u64 = 4 << 10;

/// An error of reading a token. No message repeats the token's text.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    #[error(
        "no file with a join token is named: write `join: {{token_file: PATH}}`, or give the unit `LoadCredential={CREDENTIAL}:PATH`"
    )]
    NoFile,
    #[error("could not read the join token: `vmeshctl token create` makes one")]
    File(#[source] FileError),
    #[error("{} holds no join token", .path.display())]
    NotAToken {
        path: PathBuf,
        #[source]
        cause: NotAToken,
    },
}

/// Returns the file of the token: `token_file`, or the credential that systemd gives to the agent.
pub fn token_path(token_file: Option<&Path>, credentials: Option<&Path>) -> Option<PathBuf> {
    token_file.map(Path::to_owned).or_else(|| Some(credentials?.join(CREDENTIAL)))
}

/// Returns the directory of the credentials that systemd gives to this process.
pub fn credentials_directory() -> Option<PathBuf> {
    std::env::var_os("CREDENTIALS_DIRECTORY").map(PathBuf::from)
}

/// Reads the token in `path`. Blocks.
pub fn read_token(path: &Path) -> Result<JoinToken, TokenError> {
    let bytes = fsx::read_capped(path, MAX_FILE).map(Zeroizing::new).map_err(TokenError::File)?;
    parse_token(&bytes).map_err(|cause| TokenError::NotAToken { path: path.to_owned(), cause })
}

/// Reads the token in `bytes`, which may have white space around it.
pub fn parse_token(bytes: &[u8]) -> Result<JoinToken, NotAToken> {
    std::str::from_utf8(bytes).map_err(|_| NotAToken)?.trim().parse()
}

/// Deletes the file of a token that was redeemed, if this user may. Returns a sentence for the log.
pub fn delete_token(path: &Path) -> String {
    match std::fs::remove_file(path) {
        Ok(()) => format!("deleted {}, whose token is used up", path.display()),
        Err(error) => format!("left {} in place ({error}); its token is used up", path.display()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_in_the_named_file_or_in_the_credential_of_the_unit() {
        let named = Path::new("/etc/vmesh/token");
        let credentials = Path::new("/run/credentials/vmesh-agent.service");
        assert_eq!(token_path(Some(named), Some(credentials)).unwrap(), named);
        assert_eq!(token_path(None, Some(credentials)).unwrap(), credentials.join("vmesh-join-token"));
        assert_eq!(token_path(None, None), None);
    }

    #[test]
    fn an_error_does_not_repeat_what_may_be_a_secret() {
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("token");
        std::fs::write(&path, "vmj1.secret").unwrap();
        let error = read_token(&path).unwrap_err();
        let text = vmesh_daemon::report::one_line(&error);
        assert!(text.contains("holds no join token") && !text.contains("secret"), "{text}");
        assert!(delete_token(&path).starts_with("deleted"));
        assert!(delete_token(&path).starts_with("left"));
    }
}
