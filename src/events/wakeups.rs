//! Whom to call when messages have come: threads that wait on queues, once for all that comes together.

use crate::events::queue::{LaneBatch, Queue, Single};
use crate::sync::Mutex;
use std::mem;
use std::sync::Arc;
use tokio::sync::Notify;

/// Queues whose threads are to be called when the NATS client has handed over what it has.
#[derive(Default)]
pub(crate) struct Wakeups {
    pending: Mutex<Uncalled>,
    arrived: Notify,
}

#[derive(Default)]
struct Uncalled {
    queues: Vec<Arc<Queue>>,
    /// Nobody calls them any longer: whoever adds one calls it.
    is_over: bool,
}

impl Wakeups {
    /// Adds an event that came with a message, and has the queue's thread called once no more messages are at hand.
    /// False when the queue is closed.
    pub(crate) fn push(&self, queue: &Arc<Queue>, make: impl FnOnce() -> Option<Single>) -> bool {
        let pushed = queue.push_patiently(make);
        self.defer(queue, pushed);
        pushed.is_some()
    }

    /// As `push`, for what came in one lane message.
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

    /// Calls them. A task of its own: it gets its turn when the client's task has handed over all it has.
    pub(crate) async fn run(&self) {
        loop {
            self.arrived.notified().await;
            self.wake_all();
        }
    }

    /// The task ends.
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
    use crate::events::queue::Kind;
    use crate::events::queue::tests::is_readable;
    use std::time::Duration;

    #[test]
    fn when_the_task_is_over_who_adds_an_event_calls() {
        let (wakeups, queue) = (Wakeups::default(), Queue::new());
        queue.fd().unwrap();
        let push = || wakeups.push(&queue, || Some(Single::new(Kind::Data, Status::Ok, 0, "")));
        assert!(push() && !is_readable(&queue), "later");
        wakeups.end();
        assert!(is_readable(&queue));
        queue.wait(8, Some(Duration::ZERO), |_| ()).unwrap();
        assert!(push() && is_readable(&queue), "at once");
    }
}
