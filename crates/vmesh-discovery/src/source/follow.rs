//! The one task of a source: from what it says and what the operator says to what is believed.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use vmesh_model::ServiceName;

use super::{
    Backoff, Counters, Events, NOT_ANSWERED_YET, Registrations, Source, SourceError, View, chain, shown,
};
use crate::guard::{Guard, NotAccepted, Notice, What};
use crate::resolve::UnresolvedNames;

/// How long a reading may take that is to confirm something.
const CONFIRM_WITHIN: Duration = Duration::from_secs(20);

/// What the operator says to a source.
#[derive(Debug)]
pub enum Command {
    /// Believe what is said of this service, or of all that is held. Answered with what was held.
    Accept { service: Option<ServiceName>, done: oneshot::Sender<Result<Vec<ServiceName>, NotAccepted>> },
    /// Take no change. Answered with whether that is news.
    Freeze { since: SystemTime, done: oneshot::Sender<bool> },
    /// Take changes again. Answered with whether that is news.
    Thaw { done: oneshot::Sender<bool> },
    /// Read the source again now, as strongly as it can, whether or not it was heard to change.
    ReadAgain,
}

/// A source that is followed, for whoever wants its views or has something to say to it.
#[derive(Debug, Clone)]
pub struct Handle {
    pub name: Arc<str>,
    pub views: watch::Receiver<View>,
    pub commands: mpsc::Sender<Command>,
    pub counters: Arc<Counters>,
    pub events: Events,
}

/// The other end of a [`Handle`].
#[derive(Debug)]
pub struct Link {
    pub views: watch::Sender<View>,
    pub commands: mpsc::Receiver<Command>,
    pub counters: Arc<Counters>,
    pub events: Events,
}

/// Both ends. `view` stands until the source answers.
pub fn link(name: Arc<str>, view: View) -> (Handle, Link) {
    let (publish, views) = watch::channel(view);
    // Who sends waits for the answer, so there are never many.
    let (say, commands) = mpsc::channel(16);
    let (counters, events) = (Arc::new(Counters::default()), Events::default());
    let handle = Handle { name, views, commands: say, counters: counters.clone(), events: events.clone() };
    (handle, Link { views: publish, commands, counters, events })
}

/// Publishes what `source` sees and `guard` believes, for as long as it is polled. On failure the last good view
/// stays, marked stale: a dead registry must not empty the mesh.
pub async fn follow(mut source: impl Source, guard: Guard, link: Link) {
    let Link { views, mut commands, counters, events } = link;
    let stale_because = views.borrow().stale_because.clone();
    let is_usable = views.borrow().last_good.is_some();
    let mut followed = Followed {
        guard,
        views,
        counters,
        events,
        stale_because,
        has_answered: false,
        is_usable,
        unusable: None,
        is_to_read_again: false,
        unresolved: Arc::default(),
    };
    let mut backoff = Backoff::default();
    let mut again_at: Option<Instant> = None;
    followed.publish();
    loop {
        tokio::select! {
            Some(command) = commands.recv() => followed.obey(command),
            said = source.next(), if again_at.is_none() => match said {
                Ok(told) => {
                    backoff.reset();
                    followed.judge_usable(&told);
                    followed.heard(|guard, now| guard.see(told, now));
                }
                Err(error) => {
                    followed.failed(&error);
                    again_at = Some(Instant::now() + backoff.draw());
                }
            },
            () = until(again_at) => again_at = None,
            // What was held is confirmed by time, and by readings that are asked for.
            () = until(followed.guard.deadline().map(Instant::from_std)) => {}
        }
        if std::mem::take(&mut followed.is_to_read_again) {
            again_at = None;
            backoff.reset();
            let nothing = BTreeSet::new();
            let reading = tokio::time::timeout(CONFIRM_WITHIN, source.confirm(&nothing));
            let read = followed.while_obeying(reading, &mut commands).await;
            followed.read_by_request(read.unwrap_or_else(|_| Err(too_slow(followed.guard.source()))));
        }
        let services = followed.guard.to_confirm(Instant::now().into_std());
        if !services.is_empty() {
            let reading = tokio::time::timeout(CONFIRM_WITHIN, source.confirm(&services));
            let read = followed.while_obeying(reading, &mut commands).await;
            followed.read_again(&services, read.unwrap_or_else(|_| Err(too_slow(followed.guard.source()))));
        }
        followed.publish();
    }
}

fn too_slow(source: &Arc<str>) -> SourceError {
    let what = "answer when it was read again".to_owned();
    let cause = format!("nothing came within {} s", CONFIRM_WITHIN.as_secs()).into();
    SourceError::Failed { source_name: source.clone(), what, cause }
}

/// What is known while a source is followed.
struct Followed {
    guard: Guard,
    views: watch::Sender<View>,
    counters: Arc<Counters>,
    events: Events,
    stale_because: Option<Arc<str>>,
    has_answered: bool,
    /// What the source says may be served: all of it could be used once, or was known from before.
    is_usable: bool,
    /// Why it may not.
    unusable: Option<Arc<str>>,
    /// The operator has asked for a reading.
    is_to_read_again: bool,
    unresolved: Arc<UnresolvedNames>,
}

impl Followed {
    /// Judges whether a first view may be served. A view of which a part could not be read, and is not known from before, would take
    /// that part away from everybody. What was read and left out costs itself, unless nothing else is there.
    fn judge_usable(&mut self, told: &Registrations) {
        /// So many reasons are given.
        const SAID: usize = 3;
        self.note_unresolved(told);
        if self.is_usable {
            return;
        }
        let source = self.guard.source().clone();
        let left_out: &[_] = if told.services.is_empty() { &told.left_out } else { &[] };
        let unusable: Vec<_> = told.unusable.iter().chain(left_out).collect();
        if unusable.is_empty() {
            self.is_usable = true;
            if self.unusable.take().is_some() {
                let text = format!("what `{source}` says can be used").into();
                self.tell(vec![Notice { what: What::Answering, service: None, kind: None, text }]);
            }
            return;
        }
        let mut why: Vec<&str> = unusable.iter().take(SAID).map(|why| &***why).collect();
        let more = format!("and {} more", unusable.len().saturating_sub(SAID));
        if unusable.len() > SAID {
            why.push(&more);
        }
        let what = match told.unusable.is_empty() {
            false => "a part of it cannot be read, and nothing is known of that from before",
            true => "nothing of it can be used, and nothing is known of it from before",
        };
        let because: Arc<str> = format!(
            "{what}: {}; mend it, or serve without it by `vmeshctl discovery accept`",
            why.join("; ")
        )
        .into();
        let because = shown(&because);
        if self.unusable.as_ref() != Some(&because) {
            self.unusable = Some(because.clone());
            self.tell(vec![Notice { what: What::Failing, service: None, kind: None, text: because }]);
        }
    }

    fn note_unresolved(&mut self, told: &Registrations) {
        if *self.unresolved != told.unresolved {
            self.unresolved = told.unresolved.clone().into();
        }
    }

    /// The source has answered.
    fn heard(&mut self, take: impl FnOnce(&mut Guard, std::time::Instant)) {
        self.counters.answered_now();
        self.has_answered = true;
        if let Some(because) = self.stale_because.take()
            && *because != *NOT_ANSWERED_YET
        {
            let text = format!("`{}` answers again", self.guard.source()).into();
            self.tell(vec![Notice { what: What::Answering, service: None, kind: None, text }]);
        }
        take(&mut self.guard, Instant::now().into_std());
    }

    fn failed(&mut self, error: &SourceError) {
        self.guard.source_failed(Instant::now().into_std());
        let because: Arc<str> = chain(error).into();
        let before = self.stale_because.replace(because.clone());
        if before.as_ref() == Some(&because) {
            return;
        }
        if before.is_none_or(|before| *before == *NOT_ANSWERED_YET) {
            let text = format!("{because}; the last good view stays in force").into();
            self.tell(vec![Notice { what: What::Failing, service: None, kind: None, text }]);
        } else {
            // The same outage in other words.
            tracing::warn!("{because}; the last good view stays in force");
        }
    }

    /// Takes the reading that the operator asked for: it counts like any other, and confirms nothing that is held.
    fn read_by_request(&mut self, read: Result<Registrations, SourceError>) {
        match read {
            Ok(told) => {
                self.judge_usable(&told);
                self.heard(|guard, now| guard.see(told, now));
            }
            Err(error) => tracing::warn!("{}; what was known stays in force", chain(&error)),
        }
    }

    fn read_again(&mut self, services: &BTreeSet<ServiceName>, read: Result<Registrations, SourceError>) {
        match read {
            Ok(told) => {
                self.note_unresolved(&told);
                self.heard(|guard, now| guard.confirmed(services, told, now));
            }
            Err(error) => {
                let because: Arc<str> = chain(&error).into();
                tracing::info!("{because}; what is held stays held");
                self.guard.not_confirmed(services, &because, Instant::now().into_std());
            }
        }
    }

    /// Waits for `done`, and does not let the operator wait meanwhile.
    async fn while_obeying<T>(
        &mut self,
        done: impl Future<Output = T>,
        commands: &mut mpsc::Receiver<Command>,
    ) -> T {
        tokio::pin!(done);
        loop {
            tokio::select! {
                done = &mut done => return done,
                Some(command) = commands.recv() => {
                    self.obey(command);
                    self.publish();
                }
            }
        }
    }

    /// Obeys, but for a reading, which is left to whoever owns the source. Who asked is answered when what was asked for is published, or nobody is there to be answered.
    fn obey(&mut self, command: Command) {
        match command {
            Command::Accept { service, done } => {
                let mut accepted = self.guard.accept(service.as_ref());
                if service.is_none() && self.unusable.take().is_some() {
                    self.is_usable = true;
                    accepted = accepted.or(Ok(Vec::new()));
                }
                self.publish();
                _ = done.send(accepted);
            }
            Command::Freeze { since, done } => {
                let is_news = self.guard.freeze(since);
                self.publish();
                _ = done.send(is_news);
            }
            Command::ReadAgain => self.is_to_read_again = true,
            Command::Thaw { done } => {
                let is_news = self.guard.thaw(Instant::now().into_std());
                self.publish();
                _ = done.send(is_news);
            }
        }
    }

    fn publish(&mut self) {
        // Before the first answer there is nothing to be believed.
        let is_known = self.has_answered || self.views.borrow().last_good.is_some();
        let believed = is_known.then(|| self.guard.believed(Instant::now().into_std()));
        let notices = self.guard.take_notices();
        self.tell(notices);
        self.counters.missing.store(self.guard.missing() as u64, Relaxed);
        let (held, frozen) = (self.guard.held(), self.guard.frozen());
        self.views.send_if_modified(|view| {
            let mut is_news = view.stale_because != self.stale_because
                || view.frozen != frozen
                || view.unusable != self.unusable
                || view.unresolved != self.unresolved;
            view.unusable = self.unusable.clone();
            view.unresolved = self.unresolved.clone();
            if let Some(believed) = believed
                && view.last_good.as_deref() != Some(&believed)
            {
                view.last_good = Some(Arc::new(believed));
                is_news = true;
            }
            view.stale_because = self.stale_because.clone();
            view.frozen = frozen;
            if *view.held != *held {
                view.held = held.into();
                is_news = true;
            }
            is_news
        });
    }

    /// Counts, remembers and logs.
    fn tell(&mut self, notices: Vec<Notice>) {
        for notice in &notices {
            match (notice.what, notice.kind) {
                (What::Held, Some(kind)) => self.counters.held.add(kind),
                (What::Returned, Some(kind)) => self.counters.rejected.add(kind),
                _ => {}
            }
        }
        for event in self.events.record(notices, SystemTime::now()) {
            let source = self.guard.source();
            let about = match &event.service {
                Some(service) => format!("service `{service}` of discovery source `{source}`"),
                None => format!("discovery source `{source}`"),
            };
            let (what, text) = (event.what.as_str(), &event.text);
            match event.what {
                What::Held | What::Failing | What::GivenUp | What::Frozen => {
                    tracing::warn!("{about}: {what}: {text}");
                }
                _ => tracing::info!("{about}: {what}: {text}"),
            }
        }
    }
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
