//! The task that follows a source: it takes the views of the source and the commands of the operator, and
//! publishes what the guard believes.

use std::collections::BTreeSet;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;
use vmesh_model::ServiceName;

use super::{
    Counters, Events, NOT_ANSWERED_YET, Registrations, Source, SourceError, View, call_backoff, chain,
    escape_text,
};
use crate::guard::{AcceptError, Guard, Notice, NoticeKind};
use crate::resolve::UnresolvedNames;

/// The time limit of a read that confirms a held removal.
const CONFIRM_WITHIN: Duration = Duration::from_secs(20);

/// A command of the operator to a source.
#[derive(Debug)]
pub enum Command {
    /// Believes the held changes of `service`, or all held changes of the source. The answer lists the
    /// services concerned.
    Accept { service: Option<ServiceName>, done: oneshot::Sender<Result<Vec<ServiceName>, AcceptError>> },
    /// Freezes the source: none of its changes are applied. The answer is `false` if it was frozen already.
    Freeze { since: SystemTime, done: oneshot::Sender<bool> },
    /// Applies changes of the source again. The answer is `false` if it was not frozen.
    Thaw { done: oneshot::Sender<bool> },
    /// Reads the source again now, with its strongest consistency, whether or not it reported a change.
    ReadAgain,
}

/// The handle of a followed source, for readers of its views and senders of commands.
#[derive(Debug, Clone)]
pub struct Handle {
    pub name: Arc<str>,
    pub views: watch::Receiver<View>,
    pub commands: mpsc::Sender<Command>,
    pub counters: Arc<Counters>,
    pub events: Events,
}

/// The end of a [`Handle`] that the [`follow`] task holds.
#[derive(Debug)]
pub struct Link {
    pub views: watch::Sender<View>,
    pub commands: mpsc::Receiver<Command>,
    pub counters: Arc<Counters>,
    pub events: Events,
}

/// Creates a [`Handle`] and its [`Link`]. `view` is published until the source answers.
pub fn link(name: Arc<str>, view: View) -> (Handle, Link) {
    let (publish, views) = watch::channel(view);
    // Each sender waits for its answer, so few commands are ever queued.
    let (say, commands) = mpsc::channel(16);
    let (counters, events) = (Arc::new(Counters::default()), Events::default());
    let handle = Handle { name, views, commands: say, counters: counters.clone(), events: events.clone() };
    (handle, Link { views: publish, commands, counters, events })
}

/// Publishes the views of `source` that `guard` believes, and obeys commands. It never returns; drop the
/// future to stop.
///
/// If the source fails, its last good view stays published and is marked stale, so that a dead registry does
/// not empty the mesh.
pub async fn follow(mut source: impl Source, guard: Guard, link: Link) {
    let Link { views, mut commands, counters, events } = link;
    let stale_because = views.borrow().stale_because.clone();
    let is_usable = views.borrow().last_good.is_some();
    let mut followed = FollowState {
        guard,
        views,
        counters,
        events,
        stale_because,
        has_answered: false,
        is_usable,
        unusable: None,
        needs_read: false,
        unresolved: Arc::default(),
    };
    let mut backoff = call_backoff();
    let mut again_at: Option<Instant> = None;
    followed.publish();
    loop {
        tokio::select! {
            Some(command) = commands.recv() => followed.obey(command),
            result = source.next(), if again_at.is_none() => match result {
                Ok(reported) => {
                    backoff.reset();
                    followed.check_first_view(&reported);
                    followed.take_answer(|guard, now| guard.observe(reported, now));
                }
                Err(error) => {
                    followed.record_failure(&error);
                    again_at = Some(Instant::now() + backoff.next_pause());
                }
            },
            () = wait_until(again_at) => again_at = None,
            // A held removal is confirmed by elapsed time and by reads that the guard asks for.
            () = wait_until(followed.guard.deadline().map(Instant::from_std)) => {}
        }
        if std::mem::take(&mut followed.needs_read) {
            again_at = None;
            backoff.reset();
            let nothing = BTreeSet::new();
            let reading = tokio::time::timeout(CONFIRM_WITHIN, source.confirm(&nothing));
            let read = followed.obey_while(reading, &mut commands).await;
            followed
                .take_requested_read(read.unwrap_or_else(|_| Err(read_timed_out(followed.guard.source()))));
        }
        let services = followed.guard.services_to_confirm(Instant::now().into_std());
        if !services.is_empty() {
            let reading = tokio::time::timeout(CONFIRM_WITHIN, source.confirm(&services));
            let read = followed.obey_while(reading, &mut commands).await;
            followed.take_confirming_read(
                &services,
                read.unwrap_or_else(|_| Err(read_timed_out(followed.guard.source()))),
            );
        }
        followed.publish();
    }
}

fn read_timed_out(source: &Arc<str>) -> SourceError {
    let action = "answer when it was read again".to_owned();
    let cause = format!("no answer within {} s", CONFIRM_WITHIN.as_secs()).into();
    SourceError::Failed { source_name: source.clone(), action, cause }
}

/// The state of a [`follow`] task.
struct FollowState {
    guard: Guard,
    views: watch::Sender<View>,
    counters: Arc<Counters>,
    events: Events,
    stale_because: Option<Arc<str>>,
    has_answered: bool,
    /// A view of the source may be served: either one view had no unusable parts, or a last good view was
    /// restored.
    is_usable: bool,
    /// The reason why no view may be served yet.
    unusable: Option<Arc<str>>,
    /// The operator asked for a read.
    needs_read: bool,
    unresolved: Arc<UnresolvedNames>,
}

impl FollowState {
    /// Decides whether the first view may be served. A view with a part that could not be read and has no
    /// last good state would remove that part from every proxy. A record that was read and left out does not
    /// delay the first view, unless the view has no services at all.
    fn check_first_view(&mut self, reported: &Registrations) {
        /// The number of reasons that the message lists.
        const SAID: usize = 3;
        self.update_unresolved(reported);
        if self.is_usable {
            return;
        }
        let source = self.guard.source().clone();
        let left_out: &[_] = if reported.services.is_empty() { &reported.left_out } else { &[] };
        let unusable: Vec<_> = reported.unusable.iter().chain(left_out).collect();
        if unusable.is_empty() {
            self.is_usable = true;
            if self.unusable.take().is_some() {
                let text = format!("the view of `{source}` is usable").into();
                self.report(vec![Notice { kind: NoticeKind::Answering, service: None, hold: None, text }]);
            }
            return;
        }
        let mut why: Vec<&str> = unusable.iter().take(SAID).map(|why| &***why).collect();
        let more = format!("and {} more", unusable.len().saturating_sub(SAID));
        if unusable.len() > SAID {
            why.push(&more);
        }
        let reason = match reported.unusable.is_empty() {
            false => "a part of the source cannot be read and has no last good state",
            true => "nothing in the source is usable, and it has no last good state",
        };
        let because: Arc<str> = format!(
            "{reason}: {}; repair it, or serve without it by `vmeshctl discovery accept`",
            why.join("; ")
        )
        .into();
        let because = escape_text(&because);
        if self.unusable.as_ref() != Some(&because) {
            self.unusable = Some(because.clone());
            self.report(vec![Notice { kind: NoticeKind::Failing, service: None, hold: None, text: because }]);
        }
    }

    fn update_unresolved(&mut self, reported: &Registrations) {
        if *self.unresolved != reported.unresolved {
            self.unresolved = reported.unresolved.clone().into();
        }
    }

    /// Records that the source answered, and passes the answer to the guard.
    fn take_answer(&mut self, take: impl FnOnce(&mut Guard, std::time::Instant)) {
        self.counters.record_answer();
        self.has_answered = true;
        if let Some(because) = self.stale_because.take()
            && *because != *NOT_ANSWERED_YET
        {
            let text = format!("`{}` answers again", self.guard.source()).into();
            self.report(vec![Notice { kind: NoticeKind::Answering, service: None, hold: None, text }]);
        }
        take(&mut self.guard, Instant::now().into_std());
    }

    fn record_failure(&mut self, error: &SourceError) {
        self.guard.source_failed(Instant::now().into_std());
        let because: Arc<str> = chain(error).into();
        let before = self.stale_because.replace(because.clone());
        if before.as_ref() == Some(&because) {
            return;
        }
        if before.is_none_or(|before| *before == *NOT_ANSWERED_YET) {
            let text = format!("{because}; the last good view stays in force").into();
            self.report(vec![Notice { kind: NoticeKind::Failing, service: None, hold: None, text }]);
        } else {
            // The outage continues with another error message.
            tracing::warn!("{because}; the last good view stays in force");
        }
    }

    /// Takes the result of a read that the operator asked for. It counts like any other view and confirms no
    /// held removal.
    fn take_requested_read(&mut self, read: Result<Registrations, SourceError>) {
        match read {
            Ok(reported) => {
                self.check_first_view(&reported);
                self.take_answer(|guard, now| guard.observe(reported, now));
            }
            Err(error) => tracing::warn!("{}; the last good view stays in force", chain(&error)),
        }
    }

    fn take_confirming_read(
        &mut self,
        services: &BTreeSet<ServiceName>,
        read: Result<Registrations, SourceError>,
    ) {
        match read {
            Ok(reported) => {
                self.update_unresolved(&reported);
                self.take_answer(|guard, now| guard.record_confirming_read(services, reported, now));
            }
            Err(error) => {
                let because: Arc<str> = chain(&error).into();
                tracing::info!("{because}; the held changes stay held");
                self.guard.record_failed_read(services, &because, Instant::now().into_std());
            }
        }
    }

    /// Waits for `done` while obeying commands, so that the operator does not wait for a slow read.
    async fn obey_while<T>(
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

    /// Obeys `command`, except for [`Command::ReadAgain`], which is left to [`follow`] as the owner of the
    /// source. The sender is answered once the effect is published; a sender that has gone away is ignored.
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
            Command::ReadAgain => self.needs_read = true,
            Command::Thaw { done } => {
                let is_news = self.guard.thaw(Instant::now().into_std());
                self.publish();
                _ = done.send(is_news);
            }
        }
    }

    fn publish(&mut self) {
        // Before the first answer the guard has no view to believe.
        let is_known = self.has_answered || self.views.borrow().last_good.is_some();
        let believed = is_known.then(|| self.guard.judge(Instant::now().into_std()));
        let notices = self.guard.take_notices();
        self.report(notices);
        self.counters.missing.store(self.guard.missing_endpoints() as u64, Relaxed);
        let (held, frozen) = (self.guard.held_changes(), self.guard.frozen_since());
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

    /// Counts, remembers and logs `notices`.
    fn report(&mut self, notices: Vec<Notice>) {
        for notice in &notices {
            match (notice.kind, notice.hold) {
                (NoticeKind::Held, Some(kind)) => self.counters.held.add(kind),
                (NoticeKind::Returned, Some(kind)) => self.counters.rejected.add(kind),
                _ => {}
            }
        }
        for event in self.events.record(notices, SystemTime::now()) {
            let source = self.guard.source();
            let about = match &event.service {
                Some(service) => format!("service `{service}` of discovery source `{source}`"),
                None => format!("discovery source `{source}`"),
            };
            let (kind, text) = (event.kind.as_str(), &event.text);
            match event.kind {
                NoticeKind::Held | NoticeKind::Failing | NoticeKind::GivenUp | NoticeKind::Frozen => {
                    tracing::warn!("{about}: {kind}: {text}");
                }
                _ => tracing::info!("{about}: {kind}: {text}"),
            }
        }
    }
}

async fn wait_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
