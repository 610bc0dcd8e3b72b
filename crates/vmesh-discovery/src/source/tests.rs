use std::collections::VecDeque;

use tokio::sync::mpsc;
use vmesh_model::{Endpoint, Health, Labels, Place, Weight};

use super::*;
use crate::GuardConfig;

/// Says what a test tells it to say.
struct Scripted(mpsc::UnboundedReceiver<Result<Registrations, SourceError>>);

impl Source for Scripted {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        match self.0.recv().await {
            Some(said) => said,
            None => std::future::pending().await,
        }
    }

    async fn confirm(&mut self, _: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        std::future::pending().await
    }
}

fn registrations(services: &[(&str, u16)]) -> Registrations {
    let seen = |(service, endpoints): &(&str, u16)| {
        let endpoint = |port| Endpoint {
            address: ([10, 0, 0, 1], port).into(),
            hostname: None,
            weight: Weight::ONE,
            health: Health::Unknown,
            zone: None,
            version: None,
            labels: Labels::new(),
            source: "test".into(),
        };
        let name: ServiceName = service.parse().unwrap();
        let registration = Registration {
            service: name.clone(),
            protocol: None,
            port: None,
            endpoints: (1..=*endpoints).map(endpoint).collect(),
            place: Place::file("test"),
        };
        (name, Seen::fresh(Arc::new(registration)))
    };
    Registrations { services: services.iter().map(seen).collect(), ..Registrations::default() }
}

fn failed() -> SourceError {
    SourceError::Failed {
        source_name: "consul:dc1".into(),
        what: "list services".to_owned(),
        cause: "connection refused".into(),
    }
}

fn show(view: &View) -> String {
    let services: Vec<_> = view
        .services()
        .map(|(name, seen)| format!("{name} {} {}", seen.registration.endpoints.len(), seen.state))
        .collect();
    format!("{services:?} stale: {:?} held: {}", view.stale_because.as_deref().unwrap_or("no"), view.held)
}

struct Followed {
    say: mpsc::UnboundedSender<Result<Registrations, SourceError>>,
    views: watch::Receiver<View>,
    _task: tokio::task::JoinSet<()>,
}

fn followed(first: View) -> Followed {
    let (say, heard) = mpsc::unbounded_channel();
    let (publish, views) = watch::channel(first.clone());
    let guard = match &first.last_good {
        Some(last_good) => Guard::restored("test", GuardConfig::default().for_files(), last_good),
        None => Guard::new("test", GuardConfig::default().for_files()),
    };
    let mut task = tokio::task::JoinSet::new();
    task.spawn(follow(Scripted(heard), guard, publish));
    Followed { say, views, _task: task }
}

impl Followed {
    async fn until(&mut self, expected: &str) {
        let changed = async {
            while show(&self.views.borrow_and_update()) != expected {
                self.views.changed().await.unwrap();
            }
        };
        // The clock is paused: this bound is never waited for unless nothing else is left to happen.
        if tokio::time::timeout(Duration::from_secs(3600), changed).await.is_err() {
            panic!("expected {expected}\nfound    {}", show(&self.views.borrow()));
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_source_that_fails_does_not_empty_the_mesh() {
    let mut followed = followed(View::default());
    followed.say.send(Err(failed())).unwrap();
    let cause = "discovery source `consul:dc1` could not list services: connection refused";
    followed.until(&format!("[] stale: {cause:?} held: 0")).await;
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
    followed.say.send(Err(failed())).unwrap();
    followed.until(&format!("[\"orders 2 stale\"] stale: {cause:?} held: 0")).await;
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
}

#[tokio::test(start_paused = true)]
async fn what_is_held_is_believed_when_its_time_has_come() {
    let mut followed = followed(View::default());
    followed.say.send(Ok(registrations(&[("orders", 2), ("web", 1)]))).unwrap();
    followed.until(r#"["orders 2 fresh", "web 1 fresh"] stale: "no" held: 0"#).await;
    let since = Instant::now();
    followed.say.send(Ok(registrations(&[("web", 1)]))).unwrap();
    followed.until(r#"["orders 2 held", "web 1 fresh"] stale: "no" held: 1"#).await;
    followed.until(r#"["web 1 fresh"] stale: "no" held: 0"#).await;
    assert_eq!(since.elapsed().as_secs(), 30);
}

#[tokio::test(start_paused = true)]
async fn what_was_good_before_a_restart_is_there_before_the_source_answers() {
    let before = serde_json::to_string(&registrations(&[("orders", 3)])).unwrap();
    let before: Registrations = serde_json::from_str(&before).unwrap();
    assert_eq!(before, registrations(&[("orders", 3)]));
    let mut followed = followed(View::restored(before.into()));
    let cause = "the source has not answered since the start; this is from before";
    followed.until(&format!("[\"orders 3 stale\"] stale: {cause:?} held: 0")).await;
    followed.say.send(Err(failed())).unwrap();
    let cause = "discovery source `consul:dc1` could not list services: connection refused";
    followed.until(&format!("[\"orders 3 stale\"] stale: {cause:?} held: 0")).await;
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
}

#[tokio::test(start_paused = true)]
async fn a_view_that_says_the_same_is_not_published_again() {
    let mut followed = followed(View::default());
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
    let before = followed.views.borrow().last_good.clone().unwrap();
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.say.send(Ok(registrations(&[("orders", 2), ("web", 1)]))).unwrap();
    followed.until(r#"["orders 2 fresh", "web 1 fresh"] stale: "no" held: 0"#).await;
    let after = followed.views.borrow().last_good.clone().unwrap();
    assert!(!Arc::ptr_eq(&before, &after));
}

#[test]
fn the_backoff_grows_to_half_a_minute_and_is_drawn() {
    let mut backoff = Backoff::default();
    let waits: VecDeque<_> = (0..12).map(|_| backoff.draw()).collect();
    let millis = Duration::from_millis;
    assert!((millis(50)..=millis(100)).contains(&waits[0]), "{waits:?}");
    assert!((millis(400)..=millis(800)).contains(&waits[3]), "{waits:?}");
    assert!((millis(15_000)..=millis(30_000)).contains(&waits[11]), "{waits:?}");
    backoff.reset();
    assert!(backoff.draw() <= millis(100));
}
