//! What a connection counts.

use crate::sync::atomic::{AtomicU64, Ordering};

/// What a connection has done so far, and what it has now.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Whether there is a connection to nats-server.
    pub connected: bool,
    /// How often a connection was made.
    pub connects: u64,
    /// Running streams requested here.
    pub streams: u64,
    /// Running streams served here.
    pub senders: u64,
    /// Requests that came.
    pub requests: u64,
    /// Requests answered with "server busy".
    pub requests_busy: u64,
    /// Requests ignored or refused.
    pub requests_ignored: u64,
    /// Messages given to the NATS client.
    pub messages_out: u64,
    /// Messages that came in.
    pub messages_in: u64,
    /// Messages that came in and were not expected.
    pub messages_ignored: u64,
    /// Announcements sent.
    pub offline_out: u64,
    /// Announcements of other processes.
    pub offline_in: u64,
    /// Bytes that wait to be sent, and on lanes, to be acknowledged.
    pub bytes_waiting: u64,
    /// Lanes, one for each process that streams are shared with.
    pub lanes: u64,
}

/// What the parts of a connection count.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) connects: AtomicU64,
    pub(crate) streams: AtomicU64,
    /// The windows of all streams requested here, in bytes.
    pub(crate) windows: AtomicU64,
    /// On level 0, the bytes that wait for the readers of streams.
    pub(crate) unread: AtomicU64,
    pub(crate) senders: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) requests_busy: AtomicU64,
    pub(crate) requests_ignored: AtomicU64,
    pub(crate) messages_out: AtomicU64,
}

/// Adds one to a counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}
