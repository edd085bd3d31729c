//! Messages are kept until the peer has acknowledged them, and sent again from the first missing one on.
//!
//! What is missing is shown by the peer (GAP) or by the PONG to a PING. PINGs are numbered, and NATS keeps the order:
//! so a PONG covers exactly what was sent before its PING.

use crate::lane::path::Path;
use crate::wire::frame;
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::time::Instant;

/// How many PINGs without an answer are remembered.
const MAX_UNANSWERED: usize = 64;

/// A PING that was sent.
pub(super) struct Ping {
    number: u32,
    pub(super) sent_at: Instant,
    /// The last message with frames that was sent before it.
    pub(super) covers: u64,
    /// Whether its answer can show what is missing: not if messages were sent again after it.
    pub(super) shows_loss: bool,
    /// Whether more than half of the congestion window was in flight.
    pub(super) used_window: bool,
}

pub(super) struct Retransmit {
    /// Messages that were sent; the first has the number `acked + 1`.
    pub(super) unacked: VecDeque<Bytes>,
    pub(super) acked: u64,
    /// Bytes of the frames in `unacked`.
    pub(super) bytes: usize,
    /// Bytes of messages in `unacked` that were not found missing.
    pub(super) in_flight: usize,
    /// Messages that were sent again and not counted elsewhere yet.
    pub(super) resent: u64,
    /// Index of the message to be sent again next.
    next: Option<usize>,
    /// The acknowledgement of the last GAP that was followed: the same one again is not another loss.
    gap_followed: Option<u64>,
    /// The number of the last PING, and those without an answer.
    pub(super) last_ping: u32,
    pub(super) pings: VecDeque<Ping>,
    /// PONGs in a row that showed a loss while nothing was acknowledged.
    pub(super) useless_pongs: u32,
    /// When something was last acknowledged, sent again or asked for, and how many PINGs asked for it since.
    progress_at: Instant,
    asked: u32,
}

impl Retransmit {
    pub(super) fn new(now: Instant) -> Retransmit {
        Retransmit {
            unacked: VecDeque::new(),
            acked: 0,
            bytes: 0,
            in_flight: 0,
            resent: 0,
            next: None,
            gap_followed: None,
            last_ping: 0,
            pings: VecDeque::new(),
            useless_pongs: 0,
            progress_at: now,
            asked: 0,
        }
    }

    pub(super) fn last_sent(&self) -> u64 {
        self.acked + self.unacked.len() as u64
    }

    /// All messages up to this number were sent, or sent again after a loss.
    pub(super) fn sent_so_far(&self) -> u64 {
        self.next.map_or_else(|| self.last_sent(), |index| self.acked + index as u64)
    }

    /// The size of the message to be sent again next.
    #[inline]
    pub(super) fn next_size(&self) -> Option<usize> {
        self.unacked.get(self.next?).map(Bytes::len)
    }

    /// Takes a copy of the message to be sent again next, and its number.
    pub(super) fn next_again(&mut self) -> Option<(u64, BytesMut)> {
        let index = self.next.take()?;
        let message = BytesMut::from(&self.unacked.get(index)?[..]);
        self.next = (index + 1 < self.unacked.len()).then_some(index + 1);
        self.in_flight += message.len();
        self.resent += 1;
        Some((self.acked + 1 + index as u64, message))
    }

    /// Returns the number for a message of this size, which is sent for the first time and then pushed to `unacked`.
    pub(super) fn send(&mut self, size: usize, now: Instant) -> u64 {
        if self.unacked.is_empty() {
            (self.progress_at, self.asked) = (now, 0);
        }
        self.in_flight += size;
        self.bytes += size - frame::HEADER;
        self.last_sent() + 1
    }

    /// The peer has all messages up to `ack`, which are given to `recycle`. Returns false if that was known.
    pub(super) fn acknowledge(&mut self, ack: u64, now: Instant, mut recycle: impl FnMut(Bytes)) -> bool {
        if ack <= self.acked {
            return false;
        }
        let count = usize::try_from(ack - self.acked).unwrap_or(usize::MAX).min(self.unacked.len());
        let sent = self.next.unwrap_or(usize::MAX);
        for (index, message) in self.unacked.drain(..count).enumerate() {
            self.bytes -= message.len() - frame::HEADER;
            if index < sent {
                self.in_flight -= message.len();
            }
            recycle(message);
        }
        self.acked = ack;
        self.next = self.next.map(|index| index.saturating_sub(count)).filter(|index| *index < self.unacked.len());
        (self.useless_pongs, self.progress_at, self.asked) = (0, now, 0);
        true
    }

    /// Whether a GAP is to be followed: not if it repeats the last one, unless a PING comes with it.
    pub(super) fn is_new_gap(&mut self, ack: u64, has_ping: bool) -> bool {
        let is_new = has_ping || self.gap_followed != Some(ack);
        if is_new {
            // A GAP behind the last message shows no loss.
            self.gap_followed = (!self.unacked.is_empty()).then_some(ack);
        }
        is_new
    }

    /// All that is not acknowledged is to be sent again.
    pub(super) fn start_over(&mut self, now: Instant) {
        self.next = (!self.unacked.is_empty()).then_some(0);
        (self.in_flight, self.progress_at) = (0, now);
    }

    /// Numbers a PING that is sent now.
    pub(super) fn ping(&mut self, covers: u64, used_window: bool, now: Instant) -> u32 {
        self.last_ping = self.last_ping.wrapping_add(1);
        if self.pings.len() == MAX_UNANSWERED {
            self.pings.pop_front();
        }
        self.pings.push_back(Ping { number: self.last_ping, sent_at: now, covers, shows_loss: true, used_window });
        self.last_ping
    }

    /// Takes the PING that a PONG answers. None if it was never sent, or was answered before.
    pub(super) fn answered(&mut self, number: u32) -> Option<Ping> {
        let index = self.pings.iter().position(|ping| ping.number == number)?;
        self.asked = 0;
        // NATS keeps the order: those before it are lost, or their answers are.
        self.pings.drain(..=index).next_back()
    }

    /// The answers to PINGs that were sent before now do not show what is missing from now on.
    pub(super) fn disregard_pings(&mut self) {
        self.pings.iter_mut().for_each(|ping| ping.shows_loss = false);
    }

    /// When to ask for acknowledgement.
    pub(super) fn ask_at(&self, path: &Path) -> Option<Instant> {
        (!self.unacked.is_empty()).then(|| self.progress_at + path.ask_after(self.asked))
    }

    /// A PING asks for acknowledgement.
    pub(super) fn asked(&mut self, now: Instant) {
        (self.progress_at, self.asked) = (now, self.asked.saturating_add(1));
    }

    /// The connection is lost: what was sent may or may not arrive.
    pub(super) fn disconnected(&mut self) {
        self.pings.clear();
        self.next = None;
        self.in_flight = self.unacked.iter().map(Bytes::len).sum();
    }
}
