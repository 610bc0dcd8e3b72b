//! Where services are reached from this host without anybody dialing Envoy: what the control plane says of it, as far as Envoy
//! has taken the listeners. What Envoy does not listen for is neither captured nor named.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use prost::Message;
use vmesh_capture::spec::{OnLoss, Percent};
use vmesh_proto::agent::{self, destination};
use vmesh_xds::{Kind, Resource};

/// By service.
pub type Destinations = BTreeMap<Arc<str>, Destination>;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Destination {
    /// Virtual addresses.
    pub virtual_addresses: BTreeSet<SocketAddr>,
    /// Real addresses for which Envoy has a listener.
    pub captured: BTreeSet<SocketAddr>,
    /// Where the service can be dialed at its own port, past Envoy: its endpoints in service. Empty where they have another port.
    pub direct: BTreeSet<IpAddr>,
    pub percent: Option<Percent>,
    pub on_loss: Option<OnLoss>,
}

/// What of `accepted` concerns this host. Without `ipv6` Envoy listens at no IPv6 address.
pub fn destinations<'a>(accepted: impl IntoIterator<Item = &'a Arc<Resource>>, ipv6: bool) -> Destinations {
    let (mut listeners, mut told) = (HashSet::new(), Vec::new());
    for resource in accepted.into_iter().filter(|resource| !resource.is_absent()) {
        match resource.kind() {
            Kind::Listener => {
                let address =
                    resource.name().strip_prefix("outbound|").and_then(|address| address.parse().ok());
                listeners.extend(address.map(|address: SocketAddr| address));
            }
            Kind::Local => told.push(resource),
            _ => {}
        }
    }
    // One that does not decode was refused and is not among them.
    let told = told.into_iter().filter_map(|resource| decode(resource).ok());
    told.map(|told| (Arc::from(told.service.as_str()), destination(&told, &listeners, ipv6))).collect()
}

/// # Errors
/// Says what cannot be read, for whoever sent it.
pub fn decode(resource: &Resource) -> Result<agent::Destination, String> {
    let told = agent::Destination::decode(resource.value())
        .map_err(|error| format!("destination {} cannot be read: {error}", resource.name()))?;
    match told.service.as_str() == &**resource.name() {
        true => Ok(told),
        false => Err(format!("destination {} speaks of service {}", resource.name(), told.service)),
    }
}

fn destination(told: &agent::Destination, listeners: &HashSet<SocketAddr>, ipv6: bool) -> Destination {
    let port = u16::try_from(told.port).unwrap_or_default();
    let at = |address: &str| address.parse().ok().map(|ip: IpAddr| SocketAddr::new(ip, port));
    let (v4, v6) = (at(&told.virtual_v4), at(&told.virtual_v6));
    let taken = |address: &SocketAddr| listeners.contains(address);
    // One listener has both, and bears the name of the first.
    let both = ipv6 && v4.as_ref().is_some_and(taken);
    let virtual_addresses = [v4.filter(taken), v6.filter(|v6| both || taken(v6))]
        .into_iter()
        .flatten()
        .filter(|at| at.port() > 0);
    let endpoints = || {
        told.endpoints
            .iter()
            .filter_map(|endpoint| Some((endpoint, endpoint.address.parse::<SocketAddr>().ok()?)))
    };
    let captured = endpoints().filter(|(endpoint, _)| endpoint.capture).map(|(_, address)| address);
    let direct = endpoints().filter(|(endpoint, _)| told.endpoints_on_port && !endpoint.out_of_service);
    Destination {
        virtual_addresses: virtual_addresses.collect(),
        captured: captured.filter(taken).collect(),
        direct: direct.map(|(_, address)| address.ip()).collect(),
        percent: told.percent.and_then(|percent| Percent::new(u8::try_from(percent).ok()?)),
        on_loss: match told.on_loss() {
            destination::OnLoss::Unspecified => None,
            destination::OnLoss::Open => Some(OnLoss::Open),
            destination::OnLoss::Closed => Some(OnLoss::Closed),
        },
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use vmesh_proto::envoy::config::listener::v3::Listener;

    use super::*;

    fn listener(name: &str) -> Arc<Resource> {
        Resource::new(Kind::Listener, name, &Listener { name: name.to_owned(), ..Listener::default() })
    }

    fn told(service: &str, edit: impl FnOnce(&mut agent::Destination)) -> Arc<Resource> {
        let endpoint = |address: &str, out_of_service| destination::Endpoint {
            address: address.to_owned(),
            capture: true,
            out_of_service,
        };
        let mut told = agent::Destination {
            service: service.to_owned(),
            port: 80,
            virtual_v4: "240.0.0.1".to_owned(),
            virtual_v6: "fd76:6d65:7368::1".to_owned(),
            endpoints: vec![endpoint("10.0.1.11:80", false), endpoint("10.0.1.12:80", true)],
            endpoints_on_port: true,
            percent: Some(25),
            on_loss: destination::OnLoss::Closed.into(),
        };
        edit(&mut told);
        Resource::new(Kind::Local, service, &told)
    }

    #[test]
    fn what_envoy_has_taken_is_there_and_nothing_else() {
        let accepted = [
            told("orders", |_| {}),
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
        .assert_debug_eq(&destinations(&accepted, true));
    }

    #[test]
    fn a_service_without_a_listener_has_no_address_here() {
        let all = destinations(&[told("orders", |_| {}), Resource::absent(Kind::Local, "payments")], true);
        let orders = &all["orders"];
        assert!(orders.virtual_addresses.is_empty() && orders.captured.is_empty());
        assert!(!orders.direct.is_empty(), "out of the mesh it can be dialed all the same");
        assert_eq!(all.len(), 1);
    }

    #[test]
    fn a_host_without_ipv6_has_no_virtual_address_of_it() {
        let all = destinations(&[told("orders", |_| {}), listener("outbound|240.0.0.1:80")], false);
        assert_eq!(all["orders"].virtual_addresses, ["240.0.0.1:80".parse().unwrap()].into());
    }

    #[test]
    fn nonsense_is_left_out_and_named() {
        let nonsense = told("orders", |told| {
            told.port = 70_000;
            told.virtual_v4 = "no address".to_owned();
            told.percent = Some(101);
            told.on_loss = 77;
            told.endpoints[0].address = "db.example:80".to_owned();
        });
        let all =
            destinations(&[nonsense, listener("outbound|240.0.0.1:80"), listener("outbound|nowhere")], true);
        assert_eq!(all["orders"], Destination { direct: BTreeSet::new(), ..Destination::default() });
        let other = Resource::from_bytes(Kind::Local, "payments", &told("orders", |_| {}).value());
        assert!(decode(&other).unwrap_err().contains("payments speaks of service orders"));
        let garbage = Resource::from_bytes(Kind::Local, "payments", &[255, 255]);
        assert!(decode(&garbage).unwrap_err().contains("destination payments cannot be read"));
    }
}
