use super::*;
use crate::certificate::{RejectedChain, verify};
use crate::name::Identity;

fn now() -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(1_800_000_000)
}

fn after(seconds: u64) -> SystemTime {
    now() + Duration::from_secs(seconds)
}

fn domain(name: &str) -> TrustDomain {
    name.parse().unwrap()
}

fn root() -> Root {
    Root::generate(&domain("mesh.example"), now(), &Lifetimes::default()).unwrap()
}

fn issuer() -> Issuer {
    root().issue_intermediate("mesh1", now(), &Lifetimes::default()).unwrap()
}

fn web(of: &str) -> crate::name::SpiffeId {
    domain(of).id(Identity::Service("web".parse().unwrap()))
}

fn issue(issuer: &Issuer, lifetimes: &Lifetimes) -> CertificateChain {
    issuer
        .issue(&Key::generate().unwrap().request().unwrap(), &web("mesh.example").into(), now(), lifetimes)
        .unwrap()
}

#[test]
fn a_leaf_names_one_identity_and_is_verified_by_the_root() {
    let issuer = issuer();
    let chain = issue(&issuer, &Lifetimes::default());
    let bundle = issuer.bundle().unwrap();
    assert_eq!(verify(&chain, &bundle, now()), Ok(web("mesh.example")));
    let read = CertificateChain::from_pem(&chain.to_pem()).unwrap();
    assert_eq!(read, chain);
    assert_eq!(
        verify(&read, &TrustBundle::from_pem(domain("mesh.example"), &bundle.to_pem()).unwrap(), now())
            .unwrap(),
        web("mesh.example")
    );
    let leaf = chain.leaf().unwrap();
    assert_eq!(leaf.not_before, now() - Duration::from_secs(300));
    assert_eq!(leaf.not_after, after(2 * 86_400));
}

#[test]
fn what_a_request_asks_for_is_ignored() {
    let key = Key::generate().unwrap();
    let mut wishes = CertificateParams::new(vec!["admin.example".to_owned()]).unwrap();
    wishes
        .subject_alt_names
        .push(SanType::URI("spiffe://mesh.example/operator/admin/mallory".try_into().unwrap()));
    wishes.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    wishes.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    wishes.distinguished_name.push(DnType::CommonName, "root");
    let request = wishes.serialize_request(key.pair()).unwrap().pem().unwrap();
    let issuer = issuer();
    let chain = issuer.issue(&request, &web("mesh.example").into(), now(), &Lifetimes::default()).unwrap();
    let leaf = chain.leaf().unwrap();
    assert!(!leaf.is_authority);
    assert_eq!(leaf.id(), Ok(web("mesh.example")));
    assert_eq!(leaf.key_hash, key.public_hash());
    let (_, parsed) = x509_parser::parse_x509_certificate(&leaf.der).unwrap();
    assert_eq!(parsed.subject_alternative_name().unwrap().unwrap().value.general_names.len(), 1);
    assert!(!parsed.key_usage().unwrap().unwrap().value.key_cert_sign());
    assert!(!parsed.subject().to_string().contains("root"));
}

#[test]
fn a_request_that_was_changed_or_is_none_is_refused() {
    let issuer = issuer();
    let good = Key::generate().unwrap().request().unwrap();
    let at = good.len() - 60;
    let changed =
        format!("{}{}{}", &good[..at], if good.as_bytes()[at] == b'A' { 'B' } else { 'A' }, &good[at + 1..]);
    let large = "x".repeat(MAX_REQUEST + 1);
    for request in ["", "not a request", &changed, &large, &root().key().to_pem()] {
        assert!(
            issuer.issue(request, &web("mesh.example").into(), now(), &Lifetimes::default()).is_err(),
            "{request}"
        );
    }
    let foreign =
        issuer.issue(&good, &web("other.example").into(), now(), &Lifetimes::default()).unwrap_err();
    assert_eq!(
        foreign.to_string(),
        "the authority is for the trust domain `other.example`, and the mesh is `mesh.example`"
    );
}

#[test]
fn no_leaf_outlives_its_intermediate_and_no_intermediate_its_root() {
    let lifetimes = Lifetimes { root: DAY, intermediate: DAY * 90, ..Lifetimes::default() };
    let root = Root::generate(&domain("mesh.example"), now(), &lifetimes).unwrap();
    let issuer = root.issue_intermediate("mesh1", now(), &lifetimes).unwrap();
    assert_eq!(issuer.not_after(), now() + DAY);
    let leaf = issue(&issuer, &Lifetimes::default()).leaf().unwrap();
    assert_eq!(leaf.not_after, now() + DAY);
    let request = Key::generate().unwrap().request().unwrap();
    let late = issuer.issue(&request, &web("mesh.example").into(), now() + DAY, &lifetimes).unwrap_err();
    assert!(matches!(late, AuthorityError::Expired), "{late}");
}

#[test]
fn chains_that_prove_nothing_are_rejected() {
    let (mine, theirs) = (issuer(), issuer());
    let lifetimes = Lifetimes::default();
    let bundle = mine.bundle().unwrap();
    let chain = issue(&mine, &lifetimes);
    let reject = |chain: &CertificateChain, at| verify(chain, &bundle, at).unwrap_err();

    assert_eq!(reject(&chain, after(2 * 86_400 + 1)), RejectedChain::Expired);
    assert_eq!(reject(&chain, now() - Duration::from_secs(301)), RejectedChain::NotYetValid);
    // A root of the same name and trust domain, with another key.
    assert!(matches!(
        reject(&issue(&theirs, &lifetimes), now()),
        RejectedChain::UnknownIssuer | RejectedChain::Invalid(_)
    ));
    // The authority itself is no peer.
    assert_eq!(reject(mine.chain(), now()), RejectedChain::AuthorityAsLeaf);
    // A leaf cannot sign another leaf.
    let key = Key::generate().unwrap();
    let leaf = mine.issue(&key.request().unwrap(), &web("mesh.example").into(), now(), &lifetimes).unwrap();
    assert!(matches!(Issuer::new(key, &leaf), Err(AuthorityError::NotAnAuthority)));
    // Without the intermediate there is no path to the root.
    let alone = CertificateChain::new(chain.certificates()[0].clone(), &[]);
    assert_eq!(reject(&alone, now()), RejectedChain::UnknownIssuer);
    // The same root under the name of another trust domain.
    let other = TrustBundle::new(domain("other.example"), bundle.roots().to_vec()).unwrap();
    assert_eq!(verify(&chain, &other, now()), Err(RejectedChain::TrustDomain("mesh.example".to_owned())));
}

#[test]
fn an_intermediate_makes_no_further_authority() {
    let issuer = issuer();
    let rogue_key = Key::generate().unwrap();
    let validity = Validity::from(now(), DAY, &Lifetimes::default());
    let params =
        authority_params(&domain("mesh.example"), "rogue", BasicConstraints::Unconstrained, validity)
            .unwrap();
    let intermediate = &issuer.chain().certificates()[0];
    let signer = rcgen::Issuer::from_ca_cert_der(intermediate, issuer.key().pair()).unwrap();
    let rogue = params.signed_by(rogue_key.pair(), &signer).unwrap();
    let rogue_chain = CertificateChain::new(rogue.der().clone(), issuer.chain().certificates());
    let rogue = Issuer::new(rogue_key, &rogue_chain).unwrap();
    let chain = issue(&rogue, &Lifetimes::default());
    let rejected = verify(&chain, &issuer.bundle().unwrap(), now()).unwrap_err();
    assert!(matches!(rejected, RejectedChain::Invalid(_) | RejectedChain::UnknownIssuer), "{rejected}");
}

#[test]
fn an_authority_is_read_as_it_was_saved_and_its_parts_must_belong_together() {
    let (one, other) = (issuer(), issuer());
    let read = Issuer::from_pem(&one.chain().to_pem(), &one.key().to_pem()).unwrap();
    assert_eq!(read.chain(), one.chain());
    let wrong = Issuer::from_pem(&one.chain().to_pem(), &other.key().to_pem()).unwrap_err();
    assert_eq!(wrong.to_string(), "the key does not belong to the first certificate");
    let root = root();
    let pem = crate::certificate::pem(root.certificate());
    assert_eq!(Root::from_pem(&pem, &root.key().to_pem()).unwrap().certificate(), root.certificate());
    assert!(Issuer::from_pem("", &one.key().to_pem()).is_err());
    assert!(Issuer::from_pem(&one.chain().to_pem(), "").is_err());
}

#[test]
fn a_key_is_not_printed() {
    let issuer = issuer();
    let secret = issuer.key().to_pem();
    let line = secret.lines().nth(1).unwrap();
    assert!(!format!("{issuer:?}{:?}", root()).contains(line));
    assert!(format!("{:?}", issuer.key()) == "Key(..)");
}

#[test]
fn a_bundle_has_each_root_once_and_its_version_names_its_content() {
    let (one, two) = (issuer().bundle().unwrap(), issuer().bundle().unwrap());
    let both = one.with(two.roots()[0].clone()).unwrap();
    let other_way = two.with(one.roots()[0].clone()).unwrap().with(one.roots()[0].clone()).unwrap();
    assert_eq!(both, other_way);
    assert_eq!(both.version(), other_way.version());
    assert_ne!(both.version(), one.version());
    assert_eq!(both.without(&two.roots()[0]).unwrap(), one);
    assert_eq!(one.without(&one.roots()[0]), Err(BadBundle::Count));
    let leaf = issue(&issuer(), &Lifetimes::default()).leaf().unwrap().der;
    assert_eq!(one.with(leaf), Err(BadBundle::NotAnAuthority { number: 2 }));
}
