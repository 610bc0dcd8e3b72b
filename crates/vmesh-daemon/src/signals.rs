//! Signals: SIGTERM and SIGINT stop a daemon; the others must not kill it.

use std::future::{Future, poll_fn};
use std::io;
use std::task::Poll;

use tokio::signal::unix::{SignalKind, signal};

/// The signal that stops the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Signal {
    /// SIGINT, from a terminal.
    Interrupt,
    /// SIGTERM, from the service manager.
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

/// Waits for SIGTERM or SIGINT. The handlers are installed before this returns, so a signal during the start-up stops the daemon in order
/// too.
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

/// A signal that would kill a process by default, and its name.
pub type NamedSignal = (SignalKind, &'static str);

pub const SIGHUP: NamedSignal = (SignalKind::hangup(), "SIGHUP");
pub const SIGUSR1: NamedSignal = (SignalKind::user_defined1(), "SIGUSR1");
pub const SIGUSR2: NamedSignal = (SignalKind::user_defined2(), "SIGUSR2");

/// Logs each of `signals` that arrives, with the reason why it has no effect: scripts send them to any process that writes a log. The
/// handlers are installed before this function returns, and stay installed when the future is dropped.
pub fn ignored(
    signals: &[NamedSignal],
    why: &'static str,
) -> io::Result<impl Future<Output = ()> + Send + use<>> {
    let mut streams = Vec::new();
    for (kind, name) in signals {
        streams.push((signal(*kind)?, *name));
    }
    Ok(async move {
        loop {
            let received = poll_fn(|cx| {
                let received = streams.iter_mut().find_map(|(stream, name)| match stream.poll_recv(cx) {
                    Poll::Ready(Some(())) => Some(*name),
                    _ => None,
                });
                received.map_or(Poll::Pending, Poll::Ready)
            });
            // Awaited outside the macro, whose arguments are not evaluated if the level is off.
            let name = received.await;
            tracing::info!("{name} changes nothing: {why}");
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

    /// No subscriber is installed here, so nothing is logged.
    #[test]
    fn a_process_that_logs_nothing_waits_for_ignored_signals_without_spinning() {
        let (polled, is_polled) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let first = runtime.block_on(async {
                let mut waiting = Box::pin(ignored(&[SIGUSR1], "it is a test").unwrap());
                poll_fn(|cx| Poll::Ready(waiting.as_mut().poll(cx))).await
            });
            polled.send(first.is_pending()).unwrap();
        });
        assert_eq!(is_polled.recv_timeout(std::time::Duration::from_secs(30)), Ok(true));
    }

    #[tokio::test]
    async fn signals_that_mean_nothing_here_do_not_kill() {
        use rustix::process::Signal as Raw;
        drop(ignored(&[SIGHUP, SIGUSR1, SIGUSR2], "it is a test").unwrap());
        for raw in [Raw::HUP, Raw::USR1, Raw::USR2] {
            rustix::process::kill_process(rustix::process::getpid(), raw).unwrap();
        }
        let terminated = terminated().unwrap();
        rustix::process::kill_process(rustix::process::getpid(), Raw::INT).unwrap();
        assert_eq!(terminated.await, Signal::Interrupt);
    }
}
