//! What a connection counts. `Stats` is the header's presence_stats.

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
