//! Copies Envoy's output to our log, line by line.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tracing::{debug, error, info, trace, warn};

/// Creates the FIFO that Envoy writes to, unless it exists.
pub(crate) fn fifo(path: &Path) -> io::Result<()> {
    match rustix::fs::mkfifoat(CWD, path, Mode::from_raw_mode(0o600)) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) if FileType::from_raw_mode(rustix::fs::lstat(path)?.st_mode) == FileType::Fifo => {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// Opens the end that Envoy writes to. It is opened for reading too, so that Envoy gets no SIGPIPE when the agent exits. It does not block:
/// when nobody reads, output is lost and Envoy continues.
pub(crate) fn writer(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let writer = rustix::fs::open(path, flags, Mode::empty())?;
    // The maximum for an unprivileged user. It holds minutes of warnings while the agent is away.
    _ = rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20);
    Ok(writer)
}

/// Maximum number of bytes of a line that are held in memory. Longer lines are logged in pieces.
const MAX_LINE: u64 = 64 << 10;

/// Logs the lines that arrive in the FIFO. Runs until it is dropped.
pub(crate) async fn log(reader: pipe::Receiver) -> io::Result<()> {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while next_line(&mut reader, &mut line).await? {
        let line = String::from_utf8_lossy(&line);
        let (level, component, message) = parse(line.trim_end());
        match level {
            "trace" => trace!(target: "envoy", component, "{message}"),
            "debug" => debug!(target: "envoy", component, "{message}"),
            "warning" => warn!(target: "envoy", component, "{message}"),
            "error" | "critical" => error!(target: "envoy", component, "{message}"),
            _ => info!(target: "envoy", component, "{message}"),
        }
    }
    Ok(())
}

/// Reads the next line or piece of a line. Returns `false` at the end of the input.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    Ok(reader.take(MAX_LINE).read_until(b'\n', line).await? > 0)
}

pub(crate) fn reader(path: &Path) -> io::Result<pipe::Receiver> {
    // Opened for writing too, so that there is no end of file while no Envoy runs.
    pipe::OpenOptions::new().read_write(true).open_receiver(path)
}

/// Splits a line such as `warning main: text` (Envoy's `--log-format`) into level, component and message. A line in another format is
/// returned whole, with level `info`.
fn parse(line: &str) -> (&str, &str, &str) {
    let formatted = line.split_once(' ').and_then(|(level, rest)| {
        let known = ["trace", "debug", "info", "warning", "error", "critical"].contains(&level);
        let (component, message) = rest.split_once(": ").filter(|(component, _)| !component.contains(' '))?;
        known.then_some((level, component, message))
    });
    formatted.unwrap_or(("info", "output", line))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_envoy_has_its_level_and_anything_else_is_information() {
        assert_eq!(parse("warning main: caught: it"), ("warning", "main", "caught: it"));
        assert_eq!(parse("[libprotobuf ERROR x] y: z"), ("info", "output", "[libprotobuf ERROR x] y: z"));
        assert_eq!(parse(""), ("info", "output", ""));
    }

    #[tokio::test]
    async fn a_line_that_does_not_end_is_read_in_pieces() {
        let endless = [vec![b'x'; 3 << 16], b"\nnext\n".to_vec()].concat();
        let mut reader = BufReader::new(endless.as_slice());
        let mut line = Vec::new();
        let mut lengths = Vec::new();
        while next_line(&mut reader, &mut line).await.unwrap() {
            lengths.push(line.len());
        }
        assert_eq!(lengths, [1 << 16, 1 << 16, 1 << 16, 1, 5]);
    }

    #[tokio::test]
    async fn a_writer_outlives_its_reader_and_never_waits_for_one() {
        use std::io::Write;
        let dir = vmesh_testkit::tempdir().unwrap();
        let path = dir.join("fifo");
        fifo(&path).unwrap();
        fifo(&path).unwrap();
        let mut writer = std::fs::File::from(writer(&path).unwrap());
        drop(reader(&path).unwrap());
        let full = std::iter::repeat_n("warning main: x\n", 1 << 20)
            .find_map(|line| writer.write(line.as_bytes()).err());
        assert_eq!(full.unwrap().kind(), io::ErrorKind::WouldBlock);
        let mut lines = BufReader::new(reader(&path).unwrap()).lines();
        assert_eq!(lines.next_line().await.unwrap().unwrap(), "warning main: x");
    }
}
