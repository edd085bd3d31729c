//! Events for the caller: the queue that holds them, and the wakeups of threads that wait on it.

pub(crate) mod queue;
pub(crate) mod wakeups;
