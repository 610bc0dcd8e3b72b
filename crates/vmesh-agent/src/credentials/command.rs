//! `vmesh-agent join`: joins the mesh before the agent starts, and writes the identity that the agent then finds.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use vmesh_daemon::fsx::{self, FileError};
use vmesh_identity::JoinToken;
use zeroize::Zeroizing;

use super::store::LoadError;
use super::task::{Enrolment, RenewError};
use super::token::{self, TokenError};
use crate::config::Config;

/// The most bytes of standard input that are read for a token.
const MAX_INPUT: u64 = 4 << 10;

/// The place of the token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TokenSource {
    /// The file that `join.token_file` or systemd names.
    Configured,
    File(PathBuf),
    StandardInput,
}

/// The reason why `vmesh-agent join` failed.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error("could not read the join token")]
    Token(#[source] TokenError),
    #[error("could not read standard input")]
    Input(#[source] std::io::Error),
    #[error("could not use the directory for the identity of this node")]
    Directory(#[source] FileError),
    #[error("this node has an identity that cannot be used")]
    Load(#[source] LoadError),
    #[error("this node did not join")]
    Join(#[source] RenewError),
    #[error(
        "this node joined, and its identity could not be saved; the token is used up: create another one"
    )]
    Save(#[source] FileError),
}

/// Joins the mesh with the token from `source`, and saves the identity. Returns a sentence for the operator. A node whose identity is valid
/// does not join again.
pub async fn join(config: &Config, source: &TokenSource) -> Result<String, JoinError> {
    let mut enrolment = Enrolment::of(config);
    fsx::make_private_dir(&config.state_dir).map_err(JoinError::Directory)?;
    enrolment.store.open().map_err(JoinError::Directory)?;
    let saved = enrolment.load().await.map_err(JoinError::Load)?;
    if let Some(saved) = saved.filter(|saved| !saved.node.is_expired(SystemTime::now())) {
        return Ok(format!("this node is {} already; no token was used", saved.node.id));
    }
    let (token, file) = read_token(config, source)?;
    let credentials = Arc::new(enrolment.join(&token).await.map_err(JoinError::Join)?.answer);
    enrolment.save(&credentials).await.map_err(JoinError::Save)?;
    let mut text = format!("this node is {} now", credentials.node.id);
    if let Some(file) = file {
        text += &format!("; {}", token::delete_token(&file));
    }
    Ok(text)
}

fn read_token(config: &Config, source: &TokenSource) -> Result<(JoinToken, Option<PathBuf>), JoinError> {
    let from_file = |path: &Path| {
        let token = token::read_token(path).map_err(JoinError::Token)?;
        Ok((token, Some(path.to_owned())))
    };
    match source {
        TokenSource::File(path) => from_file(path),
        TokenSource::Configured => {
            let path = config.token_path().ok_or(JoinError::Token(TokenError::NoFile))?;
            from_file(&path)
        }
        TokenSource::StandardInput => {
            let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_INPUT as usize));
            std::io::stdin().lock().take(MAX_INPUT).read_to_end(&mut bytes).map_err(JoinError::Input)?;
            let token = token::parse_token(&bytes).map_err(|cause| {
                JoinError::Token(TokenError::NotAToken { path: "standard input".into(), cause })
            })?;
            Ok((token, None))
        }
    }
}
