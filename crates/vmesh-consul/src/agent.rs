//! Registers services with the agent of their own host.
//!
//! All requests go to the first address: any other agent would register the service as running on its own host.

use std::collections::BTreeMap;
use std::fmt;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize, Serializer};

use crate::client::{Client, escaped};
use crate::error::ConsulError;

/// The timeout of a request to the agent, which answers from memory or after it has updated the servers.
const WITHIN: Duration = Duration::from_secs(15);

/// A service, as it is registered with an agent. Registering it again replaces it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Registration {
    /// Unique on the agent.
    #[serde(rename = "ID")]
    pub id: String,
    pub name: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tags: Vec<String>,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub meta: BTreeMap<String, String>,
    /// An empty address stands for the agent's own.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub address: String,
    pub port: u16,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub checks: Vec<Check>,
}

/// The relative shares of traffic of an instance by its state: `passing` from 1 to 65,535, `warning` from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Weights {
    pub passing: u16,
    pub warning: u16,
}

/// A health check of a service. Exactly one of `ttl`, `http` and `tcp` is set.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Check {
    #[serde(rename = "CheckID", skip_serializing_if = "String::is_empty")]
    pub id: String,
    pub name: String,
    /// The time within which the service must report its state: see [`Client::update_check`].
    #[serde(rename = "TTL", skip_serializing_if = "Option::is_none", serialize_with = "millis")]
    pub ttl: Option<Duration>,
    /// A URL that must answer with a 2xx status.
    #[serde(rename = "HTTP", skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
    /// A `host:port` that must accept connections.
    #[serde(rename = "TCP", skip_serializing_if = "Option::is_none")]
    pub tcp: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "millis")]
    pub interval: Option<Duration>,
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "millis")]
    pub timeout: Option<Duration>,
    /// The state before the first result. Consul's default is critical.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<CheckStatus>,
    /// The agent deregisters the service after it was critical for this long; Consul's minimum is a minute.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "millis")]
    pub deregister_critical_service_after: Option<Duration>,
}

#[expect(clippy::ref_option, reason = "serde calls it so")]
fn millis<S: Serializer>(value: &Option<Duration>, serializer: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => serializer.serialize_str(&format!("{}ms", value.as_millis())),
        None => serializer.serialize_none(),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CheckStatus {
    Passing,
    Warning,
    Critical,
}

impl fmt::Display for CheckStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            CheckStatus::Passing => "passing",
            CheckStatus::Warning => "warning",
            CheckStatus::Critical => "critical",
        })
    }
}

#[derive(Serialize)]
#[serde(rename_all = "PascalCase")]
struct Update<'a> {
    status: CheckStatus,
    output: &'a str,
}

impl Client {
    /// Registers a service, or replaces the registration with its ID. Needs `service:write`.
    pub async fn register(&self, registration: &Registration) -> Result<(), ConsulError> {
        // The flag deletes checks that the new registration omits; otherwise they would turn critical.
        const PATH: &str = "/v1/agent/service/register?replace-existing-checks=true";
        let body = self.json(PATH, registration)?;
        self.put(PATH, body, WITHIN).await.map(drop)
    }

    /// Deregisters a service. Consul answers an unknown ID with an error (404, or 500 in older versions).
    pub async fn deregister(&self, id: &str) -> Result<(), ConsulError> {
        let path = format!("/v1/agent/service/deregister/{}", escaped(id));
        self.put(&path, Bytes::new(), WITHIN).await.map(drop)
    }

    /// Reports the state of a TTL check. `output` is a text for operators.
    pub async fn update_check(&self, id: &str, status: CheckStatus, output: &str) -> Result<(), ConsulError> {
        let path = format!("/v1/agent/check/update/{}", escaped(id));
        let body = self.json(&path, &Update { status, output })?;
        self.put(&path, body, WITHIN).await.map(drop)
    }

    /// Begins or ends the maintenance of a service, which gets no new requests meanwhile.
    pub async fn maintenance(&self, id: &str, enable: bool, reason: &str) -> Result<(), ConsulError> {
        let path = format!(
            "/v1/agent/service/maintenance/{}?enable={enable}&reason={}",
            escaped(id),
            escaped(reason)
        );
        self.put(&path, Bytes::new(), WITHIN).await.map(drop)
    }

    fn json(&self, path: &str, value: &impl Serialize) -> Result<Bytes, ConsulError> {
        serde_json::to_vec(value).map(Bytes::from).map_err(|wrong| self.bad_body(path, &wrong))
    }
}

#[cfg(test)]
mod tests {
    use expect_test::expect;

    use super::*;

    #[test]
    fn a_registration_says_what_is_set_in_consuls_words() {
        let registration = Registration {
            id: "pay-1".to_owned(),
            name: "pay".to_owned(),
            tags: vec!["v3".to_owned()],
            port: 8080,
            weights: Some(Weights { passing: 5, warning: 0 }),
            checks: vec![Check {
                id: "pay-1:ttl".to_owned(),
                name: "agent".to_owned(),
                ttl: Some(Duration::from_secs(15)),
                status: Some(CheckStatus::Passing),
                deregister_critical_service_after: Some(Duration::from_secs(3600)),
                ..Check::default()
            }],
            ..Registration::default()
        };
        expect![[r#"{"ID":"pay-1","Name":"pay","Tags":["v3"],"Port":8080,"Weights":{"Passing":5,"Warning":0},"Checks":[{"CheckID":"pay-1:ttl","Name":"agent","TTL":"15000ms","Status":"passing","DeregisterCriticalServiceAfter":"3600000ms"}]}"#]]
        .assert_eq(&serde_json::to_string(&registration).unwrap());
    }
}
