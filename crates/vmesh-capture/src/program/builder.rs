//! The builder of a program: the state and the exclusions that the chains of both directions share.

use std::collections::BTreeSet;

use super::rules::{Chain, Match};
use super::{Direction, Note, Stage, UnsafeCapture};
use crate::host::Host;
use crate::spec::{INBOUND_PORT, OUTBOUND_PORT, OnLoss, Spec};

const SSH: u16 = 22;

/// Collects the chains of a program, and notes on the parts of its spec that have no effect.
pub(super) struct ProgramBuilder<'a> {
    pub(super) spec: &'a Spec,
    pub(super) host: &'a Host,
    pub(super) stage: Stage,
    pub(super) notes: Vec<Note>,
    pub(super) chains: Vec<Chain>,
    pub(super) refused: Option<UnsafeCapture>,
}

impl ProgramBuilder<'_> {
    pub(super) fn note(&mut self, subject: &'static str, message: impl Into<String>) {
        self.notes.push(Note { subject, message: message.into() });
    }

    pub(super) fn alive(&self, direction: Direction, on_loss: OnLoss) -> Option<Match> {
        (on_loss == OnLoss::Open || self.stage == Stage::Trial).then_some(Match::Alive(direction))
    }

    pub(super) fn ssh(&self) -> BTreeSet<u16> {
        self.host.never.ssh.iter().copied().chain([SSH]).collect()
    }

    pub(super) fn own(&self) -> BTreeSet<u16> {
        self.host.never.own.iter().copied().chain([OUTBOUND_PORT, INBOUND_PORT]).collect()
    }
}
