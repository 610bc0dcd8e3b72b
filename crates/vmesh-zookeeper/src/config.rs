//! Servers, credentials and TLS, as they are written in YAML.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};

/// The servers of a ZooKeeper ensemble, and the options of a session with them.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The connect string: `zk1:2181,zk2:2181/chroot`.
    pub connect: ConnectString,
    #[serde(default)]
    pub auth: Option<Auth>,
    #[serde(default)]
    pub sasl: Option<Sasl>,
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The time for which the servers keep a session of a silent client; they may insist on another value. A
    /// client that gets no answer for two fifths of this time considers its connection lost. Default: 10 s.
    #[serde(default = "ten_seconds", deserialize_with = "duration")]
    pub session_timeout: Duration,
    /// Allows reads from a server that has lost its quorum; its answers count as stale. Default: yes. Servers
    /// offer such reads only with `readonlymode.enabled`, and 3.8 also requires `localSessionsEnabled`.
    #[serde(default = "yes")]
    pub read_only: bool,
    #[serde(default)]
    pub watch: Watch,
}

impl Config {
    /// Returns the configuration for these servers with all defaults.
    pub fn of(connect: ConnectString) -> Config {
        Config {
            connect,
            auth: None,
            sasl: None,
            tls: None,
            session_timeout: ten_seconds(),
            read_only: yes(),
            watch: Watch::Auto,
        }
    }
}

fn yes() -> bool {
    true
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

/// Credentials of the scheme `digest`. They cross the network unencrypted unless TLS is used.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Auth {
    /// A file that contains `user:password`. Each new session reads the file again.
    pub digest_file: PathBuf,
}

/// SASL credentials.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sasl {
    #[serde(default)]
    pub mechanism: Mechanism,
    /// A file that contains `user:password`. Each new session reads the file again.
    pub credentials_file: PathBuf,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mechanism {
    #[default]
    DigestMd5,
}

impl<'de> Deserialize<'de> for Mechanism {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        match text.to_ascii_lowercase().as_str() {
            "digest-md5" => Ok(Mechanism::DigestMd5),
            "gssapi" | "kerberos" => Err(de::Error::custom(
                "GSSAPI (Kerberos) needs a C library that is not built in: use `digest-md5`, or a client certificate \
                 (`tls`)",
            )),
            _ => Err(de::Error::custom(format!("`{text}` is not a mechanism of SASL: `digest-md5`"))),
        }
    }
}

/// TLS towards the servers' `secureClientPort`. The files are PEM and read again for each session.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Tls {
    /// The certificates of the authorities that sign the servers' certificates.
    pub ca_file: PathBuf,
    /// The client's certificate and key, for servers that require one.
    #[serde(default)]
    pub cert_file: Option<PathBuf>,
    #[serde(default)]
    pub key_file: Option<PathBuf>,
}

/// The kind of watches by which a mirror learns of changes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Watch {
    /// One persistent watch per root if the server supports it (3.6 and later), else `one-shot`.
    #[default]
    Auto,
    Persistent,
    /// Two one-shot watches per node, set again after each event.
    OneShot,
}

/// A connect string: the servers, each `host:port`, and the chroot, the node that serves as the root.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConnectString {
    servers: Vec<String>,
    /// Empty, or a path without a trailing slash.
    chroot: String,
}

impl ConnectString {
    pub fn servers(&self) -> &[String] {
        &self.servers
    }

    /// Returns the chroot, or an empty string if there is none.
    pub fn chroot(&self) -> &str {
        &self.chroot
    }
}

impl fmt::Display for ConnectString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", self.servers.join(","), self.chroot)
    }
}

impl FromStr for ConnectString {
    type Err = String;

    fn from_str(text: &str) -> Result<ConnectString, String> {
        let (servers, chroot) = match text.find('/') {
            Some(at) => text.split_at(at),
            None => (text, ""),
        };
        if servers.ends_with(':') {
            return Err(format!(
                "`{text}`: only hosts and ports, without a scheme: `zk1:2181,zk2:2181/chroot`"
            ));
        }
        let chroot = if chroot == "/" { "" } else { chroot };
        if !chroot.is_empty() {
            check_path(chroot).map_err(|wrong| format!("the chroot {wrong}"))?;
        }
        let servers = servers.split(',').map(|server| server_of(server.trim())).collect::<Result<_, _>>()?;
        Ok(ConnectString { servers, chroot: chroot.to_owned() })
    }
}

impl<'de> Deserialize<'de> for ConnectString {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(de::Error::custom)
    }
}

fn server_of(text: &str) -> Result<String, String> {
    let wrong = |why: &str| Err(format!("`{text}` is not a server, `host:2181`: {why}"));
    let after_ipv6 = text.strip_prefix('[').and_then(|rest| rest.split_once(']'));
    let (host, port) = match after_ipv6 {
        Some((host, "")) => (host, None),
        Some((host, port)) => (host, port.strip_prefix(':').or(Some(""))),
        None => match text.rsplit_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    let is_ipv6 = after_ipv6.is_some();
    if host.is_empty() {
        return wrong("it has no host");
    }
    if !is_ipv6 && host.contains(':') {
        return wrong("an IPv6 address is written `[::1]:2181`");
    }
    if host.contains(char::is_whitespace) {
        return wrong("there is a blank in it");
    }
    let port = match port.map(str::parse::<u16>) {
        None => 2181,
        Some(Ok(port)) if port > 0 => port,
        Some(_) => return wrong("its port is none, from 1 to 65535"),
    };
    Ok(if is_ipv6 { format!("[{host}]:{port}") } else { format!("{host}:{port}") })
}

/// Checks that `path` is a valid path of a node. The error describes what is wrong with it.
pub fn check_path(path: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("`{path}` is not the path of a node: {why}"));
    let Some(below) = path.strip_prefix('/') else { return wrong("it does not begin with `/`") };
    if below.is_empty() {
        return Ok(());
    }
    if path.contains(|c: char| c.is_control() || ('\u{f000}'..='\u{f8ff}').contains(&c)) {
        return wrong("there is a character in it that ZooKeeper does not allow");
    }
    for segment in below.split('/') {
        match segment {
            "" => return wrong("there is nothing between two `/`, or after the last"),
            "." | ".." => return wrong("ZooKeeper knows no relative paths"),
            _ => {}
        }
    }
    Ok(())
}

/// Parses `10s`, `500ms` or `1m`.
fn duration<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Duration, D::Error> {
    let text = String::deserialize(deserializer)?;
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err(de::Error::custom(format!("`{text}` is not a duration: `10s`, `500ms`, `1m`"))),
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    fn connect(text: &str) -> String {
        match text.parse::<ConnectString>() {
            Ok(connect) => format!("{:?} {:?} {connect}", connect.servers(), connect.chroot()),
            Err(wrong) => wrong,
        }
    }

    #[test]
    fn servers_are_hosts_and_ports_and_a_chroot() {
        let shown: Vec<_> = [
            "zk1:2181,zk2:2182,zk3:2183/prod/mesh",
            "zk1",
            "zk1, zk2/",
            "[::1]:2181,[fd00::7]",
            "::1:2181",
            "",
            "zk1:2181,",
            "zk1:x",
            "zk1:0",
            "tcp://zk1:2181",
            "zk1/a/",
            "zk1/a//b",
            "zk1/a/../b",
        ]
        .map(|text| format!("{text:?}: {}\n", connect(text)))
        .into_iter()
        .collect();
        expect![[r#"
            "zk1:2181,zk2:2182,zk3:2183/prod/mesh": ["zk1:2181", "zk2:2182", "zk3:2183"] "/prod/mesh" zk1:2181,zk2:2182,zk3:2183/prod/mesh
            "zk1": ["zk1:2181"] "" zk1:2181
            "zk1, zk2/": ["zk1:2181", "zk2:2181"] "" zk1:2181,zk2:2181
            "[::1]:2181,[fd00::7]": ["[::1]:2181", "[fd00::7]:2181"] "" [::1]:2181,[fd00::7]:2181
            "::1:2181": `::1:2181` is not a server, `host:2181`: an IPv6 address is written `[::1]:2181`
            "": `` is not a server, `host:2181`: it has no host
            "zk1:2181,": `` is not a server, `host:2181`: it has no host
            "zk1:x": `zk1:x` is not a server, `host:2181`: its port is none, from 1 to 65535
            "zk1:0": `zk1:0` is not a server, `host:2181`: its port is none, from 1 to 65535
            "tcp://zk1:2181": `tcp://zk1:2181`: only hosts and ports, without a scheme: `zk1:2181,zk2:2181/chroot`
            "zk1/a/": the chroot `/a/` is not the path of a node: there is nothing between two `/`, or after the last
            "zk1/a//b": the chroot `/a//b` is not the path of a node: there is nothing between two `/`, or after the last
            "zk1/a/../b": the chroot `/a/../b` is not the path of a node: ZooKeeper knows no relative paths
        "#]].assert_eq(&shown.concat());
    }

    fn config(json: &str) -> String {
        match serde_json::from_str::<Config>(json) {
            Ok(config) => format!("{config:?}"),
            Err(wrong) => wrong.to_string(),
        }
    }

    #[test]
    fn a_configuration_has_servers_and_what_is_built_in() {
        expect![[r#"Config { connect: ConnectString { servers: ["zk1:2181"], chroot: "" }, auth: None, sasl: None, tls: None, session_timeout: 10s, read_only: true, watch: Auto }"#]]
            .assert_eq(&config(r#"{"connect": "zk1"}"#));
        expect![[r#"Config { connect: ConnectString { servers: ["zk1:2181"], chroot: "" }, auth: Some(Auth { digest_file: "/etc/d" }), sasl: Some(Sasl { mechanism: DigestMd5, credentials_file: "/etc/s" }), tls: Some(Tls { ca_file: "/etc/ca", cert_file: None, key_file: None }), session_timeout: 30s, read_only: false, watch: OneShot }"#]].assert_eq(&config(
            r#"{"connect": "zk1", "auth": {"digest_file": "/etc/d"}, "sasl": {"credentials_file": "/etc/s"},
                "tls": {"ca_file": "/etc/ca"}, "session_timeout": "30s", "read_only": false, "watch": "one-shot"}"#,
        ));
        expect!["GSSAPI (Kerberos) needs a C library that is not built in: use `digest-md5`, or a client certificate (`tls`) at line 1 column 49"]
            .assert_eq(&config(r#"{"connect": "zk1", "sasl": {"mechanism": "GSSAPI", "credentials_file": "/x"}}"#));
        expect!["`soon` is not a duration: `10s`, `500ms`, `1m` at line 1 column 45"]
            .assert_eq(&config(r#"{"connect": "zk1", "session_timeout": "soon"}"#));
    }
}
