//! What a lane reports to its driver about the streams on it.

use crate::wire::frame::Run;
use bytes::Bytes;

/// Which end of the lane this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Role {
    /// It serves streams.
    Worker,
    /// It has requested streams.
    Gateway,
}

/// What happened to a stream or a sender.
#[derive(Debug)]
pub(crate) enum LaneEvent {
    /// Messages came, all of them in the message that was received. `is_first`: the stream had none before.
    Data { run: Run, is_first: bool },
    /// The worker ended the stream.
    Ended,
    /// The worker ended the stream with an error: its code, or 0, and its text.
    Failed(i32, Bytes),
    /// The worker sent more than the stream's window: the stream was cancelled.
    WindowExceeded,
    /// The gateway cancelled the stream for this reason.
    Cancelled(u8),
    /// A sender that was refused may send.
    Writable,
    /// The peer is gone. `accept_acked`: it had acknowledged the ACCEPT of this stream.
    PeerGone { accept_acked: bool },
    /// The peer is gone, and had not acknowledged the ACCEPT of this stream, which had ended already.
    AcceptUndelivered,
}

/// Events, each with the stream or sender `S` that it is for.
pub(crate) type LaneEvents<S> = Vec<(S, LaneEvent)>;
