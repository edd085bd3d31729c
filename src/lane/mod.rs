//! Level 1 of the wire: between two processes that both run this library, streams share a lane. It batches, loses and
//! doubles nothing when nats-server is restarted, holds fast workers back, and notices when the other process is gone.

pub(crate) mod driver;
pub(crate) mod lanes;
pub(crate) mod path;
#[cfg(test)]
mod simulation;
pub(crate) mod state;
