//! Load generator: sends requests at a given rate over persistent connections, and records the results.

use std::collections::BTreeMap;
use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http::header::HOST;
use http::{HeaderName, HeaderValue, Request, StatusCode};
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::TcpStream;
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior, interval_at, sleep, timeout};

use crate::{Failed, Result, background, netns};

/// The requests to send, and their rate.
#[derive(Debug, Clone)]
pub struct Plan {
    pub target: SocketAddr,
    pub host: String,
    pub path: String,
    pub headers: Vec<(String, String)>,
    /// The number of concurrent requests, each on its own connection.
    pub connections: usize,
    /// The number of requests per second over all connections; `None` sends each request as soon as the last
    /// one is answered.
    pub rate: Option<f64>,
    /// The time after which a request counts as failed.
    pub timeout: Duration,
    /// The runtime of the sending host, if it is not the test's own.
    from: Option<Handle>,
}

impl Plan {
    /// Plans `GET /` over four connections, 200 times a second.
    pub fn to(target: SocketAddr) -> Plan {
        Plan {
            target,
            host: target.to_string(),
            path: "/".to_owned(),
            headers: Vec::new(),
            connections: 4,
            rate: Some(200.0),
            timeout: Duration::from_secs(10),
            from: None,
        }
    }

    /// Sends the requests from this host.
    pub fn from(self, host: &netns::Host) -> Result<Plan> {
        Ok(Plan { from: Some(host.runtime()?), ..self })
    }

    pub fn host(self, host: &str) -> Plan {
        Plan { host: host.to_owned(), ..self }
    }

    pub fn path(self, path: &str) -> Plan {
        Plan { path: path.to_owned(), ..self }
    }

    pub fn header(mut self, name: &str, value: &str) -> Plan {
        self.headers.push((name.to_owned(), value.to_owned()));
        self
    }

    pub fn connections(self, connections: usize) -> Plan {
        Plan { connections, ..self }
    }

    pub fn rate(self, rate: f64) -> Plan {
        Plan { rate: Some(rate), ..self }
    }

    /// Makes each connection send its next request when the last one is answered.
    pub fn closed_loop(self) -> Plan {
        Plan { rate: None, ..self }
    }
}

/// Load that runs until it is stopped.
pub struct Load {
    started: Instant,
    report: Arc<Mutex<Report>>,
    stop: watch::Sender<bool>,
    workers: Vec<AbortHandle>,
    ended: tokio::sync::mpsc::Receiver<()>,
}

/// The results of the requests.
#[derive(Debug, Clone, Default)]
pub struct Report {
    pub sent: u64,
    /// The requests answered with a status below 400.
    pub ok: u64,
    /// The first thousand failures; [`Report::failures`] is their total number.
    pub failed: Vec<Failure>,
    pub failures: u64,
    pub by_instance: BTreeMap<String, u64>,
    pub by_version: BTreeMap<String, u64>,
    pub by_status: BTreeMap<u16, u64>,
    /// The latencies of all answered requests.
    pub latencies: Vec<Duration>,
    /// The number of opened connections.
    pub connections: u64,
    /// The requests that were written to an idle connection at the moment when the server closed it. HTTP/1.1
    /// cannot avoid this race. Like any client, the load sends such a request again on a new connection, and
    /// only the second attempt counts.
    pub raced: u64,
    pub took: Duration,
}

/// A request that failed.
#[derive(Debug, Clone)]
pub struct Failure {
    /// Counted since the start of the load.
    pub at: Duration,
    pub what: String,
}

impl Load {
    pub fn start(plan: Plan) -> Result<Load> {
        let mut request = Request::builder().uri(&plan.path).header(HOST, &plan.host);
        for (name, value) in &plan.headers {
            let header = (HeaderName::try_from(name), HeaderValue::try_from(value));
            let (Ok(name), Ok(value)) = header else {
                return Err(Failed::new(format!("`{name}: {value}` is not a header")));
            };
            request = request.header(name, value);
        }
        let request = request.body(()).map_err(Failed::to(format!("{} cannot be asked for", plan.path)))?;
        let started = Instant::now();
        let report = Arc::new(Mutex::new(Report::default()));
        let (stop, stopped) = watch::channel(false);
        let (running, ended) = tokio::sync::mpsc::channel(1);
        let worker = |number: usize| Worker {
            number,
            plan: plan.clone(),
            request: request.clone(),
            started,
            report: report.clone(),
            connection: None,
            drivers: JoinSet::new(),
        };
        let runtime = plan.from.clone().map_or_else(background, Ok)?;
        let workers = (0..plan.connections.max(1)).map(|number| {
            let (worker, stopped, running) = (worker(number), stopped.clone(), running.clone());
            let task = runtime.spawn(async move {
                worker.run(stopped).await;
                drop(running);
            });
            task.abort_handle()
        });
        let workers = workers.collect();
        Ok(Load { started, report, stop, workers, ended })
    }

    /// Returns the results so far.
    pub fn so_far(&self) -> Report {
        let mut report = lock(&self.report).clone();
        report.took = self.started.elapsed();
        report
    }

    /// Waits for the pending requests, and returns the results.
    pub async fn stop(mut self) -> Report {
        self.stop.send_replace(true);
        // The channel closes once every worker has ended.
        while self.ended.recv().await.is_some() {}
        self.so_far()
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.workers.iter().for_each(AbortHandle::abort);
    }
}

fn lock(report: &Mutex<Report>) -> MutexGuard<'_, Report> {
    report.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Worker {
    number: usize,
    plan: Plan,
    request: Request<()>,
    started: Instant,
    report: Arc<Mutex<Report>>,
    /// The connection of the last request.
    connection: Option<SendRequest<Empty<Bytes>>>,
    drivers: JoinSet<()>,
}

type Cause = Box<dyn Error + Send + Sync>;

impl Worker {
    async fn run(mut self, mut stopped: watch::Receiver<bool>) {
        let mut ticks = self.plan.rate.map(|rate| {
            let period = Duration::from_secs_f64(self.plan.connections.max(1) as f64 / rate.max(0.001));
            // The workers start at even distances within one period.
            let offset = period.mul_f64(self.number as f64 / self.plan.connections.max(1) as f64);
            let mut ticks = interval_at(Instant::now() + offset, period);
            // A slow answer does not lower the rate, since missed requests are sent afterwards without a
            // pause.
            ticks.set_missed_tick_behavior(MissedTickBehavior::Burst);
            ticks
        });
        loop {
            if let Some(ticks) = &mut ticks {
                tokio::select! {
                    biased;
                    _ = stopped.wait_for(|stopped| *stopped) => return,
                    _ = ticks.tick() => {}
                }
            }
            if *stopped.borrow() {
                return;
            }
            let began = Instant::now();
            let outcome = timeout(self.plan.timeout, self.exchange()).await;
            let outcome = match outcome {
                Ok(Ok((status, body))) => Ok((status, body)),
                Ok(Err(cause)) => Err(chain(&*cause)),
                Err(_) => Err(format!("no answer within {:?}", self.plan.timeout)),
            };
            let failed = outcome.is_err();
            self.record(began, outcome);
            if failed {
                self.connection = None;
                // The pause keeps a closed loop from doing nothing but connects to a dead port.
                sleep(Duration::from_millis(5)).await;
            }
        }
    }

    fn record(&self, began: Instant, outcome: Result<(StatusCode, Bytes), String>) {
        let mut report = lock(&self.report);
        report.sent += 1;
        let failure = match outcome {
            Ok((status, body)) => {
                report.latencies.push(began.elapsed());
                *report.by_status.entry(status.as_u16()).or_default() += 1;
                let answer: Value = serde_json::from_slice(&body).unwrap_or_default();
                let field = |name| answer.get(name).and_then(Value::as_str).map(str::to_owned);
                if let Some(app) = field("app") {
                    *report.by_instance.entry(app).or_default() += 1;
                }
                if let Some(version) = field("version") {
                    *report.by_version.entry(version).or_default() += 1;
                }
                if status.as_u16() < 400 {
                    report.ok += 1;
                    return;
                }
                let body = String::from_utf8_lossy(&body);
                format!("{status}: {}", body.trim().chars().take(200).collect::<String>())
            }
            Err(what) => what,
        };
        report.failures += 1;
        if report.failed.len() < 1000 {
            report.failed.push(Failure { at: began - self.started, what: failure });
        }
    }

    /// Sends a request and reads its answer. A connection that the server closed between two requests is not
    /// a failure of the server: it is opened again.
    async fn exchange(&mut self) -> Result<(StatusCode, Bytes), Cause> {
        let mut raced = false;
        loop {
            let kept = if raced { None } else { self.usable().await };
            let reused = kept.is_some();
            let mut sender = match kept {
                Some(kept) => kept,
                None => self.connect().await?,
            };
            match sender.try_send_request(self.request.clone().map(|()| Empty::new())).await {
                Ok(response) => {
                    let status = response.status();
                    let body = response.into_body().collect().await?.to_bytes();
                    self.connection = Some(sender);
                    return Ok((status, body));
                }
                Err(mut error) => {
                    let unsent = error.take_message().is_some();
                    if !reused || !(unsent || is_closed(error.error())) {
                        return Err(error.into_error().into());
                    }
                    if !unsent {
                        raced = true;
                        lock(&self.report).raced += 1;
                    }
                }
            }
        }
    }

    /// Returns the connection of the last request if it is still open.
    async fn usable(&mut self) -> Option<SendRequest<Empty<Bytes>>> {
        let mut kept = self.connection.take()?;
        kept.ready().await.ok().map(|()| kept)
    }

    async fn connect(&mut self) -> Result<SendRequest<Empty<Bytes>>, Cause> {
        let stream =
            TcpStream::connect(self.plan.target).await.map_err(|e| format!("could not connect: {e}"))?;
        stream.set_nodelay(true)?;
        let (sender, driver) = handshake(TokioIo::new(stream)).await?;
        while self.drivers.try_join_next().is_some() {}
        // The task ends when the sender is dropped or the server closes the connection.
        self.drivers.spawn(async move { _ = driver.await });
        lock(&self.report).connections += 1;
        Ok(sender)
    }
}

/// Reports whether the connection was closed before the first byte of the answer.
fn is_closed(error: &hyper::Error) -> bool {
    use std::io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
    let io = error.source().and_then(|cause| cause.downcast_ref::<std::io::Error>());
    error.is_incomplete_message()
        || error.is_closed()
        || error.is_canceled()
        || io.is_some_and(|io| matches!(io.kind(), BrokenPipe | ConnectionReset | NotConnected))
}

fn chain(error: &(dyn Error + 'static)) -> String {
    vmesh_daemon::report::one_line(error)
}

impl Report {
    /// Returns the latency that `share` (such as 0.99) of the answers did not exceed.
    pub fn latency(&self, share: f64) -> Option<Duration> {
        let mut sorted = self.latencies.clone();
        sorted.sort_unstable();
        let index = (share.clamp(0.0, 1.0) * sorted.len().saturating_sub(1) as f64).round() as usize;
        sorted.get(index).copied()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} requests in {:.1} s, {} ok, {} failed",
            self.sent,
            self.took.as_secs_f32(),
            self.ok,
            self.failures
        )?;
        write!(f, ", {} connections, {} raced", self.connections, self.raced)?;
        if let (Some(half), Some(most)) = (self.latency(0.5), self.latency(0.99)) {
            write!(f, ", p50 {half:.1?}, p99 {most:.1?}")?;
        }
        write!(f, "\n  by instance {:?}, by status {:?}", self.by_instance, self.by_status)?;
        for failure in self.failed.iter().take(10) {
            write!(f, "\n  at {:.3} s: {}", failure.at.as_secs_f32(), failure.what)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;
    use crate::app::{Behaviour, HttpApp};
    use crate::wait_for;

    const SOON: Duration = Duration::from_secs(10);

    fn app(name: &str) -> HttpApp {
        HttpApp::start(name, "v1", (Ipv4Addr::LOCALHOST, 0)).unwrap()
    }

    async fn more_than(count: u64, what: &str, load: &Load, of: impl Fn(&Report) -> u64) {
        wait_for(what, SOON, async || {
            let report = load.so_far();
            if of(&report) > count { Ok(()) } else { Err(report.to_string()) }
        })
        .await
        .unwrap();
    }

    #[tokio::test]
    async fn a_healthy_application_answers_every_request_on_connections_that_stay() {
        let app = app("orders-1");
        let load = Load::start(Plan::to(app.address()).rate(2000.0).path("/x?y").header("x-a", "b")).unwrap();
        more_than(200, "answers", &load, |report| report.ok).await;
        let report = load.stop().await;
        assert_eq!(report.failures, 0, "{report}");
        assert_eq!(report.sent, report.ok);
        assert_eq!(report.connections, 4);
        assert_eq!(report.by_instance, [("orders-1".to_owned(), report.sent)].into());
        assert_eq!(report.by_version, [("v1".to_owned(), report.sent)].into());
        assert_eq!(app.requests(), report.sent);
    }

    #[tokio::test]
    async fn an_ill_application_is_seen_as_it_is() {
        let app = app("orders-1");
        let load = Load::start(Plan::to(app.address()).closed_loop()).unwrap();
        more_than(10, "answers", &load, |report| report.ok).await;
        app.behave(Behaviour::Status(503));
        more_than(0, "503s", &load, |report| report.by_status.get(&503).copied().unwrap_or(0)).await;
        app.behave(Behaviour::Reset);
        let is_reset = |failure: &&Failure| !failure.what.starts_with("503");
        more_than(0, "resets", &load, |report| report.failed.iter().filter(is_reset).count() as u64).await;
        app.behave(Behaviour::Well);
        let ok = load.so_far().ok;
        more_than(ok + 10, "answers again", &load, |report| report.ok).await;
        let report = load.stop().await;
        let reset = report.failed.iter().find(is_reset).unwrap();
        assert!(reset.what.contains("reset") || reset.what.contains("closed"), "{report}");
    }

    #[tokio::test]
    async fn a_crashed_application_refuses_connections_until_it_is_back() {
        let app = app("orders-1");
        let address = app.address();
        let load = Load::start(Plan::to(address).closed_loop()).unwrap();
        more_than(10, "answers", &load, |report| report.ok).await;
        app.kill();
        assert!(std::net::TcpStream::connect(address).is_err());
        more_than(0, "failures", &load, |report| report.failures).await;
        let _again = HttpApp::start("orders-2", "v2", address).unwrap();
        more_than(10, "answers", &load, |report| report.by_version.get("v2").copied().unwrap_or(0)).await;
        let report = load.stop().await;
        assert!(
            report.failed.iter().any(|failure| failure.what.starts_with("could not connect")),
            "{report}"
        );
    }

    #[tokio::test]
    async fn a_server_that_closes_after_each_answer_is_no_failure() {
        let listener = tokio::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let address = listener.local_addr().unwrap();
        let _server = background().unwrap().spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                use tokio::io::{AsyncReadExt, AsyncWriteExt};
                _ = stream.read(&mut [0; 1024]).await;
                // There is no `connection: close`, so the client notices the end only by the close itself.
                _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
            }
        });
        let load = Load::start(Plan::to(address).closed_loop().connections(1)).unwrap();
        more_than(100, "answers", &load, |report| report.ok).await;
        let report = load.stop().await;
        assert_eq!(report.failures, 0, "{report}");
    }

    #[tokio::test]
    async fn a_slow_answer_has_its_latency_and_does_not_lower_the_rate() {
        let app = app("orders-1");
        app.behave(Behaviour::Slow(Duration::from_millis(60)));
        let load = Load::start(Plan::to(app.address()).rate(100.0).connections(20)).unwrap();
        more_than(50, "answers", &load, |report| report.ok).await;
        let report = load.stop().await;
        assert!(report.latency(0.5).unwrap() >= Duration::from_millis(60), "{report}");
        assert!(report.sent as f64 / report.took.as_secs_f64() > 60.0, "{report}");
    }
}
