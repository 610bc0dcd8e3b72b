//! Decides, without privileges, which connections of the host go through Envoy. `vmesh-net` applies the decision.
//!
//! ```text
//! agent.yaml + Destinations --(desired)--> desired state --(net.sock)--> vmesh-net --> the kernel
//! ```
//!
//! The task `capture` sends the desired state to vmesh-net after each change, and a heartbeat every second. While a change is on trial, it
//! probes whether the host still works, and confirms the trial if so: see [`probes`].

mod dry_run;
pub mod probes;
pub mod settings;
mod task;

use std::collections::BTreeSet;
use std::net::SocketAddr;

use vmesh_capture::spec::{Destination, INBOUND_PORT, Ports};
use vmesh_model::node::Upstreams;
use vmesh_net::protocol::CaptureRequest;

use crate::config::Config;
use crate::destinations::Destinations;

pub use dry_run::dry_run;
pub use task::{CaptureStatus, spawn};

/// Returns what this host must capture.
pub fn desired(
    config: &Config,
    destinations: &Destinations,
    control_planes: BTreeSet<SocketAddr>,
) -> CaptureRequest {
    let mut spec = config.capture.spec.clone();
    if config.capture.outbound() {
        for destination in destinations.services.values() {
            spec.outbound.vips.extend(&destination.virtual_addresses);
            let own = Destination { percent: destination.percent, on_loss: destination.on_loss };
            spec.outbound.addresses.extend(destination.captured.iter().map(|address| (*address, own)));
        }
        spec.outbound.exclude.ports.extend(wildcard_ports(config, &destinations.everywhere));
    }
    CaptureRequest {
        spec,
        ports: listening_ports(config),
        control_planes,
        confirm_within: u32::try_from(config.capture.confirm.within.0.as_secs()).unwrap_or(u32::MAX),
    }
}

/// Returns the ports on which Envoy has a wildcard listener. Connections to such a port of another host must not be captured: with
/// `use_original_dst`, Envoy would match them to its wildcard listener.
///
/// `everywhere` contains the ports of upstreams, some of which only the control plane knows.
fn wildcard_ports(config: &Config, everywhere: &BTreeSet<u16>) -> impl Iterator<Item = Ports> {
    let upstreams = match &config.upstreams {
        Upstreams::Declared(upstreams) => upstreams.as_slice(),
        Upstreams::All => &[],
    };
    let workloads = config.workloads.iter().filter_map(|workload| workload.listen);
    let listens = workloads.chain(upstreams.iter().filter_map(|upstream| upstream.listen));
    let declared = listens.filter(|listen| listen.ip().is_unspecified()).map(|listen| listen.port());
    let inbound = config.capture.inbound().then_some(INBOUND_PORT);
    declared.chain(everywhere.iter().copied()).chain(inbound).filter_map(|port| Ports::range(port, port))
}

/// Returns the ports on which the agent and Envoy listen, besides the capture ports.
fn listening_ports(config: &Config) -> BTreeSet<u16> {
    let mut ports: BTreeSet<u16> = [config.api.port()].into();
    ports.extend(config.dns.map(|dns| dns.port()));
    ports.extend(config.workloads.iter().filter_map(|workload| workload.listen).map(|listen| listen.port()));
    if let Upstreams::Declared(upstreams) = &config.upstreams {
        ports.extend(upstreams.iter().filter_map(|upstream| upstream.listen).map(|listen| listen.port()));
    }
    ports
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use expect_test::expect;

    use super::*;
    use crate::destinations;

    fn wanted_by(capture: &str) -> String {
        let text = format!(
            "control_plane: [\"http://127.0.0.1:15010\"]\nupstreams: [\"*\"]\nworkloads: [{{service: web, port: 8080}}]\n{capture}"
        );
        let config = Config::parse("agent.yaml", text.as_bytes(), "web-17").unwrap();
        let orders = destinations::Destination {
            virtual_addresses: ["240.0.0.1:80".parse().unwrap()].into(),
            captured: ["10.0.1.11:8080".parse().unwrap()].into(),
            percent: vmesh_capture::spec::Percent::new(25),
            ..Default::default()
        };
        let all = Destinations {
            services: [(Arc::from("orders"), Arc::new(orders))].into_iter().collect(),
            ..Destinations::default()
        };
        let want = desired(&config, &all, ["10.0.0.5:15010".parse().unwrap()].into());
        serde_json::to_string(&want).unwrap()
    }

    #[test]
    fn what_is_wanted_is_the_configuration_and_what_the_control_plane_adds() {
        expect![[r#"{"spec":{"outbound":{"capture":"addresses","vips":["240.0.0.1:80"],"addresses":{"10.0.1.11:8080":{"percent":25}},"percent":50,"on_loss":"open","include":{"ports":[],"cidrs":[],"interfaces":[],"users":[],"groups":[],"units":[]},"exclude":{"ports":[],"cidrs":[],"interfaces":[],"users":[],"groups":[],"units":[]},"dial":{"users":{},"groups":{},"units":{}}},"inbound":{"capture":"off","ports":[],"strict":[],"on_loss":"open","exclude":{"cidrs":[],"interfaces":[]}},"dead_man":{"timeout":"30s"}},"ports":[15008,15020,15053],"control_planes":["10.0.0.5:15010"],"confirm_within":60}"#]].assert_eq(&wanted_by("capture: {outbound: {capture: addresses, percent: 50}}"));
        expect![[r#"{"spec":{"outbound":{"capture":"off","vips":[],"addresses":{},"percent":100,"on_loss":"open","include":{"ports":[],"cidrs":[],"interfaces":[],"users":[],"groups":[],"units":[]},"exclude":{"ports":[],"cidrs":[],"interfaces":[],"users":[],"groups":[],"units":[]},"dial":{"users":{},"groups":{},"units":{}}},"inbound":{"capture":"tproxy","ports":["8080"],"strict":["8080"],"on_loss":"open","exclude":{"cidrs":[],"interfaces":[]}},"dead_man":{"timeout":"30s"}},"ports":[15020],"control_planes":["10.0.0.5:15010"],"confirm_within":60}"#]].assert_eq(&wanted_by("capture: {inbound: {capture: tproxy, strict: [8080]}}"));
    }

    #[test]
    fn a_port_that_envoy_has_at_every_address_is_not_captured_elsewhere() {
        let text = "control_plane: [\"http://127.0.0.1:15010\"]\nnode: {name: a}\n\
            upstreams: [{service: b, listen: \"0.0.0.0:9001\"}, {service: c, listen: \"127.0.0.1:9002\"}]\n\
            workloads: [{service: web, port: 8080, listen: \"0.0.0.0:15008\"}, {service: api, port: 8081, listen: \"10.0.0.1:15009\"}]\n\
            capture: {outbound: {capture: all}, inbound: transparent}";
        let config = Config::parse("agent.yaml", text.as_bytes(), "").unwrap();
        // The port of an upstream in a `Node` document.
        let destinations = Destinations { everywhere: [9003].into(), ..Destinations::default() };
        let want = desired(&config, &destinations, BTreeSet::new());
        let excluded: Vec<_> = want.spec.outbound.exclude.ports.iter().map(ToString::to_string).collect();
        assert_eq!(excluded, ["9001", "9003", "15006", "15008"]);
    }

    #[test]
    fn nothing_is_wanted_where_nothing_is_to_be_captured() {
        expect![[r#"{"spec":{"outbound":{"capture":"off","vips":[],"addresses":{},"percent":100,"on_loss":"open","include":{"ports":[],"cidrs":[],"interfaces":[],"users":[],"groups":[],"units":[]},"exclude":{"ports":[],"cidrs":[],"interfaces":[],"users":[],"groups":[],"units":[]},"dial":{"users":{},"groups":{},"units":{}}},"inbound":{"capture":"off","ports":[],"strict":[],"on_loss":"open","exclude":{"cidrs":[],"interfaces":[]}},"dead_man":{"timeout":"30s"}},"ports":[15008,15020],"control_planes":["10.0.0.5:15010"],"confirm_within":60}"#]].assert_eq(&wanted_by(""));
    }
}
