//! Answers DNS queries for the names of services. A name resolves to the service's virtual addresses while connections to them are
//! captured. Otherwise (after a bypass, or without Envoy) it resolves to the endpoints' addresses, if the endpoints use the service's port.

use std::io;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;
use vmesh_daemon::{Stop, Tasks, systemd};
use vmesh_dns::server::{self, Counts, Limits};
use vmesh_dns::table::Problem;
use vmesh_dns::{Addresses, Table, Zone};

use crate::capture;
use crate::destinations::{Destination, Destinations};
use crate::listen::{self, ListenStatus};

/// Delay that combines a burst of changes of services into one table.
const SETTLES: Duration = Duration::from_millis(50);

/// The names under which systemd stores the sockets while the agent restarts.
const STORED_UDP: &str = "dns-udp";
const STORED_TCP: &str = "dns-tcp";

/// Starts the tasks. `counts` receives the number of queries by outcome. `inherited` are the sockets that systemd stored while the agent
/// restarted; those of `address` are used again, so that no query is lost. If another program uses the address, binding is retried: see
/// [`listen::keep_trying`].
pub fn spawn(
    tasks: &mut Tasks,
    address: SocketAddr,
    inherited: Vec<(String, OwnedFd)>,
    zone: Zone,
    destinations: watch::Receiver<Arc<Destinations>>,
    capture: watch::Receiver<capture::CaptureStatus>,
    counts: Arc<Counts>,
) -> (watch::Receiver<Arc<Table>>, watch::Receiver<ListenStatus>) {
    let mut names =
        NameTables { zone, destinations: Destinations::default(), captures: false, problems: Vec::new() };
    let first = names.table(&destinations.borrow(), is_virtual(&capture.borrow()));
    let (tables, served) = watch::channel(Arc::new(first));
    let asked = served.clone();
    tasks.spawn("names", maintain_tables(names, destinations, capture, tables));
    let kept = take_inherited(inherited, address);
    let (listening, is_listening) = watch::channel(ListenStatus::at(address));
    tasks.spawn_draining("dns", |mut stop: Stop| async move {
        let bind = || async move {
            let udp = UdpSocket::bind(address).await?;
            let tcp = TcpListener::bind(address).await?;
            systemd::keep_socket(STORED_UDP, &udp);
            systemd::keep_socket(STORED_TCP, &tcp);
            Ok((udp, tcp))
        };
        let sockets = match kept {
            Some(sockets) => {
                listening.send_modify(ListenStatus::set_bound);
                Some(sockets)
            }
            None => listen::keep_trying("names (`listen.dns`)", bind, &listening, &mut stop).await,
        };
        let Some((udp, tcp)) = sockets else { return };
        server::serve(udp, tcp, asked, Limits::default(), counts, stop.requested()).await;
    });
    (served, is_listening)
}

/// Returns the two sockets of `address` among those that systemd stored. Sockets of another address, from an earlier configuration, are
/// removed from systemd's store, which closes them.
fn take_inherited(
    inherited: Vec<(String, OwnedFd)>,
    address: SocketAddr,
) -> Option<(UdpSocket, TcpListener)> {
    let names: Vec<String> = inherited.iter().map(|(name, _)| name.clone()).collect();
    let (mut udp, mut tcp) = (None, None);
    for (name, socket) in inherited {
        match &*name {
            STORED_UDP => udp = Some(std::net::UdpSocket::from(socket)),
            STORED_TCP => tcp = Some(std::net::TcpListener::from(socket)),
            _ => {}
        }
    }
    let (Some(udp), Some(tcp)) = (udp, tcp) else {
        forget_named(names.iter().map(String::as_str));
        return None;
    };
    let is_at = |local: io::Result<SocketAddr>| local.is_ok_and(|local| local == address);
    let usable = is_at(udp.local_addr()) && is_at(tcp.local_addr());
    let ready = usable.then(|| {
        udp.set_nonblocking(true)?;
        tcp.set_nonblocking(true)?;
        io::Result::Ok((UdpSocket::from_std(udp)?, TcpListener::from_std(tcp)?))
    });
    match ready {
        Some(Ok(sockets)) => Some(sockets),
        _ => {
            forget_named([STORED_UDP, STORED_TCP].into_iter());
            None
        }
    }
}

/// Removes the stored DNS sockets from systemd's store. Called when the configuration has no DNS server: systemd would keep them open.
pub(crate) fn forget_inherited(inherited: &[(String, OwnedFd)]) {
    forget_named(inherited.iter().map(|(name, _)| name.as_str()));
}

fn forget_named<'a>(kept: impl Iterator<Item = &'a str>) {
    kept.filter(|name| [STORED_UDP, STORED_TCP].contains(name)).for_each(systemd::forget_socket);
}

/// Reports whether names resolve to virtual addresses. Until vmesh-net has answered, a host that is configured to capture is assumed to do
/// so, as before the agent's restart: resolvers would cache a real address for a while, and that would bypass Envoy.
pub(crate) fn is_virtual(capture: &capture::CaptureStatus) -> bool {
    let is_unknown = capture.net.is_none() && capture.reason.is_none();
    capture.captures || (capture.wanted && is_unknown)
}

async fn maintain_tables(
    mut names: NameTables,
    mut destinations: watch::Receiver<Arc<Destinations>>,
    mut capture: watch::Receiver<capture::CaptureStatus>,
    tables: watch::Sender<Arc<Table>>,
) {
    loop {
        tokio::select! {
            changed = destinations.changed() => {
                if changed.is_err() {
                    return std::future::pending().await;
                }
                sleep(SETTLES).await;
            }
            changed = capture.changed() => if changed.is_err() { return std::future::pending().await },
        }
        let now = destinations.borrow_and_update().clone();
        let captures = is_virtual(&capture.borrow_and_update());
        if names.differ(&now, captures) {
            tables.send_replace(Arc::new(names.table(&now, captures)));
        }
    }
}

/// The input of the table that was built last.
struct NameTables {
    zone: Zone,
    destinations: Destinations,
    captures: bool,
    problems: Vec<Problem>,
}

impl NameTables {
    /// Reports whether a name would resolve differently. While names resolve to virtual addresses, changed endpoints make no difference.
    fn differ(&self, now: &Destinations, captures: bool) -> bool {
        let (old, new) = (&self.destinations.services, &now.services);
        captures != self.captures
            || old.size() != new.size()
            || old.iter().zip(new).any(|((old_name, old), (new_name, new))| {
                old_name != new_name
                    || (!Arc::ptr_eq(old, new) && addresses(old, captures) != addresses(new, captures))
            })
    }

    /// Builds the table for `now`, and logs new problems.
    fn table(&mut self, now: &Destinations, captures: bool) -> Table {
        let (table, problems) = table(&self.zone, now, captures);
        for problem in problems.iter().filter(|problem| !self.problems.contains(problem)) {
            warn!("{problem}");
        }
        (self.destinations, self.captures, self.problems) = (now.clone(), captures, problems);
        table
    }
}

/// Builds the table of the names of all services. Also returns the services that cannot have a name.
pub fn table(zone: &Zone, destinations: &Destinations, captures: bool) -> (Table, Vec<Problem>) {
    let names = destinations.services.iter();
    let names = names.map(|(service, destination)| (&**service, addresses(destination, captures)));
    Table::new(zone.clone(), names)
}

fn addresses(destination: &Destination, captures: bool) -> Addresses {
    let has_virtual = !destination.virtual_addresses.is_empty();
    match (captures && has_virtual, destination.direct.is_empty()) {
        // A virtual address that does not connect shows the cause sooner than a name that does not exist.
        (true, _) | (false, true) => destination.virtual_addresses.iter().map(SocketAddr::ip).collect(),
        (false, false) => destination.direct.iter().copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn sockets_that_were_kept_are_used_at_their_own_address_only_and_lose_no_query() {
        // The loopback address is unique to this test, so its port is free for both protocols.
        let place = vmesh_testkit::Loopback::unique().unwrap();
        let udp = std::net::UdpSocket::bind((place.ip(), 0)).unwrap();
        let address = udp.local_addr().unwrap();
        let tcp = std::net::TcpListener::bind(address).unwrap();
        let kept = || {
            let copies: [(&str, OwnedFd); 3] = [
                ("something else", udp.try_clone().unwrap().into()),
                (STORED_UDP, udp.try_clone().unwrap().into()),
                (STORED_TCP, tcp.try_clone().unwrap().into()),
            ];
            copies.map(|(name, socket)| (name.to_owned(), socket)).into()
        };
        // The query arrives while no agent runs.
        let client = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        client.send_to(b"a query", address).await.unwrap();
        assert!(take_inherited(kept(), "127.0.0.1:1".parse().unwrap()).is_none());
        assert!(take_inherited(Vec::new(), address).is_none());
        let (udp, tcp) = take_inherited(kept(), address).unwrap();
        let mut query = [0; 64];
        let received = tokio::time::timeout(Duration::from_secs(10), udp.recv_from(&mut query)).await;
        assert_eq!(received.unwrap().unwrap().0, 7);
        assert_eq!(tcp.local_addr().unwrap(), address);
    }

    #[test]
    fn names_stay_virtual_until_it_is_known_that_nothing_is_captured() {
        let unknown = capture::CaptureStatus { wanted: true, ..capture::CaptureStatus::default() };
        assert!(is_virtual(&unknown));
        let gone = capture::CaptureStatus { reason: Some("no answer".into()), ..unknown.clone() };
        assert!(!is_virtual(&gone));
        let bypassed = capture::CaptureStatus { net: Some(Box::default()), ..unknown.clone() };
        assert!(!is_virtual(&bypassed));
        assert!(is_virtual(&capture::CaptureStatus { captures: true, ..bypassed }));
        assert!(!is_virtual(&capture::CaptureStatus { wanted: false, ..unknown }));
    }

    #[test]
    fn a_name_is_virtual_while_it_is_captured_and_real_while_it_is_not() {
        let orders = Destination {
            virtual_addresses: ["240.0.0.1:80".parse().unwrap()].into(),
            direct: ["10.0.1.11".parse().unwrap()].into(),
            ..Destination::default()
        };
        let other_port = Destination { direct: Default::default(), ..orders.clone() };
        let of = |destination: &Destination, captures| {
            let Addresses { v4, v6 } = addresses(destination, captures);
            assert!(v6.is_empty());
            v4.iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(of(&orders, true), ["240.0.0.1"]);
        assert_eq!(of(&orders, false), ["10.0.1.11"]);
        assert_eq!(of(&other_port, false), ["240.0.0.1"]);
        let no_virtual = Destination { virtual_addresses: Default::default(), ..orders };
        assert_eq!(of(&no_virtual, true), ["10.0.1.11"]);
    }

    #[test]
    fn names_are_made_anew_where_one_means_something_else_and_a_problem_is_told_once() {
        let destination = |endpoints: u8| Destination {
            virtual_addresses: ["240.0.0.1:80".parse().unwrap()].into(),
            direct: (0..endpoints).map(|n| std::net::IpAddr::from([10, 0, 0, n])).collect(),
            ..Destination::default()
        };
        let of = |all: &[(&str, u8)]| Destinations {
            services: all.iter().map(|(name, n)| (Arc::from(*name), Arc::new(destination(*n)))).collect(),
            ..Destinations::default()
        };
        let mut names = NameTables {
            zone: Zone::default(),
            destinations: Destinations::default(),
            captures: false,
            problems: Vec::new(),
        };
        let now = of(&[("Orders", 1), ("orders", 1)]);
        assert!(names.differ(&now, true));
        names.table(&now, true);
        assert_eq!(names.problems.len(), 1);
        assert!(!names.differ(&now, true));
        // A new endpoint changes the real addresses, but not the virtual address.
        assert!(!names.differ(&of(&[("Orders", 1), ("orders", 2)]), true));
        assert!(names.differ(&now, false));
        names.table(&now, false);
        assert!(names.differ(&of(&[("Orders", 1), ("orders", 2)]), false));
        assert!(names.differ(&of(&[("Orders", 1)]), false));
        assert!(names.differ(&of(&[("Orders", 1), ("payments", 1)]), false));
    }
}
