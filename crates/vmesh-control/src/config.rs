//! `control.yaml`. [`Config::load`] is the only constructor: a configuration that it returns can be started.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;
use vmesh_daemon::{connections, descriptors, fsx, http};
use vmesh_discovery::SourceConfig;
use vmesh_identity::TrustDomain;
use vmesh_model::text::Time;
use vmesh_model::{Place, Problem, load};

use crate::documents::DocumentsConfig;
use crate::identity::IdentitySettings;
use crate::known_nodes::NodeLimits;
use crate::persist;

/// The configuration of `vmesh-control`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Config {
    /// The SPIFFE trust domain of the mesh.
    #[serde(default = "trust_domain")]
    pub(crate) trust_domain: TrustDomain,
    /// The discovery sources. If two list the same endpoint, the first one's entry is used.
    pub(crate) discovery: Vec<SourceConfig>,
    /// The location of the mesh documents. `None`: there are none.
    pub(crate) documents: Option<DocumentsConfig>,
    #[serde(default)]
    pub(crate) listen: Listen,
    /// The directory of the last good state.
    #[serde(default = "state_dir")]
    pub(crate) state_dir: PathBuf,
    /// `error`, `warn`, `info`, `debug` or `trace`. `$VMESH_LOG` takes precedence.
    pub(crate) log: Option<String>,
    #[serde(default)]
    pub(crate) limits: Limits,
    /// The certificates that this control plane issues.
    #[serde(default)]
    pub(crate) identity: IdentitySettings,
}

/// The limits for clients.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(crate) struct Limits {
    /// Concurrent xDS connections. Lowered if the process may not open that many files.
    pub(crate) connections: usize,
    /// Concurrent xDS connections from one address. Default: three quarters of all if xDS is served on
    /// loopback, else 1,024.
    pub(crate) connections_per_address: Option<usize>,
    /// The age at which an xDS connection is closed and its client reconnects, so that nodes spread over
    /// replicas that were added later.
    pub(crate) connection_age: Time,
    /// Node names, connected and offline together.
    pub(crate) nodes: usize,
    /// The time after which an offline node is forgotten.
    pub(crate) forget_offline_after: Time,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            connections: 20_000,
            connections_per_address: None,
            connection_age: Time(Duration::from_secs(3600)),
            nodes: 20_000,
            forget_offline_after: Time(Duration::from_secs(7 * 24 * 3600)),
        }
    }
}

/// The limit, in bytes, of the memory for reports of offline nodes. Their state files need about as much disk space.
const OFFLINE_BYTES: usize = 64 << 20;

impl Limits {
    /// Returns the connection limits for a process that may open `files` files.
    pub(crate) fn xds(&self, listen: SocketAddr, files: usize) -> connections::Limits {
        let apis = 2 * http::LIMITS.total;
        let total = self.connections.min(descriptors::for_connections(files).saturating_sub(apis)).max(1);
        let most_of_all = (total - total / 4).max(1);
        let per_origin = match (self.connections_per_address, listen.ip().is_loopback()) {
            (Some(most), _) => most,
            // All clients run on this host or connect through a proxy.
            (None, true) => most_of_all,
            (None, false) => most_of_all.min(1024),
        };
        connections::Limits {
            total,
            per_origin: per_origin.min(total),
            pending: PENDING.min(total / 2).max(1),
        }
    }

    pub(crate) fn nodes(&self, xds: connections::Limits) -> NodeLimits {
        NodeLimits {
            names: self.nodes,
            // One connection can carry several nodes, so limiting connections would not limit names.
            names_per_origin: xds.per_origin,
            offline_bytes: OFFLINE_BYTES,
            forget_offline_after: self.forget_offline_after.0,
        }
    }
}

/// The limit of clients that have connected but are not admitted yet. Further ones wait in the kernel's
/// queue.
const PENDING: usize = 1024;

#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Listen {
    /// The address for mTLS, from agents and proxies. The control plane closes connections to it until the certificate authority exists.
    pub(crate) xds: Option<SocketAddr>,
    #[serde(default = "xds_plaintext")]
    pub(crate) xds_plaintext: SocketAddr,
    #[serde(default = "api")]
    pub(crate) api: SocketAddr,
    /// The path of the Unix socket of the API. Only here can clients change anything; file permissions decide
    /// who may connect. Default: `api.sock` in `state_dir`.
    pub(crate) api_socket: Option<PathBuf>,
    /// Permits other addresses than loopback for `xds_plaintext` and `api`.
    #[serde(default)]
    pub(crate) insecure: bool,
}

fn trust_domain() -> TrustDomain {
    TrustDomain::default()
}

fn state_dir() -> PathBuf {
    PathBuf::from("/var/lib/vmesh-control")
}

fn xds_plaintext() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15010))
}

fn api() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 15014))
}

impl Listen {
    /// Returns the plaintext listeners that other hosts reach.
    pub(crate) fn insecure_addresses(&self) -> Vec<SocketAddr> {
        [self.xds_plaintext, self.api].into_iter().filter(|address| !address.ip().is_loopback()).collect()
    }
}

impl Default for Listen {
    fn default() -> Self {
        Listen { xds: None, xds_plaintext: xds_plaintext(), api: api(), api_socket: None, insecure: false }
    }
}

/// The problems of `control.yaml`: every problem, not only the first.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ConfigError {
    #[error("the configuration {path} could not be read")]
    Unreadable {
        path: PathBuf,
        #[source]
        cause: fsx::FileError,
    },
    #[error("{}", lines(.0))]
    Wrong(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

impl Config {
    pub(crate) fn load(path: &Path) -> Result<Config, ConfigError> {
        let bytes = fsx::read_capped(path, 1 << 20)
            .map_err(|cause| ConfigError::Unreadable { path: path.to_owned(), cause })?;
        Config::parse(&path.display().to_string(), &bytes)
    }

    fn parse(file: &str, bytes: &[u8]) -> Result<Config, ConfigError> {
        let mut config: Config = load::strict_bytes(file, bytes).map_err(ConfigError::Wrong)?;
        let mut problems = Vec::new();
        let mut wrong =
            |message: String| problems.push(Problem::new(Place::file(file), "vmesh-control", message));
        for (field, address) in [("xds_plaintext", config.listen.xds_plaintext), ("api", config.listen.api)] {
            if !address.ip().is_loopback() && !config.listen.insecure {
                wrong(format!(
                    "`listen.{field}: {address}` would be reachable from other hosts without encryption or \
                     authentication: use a loopback address, or spell it out with `listen.insecure: true`"
                ));
            }
        }
        for (field, number) in [
            ("connections", Some(config.limits.connections)),
            ("connections_per_address", config.limits.connections_per_address),
            ("nodes", Some(config.limits.nodes)),
        ] {
            if number == Some(0) {
                wrong(format!("`limits.{field}: 0` would let nobody in: leave it out for the default"));
            }
        }
        config.identity.problems().into_iter().for_each(&mut wrong);
        if config.discovery.is_empty() {
            wrong("`discovery` names no source: without one there are no services".to_owned());
        }
        for (at, source) in config.discovery.iter().enumerate() {
            let (name, part) = (source.name(), persist::source_part(&source.name()));
            let earlier = config.discovery.iter().take(at).map(SourceConfig::name);
            if let Some(other) = earlier.into_iter().find(|other| persist::source_part(other) == part) {
                wrong(match other == name {
                    true => format!(
                        "two sources of discovery are called `{name}`: give one of them a `name` of its own"
                    ),
                    false => format!(
                        "two sources of discovery are called `{other}` and `{name}`, whose state would be kept in \
                         one file: give one of them another `name`"
                    ),
                });
            }
        }
        if let Some(Err(why)) =
            config.documents.as_mut().map(|documents| documents.complete(&config.discovery))
        {
            wrong(why);
        }
        if problems.is_empty() { Ok(config) } else { Err(ConfigError::Wrong(problems)) }
    }

    pub(crate) fn api_socket(&self) -> PathBuf {
        self.listen.api_socket.clone().unwrap_or_else(|| self.state_dir.join("api.sock"))
    }

    /// Returns what the control plane would do with this configuration, for `--check`.
    pub(crate) fn summary(&self) -> String {
        let mut text = format!("trust domain   {}\n", self.trust_domain);
        for source in &self.discovery {
            text.push_str(&format!("discovery      {}\n", source.name()));
        }
        match &self.documents {
            Some(documents) => text.push_str(&format!("documents      {documents}\n")),
            None => text.push_str("documents      none\n"),
        }
        if let Some(xds) = self.listen.xds {
            text.push_str(&format!("xDS            {xds} (mTLS)\n"));
        }
        text.push_str(&format!(
            "xDS            {} (plaintext)\nAPI            http://{} and {}\nstate          {}\n",
            self.listen.xds_plaintext,
            self.listen.api,
            self.api_socket().display(),
            self.state_dir.display()
        ));
        text
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};

    use super::*;

    fn check(text: &str, expected: Expect) {
        let shown = match Config::parse("control.yaml", text.as_bytes()) {
            Ok(config) => config.summary(),
            Err(error) => format!("{error}\n"),
        };
        expected.assert_eq(&shown);
    }

    #[test]
    fn the_design_s_example_is_understood_but_for_the_registries_that_are_not_there_yet() {
        check(
            "trust_domain: example.internal\n\
             discovery:\n  - file: {path: /etc/vmesh/services.d}\n\
             documents:\n  dir: /etc/vmesh/mesh.d\n\
             listen:\n  xds: \"0.0.0.0:15012\"\n  xds_plaintext: \"127.0.0.1:15010\"\n  api: \"127.0.0.1:15014\"\n\
             state_dir: /var/lib/vmesh-control\n",
            expect![[r#"
                trust domain   example.internal
                discovery      file:/etc/vmesh/services.d
                documents      /etc/vmesh/mesh.d
                xDS            0.0.0.0:15012 (mTLS)
                xDS            127.0.0.1:15010 (plaintext)
                API            http://127.0.0.1:15014 and /var/lib/vmesh-control/api.sock
                state          /var/lib/vmesh-control
            "#]],
        );
    }

    #[test]
    fn plaintext_for_other_hosts_has_to_be_spelled_out() {
        check(
            "discovery: [{file: {path: services.d}}]\nlisten: {xds_plaintext: \"0.0.0.0:15010\"}\n",
            expect![[r#"
                control.yaml: `listen.xds_plaintext: 0.0.0.0:15010` would be reachable from other hosts without encryption or authentication: use a loopback address, or spell it out with `listen.insecure: true`
            "#]],
        );
    }

    #[test]
    fn plaintext_that_other_hosts_reach_is_told() {
        let insecure = |listen: &str| {
            let text = format!("discovery: [{{file: {{path: services.d}}}}]\nlisten: {listen}\n");
            Config::parse("control.yaml", text.as_bytes()).unwrap().listen.insecure_addresses()
        };
        assert_eq!(insecure("{}"), []);
        let shown = insecure("{xds_plaintext: \"0.0.0.0:15010\", insecure: true}");
        assert_eq!(shown, ["0.0.0.0:15010".parse().unwrap()]);
    }

    #[test]
    fn two_sources_of_one_name_would_be_taken_for_each_other() {
        check(
            "discovery: [{file: {path: a}}, {file: {path: b, name: \"file:a\"}}, {file: {path: c/d}}, {file: {path: c_d}}]\n",
            expect![[r#"
                control.yaml: two sources of discovery are called `file:a`: give one of them a `name` of its own
                control.yaml: two sources of discovery are called `file:c/d` and `file:c_d`, whose state would be kept in one file: give one of them another `name`
            "#]],
        );
        check(
            "discovery: [{file: {path: a, name: one}}, {file: {path: a, name: two, required: false}}]\n",
            expect![[r#"
                trust domain   mesh.internal
                discovery      one
                discovery      two
                documents      none
                xDS            127.0.0.1:15010 (plaintext)
                API            http://127.0.0.1:15014 and /var/lib/vmesh-control/api.sock
                state          /var/lib/vmesh-control
            "#]],
        );
        check(
            "discovery: [{file: {path: a, name: \"my files\"}}]\n",
            expect![[r#"
            control.yaml:1:36: `name`: `my files` is not a valid name of a source: 1 to 100 letters, digits, `.`, `_`, `:`, `-` or `/`
        "#]],
        );
    }

    #[test]
    fn connections_are_bounded_by_files_by_address_and_by_what_is_configured() {
        let (loopback, all) = ("127.0.0.1:15010".parse().unwrap(), "0.0.0.0:15010".parse().unwrap());
        let shown = |limits: &Limits, listen, files| {
            let connections::Limits { total, per_origin, pending } = limits.xds(listen, files);
            (total, per_origin, pending)
        };
        let limits = Limits::default();
        assert_eq!(shown(&limits, loopback, 1 << 20), (20_000, 15_000, 1024));
        assert_eq!(shown(&limits, all, 1 << 20), (20_000, 1024, 1024));
        assert_eq!(shown(&limits, all, 1024), (640, 480, 320));
        assert_eq!(shown(&limits, all, 10), (1, 1, 1));
        let limits = Limits { connections: 100, connections_per_address: Some(7), ..Limits::default() };
        assert_eq!(shown(&limits, loopback, 1 << 20), (100, 7, 50));
        check(
            "discovery: [{file: {path: services.d}}]\nlimits: {connections: 0}\n",
            expect![[r#"
                control.yaml: `limits.connections: 0` would let nobody in: leave it out for the default
            "#]],
        );
    }

    #[test]
    fn an_unknown_field_is_named_with_its_place() {
        check(
            "discovery: [{file: {path: services.d}}]\nstate_dri: /tmp\n",
            expect![[r#"
            control.yaml:2:1: unknown field `state_dri`, did you mean `state_dir`?
        "#]],
        );
        check(
            "discovery: [{consul: {address: x}}]\n",
            expect![[r#"
                control.yaml:1:32: `address`: `x` is not an address of Consul: it has no scheme; write `http://host:8500`, `https://host:8501` or `unix:/path/of/socket`
            "#]],
        );
    }
}
