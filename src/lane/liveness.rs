//! Whether the peer is there: heartbeats, the grace of a suspected peer, and probing after a reconnect.

use crate::lane::path;
use crate::lane::timer::{Timer, TimerTable};
use std::mem;
use std::time::{Duration, Instant};

/// While probing, the first PING is repeated after this, and then after twice as long each time …
const MIN_PROBE_INTERVAL: Duration = Duration::from_millis(20);
/// … up to this.
const MAX_PROBE_INTERVAL: Duration = Duration::from_millis(500);
/// If a timer is so late, this process or its machine stood still.
pub(super) const LATE: Duration = Duration::from_millis(250);
/// After how many heartbeats without a message the peer is gone.
pub(super) const MAX_MISSED: u32 = 3;
/// How much rarer heartbeats are while no streams run.
const IDLE_FACTOR: u32 = 12;

/// After which times a peer is gone.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerTimeouts {
    /// A silent peer is sent a PING this often. After three without a message it is gone.
    pub(crate) heartbeat_interval: Duration,
    /// How long a peer on our nats-server may be away after a 503.
    pub(crate) local_grace: Duration,
    /// How long a peer on another nats-server may be away after a 503: the route between the servers may be down.
    pub(crate) remote_grace: Duration,
    /// How long the peer may take to reconnect after we did.
    pub(crate) peer_reconnect: Duration,
}

pub(super) struct Liveness {
    timeouts: PeerTimeouts,
    /// The nats-servers of both ends, as in `frame::server`; 0: not known.
    pub(super) server: u32,
    peer_server: u32,
    /// Only PINGs are sent until one is answered.
    pub(super) is_probing: bool,
    probe_interval: Duration,
    /// nats-server has answered 503, and no message has come since.
    pub(super) is_suspect: bool,
    /// Until when the peer may be reconnecting.
    peer_reconnects_until: Option<Instant>,
    missed: u32,
    heard_at: Instant,
    was_late: bool,
}

impl Liveness {
    pub(super) fn new(timeouts: PeerTimeouts, now: Instant) -> Liveness {
        Liveness {
            timeouts,
            server: 0,
            peer_server: 0,
            is_probing: false,
            probe_interval: MIN_PROBE_INTERVAL,
            is_suspect: false,
            peer_reconnects_until: None,
            missed: 0,
            heard_at: now,
            was_late: false,
        }
    }

    /// Whether silence could be judged earlier if the round trip was known.
    pub(super) fn needs_round_trip(&self) -> bool {
        self.timeouts.heartbeat_interval * MAX_MISSED < path::FIRST_ANSWER
    }

    /// When the next heartbeat is due if nothing comes from the peer.
    pub(super) fn next_heartbeat(&self, is_idle: bool, now: Instant) -> Instant {
        now + self.timeouts.heartbeat_interval * if is_idle { IDLE_FACTOR } else { 1 }
    }

    /// There is a connection again. `start_probing` follows.
    pub(super) fn reconnected(&mut self, server: u32, now: Instant, timers: &mut TimerTable) {
        self.server = server;
        self.peer_reconnects_until = Some(now + self.timeouts.peer_reconnect);
        (self.missed, self.heard_at) = (0, now);
        timers.set(Timer::Heartbeat, self.next_heartbeat(false, now));
    }

    /// A message came from the peer.
    pub(super) fn heard(&mut self, peer_server: u32, is_idle: bool, now: Instant, timers: &mut TimerTable) {
        if mem::take(&mut self.is_suspect) {
            timers.clear(Timer::Grace);
            if self.is_probing {
                // It is back: send the next PING now, and not after the interval.
                self.start_probing(now, timers);
            }
        }
        self.peer_reconnects_until = None;
        (self.missed, self.heard_at) = (0, now);
        if peer_server != 0 {
            self.peer_server = peer_server;
        }
        timers.set(Timer::Heartbeat, self.next_heartbeat(is_idle, now));
    }

    /// nats-server has answered 503: the peer is gone unless a message of it comes within the grace.
    pub(super) fn suspect(&mut self, silence: Option<Duration>, now: Instant, timers: &mut TimerTable) {
        self.is_suspect = true;
        let is_local = self.server != 0 && self.server == self.peer_server;
        let grace = if is_local { self.timeouts.local_grace } else { self.timeouts.remote_grace };
        // Until an answer can have come, unless there is no grace at all.
        let grace = if grace.is_zero() { grace } else { grace.max(silence.unwrap_or_default()) };
        let gone_at = now + grace;
        timers.set(Timer::Grace, self.peer_reconnects_until.map_or(gone_at, |until| gone_at.max(until)));
    }

    pub(super) fn start_probing(&mut self, now: Instant, timers: &mut TimerTable) {
        self.is_probing = true;
        self.probe_interval = MIN_PROBE_INTERVAL;
        timers.set(Timer::Probe, now);
    }

    pub(super) fn stop_probing(&mut self, timers: &mut TimerTable) {
        self.is_probing = false;
        timers.clear(Timer::Probe);
    }

    /// Returns whether this process stood still until now, if the timers that are handled now are late. What came from
    /// the peer meanwhile is still to be read, so the last heartbeat is not counted as missed yet. Two late timers in a
    /// row mean overload: the peer is not given more time again.
    pub(super) fn stood_still(&mut self, is_late: bool) -> bool {
        let was_late = mem::replace(&mut self.was_late, is_late);
        if is_late && !was_late {
            self.missed = self.missed.min(MAX_MISSED - 1);
        }
        is_late && !was_late
    }

    pub(super) fn heartbeat_expired(
        &mut self,
        stood_still: bool,
        is_idle: bool,
        now: Instant,
        timers: &mut TimerTable,
    ) {
        self.missed += u32::from(!stood_still);
        timers.set(Timer::Heartbeat, self.next_heartbeat(is_idle, now));
    }

    /// Gives a suspected peer more time, because this process stood still.
    pub(super) fn extend_grace(&mut self, now: Instant, timers: &mut TimerTable) {
        self.peer_reconnects_until = Some(now + LATE);
        timers.set(Timer::Grace, now + LATE);
    }

    pub(super) fn probe_expired(&mut self, now: Instant, timers: &mut TimerTable) {
        timers.set(Timer::Probe, now + self.probe_interval);
        self.probe_interval = (self.probe_interval * 2).min(MAX_PROBE_INTERVAL);
    }

    /// Whether the peer has been silent for too many heartbeats, and for longer than an answer takes.
    pub(super) fn is_silent(&self, silence: Option<Duration>, now: Instant) -> bool {
        self.missed >= MAX_MISSED
            && now >= self.heard_at + silence.unwrap_or(path::FIRST_ANSWER)
            && self.peer_reconnects_until.is_none_or(|until| now >= until)
    }
}
