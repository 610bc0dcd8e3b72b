//! Credentials for unit tests, issued by an authority of their own.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::SystemTime;

use vmesh_identity::{Identity, Issuer, Key, Lifetimes, Root, SpiffeId, Subject, TrustDomain};
use vmesh_model::ServiceName;

use super::{Credential, NodeCredentials};

fn credential(issuer: &Issuer, identity: Identity) -> Arc<Credential> {
    let id: SpiffeId = issuer.trust_domain().id(identity);
    let key = Key::generate().unwrap();
    let request = key.request().unwrap();
    let subject = Subject::from(id.clone());
    let chain = issuer.issue(&request, &subject, SystemTime::now(), &Lifetimes::default()).unwrap();
    Arc::new(Credential::new(id, key, &chain.to_pem()).unwrap())
}

/// Makes the credentials of the node `web-1`, with certificates of `services`.
pub(crate) fn credentials(services: &[&str], granted: &[&str]) -> NodeCredentials {
    let trust_domain: TrustDomain = "mesh.example".parse().unwrap();
    let now = SystemTime::now();
    let root = Root::generate(&trust_domain, now, &Lifetimes::default()).unwrap();
    let issuer = root.issue_intermediate("mesh1", now, &Lifetimes::default()).unwrap();
    let name = |name: &&str| name.parse::<ServiceName>().unwrap();
    let of_service =
        |service: ServiceName| (service.clone(), credential(&issuer, Identity::Service(service)));
    NodeCredentials {
        trust_domain,
        bundle: issuer.bundle().unwrap(),
        granted: granted.iter().map(name).collect(),
        node: credential(&issuer, Identity::Node("web-1".parse().unwrap())),
        services: services.iter().map(name).map(of_service).collect::<BTreeMap<_, _>>(),
        issued: now,
    }
}
