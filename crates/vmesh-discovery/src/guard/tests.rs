use expect_test::{Expect, expect};
use proptest::prelude::*;
use vmesh_model::{Labels, Place, Weight};

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

/// `1 2 3d`: endpoints by their ports, those with `d` draining.
fn seen(service: &str, endpoints: &str) -> Seen {
    let endpoint = |word: &str| match word.strip_suffix('d') {
        Some(port) => endpoint(port.parse().unwrap(), Health::Draining),
        None => endpoint(word.parse().unwrap(), Health::Unknown),
    };
    let mut endpoints: Vec<_> = endpoints.split_whitespace().map(endpoint).collect();
    endpoints.sort_by_key(|e| e.address);
    Seen::fresh(Arc::new(Registration {
        service: service.parse().unwrap(),
        protocol: None,
        port: None,
        endpoints: endpoints.into(),
        place: Place::at("orders.yaml", 1, 1),
    }))
}

fn ports(seen: &Seen) -> Vec<String> {
    let mark = |e: &Endpoint| if e.health == Health::Draining { "d" } else { "" };
    seen.registration.endpoints.iter().map(|e| format!("{}{}", e.address.port(), mark(e))).collect()
}

/// What a source says at which second, a line each: `10: orders 1 2 3`. `-` is a service that is absent, `[]` one that
/// is empty on purpose, `failed` a source that does not answer, and a line without anything lets the time pass.
fn run(config: GuardConfig, script: &str, expected: Expect) {
    let start = Instant::now();
    let mut guard = Guard::new("file:services.d", config);
    let mut shown = String::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (second, said) = line.split_once(':').unwrap();
        let now = start + Duration::from_secs(second.parse().unwrap());
        match said.trim() {
            "" => {}
            "failed" => {
                guard.source_failed(now);
            }
            "-" => guard.see(Registrations::default(), now),
            "emptied" => {
                let emptied = std::iter::once("orders".parse().unwrap()).collect();
                guard.see(Registrations { emptied, ..Registrations::default() }, now);
            }
            said => {
                let told = Seen {
                    empty_on_purpose: said == "[]",
                    ..seen("orders", said.trim_matches(['[', ']', '.']))
                };
                let services = std::iter::once(("orders".parse().unwrap(), told)).collect();
                guard.see(Registrations { services, ..Registrations::default() }, now);
            }
        }
        let believed = guard.believed(now);
        shown += &format!("{line:<20} => ");
        match believed.services.get("orders") {
            None => shown += "gone",
            Some(seen) => {
                shown += &format!("{} {}", seen.state, ports(seen).join(" "));
                shown += &seen.because.as_ref().map(|because| format!(" ({because})")).unwrap_or_default();
            }
        }
        if let Some(deadline) = guard.deadline() {
            shown += &format!(" until {}", (deadline - start).as_secs());
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
        5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake) until 35
        34:                  => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake) until 35
        35:                  => gone
    "#]],
    );
    file(
        "0: 1 2\n5: -\n20: 1\n40: -\n69:\n70:",
        expect![[r#"
        0: 1 2               => fresh 1 2
        5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake) until 35
        20: 1                => fresh 1
        40: -                => held 1 (`file:services.d` no longer names it, and it had 1 endpoint: what was known stays for 30s, in case that is a mistake) until 70
        69:                  => held 1 (`file:services.d` no longer names it, and it had 1 endpoint: what was known stays for 30s, in case that is a mistake) until 70
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
        5: .                 => held 1 (`file:services.d` names no endpoint of it any more, and it had 1 endpoint: what was known stays for 30s, in case that is a mistake) until 35
        34:                  => held 1 (`file:services.d` names no endpoint of it any more, and it had 1 endpoint: what was known stays for 30s, in case that is a mistake) until 35
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
        5: 1 2 3 4           => held 1 2 3 4 5 6 7 8 9 10 (`file:services.d` names 4 endpoints of it, and it had 10: what was known stays for 1m, in case that is a mistake) until 65
        10: 1 2 3 11         => held 1 2 3 4 5 6 7 8 9 10 11 (`file:services.d` names 4 endpoints of it, and it had 10: what was known stays for 1m, in case that is a mistake) until 65
        64:                  => held 1 2 3 4 5 6 7 8 9 10 11 (`file:services.d` names 4 endpoints of it, and it had 10: what was known stays for 1m, in case that is a mistake) until 65
        65:                  => fresh 1 2 3 11
        66: 1 2 11           => fresh 1 2 11
    "#]],
    );
    // Half is left; and few were there.
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
    // Replacing all of them is a deployment.
    file(
        "0: 1 2 3 4 5 6\n5: 11 12 13 14 15 16",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: 11 12 13 14 15 16 => fresh 11 12 13 14 15 16
    "#]],
    );
    // It recovers, and what went meanwhile goes.
    file(
        "0: 1 2 3 4 5 6\n5: 1 2\n10: 1 2 3 4",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: 1 2               => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m, in case that is a mistake) until 65
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
        5: 1                 => held 1 2 3 4 5 6 (`file:services.d` names 1 endpoint of it, and it had 6: what was known stays for 1m, in case that is a mistake) until 65
        60: -                => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s, in case that is a mistake) until 90
        65:                  => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s, in case that is a mistake) until 90
        89:                  => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s, in case that is a mistake) until 90
        90:                  => gone
    "#]],
    );
    file(
        "0: 1 2 3 4 5 6\n5: -\n20: 1 2\n64:\n65:",
        expect![[r#"
        0: 1 2 3 4 5 6       => fresh 1 2 3 4 5 6
        5: -                 => held 1 2 3 4 5 6 (`file:services.d` no longer names it, and it had 6 endpoints: what was known stays for 30s, in case that is a mistake) until 35
        20: 1 2              => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m, in case that is a mistake) until 65
        64:                  => held 1 2 3 4 5 6 (`file:services.d` names 2 endpoints of it, and it had 6: what was known stays for 1m, in case that is a mistake) until 65
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
        1: 1                 => held 1 2 3 4 5 (`file:services.d` names 1 endpoint of it, and it had 5: what was known stays for 1m, in case that is a mistake) until 61
        60: 2                => held 1 2 3 4 5 (`file:services.d` names 1 endpoint of it, and it had 5: what was known stays for 1m, in case that is a mistake) until 61
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
        3: 1 2 3             => held 1 2 3 4 5 6 7 8 (`file:services.d` names 3 endpoints of it, and it had 8: what was known stays for 1m, in case that is a mistake) until 63
        10:                  => held 1 2 3 4 5 6 7 8 (`file:services.d` names 3 endpoints of it, and it had 8: what was known stays for 1m, in case that is a mistake) until 63
        62:                  => held 1 2 3 4 5 6 7 8 (`file:services.d` names 3 endpoints of it, and it had 8: what was known stays for 1m, in case that is a mistake) until 63
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
        5: -                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake) until 35
        10: failed           => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake)
        90:                  => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake)
        100: -               => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake) until 130
        129:                 => held 1 2 (`file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake) until 130
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
    assert_eq!(guard.believed(now), last_good);
    guard.see(Registrations::default(), now);
    let believed = guard.believed(now);
    assert_eq!(ports(&believed.services["orders"]), ["1", "2"]);
    assert_eq!(believed.services["orders"].state, State::Held);
    expect!["orders.yaml:1:1: `file:services.d` no longer names it, and it had 2 endpoints: what was known stays for 30s, in case that is a mistake"].assert_eq(&believed.problems[0].to_string());
}

#[test]
fn what_did_not_change_keeps_its_pointer() {
    let now = Instant::now();
    let mut guard = Guard::new("file:services.d", GuardConfig::default());
    let told = |endpoints| Registrations {
        services: std::iter::once(("orders".parse().unwrap(), seen("orders", endpoints))).collect(),
        ..Registrations::default()
    };
    guard.see(told("1 2 3"), now);
    guard.believed(now);
    guard.see(told("1 2"), now);
    let held = guard.believed(now);
    guard.see(told("1 2"), now + Duration::from_secs(1));
    let again = guard.believed(now + Duration::from_secs(1));
    assert!(Arc::ptr_eq(&held.services["orders"].registration, &again.services["orders"].registration));
}

#[test]
fn the_guard_is_configured_like_everything_else() {
    let read = |text: &str| match vmesh_model::load::strict::<GuardConfig>("control.yaml", text) {
        Ok(config) => format!("{config:?}"),
        Err(problems) => problems.iter().map(|problem| format!("{problem}\n")).collect(),
    };
    expect![[r#"GuardConfig { removal_hold: Some(0ns), confirm_empty: 60s, confirm_shrink: 120s, shrink_ratio: 0.3, shrink_min: 3, allow_empty: ["batch"] }"#]].assert_eq(&read(
        "removal_hold: 0s\nconfirm_empty: 1m\nconfirm_shrink: 2m\nshrink_ratio: 0.3\nshrink_min: 3\nallow_empty: [batch]\n",
    ));
    expect![[r#"
        control.yaml:1:1: unknown field `removal`, did you mean `removal_hold`?
        control.yaml:2:16: `confirm_empty`: `5` is not a duration: a number and a unit, such as 250ms, 2s, 1m30s or 1h
        control.yaml:3:15: `shrink_ratio`: 50 is not a share: from 0 to 1
        control.yaml:4:14: `allow_empty`: expected a list, found the text `batch`
    "#]].assert_eq(&read("removal: 5\nconfirm_empty: 5\nshrink_ratio: 50\nallow_empty: batch\n"));
}

proptest! {
    /// Whatever a source says and when: what is told is shown, nothing goes earlier than it may, and what is told for
    /// long enough is all that is shown.
    #[test]
    fn the_guard_only_ever_delays(
        steps in prop::collection::vec((0u64..40, prop::option::of(prop::collection::btree_set(1u16..12, 0..10))), 1..20),
    ) {
        let config = GuardConfig::default();
        let name: ServiceName = "orders".parse().unwrap();
        let mut guard = Guard::new("test", config);
        let mut now = Instant::now();
        // When each endpoint was last told.
        let mut last_told: BTreeMap<u16, Instant> = BTreeMap::new();
        let mut told: Option<Vec<u16>> = None;
        let mut shown: Vec<u16> = Vec::new();
        for (wait, says) in steps {
            now += Duration::from_secs(wait);
            told = says.map(|ports| ports.into_iter().collect());
            let text = told.as_ref().map(|ports| ports.iter().map(|p| format!("{p} ")).collect::<String>());
            let services = text.map(|text| (name.clone(), seen("orders", &text))).into_iter().collect();
            for port in &shown {
                last_told.entry(*port).or_insert(now);
            }
            for port in told.iter().flatten() {
                last_told.insert(*port, now);
            }
            guard.see(Registrations { services, ..Registrations::default() }, now);
            let believed = guard.believed(now);
            let now_shown: Vec<u16> = believed.services.get(&name).map(|s| s.registration.endpoints.iter().map(|e| e.address.port()).collect()).unwrap_or_default();
            for port in told.iter().flatten() {
                prop_assert!(now_shown.contains(port), "told and not shown");
            }
            // Between two steps the source said what it said at the first of them.
            let gone = shown.iter().filter(|port| !now_shown.contains(port));
            for port in gone {
                prop_assert!(now - last_told[port] >= Duration::from_secs(10), "gone too early");
            }
            let mut sorted = now_shown.clone();
            sorted.dedup();
            prop_assert_eq!(&sorted, &now_shown, "not sorted, or twice");
            shown = now_shown;
        }
        // Time alone settles it, along the deadlines.
        for _ in 0..50 {
            let Some(deadline) = guard.deadline() else { break };
            prop_assert!(deadline > now, "a deadline that has passed");
            now = deadline;
            guard.believed(now);
        }
        prop_assert!(guard.deadline().is_none());
        let believed = guard.believed(now);
        let finally: Option<Vec<u16>> = believed.services.get(&name).map(|s| s.registration.endpoints.iter().map(|e| e.address.port()).collect());
        prop_assert_eq!(finally, told);
    }
}
