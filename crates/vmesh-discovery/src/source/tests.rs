use std::collections::VecDeque;

use tokio::sync::{mpsc, oneshot};
use tokio::time::Instant;
use vmesh_model::{Endpoint, Health, Labels, Place, Registration, Weight};

use super::*;
use crate::guard::{AcceptError, FleetConfig, Guard, GuardConfig, NoticeKind};

/// A source that returns the views a test sends it.
struct ScriptedSource {
    heard: mpsc::UnboundedReceiver<Result<Registrations, SourceError>>,
    last: Registrations,
    confirms: ConfirmingRead,
}

/// The result of a confirming read.
#[derive(Clone, Copy)]
enum ConfirmingRead {
    TheSame,
    Never,
    Fails,
}

impl Source for ScriptedSource {
    async fn next(&mut self) -> Result<Registrations, SourceError> {
        match self.heard.recv().await {
            Some(message) => {
                self.last = message?;
                Ok(self.last.clone())
            }
            None => std::future::pending().await,
        }
    }

    async fn confirm(&mut self, _: &BTreeSet<ServiceName>) -> Result<Registrations, SourceError> {
        match self.confirms {
            ConfirmingRead::TheSame => Ok(self.last.clone()),
            ConfirmingRead::Never => std::future::pending().await,
            ConfirmingRead::Fails => Err(failed()),
        }
    }
}

fn registrations(services: &[(&str, u16)]) -> Registrations {
    let observed = |(service, endpoints): &(&str, u16)| {
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
        (name, ServiceView::fresh(Arc::new(registration)))
    };
    Registrations { services: services.iter().map(observed).collect(), ..Registrations::default() }
}

fn failed() -> SourceError {
    SourceError::Failed {
        source_name: "consul:dc1".into(),
        action: "list services".to_owned(),
        cause: "connection refused".into(),
    }
}

fn show(view: &View) -> String {
    let services: Vec<_> = view
        .services()
        .map(|(name, observed)| {
            format!("{name} {} {}", observed.registration.endpoints.len(), observed.state)
        })
        .collect();
    format!(
        "{services:?} stale: {:?} held: {}",
        view.stale_because.as_deref().unwrap_or("no"),
        view.held.len()
    )
}

struct FollowedSource {
    say: mpsc::UnboundedSender<Result<Registrations, SourceError>>,
    handle: Handle,
    _task: tokio::task::JoinSet<()>,
}

fn followed(first: View) -> FollowedSource {
    followed_with(first, ConfirmingRead::TheSame, GuardConfig::default())
}

fn followed_with(first: View, confirms: ConfirmingRead, config: GuardConfig) -> FollowedSource {
    let (say, heard) = mpsc::unbounded_channel();
    let guard = match &first.last_good {
        Some(last_good) => Guard::restored("test", config.for_files(), last_good),
        None => Guard::new("test", config.for_files()),
    };
    let (handle, link) = link("test".into(), first);
    let mut task = tokio::task::JoinSet::new();
    task.spawn(follow(ScriptedSource { heard, last: Registrations::default(), confirms }, guard, link));
    FollowedSource { say, handle, _task: task }
}

impl FollowedSource {
    async fn until(&mut self, expected: &str) {
        let changed = async {
            while show(&self.handle.views.borrow_and_update()) != expected {
                self.handle.views.changed().await.unwrap();
            }
        };
        // The clock is paused, so this timeout only elapses when the test is stuck.
        if tokio::time::timeout(Duration::from_secs(3600), changed).await.is_err() {
            panic!("expected {expected}\nfound    {}", show(&self.handle.views.borrow()));
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

fn what_happened(followed: &FollowedSource) -> Vec<&'static str> {
    followed.handle.events.all().iter().map(|event| event.kind.as_str()).collect()
}

async fn ask<T>(followed: &FollowedSource, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> T {
    let (done, answer) = oneshot::channel();
    followed.handle.commands.send(command(done)).await.unwrap();
    answer.await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn what_is_held_waits_for_the_source_to_be_read_again() {
    for (confirms, seconds) in
        [(ConfirmingRead::Fails, 3600), (ConfirmingRead::Never, 3600), (ConfirmingRead::TheSame, 30)]
    {
        let mut followed = followed_with(View::default(), confirms, GuardConfig::default());
        followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
        followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
        let since = Instant::now();
        followed.say.send(Ok(Registrations::default())).unwrap();
        followed.until(r#"["orders 2 held"] stale: "no" held: 1"#).await;
        let is_gone = followed.handle.views.wait_for(|view| view.held.is_empty());
        let gone = tokio::time::timeout(Duration::from_secs(3600), is_gone).await.is_ok();
        assert_eq!((gone, since.elapsed().as_secs()), (seconds < 3600, seconds));
        if let ConfirmingRead::TheSame = confirms {
            assert_eq!(what_happened(&followed), ["held", "confirmed", "confirmed", "believed"]);
            continue;
        }
        let why = followed.handle.views.borrow().held[0].because.clone();
        assert!(why.contains("the confirming read failed"), "{why}");
        // Commands of the operator are answered while the read is under way.
        let service = Some("orders".parse().unwrap());
        let accepted = ask(&followed, |done| Command::Accept { service, done }).await;
        assert_eq!(accepted, Ok(vec!["orders".parse().unwrap()]));
        followed.until(r#"[] stale: "no" held: 0"#).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_frozen_source_changes_nothing_and_a_thawed_one_is_guarded_as_ever() {
    let mut followed = followed(View::default());
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
    let since = SystemTime::UNIX_EPOCH;
    assert!(ask(&followed, |done| Command::Freeze { since, done }).await);
    assert!(!ask(&followed, |done| Command::Freeze { since, done }).await);
    followed.say.send(Ok(registrations(&[("orders", 3), ("web", 1)]))).unwrap();
    followed.until(r#"["orders 2 held"] stale: "no" held: 0"#).await;
    let accept = ask(&followed, |done| Command::Accept { service: None, done }).await;
    assert_eq!(accept, Err(AcceptError::Frozen));
    assert!(ask(&followed, |done| Command::Thaw { done }).await);
    followed.until(r#"["orders 3 fresh", "web 1 fresh"] stale: "no" held: 0"#).await;
    let accept = ask(&followed, |done| Command::Accept { service: None, done }).await;
    assert_eq!(accept, Err(AcceptError::NothingHeld));
    assert_eq!(what_happened(&followed), ["frozen", "thawed"]);
}

#[tokio::test(start_paused = true)]
async fn a_source_that_loses_most_of_all_is_held_until_that_is_accepted_and_counted() {
    let config =
        GuardConfig { fleet: FleetConfig { min: 4, ..FleetConfig::default() }, ..GuardConfig::default() };
    let mut followed = followed_with(View::default(), ConfirmingRead::TheSame, config);
    followed.say.send(Ok(registrations(&[("a", 4), ("b", 4), ("c", 4)]))).unwrap();
    followed.until(r#"["a 4 fresh", "b 4 fresh", "c 4 fresh"] stale: "no" held: 0"#).await;
    followed.say.send(Ok(registrations(&[("a", 4), ("b", 1)]))).unwrap();
    followed.until(r#"["a 4 fresh", "b 4 held", "c 4 held"] stale: "no" held: 3"#).await;
    tokio::time::sleep(Duration::from_secs(86_400)).await;
    followed.until(r#"["a 4 fresh", "b 4 held", "c 4 held"] stale: "no" held: 3"#).await;
    let accepted = ask(&followed, |done| Command::Accept { service: None, done }).await;
    assert_eq!(accepted.unwrap().len(), 2);
    followed.until(r#"["a 4 fresh", "b 1 fresh"] stale: "no" held: 0"#).await;
    let held: Vec<_> = followed.handle.counters.held.all().map(|(kind, n)| format!("{kind} {n}")).collect();
    assert_eq!(held, ["empty 0", "shrunk 0", "absent 0", "unhealthy 0", "fleet 3", "unreadable 0"]);
    let accepted = followed.handle.events.all().iter().filter(|e| e.kind == NoticeKind::Accepted).count();
    assert_eq!(accepted, 3);
}

#[tokio::test(start_paused = true)]
async fn what_is_known_of_a_source_that_is_away_for_too_long_is_given_up_if_that_is_asked_for() {
    let config = GuardConfig { max_stale: Some(Duration::from_secs(60)), ..GuardConfig::default() };
    let mut followed = followed_with(View::default(), ConfirmingRead::TheSame, config);
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
    followed.say.send(Err(failed())).unwrap();
    let cause = "discovery source `consul:dc1` could not list services: connection refused";
    followed.until(&format!("[\"orders 2 stale\"] stale: {cause:?} held: 0")).await;
    let since = Instant::now();
    followed.until(&format!("[] stale: {cause:?} held: 0")).await;
    assert_eq!(since.elapsed().as_secs(), 60);
    followed.say.send(Ok(registrations(&[("orders", 1)]))).unwrap();
    followed.until(r#"["orders 1 fresh"] stale: "no" held: 0"#).await;
    assert_eq!(what_happened(&followed), ["failing", "given up", "answering"]);
}

#[tokio::test(start_paused = true)]
async fn what_was_good_before_a_restart_is_there_before_the_source_answers() {
    let before = serde_json::to_string(&registrations(&[("orders", 3)])).unwrap();
    let before: Registrations = serde_json::from_str(&before).unwrap();
    assert_eq!(before, registrations(&[("orders", 3)]));
    let mut followed = followed(View::restored(before.into()));
    let cause = "the source has not answered since the start; its view from before the start is in force";
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
    let before = followed.handle.views.borrow().last_good.clone().unwrap();
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.say.send(Ok(registrations(&[("orders", 2), ("web", 1)]))).unwrap();
    followed.until(r#"["orders 2 fresh", "web 1 fresh"] stale: "no" held: 0"#).await;
    let after = followed.handle.views.borrow().last_good.clone().unwrap();
    assert!(!Arc::ptr_eq(&before, &after));
}

#[tokio::test(start_paused = true)]
async fn the_end_of_a_long_outage_is_heard_soon() {
    let mut followed = followed(View::default());
    for _ in 0..20 {
        followed.say.send(Err(failed())).unwrap();
    }
    tokio::time::sleep(Duration::from_secs(600)).await;
    let since = Instant::now();
    followed.say.send(Err(failed())).unwrap();
    followed.say.send(Ok(registrations(&[("orders", 2)]))).unwrap();
    followed.until(r#"["orders 2 fresh"] stale: "no" held: 0"#).await;
    assert!(since.elapsed() <= Duration::from_secs(2), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_reading_that_is_asked_for_is_taken_and_ends_the_pause_after_a_failure() {
    let mut followed = followed(View::default());
    followed.say.send(Ok(registrations(&[("web", 1)]))).unwrap();
    followed.until(r#"["web 1 fresh"] stale: "no" held: 0"#).await;
    followed.say.send(Err(failed())).unwrap();
    followed.handle.views.wait_for(|view| view.stale_because.is_some()).await.unwrap();
    followed.handle.commands.send(Command::ReadAgain).await.unwrap();
    followed.until(r#"["web 1 fresh"] stale: "no" held: 0"#).await;

    // A failed read that the operator asked for changes nothing.
    let mut broken = followed_with(View::default(), ConfirmingRead::Fails, GuardConfig::default());
    broken.say.send(Ok(registrations(&[("web", 1)]))).unwrap();
    broken.until(r#"["web 1 fresh"] stale: "no" held: 0"#).await;
    broken.handle.commands.send(Command::ReadAgain).await.unwrap();
    broken.say.send(Ok(registrations(&[("pay", 1), ("web", 1)]))).unwrap();
    broken.until(r#"["pay 1 fresh", "web 1 fresh"] stale: "no" held: 0"#).await;
}

#[tokio::test(start_paused = true)]
async fn what_a_registry_says_reaches_no_terminal_and_no_log_unescaped() {
    let hostile = "\u{1b}[2J\u{202e}\nforged";
    let error = || SourceError::Failed {
        source_name: "consul".into(),
        action: format!("read {hostile}"),
        cause: hostile.into(),
    };
    assert_eq!(error().to_string(), "discovery source `consul` could not read \\u{1b}[2J\\u{202e}\\nforged");
    let mut followed = followed(View::default());
    let left_out = Registrations { unusable: vec![hostile.into()], ..registrations(&[("web", 1)]) };
    followed.say.send(Ok(left_out)).unwrap();
    followed.handle.views.wait_for(|view| view.unusable.is_some()).await.unwrap();
    followed.say.send(Err(error())).unwrap();
    followed.handle.views.wait_for(|view| view.stale_because.is_some()).await.unwrap();
    let view = followed.handle.views.borrow().clone();
    let events = followed.handle.events.all();
    let texts = events.iter().map(|event| &event.text).chain(&view.stale_because).chain(&view.unusable);
    let texts: Vec<&Arc<str>> = texts.collect();
    assert_eq!(texts.len(), 4, "{texts:?}");
    for text in texts {
        assert!(text.contains("\\u{1b}[2J\\u{202e}\\nforged"), "{text}");
        assert!(!text.contains(['\u{1b}', '\u{202e}', '\n']), "{text}");
    }
}

#[test]
fn the_backoff_grows_to_two_seconds_and_is_drawn() {
    let mut backoff = call_backoff();
    let waits: VecDeque<_> = (0..12).map(|_| backoff.next_pause()).collect();
    let millis = Duration::from_millis;
    assert!((millis(50)..=millis(100)).contains(&waits[0]), "{waits:?}");
    assert!((millis(400)..=millis(800)).contains(&waits[3]), "{waits:?}");
    assert!((millis(1_000)..=millis(2_000)).contains(&waits[11]), "{waits:?}");
    backoff.reset();
    assert!(backoff.next_pause() <= millis(100));
}

#[tokio::test(start_paused = true)]
async fn a_first_view_of_which_a_part_cannot_be_used_is_not_served_until_it_can_or_that_is_accepted() {
    let broken =
        || Registrations { unusable: vec!["all.yaml:3:1: a tab".into()], ..registrations(&[("web", 1)]) };
    for accepts in [false, true] {
        let mut followed = followed(View::default());
        followed.say.send(Ok(broken())).unwrap();
        let unusable =
            |view: &View| view.unusable.as_ref().is_some_and(|why| why.contains("all.yaml:3:1: a tab"));
        followed.handle.views.wait_for(unusable).await.unwrap();
        assert_eq!(what_happened(&followed), ["failing"]);
        if accepts {
            assert_eq!(ask(&followed, |done| Command::Accept { service: None, done }).await, Ok(Vec::new()));
        } else {
            followed.say.send(Ok(registrations(&[("pay", 1), ("web", 1)]))).unwrap();
        }
        followed.handle.views.wait_for(|view| view.unusable.is_none()).await.unwrap();
        // After the first view, an unusable part no longer delays the other services.
        followed.say.send(Ok(broken())).unwrap();
        followed
            .until(match accepts {
                true => r#"["web 1 fresh"] stale: "no" held: 0"#,
                false => r#"["pay 1 held", "web 1 fresh"] stale: "no" held: 1"#,
            })
            .await;
        assert_eq!(followed.handle.views.borrow().unusable, None);
    }
    // A record that was read and left out delays only itself, unless the source has nothing else.
    let left_out = |reported| Registrations { left_out: vec!["pay: no port".into()], ..reported };
    let mut fresh = self::followed(View::default());
    fresh.say.send(Ok(left_out(registrations(&[])))).unwrap();
    let unusable = |view: &View| view.unusable.as_ref().is_some_and(|why| why.contains("pay: no port"));
    fresh.handle.views.wait_for(unusable).await.unwrap();
    fresh.say.send(Ok(left_out(registrations(&[("web", 1)])))).unwrap();
    fresh.until(r#"["web 1 fresh"] stale: "no" held: 0"#).await;
    assert_eq!(fresh.handle.views.borrow().unusable, None);
    // The view from before the restart is served.
    let mut followed = followed(View::restored(registrations(&[("web", 1)]).into()));
    followed.say.send(Ok(broken())).unwrap();
    followed.until(r#"["web 1 fresh"] stale: "no" held: 0"#).await;
    assert_eq!(followed.handle.views.borrow().unusable, None);
}
