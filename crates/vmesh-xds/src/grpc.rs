//! gRPC's framing, for both drivers: each message follows one byte for its compression and four bytes for its
//! length.

#[cfg(feature = "client")]
use bytes::BufMut;
use bytes::{Buf, Bytes, BytesMut};
use http_body::Body;
use std::fmt;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use tonic::Code;

/// The gRPC status with which a call ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub message: String,
}

impl Failure {
    pub(crate) fn new(code: Code, message: impl Into<String>) -> Failure {
        Failure { code, message: message.into() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.code, self.message)
    }
}

impl std::error::Error for Failure {}

/// A memory budget that the incomplete messages of many streams share.
pub(crate) struct Budget {
    left: AtomicUsize,
}

/// The part of an incomplete message that needs no budget, in bytes: most requests are smaller, so the server
/// reads them even while many large requests use up the budget.
const FREE_BYTES: usize = 4 << 10;

impl Budget {
    #[cfg(feature = "server")]
    pub(crate) fn new(bytes: usize) -> Arc<Budget> {
        Arc::new(Budget { left: AtomicUsize::new(bytes) })
    }

    fn take(&self, bytes: usize) -> bool {
        let take = |left: usize| left.checked_sub(bytes);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    fn release(&self, bytes: usize) {
        self.left.fetch_add(bytes, Ordering::Relaxed);
    }
}

/// The bytes that one stream has taken from a [`Budget`]. Dropping the share returns them.
struct BudgetShare {
    budget: Arc<Budget>,
    bytes: usize,
}

impl BudgetShare {
    /// Adjusts the share to a stream that buffers `buffered` bytes. Returns `false` if the budget has too few
    /// bytes left.
    fn set(&mut self, buffered: usize) -> bool {
        let bytes = buffered.saturating_sub(FREE_BYTES);
        if bytes > self.bytes && !self.budget.take(bytes - self.bytes) {
            return false;
        }
        self.budget.release(self.bytes.saturating_sub(bytes));
        self.bytes = bytes;
        true
    }
}

impl Drop for BudgetShare {
    fn drop(&mut self) {
        self.budget.release(self.bytes);
    }
}

/// The gRPC messages in an HTTP/2 body. An empty buffer keeps no memory.
pub(crate) struct Messages<B> {
    body: Pin<Box<B>>,
    buffer: BytesMut,
    limit: usize,
    /// The stream's share of a budget. Without one, only `limit` bounds the buffer.
    share: Option<BudgetShare>,
    trailers: Option<http::HeaderMap>,
}

impl<B: Body> Messages<B> {
    pub(crate) fn new(body: B, limit: usize) -> Messages<B> {
        Messages { body: Box::pin(body), buffer: BytesMut::new(), limit, share: None, trailers: None }
    }

    /// Sets the size limit of the following messages and charges their incomplete bytes to `budget`.
    #[cfg(feature = "server")]
    pub(crate) fn set_limits(&mut self, limit: usize, budget: &Arc<Budget>) {
        self.limit = limit;
        self.share = Some(BudgetShare { budget: budget.clone(), bytes: 0 });
    }

    pub(crate) fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, Failure>>> {
        loop {
            match self.take() {
                Ok(Some(message)) => return Poll::Ready(Some(Ok(message))),
                Ok(None) => {}
                Err(failure) => return Poll::Ready(Some(Err(failure))),
            }
            match ready!(self.body.as_mut().poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => {
                        self.append(data);
                        let buffered = self.buffer.len();
                        if self.share.as_mut().is_some_and(|share| !share.set(buffered)) {
                            let message = "too many large requests are on their way: try again later";
                            return Poll::Ready(Some(Err(Failure::new(Code::ResourceExhausted, message))));
                        }
                    }
                    Err(frame) => self.trailers = frame.into_trailers().ok(),
                },
                Some(Err(_)) => {
                    let failure = Failure::new(Code::Unavailable, "the connection broke");
                    return Poll::Ready(Some(Err(failure)));
                }
                None if self.buffer.is_empty() => return Poll::Ready(None),
                None => {
                    self.buffer = BytesMut::new();
                    let failure = Failure::new(Code::InvalidArgument, "the stream ended within a message");
                    return Poll::Ready(Some(Err(failure)));
                }
            }
        }
    }

    /// Returns the trailers that followed the last message.
    #[cfg(feature = "client")]
    pub(crate) fn trailers(&self) -> Option<&http::HeaderMap> {
        self.trailers.as_ref()
    }

    /// Removes the first message from the buffer and returns it. Returns `None` while the message is
    /// incomplete.
    fn take(&mut self) -> Result<Option<Bytes>, Failure> {
        let Some((&[compressed, ref len @ ..], _)) = self.buffer.split_first_chunk::<5>() else {
            return Ok(None);
        };
        let (len, limit) = (u32::from_be_bytes(*len) as usize, self.limit);
        if compressed != 0 {
            return Err(Failure::new(Code::Unimplemented, "compressed messages are not taken"));
        }
        if len > limit {
            let message = format!("a message of {len} bytes: the limit is {limit}");
            return Err(Failure::new(Code::ResourceExhausted, message));
        }
        if self.buffer.len() < 5 + len {
            return Ok(None);
        }
        self.buffer.advance(5);
        let message = self.buffer.split_to(len).freeze();
        if self.buffer.is_empty() {
            self.buffer = BytesMut::new();
        }
        if let Some(share) = &mut self.share {
            // The share shrinks here, which cannot fail.
            share.set(self.buffer.len());
        }
        Ok(Some(message))
    }

    fn append(&mut self, mut data: impl Buf) {
        let bytes = data.copy_to_bytes(data.remaining());
        if self.buffer.is_empty() {
            self.buffer = BytesMut::from(bytes);
        } else {
            self.buffer.extend_from_slice(&bytes);
        }
    }
}

#[cfg(feature = "client")]
pub(crate) fn framed(message: &impl prost::Message) -> Bytes {
    let len = message.encoded_len();
    let mut framed = BytesMut::with_capacity(5 + len);
    framed.put_u8(0);
    framed.put_u32(u32::try_from(len).unwrap_or(u32::MAX));
    // Encoding into a `BytesMut` cannot fail: it grows.
    _ = message.encode(&mut framed);
    framed.freeze()
}
