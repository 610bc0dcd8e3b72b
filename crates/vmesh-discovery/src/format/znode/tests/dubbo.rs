//! The records of Dubbo 2 and 3.

use super::*;

#[test]
fn dubbo_3_says_what_is_spoken_in_the_metadata() {
    let instances = r#"
        10.1.0.17:20880 {"name":"pay","id":"10.1.0.17:20880","address":"10.1.0.17","port":20880,"payload":{"@class":"org.apache.dubbo.registry.zookeeper.ZookeeperInstance","id":"10.1.0.17:20880","name":"pay","metadata":{"dubbo.endpoints":"[{\"port\":20880,\"protocol\":\"dubbo\"},{\"port\":50051,\"protocol\":\"tri\"}]","dubbo.metadata.revision":"a1b2","timestamp":"1719830000000","region":"r1"}}}
        10.1.0.18:20880 {"address":"10.1.0.18","port":20880,"payload":{"metadata":{"dubbo.metadata.revision":"0"}}}
        "#;
    check(
        ZnodeFormat::Curator,
        instances,
        expect![[r#"
        pay dubbo
          10.1.0.17:20880 weight 1 healthy {"region": "r1"}
    "#]],
    );
    check_with(
        by_endpoint("tri"),
        ZnodeFormat::Curator,
        instances,
        expect![[r#"
        pay grpc
          10.1.0.17:50051 weight 1 healthy {"region": "r1"}
    "#]],
    );
    check_with(
        by_endpoint("rest"),
        ZnodeFormat::Curator,
        instances,
        expect![[r#"
            FAILED 1 of 1 records are bad, which is more than single mistakes
            zk/pay/10.1.0.17:20880: there is no endpoint `rest` in `dubbo.endpoints`
        "#]],
    );
}

pub(super) const DUBBO: &str = "
    dubbo%3A%2F%2F10.1.0.17%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc%26interface%3Dcom.acme.Pay%26side%3Dprovider%26weight%3D200%26version%3D1.0%26timestamp%3D1%26pid%3D11%26warmup%3D600000
    dubbo%3A%2F%2F10.1.0.17%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc%26interface%3Dcom.acme.Pay%26side%3Dprovider%26weight%3D200%26version%3D1.0%26timestamp%3D2%26pid%3D12
    dubbo%3A%2F%2F10.1.0.18%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc%26interface%3Dcom.acme.Pay%26version%3D1.0%26disabled%3Dtrue
    dubbo%3A%2F%2F10.1.0.19%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc%26interface%3Dcom.acme.Pay%26version%3D1.0%26zone%3Da1%26group%3Dg%26release%3D2.7.15
    !dubbo%3A%2F%2F10.1.0.20%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay%252Dsvc%26interface%3Dcom.acme.Pay%26version%3D0.0.0%26dynamic%3Dfalse%26enabled%3Dfalse
    injvm%3A%2F%2F127.0.0.1%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
    consumer%3A%2F%2F10.1.0.30%2Fcom.acme.Pay%3Fapplication%3Dother%26category%3Dconsumers
    override%3A%2F%2F0.0.0.0%2Fcom.acme.Pay%3Fweight%3D50
    empty%3A%2F%2F10.1.0.17%2Fcom.acme.Pay%3Fcategory%3Dproviders
    ";

#[test]
fn dubbo_providers_are_the_endpoints_of_their_application() {
    check(
        ZnodeFormat::Dubbo,
        DUBBO,
        expect![[r#"
        pay-svc dubbo
          10.1.0.17:20880 weight 200 healthy version 1.0 {"dubbo.interfaces": "com.acme.Pay"}
          10.1.0.18:20880 weight 100 draining version 1.0 {"dubbo.interfaces": "com.acme.Pay"}
          10.1.0.19:20880 weight 100 healthy zone a1 version 1.0 {"dubbo.interfaces": "com.acme.Pay", "group": "g", "release": "2.7.15"}
          10.1.0.20:20880 weight 100 draining {"dubbo.interfaces": "com.acme.Pay", "liveness": "none"}
    "#]],
    );
}

/// A provider's own value takes precedence over its default for all of its services.
#[test]
fn what_dubbo_sets_for_all_services_of_a_provider_is_said_of_each() {
    let url = |last: u8, more: &str| {
        let query =
            format!("default.version=2.0&default.group=g&default.weight=50&default.release=3.1{more}");
        let query = query.replace('=', "%3D").replace('&', "%26");
        format!("dubbo%3A%2F%2F10.1.0.{last}%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay%26{query}\n")
    };
    let text = [
        url(1, ""),
        url(2, "&weight=7&version=1.0&group=h"),
        url(3, "&weight="),
        url(4, "&default.disabled=true"),
        url(5, "&default.enabled=false&enabled=true"),
    ];
    check(
        ZnodeFormat::Dubbo,
        &text.concat(),
        expect![[r#"
        pay dubbo
          10.1.0.1:20880 weight 50 healthy version 2.0 {"dubbo.interfaces": "com.acme.Pay", "group": "g", "release": "3.1"}
          10.1.0.2:20880 weight 7 healthy version 1.0 {"dubbo.interfaces": "com.acme.Pay", "group": "h", "release": "3.1"}
          10.1.0.3:20880 weight 50 healthy version 2.0 {"dubbo.interfaces": "com.acme.Pay", "group": "g", "release": "3.1"}
          10.1.0.4:20880 weight 50 draining version 2.0 {"dubbo.interfaces": "com.acme.Pay", "group": "g", "release": "3.1"}
          10.1.0.5:20880 weight 50 healthy version 2.0 {"dubbo.interfaces": "com.acme.Pay", "group": "g", "release": "3.1"}
    "#]],
    );
    let by_interface = RecordRules { group_by: GroupBy::Interface, ..RecordRules::default() };
    check_with(
        by_interface,
        ZnodeFormat::Dubbo,
        &text[..2].concat(),
        expect![[r#"
        g.com.acme.Pay-2.0 dubbo
          10.1.0.1:20880 weight 50 healthy version 2.0 {"group": "g", "release": "3.1"}
        h.com.acme.Pay-1.0 dubbo
          10.1.0.2:20880 weight 7 healthy version 1.0 {"group": "h", "release": "3.1"}
    "#]],
    );
}

#[test]
fn dubbo_interfaces_can_be_services() {
    check_with(
        RecordRules { group_by: GroupBy::Interface, ..RecordRules::default() },
        ZnodeFormat::Dubbo,
        DUBBO,
        expect![[r#"
            com.acme.Pay dubbo
              10.1.0.20:20880 weight 1 draining {"liveness": "none"}
            com.acme.Pay-1.0 dubbo
              10.1.0.17:20880 weight 200 healthy version 1.0
              10.1.0.18:20880 weight 100 draining version 1.0
            g.com.acme.Pay-1.0 dubbo
              10.1.0.19:20880 weight 1 healthy zone a1 version 1.0 {"group": "g", "release": "2.7.15"}
        "#]],
    );
}

#[test]
fn of_several_protocols_of_dubbo_one_is_used() {
    let both = "
        tri%3A%2F%2F10.1.0.17%3A50051%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        dubbo%3A%2F%2F10.1.0.17%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        rest%3A%2F%2F%5Bfd00%3A%3A7%5D%3A8080%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        ";
    check(
        ZnodeFormat::Dubbo,
        both,
        expect![[r#"
        pay-svc dubbo
          10.1.0.17:20880 weight 1 healthy {"dubbo.interfaces": "com.acme.Pay"}
        zk/pay: it is offered by dubbo, rest, tri, and the endpoints of `dubbo` are used: set `endpoint` to choose others
    "#]],
    );
    check_with(
        by_endpoint("tri"),
        ZnodeFormat::Dubbo,
        both,
        expect![[r#"
        pay-svc grpc
          10.1.0.17:50051 weight 1 healthy {"dubbo.interfaces": "com.acme.Pay"}
    "#]],
    );
}

#[test]
fn a_dubbo_url_that_makes_no_sense_costs_that_url() {
    check(
        ZnodeFormat::Dubbo,
        "
        dubbo%3A%2F%2F10.1.0.17%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        dubbo%3A%2F%2F10.1.0.18%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        dubbo%3A%2F%2F10.1.0.19%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        dubbo%3A%2F%2F10.1.0.20%3A20880%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        dubbo%3A%2F%2F10.1.0.21%2Fcom.acme.Pay%3Fapplication%3Dpay-svc
        dubbo%3A%2F%2F10.1.0.22%3A20880%2Fcom.acme.Pay%3Fside%3Dprovider
        dubbo%3A%2F%2F10.1.0.23%3A20880%2F%3Fapplication%3Dpay-svc%26interface%3D*
        ",
        expect![[r#"
            pay-svc dubbo
              10.1.0.17:20880 weight 1 healthy {"dubbo.interfaces": "com.acme.Pay"}
              10.1.0.18:20880 weight 1 healthy {"dubbo.interfaces": "com.acme.Pay"}
              10.1.0.19:20880 weight 1 healthy {"dubbo.interfaces": "com.acme.Pay"}
              10.1.0.20:20880 weight 1 healthy {"dubbo.interfaces": "com.acme.Pay"}
            FAILED 3 of 7 records are bad, which is more than single mistakes
            zk/pay/dubbo%3A%2F%2F10.1.0.21%2Fcom.acme.Pay%3Fapplication%3Dpay-s…: `10.1.0.21` has no port; this endpoint is left out
            zk/pay/dubbo%3A%2F%2F10.1.0.22%3A20880%2Fcom.acme.Pay%3Fside%3Dprov…: its URL names no `application`; this endpoint is left out
            zk/pay/dubbo%3A%2F%2F10.1.0.23%3A20880%2F%3Fapplication%3Dpay-svc%2…: its URL names no interface; this endpoint is left out
        "#]],
    );
}

#[test]
fn who_offers_several_interfaces_is_drained_when_it_offers_none() {
    let interface = |name: &str, more: &str| {
        format!(
            "dubbo%3A%2F%2F10.1.0.17%3A20880%2F{name}%3Fapplication%3Dpay-svc%26interface%3D{name}{more}\n"
        )
    };
    let some = interface("com.acme.A", "") + &interface("com.acme.B", "%26disabled%3Dtrue");
    check(
        ZnodeFormat::Dubbo,
        &some,
        expect![[r#"
        pay-svc dubbo
          10.1.0.17:20880 weight 1 healthy {"dubbo.interfaces": "com.acme.A,com.acme.B"}
    "#]],
    );
    let none = interface("com.acme.A", "%26disabled%3Dtrue") + &interface("com.acme.B", "%26disabled%3Dtrue");
    check(
        ZnodeFormat::Dubbo,
        &none,
        expect![[r#"
        pay-svc dubbo
          10.1.0.17:20880 weight 1 draining {"dubbo.interfaces": "com.acme.A,com.acme.B"}
    "#]],
    );
}
