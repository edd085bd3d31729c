//! What belongs to the whole process: its tokio runtime, fork, randomness.

pub(crate) mod fork;
pub(crate) mod random;
pub(crate) mod runtime;
