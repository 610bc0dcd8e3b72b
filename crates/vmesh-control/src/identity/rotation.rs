//! The rotation of the root, and of the intermediate of this replica. `vmesh_identity::rotation` decides when a step may be taken.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use vmesh_api::identity::{InitRequest, RotationRequest, RotationStatus, RotationStep};
use vmesh_daemon::tasks::blocking;
use vmesh_identity::Rotation;
use vmesh_identity::rotation::{Generation, Progress, Stage};

use super::authority::SavedAuthority;
use super::{Authority, IdentityError, IdentityService, KnownNode, unix};

impl IdentityService {
    /// Takes a step of a rotation, unless a live node among `nodes` is not ready for it. The step is on the disk before it takes effect.
    pub(crate) async fn rotate(
        self: &Arc<Self>,
        request: RotationRequest,
        nodes: &[KnownNode],
    ) -> Result<RotationStatus, IdentityError> {
        let _one_at_a_time = self.changing.lock().await;
        let authority = self.authority().ok_or(IdentityError::NoAuthority)?;
        let now = SystemTime::now();
        let RotationRequest { step, exempt, chain, key_file } = request;
        let supplied = InitRequest { chain, key_file };
        let saved = authority.saved().clone();
        let saved = match (step, saved.rotation) {
            (RotationStep::Next, None) => self.prepare(&authority, supplied, now).await?,
            (RotationStep::Next, Some((next, mut rotation))) => {
                exempt.into_iter().for_each(|node| rotation.exempt(node));
                let fleet = self.trust.of(nodes, &authority, now);
                match rotation.next(&fleet, now).map_err(IdentityError::Blocked)? {
                    Progress::Stage(rotation) => {
                        SavedAuthority { current: saved.current, rotation: Some((next, rotation)) }
                    }
                    Progress::Finished => SavedAuthority { current: next, rotation: None },
                }
            }
            (RotationStep::Back, None) => return Err(IdentityError::NoRotation),
            (RotationStep::Back, Some((next, rotation))) => {
                let back = rotation.step_back(authority.leaf_lifetime(), now);
                SavedAuthority { current: saved.current, rotation: back.map(|rotation| (next, rotation)) }
            }
            (RotationStep::Intermediate, Some((_, rotation))) => {
                return Err(IdentityError::Rotating(rotation.stage()));
            }
            (RotationStep::Intermediate, None) => self.new_intermediate(&authority, supplied, now).await?,
        };
        self.put_into_use(saved, now).await?;
        Ok(self.rotation_status(nodes))
    }

    /// Makes the new root, or takes over an intermediate that another root signed.
    async fn prepare(
        self: &Arc<Self>,
        authority: &Arc<Authority>,
        supplied: InitRequest,
        now: SystemTime,
    ) -> Result<SavedAuthority, IdentityError> {
        let (this, authority) = (self.clone(), authority.clone());
        blocking(move || {
            let next = this.make(&supplied, now)?;
            if next.root_key().map_err(IdentityError::Authority)? == authority.root_key() {
                let why = "the root of the new intermediate is the current root: `--intermediate` replaces the intermediate alone";
                return Err(IdentityError::Wrong(why.to_owned()));
            }
            let next = Arc::new(this.store.save_set(next).map_err(IdentityError::Store)?);
            let current = authority.saved().current.clone();
            Ok(SavedAuthority { current, rotation: Some((next, Rotation::prepare(now))) })
        })
        .await
    }

    /// Makes a new intermediate under the current root, or takes over the operator's.
    async fn new_intermediate(
        self: &Arc<Self>,
        authority: &Arc<Authority>,
        supplied: InitRequest,
        now: SystemTime,
    ) -> Result<SavedAuthority, IdentityError> {
        let (this, authority) = (self.clone(), authority.clone());
        blocking(move || {
            let made = match supplied.chain {
                Some(_) => this.make(&supplied, now)?,
                None => {
                    let made = authority.new_intermediate(&this.replica, now);
                    made.map_err(IdentityError::Authority)?.ok_or(IdentityError::NoRootKey)?
                }
            };
            if made.root_key().map_err(IdentityError::Authority)? != authority.root_key() {
                let why = "another root signed the new intermediate, and no node trusts it: `vmeshctl ca rotate` replaces the root";
                return Err(IdentityError::Wrong(why.to_owned()));
            }
            let current = Arc::new(this.store.save_set(made).map_err(IdentityError::Store)?);
            Ok(SavedAuthority { current, rotation: None })
        })
        .await
    }

    async fn put_into_use(
        self: &Arc<Self>,
        saved: SavedAuthority,
        now: SystemTime,
    ) -> Result<(), IdentityError> {
        let this = self.clone();
        let authority = blocking(move || {
            this.store.save_authority(&saved).map_err(IdentityError::Store)?;
            Authority::start(saved, &this.replica, now, &this.settings).map_err(IdentityError::Authority)
        })
        .await?;
        let stage = authority.rotation().map(|rotation| rotation.stage().to_string());
        tracing::info!(root_key = authority.root_key(), ?stage, "the certificate authority has changed");
        self.authority.send_replace(Some(Arc::new(authority)));
        Ok(())
    }

    /// Shows the rotation, and the nodes that its next step waits for.
    pub(crate) fn rotation_status(&self, nodes: &[KnownNode]) -> RotationStatus {
        let now = SystemTime::now();
        let authority = self.authority();
        let rotation = authority.as_ref().and_then(|authority| authority.rotation());
        let fleet =
            authority.as_ref().map(|authority| self.trust.of(nodes, authority, now)).unwrap_or_default();
        let live = || fleet.iter().filter(|node| node.is_live(now));
        let blocked = rotation.and_then(|rotation| rotation.next(&fleet, now).err());
        RotationStatus {
            stage: rotation.map(|rotation| rotation.stage().to_string()),
            summary: summary(rotation, authority.as_deref().map_or(Duration::ZERO, Authority::leaf_lifetime)),
            since: rotation.map(|rotation| unix(rotation.since())),
            live: live().count(),
            with_bundle: live().filter(|node| node.has_bundle).count(),
            with_new_certificates: live().filter(|node| node.leaf == Generation::New).count(),
            waiting_for: blocked
                .map(|blocked| blocked.nodes.into_iter().take(MAX_LISTED).collect())
                .unwrap_or_default(),
        }
    }
}

/// The most nodes that a status lists.
const MAX_LISTED: usize = 20;

fn summary(rotation: Option<&Rotation>, leaf_lifetime: Duration) -> String {
    match rotation.map(Rotation::stage) {
        None => "no rotation is under way".to_owned(),
        Some(Stage::Prepared) => {
            "the new root exists and no node trusts it yet; next: nodes are sent a trust bundle with both roots".to_owned()
        }
        Some(Stage::Distributing) => {
            "nodes are sent a trust bundle with both roots; next, when every live node has it: the new root issues".to_owned()
        }
        Some(Stage::Active) => format!(
            "the new root issues, and nodes renew their certificates (valid for {} at most); next, when every live node has new ones: the old root is no longer trusted",
            vmesh_model::text::show_duration(leaf_lifetime)
        ),
    }
}
