use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use vmesh_identity::Key;

use super::*;

impl IdentityService {
    /// Opens the identities in a state directory as the process does at its start.
    pub(crate) fn for_tests(state_dir: &Path) -> Arc<IdentityService> {
        let config = IdentityConfig {
            trust_domain: "mesh.example".parse().unwrap(),
            replica: "mesh1".parse().unwrap(),
            listen: "127.0.0.1:15012".parse().ok(),
            insecure: Vec::new(),
            settings: IdentitySettings::default(),
        };
        let (audit, _) = AuditLog::new(state_dir);
        IdentityService::open(config, IdentityStore::open(state_dir).unwrap(), audit).unwrap()
    }
}

fn token_for(node: &str) -> TokenRequest {
    TokenRequest {
        node: node.parse().unwrap(),
        services: BTreeSet::from(["orders".parse().unwrap()]),
        labels: Default::default(),
        network: None,
        ttl: 600,
    }
}

#[tokio::test]
async fn the_authority_and_the_tokens_survive_a_restart_in_private_files_and_no_file_has_a_secret_of_a_token()
{
    let dir = vmesh_testkit::tempdir().unwrap();
    let identities = IdentityService::for_tests(&dir);
    assert!(identities.problems()[0].message.contains("run `vmeshctl ca init`"));
    assert!(matches!(identities.create_token(token_for("web-1")).await, Err(IdentityError::NoAuthority)));
    let status = identities.init(InitRequest::default()).await.unwrap();
    assert!(identities.problems().is_empty());
    assert!(matches!(identities.init(InitRequest::default()).await, Err(IdentityError::HasAuthority(_))));
    let token = identities.create_token(token_for("web-1")).await.unwrap();
    let secret = token.token.split('.').nth(2).unwrap();

    let mut files = vec![dir.join("identity")];
    let mut count = 0;
    while let Some(path) = files.pop() {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        if path.is_dir() {
            assert_eq!(mode, 0o700, "{}", path.display());
            files.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        count += 1;
        assert_eq!(mode, 0o600, "{}", path.display());
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains(secret), "{}", path.display());
    }
    assert_eq!(count, 6);

    let again = IdentityService::for_tests(&dir);
    assert_eq!(again.status().authority, status.authority);
    assert_eq!(again.tokens(), identities.tokens());
    let (node, from) = ("web-1".parse().unwrap(), "10.0.0.1".parse().unwrap());
    let token: JoinToken = token.token.parse().unwrap();
    let services = BTreeSet::new();
    assert!(again.redeem(&token, &node, &services, from).await.is_ok());
    let after = IdentityService::for_tests(&dir);
    let refused = after.redeem(&token, &node, &services, from).await;
    assert!(matches!(refused, Err(RedeemError::Refused(JoinRefusal::Reused { .. }))));
}

#[tokio::test]
async fn a_token_that_two_nodes_present_at_the_same_moment_lets_one_in() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let identities = IdentityService::for_tests(&dir);
    identities.init(InitRequest::default()).await.unwrap();
    let token: JoinToken = identities.create_token(token_for("web-1")).await.unwrap().token.parse().unwrap();
    let (node, from, services) = ("web-1".parse().unwrap(), "10.0.0.1".parse().unwrap(), BTreeSet::new());
    let (one, other) = tokio::join!(
        identities.redeem(&token, &node, &services, from),
        identities.redeem(&token, &node, &services, from)
    );
    assert_eq!([one.is_ok(), other.is_ok()].iter().filter(|ok| **ok).count(), 1);
}

#[tokio::test]
async fn a_lost_key_and_a_foreign_authority_are_named_with_their_files() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let identities = IdentityService::for_tests(&dir);
    identities.init(InitRequest::default()).await.unwrap();
    let domain = identities.trust_domain().clone();
    let store = IdentityStore::open(&dir).unwrap();
    let other = store.load_authority(&"other.example".parse().unwrap()).unwrap_err();
    assert!(one_line(&other).contains("issuer.crt") && one_line(&other).contains("other.example"), "{other}");
    let key = dir.join("identity/ca-1/issuer.key");
    std::fs::write(&key, Key::generate().unwrap().to_pem().as_bytes()).unwrap();
    let wrong = store.load_authority(&domain).unwrap_err();
    assert!(one_line(&wrong).contains("does not belong"), "{}", one_line(&wrong));
    std::fs::remove_file(&key).unwrap();
    assert!(one_line(&store.load_authority(&domain).unwrap_err()).contains("issuer.key, which"));
}

#[tokio::test]
async fn an_intermediate_that_is_supplied_is_used_and_the_root_stays_elsewhere() {
    let (dir, elsewhere) = (vmesh_testkit::tempdir().unwrap(), vmesh_testkit::tempdir().unwrap());
    let domain: TrustDomain = "mesh.example".parse().unwrap();
    let settings = IdentitySettings::default();
    let replica = "mesh1".parse().unwrap();
    let made = authority::generate(&domain, &replica, SystemTime::now(), &settings).unwrap();
    let issuer = made.issuer;
    let key_file = elsewhere.join("key.pem");
    std::fs::write(&key_file, issuer.key().to_pem().as_bytes()).unwrap();
    let identities = IdentityService::for_tests(&dir);
    let request =
        InitRequest { chain: Some(issuer.chain().to_pem()), key_file: Some(key_file.display().to_string()) };
    let status = identities.init(request).await.unwrap().authority.unwrap();
    assert!(!status.has_root_key);
    assert!(!dir.join("identity/ca-1/root.key").exists());
    assert_eq!(IdentityService::for_tests(&dir).status().authority, Some(status));
}

#[tokio::test]
async fn a_ban_survives_a_restart() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let identities = IdentityService::for_tests(&dir);
    let node: NodeName = "web-1".parse().unwrap();
    assert!(identities.set_ban(&node, true).await.unwrap());
    assert!(!identities.set_ban(&node, true).await.unwrap());
    let again = IdentityService::for_tests(&dir);
    assert!(again.is_banned(&node));
    assert!(again.set_ban(&node, false).await.unwrap());
    assert!(!IdentityService::for_tests(&dir).is_banned(&node));
}

#[tokio::test]
async fn certificates_of_the_authority_that_end_soon_are_problems() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let identities = IdentityService::for_tests(&dir);
    identities.init(InitRequest::default()).await.unwrap();
    let authority = identities.authority().unwrap();
    let day = Duration::from_secs(24 * 3600);
    let warned = |days: u32| {
        let warnings = authority.expiry_warnings(SystemTime::now() + day * days).into_iter();
        warnings.map(|(subject, _)| subject).collect::<Vec<_>>()
    };
    assert_eq!(warned(60), [""; 0]);
    assert_eq!(warned(80), ["the intermediate certificate"]);
    assert_eq!(warned(3600), ["the root certificate", "the intermediate certificate"]);
}
