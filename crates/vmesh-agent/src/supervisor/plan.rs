//! The judgement of the supervisor: pure, so that it can be tested as text.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::bootstrap::fit_to_open_files;

/// So many Envoys that only take leave there may be at once, beside the one that serves: each is a whole Envoy's memory.
pub(super) const MOST_LEAVING: usize = 2;

/// How a new Envoy takes over from the one that serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum How {
    /// By Envoy's hot restart: it is handed the very sockets, so nobody who waits in their queues is lost.
    Hot,
    /// By binding the same ports beside it. A connection in the queue of the old one's listener when that closes is the
    /// kernel's to reset, unless `net.ipv4.tcp_migrate_req` is 1. Why not hot is said.
    Beside(String),
}

/// The Envoy that the serving one took over from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Parent {
    Gone,
    /// It has no connections any more: that a third Envoy of the same line ends it costs nothing.
    Idle,
    /// It still has connections. A third Envoy of the same line would end it, and them.
    Leaves,
    /// It died. The serving one does not know, and aborts when it is to speak to it: for a third Envoy, or to end it.
    Lost,
}

/// `old` and `new` are the hot restart versions.
pub(super) fn how(old: Option<&str>, new: Option<&str>, parent: Parent) -> How {
    match (old, new) {
        _ if parent == Parent::Leaves => How::Beside("the Envoy before it still has connections".to_owned()),
        _ if parent == Parent::Lost => How::Beside("the Envoy before it died".to_owned()),
        (Some(old), Some(new)) if old == new => How::Hot,
        (old, new) => How::Beside(format!(
            "their hot restart versions are {} and {}",
            old.unwrap_or("none"),
            new.unwrap_or("none")
        )),
    }
}

/// How long the older Envoy may stay after another took over: not shorter than it takes its leave, since whoever ends it
/// before that lets the younger one abort, which comes to end it at that time.
pub(super) fn stay(parent_shutdown: Duration, drain: Duration) -> Duration {
    Duration::from_secs(parent_shutdown.as_secs().max(drain.as_secs() + 1))
}

/// Whether to start what was `good` instead of what is on `disk`: that has crashed more than once, or was refused before.
/// Where what was good crashes as well, what is on disk has its turn again.
pub(super) fn is_better<Id: PartialEq>(
    good: &Id,
    disk: &Id,
    crashed: Option<&(Id, u32)>,
    refused: Option<&Id>,
) -> bool {
    let crashes = |id: &Id| crashed.is_some_and(|(crashed, times)| crashed == id && *times >= 2);
    crashes(disk) || (refused == Some(disk) && !crashes(good))
}

/// What an Envoy has, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Holdings {
    pub(super) clusters: BTreeSet<String>,
    pub(super) listeners: BTreeSet<String>,
    /// Why it has not taken what it was sent.
    pub(super) refused: Option<String>,
}

/// From `/config_dump`, and the number of updates that Envoy says it rejected.
pub(super) fn holdings(dump: &Value, rejected: u64) -> Holdings {
    let configs = dump.get("configs").and_then(Value::as_array);
    let all = |list: &'static str| {
        configs.into_iter().flatten().filter_map(move |config| config.get(list)?.as_array()).flatten()
    };
    let name = |value: Option<&Value>| value.and_then(Value::as_str).map(str::to_owned);
    let details = all("dynamic_listeners").find_map(|one| {
        let why = one.pointer("/error_state/details")?.as_str()?;
        Some(format!("listener {}: {why}", one.get("name")?.as_str()?))
    });
    let count = (rejected > 0).then(|| format!("it rejected {rejected} updates"));
    Holdings {
        clusters: all("dynamic_active_clusters")
            .filter_map(|one| name(one.pointer("/cluster/name")))
            .collect(),
        listeners: all("dynamic_listeners")
            .filter(|one| one.get("active_state").is_some())
            .filter_map(|one| name(one.get("name")))
            .collect(),
        refused: details.or(count),
    }
}

/// Whether an Envoy that is live has less than the one that it takes over from because it refused it; what the control
/// plane took away meanwhile is not missing.
pub(super) fn lacks(before: &Holdings, after: &Holdings) -> Result<(), String> {
    let missing: Vec<&str> = before
        .listeners
        .difference(&after.listeners)
        .chain(before.clusters.difference(&after.clusters))
        .map(String::as_str)
        .collect();
    let (Some(first), Some(why)) = (missing.first(), &after.refused) else { return Ok(()) };
    let others = match missing.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(format!("it is without `{first}`{others}, which the Envoy before it has: {why}"))
}

/// A bootstrap as the supervisor starts Envoy with it: its admin interface is a socket of this Envoy's own, for its user
/// alone, and it takes no more clients than a process with `open_files` can hold. `waits`: it becomes live only when it has been
/// told what to serve, since another Envoy serves meanwhile.
pub(super) fn bootstrap(text: &str, admin: &Path, waits: bool, open_files: u64) -> Result<Value, String> {
    let mut bootstrap: Value =
        serde_json::from_str(text).map_err(|error| format!("it is not JSON: {error}"))?;
    let Some(fields) = bootstrap.as_object_mut() else {
        return Err("it is not a JSON object".to_owned());
    };
    let pipe = serde_json::json!({"path": admin.display().to_string(), "mode": 0o600});
    let admin = serde_json::json!({"address": {"pipe": pipe}, "ignore_global_conn_limit": true});
    fields.insert("admin".to_owned(), admin);
    if waits {
        for kind in ["cds_config", "lds_config"] {
            let source = fields.get_mut("dynamic_resources").and_then(|dynamic| dynamic.get_mut(kind));
            if let Some(source) = source.and_then(Value::as_object_mut) {
                source.insert("initial_fetch_timeout".to_owned(), "0s".into());
            }
        }
    }
    fit_to_open_files(&mut bootstrap, open_files);
    Ok(bootstrap)
}

/// What tells one bootstrap from another.
pub(super) fn digest(text: &str) -> String {
    format!("{:016x}", xxh3_64(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn envoys_of_one_hot_restart_version_take_over_hot_and_others_beside() {
        for parent in [Parent::Gone, Parent::Idle] {
            assert_eq!(how(Some("11.104"), Some("11.104"), parent), How::Hot);
        }
        for (old, new, parent) in [
            (Some("11.104"), Some("11.104"), Parent::Leaves),
            (Some("11.104"), Some("11.104"), Parent::Lost),
            (Some("11.104"), Some("12.104"), Parent::Gone),
            (None, Some("11.104"), Parent::Gone),
            (None, None, Parent::Gone),
        ] {
            assert!(matches!(how(old, new, parent), How::Beside(_)), "{old:?} {new:?} {parent:?}");
        }
    }

    #[test]
    fn what_was_good_is_started_for_what_crashed_twice_or_was_refused_unless_it_crashes_itself() {
        for (crashed, refused, better) in [
            (None, None, false),
            (Some(("disk", 1)), None, false),
            (Some(("disk", 2)), None, true),
            (None, Some("disk"), true),
            (None, Some("another"), false),
            (Some(("good", 1)), Some("disk"), true),
            (Some(("good", 2)), Some("disk"), false),
        ] {
            assert_eq!(
                is_better(&"good", &"disk", crashed.as_ref(), refused.as_ref()),
                better,
                "{crashed:?} {refused:?}"
            );
        }
    }

    #[test]
    fn nobody_is_ended_before_its_drain_is_over() {
        let seconds = Duration::from_secs;
        assert_eq!(stay(seconds(600), seconds(10)), seconds(600));
        assert_eq!(stay(seconds(1), seconds(10)), seconds(11));
        assert_eq!(stay(Duration::from_millis(1500), Duration::ZERO), seconds(1));
    }

    fn has(listeners: &[&str], clusters: &[&str], refused: Option<&str>) -> Holdings {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        Holdings { clusters: set(clusters), listeners: set(listeners), refused: refused.map(str::to_owned) }
    }

    #[test]
    fn what_was_refused_is_missed_and_what_was_taken_away_is_not() {
        let before = has(&["in", "out"], &["orders"], None);
        lacks(&before, &before).unwrap();
        lacks(&before, &has(&["in"], &[], None)).unwrap();
        // It refuses something that the old one did not have either.
        lacks(&before, &has(&["in", "out", "more"], &["orders"], Some("listener new: bad"))).unwrap();
        assert_eq!(
            lacks(&before, &has(&["out"], &[], Some("listener in: bad"))).unwrap_err(),
            "it is without `in` and 1 more, which the Envoy before it has: listener in: bad"
        );
    }

    #[test]
    fn what_an_envoy_has_is_read_from_its_dump() {
        let dump = json!({"configs": [
            {"dynamic_active_clusters": [{"cluster": {"name": "orders"}}]},
            {"dynamic_listeners": [
                {"name": "in", "active_state": {}},
                {"name": "bad", "error_state": {"details": "no such filter"}},
            ]},
        ]});
        let expected = has(&["in"], &["orders"], Some("listener bad: no such filter"));
        assert_eq!(holdings(&dump, 0), expected);
        assert_eq!(holdings(&json!({}), 2).refused.unwrap(), "it rejected 2 updates");
    }

    #[test]
    fn the_admin_interface_is_this_envoys_own_and_one_that_takes_over_waits_to_be_told() {
        let text = r#"{"admin": {"address": {"socket_address": {}}},
            "dynamic_resources": {"cds_config": {"ads": {}, "initial_fetch_timeout": "10s"}, "lds_config": {}}}"#;
        let pipe = json!({
            "address": {"pipe": {"path": "/run/x/admin.1.sock", "mode": 384}},
            "ignore_global_conn_limit": true,
        });
        let first = bootstrap(text, Path::new("/run/x/admin.1.sock"), false, 1024).unwrap();
        assert_eq!(first["admin"], pipe);
        assert_eq!(first["dynamic_resources"]["cds_config"]["initial_fetch_timeout"], "10s");
        let next = bootstrap(text, Path::new("/run/x/admin.1.sock"), true, 1024).unwrap();
        for kind in ["cds_config", "lds_config"] {
            assert_eq!(next["dynamic_resources"][kind]["initial_fetch_timeout"], "0s");
        }
        assert!(bootstrap("{", Path::new("/x"), true, 1024).unwrap_err().starts_with("it is not JSON: "));
        assert_eq!(bootstrap("[]", Path::new("/x"), true, 1024).unwrap_err(), "it is not a JSON object");
    }
}
