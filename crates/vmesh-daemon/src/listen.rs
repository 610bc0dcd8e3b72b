//! TCP listeners.

use std::io;
use std::net::SocketAddr;

use tokio::net::{TcpListener, TcpSocket};

/// Length of the accept queue. A reconnecting fleet overflows the 128 that most libraries ask for; the kernel caps the value at
/// `net.core.somaxconn`, 4,096 by default.
pub const BACKLOG: u32 = 4096;

/// Listens at `address`. Must be called within the runtime that accepts.
pub fn tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_address_that_is_taken_is_an_error() {
        let listener = tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let address = listener.local_addr().unwrap();
        assert_eq!(tcp(address).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        tokio::net::TcpStream::connect(address).await.unwrap();
    }
}
