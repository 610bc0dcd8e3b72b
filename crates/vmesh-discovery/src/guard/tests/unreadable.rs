//! Services that are wholly or largely unreadable.

use super::*;

#[test]
fn what_was_left_because_it_could_not_be_read_is_never_confirmed() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let orders: ServiceName = "orders".parse().unwrap();
    let reported = |service_view: ServiceView| Registrations {
        services: std::iter::once((orders.clone(), service_view)).collect(),
        ..Registrations::default()
    };
    let mut sim = Sim::of(GuardConfig::default());
    sim.observe(reported(service_view("orders", "1 2 3")), at(0));
    sim.judge(at(0));
    let nothing = service_view("orders", "").registration;
    sim.observe(reported(ServiceView::stale(nothing.clone(), "`vm-1` cannot be resolved")), at(10));
    sim.judge(at(10));
    sim.until(at(3600));
    let believed = sim.judge(at(3600));
    assert_eq!(ports(&believed.services["orders"]), ["1", "2", "3"]);
    let why = sim.guard.held_changes().first().unwrap().because.clone();
    assert!(why.ends_with("read failed: `vm-1` cannot be resolved"), "{why}");
    // The service is readable and has no endpoints.
    sim.observe(reported(ServiceView::fresh(nothing)), at(3610));
    sim.judge(at(3610));
    sim.until(at(3700));
    assert!(sim.judge(at(3700)).services["orders"].registration.endpoints.is_empty());
}

fn reported_services(services: impl IntoIterator<Item = ServiceView>) -> Registrations {
    let services = services
        .into_iter()
        .map(|service_view| (service_view.registration.service.clone(), service_view))
        .collect();
    Registrations { services, ..Registrations::default() }
}

#[test]
fn what_can_be_read_in_part_is_followed_and_loses_nothing_until_all_can_or_that_is_accepted() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let part = |endpoints: &str| ServiceView {
        extent: Extent::Part,
        because: Some("3 of 6 records are bad".into()),
        ..service_view("pay", endpoints)
    };
    let name: ServiceName = "pay".parse().unwrap();
    for accepts in [false, true] {
        let mut guard = Guard::new("consul", GuardConfig::default());
        guard.observe(reported_services([service_view("pay", "1 2 3 4")]), at(0));
        guard.judge(at(0));
        // One addition, one endpoint that becomes unhealthy, and three endpoints that are no longer listed.
        guard.observe(reported_services([part("1u 5")]), at(1));
        let believed = guard.judge(at(600));
        assert_eq!(ports(&believed.services[&name]), ["1u", "2", "3", "4", "5"]);
        let held = guard.held_changes();
        assert_eq!((held.len(), held[0].kind, held[0].had, held[0].has), (1, HoldKind::Unreadable, 5, 2));
        assert!(held[0].because.contains("3 unlisted endpoints stay in force"), "{}", held[0].because);
        assert!(guard.take_notices().iter().any(|notice| notice.kind == NoticeKind::Held));
        assert_eq!(guard.deadline(), None, "time alone ends it not");
        if accepts {
            assert_eq!(guard.accept(Some(&name)).unwrap(), std::slice::from_ref(&name));
            assert_eq!(ports(&guard.judge(at(601)).services[&name]), ["1u", "5"]);
            assert!(guard.held_changes().is_empty());
        } else {
            // The service is fully readable: missing endpoints are removed after `removal_hold`, not at once.
            guard.observe(reported_services([service_view("pay", "1 2 3 5")]), at(700));
            assert_eq!(ports(&guard.judge(at(701)).services[&name]), ["1", "2", "3", "4", "5"]);
            assert_eq!(ports(&guard.judge(at(711)).services[&name]), ["1", "2", "3", "5"]);
        }
    }
}

#[test]
fn what_is_served_though_its_source_cannot_say_it_is_listed_and_can_be_accepted() {
    let start = Instant::now();
    let at = |seconds| start + Duration::from_secs(seconds);
    let known = service_view("pay", "1 2");
    let unread = ServiceView {
        extent: Extent::Nothing,
        state: State::Stale,
        because: Some("Consul lists this service and shows none of its instances".into()),
        ..known.clone()
    };
    let name: ServiceName = "pay".parse().unwrap();
    let mut guard = Guard::restored("consul", GuardConfig::default(), &reported_services([known]));
    guard.observe(reported_services([unread.clone(), service_view("web", "7")]), at(0));
    assert_eq!(ports(&guard.judge(at(3600)).services[&name]), ["1", "2"]);
    let held: Vec<_> = guard
        .held_changes()
        .iter()
        .map(|held| (held.service.clone(), held.kind, held.had, held.has))
        .collect();
    assert_eq!(held, [(Some(name.clone()), HoldKind::Unreadable, 2, 0)]);
    guard.accept(Some(&name)).unwrap();
    // The service stays removed while the source reports no change.
    guard.observe(reported_services([unread, service_view("web", "7")]), at(3700));
    assert!(!guard.judge(at(3700)).services.contains_key(&name));
    assert!(guard.held_changes().is_empty());
    guard.observe(reported_services([service_view("pay", "3"), service_view("web", "7")]), at(3800));
    assert_eq!(ports(&guard.judge(at(3800)).services[&name]), ["3"]);
}
