//! Wakes threads that wait on queues: once for all messages that the NATS client hands over together.

use super::event::{LaneBatch, Single};
use super::queue::Queue;
use crate::sync::Mutex;
use std::mem;
use std::sync::Arc;
use tokio::sync::Notify;

/// Queues whose threads are woken after the NATS client has handed over what it has.
#[derive(Default)]
pub(crate) struct Wakeups {
    pending: Mutex<Pending>,
    arrived: Notify,
}

#[derive(Default)]
struct Pending {
    queues: Vec<Arc<Queue>>,
    /// The task that wakes the threads has ended: `defer` wakes them.
    is_over: bool,
}

impl Wakeups {
    /// Adds the event that `make` returns, and wakes the queue's thread when no more messages are at hand. Returns
    /// false if the queue is closed.
    pub(crate) fn push(&self, queue: &Arc<Queue>, make: impl FnOnce() -> Option<Single>) -> bool {
        let pushed = queue.push_deferred(make);
        self.defer(queue, pushed);
        pushed.is_some()
    }

    /// As `push`, for the events of one lane message.
    pub(crate) fn push_batch(&self, queue: &Arc<Queue>, batch: LaneBatch) {
        self.defer(queue, queue.push_batch(batch));
    }

    fn defer(&self, queue: &Arc<Queue>, pushed: Option<bool>) {
        if pushed == Some(true) {
            let mut pending = self.pending.lock();
            if pending.is_over {
                drop(pending);
                queue.flush();
            } else {
                pending.queues.push(Arc::clone(queue));
                self.arrived.notify_one();
            }
        }
    }

    /// Wakes the threads. This is a task of its own, so that it runs after the client's task has handed over all it
    /// has.
    pub(crate) async fn run(&self) {
        loop {
            self.arrived.notified().await;
            self.wake_all();
        }
    }

    /// Called when the task has ended.
    pub(crate) fn end(&self) {
        self.pending.lock().is_over = true;
        self.wake_all();
    }

    pub(crate) fn wake_all(&self) {
        let queues = mem::take(&mut self.pending.lock().queues);
        queues.iter().for_each(|queue| queue.flush());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Status;
    use crate::events::Kind;
    use crate::events::queue::tests::{is_readable, keep_busy};
    use std::time::Duration;

    #[test]
    fn after_the_task_has_ended_a_push_wakes_at_once() {
        let (wakeups, queue) = (Wakeups::default(), Queue::new());
        queue.fd().unwrap();
        keep_busy(&queue);
        let push = || wakeups.push(&queue, || Some(Single::new(Kind::Data, Status::Ok, 0, "")));
        assert!(push() && !is_readable(&queue), "later");
        wakeups.end();
        assert!(is_readable(&queue));
        queue.wait(8, Some(Duration::ZERO), |_| ()).unwrap();
        assert!(push() && is_readable(&queue), "at once");
    }
}
