//! The names of services, answered on this host: virtual addresses while connections to them are captured, and the addresses of
//! endpoints while they are not (bypassed, Envoy gone) and the endpoints have the port that clients dial.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tokio::time::sleep;
use tracing::warn;
use vmesh_daemon::{Stop, Tasks};
use vmesh_dns::server::{self, Counts, Limits};
use vmesh_dns::table::Problem;
use vmesh_dns::{Addresses, Table, Zone};

use crate::capture;
use crate::destinations::{Destination, Destinations};

/// Services come in bursts.
const SETTLES: Duration = Duration::from_millis(50);

#[derive(Debug, thiserror::Error)]
#[error("could not listen on {address} for DNS (`listen.dns`)")]
pub struct DnsError {
    address: SocketAddr,
    #[source]
    cause: io::Error,
}

/// Binds the sockets and starts the tasks; what became of queries is counted in `counts`.
pub async fn spawn(
    tasks: &mut Tasks,
    address: SocketAddr,
    zone: Zone,
    destinations: watch::Receiver<Arc<Destinations>>,
    capture: watch::Receiver<capture::Status>,
    counts: Arc<Counts>,
) -> Result<watch::Receiver<Arc<Table>>, DnsError> {
    let bind = async { Ok((UdpSocket::bind(address).await?, TcpListener::bind(address).await?)) };
    let (udp, tcp) = bind.await.map_err(|cause| DnsError { address, cause })?;
    let mut names = Names { zone, of: Destinations::default(), captures: false, problems: Vec::new() };
    let first = names.table(&destinations.borrow(), captures(&capture));
    let (tables, served) = watch::channel(Arc::new(first));
    let asked = served.clone();
    tasks.spawn("names", keep(names, destinations, capture, tables));
    tasks.spawn_draining("dns", |mut stop: Stop| async move {
        server::serve(udp, tcp, asked, Limits::default(), counts, stop.requested()).await;
    });
    Ok(served)
}

fn captures(capture: &watch::Receiver<capture::Status>) -> bool {
    capture.borrow().captures
}

async fn keep(
    mut names: Names,
    mut destinations: watch::Receiver<Arc<Destinations>>,
    mut capture: watch::Receiver<capture::Status>,
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
        let captures = capture.borrow_and_update().captures;
        if names.differ(&now, captures) {
            tables.send_replace(Arc::new(names.table(&now, captures)));
        }
    }
}

/// What the names were made of last.
struct Names {
    zone: Zone,
    of: Destinations,
    captures: bool,
    problems: Vec<Problem>,
}

impl Names {
    /// Whether a name means something else. While virtual addresses are answered, endpoints that come and go change none.
    fn differ(&self, now: &Destinations, captures: bool) -> bool {
        let (old, new) = (&self.of.services, &now.services);
        captures != self.captures
            || old.size() != new.size()
            || old.iter().zip(new).any(|((old_name, old), (new_name, new))| {
                old_name != new_name
                    || (!Arc::ptr_eq(old, new) && addresses(old, captures) != addresses(new, captures))
            })
    }

    /// The table of `now`. A problem is told when it is new.
    fn table(&mut self, now: &Destinations, captures: bool) -> Table {
        let (table, problems) = table(&self.zone, now, captures);
        for problem in problems.iter().filter(|problem| !self.problems.contains(problem)) {
            warn!("{problem}");
        }
        (self.of, self.captures, self.problems) = (now.clone(), captures, problems);
        table
    }
}

/// The names of all services, with what each means now; and what has no name.
pub fn table(zone: &Zone, destinations: &Destinations, captures: bool) -> (Table, Vec<Problem>) {
    let names = destinations.services.iter();
    let names = names.map(|(service, destination)| (&**service, addresses(destination, captures)));
    Table::new(zone.clone(), names)
}

fn addresses(destination: &Destination, captures: bool) -> Addresses {
    let has_virtual = !destination.virtual_addresses.is_empty();
    match (captures && has_virtual, destination.direct.is_empty()) {
        // A virtual address that leads nowhere says what is wrong sooner than a name that does not exist.
        (true, _) | (false, true) => destination.virtual_addresses.iter().map(SocketAddr::ip).collect(),
        (false, false) => destination.direct.iter().copied().collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
        let mut names = Names {
            zone: Zone::default(),
            of: Destinations::default(),
            captures: false,
            problems: Vec::new(),
        };
        let now = of(&[("Orders", 1), ("orders", 1)]);
        assert!(names.differ(&now, true));
        names.table(&now, true);
        assert_eq!(names.problems.len(), 1);
        assert!(!names.differ(&now, true));
        // An endpoint more is no other virtual address, and is another real one.
        assert!(!names.differ(&of(&[("Orders", 1), ("orders", 2)]), true));
        assert!(names.differ(&now, false));
        names.table(&now, false);
        assert!(names.differ(&of(&[("Orders", 1), ("orders", 2)]), false));
        assert!(names.differ(&of(&[("Orders", 1)]), false));
        assert!(names.differ(&of(&[("Orders", 1), ("payments", 1)]), false));
    }
}
