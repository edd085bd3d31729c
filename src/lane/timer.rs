//! The timers of a lane's end. Each is set, cleared and expired through one table, from which the next deadline
//! follows.

use std::time::Instant;

/// What is done at a given time. Timers that expire together are handled in this order.
#[derive(Clone, Copy)]
pub(super) enum Timer {
    /// Send a PING, and count how often the peer has been silent.
    Heartbeat,
    /// Give up the suspected peer.
    Grace,
    /// Repeat the PING while probing.
    Probe,
    /// Ask for acknowledgement of what was sent, by a PING.
    Loss,
    /// Acknowledge what came, if no message has carried the acknowledgement.
    Ack,
    /// Repeat the last acknowledgement.
    RepeatAck,
}

/// When each timer expires; None: it is not set.
#[derive(Default)]
pub(super) struct TimerTable([Option<Instant>; 6]);

impl TimerTable {
    pub(super) const ALL: [Timer; 6] =
        [Timer::Heartbeat, Timer::Grace, Timer::Probe, Timer::Loss, Timer::Ack, Timer::RepeatAck];

    /// Sets a timer, or clears it (`None`).
    pub(super) fn set(&mut self, timer: Timer, at: impl Into<Option<Instant>>) {
        self.0[timer as usize] = at.into();
    }

    /// Sets a timer, unless it expires before that anyway.
    pub(super) fn set_earlier(&mut self, timer: Timer, at: Instant) {
        self.set(timer, self.0[timer as usize].map_or(at, |before| before.min(at)));
    }

    #[cfg(test)]
    pub(super) fn get(&self, timer: Timer) -> Option<Instant> {
        self.0[timer as usize]
    }

    pub(super) fn clear(&mut self, timer: Timer) {
        self.set(timer, None);
    }

    /// Clears a timer if it has expired. Returns true if it had.
    pub(super) fn expire(&mut self, timer: Timer, now: Instant) -> bool {
        self.0[timer as usize].take_if(|at| now >= *at).is_some()
    }

    /// When the next timer expires.
    pub(super) fn next(&self) -> Option<Instant> {
        self.0.iter().copied().flatten().min()
    }
}
