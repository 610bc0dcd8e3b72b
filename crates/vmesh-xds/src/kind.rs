use std::fmt;
use std::ops::{Index, IndexMut};

/// A type of resource that vmesh serves.
///
/// The order of the variants is the push order (R45): a resource is sent before the resources that refer to it.
/// A type of vmesh's own goes at the end, with a line in each of the two tables below.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    /// CDS.
    Cluster,
    /// EDS, a `ClusterLoadAssignment`, which has the name of its cluster.
    Endpoint,
    /// ECDS, a `TypedExtensionConfig`: a filter of a listener, delivered apart from it.
    ExtensionConfig,
    /// LDS.
    Listener,
    /// RDS, a `RouteConfiguration`.
    Route,
    /// SDS.
    Secret,
    /// A type of vmesh's own, between a control plane and an agent: it describes the node, and Envoy never sees
    /// it. A [`Relay`] keeps these resources for its agent.
    ///
    /// [`Relay`]: crate::Relay
    Local,
}

const KINDS: usize = 7;

impl Kind {
    pub const ALL: [Kind; KINDS] = [
        Kind::Cluster,
        Kind::Endpoint,
        Kind::ExtensionConfig,
        Kind::Listener,
        Kind::Route,
        Kind::Secret,
        Kind::Local,
    ];

    pub const fn type_url(self) -> &'static str {
        match self {
            Kind::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Kind::Endpoint => "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
            Kind::ExtensionConfig => "type.googleapis.com/envoy.config.core.v3.TypedExtensionConfig",
            Kind::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Kind::Route => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Kind::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            Kind::Local => "type.googleapis.com/vmesh.agent.v1.Destination",
        }
    }

    pub fn from_type_url(type_url: &str) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    /// Reports whether a client may subscribe to all resources of this kind (R21). Resources of the other kinds
    /// are subscribed to by name.
    pub const fn has_wildcard(self) -> bool {
        matches!(self, Kind::Cluster | Kind::Listener | Kind::Local)
    }
}

/// Returns the second name under which a cluster may take its endpoints. If a change concerns both how a cluster connects
/// and to which addresses, the changed cluster takes its endpoints under the other name: until that cluster is warm, the
/// cluster that it replaces keeps the addresses that it can connect to.
pub fn second_assignment(cluster: &str) -> String {
    format!("{cluster}||mtls")
}

/// Prints the word that operators read: `cluster payments: unknown TLS context`.
impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Cluster => "cluster",
            Kind::Endpoint => "endpoints",
            Kind::ExtensionConfig => "filter",
            Kind::Listener => "listener",
            Kind::Route => "route",
            Kind::Secret => "secret",
            Kind::Local => "local",
        })
    }
}

/// One `T` for each [`Kind`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct PerKind<T>([T; KINDS]);

impl<T> PerKind<T> {
    pub fn from_fn(make: impl FnMut(Kind) -> T) -> PerKind<T> {
        PerKind(Kind::ALL.map(make))
    }

    /// Iterates over all kinds in the push order.
    pub fn iter(&self) -> impl Iterator<Item = (Kind, &T)> {
        Kind::ALL.into_iter().zip(&self.0)
    }

    pub fn iter_mut(&mut self) -> impl Iterator<Item = (Kind, &mut T)> {
        Kind::ALL.into_iter().zip(&mut self.0)
    }
}

impl<T> Index<Kind> for PerKind<T> {
    type Output = T;

    #[expect(clippy::indexing_slicing, reason = "there is an element for every kind")]
    fn index(&self, kind: Kind) -> &T {
        &self.0[kind as usize]
    }
}

impl<T> IndexMut<Kind> for PerKind<T> {
    #[expect(clippy::indexing_slicing, reason = "there is an element for every kind")]
    fn index_mut(&mut self, kind: Kind) -> &mut T {
        &mut self.0[kind as usize]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use prost::Name;
    use vmesh_proto::envoy::config::{cluster, core, endpoint, listener, route};
    use vmesh_proto::envoy::extensions::transport_sockets::tls;

    #[test]
    fn a_kind_has_the_type_url_of_its_message() {
        let messages = [
            cluster::v3::Cluster::type_url(),
            endpoint::v3::ClusterLoadAssignment::type_url(),
            core::v3::TypedExtensionConfig::type_url(),
            listener::v3::Listener::type_url(),
            route::v3::RouteConfiguration::type_url(),
            tls::v3::Secret::type_url(),
            vmesh_proto::agent::Destination::type_url(),
        ];
        assert_eq!(Kind::ALL.map(Kind::type_url).to_vec(), messages);
        assert_eq!(Kind::from_type_url(&messages[4]), Some(Kind::Route));
        assert_eq!(Kind::from_type_url("type.googleapis.com/envoy.config.Banana"), None);
    }

    #[test]
    fn every_kind_has_its_own_place() {
        let places = PerKind::from_fn(|kind| kind);
        assert!(Kind::ALL.into_iter().all(|kind| places[kind] == kind));
    }
}
