//! The signal that ends a daemon.

use std::future::Future;
use std::io;

use tokio::signal::unix::{SignalKind, signal};

/// Which of the two it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT: someone at a terminal.
    Interrupt,
    /// SIGTERM: the service manager.
    Terminate,
}

impl std::fmt::Display for Signal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Signal::Interrupt => "SIGINT",
            Signal::Terminate => "SIGTERM",
        })
    }
}

/// Waits for SIGTERM or SIGINT. The handlers are in place when this returns, so a signal that comes during start-up
/// is answered by an ordered stop too.
pub fn terminated() -> io::Result<impl Future<Output = Signal> + Send> {
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    Ok(async move {
        tokio::select! {
            _ = interrupt.recv() => Signal::Interrupt,
            _ = terminate.recv() => Signal::Terminate,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_signal_that_comes_before_it_is_waited_for_is_not_lost() {
        let terminated = terminated().unwrap();
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM).unwrap();
        assert_eq!(terminated.await, Signal::Terminate);
    }
}
