//! Probes whether a host still works after a change of capture. A probe that succeeded before the change must succeed after it; one that
//! failed before does not count.
//!
//! | probe | what it checks |
//! |---|---|
//! | `control plane` | a new connection to one of the control planes |
//! | `dns` | a UDP query to the agent's DNS server, for its own zone |
//! | `resolver` | a query to the host's first name server for `localhost.`; any answer counts |
//!
//! `vmesh-net` itself checks that Envoy serves its ports, that a connection to a virtual address reaches Envoy, and that SSH sessions
//! survive. No claim of another process replaces these checks.

use std::collections::BTreeMap;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use tokio::net::{TcpStream, lookup_host};
use tokio::task::JoinSet;
use tokio::time::timeout;
use vmesh_dns::probe;

use crate::config::Config;

const WITHIN: Duration = Duration::from_secs(2);
/// Repeated, since datagrams get lost.
const TRIES: usize = 2;

/// The result of each probe, by the name of the probe.
pub type ProbeResults = BTreeMap<&'static str, Result<(), String>>;

/// Runs all probes.
pub async fn run_all(config: &Config) -> ProbeResults {
    let (control_plane, dns, resolver) = tokio::join!(control_plane(config), dns(config), resolver());
    let mut found = ProbeResults::from([("control plane", control_plane)]);
    found.extend(dns.map(|dns| ("dns", dns)));
    found.extend(resolver.map(|resolver| ("resolver", resolver)));
    found
}

/// Returns the probes that fail now and did not before, such as `control plane: ...; dns: ...`.
pub fn newly_failing(before: &ProbeResults, now: &ProbeResults) -> Option<String> {
    let lost = now.iter().filter_map(|(probe, found)| {
        let why = found.as_ref().err()?;
        let worked = before.get(probe).is_none_or(Result::is_ok);
        worked.then(|| format!("{probe}: {why}"))
    });
    let lost: Vec<_> = lost.collect();
    (!lost.is_empty()).then(|| lost.join("; "))
}

async fn control_plane(config: &Config) -> Result<(), String> {
    // Dialed in parallel: while the task waits here, it sends no heartbeat to vmesh-net.
    let mut dialed = JoinSet::new();
    for control_plane in &config.control_planes {
        let address = control_plane.address.to_string();
        dialed.spawn(async move {
            let connected = within(TcpStream::connect(&address)).await;
            connected.map(drop).map_err(|why| format!("{address}: {why}"))
        });
    }
    let mut wrong = Vec::new();
    while let Some(done) = dialed.join_next().await {
        match done {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(why)) => wrong.push(why),
            Err(died) => wrong.push(died.to_string()),
        }
    }
    wrong.sort();
    Err(format!("no connection to any control plane: {}", wrong.join("; ")))
}

async fn dns(config: &Config) -> Option<Result<(), String>> {
    let server = config.dns?;
    Some(check_answer(server, config.zone_of_names.suffix.as_str()).await)
}

async fn resolver() -> Option<Result<(), String>> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let server = first_server(&text)?;
    Some(check_answer(SocketAddr::new(server, 53), "localhost").await)
}

/// Returns the first `nameserver` of a resolv.conf(5).
fn first_server(text: &str) -> Option<IpAddr> {
    text.lines().find_map(|line| line.trim().strip_prefix("nameserver")?.trim().parse().ok())
}

/// Checks whether a server answers a query for `name`, with any result.
async fn check_answer(server: SocketAddr, name: &str) -> Result<(), String> {
    let mut last = String::new();
    for _ in 0..TRIES {
        match within(probe::check_server(server, name)).await {
            Ok(()) => return Ok(()),
            Err(why) => last = why,
        }
    }
    Err(format!("{server} does not answer: {last}"))
}

async fn within<T>(work: impl Future<Output = std::io::Result<T>>) -> Result<T, String> {
    match timeout(WITHIN, work).await {
        Ok(Ok(done)) => Ok(done),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("nothing within {} s", WITHIN.as_secs())),
    }
}

/// Resolves the addresses of the control planes, which are never captured.
pub async fn control_plane_addresses(config: &Config) -> std::collections::BTreeSet<SocketAddr> {
    let names = config.control_planes.iter().map(|control_plane| control_plane.address.to_string());
    let lookup = async |name: String| within(lookup_host(name)).await.map(Vec::from_iter).unwrap_or_default();
    let found: JoinSet<Vec<SocketAddr>> = names.map(lookup).collect();
    found.join_all().await.into_iter().flatten().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_worked_before_can_get_worse() {
        let ill = || Err("refused".to_owned());
        let before = ProbeResults::from([("control plane", ill()), ("dns", Ok(()))]);
        assert_eq!(newly_failing(&before, &before), None);
        assert_eq!(newly_failing(&before, &[("dns", ill())].into()).unwrap(), "dns: refused");
        assert_eq!(
            newly_failing(&ProbeResults::new(), &[("resolver", ill())].into()).unwrap(),
            "resolver: refused"
        );
    }

    #[test]
    fn the_first_name_server_is_found() {
        assert_eq!(
            first_server("# nameserver 1.1.1.1\nsearch a\n nameserver\t10.0.0.2\nnameserver 10.0.0.3"),
            "10.0.0.2".parse().ok()
        );
        assert_eq!(first_server("options edns0"), None);
    }
}
