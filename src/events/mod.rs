//! Events for the caller: the queue that holds them, and the wakeups of threads that wait on it.

mod event;
mod queue;
mod wakeups;

pub use event::{Event, Kind};
pub(crate) use event::{EventSource, LaneBatch, Single, Source, unpin};
pub use queue::Queue;
pub(crate) use wakeups::Wakeups;
