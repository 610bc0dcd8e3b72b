//! The identity of this node on disk: `state_dir/identity/`, for the agent's user alone.
//!
//! One file holds keys, certificates, grant and trust bundle, so that they fit together after a crash at any moment.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use vmesh_daemon::fsx::{self, FileError};
use vmesh_identity::bundle::BadBundle;
use vmesh_identity::key::KeyError;
use vmesh_identity::{Identity, Key, TrustBundle, TrustDomain};
use vmesh_model::{NodeName, ServiceName};
use zeroize::{Zeroize, Zeroizing};

use super::{BadCredential, Credential, NodeCredentials};

/// The most bytes of the file: a hundred services with chains of three certificates take a third of it.
const MAX_FILE: u64 = 1 << 20;
const FORMAT: u32 = 1;
/// The most bytes of a key in PEM; a P-256 key has about 240.
const MAX_KEY: u64 = 4 << 10;

/// The directory with the identity of this node. All methods block.
#[derive(Debug, Clone)]
pub struct CredentialStore {
    dir: PathBuf,
}

/// The reason why a saved identity was not loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    #[error("could not read the identity of this node")]
    File(#[source] FileError),
    #[error("the identity of this node in {} is damaged: delete the file, and let the node join with a new token", .path.display())]
    Damaged {
        path: PathBuf,
        #[source]
        cause: Defect,
    },
    #[error(
        "{} is the identity of the node `{found}`, and this is `{expected}`: set `node.name` to `{found}`, or delete the file and join with a new token",
        .path.display()
    )]
    OtherNode { path: PathBuf, found: String, expected: NodeName },
}

/// A defect of a saved identity.
#[derive(Debug, thiserror::Error)]
pub enum Defect {
    #[error("it is not JSON of the expected form: {0}")]
    Json(String),
    #[error("it has format {0}, and this version of vmesh reads format {FORMAT}")]
    Format(u32),
    #[error("a private key in it cannot be used")]
    Key(#[source] KeyError),
    #[error("a certificate in it cannot be used")]
    Credential(#[source] BadCredential),
    #[error("the trust bundle in it cannot be used")]
    Bundle(#[source] BadBundle),
}

#[derive(Serialize, Deserialize)]
struct SavedIdentity {
    format: u32,
    node: NodeName,
    trust_domain: TrustDomain,
    /// Unix seconds.
    issued: u64,
    granted: BTreeSet<ServiceName>,
    bundle: String,
    certificate: SavedCredential,
    services: BTreeMap<ServiceName, SavedCredential>,
}

#[derive(Serialize, Deserialize)]
struct SavedCredential {
    key: String,
    chain: String,
}

impl Drop for SavedCredential {
    fn drop(&mut self) {
        self.key.zeroize();
    }
}

impl SavedCredential {
    fn of(credential: &Credential) -> SavedCredential {
        SavedCredential { key: credential.key.to_pem().to_string(), chain: credential.chain.to_pem() }
    }

    fn read(&self, trust_domain: &TrustDomain, identity: Identity) -> Result<Arc<Credential>, Defect> {
        let key = Key::from_pem(&self.key).map_err(Defect::Key)?;
        let credential = Credential::new(trust_domain.id(identity), key, &self.chain);
        credential.map(Arc::new).map_err(Defect::Credential)
    }
}

impl CredentialStore {
    pub fn new(state_dir: &Path) -> CredentialStore {
        CredentialStore { dir: state_dir.join("identity") }
    }

    /// Returns the path of the file with the identity.
    pub fn file(&self) -> PathBuf {
        self.dir.join("identity.json")
    }

    /// The key of a join whose answer has not arrived.
    fn joining_key(&self) -> PathBuf {
        self.dir.join("joining.key")
    }

    /// Creates the directory, and removes what an interrupted write left in it.
    pub fn open(&self) -> Result<(), FileError> {
        fsx::make_private_dir(&self.dir)?;
        self.give_to_owner_of_state();
        fsx::sweep(&self.dir)
    }

    /// Loads the identity of `node`. `None`: there is none. The certificates may have expired.
    pub fn load(&self, node: &NodeName) -> Result<Option<NodeCredentials>, LoadError> {
        let path = self.file();
        let bytes = match fsx::read_capped(&path, MAX_FILE) {
            Ok(bytes) => Zeroizing::new(bytes),
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(LoadError::File(error)),
        };
        let saved: SavedIdentity = match serde_json::from_slice(&bytes) {
            Ok(saved) => saved,
            // The message names the place of the defect alone: the content has keys.
            Err(error) => {
                let place = format!("line {}, column {}", error.line(), error.column());
                return Err(LoadError::Damaged { path, cause: Defect::Json(place) });
            }
        };
        if saved.node != *node {
            let (found, expected) = (saved.node.to_string(), node.clone());
            return Err(LoadError::OtherNode { path, found, expected });
        }
        match read(&saved) {
            Ok(credentials) => Ok(Some(credentials)),
            Err(cause) => Err(LoadError::Damaged { path, cause }),
        }
    }

    /// Replaces the saved identity.
    pub fn save(&self, node: &NodeName, credentials: &NodeCredentials) -> Result<(), FileError> {
        let since_epoch = credentials.issued.duration_since(UNIX_EPOCH).unwrap_or_default();
        let services = credentials.services.iter();
        let saved = SavedIdentity {
            format: FORMAT,
            node: node.clone(),
            trust_domain: credentials.trust_domain.clone(),
            issued: since_epoch.as_secs(),
            granted: credentials.granted.clone(),
            bundle: credentials.bundle.to_pem(),
            certificate: SavedCredential::of(&credentials.node),
            services: services.map(|(name, one)| (name.clone(), SavedCredential::of(one))).collect(),
        };
        // With room for all of it from the start, no copy of a key is left behind in a buffer that was too small.
        let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_FILE as usize));
        let path = self.file();
        if let Err(error) = serde_json::to_writer_pretty(&mut *bytes, &saved) {
            return Err(FileError::Failed { action: "encode", path, cause: error.into() });
        }
        fsx::write_atomically(&path, &bytes, fsx::PRIVATE)?;
        self.give_to_owner_of_state();
        Ok(())
    }

    /// Returns the key for a join. The key of an interrupted join is used again: if the answer to that join was lost, the control plane
    /// may recognise the key.
    pub fn key_for_join(&self) -> Result<Key, KeyError> {
        let path = self.joining_key();
        if let Ok(bytes) = fsx::read_capped(&path, MAX_KEY).map(Zeroizing::new)
            && let Ok(text) = std::str::from_utf8(&bytes)
            && let Ok(key) = Key::from_pem(text)
        {
            return Ok(key);
        }
        let key = Key::generate()?;
        // A key that is not saved is as good for this join.
        _ = fsx::write_atomically(&path, key.to_pem().as_bytes(), fsx::PRIVATE);
        Ok(key)
    }

    /// Removes the key of a join that is over.
    pub fn forget_key_for_join(&self) {
        _ = std::fs::remove_file(self.joining_key());
    }

    /// Gives the files to the owner of the state directory, if root wrote them (`vmesh-agent join`): the agent's user must read them.
    fn give_to_owner_of_state(&self) {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let Some(owner) = self.dir.parent().and_then(|state| std::fs::metadata(state).ok()) else { return };
        for path in [self.dir.clone(), self.file(), self.joining_key()] {
            _ = std::os::unix::fs::lchown(path, Some(owner.uid()), Some(owner.gid()));
        }
    }
}

fn read(saved: &SavedIdentity) -> Result<NodeCredentials, Defect> {
    if saved.format != FORMAT {
        return Err(Defect::Format(saved.format));
    }
    let trust_domain = &saved.trust_domain;
    let bundle = TrustBundle::from_pem(trust_domain.clone(), &saved.bundle).map_err(Defect::Bundle)?;
    let mut services = BTreeMap::new();
    for (name, service) in &saved.services {
        services.insert(name.clone(), service.read(trust_domain, Identity::Service(name.clone()))?);
    }
    Ok(NodeCredentials {
        trust_domain: trust_domain.clone(),
        bundle,
        granted: saved.granted.clone(),
        node: saved.certificate.read(trust_domain, Identity::Node(saved.node.clone()))?,
        services,
        issued: UNIX_EPOCH.checked_add(Duration::from_secs(saved.issued)).unwrap_or(SystemTime::UNIX_EPOCH),
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use vmesh_daemon::report::one_line;

    use super::super::testing::credentials;
    use super::*;

    fn store() -> (vmesh_testkit::TempDir, CredentialStore, NodeName) {
        let dir = vmesh_testkit::tempdir().unwrap();
        let store = CredentialStore::new(&dir);
        store.open().unwrap();
        (dir, store, "web-1".parse().unwrap())
    }

    #[test]
    fn an_identity_is_loaded_as_it_was_saved_and_is_for_its_owner_alone() {
        let (dir, store, node) = store();
        assert!(store.load(&node).unwrap().is_none());
        let credentials = credentials(&["orders", "web"], &["orders", "web", "batch"]);
        store.save(&node, &credentials).unwrap();
        let loaded = store.load(&node).unwrap().unwrap();
        assert_eq!(loaded.bundle, credentials.bundle);
        assert_eq!(loaded.granted, credentials.granted);
        assert_eq!(loaded.node.id, credentials.node.id);
        assert_eq!(loaded.node.key.public_hash(), credentials.node.key.public_hash());
        assert_eq!(
            loaded.services.keys().collect::<Vec<_>>(),
            credentials.services.keys().collect::<Vec<_>>()
        );
        let age = credentials.issued.duration_since(loaded.issued).unwrap();
        assert!(age < Duration::from_secs(1), "{age:?}");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&store.file()), mode(&dir.join("identity"))), (0o600, 0o700));
    }

    #[test]
    fn a_damaged_identity_and_one_of_another_node_are_refused_with_what_to_do_and_without_a_key() {
        let (_dir, store, node) = store();
        store.save(&node, &credentials(&["web"], &["web"])).unwrap();
        let other = store.load(&"web-2".parse().unwrap()).unwrap_err();
        let text = one_line(&other);
        assert!(text.contains("of the node `web-1`, and this is `web-2`"), "{text}");

        let whole = std::fs::read_to_string(store.file()).unwrap();
        let half = whole[..whole.len() / 2].to_owned();
        let other_chain = {
            let mut saved: serde_json::Value = serde_json::from_str(&whole).unwrap();
            saved["certificate"]["chain"] = saved["services"]["web"]["chain"].clone();
            saved.to_string()
        };
        let other_key = {
            let mut saved: serde_json::Value = serde_json::from_str(&whole).unwrap();
            saved["certificate"]["key"] = saved["services"]["web"]["key"].clone();
            saved.to_string()
        };
        let no_key = whole.replace("BEGIN PRIVATE KEY", "BEGIN PUBLIC KEY");
        let later = whole.replace("\"format\": 1", "\"format\": 2");
        for (damaged, why) in [
            (half, "line"),
            (other_chain, "names `spiffe://mesh.example/service/web`"),
            (other_key, "is for another key"),
            (no_key, "private key"),
            (later, "format 2"),
            (String::new(), "line"),
        ] {
            std::fs::write(store.file(), damaged).unwrap();
            let text = one_line(&store.load(&node).unwrap_err());
            assert!(text.contains("delete the file") && text.contains(why), "{why}: {text}");
            assert!(!text.contains("MIG"), "the key itself: {text}");
        }
    }

    #[test]
    fn an_interrupted_join_is_repeated_with_the_same_key() {
        let (_dir, store, _) = store();
        let first = store.key_for_join().unwrap();
        assert_eq!(store.key_for_join().unwrap().public_hash(), first.public_hash());
        store.forget_key_for_join();
        assert_ne!(store.key_for_join().unwrap().public_hash(), first.public_hash());
    }
}
