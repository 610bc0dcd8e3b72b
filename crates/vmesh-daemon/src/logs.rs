//! Log output: to the journal under systemd, with fields for `journalctl NODE=web-17`; as readable text to stderr elsewhere.

use std::fmt;
use std::io::{self, Write};

use log::kv::{Key, Value};
use systemd_journal_logger::{JournalLog, connected_to_journal};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, fmt as text};

/// The environment variable that overrides the configured level, such as `debug` or `info,vmesh_xds=trace`.
pub const VARIABLE: &str = "VMESH_LOG";

const DEFAULT: &str = "info";

/// Maximum size of a line, and of a field of a journal entry, in bytes. Much of a line may be text from outside.
const LINE_MAX: usize = 16 << 10;

/// A writer that escapes control characters in each log line. Each write is a complete line.
struct EscapingWriter<W>(W);

impl<W: Write> Write for EscapingWriter<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes);
        let line = line.strip_suffix('\n').unwrap_or(&line);
        self.0.write_all(format!("{}\n", vmesh_text::escaped(line, LINE_MAX)).as_bytes())?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum LogError {
    #[error(
        "`{filter}` is not a log level: write error, warn, info, debug or trace, or `info,vmesh_xds=debug`"
    )]
    Filter {
        filter: String,
        #[source]
        cause: tracing_subscriber::filter::ParseError,
    },
    #[error("could not start logging")]
    Start(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Starts logging for the whole process. `configured` is the level from the configuration; `$VMESH_LOG` overrides it.
pub fn init(configured: Option<&str>) -> Result<(), LogError> {
    let filter = filter(std::env::var(VARIABLE).ok().as_deref().or(configured))?;
    let start = |started: Result<(), _>| {
        started.map_err(|error: tracing_subscriber::util::TryInitError| LogError::Start(error.into()))
    };
    if connected_to_journal() {
        match JournalLog::new() {
            Ok(journal) => {
                let journal = Journal(move |record: &log::Record<'_>| journal.journal_send(record));
                return start(tracing_subscriber::registry().with(journal).with(filter).try_init());
            }
            // Text on stderr still reaches the journal, without the fields.
            Err(error) => eprintln!("the journal's socket does not answer, logging to stderr: {error}"),
        }
    }
    // Colours would be escaped like other control characters.
    let lines =
        text::layer().with_writer(|| EscapingWriter(io::stderr())).with_ansi(false).with_target(false);
    start(tracing_subscriber::registry().with(lines).with(filter).try_init())
}

fn filter(text: Option<&str>) -> Result<Targets, LogError> {
    let filter = text.map(str::trim).filter(|text| !text.is_empty()).unwrap_or(DEFAULT);
    // `debug` applies to vmesh's own crates. Add `h2=debug` for every HTTP/2 frame.
    let quiet = ["h2", "hyper", "hyper_util", "tower"].iter().filter(|name| !filter.contains(**name));
    let all: String = quiet.map(|name| format!("{name}=info,")).chain([filter.to_owned()]).collect();
    all.parse().map_err(|cause| LogError::Filter { filter: filter.to_owned(), cause })
}

/// A layer that writes each event to the journal, with the fields of the event and of its spans. The journal's client writes the field
/// `node` as `NODE=`.
struct Journal<F>(F);

/// The fields of one span or event, in order.
#[derive(Default)]
struct Fields {
    message: String,
    values: Vec<(&'static str, String)>,
}

impl Fields {
    fn put(&mut self, field: &Field, value: String) {
        let value = vmesh_text::escaped(&value, LINE_MAX);
        match field.name() {
            "message" => self.message = value,
            name => self.values.push((name, value)),
        }
    }
}

impl Visit for Fields {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.put(field, value.to_owned());
    }

    fn record_error(&mut self, field: &Field, value: &(dyn std::error::Error + 'static)) {
        self.put(field, crate::report::one_line(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.put(field, format!("{value:?}"));
    }
}

impl<S, F> Layer<S> for Journal<F>
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    F: Fn(&log::Record<'_>) -> io::Result<()> + 'static,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let mut fields = Fields::default();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            if let Some(outer) = span.extensions().get::<Fields>() {
                fields.values.extend_from_slice(&outer.values);
            }
        }
        event.record(&mut fields);
        // If the journal rejects an entry, there is nowhere to report that.
        _ = with_record(event.metadata(), &fields, &self.0);
    }
}

fn with_record<R>(metadata: &Metadata<'_>, fields: &Fields, then: impl FnOnce(&log::Record<'_>) -> R) -> R {
    let level = match *metadata.level() {
        Level::ERROR => log::Level::Error,
        Level::WARN => log::Level::Warn,
        Level::INFO => log::Level::Info,
        Level::DEBUG => log::Level::Debug,
        Level::TRACE => log::Level::Trace,
    };
    let values: Vec<(Key<'_>, Value<'_>)> = fields
        .values
        .iter()
        .map(|(name, value)| (Key::from_str(name), Value::from(value.as_str())))
        .collect();
    then(
        &log::Record::builder()
            .level(level)
            .target(metadata.target())
            .file(metadata.file())
            .line(metadata.line())
            .module_path(metadata.module_path())
            .key_values(&values)
            .args(format_args!("{}", fields.message))
            .build(),
    )
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use log::kv::VisitSource;
    use tracing::{info, info_span, warn};

    use super::*;

    /// Runs `work` with a journal that writes each record as a line of text.
    fn journal_of(work: impl FnOnce()) -> Vec<String> {
        struct Pairs(String);
        impl<'a> VisitSource<'a> for Pairs {
            fn visit_pair(&mut self, key: Key<'a>, value: Value<'a>) -> Result<(), log::kv::Error> {
                self.0 += &format!(" {key}={value}");
                Ok(())
            }
        }
        let lines = Arc::new(Mutex::new(Vec::new()));
        let observed = lines.clone();
        let journal = Journal(move |record: &log::Record<'_>| {
            let mut pairs = Pairs(String::new());
            record.key_values().visit(&mut pairs).unwrap();
            observed.lock().unwrap().push(format!("{} {}{}", record.level(), record.args(), pairs.0));
            Ok(())
        });
        tracing::subscriber::with_default(tracing_subscriber::registry().with(journal), work);
        Arc::into_inner(lines).map(|lines| lines.into_inner().unwrap()).unwrap()
    }

    #[test]
    fn the_journal_gets_the_fields_of_the_event_and_of_the_spans_around_it() {
        let lines = journal_of(|| {
            let span = info_span!("stream", node = "web-17", version = tracing::field::Empty);
            let _in_stream = span.enter();
            span.record("version", 41);
            info!(service = %"orders", endpoints = 3, "sent {}", "clusters");
            let error = std::io::Error::other("connection reset");
            warn!(error = &error as &(dyn std::error::Error + 'static), "lost");
        });
        assert_eq!(
            lines,
            [
                "INFO sent clusters node=web-17 version=41 service=orders endpoints=3",
                "WARN lost node=web-17 version=41 error=connection reset",
            ]
        );
    }

    #[test]
    fn what_others_say_does_neither_begin_a_line_nor_move_the_cursor() {
        let foreign_text = "x\u{1b}[2J\nERROR forged\u{202e}";
        let lines = journal_of(|| info!(build = foreign_text, "a node says {foreign_text}"));
        let escaped = "x\\u{1b}[2J\\nERROR forged\\u{202e}";
        assert_eq!(lines, [format!("INFO a node says {escaped} build={escaped}")]);

        let written = Arc::new(Mutex::new(Vec::new()));
        struct Sink(Arc<Mutex<Vec<u8>>>);
        impl Write for Sink {
            fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
                self.0.lock().unwrap().extend_from_slice(bytes);
                Ok(bytes.len())
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let sink = written.clone();
        let lines = text::layer().with_writer(move || EscapingWriter(Sink(sink.clone()))).with_ansi(false);
        tracing::subscriber::with_default(tracing_subscriber::registry().with(lines), || {
            info!(build = %foreign_text, "a node says {foreign_text}");
            info!("{}", "x".repeat(1 << 20));
        });
        let written = String::from_utf8(written.lock().unwrap().clone()).unwrap();
        assert_eq!(written.lines().count(), 2, "{written}");
        assert!(written.chars().all(|c| c == '\n' || !vmesh_text::is_unsafe(c)));
        assert!(written.len() < 2 * LINE_MAX);
    }

    #[test]
    fn a_level_that_is_none_is_refused_with_examples() {
        assert!(filter(Some("info,vmesh_xds=trace")).is_ok());
        assert!(filter(Some(" ")).is_ok());
        let error = filter(Some("info,vmesh_xds=lots")).unwrap_err().to_string();
        assert!(error.starts_with("`info,vmesh_xds=lots` is not a log level: write error, warn"), "{error}");
    }
}
