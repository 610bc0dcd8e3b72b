//! Files with good, bad and conflicting content, and the services that the source has of them.

use super::disk::scan;
use super::*;

#[tokio::test]
async fn a_bad_file_keeps_what_was_last_good_of_it() {
    let mut live = LiveSource::start(&[
        ("all.yaml", "- {service: a, endpoints: [10.0.0.1:80]}\n- {service: b, endpoints: [10.0.0.2:80]}\n"),
        ("orders.yaml", ORDERS),
    ]);
    let good = "a fresh 10.0.0.1:80\nb fresh 10.0.0.2:80\norders fresh 10.0.0.1:80 10.0.0.2:80";
    live.until(good).await;
    for (bad, expected) in [
        (
            "",
            expect![[r#"
            a stale 10.0.0.1:80 (all.yaml: the file is empty)
            b stale 10.0.0.2:80 (all.yaml: the file is empty)
            orders fresh 10.0.0.1:80 10.0.0.2:80
            all.yaml: the file is empty; the last good content of this file stays in force
        "#]],
        ),
        (
            "- {service: a, endpoints: [10.0.0.9:80]}\n- {service: b, endpoints: [10.0.0",
            expect![[r#"
            a stale 10.0.0.1:80 (all.yaml:2:27: this `[` is never closed)
            b stale 10.0.0.2:80 (all.yaml:2:27: this `[` is never closed)
            orders fresh 10.0.0.1:80 10.0.0.2:80
            all.yaml:2:27: this `[` is never closed; the last good content of this file stays in force
        "#]],
        ),
        (
            "- {service: a, endpoints: [10.0.0.9:80]}\n- {service: b, endpoint: []}\n",
            expect![[r#"
                a fresh 10.0.0.9:80
                b stale 10.0.0.2:80 (all.yaml:2:16: unknown field `endpoint`, did you mean `endpoints`?)
                orders fresh 10.0.0.1:80 10.0.0.2:80
                all.yaml:2:16: unknown field `endpoint`, did you mean `endpoints`? The last good state of this service stays in force
            "#]],
        ),
        (
            "- {service: a, endpoints: [10.0.0.9:80]}\n- {service: b, endpoints: [bad]}\n",
            expect![[r#"
            a fresh 10.0.0.9:80
            b stale 10.0.0.2:80 (all.yaml:2:28: `bad` has no port: write `bad:8080`, an address and a port)
            orders fresh 10.0.0.1:80 10.0.0.2:80
            all.yaml:2:28: `bad` has no port: write `bad:8080`, an address and a port; the last good state of this service stays in force
        "#]],
        ),
        (
            "- {service: a, endpoints: [x]}\n- {service: b, endpoints: [y]}\n",
            expect![[r#"
                a stale 10.0.0.1:80 (all.yaml:1:28: `x` has no port: write `x:8080`, an address and a port)
                b stale 10.0.0.2:80 (all.yaml:2:28: `y` has no port: write `y:8080`, an address and a port)
                orders fresh 10.0.0.1:80 10.0.0.2:80
                all.yaml:1:28: `x` has no port: write `x:8080`, an address and a port; the last good state of this service stays in force
                all.yaml:2:28: `y` has no port: write `y:8080`, an address and a port; the last good state of this service stays in force
            "#]],
        ),
    ] {
        replace(&live.dir, "all.yaml", bad);
        let observed = live.views_until(|shown| shown.contains("all.yaml")).await;
        expected.assert_eq(observed.last().unwrap());
        replace(
            &live.dir,
            "all.yaml",
            "- {service: a, endpoints: [10.0.0.1:80]}\n- {service: b, endpoints: [10.0.0.2:80]}\n",
        );
        live.until(good).await;
    }
    fs::remove_file(live.dir.join("all.yaml")).unwrap();
    symlink("all.yaml", live.dir.join("all.yaml")).unwrap();
    let observed = live.views_until(|shown| shown.contains("all.yaml:") && !shown.contains("held")).await;
    expect![[r#"
        a stale 10.0.0.1:80 (all.yaml: a symbolic link that leads back to itself)
        b stale 10.0.0.2:80 (all.yaml: a symbolic link that leads back to itself)
        orders fresh 10.0.0.1:80 10.0.0.2:80
        all.yaml: a symbolic link that leads back to itself; the last good content of this file stays in force
    "#]]
    .assert_eq(observed.last().unwrap());
}

#[tokio::test]
async fn a_bad_file_keeps_what_was_known_of_it_before_a_restart() {
    let mut live =
        LiveSource::start(&[("orders.yaml", "endpoints: [10.0.0.1:80, db:80]\n"), ("web", "10.0.1.1 80\n")]);
    let shown = live.views_until(|shown| shown.contains("web")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 (`db` cannot be resolved: no such host; this endpoint is left out)
        web fresh 10.0.1.1:80
        orders.yaml:1:26: `db` cannot be resolved: no such host; this endpoint is left out
    "#]]
    .assert_eq(shown.last().unwrap());
    let mut last_good = (**live.views.borrow().last_good.as_ref().unwrap()).clone();
    let LiveSource { dir, .. } = live;
    // The name resolved before the restart.
    let known = last_good.services.get_mut("orders").unwrap();
    let mut registration = (*known.registration).clone();
    let mut endpoints = registration.endpoints.to_vec();
    endpoints.push(Endpoint {
        address: "10.0.0.7:80".parse().unwrap(),
        hostname: Some("db".into()),
        ..endpoints[0].clone()
    });
    registration.endpoints = endpoints.into();
    *known = ServiceView::fresh(registration.into());

    fs::write(dir.join("orders.yaml"), "endpoints: [10.0.0.1:80, db:80\n").unwrap();
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, Some(last_good), TestDns::default());
    live.first(expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.7:80 (the source has not answered since the start; its view from before the start is in force)
        web stale 10.0.1.1:80 (the source has not answered since the start; its view from before the start is in force)
        orders.yaml:1:26: `db` cannot be resolved: no such host; this endpoint is left out
        STALE the source has not answered since the start; its view from before the start is in force
    "#]]).await;
    let observed = live.views_until(|shown| !shown.contains("STALE")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.7:80 (orders.yaml:1:12: this `[` is never closed)
        web fresh 10.0.1.1:80
        orders.yaml:1:12: this `[` is never closed; the last good content of this file stays in force
    "#]]
    .assert_eq(observed.last().unwrap());
    replace(&live.dir, "orders.yaml", "endpoints: [10.0.0.1:80, db:80]\n");
    let observed = live.views_until(|shown| shown.contains("resolved")).await;
    expect![[r#"
        orders stale 10.0.0.1:80 10.0.0.7:80 (`db` cannot be resolved: no such host; its last addresses stay in force)
        web fresh 10.0.1.1:80
        orders.yaml:1:26: `db` cannot be resolved: no such host; its last addresses stay in force
    "#]]
    .assert_eq(observed.last().unwrap());
}

#[tokio::test]
async fn a_service_in_two_files_is_that_of_the_first() {
    let mut live = LiveSource::start(&[
        ("b.yaml", "service: orders\nendpoints: [10.0.0.2:80]\n"),
        ("a.yaml", "---\nservice: orders\nendpoints: [10.0.0.1:80]\n"),
        ("orders", "10.0.0.3 80\n"),
    ]);
    live.first(expect![[r#"
        orders fresh 10.0.0.1:80
        b.yaml:1:1: `orders` is also in a.yaml:2:1, which is used because it is the first in path order
        orders: `orders` is also in a.yaml:2:1, which is used because it is the first in path order
    "#]])
        .await;
}

/// A job is spread over several files, one of which cannot be read after a restart.
#[tokio::test]
async fn a_job_is_put_together_from_several_files_and_loses_no_part_to_a_file_that_breaks() {
    let group =
        |address: &str| format!("[{{\"targets\": [\"{address}\"], \"labels\": {{\"job\": \"node\"}}}}]");
    let mut live = LiveSource::start(&[
        ("a.json", &group("10.0.0.1:80")),
        ("b.json", &group("10.0.0.2:80")),
        ("c.json", &group("10.0.0.3:80")),
    ]);
    live.first(expect![[r#"
        node fresh 10.0.0.1:80 10.0.0.2:80 10.0.0.3:80
    "#]])
        .await;
    let last_good = (**live.views.borrow().last_good.as_ref().unwrap()).clone();
    let LiveSource { dir, .. } = live;
    fs::write(dir.join("b.json"), "[{\"targets\": [").unwrap();
    let config = FileConfig { watch: false, ..config(&dir) };
    let mut disk = Disk::new(config, Arc::default(), Some(&last_good));
    let all = ["a.json", "b.json", "c.json"].map(|file| dir.join(file));
    let whole = |reported: &crate::assemble::ServiceStatement| match &reported.content {
        ServiceContent::Parsed(service) => service.endpoints.len(),
        ServiceContent::Restored(known) => known.endpoints.len(),
    };
    let restarted = scan(&mut disk, &all, true);
    let reported = &restarted.statement.services["node"];
    assert_eq!(whole(reported), 2);
    let because =
        reported.partial_because.as_deref().expect("what is missing may be in the file that is broken");
    assert!(because.contains("b.json"), "{because}");
    // Once the file is readable again, endpoints that it does not list are removed.
    fs::write(dir.join("b.json"), "[]").unwrap();
    let mended = scan(&mut disk, &all, true);
    assert_eq!(
        (whole(&mended.statement.services["node"]), &mended.statement.services["node"].partial_because),
        (2, &None)
    );
}

#[tokio::test]
async fn a_name_that_stands_for_loopback_on_this_host_only_is_no_endpoint() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let dns = TestDns::default();
    for (host, ip) in
        [("vm-17", "127.0.1.1"), ("vm-18", "::1"), ("vm-19", "::ffff:127.0.0.1"), ("vm-20", "10.0.0.20")]
    {
        dns.set(host, ip);
    }
    for (host, ip) in [("localhost", "127.0.0.1"), ("pay.localhost", "127.0.0.9")] {
        dns.set(host, ip);
    }
    write(
        &dir,
        &[
            ("web", "vm-17 80\nvm-18 80\nvm-19 80\nvm-20 80\n"),
            ("own", "localhost 80\npay.localhost 80\n127.0.0.5 80\n"),
        ],
    );
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, None, dns);
    live.first(expect![[r#"
        own fresh 127.0.0.1:80 127.0.0.5:80 127.0.0.9:80
        web fresh 10.0.0.20:80
        web:1:1: `vm-17`: it resolves to 127.0.1.1 on this host only, see /etc/hosts; this endpoint is left out
        web:2:1: `vm-18`: it resolves to ::1 on this host only, see /etc/hosts; this endpoint is left out
        web:3:1: `vm-19`: it resolves to 127.0.0.1 on this host only, see /etc/hosts; this endpoint is left out
    "#]]).await;
}

#[tokio::test]
async fn an_address_that_nobody_can_dial_is_left_out_of_every_format_and_is_no_bad_record() {
    let addresses = [
        "0.0.0.0",
        "0.1.2.3",
        "0.1",
        "224.0.0.1",
        "255.255.255.255",
        "::",
        "ff02::1",
        "fe80::1",
        "::ffff:0.0.0.0",
        "169.254.169.254",
    ];
    let dir = vmesh_testkit::tempdir().unwrap();
    for (number, address) in addresses.iter().enumerate() {
        let bracketed = if address.contains(':') { format!("[{address}]") } else { (*address).to_owned() };
        let pair = |target: &str| format!("[\"{target}:80\", \"10.9.9.9:80\"]");
        let host = |host: &str| format!("{{\"host\":\"{host}\",\"port\":80}}");
        for (name, text) in [
            (format!("native{number}.yaml"), format!("endpoints: {}\n", pair(&bracketed))),
            (format!("lines{number}"), format!("10.9.9.9 80\n{address} 80\n")),
            (format!("smart{number}.json"), format!("[{},{}]", host(address), host("10.9.9.9"))),
            (format!("prom{number}.yml"), format!("- targets: {}\n", pair(&bracketed))),
            // The file has no other endpoint: the service is known and has no endpoints.
            (format!("only{number}.yaml"), format!("endpoints: [\"{bracketed}:80\"]\n")),
        ] {
            fs::write(dir.join(name), text).unwrap();
        }
    }
    let config = config(&dir);
    let mut live = LiveSource::of(dir, config, None, TestDns::default());
    live.views_until(|shown| !shown.is_empty()).await;
    let view = live.views.borrow().clone();
    assert_eq!(view.unusable, None);
    let last_good = view.last_good.clone().unwrap();
    for (name, observed) in &last_good.services {
        let endpoints: Vec<_> =
            observed.registration.endpoints.iter().map(|e| e.address.to_string()).collect();
        let expected: &[&str] = if name.as_str().starts_with("only") { &[] } else { &["10.9.9.9:80"] };
        assert_eq!(endpoints, expected, "{name}");
    }
    assert_eq!(last_good.services.len(), 5 * addresses.len());
    let undialable = last_good.problems.iter().filter(|problem| {
        problem.message.contains("is not an address that can be dialled")
            && problem.message.ends_with("this endpoint is left out")
    });
    assert_eq!(undialable.count(), 5 * addresses.len(), "{:#?}", last_good.problems);

    // The last good endpoints stay when none of the new addresses can be dialled, and the guard holds the
    // removal.
    replace(&live.dir, "lines0", "0.0.0.0 80\n");
    let held = live
        .views_until(|shown| shown.contains("lines0 stale 10.9.9.9:80 (1 of 1 records have no address"))
        .await;
    assert!(!held.iter().any(|shown| shown.contains("lines0 fresh\n")), "{held:#?}");
}

#[tokio::test]
async fn names_are_resolved_and_a_slow_one_holds_up_only_its_service() {
    let dir = vmesh_testkit::tempdir().unwrap();
    let dns = TestDns::default();
    dns.set("db", "10.1.0.1");
    write(
        &dir,
        &[("orders.yaml", "endpoints: [db:80, db:81, 10.1.0.1:82]\n"), ("pay", "nowhere 80\n10.2.0.1 80\n")],
    );
    let config = FileConfig { resolve_interval: Duration::from_secs(1), ..config(&dir) };
    let mut live = LiveSource::of(dir, config, None, dns.clone());
    live.first(expect![[r#"
        orders fresh 10.1.0.1:80 10.1.0.1:81 10.1.0.1:82
        pay stale 10.2.0.1:80 (`nowhere` cannot be resolved: no such host; this endpoint is left out)
        pay:1:1: `nowhere` cannot be resolved: no such host; this endpoint is left out
    "#]])
        .await;
    let pay = "pay stale 10.2.0.1:80 (`nowhere` cannot be resolved: no such host; this endpoint is left out)";
    let problem = "pay:1:1: `nowhere` cannot be resolved: no such host; this endpoint is left out";
    let unresolved = live.views.borrow().unresolved.clone();
    assert_eq!((unresolved.count, &*unresolved.first[0].name), (1, "nowhere"));
    // The host moves to another address and is found there.
    dns.set("db", "10.1.0.2");
    live.until(&format!("orders fresh 10.1.0.1:82 10.1.0.2:80 10.1.0.2:81\n{pay}\n{problem}")).await;
    // A slow name delays only its own service.
    replace(&live.dir, "orders.yaml", "endpoints: [slow:80]\n");
    replace(&live.dir, "web", "10.3.0.1 80\n");
    live.until(&format!(
        "orders stale 10.1.0.1:82 10.1.0.2:80 10.1.0.2:81 (`slow` is being looked up)\n{pay}\nweb fresh 10.3.0.1:80\n{problem}"
    ))
    .await;
    dns.set("slow", "10.1.0.3");
    dns.set("nowhere", "10.2.0.2");
    live.until("orders fresh 10.1.0.3:80\npay fresh 10.2.0.1:80 10.2.0.2:80\nweb fresh 10.3.0.1:80").await;
}
