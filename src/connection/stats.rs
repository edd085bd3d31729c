//! What a connection counts. `Stats` is the header's presence_stats.

use crate::sync::atomic::{AtomicU64, Ordering};

/// What a connection has done since presence_connect, and its present state.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// 1 while there is a connection to nats-server, otherwise 0.
    pub connected: u64,
    /// How often a connection to nats-server was made. Above 1, it was lost in between.
    pub connects: u64,
    /// Running streams that were requested here.
    pub streams: u64,
    /// Running streams that are served here.
    pub senders: u64,
    /// Requests that services here received.
    pub requests: u64,
    /// Requests that were answered with "server busy".
    pub requests_busy: u64,
    /// Requests that were ignored or refused: without a reply subject, with one that may not be answered, or with an
    /// invalid Connect-ID header.
    pub requests_ignored: u64,
    /// Messages of all kinds that were handed to the NATS client.
    pub messages_out: u64,
    /// Messages of all kinds that were received.
    pub messages_in: u64,
    /// Messages that were received for no running stream, or that no peer should have sent.
    pub messages_ignored: u64,
    /// Offline announcements sent.
    pub offline_out: u64,
    /// Offline announcements received from other processes.
    pub offline_in: u64,
    /// Bytes that wait to be handed to the NATS client or, on lanes, to be acknowledged.
    pub bytes_waiting: u64,
    /// Lanes, each of which connects this process to another one with this library.
    pub lanes: u64,
    /// 0.
    pub reserved: [u64; 6],
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
