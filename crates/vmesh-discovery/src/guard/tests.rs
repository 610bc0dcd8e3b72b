mod fleet;
mod model;
mod unreadable;

use expect_test::{Expect, expect};
use proptest::prelude::*;
use vmesh_model::{Endpoint, Health, Labels, Registration, Weight};

use super::*;

fn endpoint(port: u16, health: Health) -> Endpoint {
    Endpoint {
        address: ([10, 0, 0, 1], port).into(),
        hostname: None,
        weight: Weight::ONE,
        health,
        zone: None,
        version: None,
        labels: Labels::new(),
        source: "test".into(),
    }
}

/// Parses endpoints such as `1 2 3d 4u`: each word is a port, with the suffix `d` for draining, `u` for
/// unhealthy or `h` for healthy.
fn service_view(service: &str, endpoints: &str) -> ServiceView {
    let endpoint = |word: &str| {
        let (port, health) = match word.split_at(word.len() - 1) {
            (port, "d") => (port, Health::Draining),
            (port, "u") => (port, Health::Unhealthy),
            (port, "h") => (port, Health::Healthy),
            _ => (word, Health::Unknown),
        };
        endpoint(port.parse().unwrap(), health)
    };
    let mut endpoints: Vec<_> = endpoints.split_whitespace().map(endpoint).collect();
    endpoints.sort_by_key(|e| e.address);
    ServiceView::fresh(Arc::new(Registration {
        service: service.parse().unwrap(),
        protocol: None,
        port: None,
        endpoints: endpoints.into(),
        place: Place::at("orders.yaml", 1, 1),
    }))
}

fn ports(service_view: &ServiceView) -> Vec<String> {
    let mark = |e: &Endpoint| match e.health {
        Health::Draining => "d",
        Health::Unhealthy => "u",
        Health::Healthy => "h",
        Health::Unknown => "",
    };
    service_view.registration.endpoints.iter().map(|e| format!("{}{}", e.address.port(), mark(e))).collect()
}

/// A guard, and a source that reports the same at each confirming read unless `unreadable` is set.
struct Sim {
    guard: Guard,
    reported: Registrations,
    unreadable: bool,
    /// The times of the confirming reads.
    read: Vec<Instant>,
    believed: Vec<(Instant, Registrations)>,
}

impl Sim {
    fn of(config: GuardConfig) -> Sim {
        Sim {
            guard: Guard::new("file:services.d", config),
            reported: Registrations::default(),
            unreadable: false,
            read: Vec::new(),
            believed: Vec::new(),
        }
    }

    fn judge(&mut self, now: Instant) -> Registrations {
        let believed = self.guard.judge(now);
        self.believed.push((now, believed.clone()));
        believed
    }

    fn observe(&mut self, reported: Registrations, now: Instant) {
        self.reported = reported.clone();
        self.guard.observe(reported, now);
    }

    /// Advances time and reacts to each deadline as `follow` does.
    fn until(&mut self, now: Instant) {
        let mut steps = 0;
        while let Some(deadline) = self.guard.deadline().filter(|deadline| *deadline <= now) {
            let services = self.guard.services_to_confirm(deadline);
            if !services.is_empty() {
                match self.unreadable {
                    true => self.guard.record_failed_read(&services, &"no answer".into(), deadline),
                    false => {
                        self.guard.record_confirming_read(&services, self.reported.clone(), deadline);
                        self.read.push(deadline);
                    }
                }
            }
            self.judge(deadline);
            steps += 1;
            assert!(steps < 10_000, "it never comes to rest");
        }
    }
}

/// Runs `script` and compares what the guard believes after each line with `expected`.
///
/// A line such as `10: orders 1 2 3` holds a second and the view of the source at that second. `-` stands for
/// an absent service, `[]` for a service that is empty on purpose, `failed` for a source that does not
/// answer, and `unreadable` for one whose confirming reads fail. `accept`, `freeze` and `thaw` are commands
/// of the operator. A line without an action only advances time.
fn run(config: GuardConfig, script: &str, expected: Expect) {
    let start = Instant::now();
    let mut sim = Sim::of(config);
    let orders: ServiceName = "orders".parse().unwrap();
    let mut shown = String::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (second, message) = line.split_once(':').unwrap();
        let now = start + Duration::from_secs(second.parse().unwrap());
        sim.until(now);
        match message.trim() {
            "" => {}
            "failed" => sim.guard.source_failed(now),
            "unreadable" => sim.unreadable = true,
            "accept" => _ = sim.guard.accept(Some(&orders)).unwrap(),
            "freeze" => assert!(sim.guard.freeze(SystemTime::UNIX_EPOCH)),
            "thaw" => assert!(sim.guard.thaw(now)),
            "-" => sim.observe(Registrations::default(), now),
            "emptied" => {
                let emptied = std::iter::once(orders.clone()).collect();
                sim.observe(Registrations { emptied, ..Registrations::default() }, now);
            }
            message => {
                let reported = ServiceView {
                    empty_on_purpose: message == "[]",
                    ..service_view("orders", message.trim_matches(['[', ']', '.']))
                };
                let services = std::iter::once((orders.clone(), reported)).collect();
                sim.observe(Registrations { services, ..Registrations::default() }, now);
            }
        }
        let believed = sim.judge(now);
        shown += &format!("{line:<20} => ");
        match believed.services.get("orders") {
            None => shown += "gone",
            Some(service_view) => {
                shown += &format!("{} {}", service_view.state, ports(service_view).join(" "));
                shown +=
                    &service_view.because.as_ref().map(|because| format!(" ({because})")).unwrap_or_default();
            }
        }
        if let Some(deadline) = sim.guard.deadline() {
            let until =
                sim.guard.held_changes().iter().filter_map(|held| held.until).min().unwrap_or(deadline);
            shown += &format!(" until {}", (until - start).as_secs());
        }
        shown += "\n";
    }
    expected.assert_eq(&shown);
}

fn registry(script: &str, expected: Expect) {
    run(GuardConfig::default(), script, expected);
}

fn file(script: &str, expected: Expect) {
    run(GuardConfig::default().for_files(), script, expected);
}

#[test]
fn additions_are_believed_at_once_and_removals_of_a_registry_after_a_while() {
    registry(
        "0: 1 2 3\n1: 1 2 3 4\n2: 1 2 4\n5: 1 4\n6: 1 3 4\n12:\n15:\n16: 1 4 5\n26:",
        expect![[r#"
        0: 1 2 3             => fresh 1 2 3
        1: 1 2 3 4           => fresh 1 2 3 4
        2: 1 2 4             => fresh 1 2 3 4 until 12
        5: 1 4               => fresh 1 2 3 4 until 12
        6: 1 3 4             => fresh 1 2 3 4 until 15
        12:                  => fresh 1 2 3 4 until 15
        15:                  => fresh 1 3 4
        16: 1 4 5            => fresh 1 3 4 5 until 26
        26:                  => fresh 1 4 5
    "#]],
    );
}

#[test]
fn a_file_is_edited_on_purpose() {
    file(
        "0: 1 2 3\n1: 1 2\n2: 1\n3: 4",
        expect![[r#"
        0: 1 2 3             => fresh 1 2 3
        1: 1 2               => fresh 1 2
        2: 1                 => fresh 1
        3: 4                 => fresh 4
    "#]],
    );
}

#[test]
fn a_drain_is_believed_at_once_and_so_is_its_end() {
    registry(
        "0: 1 2 3 4 5\n1: 1 2 3d 4d 5d\n2: 1 2",
        expect![[r#"
        0: 1 2 3 4 5         => fresh 1 2 3 4 5
        1: 1 2 3d 4d 5d      => fresh 1 2 3d 4d 5d
        2: 1 2               => fresh 1 2
    "#]],
    );
    registry(
        "0: 1 2\n1: 1d 2d\n2: .\n3: -",
        expect![[r#"
        0: 1 2               => fresh 1 2
        1: 1d 2d             => fresh 1d 2d
        2: .                 => fresh 
        3: -                 => gone
    "#]],
    );
}

#[test]
fn a_service_that_is_gone_stays_until_that_is_confirmed() {
    file(
        "0: 1 2\n5: -\n34:\n35:",
        expect![[r#"
            0: 1 2               => fresh 1 2
            5: -                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            34:                  => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            35:                  => gone
        "#]],
    );
    file(
        "0: 1 2\n5: -\n20: 1\n40: -\n69:\n70:",
        expect![[r#"
            0: 1 2               => fresh 1 2
            5: -                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            20: 1                => fresh 1
            40: -                => held 1 (`file:services.d` no longer lists this service, which had 1 endpoint: the last good state stays in force for at least 30s, in case the removal is a mistake) until 70
            69:                  => held 1 (`file:services.d` no longer lists this service, which had 1 endpoint: the last good state stays in force for at least 30s, in case the removal is a mistake) until 70
            70:                  => gone
        "#]],
    );
}

#[test]
fn a_service_that_is_empty_stays_unless_that_is_said_on_purpose() {
    registry(
        "0: 1\n5: .\n34:\n35:\n36: -",
        expect![[r#"
            0: 1                 => fresh 1
            5: .                 => held 1 (`file:services.d` lists no endpoint of this service, which had 1 endpoint: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            34:                  => held 1 (`file:services.d` lists no endpoint of this service, which had 1 endpoint: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            35:                  => fresh 
            36: -                => gone
        "#]],
    );
    file(
        "0: 1 2\n5: []",
        expect![[r#"
        0: 1 2               => fresh 1 2
        5: []                => fresh 
    "#]],
    );
    file(
        "0: 1 2\n5: emptied",
        expect![[r#"
        0: 1 2               => fresh 1 2
        5: emptied           => gone
    "#]],
    );
    let config = GuardConfig { allow_empty: vec!["orders".parse().unwrap()], ..GuardConfig::default() };
    run(
        config.clone(),
        "0: 1 2 3 4 5 6\n5: .",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: .                 => fresh 
    "#]],
    );
    run(
        config,
        "0: 1 2 3 4 5 6\n5: -",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: -                 => gone
    "#]],
    );
}

#[test]
fn a_service_that_shrinks_below_half_stays_until_that_is_confirmed() {
    file(
        "0: 1 2 3 4 5 6 7 8 9 10\n5: 1 2 3 4\n10: 1 2 3 11\n64:\n65:\n66: 1 2 11",
        expect![[r#"
            0: 1 2 3 4 5 6 7 8 9 10 => fresh 1 2 3 4 5 6 7 8 9 10
            5: 1 2 3 4           => held 1 2 3 4 5 6 7 8 9 10 (`file:services.d` lists 4 endpoints of this service, which had 10: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            10: 1 2 3 11         => held 1 2 3 4 5 6 7 8 9 10 11 (`file:services.d` lists 4 endpoints of this service, which had 10: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            64:                  => held 1 2 3 4 5 6 7 8 9 10 11 (`file:services.d` lists 4 endpoints of this service, which had 10: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            65:                  => fresh 1 2 3 11
            66: 1 2 11           => fresh 1 2 11
        "#]],
    );
    // Half of the endpoints are left; and a service that is too small for the rule.
    file(
        "0: 1 2 3 4 5 6\n5: 1 2 3",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: 1 2 3             => fresh 1 2 3
    "#]],
    );
    file(
        "0: 1 2 3 4\n5: 1",
        expect![[r#"
        0: 1 2 3 4           => fresh 1 2 3 4
        5: 1                 => fresh 1
    "#]],
    );
    // Replacing all endpoints is a deployment.
    file(
        "0: 1 2 3 4 5 6\n5: 11 12 13 14 15 16",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: 11 12 13 14 15 16 => fresh 11 12 13 14 15 16
    "#]],
    );
    // The service recovers, and endpoints that went missing meanwhile are removed.
    file(
        "0: 1 2 3 4 5 6\n5: 1 2\n10: 1 2 3 4",
        expect![[r#"
            0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
            5: 1 2               => held 1 2 3 4 5 6 (`file:services.d` lists 2 endpoints of this service, which had 6: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            10: 1 2 3 4          => fresh 1 2 3 4
        "#]],
    );
}

#[test]
fn what_turns_from_few_into_none_has_to_be_confirmed_anew() {
    file(
        "0: 1 2 3 4 5 6\n5: 1\n60: -\n65:\n89:\n90:",
        expect![[r#"
            0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
            5: 1                 => held 1 2 3 4 5 6 (`file:services.d` lists 1 endpoint of this service, which had 6: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            60: -                => held 1 2 3 4 5 6 (`file:services.d` no longer lists this service, which had 6 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 90
            65:                  => held 1 2 3 4 5 6 (`file:services.d` no longer lists this service, which had 6 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 90
            89:                  => held 1 2 3 4 5 6 (`file:services.d` no longer lists this service, which had 6 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 90
            90:                  => gone
        "#]],
    );
    file(
        "0: 1 2 3 4 5 6\n5: -\n20: 1 2\n64:\n65:",
        expect![[r#"
            0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
            5: -                 => held 1 2 3 4 5 6 (`file:services.d` no longer lists this service, which had 6 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            20: 1 2              => held 1 2 3 4 5 6 (`file:services.d` lists 2 endpoints of this service, which had 6: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            64:                  => held 1 2 3 4 5 6 (`file:services.d` lists 2 endpoints of this service, which had 6: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
            65:                  => fresh 1 2
        "#]],
    );
}

#[test]
fn what_went_just_before_the_rest_is_confirmed_stays_its_own_time() {
    registry(
        "0: 1 2 3 4 5\n1: 1\n60: 2\n61:\n70:",
        expect![[r#"
            0: 1 2 3 4 5         => fresh 1 2 3 4 5
            1: 1                 => held 1 2 3 4 5 (`file:services.d` lists 1 endpoint of this service, which had 5: the last good state stays in force for at least 1m, in case the removal is a mistake) until 61
            60: 2                => held 1 2 3 4 5 (`file:services.d` lists 1 endpoint of this service, which had 5: the last good state stays in force for at least 1m, in case the removal is a mistake) until 61
            61:                  => fresh 1 2 until 70
            70:                  => fresh 2
        "#]],
    );
}

#[test]
fn small_steps_in_a_row_are_one_large_one_for_a_registry() {
    registry(
        "0: 1 2 3 4 5 6 7 8\n1: 1 2 3 4 5 6\n2: 1 2 3 4 5\n3: 1 2 3\n10:\n62:\n63:",
        expect![[r#"
            0: 1 2 3 4 5 6 7 8   => fresh 1 2 3 4 5 6 7 8
            1: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6 7 8 until 11
            2: 1 2 3 4 5         => fresh 1 2 3 4 5 6 7 8 until 11
            3: 1 2 3             => held 1 2 3 4 5 6 7 8 (`file:services.d` lists 3 endpoints of this service, which had 8: the last good state stays in force for at least 1m, in case the removal is a mistake) until 63
            10:                  => held 1 2 3 4 5 6 7 8 (`file:services.d` lists 3 endpoints of this service, which had 8: the last good state stays in force for at least 1m, in case the removal is a mistake) until 63
            62:                  => held 1 2 3 4 5 6 7 8 (`file:services.d` lists 3 endpoints of this service, which had 8: the last good state stays in force for at least 1m, in case the removal is a mistake) until 63
            63:                  => fresh 1 2 3
        "#]],
    );
}

#[test]
fn a_source_that_does_not_answer_confirms_nothing() {
    file(
        "0: 1 2\n5: -\n10: failed\n90:\n100: -\n129:\n130:",
        expect![[r#"
            0: 1 2               => fresh 1 2
            5: -                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            10: failed           => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake)
            90:                  => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake)
            100: -               => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 130
            129:                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 130
            130:                 => gone
        "#]],
    );
    registry(
        "0: 1 2\n5: 1\n10: failed\n60:\n70: 1\n79:\n80:",
        expect![[r#"
        0: 1 2               => fresh 1 2
        5: 1                 => fresh 1 2 until 15
        10: failed           => fresh 1 2
        60:                  => fresh 1 2
        70: 1                => fresh 1 2 until 80
        79:                  => fresh 1 2 until 80
        80:                  => fresh 1
    "#]],
    );
}

#[test]
fn what_was_believed_before_a_restart_is_guarded_too() {
    let last_good = Registrations {
        services: std::iter::once(("orders".parse().unwrap(), service_view("orders", "1 2"))).collect(),
        ..Registrations::default()
    };
    let now = Instant::now();
    let mut guard = Guard::restored("file:services.d", GuardConfig::default(), &last_good);
    assert_eq!(guard.judge(now), last_good);
    guard.observe(Registrations::default(), now);
    let believed = guard.judge(now);
    assert_eq!(ports(&believed.services["orders"]), ["1", "2"]);
    assert_eq!(believed.services["orders"].state, State::Held);
    expect!["orders.yaml:1:1: `file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake"].assert_eq(&believed.problems[0].to_string());
}

#[test]
fn what_did_not_change_keeps_its_pointer() {
    let now = Instant::now();
    let mut guard = Guard::new("file:services.d", GuardConfig::default());
    let reported = |endpoints| Registrations {
        services: std::iter::once(("orders".parse().unwrap(), service_view("orders", endpoints))).collect(),
        ..Registrations::default()
    };
    guard.observe(reported("1 2 3"), now);
    guard.judge(now);
    guard.observe(reported("1 2"), now);
    let held = guard.judge(now);
    guard.observe(reported("1 2"), now + Duration::from_secs(1));
    let again = guard.judge(now + Duration::from_secs(1));
    assert!(Arc::ptr_eq(&held.services["orders"].registration, &again.services["orders"].registration));
}

#[test]
fn the_guard_is_configured_like_everything_else() {
    let read = |text: &str| match vmesh_model::load::strict::<GuardConfig>("control.yaml", text) {
        Ok(config) => format!("{config:?}"),
        Err(problems) => problems.iter().map(|problem| format!("{problem}\n")).collect(),
    };
    expect![[r#"GuardConfig { removal_hold: Some(0ns), confirm_empty: 60s, confirm_shrink: 120s, confirmations: 2, shrink_ratio: 0.3, shrink_min: 3, confirm_unhealthy: 30s, fleet: FleetConfig { endpoints: 0.3, services: 0.2, min: 20, window: 60s }, max_stale: None, allow_empty: ["batch"] }"#]].assert_eq(&read(
        "removal_hold: 0s\nconfirm_empty: 1m\nconfirm_shrink: 2m\nshrink_ratio: 0.3\nshrink_min: 3\nallow_empty: [batch]\n",
    ));
    expect![[r#"
        control.yaml:1:1: unknown field `removal`, did you mean `removal_hold`?
        control.yaml:2:16: `confirm_empty`: `5` is not a duration: a number and a unit, such as 250ms, 2s, 1m30s or 1h
        control.yaml:3:15: `shrink_ratio`: 50 is not a share: from 0 to 1
        control.yaml:4:14: `allow_empty`: expected a list, found the text `batch`
    "#]].assert_eq(&read("removal: 5\nconfirm_empty: 5\nshrink_ratio: 50\nallow_empty: batch\n"));
}

#[test]
fn what_cannot_be_read_again_stays_until_it_is_accepted() {
    file(
        "0: 1 2\n5: unreadable\n5: -\n35:\n600:\n601: accept",
        expect![[r#"
            0: 1 2               => fresh 1 2
            5: unreadable        => fresh 1 2
            5: -                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            35:                  => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            600:                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            601: accept          => gone
        "#]],
    );
}

#[test]
fn when_all_become_unhealthy_at_once_their_health_stays_for_a_while() {
    registry(
        "0: 1h 2h 3\n10: 1h 2u 3\n20: 1u 2u 3u\n25: 1u 2u 3u 4\n26: 1u 2u 3u\n50:\n56:\n60: 1h 2u 3u\n61: 1u 2u 3u",
        expect![[r#"
            0: 1h 2h 3           => fresh 1h 2h 3
            10: 1h 2u 3          => fresh 1h 2u 3
            20: 1u 2u 3u         => held 1h 2h 3 (`file:services.d` reports that all endpoints of this service (3) became unhealthy within 30s: their previous health stays in force for the same time, in case the health checks are at fault) until 50
            25: 1u 2u 3u 4       => held 1h 2h 3 4 (`file:services.d` reports that all endpoints of this service (3) became unhealthy within 30s: their previous health stays in force for the same time, in case the health checks are at fault) until 50
            26: 1u 2u 3u         => held 1h 2h 3 4 (`file:services.d` reports that all endpoints of this service (3) became unhealthy within 30s: their previous health stays in force for the same time, in case the health checks are at fault) until 50
            50:                  => fresh 1u 2u 3u
            56:                  => fresh 1u 2u 3u
            60: 1h 2u 3u         => fresh 1h 2u 3u
            61: 1u 2u 3u         => fresh 1u 2u 3u
        "#]],
    );
    // Endpoints that become unhealthy one after another do not point to failing health checks.
    registry(
        "0: 1h 2h\n10: 1u 2h\n41: 1u 2u",
        expect![[r#"
        0: 1h 2h             => fresh 1h 2h
        10: 1u 2h            => fresh 1u 2h
        41: 1u 2u            => fresh 1u 2u
    "#]],
    );
    // A new service whose checks have not passed yet; a single endpoint; and a service that recovers
    // meanwhile.
    registry(
        "0: 1u 2u\n1: 1u 2u 3u",
        expect![[r#"
        0: 1u 2u             => fresh 1u 2u
        1: 1u 2u 3u          => fresh 1u 2u 3u
    "#]],
    );
    registry(
        "0: 1h\n1: 1u",
        expect![[r#"
        0: 1h                => fresh 1h
        1: 1u                => fresh 1u
    "#]],
    );
    registry(
        "0: 1h 2h\n1: 1u 2u\n10: 1h 2u\n31: 1u 2u",
        expect![[r#"
        0: 1h 2h             => fresh 1h 2h
        1: 1u 2u             => held 1h 2h (`file:services.d` reports that all endpoints of this service (2) became unhealthy within 30s: their previous health stays in force for the same time, in case the health checks are at fault) until 31
        10: 1h 2u            => fresh 1h 2u
        31: 1u 2u            => held 1h 2h (`file:services.d` reports that all endpoints of this service (2) became unhealthy within 30s: their previous health stays in force for the same time, in case the health checks are at fault) until 61
    "#]],
    );
    registry(
        "0: 1h 2h\n1: 1u 2u\n10: accept\n15: 1u 2u",
        expect![[r#"
        0: 1h 2h             => fresh 1h 2h
        1: 1u 2u             => held 1h 2h (`file:services.d` reports that all endpoints of this service (2) became unhealthy within 30s: their previous health stays in force for the same time, in case the health checks are at fault) until 31
        10: accept           => fresh 1u 2u
        15: 1u 2u            => fresh 1u 2u
    "#]],
    );
}

#[test]
fn a_frozen_source_is_not_listened_to_and_its_holds_begin_anew_when_it_is_thawed() {
    file(
        "0: 1 2\n5: -\n20: freeze\n100: 3\n200: -\n300: thaw\n329:\n330:",
        expect![[r#"
            0: 1 2               => fresh 1 2
            5: -                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
            20: freeze           => held 1 2 (`file:services.d` reports a change of this service and is frozen: no change is applied until the operator thaws the source)
            100: 3               => held 1 2 (`file:services.d` reports a change of this service and is frozen: no change is applied until the operator thaws the source)
            200: -               => held 1 2 (`file:services.d` reports a change of this service and is frozen: no change is applied until the operator thaws the source)
            300: thaw            => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 330
            329:                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 330
            330:                 => gone
        "#]],
    );
    file(
        "0: freeze\n1: 1 2\n2: 1 2 3\n3: thaw",
        expect![[r#"
            0: freeze            => gone
            1: 1 2               => fresh 1 2
            2: 1 2 3             => held 1 2 (`file:services.d` reports a change of this service and is frozen: no change is applied until the operator thaws the source)
            3: thaw              => fresh 1 2 3
        "#]],
    );
}

#[test]
fn what_is_accepted_goes_at_once_and_is_not_doubted_again() {
    registry(
        "0: 1 2 3 4 5 6\n5: 1 2\n6: accept\n7: 1",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: 1 2               => held 1 2 3 4 5 6 (`file:services.d` lists 2 endpoints of this service, which had 6: the last good state stays in force for at least 1m, in case the removal is a mistake) until 65
        6: accept            => fresh 1 2
        7: 1                 => fresh 1 2 until 17
    "#]],
    );
    registry(
        "0: 1 2\n5: -\n6: accept",
        expect![[r#"
        0: 1 2               => fresh 1 2
        5: -                 => held 1 2 (`file:services.d` no longer lists this service, which had 2 endpoints: the last good state stays in force for at least 30s, in case the removal is a mistake) until 35
        6: accept            => gone
    "#]],
    );
}

#[test]
fn without_a_hold_nothing_is_read_again() {
    let nothing = GuardConfig {
        confirm_empty: Duration::ZERO,
        confirm_shrink: Duration::ZERO,
        confirm_unhealthy: Duration::ZERO,
        removal_hold: Some(Duration::ZERO),
        ..GuardConfig::default()
    };
    run(
        nothing,
        "0: 1h 2h 3h 4h 5h 6h\n1: 1u 2u 3u 4u 5u 6u\n2: 1\n3: .\n4: 1\n5: -",
        expect![[r#"
        0: 1h 2h 3h 4h 5h 6h => fresh 1h 2h 3h 4h 5h 6h
        1: 1u 2u 3u 4u 5u 6u => fresh 1u 2u 3u 4u 5u 6u
        2: 1                 => fresh 1
        3: .                 => fresh 
        4: 1                 => fresh 1
        5: -                 => gone
    "#]],
    );
}
