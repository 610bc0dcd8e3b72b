//! The files of the identities, in `identity` of the state directory. All are readable by the user of `vmesh-control` alone.
//!
//! | file | content |
//! |---|---|
//! | `ca-N/root.crt`, `ca-N/root.key` | a root, if it was made here |
//! | `ca-N/issuer.crt`, `ca-N/issuer.key` | the intermediate of this replica, and what signed it |
//! | `state.json` | which of these authorities is in use, which one replaces it, and the stage of the rotation |
//! | `tokens/ID.json` | a join token: the hash of its secret, and its use |
//! | `bans.json` | the banned nodes |

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use vmesh_daemon::fsx::{self, FileError};
use vmesh_identity::authority::AuthorityError;
use vmesh_identity::token::{TokenId, TokenRecord};
use vmesh_identity::{Issuer, Root, Rotation, TrustDomain};
use vmesh_model::NodeName;
use zeroize::Zeroizing;

use super::IdentityError;
use super::authority::{AuthoritySet, NewAuthority, SavedAuthority};

/// The most bytes of a file of the store.
const MAX_BYTES: u64 = 1 << 20;

/// The file that says which authority is in use.
const STATE: &str = "state.json";

/// The content of [`STATE`].
#[derive(Debug, Serialize, Deserialize)]
struct SavedState {
    current: u32,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    next: Option<u32>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rotation: Option<Rotation>,
}

/// A file of the identities that could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("could not read or write a file of the identities")]
    File(#[source] FileError),
    #[error("could not list {path}")]
    List {
        path: PathBuf,
        #[source]
        cause: std::io::Error,
    },
    #[error("{0} is not text")]
    NotText(PathBuf),
    #[error(
        "{missing}, which {state} names, is not there: restore it from the backup of the state directory"
    )]
    Missing { state: PathBuf, missing: PathBuf },
    #[error("the authority in {path} cannot be used: restore it from the backup of the state directory")]
    Authority {
        path: PathBuf,
        #[source]
        cause: AuthorityError,
    },
    #[error("{path} is damaged: restore it from the backup of the state directory, or delete it")]
    Json {
        path: PathBuf,
        #[source]
        cause: serde_json::Error,
    },
    #[error("could not encode {0}")]
    Encode(PathBuf, #[source] serde_json::Error),
}

/// The directory of the identities.
#[derive(Debug, Clone)]
pub(crate) struct IdentityStore {
    dir: PathBuf,
}

impl IdentityStore {
    /// Opens the store below the state directory, and removes leftovers of crashed writers.
    pub(crate) fn open(state_dir: &Path) -> Result<IdentityStore, StoreError> {
        let dir = state_dir.join("identity");
        let store = IdentityStore { dir };
        for dir in [store.dir.clone(), store.tokens()] {
            fsx::make_private_dir(&dir).map_err(StoreError::File)?;
            fsx::sweep(&dir).map_err(StoreError::File)?;
        }
        Ok(store)
    }

    fn tokens(&self) -> PathBuf {
        self.dir.join("tokens")
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Returns the authority; `None` if there is none yet.
    pub(crate) fn load_authority(
        &self,
        trust_domain: &TrustDomain,
    ) -> Result<Option<SavedAuthority>, StoreError> {
        let Some(SavedState { current, next, rotation }) = read_json(&self.file(STATE))? else {
            return Ok(None);
        };
        let current = Arc::new(self.load_set(current, trust_domain)?);
        let next = match next {
            Some(number) => Some(Arc::new(self.load_set(number, trust_domain)?)),
            None => None,
        };
        Ok(Some(SavedAuthority { current, rotation: next.zip(rotation) }))
    }

    fn set_dir(&self, number: u32) -> PathBuf {
        self.dir.join(format!("ca-{number}"))
    }

    fn load_set(&self, number: u32, trust_domain: &TrustDomain) -> Result<AuthoritySet, StoreError> {
        let dir = self.set_dir(number);
        let path = dir.join("issuer.crt");
        let required = |name: &str| {
            let missing = dir.join(name);
            read(&missing)?.ok_or_else(|| StoreError::Missing { state: self.file(STATE), missing })
        };
        let (chain, key) = (required("issuer.crt")?, required("issuer.key")?);
        let unusable = |cause| StoreError::Authority { path: path.clone(), cause };
        let issuer = Issuer::from_pem(&chain, &key).map_err(unusable)?;
        check_domain(&issuer, trust_domain).map_err(unusable)?;
        let root = match (read(&dir.join("root.crt"))?, read(&dir.join("root.key"))?) {
            (Some(certificate), Some(key)) => {
                Some(Arc::new(Root::from_pem(&certificate, &key).map_err(unusable)?))
            }
            // An operator may have moved the key of the root to a safe place.
            _ => None,
        };
        Ok(AuthoritySet { number, root, issuer })
    }

    /// Writes a root and an intermediate into a directory of their own. [`IdentityStore::save_authority`] puts them into use.
    pub(crate) fn save_set(&self, made: NewAuthority) -> Result<AuthoritySet, StoreError> {
        let NewAuthority { root, issuer } = made;
        let number = self.set_numbers()?.last().map_or(1, |last| last + 1);
        let dir = self.set_dir(number);
        fsx::make_private_dir(&dir).map_err(StoreError::File)?;
        if let Some(root) = &root {
            write(&dir.join("root.key"), root.key().to_pem().as_bytes())?;
            write(&dir.join("root.crt"), vmesh_identity::certificate::pem(root.certificate()).as_bytes())?;
        }
        write(&dir.join("issuer.key"), issuer.key().to_pem().as_bytes())?;
        write(&dir.join("issuer.crt"), issuer.chain().to_pem().as_bytes())?;
        Ok(AuthoritySet { number, root, issuer })
    }

    /// Puts an authority into use, in one step, and then removes the keys that it does not use.
    pub(crate) fn save_authority(&self, saved: &SavedAuthority) -> Result<(), StoreError> {
        let SavedAuthority { current, rotation } = saved;
        let next = rotation.as_ref().map(|(next, _)| next.number);
        let rotation = rotation.as_ref().map(|(_, rotation)| rotation.clone());
        let state = SavedState { current: current.number, next, rotation };
        write_json(&self.file(STATE), &state)?;
        for number in self.set_numbers()? {
            if number != current.number && Some(number) != next {
                _ = std::fs::remove_dir_all(self.set_dir(number));
            }
        }
        Ok(())
    }

    /// Returns the numbers of the authorities on the disk, in order.
    fn set_numbers(&self) -> Result<BTreeSet<u32>, StoreError> {
        let unlisted = |cause| StoreError::List { path: self.dir.clone(), cause };
        let mut numbers = BTreeSet::new();
        for entry in std::fs::read_dir(&self.dir).map_err(unlisted)? {
            let name = entry.map_err(unlisted)?.file_name();
            numbers.extend(name.to_str().and_then(|name| name.strip_prefix("ca-")?.parse::<u32>().ok()));
        }
        Ok(numbers)
    }

    /// Reads an intermediate that an operator supplies: the chain as text, the key from a file.
    pub(crate) fn read_supplied(
        &self,
        chain: &str,
        key_file: Option<&str>,
        trust_domain: &TrustDomain,
    ) -> Result<Issuer, IdentityError> {
        let path = key_file.map(Path::new).ok_or_else(|| {
            IdentityError::Wrong(
                "`key_file` is missing: the file with the key of the intermediate".to_owned(),
            )
        })?;
        let missing = || IdentityError::Wrong(format!("there is no file {}", path.display()));
        let key = read(path).map_err(IdentityError::Store)?.ok_or_else(missing)?;
        let issuer = Issuer::from_pem(chain, &key).map_err(IdentityError::Authority)?;
        check_domain(&issuer, trust_domain).map_err(IdentityError::Authority)?;
        Ok(issuer)
    }

    /// Returns all tokens. A damaged file costs its token only.
    pub(crate) fn load_tokens(&self) -> Result<Vec<(TokenId, TokenRecord)>, StoreError> {
        let dir = self.tokens();
        let unlisted = |cause| StoreError::List { path: dir.clone(), cause };
        let mut tokens = Vec::new();
        for entry in std::fs::read_dir(&dir).map_err(unlisted)? {
            let path = entry.map_err(unlisted)?.path();
            let id =
                path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| TokenId::from_str(stem).ok());
            let Some(id) = id.filter(|_| path.extension().is_some_and(|extension| extension == "json"))
            else {
                continue;
            };
            match read_json(&path) {
                Ok(Some(record)) => tokens.push((id, record)),
                Ok(None) => {}
                Err(error) => tracing::error!("{}", vmesh_daemon::report::one_line(&error)),
            }
        }
        Ok(tokens)
    }

    pub(crate) fn save_token(&self, id: TokenId, record: &TokenRecord) -> Result<(), StoreError> {
        write_json(&self.tokens().join(format!("{id}.json")), record)
    }

    /// Removes the files of tokens. A file that stays is removed when its token is forgotten again.
    pub(crate) fn remove_tokens(&self, ids: &[TokenId]) {
        for id in ids {
            _ = std::fs::remove_file(self.tokens().join(format!("{id}.json")));
        }
    }

    pub(crate) fn load_bans(&self) -> Result<BTreeSet<NodeName>, StoreError> {
        Ok(read_json(&self.file("bans.json"))?.unwrap_or_default())
    }

    pub(crate) fn save_bans(&self, bans: &BTreeSet<NodeName>) -> Result<(), StoreError> {
        write_json(&self.file("bans.json"), bans)
    }
}

fn check_domain(issuer: &Issuer, expected: &TrustDomain) -> Result<(), AuthorityError> {
    match issuer.trust_domain() == expected {
        true => Ok(()),
        false => {
            let (found, expected) = (issuer.trust_domain().to_string(), expected.clone());
            Err(AuthorityError::TrustDomain { found, expected })
        }
    }
}

/// Reads a text file; `None` if it does not exist. The text may be a key, so it is zeroised when dropped.
fn read(path: &Path) -> Result<Option<Zeroizing<String>>, StoreError> {
    match fsx::read_capped(path, MAX_BYTES) {
        Ok(bytes) => {
            let text = String::from_utf8(bytes).map_err(|_| StoreError::NotText(path.to_owned()))?;
            Ok(Some(Zeroizing::new(text)))
        }
        Err(error) if error.is_not_found() => Ok(None),
        Err(error) => Err(StoreError::File(error)),
    }
}

fn write(path: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    fsx::write_atomically(path, bytes, fsx::PRIVATE).map_err(StoreError::File)
}

fn read_json<T: serde::de::DeserializeOwned>(path: &Path) -> Result<Option<T>, StoreError> {
    let Some(text) = read(path)? else { return Ok(None) };
    serde_json::from_str(&text).map(Some).map_err(|cause| StoreError::Json { path: path.to_owned(), cause })
}

fn write_json<T: serde::Serialize>(path: &Path, value: &T) -> Result<(), StoreError> {
    let text = serde_json::to_vec(value).map_err(|cause| StoreError::Encode(path.to_owned(), cause))?;
    write(path, &text)
}
