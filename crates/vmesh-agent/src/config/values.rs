//! Values of `agent.yaml` whose errors show an example of a valid one.

use std::fmt;
use std::net::SocketAddr;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use vmesh_model::ServiceName;
use vmesh_model::endpoint::{Address, Host};
use vmesh_model::node::Upstream;

use super::{ControlPlane, UpstreamEntry};

/// An IP address and a port, with an error message that shows an example.
#[derive(Debug, Clone, Copy)]
pub(super) struct ListenAddress(pub(super) SocketAddr);

impl<'de> Deserialize<'de> for ListenAddress {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.parse::<SocketAddr>() {
            Ok(address) if address.port() == 0 => {
                Err(de::Error::custom(format!("`{text}`: port 0 is not a port: 1 to 65535")))
            }
            Ok(address) => Ok(ListenAddress(address)),
            Err(_) => Err(de::Error::custom(format!(
                "`{text}` is not an IP address and a port, as \"127.0.0.1:9001\""
            ))),
        }
    }
}

#[derive(Debug)]
pub(super) struct PortNumber(pub(super) u16);

impl<'de> Deserialize<'de> for PortNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u16::deserialize(deserializer)? {
            0 => Err(de::Error::custom("port 0 is not a port: 1 to 65535")),
            port => Ok(PortNumber(port)),
        }
    }
}

impl FromStr for ControlPlane {
    type Err = String;

    fn from_str(text: &str) -> Result<ControlPlane, String> {
        let (address, is_tls) = match text.strip_prefix("http://") {
            Some(address) => (address.trim_end_matches('/'), false),
            None => (text, true),
        };
        if address.contains("://") {
            return Err(format!(
                "`{text}`: write a host and a port for mTLS, as \"mesh1.example:15012\", or http:// for plaintext"
            ));
        }
        let address: Address = address.parse()?;
        if let Host::Ip(ip) = address.host {
            vmesh_model::endpoint::dialable(ip)?;
        }
        Ok(ControlPlane { address, is_tls })
    }
}

impl ControlPlane {
    fn is_loopback(&self) -> bool {
        match &self.address.host {
            Host::Ip(ip) => ip.is_loopback(),
            Host::Name(name) => **name == *"localhost",
        }
    }
}

/// Reads `"mesh1.example:15012"`, `"http://127.0.0.1:15010"`, or `{address: "http://10.0.0.5:15010", insecure: true}`.
impl<'de> Deserialize<'de> for ControlPlane {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct ControlPlaneFields {
            address: String,
            #[serde(default)]
            insecure: bool,
        }

        struct ControlPlaneVisitor;

        impl<'de> Visitor<'de> for ControlPlaneVisitor {
            type Value = ControlPlane;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "the address of a control plane, as \"mesh1.example:15012\" (mTLS) or \"http://127.0.0.1:15010\"",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<ControlPlane, E> {
                checked(text, false)
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ControlPlane, A::Error> {
                let full = ControlPlaneFields::deserialize(MapAccessDeserializer::new(map))?;
                checked(&full.address, full.insecure)
            }
        }

        fn checked<E: de::Error>(text: &str, insecure: bool) -> Result<ControlPlane, E> {
            let control_plane: ControlPlane = text.parse().map_err(E::custom)?;
            if control_plane.is_tls && insecure {
                return Err(E::custom(format!("`{text}` is reached by mTLS: `insecure` is for http://")));
            }
            if !control_plane.is_tls && !control_plane.is_loopback() && !insecure {
                return Err(E::custom(format!(
                    "`{text}` is plaintext and leaves this host: anybody on the way can read and change the \
                     configuration. If that is acceptable, write {{address: \"{text}\", insecure: true}}"
                )));
            }
            Ok(control_plane)
        }

        deserializer.deserialize_any(ControlPlaneVisitor)
    }
}

/// Reads `"*"`, or `{service: payments, listen: "127.0.0.1:9001"}`.
impl<'de> Deserialize<'de> for UpstreamEntry {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(deny_unknown_fields)]
        struct UpstreamFields {
            service: ServiceName,
            listen: Option<ListenAddress>,
            #[serde(rename = "as")]
            as_: Option<ServiceName>,
        }

        struct UpstreamVisitor;

        impl<'de> Visitor<'de> for UpstreamVisitor {
            type Value = UpstreamEntry;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an upstream, as {service: payments, listen: \"127.0.0.1:9001\"} or `payments`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<UpstreamEntry, E> {
                match text {
                    "*" => Ok(UpstreamEntry::All),
                    name => match name.parse() {
                        Ok(service) => {
                            Ok(UpstreamEntry::Service(Upstream { service, listen: None, as_: None }))
                        }
                        Err(wrong) => Err(E::custom(wrong)),
                    },
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<UpstreamEntry, A::Error> {
                let full = UpstreamFields::deserialize(MapAccessDeserializer::new(map))?;
                let listen = full.listen.map(|socket| socket.0);
                Ok(UpstreamEntry::Service(Upstream { service: full.service, listen, as_: full.as_ }))
            }
        }

        deserializer.deserialize_any(UpstreamVisitor)
    }
}
