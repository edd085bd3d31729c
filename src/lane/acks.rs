//! What has come from the peer, and when it is acknowledged.

use crate::lane::timer::{Timer, TimerTable};
use std::time::{Duration, Instant};

/// An acknowledgement is sent after so many bytes, or so much later when no message is sent that could carry it.
pub(super) const ACK_AFTER: usize = 128 << 10;
const ACK_DELAY: Duration = Duration::from_millis(25);
/// In a pause the last acknowledgement is repeated after `ACK_DELAY`, and then after twice as long each time, up to
/// this.
const REPEAT_UNTIL: Duration = Duration::from_millis(200);

#[derive(Default)]
pub(super) struct Acks {
    /// All messages up to this number have come.
    pub(super) received: u64,
    /// Bytes that came since the last acknowledgement was sent.
    unacknowledged: usize,
    acknowledged: u64,
    /// An acknowledgement is to be sent now.
    pub(super) is_due: bool,
    repeat_after: Duration,
    /// The number after which a gap was last reported: once is enough, or repeats would multiply.
    gap_reported: Option<u64>,
}

/// What a message's number says.
pub(super) enum Arrival {
    /// Its frames are the next ones.
    Next,
    /// Messages before it are missing, which was not reported yet.
    NewGap,
    /// Its frames have come before, or come too early, or it has none.
    Nothing,
}

impl Acks {
    /// A message came, with frames or without.
    pub(super) fn arrived(
        &mut self,
        sequence: u64,
        size: Option<usize>,
        now: Instant,
        timers: &mut TimerTable,
    ) -> Arrival {
        match size {
            Some(_) if sequence <= self.received => self.is_due = true,
            Some(size) if sequence == self.received + 1 => {
                self.received += 1;
                self.unacknowledged += size;
                self.is_due |= self.unacknowledged >= ACK_AFTER;
                timers.set_earlier(Timer::Ack, now + ACK_DELAY);
                return Arrival::Next;
            }
            _ if sequence > self.received && self.gap_reported != Some(self.received) => {
                self.gap_reported = Some(self.received);
                return Arrival::NewGap;
            }
            _ => {}
        }
        Arrival::Nothing
    }

    /// `Timer::RepeatAck` has expired. A peer that died just after the last acknowledgement was sent may have got it
    /// without a 503; nothing else would be sent that could show the death.
    pub(super) fn repeat(&mut self, has_streams: bool, now: Instant, timers: &mut TimerTable) {
        self.is_due |= has_streams;
        self.repeat_after *= 2;
        timers.set(Timer::RepeatAck, Some(now + self.repeat_after).filter(|_| self.repeat_after <= REPEAT_UNTIL));
    }

    /// A message is sent, and carries the acknowledgement.
    pub(super) fn sent(&mut self, has_streams: bool, now: Instant, timers: &mut TimerTable) {
        (self.is_due, self.unacknowledged) = (false, 0);
        timers.clear(Timer::Ack);
        if self.received > self.acknowledged && has_streams {
            self.repeat_after = ACK_DELAY;
            timers.set(Timer::RepeatAck, now + ACK_DELAY);
        }
        self.acknowledged = self.received;
    }
}
