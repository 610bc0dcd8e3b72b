//! Losses of a source as a whole.

use super::*;

/// Runs a script with several services, such as `10: a 1 2; b 3`. `a 1+20` stands for 20 endpoints from port
/// 1 on.
fn fleet(config: GuardConfig, script: &str, expected: Expect) {
    let start = Instant::now();
    let mut sim = Sim::of(config);
    let mut shown = String::new();
    for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (second, message) = line.split_once(':').unwrap();
        let now = start + Duration::from_secs(second.parse().unwrap());
        sim.until(now);
        match message.trim() {
            "" => {}
            "accept" => _ = sim.guard.accept(None).unwrap(),
            message if message.starts_with("accept ") => {
                _ = sim.guard.accept(Some(&message["accept ".len()..].parse().unwrap())).unwrap();
            }
            "failed" => sim.guard.source_failed(now),
            message => {
                let mut reported = Registrations::default();
                for service in message.split(';') {
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
                    let now = service_view(name, &ports);
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
        let counts = believed.services.iter().map(|(name, service_view)| {
            format!(
                "{name} {}{}",
                service_view.registration.endpoints.len(),
                if service_view.state == State::Held { "!" } else { "" }
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
            100: a 1+5; b 1+5; c 1+5 => a 10!, b 10!, c 10! (`file:services.d` lists 15 of the 30 endpoints and 3 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            200:                     => a 10!, b 10!, c 10! (`file:services.d` lists 15 of the 30 endpoints and 3 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            100000: a 1+5; b 1+5; c 1+5 50 => a 10!, b 10!, c 11! (`file:services.d` lists 15 of the 30 endpoints and 3 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
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
            100: a 1+5; b 1+5; c 1+5 => a 10!, b 10!, c 10! (`file:services.d` lists 15 of the 30 endpoints and 3 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
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
            100: a 1+10              => a 10, b 10!, c 10! (`file:services.d` lists 10 of the 30 endpoints and 1 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            101: failed              => a 10, b 10!, c 10! (`file:services.d` lists 10 of the 30 endpoints and 1 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            1000: a 1+10             => a 10, b 10!, c 10! (`file:services.d` lists 10 of the 30 endpoints and 1 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            2000: accept b           => a 10, c 10! (`file:services.d` lists 10 of the 30 endpoints and 1 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
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
            145: a 1+6; b 1+7; c 1+7 => a 7!, b 7, c 7 (`file:services.d` lists 20 of the 30 endpoints and 3 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
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
            201: a 1+20              => a 20, c 1!, d 1! (`file:services.d` lists 20 of the 22 endpoints and 1 of the 3 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
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
            100: c                   => a 3!, b 2!, c 0 (`file:services.d` lists 0 of the 5 endpoints and 0 of the 2 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            200:                     => a 3!, b 2!, c 0 (`file:services.d` lists 0 of the 5 endpoints and 0 of the 2 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
            210: a 1+3; b 1+2        => a 3, b 2
            220:                     => a 3, b 2
            300: c                   => a 3!, b 2!, c 0 (`file:services.d` lists 0 of the 5 endpoints and 0 of the 2 services that it listed within the last 1m: none of them is removed until it lists enough again or the operator accepts the loss)
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
