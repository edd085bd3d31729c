//! Level 1 of the wire: between two processes that both run this library, streams share a lane. It batches, loses and
//! doubles nothing when nats-server is restarted, holds fast workers back, and notices when the other process is gone.
//!
//! | file | what is in it |
//! |---|---|
//! | `lanes` | all lanes of a connection: how they are offered, begun and found again |
//! | `driver` | a lane at work: its state under a lock, and the task that sends |
//! | `state` | one end of a lane as a state machine; the parts of it: |
//! | `event` | what the state reports about streams |
//! | `read_window` | when a reader returns credit, and when its stream's window grows |
//! | `streams`, `batcher`, `retransmit` | streams and their windows; frames that gather; messages until acknowledged |
//! | `acks`, `path` | what came; the round trip and the congestion window |
//! | `liveness`, `timer` | whether the peer is there; the table of timers |

mod acks;
mod batcher;
pub(crate) mod driver;
pub(crate) mod event;
pub(crate) mod lanes;
pub(crate) mod liveness;
mod path;
pub(crate) mod read_window;
mod retransmit;
#[cfg(test)]
mod simulation;
pub(crate) mod state;
pub(crate) mod streams;
mod timer;
