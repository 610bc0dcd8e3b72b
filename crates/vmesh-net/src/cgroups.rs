//! Watches directories of control groups for new units, with inotify(7).

use std::collections::BTreeSet;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use tokio::io::unix::AsyncFd;
use tokio::sync::{mpsc, watch};

/// Reports to `changes` that a directory was created or removed in one of `dirs`. Changes that arrive together
/// are reported as one.
pub async fn watch(mut dirs: watch::Receiver<BTreeSet<PathBuf>>, changes: mpsc::Sender<()>) {
    loop {
        let wanted = dirs.borrow_and_update().clone();
        let changed = async {
            match open(&wanted) {
                Ok(inotify) => loop {
                    if receive(&inotify).await.is_err() {
                        return std::future::pending().await;
                    }
                    // If the channel is full, a pending message already reports a change.
                    _ = changes.try_send(());
                },
                Err(error) => {
                    if !wanted.is_empty() {
                        tracing::warn!(
                            "could not watch the control groups, so vmesh-net sees a started unit after up to 10 s: {error}"
                        );
                    }
                    std::future::pending::<()>().await;
                }
            }
        };
        tokio::select! {
            () = changed => {}
            next = dirs.changed() => if next.is_err() { return },
        }
    }
}

#[expect(deprecated, reason = "AsyncFd owns the descriptor, and closes it after it is deregistered")]
fn open(dirs: &BTreeSet<PathBuf>) -> io::Result<AsyncFd<OwnedFd>> {
    if dirs.is_empty() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
    for dir in dirs {
        // A directory that no longer exists is replaced by the next update of `dirs`.
        _ = inotify::add_watch(&inotify, dir, WatchFlags::CREATE | WatchFlags::DELETE | WatchFlags::ONLYDIR);
    }
    AsyncFd::new(inotify)
}

/// Waits for events, and consumes all of them.
async fn receive(inotify: &AsyncFd<OwnedFd>) -> io::Result<()> {
    loop {
        let mut ready = inotify.readable().await?;
        let taken = ready.try_io(|inotify| {
            let mut buffer = [MaybeUninit::uninit(); 4096];
            Ok(rustix::io::read(inotify, &mut buffer).map(drop)?)
        });
        match taken {
            Ok(done) => return done,
            Err(_) => continue,
        }
    }
}
