//! The destinations that can be captured on this host: the control plane's destinations, as far as Envoy has accepted listeners for them. A
//! destination without a listener is neither captured nor given a name.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use prost::Message;
use rpds::RedBlackTreeMapSync;
use vmesh_capture::spec::{OnLoss, Percent};
use vmesh_proto::agent::{self, destination};
use vmesh_xds::{Kind, Resource};

/// All destinations of this host. Cheap to clone.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destinations {
    pub services: RedBlackTreeMapSync<Arc<str>, Arc<Destination>>,
    /// Ports on which Envoy has a wildcard listener for upstreams.
    pub everywhere: BTreeSet<u16>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destination {
    /// Virtual addresses for which Envoy has a listener.
    pub virtual_addresses: BTreeSet<SocketAddr>,
    /// Endpoint addresses for which Envoy has a listener.
    pub captured: BTreeSet<SocketAddr>,
    /// Endpoint addresses where the service can be dialed past Envoy, at the service's own port. Empty if the endpoints use another port.
    pub direct: BTreeSet<IpAddr>,
    pub percent: Option<Percent>,
    pub on_loss: Option<OnLoss>,
}

/// Returns the destinations among the `accepted` resources. Without `ipv6`, Envoy has no IPv6 listener.
pub fn destinations<'a>(accepted: impl IntoIterator<Item = &'a Arc<Resource>>, ipv6: bool) -> Destinations {
    let accepted =
        accepted.into_iter().map(|resource| ((resource.kind(), resource.name().clone()), resource));
    let accepted: BTreeMap<_, _> = accepted.collect();
    let mut tracker = DestinationTracker::new(ipv6);
    tracker.update(accepted.keys().cloned(), |kind, name| accepted.get(&(kind, name.clone())).copied());
    tracker.now
}

/// Keeps [`Destinations`] up to date at a cost proportional to the change.
#[derive(Debug)]
pub struct DestinationTracker {
    ipv6: bool,
    listeners: HashSet<SocketAddr>,
    /// The services by the addresses of the listeners they depend on. Usually there is one service per address.
    services_by_address: HashMap<SocketAddr, Vec<Arc<str>>>,
    /// The addresses of the listeners that each service depends on: the inverse of the map above.
    addresses_by_service: HashMap<Arc<str>, Vec<SocketAddr>>,
    now: Destinations,
}

impl DestinationTracker {
    /// Returns a tracker without destinations. Without `ipv6`, Envoy has no IPv6 listener.
    pub fn new(ipv6: bool) -> DestinationTracker {
        let (listeners, now) = (HashSet::new(), Destinations::default());
        DestinationTracker {
            ipv6,
            listeners,
            services_by_address: HashMap::new(),
            addresses_by_service: HashMap::new(),
            now,
        }
    }

    pub fn now(&self) -> &Destinations {
        &self.now
    }

    /// Updates the destinations after the resources named in `changed` changed. `accepted` returns the resource that Envoy has now. Returns
    /// whether any destination changed.
    pub fn update<'a>(
        &mut self,
        changed: impl IntoIterator<Item = (Kind, Arc<str>)>,
        accepted: impl Fn(Kind, &Arc<str>) -> Option<&'a Arc<Resource>>,
    ) -> bool {
        let accepted = |kind, name: &Arc<str>| accepted(kind, name).filter(|resource| !resource.is_absent());
        let (mut services, mut differs) = (BTreeSet::new(), false);
        for (kind, name) in changed {
            match kind {
                Kind::Listener => {
                    let address = name.strip_prefix("outbound|").and_then(|address| address.parse().ok());
                    let Some(address): Option<SocketAddr> = address else { continue };
                    let changed = match accepted(kind, &name).is_some() {
                        true => self.listeners.insert(address),
                        false => self.listeners.remove(&address),
                    };
                    if changed {
                        services
                            .extend(self.services_by_address.get(&address).into_iter().flatten().cloned());
                        differs |= self.update_everywhere(address);
                    }
                }
                Kind::Local => _ = services.insert(name),
                _ => {}
            }
        }
        for service in services {
            // A destination that fails to decode was rejected on arrival, so it is not in force.
            let received = accepted(Kind::Local, &service).and_then(|resource| decode(resource).ok());
            differs |= self.update_service(service, received);
        }
        differs
    }

    fn update_everywhere(&mut self, changed: SocketAddr) -> bool {
        if !changed.ip().is_unspecified() {
            return false;
        }
        let everywhere = self.listeners.iter().filter(|address| address.ip().is_unspecified());
        self.now.everywhere = everywhere.map(SocketAddr::port).collect();
        true
    }

    fn update_service(&mut self, service: Arc<str>, received: Option<agent::Destination>) -> bool {
        self.set_addresses(&service, received.as_ref().map(listener_addresses).unwrap_or_default());
        let Some(received) = received else {
            return self.now.services.remove_mut(&service);
        };
        let now = destination(&received, &self.listeners, self.ipv6);
        let differs = self.now.services.get(&service).is_none_or(|before| **before != now);
        if differs {
            self.now.services.insert_mut(service, Arc::new(now));
        }
        differs
    }

    /// Sets the listener addresses that `service` depends on.
    fn set_addresses(&mut self, service: &Arc<str>, addresses: Vec<SocketAddr>) {
        for address in self.addresses_by_service.remove(service).unwrap_or_default() {
            if let Some(services) = self.services_by_address.get_mut(&address) {
                services.retain(|other| other != service);
                if services.is_empty() {
                    self.services_by_address.remove(&address);
                }
            }
        }
        for address in &addresses {
            self.services_by_address.entry(*address).or_default().push(service.clone());
        }
        if !addresses.is_empty() {
            self.addresses_by_service.insert(service.clone(), addresses);
        }
    }
}

/// Decodes a destination.
///
/// # Errors
/// The text describes the error for the control plane that sent the resource.
pub fn decode(resource: &Resource) -> Result<agent::Destination, String> {
    let received = agent::Destination::decode(resource.value())
        .map_err(|error| format!("destination {} cannot be read: {error}", resource.name()))?;
    match received.service.as_str() == &**resource.name() {
        true => Ok(received),
        false => Err(format!("destination {} speaks of service {}", resource.name(), received.service)),
    }
}

/// Returns the virtual addresses, IPv4 and IPv6.
fn virtual_addresses(received: &agent::Destination) -> [Option<SocketAddr>; 2] {
    let port = u16::try_from(received.port).unwrap_or_default();
    [&received.virtual_v4, &received.virtual_v6]
        .map(|address| address.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, port)))
}

/// Returns the addresses at which Envoy may have listeners for this destination.
fn listener_addresses(received: &agent::Destination) -> Vec<SocketAddr> {
    let captured = received.endpoints.iter().filter(|endpoint| endpoint.capture);
    let captured = captured.filter_map(|endpoint| endpoint.address.parse().ok());
    virtual_addresses(received).into_iter().flatten().chain(captured).collect()
}

fn destination(received: &agent::Destination, listeners: &HashSet<SocketAddr>, ipv6: bool) -> Destination {
    let [v4, v6] = virtual_addresses(received);
    let taken = |address: &SocketAddr| listeners.contains(address);
    // One listener has both virtual addresses, and is named after the IPv4 one.
    let both = ipv6 && v4.as_ref().is_some_and(taken);
    let virtual_addresses = [v4.filter(taken), v6.filter(|v6| both || taken(v6))]
        .into_iter()
        .flatten()
        .filter(|at| at.port() > 0);
    let endpoints = || {
        received
            .endpoints
            .iter()
            .filter_map(|endpoint| Some((endpoint, endpoint.address.parse::<SocketAddr>().ok()?)))
    };
    let captured = endpoints().filter(|(endpoint, _)| endpoint.capture).map(|(_, address)| address);
    let direct = endpoints().filter(|(endpoint, _)| received.endpoints_on_port && !endpoint.out_of_service);
    Destination {
        virtual_addresses: virtual_addresses.collect(),
        captured: captured.filter(taken).collect(),
        direct: direct.map(|(_, address)| address.ip()).collect(),
        percent: received.percent.and_then(|percent| Percent::new(u8::try_from(percent).ok()?)),
        on_loss: match received.on_loss() {
            destination::OnLoss::Unspecified => None,
            destination::OnLoss::Open => Some(OnLoss::Open),
            destination::OnLoss::Closed => Some(OnLoss::Closed),
        },
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use proptest::prelude::*;
    use vmesh_proto::envoy::config::listener::v3::Listener;

    use super::*;

    fn listener(name: &str) -> Arc<Resource> {
        Resource::new(Kind::Listener, name, &Listener { name: name.to_owned(), ..Listener::default() })
    }

    fn received(service: &str, edit: impl FnOnce(&mut agent::Destination)) -> Arc<Resource> {
        let endpoint = |address: &str, out_of_service| destination::Endpoint {
            address: address.to_owned(),
            capture: true,
            out_of_service,
        };
        let mut received = agent::Destination {
            service: service.to_owned(),
            port: 80,
            virtual_v4: "240.0.0.1".to_owned(),
            virtual_v6: "fd76:6d65:7368::1".to_owned(),
            endpoints: vec![endpoint("10.0.1.11:80", false), endpoint("10.0.1.12:80", true)],
            endpoints_on_port: true,
            percent: Some(25),
            on_loss: destination::OnLoss::Closed.into(),
        };
        edit(&mut received);
        Resource::new(Kind::Local, service, &received)
    }

    #[test]
    fn what_envoy_has_taken_is_there_and_nothing_else() {
        let accepted = [
            received("orders", |_| {}),
            listener("outbound|240.0.0.1:80"),
            listener("outbound|10.0.1.11:80"),
            listener("inbound|orders"),
        ];
        expect![[r#"
            {
                "orders": Destination {
                    virtual_addresses: {
                        240.0.0.1:80,
                        [fd76:6d65:7368::1]:80,
                    },
                    captured: {
                        10.0.1.11:80,
                    },
                    direct: {
                        10.0.1.11,
                    },
                    percent: Some(
                        Percent(
                            25,
                        ),
                    ),
                    on_loss: Some(
                        Closed,
                    ),
                },
            }
        "#]]
        .assert_debug_eq(&destinations(&accepted, true).services.iter().collect::<BTreeMap<_, _>>());
    }

    #[test]
    fn a_service_without_a_listener_has_no_address_here() {
        let all =
            destinations(&[received("orders", |_| {}), Resource::absent(Kind::Local, "payments")], true)
                .services;
        let orders = &all["orders"];
        assert!(orders.virtual_addresses.is_empty() && orders.captured.is_empty());
        assert!(!orders.direct.is_empty(), "out of the mesh it can be dialed all the same");
        assert_eq!(all.size(), 1);
    }

    #[test]
    fn a_host_without_ipv6_has_no_virtual_address_of_it() {
        let all = destinations(&[received("orders", |_| {}), listener("outbound|240.0.0.1:80")], false);
        assert_eq!(all.services["orders"].virtual_addresses, ["240.0.0.1:80".parse().unwrap()].into());
    }

    #[test]
    fn nonsense_is_left_out_and_named() {
        let nonsense = received("orders", |received| {
            received.port = 70_000;
            received.virtual_v4 = "no address".to_owned();
            received.percent = Some(101);
            received.on_loss = 77;
            received.endpoints[0].address = "db.example:80".to_owned();
        });
        let all =
            destinations(&[nonsense, listener("outbound|240.0.0.1:80"), listener("outbound|nowhere")], true);
        assert_eq!(*all.services["orders"], Destination::default());
        let other = Resource::from_bytes(Kind::Local, "payments", &received("orders", |_| {}).value());
        assert!(decode(&other).unwrap_err().contains("payments speaks of service orders"));
        let garbage = Resource::from_bytes(Kind::Local, "payments", &[255, 255]);
        assert!(decode(&garbage).unwrap_err().contains("destination payments cannot be read"));
    }

    #[test]
    fn ports_at_which_envoy_has_every_address_are_known() {
        let at = |all: &[&str]| {
            let all: Vec<_> = all.iter().map(|name| listener(name)).collect();
            destinations(&all, true).everywhere
        };
        assert_eq!(
            at(&["outbound|0.0.0.0:9001", "outbound|[::]:9002", "outbound|10.0.0.1:9003"]),
            [9001, 9002].into()
        );
        assert_eq!(at(&["inbound|orders"]), [].into());
    }

    /// A change of services, ports, endpoints or listeners.
    #[derive(Debug, Clone)]
    enum Change {
        Received { service: usize, port: u32, endpoints: Vec<(u8, bool)> },
        Removed(usize),
        ListenerAdded(usize),
        ListenerRemoved(usize),
    }

    const SERVICES: [&str; 3] = ["a", "b", "c"];

    fn listeners() -> Vec<String> {
        let virtual_v4 = (0..3).flat_map(|n| [format!("240.0.0.{n}:80"), format!("240.0.0.{n}:81")]);
        let real = (0..4).map(|n| format!("10.0.0.{n}:80"));
        let others = ["[fd00::1]:80", "0.0.0.0:9001", "[::]:9001", "nowhere"].map(str::to_owned);
        virtual_v4.chain(real).chain(others).map(|address| format!("outbound|{address}")).collect()
    }

    fn change() -> impl Strategy<Value = Change> {
        let endpoints = prop::collection::vec((0_u8..4, any::<bool>()), 0..4);
        prop_oneof![
            4 => (0..3_usize, 80_u32..82, endpoints)
                .prop_map(|(service, port, endpoints)| Change::Received { service, port, endpoints }),
            1 => (0..3_usize).prop_map(Change::Removed),
            4 => (0..listeners().len()).prop_map(Change::ListenerAdded),
            2 => (0..listeners().len()).prop_map(Change::ListenerRemoved),
        ]
    }

    proptest! {
        #[test]
        fn what_is_kept_up_is_what_there_would_be_from_nothing(
            batches in prop::collection::vec(prop::collection::vec(change(), 1..4), 0..12),
        ) {
            let names = listeners();
            let mut accepted: BTreeMap<(Kind, Arc<str>), Arc<Resource>> = BTreeMap::new();
            let mut tracker = DestinationTracker::new(true);
            for batch in batches {
                let mut changed = Vec::new();
                for change in batch {
                    let (key, now) = match change {
                        Change::Received { service, port, endpoints } => {
                            let resource = received(SERVICES[service], |received| {
                                received.port = port;
                                received.virtual_v4 = format!("240.0.0.{service}");
                                received.virtual_v6 = format!("fd00::{service}");
                                let endpoint = |(n, capture): (u8, bool)| destination::Endpoint {
                                    address: format!("10.0.0.{n}:80"),
                                    capture,
                                    out_of_service: n == 3,
                                };
                                received.endpoints = endpoints.into_iter().map(endpoint).collect();
                            });
                            ((Kind::Local, resource.name().clone()), Some(resource))
                        }
                        Change::Removed(service) => ((Kind::Local, SERVICES[service].into()), None),
                        Change::ListenerAdded(at) => {
                            let resource = listener(&names[at]);
                            ((Kind::Listener, resource.name().clone()), Some(resource))
                        }
                        Change::ListenerRemoved(at) => ((Kind::Listener, names[at].as_str().into()), None),
                    };
                    match now {
                        Some(now) => _ = accepted.insert(key.clone(), now),
                        None => _ = accepted.remove(&key),
                    }
                    changed.push(key);
                }
                let before = tracker.now().clone();
                let differs = tracker.update(changed, |kind, name| accepted.get(&(kind, name.clone())));
                let anew = destinations(accepted.values(), true);
                prop_assert_eq!(tracker.now(), &anew);
                prop_assert!(differs || before == anew, "a change went unseen");
                let (of, at) = (tracker.services_by_address.len(), tracker.addresses_by_service.len());
                prop_assert!(of <= 3 * 6 && at <= 3, "what is gone is forgotten: {of}, {at}");
            }
        }
    }
}
