//! The names of services, answered on this host: virtual addresses while connections to them are captured, and the addresses of
//! endpoints while they are not (bypassed, Envoy gone) and the endpoints have the port that clients dial.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use tokio::net::{TcpListener, UdpSocket};
use tokio::sync::watch;
use tracing::warn;
use vmesh_daemon::{Stop, Tasks};
use vmesh_dns::server::{self, Counts, Limits};
use vmesh_dns::{Addresses, Table, Zone};

use crate::capture;
use crate::destinations::{Destination, Destinations};

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
    let first = table(&zone, &destinations.borrow(), captures(&capture));
    let (tables, served) = watch::channel(Arc::new(first));
    let asked = served.clone();
    tasks.spawn("names", keep(zone, destinations, capture, tables));
    tasks.spawn_draining("dns", |mut stop: Stop| async move {
        server::serve(udp, tcp, asked, Limits::default(), counts, stop.requested()).await;
    });
    Ok(served)
}

fn captures(capture: &watch::Receiver<capture::Status>) -> bool {
    capture.borrow().captures
}

async fn keep(
    zone: Zone,
    mut destinations: watch::Receiver<Arc<Destinations>>,
    mut capture: watch::Receiver<capture::Status>,
    tables: watch::Sender<Arc<Table>>,
) {
    loop {
        let now =
            table(&zone, &destinations.borrow_and_update().clone(), capture.borrow_and_update().captures);
        tables.send_if_modified(|table| {
            let differs = **table != now;
            if differs {
                *table = Arc::new(now);
            }
            differs
        });
        tokio::select! {
            changed = destinations.changed() => if changed.is_err() { return std::future::pending().await },
            changed = capture.changed() => if changed.is_err() { return std::future::pending().await },
        }
    }
}

/// The names of all services, with what each means now.
pub fn table(zone: &Zone, destinations: &Destinations, captures: bool) -> Table {
    let names =
        destinations.iter().map(|(service, destination)| (&**service, addresses(destination, captures)));
    let (table, problems) = Table::new(zone.clone(), names);
    for problem in problems {
        warn!("{problem}");
    }
    table
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
}
