//! The configuration of a client, which other crates embed in their YAML.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

/// The addresses of Consul and the credentials for it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Config {
    /// One URL or a list: `http://10.0.0.1:8500`, `https://consul.internal:8501`, `unix:/run/consul.sock`.
    /// Default: the local agent, `http://127.0.0.1:8500`.
    pub address: Addresses,
    /// A file that contains only the ACL token. It is read again whenever it changes.
    pub token_file: Option<PathBuf>,
    pub tls: Tls,
    /// The namespace (Consul Enterprise). Requests carry the namespace only if it is set: the community edition
    /// rejects it.
    pub namespace: Option<String>,
    /// The admin partition (Consul Enterprise). Requests carry the partition only if it is set.
    pub partition: Option<String>,
    pub max_connections: MaxConnections,
}

impl Config {
    /// Returns the configuration for these addresses with all defaults.
    pub fn of(address: impl IntoIterator<Item = Address>) -> Config {
        Config { address: Addresses(address.into_iter().collect()), ..Config::default() }
    }
}

/// TLS for `https://` addresses. All files are read again whenever they change.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    /// PEM: the authorities that sign the servers' certificates. Default: the operating system's bundle.
    pub ca_file: Option<PathBuf>,
    /// PEM: the client's certificate with its intermediates, for servers with `verify_incoming`.
    pub cert_file: Option<PathBuf>,
    /// PEM: the key of `cert_file`.
    pub key_file: Option<PathBuf>,
    /// The name in the servers' certificates, if it is not the host of the address: `consul tls cert create`
    /// writes `server.dc1.consul`.
    pub server_name: Option<String>,
}

/// The limit of concurrent connections to one address. Default: 160. Consul's own `http_max_conns_per_client`
/// is 200, and Consul counts a closed connection until its query ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MaxConnections(usize);

impl MaxConnections {
    /// The smallest allowed limit. With fewer connections, urgent queries would wait behind blocking ones.
    pub const LEAST: usize = 4;

    pub fn new(connections: usize) -> Result<MaxConnections, String> {
        if connections >= Self::LEAST {
            Ok(MaxConnections(connections))
        } else {
            Err(format!("{connections} is too few: {} at least", Self::LEAST))
        }
    }

    pub fn get(self) -> usize {
        self.0
    }
}

impl Default for MaxConnections {
    fn default() -> Self {
        MaxConnections(160)
    }
}

impl<'de> Deserialize<'de> for MaxConnections {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        MaxConnections::new(usize::deserialize(deserializer)?).map_err(de::Error::custom)
    }
}

/// A nonempty list of addresses, in the order in which the client tries them.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Addresses(pub(crate) Vec<Address>);

impl Addresses {
    /// Returns the address that is tried first.
    pub fn first(&self) -> Option<&Address> {
        self.0.first()
    }

    pub fn iter(&self) -> impl Iterator<Item = &Address> {
        self.0.iter()
    }
}

impl Default for Addresses {
    fn default() -> Self {
        Addresses(vec![Address::Http { host: "127.0.0.1".to_owned(), port: Address::HTTP_PORT }])
    }
}

impl<'de> Deserialize<'de> for Addresses {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct OneOrMany;

        impl<'de> Visitor<'de> for OneOrMany {
            type Value = Addresses;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an address or a list of addresses, such as `http://127.0.0.1:8500`")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Addresses, E> {
                text.parse().map(|address| Addresses(vec![address])).map_err(E::custom)
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Addresses, A::Error> {
                let mut all: Vec<Address> = Vec::new();
                while let Some(text) = seq.next_element::<String>()? {
                    let address = text.parse().map_err(de::Error::custom)?;
                    if !all.contains(&address) {
                        all.push(address);
                    }
                }
                if all.is_empty() {
                    return Err(de::Error::custom(
                        "the list is empty: omit `address` to use the local agent",
                    ));
                }
                Ok(Addresses(all))
            }
        }

        deserializer.deserialize_any(OneOrMany)
    }
}

/// The address of one server or agent.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Address {
    /// `host` without the brackets of an IPv6 address.
    Http {
        host: String,
        port: u16,
    },
    Https {
        host: String,
        port: u16,
    },
    Unix(PathBuf),
}

impl Address {
    pub const HTTP_PORT: u16 = 8500;
    pub const HTTPS_PORT: u16 = 8501;

    /// Returns the address without its scheme: `10.0.0.1:8500`, `/run/consul.sock`.
    pub fn authority(&self) -> String {
        match self {
            Address::Http { host, port } | Address::Https { host, port } if host.contains(':') => {
                format!("[{host}]:{port}")
            }
            Address::Http { host, port } | Address::Https { host, port } => format!("{host}:{port}"),
            Address::Unix(path) => path.display().to_string(),
        }
    }

    pub(crate) fn is_tls(&self) -> bool {
        matches!(self, Address::Https { .. })
    }
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Address, String> {
        let wrong = |why: &str| {
            format!(
                "`{text}` is not an address of Consul: {why}; write `http://host:8500`, `https://host:8501` \
                 or `unix:/path/of/socket`"
            )
        };
        if let Some(path) = text.strip_prefix("unix:") {
            let path = path.strip_prefix("//").unwrap_or(path);
            let path = PathBuf::from(path);
            return if path.is_absolute() {
                Ok(Address::Unix(path))
            } else {
                Err(wrong("the socket's path has to be absolute"))
            };
        }
        if text.contains('@') {
            // The text may contain a password, so it must not appear in the error.
            return Err(
                "it contains an `@`, and an address of Consul has no user: put the token into `token_file`"
                    .to_owned(),
            );
        }
        let (tls, rest) = match (text.strip_prefix("http://"), text.strip_prefix("https://")) {
            (Some(rest), _) => (false, rest),
            (_, Some(rest)) => (true, rest),
            _ => return Err(wrong("it has no scheme")),
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains(['/', '?', '#']) {
            return Err(wrong("there is a path in it"));
        }
        let (host, port) = match rest.strip_prefix('[') {
            Some(rest) => {
                let (host, port) =
                    rest.split_once(']').ok_or_else(|| wrong("the closing bracket is missing"))?;
                if host.parse::<std::net::Ipv6Addr>().is_err() {
                    return Err(wrong("what is in brackets is not an IPv6 address"));
                }
                (host, port.strip_prefix(':'))
            }
            None => match rest.split_once(':') {
                Some((_, port)) if port.contains(':') => {
                    return Err(wrong("an IPv6 address is written in brackets"));
                }
                Some((host, port)) => (host, Some(port)),
                None => (rest, None),
            },
        };
        let good = |b: u8| b.is_ascii_alphanumeric() || b".-_:".contains(&b);
        if host.is_empty() || !host.bytes().all(good) {
            return Err(wrong("the host is missing or has characters that no host has"));
        }
        let host = host.to_ascii_lowercase();
        let port = match port {
            None if tls => Address::HTTPS_PORT,
            None => Address::HTTP_PORT,
            Some(port) => match port.parse() {
                Ok(port) if port > 0 => port,
                _ => return Err(wrong("the port is not one from 1 to 65535")),
            },
        };
        Ok(if tls { Address::Https { host, port } } else { Address::Http { host, port } })
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self {
            Address::Http { .. } => "http://",
            Address::Https { .. } => "https://",
            Address::Unix(_) => "unix:",
        };
        write!(f, "{scheme}{}", self.authority())
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn an_address_is_a_scheme_a_host_and_a_port() {
        let shown = |text: &str| text.parse::<Address>().map_or_else(|wrong| wrong, |a| a.to_string());
        for (text, expected) in [
            ("http://127.0.0.1:8500", "http://127.0.0.1:8500"),
            ("http://Consul.internal/", "http://consul.internal:8500"),
            ("https://consul.internal", "https://consul.internal:8501"),
            ("https://[fd00::7]:443", "https://[fd00::7]:443"),
            ("unix:/run/consul.sock", "unix:/run/consul.sock"),
            ("unix:///run/consul.sock", "unix:/run/consul.sock"),
        ] {
            assert_eq!(shown(text), expected);
        }
        let wrong: Vec<_> = [
            "127.0.0.1:8500",
            "http://",
            "http://a:0",
            "http://a:b",
            "http://u:p@a",
            "http://a/v1",
            "u:p@a:8500/x",
            "http://fd00::7:80",
            "http://[a]:1",
            "unix:a",
            "http://a b",
        ]
        .iter()
        .map(|text| shown(text).split("; write").next().unwrap().to_owned() + "\n")
        .collect();
        expect![[r#"
            `127.0.0.1:8500` is not an address of Consul: it has no scheme
            `http://` is not an address of Consul: the host is missing or has characters that no host has
            `http://a:0` is not an address of Consul: the port is not one from 1 to 65535
            `http://a:b` is not an address of Consul: the port is not one from 1 to 65535
            it contains an `@`, and an address of Consul has no user: put the token into `token_file`
            `http://a/v1` is not an address of Consul: there is a path in it
            it contains an `@`, and an address of Consul has no user: put the token into `token_file`
            `http://fd00::7:80` is not an address of Consul: an IPv6 address is written in brackets
            `http://[a]:1` is not an address of Consul: what is in brackets is not an IPv6 address
            `unix:a` is not an address of Consul: the socket's path has to be absolute
            `http://a b` is not an address of Consul: the host is missing or has characters that no host has
        "#]]
        .assert_eq(&wrong.concat());
    }

    #[test]
    fn a_configuration_says_what_differs_from_what_is_built_in() {
        let read = |text| serde_json::from_str::<Config>(text).map_err(|wrong| wrong.to_string());
        assert_eq!(read("{}"), Ok(Config::default()));
        let config =
            read(r#"{"address": ["http://a", "https://b", "http://a"], "max_connections": 8}"#).unwrap();
        assert_eq!(
            config.address.iter().map(Address::to_string).collect::<Vec<_>>(),
            ["http://a:8500", "https://b:8501"]
        );
        assert_eq!(config.max_connections.get(), 8);
        assert!(read(r#"{"address": []}"#).unwrap_err().contains("the list is empty"));
        assert!(read(r#"{"max_connections": 1}"#).unwrap_err().contains("4 at least"));
        assert!(read(r#"{"token": "x"}"#).unwrap_err().contains("unknown field"));
    }
}
