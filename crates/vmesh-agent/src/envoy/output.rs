//! Envoy's output, as lines in our log.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use tokio::io::{AsyncBufRead, AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::net::unix::pipe;
use tracing::{debug, error, info, trace, warn};

/// The FIFO that Envoy writes to, made if need be.
pub(crate) fn fifo(path: &Path) -> io::Result<()> {
    match rustix::fs::mkfifoat(CWD, path, Mode::from_raw_mode(0o600)) {
        Ok(()) => Ok(()),
        Err(Errno::EXIST) if FileType::from_raw_mode(rustix::fs::lstat(path)?.st_mode) == FileType::Fifo => {
            Ok(())
        }
        Err(error) => Err(error.into()),
    }
}

/// The end that is given to Envoy. It can be read too, so that it does not break when the agent goes; it does not
/// block, so that what nobody reads is lost and Envoy goes on.
pub(crate) fn writer(path: &Path) -> io::Result<OwnedFd> {
    let flags = OFlags::RDWR | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let writer = rustix::fs::open(path, flags, Mode::empty())?;
    // The largest that an ordinary user may have: minutes of warnings while the agent is away.
    _ = rustix::pipe::fcntl_setpipe_size(&writer, 1 << 20);
    Ok(writer)
}

/// Longer lines are logged in pieces: what is read of one is held in memory.
const MAX_LINE: u64 = 64 << 10;

/// Logs what comes out of the FIFO, for as long as it is polled.
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

/// False at the end.
async fn next_line(reader: &mut (impl AsyncBufRead + Unpin), line: &mut Vec<u8>) -> io::Result<bool> {
    line.clear();
    Ok(reader.take(MAX_LINE).read_until(b'\n', line).await? > 0)
}

pub(crate) fn reader(path: &Path) -> io::Result<pipe::Receiver> {
    // Read and write: with no Envoy there is no end of file, only nothing to read.
    pipe::OpenOptions::new().read_write(true).open_receiver(path)
}

/// `warning main: text`, by the format that Envoy is started with; anything else is a line of its own kind.
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
