//! The capture spec: which connections operators and the control plane want to go through Envoy.
//!
//! [`vmesh_model::load::strict`] parses it, and names the place of each mistake. A spec that is valid but
//! partly impossible on this host gives a [`Note`](crate::Note) of the [`Program`](crate::Program) for each
//! such part.

mod bypass_filter;
mod values;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

pub use bypass_filter::BypassFilter;
use serde::{Deserialize, Serialize};
pub use values::{Account, Interface, Percent, Ports, Seconds, Unit};
pub use vmesh_model::Cidr;

use crate::program::ports_without;
use crate::units::MAX_UNITS;

/// The port on which Envoy accepts captured outbound connections.
pub const OUTBOUND_PORT: u16 = 15001;
/// The port on which Envoy accepts captured inbound connections.
pub const INBOUND_PORT: u16 = 15006;

/// The virtual addresses that test a capture from end to end, one for each address family. No service ever
/// gets them. Envoy closes connections to them like all connections to a virtual address without a service.
/// Their port is not 15001, since Envoy treats a connection to that port as one to itself.
pub const SELF_TESTS: [SocketAddr; 2] = [
    SocketAddr::new(IpAddr::V4(Ipv4Addr::new(240, 0, 0, 0)), 1),
    SocketAddr::new(IpAddr::V6(Ipv6Addr::new(0xfd76, 0x6d65, 0x7368, 0, 0, 0, 0, 0)), 1),
];

/// The connections that go through Envoy. The default captures nothing.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Spec {
    pub outbound: Outbound,
    pub inbound: Inbound,
    pub dead_man: DeadMan,
}

impl Spec {
    /// Reports whether the spec captures nothing and refuses nothing.
    pub fn is_off(&self) -> bool {
        self.outbound.capture == OutboundCapture::Off
            && self.inbound.capture == InboundCapture::Off
            && self.inbound.strict.is_empty()
    }
}

/// The limit of names of users and groups in one spec. Each name costs a run of `getent`.
pub const MAX_NAMES: usize = 256;

/// The error for a spec with more names or units than are looked up.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecTooLarge {
    #[error(
        "it names {0} users and groups, and vmesh looks up at most {MAX_NAMES}: name a group in their place, or write numbers, \
         which need no lookup"
    )]
    Names(usize),
    #[error(
        "it names {0} units, and vmesh watches at most {MAX_UNITS}: put them into a slice, and name the slice"
    )]
    Units(usize),
}

impl Spec {
    /// Checks that the spec has no more names and units than this host looks up.
    ///
    /// # Errors
    /// If the spec has too many names or units.
    pub fn limits(&self) -> Result<(), SpecTooLarge> {
        let out = &self.outbound;
        let selections = [&out.include, &out.exclude];
        let users = selections.iter().flat_map(|of| &of.users).chain(out.dial.users.keys());
        let groups = selections.iter().flat_map(|of| &of.groups).chain(out.dial.groups.keys());
        let named = |account: &&Account| account.number().is_none();
        let (users, groups): (BTreeSet<_>, BTreeSet<_>) =
            (users.filter(named).collect(), groups.filter(named).collect());
        let units: BTreeSet<_> =
            selections.iter().flat_map(|of| &of.units).chain(out.dial.units.keys()).collect();
        let names = users.len() + groups.len();
        if names > MAX_NAMES {
            return Err(SpecTooLarge::Names(names));
        }
        if units.len() > MAX_UNITS {
            return Err(SpecTooLarge::Units(units.len()));
        }
        Ok(())
    }
}

/// The capture of connections that programs of this host open.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Outbound {
    pub capture: OutboundCapture,
    /// The virtual addresses, which exist in Envoy only. Such an address is captured for every caller that is
    /// not excluded, regardless of `percent`, `on_loss` and the destinations in `include` and `exclude`,
    /// because an uncaptured connection to it has nowhere to go.
    pub vips: BTreeSet<SocketAddr>,
    /// The real addresses of endpoints, for programs that discover them on their own.
    pub addresses: BTreeMap<SocketAddr, Destination>,
    /// The share of new connections to real addresses that is captured.
    pub percent: Percent,
    pub on_loss: OnLoss,
    /// The traffic that may be captured; everything if empty. A caller must match one of `users`, `groups`
    /// and `units`. A destination must match all of `ports`, `cidrs` and `interfaces` that are given.
    pub include: Selection,
    /// The traffic that is never captured.
    pub exclude: Selection,
    /// The largest share of a caller's connections that is captured. The smaller of this and the
    /// destination's share applies.
    pub dial: CallerShares,
}

/// The destinations that are captured. Each variant includes its predecessors.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutboundCapture {
    #[default]
    Off,
    /// Only virtual addresses. Existing traffic does not change.
    Vip,
    /// The virtual addresses, and the listed endpoints.
    Addresses,
    /// All destinations.
    All,
}

/// The settings of one real address that differ from those of the spec.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Destination {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub percent: Option<Percent>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on_loss: Option<OnLoss>,
}

/// The fate of new connections when the dead-man timer lapses because Envoy or the agent is dead or hangs.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OnLoss {
    /// Connections go past Envoy (fail open).
    #[default]
    Open,
    /// Connections fail (fail closed).
    Closed,
}

/// A selection of traffic by its destination and its caller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Selection {
    pub ports: BTreeSet<Ports>,
    pub cidrs: BTreeSet<Cidr>,
    /// The interfaces over which packets leave (outbound) or arrive (inbound). Wildcards are not supported.
    pub interfaces: BTreeSet<Interface>,
    /// The users, by name or number.
    pub users: BTreeSet<Account>,
    /// The groups, by name or number. Only the effective group of a process counts, since the kernel does not
    /// match supplementary ones.
    pub groups: BTreeSet<Account>,
    pub units: BTreeSet<Unit>,
}

impl Selection {
    pub(crate) fn names_callers(&self) -> bool {
        !(self.users.is_empty() && self.groups.is_empty() && self.units.is_empty())
    }
}

/// The shares of captured connections, by caller.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CallerShares {
    pub users: BTreeMap<Account, Percent>,
    pub groups: BTreeMap<Account, Percent>,
    pub units: BTreeMap<Unit, Percent>,
}

/// The capture of connections that programs of this host accept.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Inbound {
    pub capture: InboundCapture,
    /// The captured ports.
    pub ports: BTreeSet<Ports>,
    /// The ports that other hosts can reach only through Envoy. Those that are not in `ports` are refused to
    /// all other hosts; their clients connect to an explicit port of Envoy instead.
    pub strict: BTreeSet<Ports>,
    pub on_loss: OnLoss,
    /// The captured ports that a redirect may open although the host's own filter (firewalld, ufw) keeps them
    /// closed. Other such ports are not captured.
    #[serde(skip_serializing_if = "BypassFilter::is_nothing")]
    pub bypass_filter: BypassFilter,
    /// Clients that are neither captured nor refused, such as a load balancer whose health checks do not use
    /// TLS.
    pub exclude: ClientSelection,
}

impl Inbound {
    /// Removes `ports` from the captured ports.
    pub fn remove_ports(&mut self, ports: Ports) {
        self.ports = ports_without(&self.ports, &[ports].into());
    }

    /// Returns the captured ports that a redirect must neither open nor close against the host's own filter.
    pub fn ports_under_the_filter(&self) -> BTreeSet<Ports> {
        match (self.capture, &self.bypass_filter) {
            (InboundCapture::Off | InboundCapture::Tproxy, _)
            | (InboundCapture::Redirect, BypassFilter::All) => BTreeSet::new(),
            (InboundCapture::Redirect, BypassFilter::Ports(ports)) => ports_without(&self.ports, ports),
        }
    }
}

/// A selection of clients by their network and their interface.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClientSelection {
    pub cidrs: BTreeSet<Cidr>,
    pub interfaces: BTreeSet<Interface>,
}

/// The way in which inbound connections are captured.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum InboundCapture {
    #[default]
    Off,
    /// Redirects the packets to port 15006, which works everywhere. Envoy sees the client's address, and asks
    /// the kernel for the original port. A firewall on this host sees packets to 15006, so it must allow that
    /// port if it refuses unknown ones.
    Redirect,
    /// Assigns the packets to Envoy's socket (TPROXY). Envoy sees the client's address and the original port.
    /// Envoy's listener must be `transparent`, for which Envoy needs CAP_NET_ADMIN. With nftables,
    /// connections go past an Envoy that does not listen.
    Tproxy,
}

/// The dead-man timer: redirects with [`OnLoss::Open`] hold only while the agent keeps renewing a timeout in
/// the kernel. The timeout expires even if no process is alive.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DeadMan {
    /// The timeout, from 3 s to 10 min. The heartbeat renews it after a fifth of this time.
    pub timeout: Seconds,
}

impl Default for DeadMan {
    fn default() -> Self {
        DeadMan { timeout: Seconds::DEFAULT_TIMEOUT }
    }
}

#[cfg(test)]
mod tests {
    use expect_test::{Expect, expect};
    use vmesh_model::load::strict;

    use super::*;

    fn wrong(yaml: &str, expected: Expect) {
        let problems = strict::<Spec>("capture.yaml", yaml).unwrap_err();
        expected.assert_eq(&problems.iter().map(|problem| format!("{problem}\n")).collect::<String>());
    }

    #[test]
    fn a_spec_is_read_and_written_alike() {
        let spec: Spec = strict(
            "capture.yaml",
            "outbound:\n  capture: addresses\n  vips: ['240.240.0.10:80', '[fdfe::10]:80']\n  \
             addresses: {'10.0.1.11:8080': {percent: 5, on_loss: closed}, '[fd00::1]:443': {}}\n  percent: 50\n  \
             include: {ports: [8080, 9000-9100], cidrs: [10.0.0.0/8, 10.9.9.9], units: [batch.slice]}\n  \
             exclude: {users: [backup, 1001], interfaces: [docker0]}\n  dial: {units: {app.service: 1}}\n\
             inbound: {capture: tproxy, ports: [8080], strict: [3306], on_loss: closed}\ndead_man: {timeout: 1m}\n",
        )
        .unwrap();
        assert_eq!(spec.dead_man.timeout.get(), 60);
        assert_eq!(spec.outbound.exclude.users.first().unwrap().number(), Some(1001));
        let json = serde_json::to_string(&spec).unwrap();
        assert_eq!(strict::<Spec>("capture.json", &json).unwrap(), spec, "{json}");
        assert_eq!(strict::<Spec>("empty.yaml", "{}").unwrap(), Spec::default());
    }

    #[test]
    fn what_is_wrong_is_named_with_its_place() {
        wrong(
            "outbound: {capture: everything, percent: 101, includes: {}}\n",
            expect![[r#"
                capture.yaml:1:21: `capture`: expected one of `off`, `vip`, `addresses` or `all`, found `everything`
                capture.yaml:1:42: `percent`: 101 is not a percentage from 0 to 100
                capture.yaml:1:47: unknown field `includes`, did you mean `include`?
            "#]],
        );
        wrong(
            "outbound:\n  include: {ports: [0, 70000, 90-80], cidrs: [10.1.2.3/8, nonsense, 10.0.0.0/33]}\n",
            expect![[r#"
                capture.yaml:2:21: `ports`: `0` is not a port or a range of ports, such as 8080 or 8000-8100
                capture.yaml:2:24: `ports`: `70000` is not a port or a range of ports, such as 8080 or 8000-8100
                capture.yaml:2:31: `ports`: `90-80` is not a port or a range of ports, such as 8080 or 8000-8100
                capture.yaml:2:47: `cidrs`: `10.1.2.3/8` has bits beyond its length: did you mean 10.0.0.0/8, or 10.1.2.3?
                capture.yaml:2:59: `cidrs`: `nonsense` is not an address or a network, such as 10.1.2.3, 10.0.0.0/8 or fd00::/8
                capture.yaml:2:69: `cidrs`: `10.0.0.0/33` is not an address or a network, such as 10.1.2.3, 10.0.0.0/8 or fd00::/8
            "#]],
        );
        wrong(
            "outbound: {exclude: {interfaces: ['eth*'], users: ['a b'], units: [app]}}\n",
            expect![[r#"
            capture.yaml:1:35: `interfaces`: `eth*` is not the name of an interface: write the whole name, as `ip link` shows it
            capture.yaml:1:52: `users`: `a b` is not the name or number of a user or group
            capture.yaml:1:68: `units`: `app` is not a unit with processes: write the whole name, such as app.service or batch.slice
        "#]],
        );
        wrong(
            "dead_man: {timeout: 1s}\ninbound: {ports: [-1]}\n",
            expect![[r#"
            capture.yaml:1:21: `timeout`: 1s is not a duration from 3s to 10m in whole seconds
            capture.yaml:2:19: `ports`: `-1` is not a port or a range of ports, such as 8080 or 8000-8100
        "#]],
        );
        wrong(
            "outbound: {vips: ['orders.mesh:80']}\n",
            expect![[r#"
            capture.yaml:1:19: `vips`: `orders.mesh:80` is not an IP address and a port, such as 127.0.0.1:8080
        "#]],
        );
    }

    #[test]
    fn the_ports_that_bypass_the_filter_are_all_or_none_or_a_list() {
        let check = |written: &str, under_the_filter: &[&str]| {
            let yaml = format!(
                "inbound: {{capture: redirect, ports: [8081, 9000-9020], bypass_filter: {written}}}\n"
            );
            let spec = strict::<Spec>("capture.yaml", &yaml).unwrap();
            let ports: Vec<String> =
                spec.inbound.ports_under_the_filter().iter().map(ToString::to_string).collect();
            assert_eq!(ports, under_the_filter, "{written}");
            let again: Spec = serde_json::from_str(&serde_json::to_string(&spec).unwrap()).unwrap();
            assert_eq!(again, spec, "{written}");
        };
        check("true", &[]);
        check("false", &["8081", "9000-9020"]);
        check("[]", &["8081", "9000-9020"]);
        check("[8081, 9000-9010]", &["9011-9020"]);
        wrong(
            "inbound: {bypass_filter: yes please}\n",
            expect![[r#"
                capture.yaml:1:26: `bypass_filter`: expected `true`, `false` or a list of ports and ranges of ports, found the text `yes please`
            "#]],
        );
        wrong(
            "inbound: {bypass_filter: [0]}\n",
            expect![[r#"
            capture.yaml:1:27: `bypass_filter`: `0` is not a port or a range of ports, such as 8080 or 8000-8100
        "#]],
        );
    }
}
