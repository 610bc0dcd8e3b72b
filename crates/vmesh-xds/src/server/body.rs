use super::Admitted;
use super::connection::{ConnectionUse, StreamGuard};
use super::service::{PeerInfo, ServiceShared};
use crate::grpc::{Failure, Messages};
use crate::{Bounds, Protocol, Request, Session, SessionError, State};
use bytes::Bytes;
use http::{HeaderMap, HeaderValue};
use http_body::{Body, Frame};
use std::collections::VecDeque;
use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::time::Sleep;
use tonic::{Code, Status};

/// The response body of one stream. The connection polls it while it can write, and each poll drives the whole
/// stream: its requests, its session and its timer. No poll happens while the client does not read, so a slow
/// client costs only the memory of its session (R60).
pub struct AdsBody<B>(BodyKind<B>);

enum BodyKind<B> {
    Ended,
    Whole(Bytes),
    Streaming(Box<Stream<B>>),
}

pub(super) struct Stream<B> {
    service: Arc<ServiceShared>,
    protocol: Protocol,
    requests: Messages<B>,
    peer: PeerInfo,
    session: Session,
    admitted: Option<Admitted>,
    /// The connection of the stream, if the caller of the service tracks connections.
    connection: Option<Arc<ConnectionUse>>,
    guard: Option<StreamGuard>,
    /// Fires when the connection reaches its maximum age.
    aged: Option<Pin<Box<Sleep>>>,
    /// The status that the observer was last called with.
    reported: ReportedStatus,
    frames: VecDeque<Bytes>,
    /// The status with which the stream ends after `frames` are written.
    end: Option<Failure>,
    timer: Option<Pin<Box<Sleep>>>,
}

type ReportedStatus = (State, u64, [u64; 3]);

/// The limit of requests that are read before the session may respond.
const REQUESTS_AT_ONCE: usize = 64;
/// The deadline of the first request of a stream.
const FIRST_REQUEST_WITHIN: Duration = Duration::from_secs(10);

impl<B> AdsBody<B> {
    pub(super) fn empty() -> AdsBody<B> {
        AdsBody(BodyKind::Ended)
    }

    /// Makes the body of an answer that is not xDS.
    pub(super) fn whole(bytes: Bytes) -> AdsBody<B> {
        AdsBody(if bytes.is_empty() { BodyKind::Ended } else { BodyKind::Whole(bytes) })
    }

    pub(super) fn streaming(stream: Stream<B>) -> AdsBody<B> {
        AdsBody(BodyKind::Streaming(Box::new(stream)))
    }
}

impl<B: Body> Body for AdsBody<B> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let stream = match &mut self.0 {
            BodyKind::Ended => return Poll::Ready(None),
            BodyKind::Whole(bytes) => {
                let frame = Frame::data(std::mem::take(bytes));
                self.0 = BodyKind::Ended;
                return Poll::Ready(Some(Ok(frame)));
            }
            BodyKind::Streaming(stream) => stream,
        };
        let frame = match ready!(stream.poll_next(cx)) {
            Ok(data) => Frame::data(data),
            Err(Failure { code, message }) => {
                self.0 = BodyKind::Ended;
                Frame::trailers(trailers(code, &message))
            }
        };
        Poll::Ready(Some(Ok(frame)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.0, BodyKind::Ended)
    }
}

/// Only boxed fields are pinned.
impl<B> Unpin for AdsBody<B> {}

impl<B: Body> Stream<B> {
    pub(super) fn new(
        service: Arc<ServiceShared>,
        protocol: Protocol,
        peer: PeerInfo,
        connection: Option<Arc<ConnectionUse>>,
        body: B,
    ) -> Stream<B> {
        let session = match protocol {
            Protocol::Delta => Session::delta(service.control_plane.clone()),
            Protocol::Sotw => Session::sotw(service.control_plane.clone()),
        };
        service.counters.streams.fetch_add(1, Relaxed);
        service.counters.streams_opened.fetch_add(1, Relaxed);
        let mut requests = Messages::new(body, Bounds::BEFORE_ADMISSION.bytes);
        requests.set_limits(Bounds::BEFORE_ADMISSION.bytes, &service.budgets.before_admission);
        let aged = connection.as_ref().and_then(|connection| connection.ends_at());
        Stream {
            service,
            protocol,
            requests,
            peer,
            connection,
            guard: None,
            aged: aged.map(|at| Box::pin(tokio::time::sleep_until(at))),
            session,
            admitted: None,
            reported: ReportedStatus::default(),
            frames: VecDeque::new(),
            end: None,
            timer: Some(Box::pin(tokio::time::sleep(FIRST_REQUEST_WITHIN))),
        }
    }

    /// Returns the next bytes to write, or the status with which the stream ends.
    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, Failure>> {
        loop {
            if let Some(frame) = self.frames.pop_front() {
                return Poll::Ready(Ok(frame));
            }
            if let Some(end) = self.end.take() {
                return Poll::Ready(Err(end));
            }
            let mut busy = self.read_requests(cx);
            busy |= self.read_feed(cx);
            let now = now();
            if let Some(response) = self.session.poll_response(now) {
                let counters = &self.service.counters;
                counters.responses.fetch_add(1, Relaxed);
                counters.bytes.fetch_add(response.len() as u64, Relaxed);
                counters.resources.fetch_add(response.resources as u64, Relaxed);
                self.frames.extend(response.into_frames());
                busy = true;
            }
            self.report_status();
            if let Some(aged) = &mut self.aged
                && aged.as_mut().poll(cx).is_ready()
            {
                self.aged = None;
                // The stream ends without an error: the client reconnects, perhaps to another replica.
                self.end.get_or_insert_with(|| Failure::new(Code::Ok, ""));
            }
            if !busy && self.end.is_none() && self.poll_timer(cx).is_pending() {
                return Poll::Pending;
            }
        }
    }

    /// Reads the requests that have arrived. Returns `false` if there were none.
    fn read_requests(&mut self, cx: &mut Context<'_>) -> bool {
        for read in 0..REQUESTS_AT_ONCE {
            let request = match self.requests.poll_message(cx) {
                Poll::Pending => return read > 0,
                Poll::Ready(request) => request,
            };
            let done = match request {
                Some(message) => message.and_then(|message| self.on_message(message)),
                None => Err(Failure::new(Code::Ok, "")),
            };
            if let Err(end) = done {
                self.end = Some(end);
                return true;
            }
        }
        true
    }

    fn on_message(&mut self, message: Bytes) -> Result<(), Failure> {
        let invalid =
            |error: SessionError| Failure::new(Code::from(i32::from(error.code())), error.to_string());
        let bounds = if self.admitted.is_some() { Bounds::ADMITTED } else { Bounds::BEFORE_ADMISSION };
        let request = Request::decode(self.protocol, message, &bounds).map_err(invalid)?;
        let now = now();
        self.service.counters.requests.fetch_add(1, Relaxed);
        if self.admitted.is_none() {
            let node = request.introduction().map_err(invalid)?;
            let admitted = self.service.admission.admit(node, &self.peer).map_err(|refusal| {
                self.service.counters.streams_refused.fetch_add(1, Relaxed);
                Failure::new(refusal.code(), refusal.to_string())
            })?;
            if admitted.observer.wants_events() {
                self.session.record_events();
            }
            if let Some(snapshot) = admitted.feed.latest() {
                self.session.on_snapshot(now, snapshot);
            }
            self.admitted = Some(admitted);
            self.guard = self.connection.as_ref().map(ConnectionUse::begin_stream);
            self.requests.set_limits(Bounds::ADMITTED.bytes, &self.service.budgets.admitted);
            self.timer = None;
        }
        self.session.on_request(now, request).map_err(invalid)
    }

    /// Passes a new snapshot to the session. Returns `false` if the feed has not changed.
    fn read_feed(&mut self, cx: &mut Context<'_>) -> bool {
        let Some(Admitted { feed, .. }) = &mut self.admitted else { return false };
        if feed.poll_changed(cx).is_pending() && !feed.is_stopped() {
            return false;
        }
        if feed.is_stopped() {
            self.end.get_or_insert_with(|| Failure::new(Code::Unavailable, "shutting down"));
        } else if let Some(snapshot) = feed.latest() {
            self.session.on_snapshot(now(), snapshot);
        }
        true
    }

    fn report_status(&mut self) {
        let Some(Admitted { observer, .. }) = &mut self.admitted else { return };
        while let Some(event) = self.session.poll_event() {
            observer.on_event(event);
        }
        let status = self.session.status();
        let sum =
            |count: fn(&crate::KindStatus) -> u64| status.kinds.iter().map(|(_, kind)| count(kind)).sum();
        let counts: [u64; 3] = [sum(|kind| kind.acks), sum(|kind| kind.nacks), status.unknown_types];
        let (state, generation, before) = &self.reported;
        if *state == status.state && *generation == status.generation_acked && *before == counts {
            return;
        }
        let counters = &self.service.counters;
        for (counter, (now, before)) in [&counters.acks, &counters.nacks, &counters.unknown_types]
            .into_iter()
            .zip(counts.into_iter().zip(*before))
        {
            counter.fetch_add(now - before, Relaxed);
        }
        self.reported = (status.state.clone(), status.generation_acked, counts);
        observer.on_status(status);
    }

    /// Polls the session's timer, or the deadline of the first request.
    fn poll_timer(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.admitted.is_none() {
            if let Some(timer) = &mut self.timer {
                ready!(timer.as_mut().poll(cx));
                self.end = Some(Failure::new(Code::DeadlineExceeded, "no request came"));
            }
            return Poll::Ready(());
        }
        let Some(at) = self.session.poll_timeout() else {
            self.timer = None;
            return Poll::Pending;
        };
        let at = tokio::time::Instant::from_std(at);
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
        if timer.deadline() != at {
            timer.as_mut().reset(at);
        }
        timer.as_mut().poll(cx)
    }
}

impl<B> Drop for Stream<B> {
    fn drop(&mut self) {
        self.service.counters.streams.fetch_sub(1, Relaxed);
    }
}

/// Returns the time of tokio's clock, which tests can advance.
fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

pub(super) fn trailers(code: Code, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::with_capacity(2);
    if Status::new(code, message).add_header(&mut trailers).is_err() {
        trailers.insert("grpc-status", HeaderValue::from(i32::from(code)));
    }
    trailers
}
