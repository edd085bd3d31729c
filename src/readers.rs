//! Whom to call when messages have come: threads that wait on queues, once for all that comes together.

use crate::queue::{Batch, Queue, Single};
use parking_lot::Mutex;
use std::mem;
use std::sync::Arc;
use tokio::sync::Notify;

/// Queues whose threads are to be called when the NATS client has handed over what it has.
#[derive(Default)]
pub(crate) struct Readers {
    uncalled: Mutex<Vec<Arc<Queue>>>,
    arrived: Notify,
}

impl Readers {
    /// Adds an event that came with a message, and has the queue's thread called once no more messages are at hand.
    /// False when the queue is closed.
    pub(crate) fn push(&self, queue: &Arc<Queue>, make: impl FnOnce() -> Option<Single>) -> bool {
        let pushed = queue.push_patiently(make);
        self.call_later(queue, pushed);
        pushed.is_some()
    }

    /// As `push`, for what came in one lane message.
    pub(crate) fn push_batch(&self, queue: &Arc<Queue>, batch: Batch) {
        self.call_later(queue, queue.push_batch(batch));
    }

    fn call_later(&self, queue: &Arc<Queue>, pushed: Option<bool>) {
        if pushed == Some(true) {
            self.uncalled.lock().push(Arc::clone(queue));
            self.arrived.notify_one();
        }
    }

    /// Calls them. A task of its own: it gets its turn when the client's task has handed over all it has.
    pub(crate) async fn run(&self) {
        loop {
            self.arrived.notified().await;
            self.call_all();
        }
    }

    pub(crate) fn call_all(&self) {
        let queues = mem::take(&mut *self.uncalled.lock());
        queues.iter().for_each(|queue| queue.flush());
    }
}
