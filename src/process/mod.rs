//! State of the whole process: its tokio runtime, forks, randomness.

pub(crate) mod fork;
pub(crate) mod random;
pub(crate) mod runtime;
