//! Everything that touches async-nats.

pub(crate) mod dial;
pub(crate) mod inbound;
pub(crate) mod outbox;
pub(crate) mod tls;
pub(crate) mod writer;
