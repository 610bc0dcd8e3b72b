//! Checks over UDP whether a DNS server answers. The content of the answer does not matter.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::net::UdpSocket;

const ID: [u8; 2] = *b"vm";
/// The QR flag of the header (RFC 1035 section 4.1.1), set in responses.
const RESPONSE: u8 = 0x80;

/// Queries `server` for the A record of `name`, and returns once any response to it has arrived. Waits without a timeout.
pub async fn check_server(server: SocketAddr, name: &str) -> io::Result<()> {
    let local: IpAddr =
        if server.is_ipv4() { Ipv4Addr::UNSPECIFIED.into() } else { Ipv6Addr::UNSPECIFIED.into() };
    let socket = UdpSocket::bind(SocketAddr::new(local, 0)).await?;
    socket.connect(server).await?;
    socket.send(&build_query(name)).await?;
    let mut answer = [0; 512];
    loop {
        let len = socket.recv(&mut answer).await?;
        if len >= 12 && answer.starts_with(&ID) && answer.get(2).is_some_and(|flags| flags & RESPONSE != 0) {
            return Ok(());
        }
    }
}

/// Builds a query with one question and recursion desired (RFC 1035 section 4.1).
fn build_query(name: &str) -> Vec<u8> {
    let mut question = [&ID[..], &[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]].concat();
    for label in name.split('.').filter(|label| !label.is_empty()) {
        question.push(u8::try_from(label.len()).unwrap_or_default());
        question.extend(label.as_bytes());
    }
    question.extend([0, 0, 1, 0, 1]);
    question
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test]
    async fn a_server_that_says_anything_answers_and_an_echo_or_a_closed_port_does_not() {
        let server = UdpSocket::bind("127.0.0.1:0").await.unwrap();
        let address = server.local_addr().unwrap();
        let refuse = async {
            let mut query = [0; 512];
            let (len, from) = server.recv_from(&mut query).await.unwrap();
            // The query itself comes back first, which does not count as a response.
            server.send_to(&query[..len], from).await.unwrap();
            query[2] |= RESPONSE;
            query[3] = 5;
            server.send_to(&query[..len], from).await.unwrap();
        };
        let (answered, ()) = tokio::join!(check_server(address, "mesh"), refuse);
        answered.unwrap();
        drop(server);
        let closed = timeout(Duration::from_secs(10), check_server(address, "mesh")).await;
        assert!(closed.is_ok_and(|answered| answered.is_err()));
    }
}
