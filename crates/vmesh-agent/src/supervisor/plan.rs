//! The supervisor's decisions, as pure functions.

use std::collections::BTreeSet;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;
use xxhash_rust::xxh3::xxh3_64;

use crate::bootstrap::fit_to_open_files;

/// Largest number of old Envoys that drain beside the serving one. Each uses the memory of a whole Envoy.
pub(super) const MAX_DRAINING: usize = 2;

/// The mechanism by which a new Envoy replaces the serving one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum HandoverMethod {
    /// Envoy's hot restart: the new Envoy receives the listening sockets, so connections that wait in their queues are kept.
    HotRestart,
    /// Both Envoys bind the same ports (`SO_REUSEPORT`). When the old one closes its listeners, the kernel resets the connections that wait
    /// in their queues, unless `net.ipv4.tcp_migrate_req` is 1. Holds the reason why hot restart was not possible.
    SharedPorts(String),
}

/// The state of the Envoy that the serving one took over from by hot restart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParentState {
    Gone,
    /// The parent has no connections left, so a third Envoy of the line may terminate it.
    Idle,
    /// The parent still has connections. A third Envoy of the line would terminate it and cut them.
    Draining,
    /// The parent crashed. The serving Envoy does not know, and aborts as soon as it sends to its parent: when a third Envoy starts, or to
    /// terminate its parent.
    Crashed,
}

/// Chooses the handover method. `old` and `new` are the hot restart versions of the two binaries.
pub(super) fn choose_method(old: Option<&str>, new: Option<&str>, parent: ParentState) -> HandoverMethod {
    match (old, new) {
        _ if parent == ParentState::Draining => {
            HandoverMethod::SharedPorts("the Envoy before it still has connections".to_owned())
        }
        _ if parent == ParentState::Crashed => {
            HandoverMethod::SharedPorts("the Envoy before it died".to_owned())
        }
        (Some(old), Some(new)) if old == new => HandoverMethod::HotRestart,
        (old, new) => HandoverMethod::SharedPorts(format!(
            "their hot restart versions are {} and {}",
            old.unwrap_or("none"),
            new.unwrap_or("none")
        )),
    }
}

/// Returns how long an old Envoy may keep draining after a handover. Never shorter than the drain: the new Envoy terminates its parent at
/// that time, and aborts if something else stopped the parent before.
pub(super) fn drain_limit(parent_shutdown: Duration, drain: Duration) -> Duration {
    Duration::from_secs(parent_shutdown.as_secs().max(drain.as_secs() + 1))
}

/// Reports whether to start the `good` launch instead of the one on `disk`: if the latter crashed at least twice or was rejected. If the
/// good launch crashes too, the one on disk is tried again.
pub(super) fn is_better<Id: PartialEq>(
    good: &Id,
    disk: &Id,
    crashed: Option<&(Id, u32)>,
    refused: Option<&Id>,
) -> bool {
    let crashes = |id: &Id| crashed.is_some_and(|(crashed, times)| crashed == id && *times >= 2);
    crashes(disk) || (refused == Some(disk) && !crashes(good))
}

/// The clusters and listeners that an Envoy has from its control plane, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DynamicResources {
    pub(super) clusters: BTreeSet<String>,
    pub(super) listeners: BTreeSet<String>,
    /// Why Envoy rejected an update, if it did.
    pub(super) rejection: Option<String>,
}

/// Extracts the resources from `/config_dump`. `rejected` is the number of updates that Envoy counts as rejected.
pub(super) fn dynamic_resources(dump: &Value, rejected: u64) -> DynamicResources {
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
    DynamicResources {
        clusters: all("dynamic_active_clusters")
            .filter_map(|one| name(one.pointer("/cluster/name")))
            .collect(),
        listeners: all("dynamic_listeners")
            .filter(|one| one.get("active_state").is_some())
            .filter_map(|one| name(one.get("name")))
            .collect(),
        rejection: details.or(count),
    }
}

/// Compares the resources of a new Envoy with those of its predecessor. A missing resource is an error only if the new Envoy rejected an
/// update: otherwise the control plane has removed that resource meanwhile.
pub(super) fn check_complete(before: &DynamicResources, after: &DynamicResources) -> Result<(), String> {
    let missing: Vec<&str> = before
        .listeners
        .difference(&after.listeners)
        .chain(before.clusters.difference(&after.clusters))
        .map(String::as_str)
        .collect();
    let (Some(first), Some(why)) = (missing.first(), &after.rejection) else { return Ok(()) };
    let others = match missing.len() - 1 {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    Err(format!("it is without `{first}`{others}, which the Envoy before it has: {why}"))
}

/// Returns the bootstrap with the supervisor's changes: the admin interface is a socket of this Envoy alone, accessible to its user alone,
/// and the connection limit fits `open_files`. With `waits`, Envoy waits without a limit for its first configuration before it becomes
/// live, because another Envoy serves meanwhile.
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

/// Returns the digest that identifies a bootstrap.
pub(super) fn digest(text: &str) -> String {
    format!("{:016x}", xxh3_64(text.as_bytes()))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn envoys_of_one_hot_restart_version_take_over_hot_and_others_beside() {
        for parent in [ParentState::Gone, ParentState::Idle] {
            assert_eq!(choose_method(Some("11.104"), Some("11.104"), parent), HandoverMethod::HotRestart);
        }
        for (old, new, parent) in [
            (Some("11.104"), Some("11.104"), ParentState::Draining),
            (Some("11.104"), Some("11.104"), ParentState::Crashed),
            (Some("11.104"), Some("12.104"), ParentState::Gone),
            (None, Some("11.104"), ParentState::Gone),
            (None, None, ParentState::Gone),
        ] {
            assert!(
                matches!(choose_method(old, new, parent), HandoverMethod::SharedPorts(_)),
                "{old:?} {new:?} {parent:?}"
            );
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
        assert_eq!(drain_limit(seconds(600), seconds(10)), seconds(600));
        assert_eq!(drain_limit(seconds(1), seconds(10)), seconds(11));
        assert_eq!(drain_limit(Duration::from_millis(1500), Duration::ZERO), seconds(1));
    }

    fn resources(listeners: &[&str], clusters: &[&str], refused: Option<&str>) -> DynamicResources {
        let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
        DynamicResources {
            clusters: set(clusters),
            listeners: set(listeners),
            rejection: refused.map(str::to_owned),
        }
    }

    #[test]
    fn what_was_refused_is_missed_and_what_was_taken_away_is_not() {
        let before = resources(&["in", "out"], &["orders"], None);
        check_complete(&before, &before).unwrap();
        check_complete(&before, &resources(&["in"], &[], None)).unwrap();
        // The rejected resource is missing in both Envoys.
        check_complete(&before, &resources(&["in", "out", "more"], &["orders"], Some("listener new: bad")))
            .unwrap();
        assert_eq!(
            check_complete(&before, &resources(&["out"], &[], Some("listener in: bad"))).unwrap_err(),
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
        let expected = resources(&["in"], &["orders"], Some("listener bad: no such filter"));
        assert_eq!(dynamic_resources(&dump, 0), expected);
        assert_eq!(dynamic_resources(&json!({}), 2).rejection.unwrap(), "it rejected 2 updates");
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
