//! Responses, encoded as a head and shared frames.

use super::Protocol;
use crate::resource::{field_len, put_field, put_field_head};
use crate::{Kind, Resource};
use bytes::{BufMut, Bytes};
use std::sync::Arc;

/// One response, framed for gRPC: a head that belongs to this stream, followed by bytes that all streams share.
#[derive(Debug)]
pub struct Response {
    pub kind: Kind,
    pub nonce: Box<str>,
    pub resources: usize,
    pub removed: usize,
    frames: Vec<Bytes>,
}

/// The fields of a response that differ between streams.
pub(super) struct ResponseHead<'a> {
    pub protocol: Protocol,
    pub kind: Kind,
    pub nonce: u64,
    pub version: u64,
    pub removed: &'a [Arc<str>],
    pub control_plane: &'a str,
}

/// Shorter fields are copied, in bytes: an HTTP/2 frame of their own would cost more.
const COPY_BELOW: usize = 1024;

/// The length of gRPC's prefix: one byte for the compression and four for the length.
const GRPC_PREFIX: usize = 5;

impl Response {
    pub(super) fn new(head: ResponseHead<'_>, resources: &[Arc<Resource>]) -> Response {
        let ResponseHead { protocol, kind, nonce, version, removed, control_plane } = head;
        let fields = resources.iter().map(|resource| match protocol {
            Protocol::Delta => resource.delta(),
            Protocol::Sotw => resource.sotw(),
        });
        let shared: usize = fields.clone().map(|field| field.len()).sum();
        let copied: usize = fields.clone().map(|field| field.len()).filter(|len| *len < COPY_BELOW).sum();

        let nonce = nonce.to_string();
        let version = format!("{version:016x}");
        let head_len = field_len(version.len())
            + field_len(kind.type_url().len())
            + field_len(nonce.len())
            + removed.iter().map(|name| field_len(name.len())).sum::<usize>()
            + field_len(field_len(control_plane.len()));

        // Large fields become frames of their own. Each run of copied fields between them is one frame.
        let mut run = Vec::with_capacity(GRPC_PREFIX + head_len + copied);
        run.put_u8(0);
        // A message of 4 GiB cannot occur: clients accept at most 2 GiB, and most accept 4 MiB.
        run.put_u32(u32::try_from(head_len + shared).unwrap_or(u32::MAX));
        put_field(&mut run, 1, version.as_bytes());
        put_field(&mut run, 4, kind.type_url().as_bytes());
        put_field(&mut run, 5, nonce.as_bytes());
        removed.iter().for_each(|name| put_field(&mut run, 6, name.as_bytes()));
        let (tag, identifier) = match protocol {
            Protocol::Delta => (7, 1),
            Protocol::Sotw => (6, 1),
        };
        put_field_head(&mut run, tag, field_len(control_plane.len()));
        put_field(&mut run, identifier, control_plane.as_bytes());

        let mut frames = Vec::new();
        for field in fields {
            if field.len() < COPY_BELOW {
                run.put_slice(&field);
            } else {
                if !run.is_empty() {
                    frames.push(Bytes::from(std::mem::take(&mut run)));
                }
                frames.push(field);
            }
        }
        if !run.is_empty() {
            frames.push(Bytes::from(run));
        }
        Response { kind, nonce: nonce.into(), resources: resources.len(), removed: removed.len(), frames }
    }

    /// Returns the length in bytes, including gRPC's prefix.
    pub fn len(&self) -> usize {
        self.frames.iter().map(Bytes::len).sum()
    }

    /// Always returns `false`: a response without resources still has a head.
    pub fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// Returns the frames in the order in which they are written.
    pub fn into_frames(self) -> Vec<Bytes> {
        self.frames
    }
}
