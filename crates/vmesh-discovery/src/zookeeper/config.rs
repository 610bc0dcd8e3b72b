//! The `zookeeper:` part of `discovery:`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_zookeeper::config::{Auth, ConnectString, Sasl, Tls, Watch, check_path};
use vmesh_zookeeper::{Config, Root};

use crate::config_values::{half_a_minute, name, seconds, yes};
use crate::format::znode::{FieldPaths, GroupBy, PreferredPort, RecordRules, ZnodeFormat};
use crate::guard::GuardConfig;
use crate::pattern::Pattern;

/// The configuration of a ZooKeeper source: some subtrees of an ensemble, read in one session.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZookeeperConfig {
    /// The name of the source in messages and commands. Default: `zookeeper:`, the first server and the
    /// chroot.
    #[serde(default, deserialize_with = "name")]
    pub name: Option<Arc<str>>,
    /// Decides whether the control plane serves nothing before this source has answered, however long that takes. If
    /// `false`, it waits at most 30 s.
    #[serde(default = "yes")]
    pub required: bool,
    /// The servers and an optional chroot: `zk1:2181,zk2:2181,zk3:2181/chroot`.
    pub connect: ConnectString,
    #[serde(default)]
    pub auth: Option<Auth>,
    #[serde(default)]
    pub sasl: Option<Sasl>,
    #[serde(default)]
    pub tls: Option<Tls>,
    /// The session timeout. A connection without an answer for two fifths of it counts as lost. Default: 10
    /// s; minimum: 1 s.
    #[serde(default = "ten_seconds", deserialize_with = "seconds")]
    pub session_timeout: Duration,
    /// Decides whether a server without a quorum may provide the first view. Default: yes.
    #[serde(default = "yes")]
    pub read_only: bool,
    #[serde(default)]
    pub watch: Watch,
    /// The root paths, each with the format of the services below it.
    #[serde(deserialize_with = "roots")]
    pub roots: Vec<RootConfig>,
    /// The interval at which host names are resolved again. Default: 30 s; minimum: 1 s.
    #[serde(default = "half_a_minute", deserialize_with = "seconds")]
    pub resolve_interval: Duration,
    #[serde(default)]
    pub guard: GuardConfig,
}

/// A subtree with services. A service is named by its path below the root, with `.` for `/`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootConfig {
    /// The path of the root, below the chroot if there is one.
    #[serde(deserialize_with = "path")]
    pub path: String,
    /// The format of the nodes. By default it is detected from their content.
    #[serde(default)]
    pub format: ZnodeFormat,
    /// Selects one of several endpoints of an instance: a name in ServerSets, a protocol in Dubbo. Default:
    /// the main one.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// The meaning of a service in Dubbo 2: an application, or an interface.
    #[serde(default)]
    pub group_by: GroupBy,
    /// Selects one of Curator's two ports for an instance with both.
    #[serde(default)]
    pub prefer: PreferredPort,
    /// Decides whether services may be nested. Default: yes. If `false`, a service is a direct child of the root.
    #[serde(default = "yes")]
    pub recurse: bool,
    /// The names of the services to read; `*` stands for any text. Default: all.
    #[serde(default = "all")]
    pub services: Vec<Pattern>,
    #[serde(default)]
    pub exclude: Vec<Pattern>,
    /// The dotted paths of fields in a record, for example `labels.az`.
    #[serde(default)]
    pub map: FieldPaths,
    /// The limit of nodes; a root with more is assumed to be the wrong path. Default: 200,000.
    #[serde(default = "max_nodes")]
    pub max_nodes: usize,
    /// The limit of levels below the root. Default: 16.
    #[serde(default = "max_depth")]
    pub max_depth: usize,
}

impl ZookeeperConfig {
    pub fn name(&self) -> Arc<str> {
        let built_in = || {
            let first = self.connect.servers().first().map(String::as_str).unwrap_or_default();
            format!("zookeeper:{first}{}", self.connect.chroot()).into()
        };
        self.name.clone().unwrap_or_else(built_in)
    }

    /// Returns the configuration of the ZooKeeper client.
    pub fn client(&self) -> Config {
        Config {
            connect: self.connect.clone(),
            auth: self.auth.clone(),
            sasl: self.sasl.clone(),
            tls: self.tls.clone(),
            session_timeout: self.session_timeout,
            read_only: self.read_only,
            watch: self.watch,
        }
    }
}

impl RootConfig {
    pub(crate) fn rules(&self) -> RecordRules {
        RecordRules {
            endpoint: self.endpoint.clone(),
            group_by: self.group_by,
            prefer: self.prefer,
            map: self.map.clone(),
        }
    }

    /// Reports whether a service of this name is read.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.services.iter().any(|pattern| pattern.matches(name))
            && !self.exclude.iter().any(|pattern| pattern.matches(name))
    }

    /// Returns the subtree to mirror. Dubbo's consumers are left out: they are many, and nobody calls them.
    pub(crate) fn root(&self) -> Result<Root, String> {
        let may_be_dubbo = matches!(self.format, ZnodeFormat::Auto | ZnodeFormat::Dubbo);
        let mut root = Root::new(self.path.as_str())?.with_filter(move |path| {
            !may_be_dubbo || !matches!(dubbo_category(path), Some("consumers" | "routers" | "configurators"))
        });
        (root.max_nodes, root.max_depth) = (self.max_nodes, self.max_depth);
        Ok(root)
    }
}

/// Returns the category of a path such as `com.acme.Pay/consumers`.
fn dubbo_category(path: &str) -> Option<&str> {
    let (interface, category) = path.split_once('/')?;
    // An interface is a Java name: no other format has a directory with such a name and one of these
    // children.
    (interface.contains('.') && !category.contains('/')).then_some(category)
}

fn all() -> Vec<Pattern> {
    vec![Pattern("*".into())]
}

fn ten_seconds() -> Duration {
    Duration::from_secs(10)
}

fn max_nodes() -> usize {
    200_000
}

fn max_depth() -> usize {
    16
}

fn path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let path = String::deserialize(deserializer)?;
    check_path(&path).map_err(de::Error::custom)?;
    Ok(path)
}

fn roots<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<RootConfig>, D::Error> {
    let roots = Vec::<RootConfig>::deserialize(deserializer)?;
    let paths: BTreeSet<&str> = roots.iter().map(|root| root.path.as_str()).collect();
    if roots.is_empty() {
        return Err(de::Error::custom("one root at least: `[{path: /services}]`"));
    }
    if paths.len() < roots.len() {
        return Err(de::Error::custom("two roots have the same path"));
    }
    Ok(roots)
}

#[cfg(test)]
mod tests {
    use expect_test::expect;
    use vmesh_model::load::strict;

    use super::*;

    fn read(text: &str) -> String {
        match strict::<ZookeeperConfig>("control.yaml", text) {
            Ok(config) => format!("{} {config:?}\n", config.name()),
            Err(problems) => problems.iter().map(|problem| format!("{problem}\n")).collect(),
        }
    }

    #[test]
    fn a_zookeeper_is_its_servers_and_what_is_below_which_root() {
        expect![[r#"
            zookeeper:zk1:2181 ZookeeperConfig { name: None, required: true, connect: ConnectString { servers: ["zk1:2181"], chroot: "" }, auth: None, sasl: None, tls: None, session_timeout: 10s, read_only: true, watch: Auto, roots: [RootConfig { path: "/services", format: Auto, endpoint: None, group_by: Application, prefer: Port, recurse: true, services: [Pattern("*")], exclude: [], map: FieldPaths { zone: [], version: [], protocol: [], weight: [] }, max_nodes: 200000, max_depth: 16 }], resolve_interval: 30s, guard: GuardConfig { removal_hold: None, confirm_empty: 30s, confirm_shrink: 60s, confirmations: 2, shrink_ratio: 0.5, shrink_min: 5, confirm_unhealthy: 30s, fleet: FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: 60s }, max_stale: None, allow_empty: [] } }
        "#]].assert_eq(&read("connect: zk1\nroots: [{path: /services}]\n"));
        expect![[r#"
            old ZookeeperConfig { name: Some("old"), required: false, connect: ConnectString { servers: ["zk1:2181", "zk2:2182"], chroot: "/prod" }, auth: Some(Auth { digest_file: "/etc/zk.digest" }), sasl: Some(Sasl { mechanism: DigestMd5, credentials_file: "/etc/zk.sasl" }), tls: Some(Tls { ca_file: "/etc/ca.pem", cert_file: Some("/etc/c.pem"), key_file: Some("/etc/k.pem") }), session_timeout: 30s, read_only: false, watch: OneShot, roots: [RootConfig { path: "/discovery", format: ServerSet, endpoint: Some("http"), group_by: Application, prefer: Port, recurse: true, services: [Pattern("*")], exclude: [], map: FieldPaths { zone: [], version: [], protocol: [], weight: [] }, max_nodes: 200000, max_depth: 16 }, RootConfig { path: "/dubbo", format: Dubbo, endpoint: None, group_by: Interface, prefer: Port, recurse: true, services: [Pattern("com.acme.*")], exclude: [Pattern("*Test")], map: FieldPaths { zone: [], version: [], protocol: [], weight: [] }, max_nodes: 200000, max_depth: 16 }, RootConfig { path: "/services", format: Curator, endpoint: None, group_by: Application, prefer: SslPort, recurse: false, services: [Pattern("*")], exclude: [], map: FieldPaths { zone: ["metadata.dc"], version: [], protocol: [], weight: [] }, max_nodes: 200000, max_depth: 16 }], resolve_interval: 60s, guard: GuardConfig { removal_hold: Some(20s), confirm_empty: 30s, confirm_shrink: 60s, confirmations: 2, shrink_ratio: 0.5, shrink_min: 5, confirm_unhealthy: 30s, fleet: FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: 60s }, max_stale: None, allow_empty: [] } }
        "#]].assert_eq(&read(
            "name: old\nrequired: false\nconnect: zk1:2181,zk2:2182/prod\nauth: {digest_file: /etc/zk.digest}\n\
             sasl: {mechanism: digest-md5, credentials_file: /etc/zk.sasl}\n\
             tls: {ca_file: /etc/ca.pem, cert_file: /etc/c.pem, key_file: /etc/k.pem}\n\
             session_timeout: 30s\nread_only: false\nwatch: one-shot\nresolve_interval: 1m\nguard: {removal_hold: 20s}\n\
             roots:\n  - {path: /discovery, format: serverset, endpoint: http}\n\
             \x20 - {path: /dubbo, format: dubbo, group_by: interface, services: ['com.acme.*'], exclude: ['*Test']}\n\
             \x20 - {path: /services, format: curator, prefer: ssl_port, recurse: false, map: {zone: [metadata.dc]}}\n",
        ));
    }

    #[test]
    fn what_is_wrong_with_it_is_said_at_its_place() {
        expect![[r#"
            control.yaml:1:10: `connect`: `zk1:99999` is not a server, `host:2181`: its port is none, from 1 to 65535
            control.yaml:2:8: unknown field `digest`, did you mean `digest_file`?
            control.yaml:3:19: `mechanism`: GSSAPI (Kerberos) needs a C library that is not built in: use `digest-md5`, or a client certificate (`tls`)
            control.yaml:4:18: `session_timeout`: 10ms is too short: 1s at least
            control.yaml:5:8: `watch`: expected one of `auto`, `persistent` or `one-shot`, found `sometimes`
            control.yaml:7:12: `path`: `services` is not the path of a node: it does not begin with `/`
            control.yaml:7:30: `format`: expected one of `auto`, `serverset`, `curator`, `nerve`, `dubbo` or `hostport`, found `finagle`
            control.yaml:8:6: unknown field `pat`, did you mean `path`?
        "#]].assert_eq(&read(
            "connect: zk1:99999\nauth: {digest: /etc/zk.digest}\nsasl: {mechanism: gssapi, credentials_file: /x}\n\
             session_timeout: 10ms\nwatch: sometimes\nroots:\n  - {path: services, format: finagle}\n  - {pat: /a}\n",
        ));
        expect![[r#"
            control.yaml:2:8: `roots`: one root at least: `[{path: /services}]`
        "#]]
        .assert_eq(&read("connect: zk1\nroots: []\n"));
        expect![[r#"
            control.yaml:2:8: `roots`: two roots have the same path
        "#]]
        .assert_eq(&read("connect: zk1\nroots: [{path: /a}, {path: /a, format: nerve}]\n"));
        expect![[r#"
            control.yaml:1:1: `connect` is missing
        "#]]
        .assert_eq(&read("roots: [{path: /a}]\n"));
    }
}
