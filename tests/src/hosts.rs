//! A mesh of booted hosts, with packages installed as an operator would install them.
//!
//! ```text
//! mesh  vmesh-control          fd88::1, 10.88.0.1
//! NAME  vmesh-agent and Envoy  as the test configures them: see Vms::node
//! ```

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;

use serde_json::Value;
use vmesh_testkit::app::HttpApp;
use vmesh_testkit::hosts::{Fleet, Host, Suite};
use vmesh_testkit::place::{TempDir, tempdir};
use vmesh_testkit::process::binary;
use vmesh_testkit::{Failed, Result, envoy, wait_for};

use crate::BOUND;

/// The units of a node that must be active.
pub const UNITS: [&str; 3] = ["vmesh-agent.service", "vmesh-envoy.service", "vmesh-net.service"];

/// The package files of the built programs.
pub struct Packages {
    pub agent: PathBuf,
    pub control: PathBuf,
    _dir: TempDir,
}

impl Packages {
    pub fn make(version: &str) -> Result<Packages> {
        let dir = tempdir()?;
        let built = binary("vmesh-agent")?;
        for other in ["vmesh-net", "vmesh-control", "vmeshctl"] {
            binary(other)?;
        }
        let mut command = Command::new(binary("xtask")?);
        command.args(["package", "--compression", "gzip", "--version", version, "--out"]).arg(&*dir);
        command.arg("--binaries").arg(built.parent().unwrap_or(&built));
        let output = command.output().map_err(Failed::to("could not run xtask"))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            return Err(Failed::new(format!("`xtask package` failed: {said}")));
        }
        let named = |name: &str| {
            let files = std::fs::read_dir(&*dir).into_iter().flatten().flatten().map(|entry| entry.path());
            let prefix = format!("{name}_{version}_");
            let is_it = |path: &PathBuf| {
                path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(&prefix))
            };
            { files }.find(is_it).ok_or_else(|| Failed::new(format!("`xtask package` made no {name}")))
        };
        Ok(Packages { agent: named("vmesh-agent")?, control: named("vmesh-control")?, _dir: dir })
    }
}

/// A fleet with a control plane on its first host.
pub struct BootedMesh {
    pub fleet: Fleet,
    pub control: Host,
    pub packages: Packages,
}

impl BootedMesh {
    /// Starts a control plane that is ready and knows no service. [`BootedMesh::service`] adds services.
    pub async fn new() -> Result<BootedMesh> {
        BootedMesh::of(Suite::Bookworm).await
    }

    pub async fn of(suite: Suite) -> Result<BootedMesh> {
        let packages = Packages::make("0.1.0")?;
        let envoy = envoy::find()?;
        let fleet = Fleet::of(suite, &[("/usr/bin/envoy", &envoy)])?;
        let control = fleet.host("mesh")?;
        control.install(&[&packages.control])?;
        let config = format!(
            "discovery: [{{file: {{path: /etc/vmesh/services.d}}}}]\ndocuments: {{dir: /etc/vmesh/mesh.d}}\n\
             listen: {{xds_plaintext: \"{}:15010\", api: \"127.0.0.1:15014\", insecure: true, \
             api_socket: /run/vmesh-control/api.sock}}\n",
            control.v4()
        );
        control.write("/etc/vmesh/control.yaml", config)?;
        control.sh("mkdir -p /etc/vmesh/services.d /etc/vmesh/mesh.d")?;
        control.systemctl(&["start", "vmesh-control"])?;
        Ok(BootedMesh { fleet, control, packages })
    }

    /// Starts a control plane, and `orders` on a host outside the mesh. Returns the address of `orders`, too.
    pub async fn with_orders() -> Result<(BootedMesh, HttpApp, SocketAddr)> {
        let vms = BootedMesh::new().await?;
        let server = vms.fleet.switch().host()?;
        let orders = server.within(|| HttpApp::start("orders-1", "v1", (server.v4, 8080)))??;
        let to = orders.address();
        vms.service("orders", "http", &[to])?;
        Ok((vms, orders, to))
    }

    /// Writes the endpoints of a service for the control plane.
    pub fn service(&self, name: &str, protocol: &str, endpoints: &[SocketAddr]) -> Result<()> {
        let endpoints: Vec<String> = endpoints.iter().map(|endpoint| format!("\"{endpoint}\"")).collect();
        let text = format!("service: {name}\nprotocol: {protocol}\nendpoints: [{}]\n", endpoints.join(", "));
        self.control.write(&format!("/etc/vmesh/services.d/{name}.yaml"), text)
    }

    /// Writes a document of the mesh.
    pub fn document(&self, file: &str, yaml: &str) -> Result<()> {
        self.control.write(&format!("/etc/vmesh/mesh.d/{file}"), yaml)
    }

    /// Returns the part of `agent.yaml` that names the control plane and the node, followed by `more`.
    pub fn agent_yaml(&self, host: &Host, more: &str) -> String {
        format!(
            "control_plane: [{{address: \"http://{}:15010\", insecure: true}}]\nenvoy: {{concurrency: 1, drain: 1s}}\n\
             node: {{name: {}, address: {}}}\n{more}",
            self.control.v4(),
            host.name(),
            host.v4()
        )
    }

    /// Boots, installs and configures a node with `more`, and waits until its units are active.
    pub async fn node(&self, name: &str, more: &str) -> Result<BootedNode> {
        let host = self.fleet.host(name)?;
        host.write("/etc/vmesh/agent.yaml", self.agent_yaml(&host, more))?;
        host.install(&[&self.packages.agent])?;
        let vm = BootedNode { host };
        vm.wait_up()?;
        Ok(vm)
    }
}

/// A node of the mesh.
pub struct BootedNode {
    pub host: Host,
}

impl BootedNode {
    /// Waits until the agent, Envoy and vmesh-net are active.
    pub fn wait_up(&self) -> Result<()> {
        UNITS.iter().try_for_each(|unit| self.host.wait_unit(unit, "active", 2 * BOUND))
    }

    /// Returns the main processes of the units by their process ids on the host.
    pub fn main_pids(&self) -> Result<BTreeMap<&'static str, Option<u32>>> {
        UNITS.iter().map(|unit| Ok((*unit, self.host.main_pid(unit)?))).collect()
    }

    /// Kills the main process of a unit, and waits until another one runs.
    pub fn kill(&self, unit: &str) -> Result<()> {
        let old = self.host.main_pid(unit)?;
        self.host.systemctl(&["kill", "--kill-who=main", "-s", "KILL", unit])?;
        self.host.wait_main_pid(unit, BOUND, |now| now.is_some() && now != old)?;
        self.host.wait_unit(unit, "active", BOUND)
    }

    /// Returns the process of the serving Envoy by its id on the host; `None` while the supervisor reports
    /// none.
    pub fn envoy(&self) -> Result<Option<u64>> {
        let words = ["curl", "-sS", "--unix-socket", "/run/vmesh-envoy/status.sock", "http://envoy/status"];
        let said = self.host.exec(&words)?;
        let status: Value =
            serde_json::from_str(&said).map_err(Failed::to(format!("the supervisor said `{said}`")))?;
        Ok(status.get("pid").and_then(Value::as_u64))
    }

    /// Returns the number of Envoy processes.
    pub fn envoys(&self) -> Result<usize> {
        let said = self.host.output(&["pgrep", "-c", "-x", "envoy"])?;
        Ok(String::from_utf8_lossy(&said.stdout).trim().parse().unwrap_or_default())
    }

    /// Returns the output of all firewall tools, without counters and times.
    pub fn ruleset(&self) -> Result<String> {
        ruleset(&self.host)
    }

    /// Reports whether a request of this host's application to a real address went through Envoy.
    pub fn goes_through_envoy(&self, to: SocketAddr) -> Result<bool> {
        let said = self.host.exec(&["curl", "-sS", "--max-time", "10", &format!("http://{to}/")])?;
        Ok(said.contains("x-forwarded-proto"))
    }

    /// Waits until such requests go through Envoy and the trial is confirmed.
    pub async fn captured(&self, to: SocketAddr) -> Result<()> {
        wait_for("connections to be captured", 2 * BOUND, async || match self.goes_through_envoy(to) {
            Ok(true) => match self.host.sh("vmeshctl capture --json || :") {
                Ok(said) if said.contains("\"state\": \"confirmed\"") => Ok(()),
                Ok(said) => {
                    let journals =
                        ["vmesh-net", "vmesh-agent"].map(|unit| self.host.journal(unit).unwrap_or_default());
                    Err(format!("{said}\n{}", journals.join("\n")))
                }
                Err(failed) => Err(failed.to_string()),
            },
            Ok(false) => {
                let journal = self.host.journal("vmesh-net").unwrap_or_default();
                Err(format!("they go past Envoy; {journal}"))
            }
            Err(failed) => Err(failed.to_string()),
        })
        .await
    }

    /// Waits until an Envoy other than `than` serves.
    pub async fn wait_other_envoy(&self, than: Option<u64>) -> Result<Option<u64>> {
        wait_for(format!("another Envoy than {than:?}"), 2 * BOUND, async || match self.envoy() {
            Ok(now) if now.is_some() && now != than => Ok(now),
            Ok(now) => Err(format!("{now:?}")),
            Err(failed) => Err(failed.to_string()),
        })
        .await
    }
}

/// Returns the output of all firewall tools on a host, without counters and times.
pub fn ruleset(host: &Host) -> Result<String> {
    host.sh(
        "for show in 'nft list ruleset' iptables-nft-save ip6tables-nft-save; do echo \"# $show\"; $show; done | \
         sed -E '/^# (Generated|Completed|Warning)/d; s/ ?(packets|bytes) [0-9]+//g; s/\\[[0-9]+:[0-9]+\\]//g; \
         s/ expires [0-9a-z]+//g'",
    )
}

/// Lists everything that an installation could leave behind: files with owner, mode and content; users;
/// rules; network sysctls; units.
pub fn trace(host: &Host) -> Result<BTreeMap<String, String>> {
    // Backups of the user database and caches of the dynamic linker and of dpkg belong to other tools.
    let pruned = [
        "/run/systemd",
        "/run/udev",
        "/run/credentials",
        "/run/dbus",
        "/run/user",
        "/run/log",
        "/run/host",
        "/var/lib/dpkg",
        "/var/lib/systemd",
        "/var/lib/apt",
        "/etc/*-",
        "/etc/ld.so.cache",
        "/etc/.pwd.lock",
        // Every iptables creates this file, and none may remove it.
        "/run/xtables.lock",
    ];
    let pruned = pruned.map(|path| format!("-path '{path}'")).join(" -o ");
    let files = host.sh(&format!(
        "find /etc /usr /opt /srv /home /root /var/lib /run -xdev \\( {pruned} \\) -prune \
         -o -type f -printf 'f %p %U:%G %m %s\\n' -o -type l -printf 'l %p %l\\n' -o -printf '%y %p %U:%G %m\\n'\n\
         find /etc /root /var/lib -xdev \\( {pruned} \\) -prune -o -type f -print0 | xargs -0 sha256sum -b | \
         sed -E 's/^([0-9a-f]+) .(.*)$/h \\2 \\1/'"
    ))?;
    let mut all = BTreeMap::new();
    for line in files.lines() {
        let mut words = line.splitn(3, ' ');
        if let (Some(kind), Some(path)) = (words.next(), words.next()) {
            all.insert(format!("{kind} {path}"), words.next().unwrap_or_default().to_owned());
        }
    }
    let mut add = |what: &str, lines: String| {
        for line in lines.lines() {
            all.insert(format!("{what} {line}"), String::new());
        }
    };
    add("user", host.sh("getent passwd; getent group")?);
    add("unit", host.sh("systemctl list-unit-files --no-pager --no-legend")?);
    // These values are random or counters.
    let counted = "fastopen_key|nf_conntrack_count|nf_conntrack_max|buckets|stat_refresh|flow_limit|inuse";
    add("sysctl", host.sh(&format!("sysctl -a 2>/dev/null | grep '^net[.]' | grep -vE '{counted}'"))?);
    all.insert("rules".to_owned(), ruleset(host)?);
    Ok(all)
}

/// Returns the lines that only one of the two lists has.
pub fn difference(before: &BTreeMap<String, String>, after: &BTreeMap<String, String>) -> Vec<String> {
    let names: std::collections::BTreeSet<&String> = before.keys().chain(after.keys()).collect();
    let mut lines = Vec::new();
    for name in names {
        let (old, new) = (before.get(name), after.get(name));
        if old != new {
            lines.push(format!("{name}:\n- {}\n+ {}", old.map_or("", |o| o), new.map_or("", |n| n)));
        }
    }
    lines
}
