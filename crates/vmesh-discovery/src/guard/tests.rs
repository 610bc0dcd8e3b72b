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
fn seen(service: &str, endpoints: &str) -> ServiceView {
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

fn ports(seen: &ServiceView) -> Vec<String> {
    let mark = |e: &Endpoint| match e.health {
        Health::Draining => "d",
        Health::Unhealthy => "u",
        Health::Healthy => "h",
        Health::Unknown => "",
    };
    seen.registration.endpoints.iter().map(|e| format!("{}{}", e.address.port(), mark(e))).collect()
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
        let (second, said) = line.split_once(':').unwrap();
        let now = start + Duration::from_secs(second.parse().unwrap());
        sim.until(now);
        match said.trim() {
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
            said => {
                let reported = ServiceView {
                    empty_on_purpose: said == "[]",
                    ..seen("orders", said.trim_matches(['[', ']', '.']))
                };
                let services = std::iter::once((orders.clone(), reported)).collect();
                sim.observe(Registrations { services, ..Registrations::default() }, now);
            }
        }
        let believed = sim.judge(now);
        shown += &format!("{line:<20} => ");
        match believed.services.get("orders") {
            None => shown += "gone",
            Some(seen) => {
                shown += &format!("{} {}", seen.state, ports(seen).join(" "));
                shown += &seen.because.as_ref().map(|because| format!(" ({because})")).unwrap_or_default();
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
            5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            34:                  => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            35:                  => gone
        "#]],
    );
    file(
        "0: 1 2\n5: -\n20: 1\n40: -\n69:\n70:",
        expect![[r#"
            0: 1 2               => fresh 1 2
            5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            20: 1                => fresh 1
            40: -                => held 1 (`file:services.d` no longer names it, and it had 1 endpoint: what was known stays for 30s at least, in case that is a mistake) until 70
            69:                  => held 1 (`file:services.d` no longer names it, and it had 1 endpoint: what was known stays for 30s at least, in case that is a mistake) until 70
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
            5: .                 => held 1 (`file:services.d` names no endpoint of it any more, and it had 1 endpoint: what was known stays for 30s at least, in case that is a mistake) until 35
            34:                  => held 1 (`file:services.d` names no endpoint of it any more, and it had 1 endpoint: what was known stays for 30s at least, in case that is a mistake) until 35
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
            5: 1 2 3 4           => held 1 2 3 4 5 6 7 8 9 10 (`file:services.d` names 4 endpoints of it, and it had 10: what was known stays for 1m at least, in case that is a mistake) until 65
            10: 1 2 3 11         => held 1 2 3 4 5 6 7 8 9 10 11 (`file:services.d` names 4 endpoints of it, and it had 10: what was known stays for 1m at least, in case that is a mistake) until 65
            64:                  => held 1 2 3 4 5 6 7 8 9 10 11 (`file:services.d` names 4 endpoints of it, and it had 10: what was known stays for 1m at least, in case that is a mistake) until 65
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
            5: 1 2               => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m at least, in case that is a mistake) until 65
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
            5: 1                 => held 1 2 3 4 5 6 (`file:services.d` names 1 endpoint of it, and it had 6: what was known stays for 1m at least, in case that is a mistake) until 65
            60: -                => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s at least, in case that is a mistake) until 90
            65:                  => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s at least, in case that is a mistake) until 90
            89:                  => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s at least, in case that is a mistake) until 90
            90:                  => gone
        "#]],
    );
    file(
        "0: 1 2 3 4 5 6\n5: -\n20: 1 2\n64:\n65:",
        expect![[r#"
            0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
            5: -                 => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            20: 1 2              => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m at least, in case that is a mistake) until 65
            64:                  => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m at least, in case that is a mistake) until 65
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
            1: 1                 => held 1 2 3 4 5 (`file:services.d` names 1 endpoint of it, and it had 5: what was known stays for 1m at least, in case that is a mistake) until 61
            60: 2                => held 1 2 3 4 5 (`file:services.d` names 1 endpoint of it, and it had 5: what was known stays for 1m at least, in case that is a mistake) until 61
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
            3: 1 2 3             => held 1 2 3 4 5 6 7 8 (`file:services.d` names 3 endpoints of it, and it had 8: what was known stays for 1m at least, in case that is a mistake) until 63
            10:                  => held 1 2 3 4 5 6 7 8 (`file:services.d` names 3 endpoints of it, and it had 8: what was known stays for 1m at least, in case that is a mistake) until 63
            62:                  => held 1 2 3 4 5 6 7 8 (`file:services.d` names 3 endpoints of it, and it had 8: what was known stays for 1m at least, in case that is a mistake) until 63
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
            5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            10: failed           => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake)
            90:                  => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake)
            100: -               => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 130
            129:                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 130
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
        services: std::iter::once(("orders".parse().unwrap(), seen("orders", "1 2"))).collect(),
        ..Registrations::default()
    };
    let now = Instant::now();
    let mut guard = Guard::restored("file:services.d", GuardConfig::default(), &last_good);
    assert_eq!(guard.judge(now), last_good);
    guard.observe(Registrations::default(), now);
    let believed = guard.judge(now);
    assert_eq!(ports(&believed.services["orders"]), ["1", "2"]);
    assert_eq!(believed.services["orders"].state, State::Held);
    expect!["orders.yaml:1:1: `file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake"].assert_eq(&believed.problems[0].to_string());
}

#[test]
fn what_did_not_change_keeps_its_pointer() {
    let now = Instant::now();
    let mut guard = Guard::new("file:services.d", GuardConfig::default());
    let reported = |endpoints| Registrations {
        services: std::iter::once(("orders".parse().unwrap(), seen("orders", endpoints))).collect(),
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
            5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            35:                  => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            600:                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
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
            20: 1u 2u 3u         => held 1h 2h 3 (`file:services.d` says that all its endpoints (3) became unhealthy within 30s: what was known of their health stays for as long, in case it is the checks that fail) until 50
            25: 1u 2u 3u 4       => held 1h 2h 3 4 (`file:services.d` says that all its endpoints (3) became unhealthy within 30s: what was known of their health stays for as long, in case it is the checks that fail) until 50
            26: 1u 2u 3u         => held 1h 2h 3 4 (`file:services.d` says that all its endpoints (3) became unhealthy within 30s: what was known of their health stays for as long, in case it is the checks that fail) until 50
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
        1: 1u 2u             => held 1h 2h (`file:services.d` says that all its endpoints (2) became unhealthy within 30s: what was known of their health stays for as long, in case it is the checks that fail) until 31
        10: 1h 2u            => fresh 1h 2u
        31: 1u 2u            => held 1h 2h (`file:services.d` says that all its endpoints (2) became unhealthy within 30s: what was known of their health stays for as long, in case it is the checks that fail) until 61
    "#]],
    );
    registry(
        "0: 1h 2h\n1: 1u 2u\n10: accept\n15: 1u 2u",
        expect![[r#"
        0: 1h 2h             => fresh 1h 2h
        1: 1u 2u             => held 1h 2h (`file:services.d` says that all its endpoints (2) became unhealthy within 30s: what was known of their health stays for as long, in case it is the checks that fail) until 31
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
            5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
            20: freeze           => held 1 2 (`file:services.d` says something else of it now, and is frozen: no change of it is taken until it is thawed)
            100: 3               => held 1 2 (`file:services.d` says something else of it now, and is frozen: no change of it is taken until it is thawed)
            200: -               => held 1 2 (`file:services.d` says something else of it now, and is frozen: no change of it is taken until it is thawed)
            300: thaw            => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 330
            329:                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 330
            330:                 => gone
        "#]],
    );
    file(
        "0: freeze\n1: 1 2\n2: 1 2 3\n3: thaw",
        expect![[r#"
            0: freeze            => gone
            1: 1 2               => fresh 1 2
            2: 1 2 3             => held 1 2 (`file:services.d` says something else of it now, and is frozen: no change of it is taken until it is thawed)
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
        5: 1 2               => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m at least, in case that is a mistake) until 65
        6: accept            => fresh 1 2
        7: 1                 => fresh 1 2 until 17
    "#]],
    );
    registry(
        "0: 1 2\n5: -\n6: accept",
        expect![[r#"
        0: 1 2               => fresh 1 2
        5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s at least, in case that is a mistake) until 35
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

/// Runs a script with several services, such as `10: a 1 2; b 3`. `a 1+20` stands for 20 endpoints from port
/// 1 on.
fn fleet(config: GuardConfig, script: &str, expected: Expect) {
    let start = Instant::now();
    let mut sim = Sim::of(config);
    let mut shown = String::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (second, said) = line.split_once(':').unwrap();
        let now = start + Duration::from_secs(second.parse().unwrap());
        sim.until(now);
        match said.trim() {
            "" => {}
            "accept" => _ = sim.guard.accept(None).unwrap(),
            said if said.starts_with("accept ") => {
                _ = sim.guard.accept(Some(&said["accept ".len()..].parse().unwrap())).unwrap();
            }
            "failed" => sim.guard.source_failed(now),
            said => {
                let mut reported = Registrations::default();
                for service in said.split(';') {
                    let (name, endpoints) = service.trim().split_once(' ').unwrap_or((service.trim(), ""));
                    let mut ports = String::new();
                    for word in endpoints.split_whitespace() {
                        let (from, count) = word.split_once('+').unwrap_or((word, "1"));
                        let (count, mark) = match count.strip_suffix('d') {
                            Some(count) => (count, "d"),
                            None => (count, ""),
                        };
                        match from.parse::<u16>() {
                            Ok(from) => (from..from + count.parse::<u16>().unwrap())
                                .for_each(|port| ports += &format!("{port}{mark} ")),
                            Err(_) => ports += word,
                        }
                    }
                    // An unchanged service keeps its pointer, as in a real source.
                    let now = seen(name, &ports);
                    let same = sim
                        .reported
                        .services
                        .get(name)
                        .filter(|known| known.registration == now.registration);
                    reported.services.insert(name.parse().unwrap(), same.cloned().unwrap_or(now));
                }
                sim.observe(reported, now);
            }
        }
        let believed = sim.judge(now);
        let counts = believed.services.iter().map(|(name, seen)| {
            format!(
                "{name} {}{}",
                seen.registration.endpoints.len(),
                if seen.state == State::Held { "!" } else { "" }
            )
        });
        shown += &format!("{line:<24} => {}", counts.collect::<Vec<_>>().join(", "));
        if let Some(fleet) = sim.guard.held_changes().iter().find(|held| held.service.is_none()) {
            shown += &format!(" ({})", fleet.because);
        }
        shown += "\n";
    }
    expected.assert_eq(&shown);
}

#[test]
fn a_source_that_loses_much_of_all_at_once_loses_nothing_until_that_is_accepted() {
    // Each service loses half of its endpoints, so no service is suspicious by itself.
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10; c 1+10\n100: a 1+5; b 1+5; c 1+5\n200:\n100000: a 1+5; b 1+5; c 1+5 50\n100001: accept\n100002: a 1+5; b 1+5; c 1+5",
        expect![[r#"
            0: a 1+10; b 1+10; c 1+10 => a 10, b 10, c 10
            100: a 1+5; b 1+5; c 1+5 => a 10!, b 10!, c 10! (`file:services.d` names 15 of the 30 endpoints and 3 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            200:                     => a 10!, b 10!, c 10! (`file:services.d` names 15 of the 30 endpoints and 3 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            100000: a 1+5; b 1+5; c 1+5 50 => a 10!, b 10!, c 11! (`file:services.d` names 15 of the 30 endpoints and 3 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            100001: accept           => a 5, b 5, c 6
            100002: a 1+5; b 1+5; c 1+5 => a 5, b 5, c 6
        "#]],
    );
    // The source lists enough again; endpoints still missing are removed after `removal_hold`.
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10; c 1+10\n100: a 1+5; b 1+5; c 1+5\n200: a 1+10; b 1+8; c 1+8\n209:\n210:",
        expect![[r#"
            0: a 1+10; b 1+10; c 1+10 => a 10, b 10, c 10
            100: a 1+5; b 1+5; c 1+5 => a 10!, b 10!, c 10! (`file:services.d` names 15 of the 30 endpoints and 3 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            200: a 1+10; b 1+8; c 1+8 => a 10, b 10, c 10
            209:                     => a 10, b 10, c 10
            210:                     => a 10, b 8, c 8
        "#]],
    );
    // The source loses two services entirely, and the operator accepts them one by one.
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10; c 1+10\n100: a 1+10\n101: failed\n1000: a 1+10\n2000: accept b\n2001: accept c\n2002: a 1+9\n2012:",
        expect![[r#"
            0: a 1+10; b 1+10; c 1+10 => a 10, b 10, c 10
            100: a 1+10              => a 10, b 10!, c 10! (`file:services.d` names 10 of the 30 endpoints and 1 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            101: failed              => a 10, b 10!, c 10! (`file:services.d` names 10 of the 30 endpoints and 1 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            1000: a 1+10             => a 10, b 10!, c 10! (`file:services.d` names 10 of the 30 endpoints and 1 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            2000: accept b           => a 10, c 10! (`file:services.d` names 10 of the 30 endpoints and 1 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            2001: accept c           => a 10
            2002: a 1+9              => a 10
            2012:                    => a 9
        "#]],
    );
}

#[test]
fn small_steps_within_the_window_are_one_large_one_and_slow_ones_are_none() {
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10; c 1+10\n100: a 1+7; b 1+10; c 1+10\n115: a 1+7; b 1+7; c 1+10\n130: a 1+7; b 1+7; c 1+7\n145: a 1+6; b 1+7; c 1+7",
        expect![[r#"
            0: a 1+10; b 1+10; c 1+10 => a 10, b 10, c 10
            100: a 1+7; b 1+10; c 1+10 => a 10, b 10, c 10
            115: a 1+7; b 1+7; c 1+10 => a 7, b 10, c 10
            130: a 1+7; b 1+7; c 1+7 => a 7, b 7, c 10
            145: a 1+6; b 1+7; c 1+7 => a 7!, b 7, c 7 (`file:services.d` names 20 of the 30 endpoints and 3 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
        "#]],
    );
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10; c 1+10\n100: a 1+7; b 1+10; c 1+10\n135: a 1+7; b 1+7; c 1+10\n170: a 1+7; b 1+7; c 1+7\n205: a 1+6; b 1+7; c 1+7\n215:",
        expect![[r#"
            0: a 1+10; b 1+10; c 1+10 => a 10, b 10, c 10
            100: a 1+7; b 1+10; c 1+10 => a 10, b 10, c 10
            135: a 1+7; b 1+7; c 1+10 => a 7, b 10, c 10
            170: a 1+7; b 1+7; c 1+7 => a 7, b 7, c 10
            205: a 1+6; b 1+7; c 1+7 => a 7, b 7, c 7
            215:                     => a 6, b 7, c 7
        "#]],
    );
}

#[test]
fn a_replacement_a_drain_and_a_small_source_are_no_loss() {
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10\n100: a 101+10; b 101+10\n110:",
        expect![[r#"
        0: a 1+10; b 1+10        => a 10, b 10
        100: a 101+10; b 101+10  => a 20, b 20
        110:                     => a 10, b 10
    "#]],
    );
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10\n100: a 1+10 101+10; b 1+10 101+10\n140: a 101+10; b 101+10\n150:",
        expect![[r#"
            0: a 1+10; b 1+10        => a 10, b 10
            100: a 1+10 101+10; b 1+10 101+10 => a 20, b 20
            140: a 101+10; b 101+10  => a 20, b 20
            150:                     => a 10, b 10
        "#]],
    );
    fleet(
        GuardConfig::default(),
        "0: a 1+10; b 1+10\n100: a 1+5 6+5d; b 1+5 6+5d\n110: a 1+5; b 1+5",
        expect![[r#"
            0: a 1+10; b 1+10        => a 10, b 10
            100: a 1+5 6+5d; b 1+5 6+5d => a 10, b 10
            110: a 1+5; b 1+5        => a 5, b 5
        "#]],
    );
    fleet(
        GuardConfig::default(),
        "0: a 1+9; b 1+10\n100: a 1+5; b 1+5\n110:",
        expect![[r#"
        0: a 1+9; b 1+10         => a 9, b 10
        100: a 1+5; b 1+5        => a 9, b 10
        110:                     => a 5, b 5
    "#]],
    );
}

#[test]
fn services_that_are_gone_count_as_such_but_one_alone_is_judged_by_itself() {
    fleet(
        GuardConfig::default(),
        "0: a 1+20; b 1; c 1; d 1\n100: a 1+20; c 1; d 1\n130:\n200: a 1+20; c 1\n201: a 1+20",
        expect![[r#"
            0: a 1+20; b 1; c 1; d 1 => a 20, b 1, c 1, d 1
            100: a 1+20; c 1; d 1    => a 20, b 1!, c 1, d 1
            130:                     => a 20, c 1, d 1
            200: a 1+20; c 1         => a 20, c 1, d 1!
            201: a 1+20              => a 20, c 1!, d 1! (`file:services.d` names 20 of the 22 endpoints and 1 of the 3 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
        "#]],
    );
}

#[test]
fn a_small_source_that_loses_everything_is_held_too() {
    fleet(
        GuardConfig::default(),
        "0: a 1+3; b 1+2\n100: c\n200:\n210: a 1+3; b 1+2\n220:\n300: c\n400: accept",
        expect![[r#"
            0: a 1+3; b 1+2          => a 3, b 2
            100: c                   => a 3!, b 2!, c 0 (`file:services.d` names 0 of the 5 endpoints and 0 of the 2 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            200:                     => a 3!, b 2!, c 0 (`file:services.d` names 0 of the 5 endpoints and 0 of the 2 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            210: a 1+3; b 1+2        => a 3, b 2
            220:                     => a 3, b 2
            300: c                   => a 3!, b 2!, c 0 (`file:services.d` names 0 of the 5 endpoints and 0 of the 2 services that it named within the last 1m: nothing of it is taken away until it names enough again or that is accepted)
            400: accept              => c 0
        "#]],
    );
    // A single service is judged by its own rules.
    fleet(
        GuardConfig::default(),
        "0: a 1+3\n100: c\n130:",
        expect![[r#"
        0: a 1+3                 => a 3
        100: c                   => a 3!, c 0
        130:                     => c 0
    "#]],
    );
}

#[test]
fn what_was_left_because_it_could_not_be_read_is_never_confirmed() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let orders: ServiceName = "orders".parse().unwrap();
    let reported = |seen: ServiceView| Registrations {
        services: std::iter::once((orders.clone(), seen)).collect(),
        ..Registrations::default()
    };
    let mut sim = Sim::of(GuardConfig::default());
    sim.observe(reported(seen("orders", "1 2 3")), at(0));
    sim.judge(at(0));
    let nothing = seen("orders", "").registration;
    sim.observe(reported(ServiceView::stale(nothing.clone(), "`vm-1` cannot be resolved")), at(10));
    sim.judge(at(10));
    sim.until(at(3600));
    let believed = sim.judge(at(3600));
    assert_eq!(ports(&believed.services["orders"]), ["1", "2", "3"]);
    let why = sim.guard.held_changes().first().unwrap().because.clone();
    assert!(why.ends_with("has failed: `vm-1` cannot be resolved"), "{why}");
    // The service is readable and has no endpoints.
    sim.observe(reported(ServiceView::fresh(nothing)), at(3610));
    sim.judge(at(3610));
    sim.until(at(3700));
    assert!(sim.judge(at(3700)).services["orders"].registration.endpoints.is_empty());
}

const SERVICES: [&str; 3] = ["a", "b", "c"];

#[derive(Debug, Clone)]
enum Step {
    /// The source lists these endpoints of each service; `None` if the service is absent.
    Says([Option<BTreeSet<u16>>; 3]),
    Fails,
    CanBeReadAgain(bool),
    Accept(usize),
}

fn step() -> impl Strategy<Value = Step> {
    let service = || prop::option::weighted(0.9, prop::collection::btree_set(1u16..20, 0..20));
    prop_oneof![
        8 => [service(), service(), service()].prop_map(Step::Says),
        1 => Just(Step::Fails),
        1 => any::<bool>().prop_map(Step::CanBeReadAgain),
        1 => (0..SERVICES.len()).prop_map(Step::Accept),
    ]
}

/// A simple model of the rules: it decides by looking back at the complete history.
#[derive(Default)]
struct Model {
    /// The listed endpoints of each service over time. A failing source adds no entry.
    said: [Vec<(Option<Instant>, BTreeSet<u16>)>; 3],
    /// The history of the total number of endpoints.
    totals: Vec<(Instant, usize)>,
    /// Set while the source lists less than 65 % of this number, which it listed throughout the window
    /// before.
    fleet: Option<usize>,
    /// The largest number of listed endpoints of each service since a served endpoint went missing.
    most: [usize; 3],
    /// Set while a service lists less than half of at least five earlier endpoints: the start time, and the
    /// earlier number.
    few: [Option<(Instant, usize)>; 3],
    failing: bool,
}

impl Model {
    fn says(&mut self, says: &[Option<BTreeSet<u16>>; 3], before: &Registrations, now: Instant) {
        let again = std::mem::take(&mut self.failing);
        for (at, says) in says.iter().enumerate() {
            let said = self.said[at].last().map(|(_, said)| said.clone()).unwrap_or_default();
            let is_all_named = shown(before, at) == said;
            self.most[at] = if is_all_named { said.len() } else { self.most[at].max(said.len()) };
            let before = self.most[at];
            let says = says.clone().unwrap_or_default();
            if again {
                self.said[at].iter_mut().for_each(|(since, _)| *since = since.map(|_| now));
            }
            self.few[at] = match self.few[at] {
                Some((_, of)) if says.len() * 2 >= of => None,
                Some((since, of)) => Some((if again { now } else { since }, of)),
                None if before >= 5 && says.len() * 2 < before => Some((now, before)),
                None => None,
            };
            self.said[at].push((Some(now), says));
        }
        let total = says.iter().flatten().map(BTreeSet::len).sum();
        let window = Duration::from_secs(60);
        let begin = self.totals.iter().rposition(|(since, _)| *since + window <= now).unwrap_or(0);
        let least = self.totals[begin..].iter().map(|(_, total)| *total).min().unwrap_or(0);
        let is_little = |of: usize| total * 100 < of * 65;
        self.fleet = match self.fleet {
            Some(of) if is_little(of) => Some(of),
            _ => (least >= 20 && is_little(least)).then_some(least),
        };
        self.totals.push((now, total));
    }

    /// Returns `Ok` if `port` of a service may be removed at `now`.
    fn allows(&mut self, at: usize, port: u16, read: &[Instant], now: Instant) -> Result<(), String> {
        let said = &self.said[at];
        // Returns since when `holds` has been true of every entry up to the latest.
        let since = |holds: &dyn Fn(&BTreeSet<u16>) -> bool| {
            let last = said.iter().rposition(|(_, said)| !holds(said)).map_or(0, |at| at + 1);
            said.get(last).and_then(|(since, _)| *since)
        };
        let reads_since = |since: Instant| read.iter().filter(|at| **at >= since).count();
        let Some(unnamed) = since(&|said| !said.contains(&port)) else { return Err("it is named".into()) };
        if now < unnamed + Duration::from_secs(10) {
            return Err("it is not named for less than 10 s".into());
        }
        if self.failing {
            return Err("the source does not answer".into());
        }
        if self.fleet.is_some() {
            return Err("too much of all is gone".into());
        }
        if let Some(empty) = since(&|said| said.is_empty()) {
            return match now >= empty + Duration::from_secs(30) && reads_since(empty) >= 2 {
                true => Ok(()),
                false => Err("nothing is named of it, and that is not confirmed".into()),
            };
        }
        if let Some((few, _)) = self.few[at]
            && (now < few + Duration::from_secs(60) || reads_since(few) < 2)
        {
            return Err("little is named of it, and that is not confirmed".into());
        }
        Ok(())
    }
}

fn shown(believed: &Registrations, at: usize) -> BTreeSet<u16> {
    let seen = believed.services.get(SERVICES[at]);
    seen.into_iter().flat_map(|seen| seen.registration.endpoints.iter()).map(|e| e.address.port()).collect()
}

proptest! {
    /// For any history of a source: an addition is served at once, no endpoint is removed earlier than the
    /// rules allow, and once the source has been quiet for a while, the served endpoints are the listed ones.
    #[test]
    fn the_guard_only_ever_delays_and_never_takes_away_what_it_may_not(
        steps in prop::collection::vec((0u64..50, step()), 1..40),
    ) {
        let mut sim = Sim::of(GuardConfig::default());
        let mut model = Model::default();
        let mut now = Instant::now();
        let mut before = Registrations::default();
        let mut reported: [Option<BTreeSet<u16>>; 3] = Default::default();
        for (wait, step) in steps {
            now += Duration::from_secs(wait);
            sim.until(now);
            let mut accepted = None;
            let waited = sim.believed.len();
            check(&mut sim.believed, &sim.read, &mut model, &mut before, None)?;
            prop_assert!(waited < 1000, "it never comes to rest");
            match step {
                Step::Says(says) => {
                    let mut view = Registrations::default();
                    for (name, ports) in SERVICES.iter().zip(&says) {
                        let Some(ports) = ports else { continue };
                        let text: String = ports.iter().map(|port| format!("{port} ")).collect();
                        view.services.insert(name.parse().unwrap(), seen(name, &text));
                    }
                    sim.observe(view, now);
                    model.says(&says, &before, now);
                    reported = says;
                }
                Step::Fails => {
                    sim.guard.source_failed(now);
                    model.failing = true;
                }
                Step::CanBeReadAgain(can) => sim.unreadable = !can,
                Step::Accept(at) => {
                    let name = SERVICES[at].parse().unwrap();
                    if sim.guard.accept(Some(&name)).is_ok() {
                        accepted = Some(at);
                        model.fleet = None;
                        model.few[at] = None;
                    }
                }
            }
            let believed = sim.judge(now);
            for (at, reported) in reported.iter().enumerate() {
                let reported = reported.clone().unwrap_or_default();
                prop_assert!(shown(&believed, at).is_superset(&reported), "told and not shown");
            }
            check(&mut sim.believed, &sim.read, &mut model, &mut before, accepted)?;
        }
        // The source answers, does not change and is readable again. This ends every hold, except a fleet
        // hold, which only the operator ends.
        sim.unreadable = false;
        let last = sim.reported.clone();
        sim.observe(last, now);
        for _ in 0..100 {
            let Some(deadline) = sim.guard.deadline() else { break };
            // A confirming read may be overdue, if it was useless while the service was held for another
            // reason.
            now = now.max(deadline);
            sim.until(now);
        }
        prop_assert!(sim.guard.deadline().is_none());
        let mut believed = sim.judge(now);
        if sim.guard.held_changes().iter().any(|held| held.kind == HoldKind::Fleet) {
            sim.guard.accept(None).unwrap();
            believed = sim.judge(now);
        }
        prop_assert!(sim.guard.held_changes().is_empty() && sim.guard.missing_endpoints() == 0);
        for (at, reported) in reported.iter().enumerate() {
            prop_assert_eq!(shown(&believed, at), reported.clone().unwrap_or_default());
        }
    }
}

/// Checks that the model allows every removal between consecutive views in `believed`.
fn check(
    believed: &mut Vec<(Instant, Registrations)>,
    read: &[Instant],
    model: &mut Model,
    before: &mut Registrations,
    accepted: Option<usize>,
) -> Result<(), TestCaseError> {
    for (now, believed) in believed.drain(..) {
        for (at, name) in SERVICES.iter().enumerate() {
            let (old, new) = (shown(before, at), shown(&believed, at));
            for port in old.difference(&new).filter(|_| accepted != Some(at)) {
                let allowed = model.allows(at, *port, read, now);
                prop_assert!(allowed.is_ok(), "{port} of {name} went: {}", allowed.unwrap_err());
            }
            if old.difference(&new).next().is_some() && model.few[at].take().is_some() {
                // The smaller number of endpoints is believed from now on.
                model.most[at] = model.said[at].last().map_or(0, |(_, said)| said.len());
            }
        }
        *before = believed;
    }
    Ok(())
}

fn reported_services(services: impl IntoIterator<Item = ServiceView>) -> Registrations {
    let services = services.into_iter().map(|seen| (seen.registration.service.clone(), seen)).collect();
    Registrations { services, ..Registrations::default() }
}

#[test]
fn what_can_be_read_in_part_is_followed_and_loses_nothing_until_all_can_or_that_is_accepted() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let part = |endpoints: &str| ServiceView {
        extent: Extent::Part,
        because: Some("3 of 6 records are bad".into()),
        ..seen("pay", endpoints)
    };
    let name: ServiceName = "pay".parse().unwrap();
    for accepts in [false, true] {
        let mut guard = Guard::new("consul", GuardConfig::default());
        guard.observe(reported_services([seen("pay", "1 2 3 4")]), at(0));
        guard.judge(at(0));
        // One addition, one endpoint that becomes unhealthy, and three endpoints that are no longer listed.
        guard.observe(reported_services([part("1u 5")]), at(1));
        let believed = guard.judge(at(600));
        assert_eq!(ports(&believed.services[&name]), ["1u", "2", "3", "4", "5"]);
        let held = guard.held_changes();
        assert_eq!((held.len(), held[0].kind, held[0].had, held[0].has), (1, HoldKind::Unreadable, 5, 2));
        assert!(held[0].because.contains("3 endpoints that are not named stay"), "{}", held[0].because);
        assert!(guard.take_notices().iter().any(|notice| notice.kind == NoticeKind::Held));
        assert_eq!(guard.deadline(), None, "time alone ends it not");
        if accepts {
            assert_eq!(guard.accept(Some(&name)).unwrap(), std::slice::from_ref(&name));
            assert_eq!(ports(&guard.judge(at(601)).services[&name]), ["1u", "5"]);
            assert!(guard.held_changes().is_empty());
        } else {
            // The service is fully readable: missing endpoints are removed after `removal_hold`, not at once.
            guard.observe(reported_services([seen("pay", "1 2 3 5")]), at(700));
            assert_eq!(ports(&guard.judge(at(701)).services[&name]), ["1", "2", "3", "4", "5"]);
            assert_eq!(ports(&guard.judge(at(711)).services[&name]), ["1", "2", "3", "5"]);
        }
    }
}

#[test]
fn what_is_served_though_its_source_cannot_say_it_is_listed_and_can_be_accepted() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let known = seen("pay", "1 2");
    let unread = ServiceView {
        extent: Extent::Nothing,
        state: State::Stale,
        because: Some("Consul lists it, and shows no instance of it".into()),
        ..known.clone()
    };
    let name: ServiceName = "pay".parse().unwrap();
    let mut guard = Guard::restored("consul", GuardConfig::default(), &reported_services([known]));
    guard.observe(reported_services([unread.clone(), seen("web", "7")]), at(0));
    assert_eq!(ports(&guard.judge(at(3600)).services[&name]), ["1", "2"]);
    let held: Vec<_> = guard
        .held_changes()
        .iter()
        .map(|held| (held.service.clone(), held.kind, held.had, held.has))
        .collect();
    assert_eq!(held, [(Some(name.clone()), HoldKind::Unreadable, 2, 0)]);
    guard.accept(Some(&name)).unwrap();
    // The service stays removed while the source reports no change.
    guard.observe(reported_services([unread, seen("web", "7")]), at(3700));
    assert!(!guard.judge(at(3700)).services.contains_key(&name));
    assert!(guard.held_changes().is_empty());
    guard.observe(reported_services([seen("pay", "3"), seen("web", "7")]), at(3800));
    assert_eq!(ports(&guard.judge(at(3800)).services[&name]), ["3"]);
}
