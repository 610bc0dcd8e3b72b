//! The connection with the program over its standard streams: starts it, reads its lines, writes requests,
//! and ends it.

use std::fmt;
use std::io;
use std::process::ExitStatus;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::{ChildStdin, ChildStdout};
use tokio::time::{Instant, sleep_until};

use super::PluginConfig;
use super::log::StderrLog;
use super::protocol::{self, PluginLine, PluginView};
use super::run::PluginRun;
use crate::source::{Counters, SourceError};

/// The minimum time between two starts of a program.
const RESTART: Duration = Duration::from_secs(1);
/// The limit of unsent bytes for a program that does not read its standard input.
const MAX_UNSENT: usize = 1 << 20;

/// The connection with a program, across restarts.
pub(super) struct PluginConnection {
    config: PluginConfig,
    source: Arc<str>,
    counters: Arc<Counters>,
    running: Option<RunningPlugin>,
    /// The earliest time of the next start.
    start_at: Instant,
    /// When the program last printed a line.
    last_line_at: Instant,
}

struct RunningPlugin {
    run: PluginRun,
    stdin: ChildStdin,
    stdout: BufReader<ChildStdout>,
    /// The beginning of an incomplete line from the program.
    line: Vec<u8>,
    log: StderrLog,
    /// Bytes that the program has not read yet.
    unsent: Vec<u8>,
}

/// The reason why a program is no longer usable.
#[derive(Debug)]
enum PluginEnd {
    Exited(Option<ExitStatus>),
    Silent(Duration),
    TooLong(usize),
    NotText,
    Io(io::Error),
}

impl fmt::Display for PluginEnd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            PluginEnd::Exited(Some(status)) => write!(f, "it exited ({status}); it is started again"),
            PluginEnd::Exited(None) => f.write_str("it closed its output; it is started again"),
            PluginEnd::Silent(silence) => write!(
                f,
                "it printed no line for {} s and was killed; it is started again: a program without news has \
                 to print `{{\"type\": \"alive\"}}` now and then",
                silence.as_secs()
            ),
            PluginEnd::TooLong(limit) => {
                write!(f, "it printed a line of more than {limit} bytes (`max_bytes`)")
            }
            PluginEnd::NotText => f.write_str("it printed bytes that are not UTF-8"),
            PluginEnd::Io(error) => error.fmt(f),
        }
    }
}

impl std::error::Error for PluginEnd {}

impl PluginConnection {
    pub(super) fn new(config: PluginConfig, counters: Arc<Counters>) -> PluginConnection {
        let now = Instant::now();
        PluginConnection {
            source: config.name(),
            config,
            counters,
            running: None,
            start_at: now,
            last_line_at: now,
        }
    }

    /// Returns the next view, or `None` if the last view is still current. Dropping the future loses nothing.
    pub(super) async fn next_view(&mut self) -> Result<Option<PluginView>, SourceError> {
        let line = self.next_line().await?;
        self.counters.reads.fetch_add(1, Relaxed);
        match protocol::read(&self.source, &line) {
            Ok(PluginLine::View(view)) => {
                self.counters.record_answer();
                self.counters.bad_records.fetch_add(view.parsed.bad_records(), Relaxed);
                Ok(Some(view))
            }
            Ok(PluginLine::Failed(message)) => Err(self.failed("read its registry".to_owned(), message)),
            Ok(PluginLine::Alive) => {
                self.counters.record_answer();
                Ok(None)
            }
            // The program keeps running, since its next line may be valid.
            Err(why) => Err(self.failed("read the output of its program".to_owned(), why)),
        }
    }

    /// Sends the program a line. The line is queued if the program does not read it at once.
    pub(super) async fn send(&mut self, line: String) -> Result<(), SourceError> {
        let running = self.ensure_running().await?;
        if !running.unsent.is_empty() && running.unsent.len() + line.len() > MAX_UNSENT {
            let why = "it does not read its standard input";
            return Err(self.failed("ask its program to read its registry again".to_owned(), why));
        }
        running.unsent.extend_from_slice(line.as_bytes());
        match running.flush().await {
            Ok(()) => Ok(()),
            Err(error) => Err(self.end(PluginEnd::Io(error))),
        }
    }

    async fn next_line(&mut self) -> Result<String, SourceError> {
        let (silence, limit, source) = (self.config.silence, self.config.max_bytes, self.source.clone());
        self.ensure_running().await?;
        let deadline = self.last_line_at + silence;
        let Some(running) = &mut self.running else { return Err(self.end(PluginEnd::Exited(None))) };
        let line = tokio::select! {
            // Lines printed while no future was polled come first: they are no silence.
            biased;
            line = running.read_line(limit, &source) => line,
            () = sleep_until(deadline) => Err(PluginEnd::Silent(silence)),
        };
        match line {
            Ok(line) => {
                self.last_line_at = Instant::now();
                Ok(line)
            }
            Err(ended) => Err(self.end(ended)),
        }
    }

    /// Returns the running program, after starting it if necessary.
    async fn ensure_running(&mut self) -> Result<&mut RunningPlugin, SourceError> {
        if self.running.is_none() {
            sleep_until(self.start_at).await;
            let now = Instant::now();
            (self.start_at, self.last_line_at) = (now + RESTART, now);
            match RunningPlugin::start(&self.config.command, &self.config.pass_env) {
                Ok(mut running) => {
                    running.unsent = protocol::hello(&self.source).into_bytes();
                    self.counters.connects.fetch_add(1, Relaxed);
                    self.counters.connections.store(1, Relaxed);
                    self.running = Some(running);
                }
                Err(error) => {
                    let action = format!("start its program `{}`", self.config.program());
                    return Err(self.failed(action, error));
                }
            }
        }
        match &mut self.running {
            Some(running) => Ok(running),
            None => Err(SourceError::Suspect {
                source_name: self.source.clone(),
                suspicion: "its program is gone".into(),
            }),
        }
    }

    /// Kills the program, which is no longer usable. Returns the error to report.
    fn end(&mut self, why: PluginEnd) -> SourceError {
        let why = match (why, &mut self.running) {
            (PluginEnd::Exited(None), Some(running)) => PluginEnd::Exited(running.run.end()),
            (why, _) => why,
        };
        self.running = None;
        self.counters.connections.store(0, Relaxed);
        self.failed(format!("wait for its program `{}`", self.config.program()), why)
    }

    fn failed(
        &self,
        action: String,
        cause: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> SourceError {
        self.counters.failed_reads.fetch_add(1, Relaxed);
        SourceError::Failed { source_name: self.source.clone(), action, cause: cause.into() }
    }
}

impl RunningPlugin {
    fn start(command: &[String], pass_env: &[String]) -> io::Result<RunningPlugin> {
        let mut run = PluginRun::start(command, pass_env)?;
        let child = &mut run.child;
        let pipes = (child.stdin.take(), child.stdout.take(), child.stderr.take());
        let (Some(stdin), Some(stdout), stderr) = pipes else { return Err(io::ErrorKind::BrokenPipe.into()) };
        Ok(RunningPlugin {
            run,
            stdin,
            stdout: BufReader::new(stdout),
            log: StderrLog::new(stderr),
            line: Vec::new(),
            unsent: Vec::new(),
        })
    }

    /// Reads the next line of the program. Meanwhile it logs the standard error and sends queued bytes.
    async fn read_line(&mut self, limit: usize, source: &str) -> Result<String, PluginEnd> {
        loop {
            let RunningPlugin { stdin, stdout, line, log, unsent, .. } = self;
            tokio::select! {
                whole = read_into(stdout, line, limit) => {
                    return match whole {
                        Ok(true) => String::from_utf8(std::mem::take(line)).map_err(|_| PluginEnd::NotText),
                        Ok(false) => Err(PluginEnd::Exited(None)),
                        Err(error) if error.kind() == io::ErrorKind::FileTooLarge => Err(PluginEnd::TooLong(limit)),
                        Err(error) => Err(PluginEnd::Io(error)),
                    };
                }
                text = log.next() => tracing::info!("{source}: {text}"),
                written = stdin.write(unsent), if !unsent.is_empty() => match written {
                    Ok(count) => _ = unsent.drain(..count),
                    Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Err(PluginEnd::Exited(None)),
                    Err(error) => return Err(PluginEnd::Io(error)),
                },
            }
        }
    }

    /// Sends the queued bytes. If the future is dropped, the rest stays queued.
    async fn flush(&mut self) -> io::Result<()> {
        while !self.unsent.is_empty() {
            let count = self.stdin.write(&self.unsent).await?;
            self.unsent.drain(..count);
        }
        Ok(())
    }
}

/// Appends to `line` until it is complete, without the line feed. Returns `false` at the end of the output.
/// Dropping the future loses nothing, because everything read is in `line`.
async fn read_into(
    from: &mut (impl tokio::io::AsyncBufRead + Unpin),
    line: &mut Vec<u8>,
    limit: usize,
) -> io::Result<bool> {
    loop {
        let read = from.fill_buf().await?;
        if read.is_empty() {
            return Ok(false);
        }
        let end = read.iter().position(|byte| *byte == b'\n');
        let (part, consumed) = match end {
            Some(end) => (read.get(..end).unwrap_or_default(), end + 1),
            None => (read, read.len()),
        };
        line.extend_from_slice(part);
        from.consume(consumed);
        if line.len() > limit {
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        if end.is_some() {
            return Ok(true);
        }
    }
}
