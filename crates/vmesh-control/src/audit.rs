//! The audit log: one JSON line for each change that somebody asked for, and for each refusal. The lines go to the log of the process
//! and to `audit.jsonl` in the state directory.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;
use tokio::sync::mpsc;
use vmesh_daemon::connections::Origin;
use vmesh_daemon::fsx;
use vmesh_model::NodeName;

use crate::time::unix_now;

/// The most events that wait to be written. Further ones are counted and lost.
const QUEUE: usize = 4096;
/// The size at which the file is renamed to `audit.jsonl.1`, in bytes. There is one older file.
const FILE_MAX: u64 = 16 << 20;
/// The most bytes of a text in an event.
const TEXT_MAX: usize = 512;

/// The result of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Done,
    Failed,
    Denied,
}

/// One line of the audit log.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct AuditEvent {
    /// Unix seconds.
    time: u64,
    /// The user, the node or the operator who asked.
    who: String,
    /// The address that the request came from; absent for a Unix socket.
    #[serde(skip_serializing_if = "Option::is_none")]
    from: Option<IpAddr>,
    /// The action, such as `node.join` or `POST /api/v1/tokens`.
    action: String,
    outcome: Outcome,
    /// The reason of a refusal, or the result in words.
    #[serde(skip_serializing_if = "String::is_empty")]
    detail: String,
}

impl AuditEvent {
    pub(crate) fn of_node(
        node: &NodeName,
        from: Option<IpAddr>,
        action: &str,
        outcome: Outcome,
        detail: &str,
    ) -> AuditEvent {
        AuditEvent::new(format!("node:{node}"), from, action, outcome, detail)
    }

    /// Makes the event of a request to the API.
    pub(crate) fn of_request(
        origin: Option<Origin>,
        action: &str,
        outcome: Outcome,
        detail: &str,
    ) -> AuditEvent {
        let (who, from) = match origin {
            Some(Origin::User(uid)) => (format!("uid:{uid}"), None),
            Some(Origin::Address(address)) => ("anonymous".to_owned(), Some(address)),
            Some(Origin::Unknown) | None => ("unknown".to_owned(), None),
        };
        AuditEvent::new(who, from, action, outcome, detail)
    }

    fn new(who: String, from: Option<IpAddr>, action: &str, outcome: Outcome, detail: &str) -> AuditEvent {
        let escaped = |text: &str| vmesh_text::escaped(text, TEXT_MAX);
        AuditEvent { time: unix_now(), who, from, action: escaped(action), outcome, detail: escaped(detail) }
    }
}

/// The entrance of the audit log. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct AuditLog {
    events: mpsc::Sender<AuditEvent>,
    lost: Arc<AtomicU64>,
    refusals: Arc<Mutex<RefusalLimiter>>,
}

/// The most refusals of one origin that are written in a minute. A client that is refused all the time must not push the rest of the log
/// out of its file.
const REFUSALS_MAX: u32 = 60;
/// The most origins whose refusals are counted one by one; all others share one count.
const ORIGINS_MAX: usize = 1024;
const MINUTE: u64 = 60;

/// Counts the refusals of each origin in the current minute.
#[derive(Debug, Default)]
struct RefusalLimiter {
    /// Unix seconds.
    minute_began: u64,
    by_origin: BTreeMap<String, u32>,
    others: u32,
    left_out: u64,
}

impl RefusalLimiter {
    /// Reports whether a refusal is written. The second value is the number of refusals that were left out in the minute that has ended.
    fn admit(&mut self, event: &AuditEvent) -> (bool, u64) {
        let mut left_out = 0;
        if event.time.saturating_sub(self.minute_began) >= MINUTE {
            left_out = self.left_out;
            *self = RefusalLimiter { minute_began: event.time, ..RefusalLimiter::default() };
        }
        let origin = event.from.map_or_else(|| event.who.clone(), |from| from.to_string());
        let is_known = self.by_origin.contains_key(&origin) || self.by_origin.len() < ORIGINS_MAX;
        let count = if is_known { self.by_origin.entry(origin).or_default() } else { &mut self.others };
        *count = count.saturating_add(1);
        let is_written = *count <= REFUSALS_MAX;
        self.left_out += u64::from(!is_written);
        (is_written, left_out)
    }
}

impl AuditLog {
    /// Makes the log, and the writer that its task runs.
    pub(crate) fn new(state_dir: &Path) -> (AuditLog, AuditWriter) {
        let (events, waiting) = mpsc::channel(QUEUE);
        let lost = Arc::<AtomicU64>::default();
        let path = state_dir.join("audit.jsonl");
        let refusals = Arc::default();
        (AuditLog { events, lost: lost.clone(), refusals }, AuditWriter { waiting, lost, path })
    }

    /// Records an event. It never waits. Of one origin's refusals, the first [`REFUSALS_MAX`] of a minute are written. Returns whether
    /// this one is.
    pub(crate) fn record(&self, event: AuditEvent) -> bool {
        if event.outcome == Outcome::Denied {
            let (is_written, left_out) =
                self.refusals.lock().unwrap_or_else(PoisonError::into_inner).admit(&event);
            if left_out > 0 {
                tracing::warn!(
                    "{left_out} refusals of the last minute are not in the audit log, because they were too many"
                );
            }
            if !is_written {
                return false;
            }
        }
        if self.events.try_send(event).is_err() {
            self.lost.fetch_add(1, Relaxed);
        }
        true
    }
}

/// The task that writes the audit log.
#[derive(Debug)]
pub(crate) struct AuditWriter {
    waiting: mpsc::Receiver<AuditEvent>,
    lost: Arc<AtomicU64>,
    path: PathBuf,
}

impl AuditWriter {
    /// Writes events until every [`AuditLog`] is dropped, or until `stop`, and then those that wait.
    pub(crate) async fn run(mut self, mut stop: vmesh_daemon::Stop) {
        let mut failing = false;
        let mut stopping = false;
        while !stopping {
            let mut batch = Vec::new();
            tokio::select! {
                taken = self.waiting.recv_many(&mut batch, QUEUE) => if taken == 0 { return },
                () = stop.requested() => {
                    stopping = true;
                    while let Ok(event) = self.waiting.try_recv() {
                        batch.push(event);
                    }
                }
            }
            let lost = self.lost.swap(0, Relaxed);
            if lost > 0 {
                tracing::error!(
                    "{lost} events of the audit log were lost, because they came faster than they were written"
                );
            }
            let path = self.path.clone();
            let written = tokio::task::spawn_blocking(move || append(&path, &batch)).await;
            match written {
                Ok(Err(error)) if !failing => {
                    failing = true;
                    tracing::error!(
                        "could not write the audit log {}: {error}; its events are in this log only",
                        self.path.display()
                    );
                }
                Ok(Ok(())) => failing = false,
                Ok(Err(_)) | Err(_) => {}
            }
        }
    }
}

/// Logs the events and appends them to the file.
fn append(path: &Path, events: &[AuditEvent]) -> std::io::Result<()> {
    let mut text = Vec::new();
    for event in events {
        let line = serde_json::to_string(event).map_err(std::io::Error::other)?;
        tracing::info!(target: "vmesh_audit", "{line}");
        text.extend_from_slice(line.as_bytes());
        text.push(b'\n');
    }
    if text.is_empty() {
        return Ok(());
    }
    let mut file = open(path)?;
    if file.metadata()?.len() >= FILE_MAX {
        std::fs::rename(path, path.with_extension("jsonl.1"))?;
        file = open(path)?;
    }
    file.write_all(&text)?;
    file.sync_data()
}

fn open(path: &Path) -> std::io::Result<File> {
    OpenOptions::new().create(true).append(true).mode(fsx::PRIVATE).open(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_of_one_origin_leave_room_for_those_of_others() {
        let mut limiter = RefusalLimiter::default();
        let refusal = |from: &str, time| AuditEvent {
            time,
            ..AuditEvent::of_node(
                &"web-1".parse().unwrap(),
                from.parse().ok(),
                "node.join",
                Outcome::Denied,
                "",
            )
        };
        let written = (0..1000).filter(|_| limiter.admit(&refusal("10.0.0.1", 100)).0).count();
        assert_eq!(written, 60);
        assert_eq!(limiter.admit(&refusal("10.0.0.2", 101)), (true, 0));
        assert_eq!(limiter.admit(&refusal("10.0.0.1", 160)), (true, 940));
        for host in 0..5000u32 {
            limiter.admit(&refusal(&format!("10.{}.{}.1", host >> 8, host & 255), 161));
        }
        assert!(limiter.by_origin.len() <= ORIGINS_MAX);
    }

    #[test]
    fn an_event_is_one_line_whatever_is_in_it_and_the_file_is_private_and_bounded() {
        use std::os::unix::fs::PermissionsExt;
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("audit.jsonl");
        let from = "10.0.0.7".parse().ok();
        let event = AuditEvent::of_node(
            &"web-1".parse().unwrap(),
            from,
            "node.join",
            Outcome::Denied,
            "a\nb\u{1b}[2J",
        );
        append(&path, &[event.clone(), event]).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 2);
        let line: serde_json::Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
        assert_eq!(line["who"], "node:web-1");
        assert_eq!(line["from"], "10.0.0.7");
        assert_eq!(line["outcome"], "denied");
        assert!(!text.contains('\u{1b}'));
        let mode = std::fs::metadata(&path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode, 0o600);

        File::options().write(true).open(&path).unwrap().set_len(FILE_MAX).unwrap();
        append(&path, &[AuditEvent::of_request(Some(Origin::User(0)), "POST /x", Outcome::Done, "")])
            .unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap().lines().count(), 1);
        assert!(path.with_extension("jsonl.1").exists());
    }
}
