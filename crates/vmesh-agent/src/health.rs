//! Health checks of applications. A check is repeated at an interval, and a change of health needs several equal results in a row.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use serde::Deserialize;
use serde::de::value::MapAccessDeserializer;
use serde::de::{self, Deserializer, MapAccess, Visitor};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tracing::info;
use vmesh_daemon::fetch::{Peer, fetch};
use vmesh_daemon::report::one_line;
use vmesh_model::text::Time;

/// A health check, in `agent.yaml`: `tcp`, or `{http: /healthz, interval: 2s}`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// The path that must answer with 2xx or 3xx. Without a path, an accepted connection suffices.
    pub http: Option<String>,
    /// Pause between a result and the next check.
    pub interval: Duration,
    /// A check without an answer for this long has failed.
    pub timeout: Duration,
    /// Number of successes in a row that make an unhealthy application healthy.
    pub rise: u32,
    /// Number of failures in a row that make an application unhealthy.
    pub fall: u32,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CheckFields {
    http: Option<String>,
    interval: Option<Time>,
    timeout: Option<Time>,
    rise: Option<u32>,
    fall: Option<u32>,
}

impl CheckFields {
    const TCP: CheckFields =
        CheckFields { http: None, interval: None, timeout: None, rise: None, fall: None };

    fn check<E: de::Error>(self) -> Result<HealthCheck, E> {
        let check = HealthCheck {
            http: self.http,
            interval: self.interval.map_or(Duration::from_secs(2), |time| time.0),
            timeout: self.timeout.map_or(Duration::from_secs(1), |time| time.0),
            rise: self.rise.unwrap_or(2),
            fall: self.fall.unwrap_or(3),
        };
        if check.http.as_ref().is_some_and(|path| !path.starts_with('/')) {
            return Err(E::custom("`http` is a path and begins with `/`"));
        }
        if check.rise == 0 || check.fall == 0 {
            return Err(E::custom("`rise` and `fall` are 1 at least: how many answers in a row decide"));
        }
        if check.interval < Duration::from_millis(100) {
            return Err(E::custom("`interval` is 100ms at least: more often is load without use"));
        }
        Ok(check)
    }
}

impl<'de> Deserialize<'de> for HealthCheck {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct CheckVisitor;

        impl<'de> Visitor<'de> for CheckVisitor {
            type Value = HealthCheck;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("`tcp`, or a check as {http: /healthz}")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<HealthCheck, E> {
                match text {
                    "tcp" => CheckFields::TCP.check(),
                    other => Err(E::custom(format!("`{other}` is no check: `tcp`, or {{http: /healthz}}"))),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<HealthCheck, A::Error> {
                CheckFields::deserialize(MapAccessDeserializer::new(map))?.check()
            }
        }

        deserializer.deserialize_any(CheckVisitor)
    }
}

/// The health of an application.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Health {
    /// The number of completed checks is still too small for a verdict.
    #[default]
    Unknown,
    Healthy,
    Unhealthy,
}

/// Derives the health from the results of checks, without flapping.
#[derive(Debug)]
struct HealthTracker {
    rise: u32,
    fall: u32,
    health: Health,
    /// Number of results in a row that contradict `health`. The first success decides at once while the health is unknown.
    against: u32,
}

impl HealthTracker {
    fn new(check: &HealthCheck) -> HealthTracker {
        HealthTracker { rise: check.rise, fall: check.fall, health: Health::Unknown, against: 0 }
    }

    /// Returns the health after one more result. The first success counts at once: an application that ran before the agent started must
    /// not be missing until `rise` checks have passed.
    fn record(&mut self, is_success: bool) -> Health {
        let (now, needed) = match (self.health, is_success) {
            (Health::Healthy, true) | (Health::Unhealthy, false) => {
                self.against = 0;
                return self.health;
            }
            (Health::Unknown, true) => (Health::Healthy, 1),
            (Health::Unhealthy, true) => (Health::Healthy, self.rise),
            (Health::Unknown | Health::Healthy, false) => (Health::Unhealthy, self.fall),
        };
        self.against += 1;
        if self.against >= needed {
            (self.health, self.against) = (now, 0);
        }
        self.health
    }
}

/// Checks the application at `address` until it is dropped. `name` identifies the application in the log.
pub(crate) async fn watch(
    name: String,
    check: HealthCheck,
    address: SocketAddr,
    health: watch::Sender<Health>,
) {
    let mut tracker = HealthTracker::new(&check);
    loop {
        let answer = run_check(&check, address).await;
        let now = tracker.record(answer.is_ok());
        let is_news = health.send_if_modified(|health| std::mem::replace(health, now) != now);
        if is_news {
            match answer {
                Ok(()) => info!("{name} is healthy"),
                Err(why) => info!("{name} is unhealthy: {why}"),
            }
        }
        // Spread out, so that the checks of all workloads of a host do not coincide.
        sleep(check.interval + vmesh_backoff::jitter(check.interval / 10)).await;
    }
}

async fn run_check(check: &HealthCheck, address: SocketAddr) -> Result<(), String> {
    match &check.http {
        None => match timeout(check.timeout, TcpStream::connect(address)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(format!("connecting to {address}: {error}")),
            Err(_) => Err(format!("{address} took no connection within {} s", check.timeout.as_secs_f32())),
        },
        Some(path) => match fetch(&Peer::Tcp(address), Method::GET, path, check.timeout).await {
            Ok((status, _)) if status.is_success() || status.is_redirection() => Ok(()),
            Ok((status, _)) => Err(format!("GET {path} at {address} was answered with {status}")),
            Err(error) => Err(one_line(&error)),
        },
    }
}

#[cfg(test)]
mod tests {
    use vmesh_testkit::app::HttpApp;
    use vmesh_testkit::{Loopback, wait_for};

    use super::*;

    fn check(rise: u32, fall: u32) -> HealthCheck {
        HealthCheck { rise, fall, ..CheckFields::TCP.check::<serde_json::Error>().unwrap() }
    }

    #[test]
    fn health_follows_rise_and_fall_and_the_first_success_counts() {
        let run = |answers: &str| {
            let mut tracker = HealthTracker::new(&check(2, 3));
            answers
                .chars()
                .map(|answer| match tracker.record(answer == '+') {
                    Health::Unknown => '?',
                    Health::Healthy => 'w',
                    Health::Unhealthy => 'i',
                })
                .collect::<String>()
        };
        assert_eq!(run("+--+---+-++"), "wwwwwwiiiiw");
        assert_eq!(run("---"), "??i");
        assert_eq!(run("--+"), "??w");
    }

    #[test]
    fn a_check_is_a_word_or_a_mapping() {
        let parse = |text: &str| {
            vmesh_model::load::strict::<HealthCheck>("a.yaml", text).map_err(|all| all[0].to_string())
        };
        assert_eq!(parse("tcp").unwrap(), check(2, 3));
        let full = parse("{http: /healthz, interval: 5s, timeout: 500ms, rise: 1, fall: 1}").unwrap();
        assert_eq!((full.http.as_deref(), full.interval), (Some("/healthz"), Duration::from_secs(5)));
        for (text, why) in [
            ("udp", "`udp` is no check"),
            ("{http: healthz}", "begins with `/`"),
            ("{fall: 0}", "1 at least"),
            ("{interval: 1ms}", "100ms at least"),
            ("{htp: /x}", "did you mean `http`?"),
        ] {
            let said = parse(text).unwrap_err();
            assert!(said.contains(why), "{said}");
        }
    }

    #[tokio::test]
    async fn an_application_is_asked_and_its_illness_is_seen() {
        let place = Loopback::unique().unwrap();
        let address = SocketAddr::new(place.ip(), place.port().unwrap());
        let app = HttpApp::start("a", "v1", address).unwrap();
        let (health, mut seen) = watch::channel(Health::default());
        let fast =
            HealthCheck { http: Some("/".to_owned()), interval: Duration::from_millis(100), ..check(1, 2) };
        let mut tasks = vmesh_daemon::Tasks::new();
        tasks.spawn("health", super::watch("workload `a`".to_owned(), fast, address, health));
        let bound = Duration::from_secs(20);
        timeout(bound, seen.wait_for(|health| *health == Health::Healthy)).await.unwrap().unwrap();
        drop(app);
        timeout(bound, seen.wait_for(|health| *health == Health::Unhealthy)).await.unwrap().unwrap();
        let _back = wait_for("the port to be free", bound, async || HttpApp::start("a", "v1", address))
            .await
            .unwrap();
        timeout(bound, seen.wait_for(|health| *health == Health::Healthy)).await.unwrap().unwrap();
    }
}
