//! The record of a workload in a registry, in each supported format. No I/O.

use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::Deserialize;
use serde_json::{Map, Value, json};
use vmesh_consul::{Check, CheckStatus, Registration, Weights};
use vmesh_model::{Labels, ServiceName};

use super::ConsulSettings;

/// The data of one workload that a registry receives.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Instance {
    pub(crate) service: ServiceName,
    /// Stable over restarts and unique: the node's name, the service and the port.
    pub(crate) id: String,
    pub(crate) address: IpAddr,
    pub(crate) port: u16,
    pub(crate) protocol: Option<Arc<str>>,
    pub(crate) weight: Option<u16>,
    pub(crate) version: Option<Arc<str>>,
    pub(crate) zone: Option<Arc<str>>,
    pub(crate) labels: Labels,
}

impl Instance {
    /// Returns everything that a format without fields of its own keeps as `key: value`.
    fn metadata(&self) -> Map<String, Value> {
        let mut all: Map<_, _> =
            self.labels.iter().map(|(key, value)| (key.to_string(), json!(**value))).collect();
        for (key, value) in [("version", &self.version), ("zone", &self.zone), ("protocol", &self.protocol)] {
            if let Some(value) = value {
                all.insert(key.to_owned(), json!(**value));
            }
        }
        all
    }
}

/// The format of a workload's record in ZooKeeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The format of Twitter, Finagle and Aurora: `member_0000000007`.
    Serverset,
    /// The format of Curator's service discovery: a child that is named by the instance's id.
    Curator,
    /// The format of Spring Cloud: Curator with Spring's payload.
    Spring,
    /// The format of Airbnb's SmartStack, written by nerve: `web-17-8080_0000000007`.
    Nerve,
    /// A child whose name and data are `host:port`.
    HostPort,
}

impl Format {
    /// Reports whether a record in this format can express that its instance drains.
    pub(crate) fn can_drain(self) -> bool {
        matches!(self, Format::Serverset | Format::Spring | Format::Nerve)
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Serverset => "serverset",
            Format::Curator => "curator",
            Format::Spring => "spring",
            Format::Nerve => "nerve",
            Format::HostPort => "hostport",
        })
    }
}

/// A node to create in ZooKeeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Znode {
    /// The name below the path of the service. The server appends a number if it is `sequential`.
    pub(crate) child: String,
    pub(crate) sequential: bool,
    pub(crate) data: Vec<u8>,
}

/// Returns the node of `instance`. `since` is the time of registration, which Curator's format contains. `drains` is expressed only if the
/// format can.
pub(crate) fn znode(format: Format, instance: &Instance, since: SystemTime, drains: bool) -> Znode {
    let Instance { id, address, port, .. } = instance;
    let host = address.to_string();
    let (child, sequential, data) = match format {
        Format::Serverset => {
            let data = json!({
                "serviceEndpoint": {"host": host, "port": port},
                "additionalEndpoints": {},
                "status": if drains { "STOPPING" } else { "ALIVE" },
                "metadata": instance.metadata(),
            });
            ("member_".to_owned(), true, data)
        }
        Format::Nerve => {
            let mut labels = instance.metadata();
            // The name that the readers of Airbnb and Yelp expect.
            if let Some(zone) = labels.remove("zone") {
                labels.insert("az".to_owned(), zone);
            }
            let mut data = json!({"host": host, "port": port, "name": id, "labels": labels});
            // Weight 0: the instance gets no new requests.
            let weight = if drains { Some(0) } else { instance.weight };
            if let (Some(weight), Some(data)) = (weight, data.as_object_mut()) {
                data.insert("weight".to_owned(), json!(weight));
            }
            (format!("{id}_"), true, data)
        }
        Format::Curator => (id.clone(), false, curator(instance, json!(instance.metadata()), since)),
        Format::Spring => {
            let mut metadata = instance.metadata();
            metadata
                .insert("instance_status".to_owned(), json!(if drains { "OUT_OF_SERVICE" } else { "UP" }));
            let payload = json!({
                "@class": "org.springframework.cloud.zookeeper.discovery.ZookeeperInstance",
                "id": instance.service,
                "name": instance.service,
                "metadata": metadata,
            });
            (id.clone(), false, curator(instance, payload, since))
        }
        Format::HostPort => {
            let text = std::net::SocketAddr::new(*address, *port).to_string();
            return Znode { child: text.clone(), sequential: false, data: text.into_bytes() };
        }
    };
    Znode { child, sequential, data: data.to_string().into_bytes() }
}

fn curator(instance: &Instance, payload: Value, since: SystemTime) -> Value {
    let since = since.duration_since(UNIX_EPOCH).unwrap_or_default();
    json!({
        "name": instance.service,
        "id": instance.id,
        "address": instance.address.to_string(),
        "port": instance.port,
        "sslPort": null,
        "payload": payload,
        "registrationTimeUTC": u64::try_from(since.as_millis()).unwrap_or(u64::MAX),
        "serviceType": "DYNAMIC",
        "uriSpec": null,
    })
}

/// Returns the id of the check by which the agent reports the health of `instance` to Consul.
pub(crate) fn check_id(instance: &Instance) -> String {
    format!("vmesh:{}", instance.id)
}

/// Returns the Consul registration of `instance`. It has a TTL check: if the agent dies, the instance becomes critical, which means
/// unhealthy, and is not removed.
pub(crate) fn consul_registration(
    instance: &Instance,
    settings: &ConsulSettings,
    status: CheckStatus,
) -> Registration {
    let meta =
        instance.metadata().into_iter().filter_map(|(key, value)| Some((key, value.as_str()?.to_owned())));
    Registration {
        id: instance.id.clone(),
        name: instance.service.to_string(),
        tags: settings.tags.clone(),
        meta: meta.collect(),
        address: instance.address.to_string(),
        port: instance.port,
        weights: instance.weight.map(|weight| Weights { passing: weight, warning: 1 }),
        checks: vec![Check {
            id: check_id(instance),
            name: format!("vmesh-agent's check of {}", instance.service),
            ttl: Some(settings.ttl.0),
            status: Some(status),
            deregister_critical_service_after: settings.gone_after.map(|time| time.0),
            ..Check::default()
        }],
    }
}

#[cfg(test)]
pub(crate) fn example() -> Instance {
    Instance {
        service: "orders".parse().unwrap(),
        id: "web-17-8080".to_owned(),
        address: [10, 0, 1, 17].into(),
        port: 8080,
        protocol: Some("http".into()),
        weight: Some(3),
        version: Some("v2".into()),
        zone: Some("eu-1a".into()),
        labels: Labels::from([("rack".into(), "r7".into())]),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use expect_test::{Expect, expect};
    use vmesh_model::text::Time;

    use super::*;

    fn check(format: Format, expected: Expect) {
        let Znode { child, sequential, data } =
            znode(format, &example(), UNIX_EPOCH + Duration::from_secs(7), false);
        let number = if sequential { "0000000007" } else { "" };
        expected.assert_eq(&format!("{child}{number} {}\n", String::from_utf8(data).unwrap()));
    }

    #[test]
    fn a_workload_is_written_as_the_readers_of_each_format_expect_it() {
        check(
            Format::Serverset,
            expect![[r#"
            member_0000000007 {"serviceEndpoint":{"host":"10.0.1.17","port":8080},"additionalEndpoints":{},"status":"ALIVE","metadata":{"rack":"r7","version":"v2","zone":"eu-1a","protocol":"http"}}
        "#]],
        );
        check(
            Format::Nerve,
            expect![[r#"
            web-17-8080_0000000007 {"host":"10.0.1.17","port":8080,"name":"web-17-8080","labels":{"rack":"r7","version":"v2","protocol":"http","az":"eu-1a"},"weight":3}
        "#]],
        );
        check(
            Format::Curator,
            expect![[r#"
            web-17-8080 {"name":"orders","id":"web-17-8080","address":"10.0.1.17","port":8080,"sslPort":null,"payload":{"rack":"r7","version":"v2","zone":"eu-1a","protocol":"http"},"registrationTimeUTC":7000,"serviceType":"DYNAMIC","uriSpec":null}
        "#]],
        );
        check(
            Format::Spring,
            expect![[r#"
            web-17-8080 {"name":"orders","id":"web-17-8080","address":"10.0.1.17","port":8080,"sslPort":null,"payload":{"@class":"org.springframework.cloud.zookeeper.discovery.ZookeeperInstance","id":"orders","name":"orders","metadata":{"rack":"r7","version":"v2","zone":"eu-1a","protocol":"http","instance_status":"UP"}},"registrationTimeUTC":7000,"serviceType":"DYNAMIC","uriSpec":null}
        "#]],
        );
        check(
            Format::HostPort,
            expect![[r#"
            10.0.1.17:8080 10.0.1.17:8080
        "#]],
        );
    }

    #[test]
    fn a_record_that_drains_says_so_where_its_readers_understand_it() {
        for (format, said) in [
            (Format::Serverset, r#""status":"STOPPING""#),
            (Format::Nerve, r#""weight":0"#),
            (Format::Spring, r#""instance_status":"OUT_OF_SERVICE""#),
        ] {
            let record = znode(format, &example(), UNIX_EPOCH, true);
            assert!(format.can_drain() && String::from_utf8(record.data).unwrap().contains(said), "{format}");
        }
    }

    #[test]
    fn consul_is_told_of_a_check_that_lapses() {
        let settings = ConsulSettings {
            tags: vec!["a".to_owned()],
            gone_after: Some(Time(Duration::from_secs(600))),
            ..ConsulSettings::default()
        };
        let registration = consul_registration(&example(), &settings, CheckStatus::Passing);
        expect![[r#"{"ID":"web-17-8080","Name":"orders","Tags":["a"],"Meta":{"protocol":"http","rack":"r7","version":"v2","zone":"eu-1a"},"Address":"10.0.1.17","Port":8080,"Weights":{"Passing":3,"Warning":1},"Checks":[{"CheckID":"vmesh:web-17-8080","Name":"vmesh-agent's check of orders","TTL":"30000ms","Status":"passing","DeregisterCriticalServiceAfter":"600000ms"}]}"#]].assert_eq(&serde_json::to_string(&registration).unwrap());
    }
}
