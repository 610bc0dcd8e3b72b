//! Logs the standard error of a program, within limits.

use std::io;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::ChildStderr;
use tokio::time::Instant;
use vmesh_text::printable;

/// The limit of bytes of a line; the rest is cut off.
const MAX_LINE: usize = 2_000;
/// The number of lines that are logged per [`WINDOW`]; further lines are counted.
const MAX_LINES: u32 = 100;
const WINDOW: Duration = Duration::from_secs(60);

/// The standard error of a program. All output is read, so that the program never blocks, but only a part of
/// it is logged.
pub(super) struct StderrLog {
    from: Option<BufReader<ChildStderr>>,
    /// The beginning of an incomplete line.
    line: Vec<u8>,
    rate: LogRate,
}

impl StderrLog {
    pub(super) fn new(from: Option<ChildStderr>) -> StderrLog {
        StderrLog { from: from.map(BufReader::new), line: Vec::new(), rate: LogRate::new(Instant::now()) }
    }

    /// Waits for the next line to log. Dropping the future loses nothing.
    pub(super) async fn next(&mut self) -> String {
        loop {
            match self.read_line().await {
                Ok(true) => {
                    let line = std::mem::take(&mut self.line);
                    if let Some(line) = self.rate.admit(&line, Instant::now()) {
                        return line;
                    }
                }
                Ok(false) | Err(_) => {
                    self.from = None;
                    std::future::pending().await
                }
            }
        }
    }

    /// Reads until a line is complete. Returns `false` at the end of the output.
    async fn read_line(&mut self) -> io::Result<bool> {
        let Some(from) = &mut self.from else { return std::future::pending().await };
        loop {
            let read = from.fill_buf().await?;
            if read.is_empty() {
                return Ok(!self.line.is_empty());
            }
            let end = read.iter().position(|byte| *byte == b'\n');
            let part = read.get(..end.unwrap_or(read.len())).unwrap_or_default();
            let room = MAX_LINE.saturating_sub(self.line.len());
            self.line.extend_from_slice(part.get(..room).unwrap_or(part));
            let consumed = end.map_or(read.len(), |end| end + 1);
            from.consume(consumed);
            if end.is_some() {
                return Ok(true);
            }
        }
    }
}

/// The number of lines that were logged in the current window.
struct LogRate {
    window: Instant,
    logged: u32,
    left_out: u64,
}

impl LogRate {
    fn new(now: Instant) -> LogRate {
        LogRate { window: now, logged: 0, left_out: 0 }
    }

    /// Returns the text to log for `line`, or `None` if it is left out.
    fn admit(&mut self, line: &[u8], now: Instant) -> Option<String> {
        let left_out = if now >= self.window + WINDOW {
            (self.window, self.logged) = (now, 0);
            std::mem::take(&mut self.left_out)
        } else {
            0
        };
        if self.logged >= MAX_LINES {
            self.left_out += 1;
            return None;
        }
        self.logged += 1;
        let mut text = printable(String::from_utf8_lossy(line).trim_end()).into_owned();
        if left_out > 0 {
            text = format!(
                "({left_out} lines before this one were not logged: more than {MAX_LINES} a minute) {text}"
            );
        }
        Some(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_program_that_prints_without_end_has_a_hundred_lines_a_minute() {
        let start = Instant::now();
        let mut rate = LogRate::new(start);
        let logged = (0..1_000_000).filter(|_| rate.admit(b"x", start).is_some()).count();
        assert_eq!(logged, 100);
        let later = rate.admit(b"\x1b[31mred\n", start + WINDOW).unwrap();
        assert_eq!(
            later,
            "(999900 lines before this one were not logged: more than 100 a minute) \\u{1b}[31mred"
        );
    }
}
