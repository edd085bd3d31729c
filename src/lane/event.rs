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

/// What happened to a stream or sender `S`.
#[derive(Debug)]
pub(crate) enum LaneEvent<S> {
    /// Messages came, all of them in the message that was received.
    Data(S, Run),
    /// The worker ended the stream.
    Ended(S),
    /// The worker ended the stream with an error.
    Failed(S, Bytes),
    /// The worker sent more than the stream's window: the stream was cancelled.
    WindowExceeded(S),
    /// The gateway cancelled the stream for this reason.
    Cancelled(S, u8),
    /// A sender that was refused may send.
    Writable(S),
    /// The peer is gone. `accept_acked`: it had acknowledged the ACCEPT of this stream.
    PeerGone { owner: S, accept_acked: bool },
    /// The peer is gone, and had not acknowledged the ACCEPT of this stream, which had ended already.
    AcceptUndelivered(S),
}
