//! What is counted: by each connection for presence_conn_stats, and by the process for presence_metrics.
//!
//! All counting is done in one [`Counters`] for each connection, with relaxed atomics and without locks. A service and
//! its senders share those of the service's subject. Times are read once for each event of a stream, such as its first
//! message, and never for each message.

mod counters;
mod histogram;
mod text;

pub(crate) use counters::{Counters, ServiceCounters, StopTimer, StreamCounters, StreamTimes, count};
pub(crate) use histogram::Histogram;
pub(crate) use text::{Kind, Text};
