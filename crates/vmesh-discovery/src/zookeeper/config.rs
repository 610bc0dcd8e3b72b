//! The `zookeeper:` of `discovery:`.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use serde::Deserialize;
use serde::de::{self, Deserializer};
use vmesh_zookeeper::config::{Auth, Connect, Sasl, Tls, Watch, check_path};
use vmesh_zookeeper::{Config, Root};

use crate::config::{half_a_minute, name, seconds, yes};
use crate::consul::config::Pattern;
use crate::format::znode::{GroupBy, Mapping, Prefer, Rules, ZnodeFormat};
use crate::guard::GuardConfig;

/// Some subtrees of an ensemble, all read in one session.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ZookeeperConfig {
    /// What it is called in messages and commands. Built in: `zookeeper:`, the first server and the chroot.
    #[serde(default, deserialize_with = "name")]
    pub name: Option<Arc<str>>,
    /// Whether nothing is served before it has answered, however long that takes. Without, 30 s are enough.
    #[serde(default = "yes")]
    pub required: bool,
    /// `zk1:2181,zk2:2181,zk3:2181/chroot`.
    pub connect: Connect,
    #[serde(default)]
    pub auth: Option<Auth>,
    #[serde(default)]
    pub sasl: Option<Sasl>,
    #[serde(default)]
    pub tls: Option<Tls>,
    /// Two fifths of it without an answer are a lost connection. Built in: 10 s; 1 s at least.
    #[serde(default = "ten_seconds", deserialize_with = "seconds")]
    pub session_timeout: Duration,
    /// Whether a server that has lost its quorum will do, where nothing is known yet. Built in: yes.
    #[serde(default = "yes")]
    pub read_only: bool,
    #[serde(default)]
    pub watch: Watch,
    /// What services are below which path.
    #[serde(deserialize_with = "roots")]
    pub roots: Vec<RootConfig>,
    /// How often host names are resolved again. Built in: 30 s; 1 s at least.
    #[serde(default = "half_a_minute", deserialize_with = "seconds")]
    pub resolve_interval: Duration,
    #[serde(default)]
    pub guard: GuardConfig,
}

/// A subtree with services in it. A service is named by its path below the root, with `.` for `/`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RootConfig {
    /// Below the chroot, if there is one.
    #[serde(deserialize_with = "path")]
    pub path: String,
    /// How its nodes are written. Built in: told by what is there, once.
    #[serde(default)]
    pub format: ZnodeFormat,
    /// Which of several endpoints of an instance: a name in serversets, a protocol in Dubbo. Built in: the main one.
    #[serde(default)]
    pub endpoint: Option<String>,
    /// What is a service in Dubbo 2: an application, or an interface.
    #[serde(default)]
    pub group_by: GroupBy,
    /// Which of Curator's two ports, where an instance has both.
    #[serde(default)]
    pub prefer: Prefer,
    /// Whether services may be nested. Built in: yes; without, a service is right below the root.
    #[serde(default = "yes")]
    pub recurse: bool,
    /// Services by their names; `*` stands for any text. Built in: all.
    #[serde(default = "all")]
    pub services: Vec<Pattern>,
    #[serde(default)]
    pub exclude: Vec<Pattern>,
    /// Where in a record something is said, by dotted paths: `labels.az`.
    #[serde(default)]
    pub map: Mapping,
    /// A root with more nodes is taken for the wrong one. Built in: 200,000.
    #[serde(default = "max_nodes")]
    pub max_nodes: usize,
    /// How many levels below the root are looked at. Built in: 16.
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

    /// What the client needs of it.
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
    pub(crate) fn rules(&self) -> Rules {
        Rules {
            endpoint: self.endpoint.clone(),
            group_by: self.group_by,
            prefer: self.prefer,
            map: self.map.clone(),
        }
    }

    /// Whether a service of this name is wanted.
    pub(crate) fn wants(&self, name: &str) -> bool {
        self.services.iter().any(|pattern| pattern.matches(name))
            && !self.exclude.iter().any(|pattern| pattern.matches(name))
    }

    /// What is to be mirrored. Dubbo's consumers are many, and say nothing of who can be called.
    pub(crate) fn root(&self) -> Result<Root, String> {
        let may_be_dubbo = matches!(self.format, ZnodeFormat::Auto | ZnodeFormat::Dubbo);
        let mut root = Root::new(self.path.as_str())?.keeping(move |path| {
            !may_be_dubbo || !matches!(dubbo_category(path), Some("consumers" | "routers" | "configurators"))
        });
        (root.max_nodes, root.max_depth) = (self.max_nodes, self.max_depth);
        Ok(root)
    }
}

/// `com.acme.Pay/consumers`, and nothing else, is one.
fn dubbo_category(path: &str) -> Option<&str> {
    let (interface, category) = path.split_once('/')?;
    // An interface is a name of Java: no other format has a directory of these names below such a one.
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
