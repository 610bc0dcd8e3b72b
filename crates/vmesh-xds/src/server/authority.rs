use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection over a Unix socket whose client may send the socket's path as the `:authority` of its requests,
/// as gRPC's C core does (`run%2Fvmesh%2Fxds.sock`). A URI's host cannot contain `%`, and the `h2` crate resets
/// such a stream. The server ignores the authority, so this adapter replaces each byte of it that is invalid in
/// a host by `-`.
///
/// The replacement happens in place and keeps the length, so the HPACK tables of both ends stay in step.
/// Huffman-coded values pass unchanged: the C core codes none of them.
pub struct AnyAuthority<I> {
    io: I,
    scanner: Scanner,
}

impl<I> AnyAuthority<I> {
    pub(super) fn new(io: I) -> AnyAuthority<I> {
        AnyAuthority { io, scanner: Scanner::default() }
    }
}

const PREFACE: usize = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".len();
const FRAME_HEAD: usize = 9;
const HEADERS: u8 = 1;
const CONTINUATION: u8 = 9;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// The index of `:authority` in HPACK's static table.
const AUTHORITY: u32 = 1;

/// Follows HTTP/2's frames and HPACK's fields byte by byte, without buffering them.
#[derive(Default)]
struct Scanner {
    /// The number of bytes of the preface that have passed.
    preface: usize,
    head: [u8; FRAME_HEAD],
    head_len: usize,
    /// The number of bytes of the frame's payload that are still to come.
    payload: usize,
    /// The number of bytes before the header block, and the length of the padding behind it.
    before_block: usize,
    has_padding: bool,
    padding: usize,
    is_block: bool,
    field: Field,
}

/// The position of the next byte in a header field.
#[derive(Clone, Copy, Default)]
enum Field {
    #[default]
    Start,
    /// The next byte continues a number.
    Number { of: Number, value: u32, shift: u32 },
    /// The next byte begins the length of a string.
    Length(Text),
    /// The next byte belongs to a string, which has `left` more bytes.
    Text { text: Text, left: u32, is_coded: bool },
}

#[derive(Clone, Copy)]
enum Number {
    /// An indexed field or a table size update: the field ends with this number.
    Complete,
    /// The index of a field name; the value of the field follows.
    Name,
    Length {
        text: Text,
        is_coded: bool,
    },
}

#[derive(Clone, Copy)]
enum Text {
    Name,
    Value { is_authority: bool },
}

impl Scanner {
    fn pass(&mut self, bytes: &mut [u8]) {
        for byte in bytes {
            if self.preface < PREFACE {
                self.preface += 1;
            } else if self.payload == 0 {
                self.pass_head(*byte);
            } else {
                self.payload -= 1;
                self.pass_payload(byte);
            }
        }
    }

    fn pass_head(&mut self, byte: u8) {
        if let Some(place) = self.head.get_mut(self.head_len) {
            *place = byte;
        }
        self.head_len += 1;
        if self.head_len < FRAME_HEAD {
            return;
        }
        self.head_len = 0;
        let [a, b, c, kind, flags, ..] = self.head;
        self.payload = u32::from_be_bytes([0, a, b, c]) as usize;
        self.is_block = matches!(kind, HEADERS | CONTINUATION);
        self.has_padding = kind == HEADERS && flags & PADDED != 0;
        self.before_block = if kind == HEADERS && flags & PRIORITY != 0 { 5 } else { 0 };
        self.padding = 0;
        if kind == HEADERS {
            self.field = Field::Start;
        }
    }

    fn pass_payload(&mut self, byte: &mut u8) {
        if !self.is_block {
        } else if std::mem::take(&mut self.has_padding) {
            self.padding = usize::from(*byte);
        } else if self.before_block > 0 {
            self.before_block -= 1;
        } else if self.payload >= self.padding {
            self.field = self.field.advance(byte);
        }
    }
}

impl Field {
    fn advance(self, byte: &mut u8) -> Field {
        match self {
            Field::Start => {
                // The longer the mark at the start of a field, the fewer bits of the byte belong to the number
                // (RFC 7541, section 6).
                let (of, bits) = match *byte {
                    0x80.. => (Number::Complete, 7),
                    0x40.. => (Number::Name, 6),
                    0x20.. => (Number::Complete, 5),
                    _ => (Number::Name, 4),
                };
                Field::number(of, *byte, bits)
            }
            Field::Number { of, value, shift } => {
                // An overflowing number may decode to any value here: the `h2` crate rejects the block.
                let more = u32::from(*byte & 0x7f).checked_shl(shift).unwrap_or(0);
                let value = value.saturating_add(more);
                match *byte & 0x80 {
                    0 => Field::after(of, value),
                    _ => Field::Number { of, value, shift: shift.saturating_add(7) },
                }
            }
            Field::Length(text) => {
                Field::number(Number::Length { text, is_coded: *byte & 0x80 != 0 }, *byte, 7)
            }
            Field::Text { text, left, is_coded } => {
                let is_authority = matches!(text, Text::Value { is_authority: true });
                if is_authority && !is_coded && !is_valid_in_host(*byte) {
                    *byte = b'-';
                }
                match left - 1 {
                    0 => Field::after_text(text),
                    left => Field::Text { text, left, is_coded },
                }
            }
        }
    }

    /// Reads the number that begins in the low `bits` of `byte`.
    fn number(of: Number, byte: u8, bits: u32) -> Field {
        let most = (1u32 << bits) - 1;
        match u32::from(byte) & most {
            value if value < most => Field::after(of, value),
            value => Field::Number { of, value, shift: 0 },
        }
    }

    fn after(of: Number, value: u32) -> Field {
        match of {
            Number::Complete => Field::Start,
            Number::Name if value == 0 => Field::Length(Text::Name),
            Number::Name => Field::Length(Text::Value { is_authority: value == AUTHORITY }),
            Number::Length { text, .. } if value == 0 => Field::after_text(text),
            Number::Length { text, is_coded } => Field::Text { text, left: value, is_coded },
        }
    }

    fn after_text(text: Text) -> Field {
        match text {
            Text::Name => Field::Length(Text::Value { is_authority: false }),
            Text::Value { .. } => Field::Start,
        }
    }
}

fn is_valid_in_host(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~' | b':' | b'[' | b']')
}

impl<I: AsyncRead + Unpin> AsyncRead for AnyAuthority<I> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buffer.filled().len();
        std::task::ready!(Pin::new(&mut this.io).poll_read(cx, buffer))?;
        this.scanner.pass(buffer.filled_mut().get_mut(before..).unwrap_or_default());
        Poll::Ready(Ok(()))
    }
}

impl<I: AsyncWrite + Unpin> AsyncWrite for AnyAuthority<I> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u8, flags: u8, payload: &[u8]) -> Vec<u8> {
        let len = u32::try_from(payload.len()).unwrap().to_be_bytes();
        [&len[1..], &[kind, flags, 0, 0, 0, 1], payload].concat()
    }

    fn connection(frames: &[Vec<u8>]) -> Vec<u8> {
        [b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), frames.concat()].concat()
    }

    /// Scans `bytes` whole and byte by byte, and checks that both results are equal.
    fn passed(bytes: &[u8]) -> Vec<u8> {
        let whole = {
            let (mut scanner, mut bytes) = (Scanner::default(), bytes.to_vec());
            scanner.pass(&mut bytes);
            bytes
        };
        let (mut scanner, mut pieces) = (Scanner::default(), bytes.to_vec());
        pieces.chunks_mut(1).for_each(|piece| scanner.pass(piece));
        assert_eq!(whole, pieces);
        whole
    }

    /// A header block: `:method POST`, a literal field with a name of its own, a long field, and the authority
    /// last.
    fn block(mark: u8, authority: &[u8]) -> Vec<u8> {
        let long = [&[0x40, 1, b'x', 0x7f, 0x80, 0x01][..], &[b'%'; 255]].concat();
        let own = [0x00, 0x04, b'%', b'2', b'F', b'k', 0x02, b'%', b'v'];
        let value = [&[mark, u8::try_from(authority.len()).unwrap()], authority].concat();
        [&[0x83, 0x3f, 0xe1, 0x1f][..], &own, &long, &value, &[0x86]].concat()
    }

    #[test]
    fn only_the_authority_is_changed_and_only_what_no_host_has() {
        let (path, host) = (b"run%2Fvmesh%2Fxds.sock", b"run-2Fvmesh-2Fxds.sock");
        // Literals with incremental indexing, without indexing, and never indexed.
        for mark in [0x41, 0x01, 0x11] {
            let settings = frame(4, 0, b"%%%%%%");
            let data = frame(0, 0, b"\x41\x03a%b");
            let with = |authority: &[u8]| {
                let block = block(mark, authority);
                let padded = [&[3], &block[..], b"\x41\x01%"].concat();
                let prioritised = [b"\x41\x01%%%", &block[..]].concat();
                connection(&[
                    settings.clone(),
                    frame(HEADERS, 4, &block),
                    data.clone(),
                    frame(HEADERS, 4 | PADDED, &padded),
                    frame(HEADERS, 4 | PRIORITY, &prioritised),
                    frame(HEADERS, 0, &block[..20]),
                    frame(CONTINUATION, 4, &block[20..]),
                ])
            };
            assert_eq!(passed(&with(path)), with(host), "{mark:x}");
            assert_eq!(passed(&with(b"localhost:1")), with(b"localhost:1"));
        }
    }

    #[test]
    fn nonsense_passes() {
        for byte in 0..=255 {
            let nonsense = [connection(&[]), vec![byte; 4096]].concat();
            assert_eq!(passed(&nonsense).len(), nonsense.len());
        }
    }
}
