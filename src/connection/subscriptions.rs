//! The subscriptions of a connection, which are made at each new client, and round trips to nats-server.
//!
//! An *echo* is an empty message to the connection's own inbox. When it comes back the server has all that was sent
//! before it, and all that the server had sent before it has come.

use crate::connection::Connection;
use crate::error::{Error, Result, Status};
use crate::nats::Subject;
use crate::nats::inbound::{MessageHandler, OnMessage, Subscription};
use crate::nats::outbox::OutgoingItem;
use crate::process::random;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::timeout;

impl Connection {
    /// Keeps a subject subscribed from now on.
    pub(crate) fn subscribe(&self, id: u64, subject: Subject, group: &str, handler: Arc<dyn MessageHandler>) {
        {
            let mut handlers = self.handlers.lock();
            handlers.retain(|other| other.strong_count() > 0);
            handlers.push(Arc::downgrade(&handler));
        }
        self.subscriptions.lock().insert(id, Subscription { subject, group: group.into(), handler });
        self.outbox.push(OutgoingItem::Subscribe(id));
    }

    /// Ends a subscription when all messages that the server has sent for it have come. The service has stopped, and
    /// refuses them.
    pub(crate) fn unsubscribe(&self, id: u64) {
        let removed = self.subscriptions.lock().remove(&id);
        if removed.is_some() {
            let echo = random::random_u64();
            let connection = self.this.clone();
            // When the echo comes no more messages are on their way.
            let unsubscribe = OnMessage(move |came: Result<(), Status>| {
                let Some(connection) = connection.upgrade().filter(|_| came != Err(Status::Closed)) else { return };
                connection.inbox.forget(echo);
                if came.is_ok() {
                    connection.outbox.push(OutgoingItem::Unsubscribe(id));
                }
            });
            let subject = self.inbox.expect(echo, Arc::new(unsubscribe));
            self.outbox.push(OutgoingItem::SendUnsub(id));
            self.outbox.push(OutgoingItem::Echo(subject));
        }
    }

    /// Returns a subscription that was not ended.
    pub(super) fn subscription(&self, id: u64) -> Option<Subscription> {
        self.subscriptions.lock().get(&id).cloned()
    }

    /// Returns why nats-server refuses a subscription, if it does.
    pub(crate) fn refusal(&self, id: u64) -> Option<Error> {
        self.refusals.lock().get(&id).cloned()
    }

    pub(super) fn handlers(&self) -> Vec<Arc<dyn MessageHandler>> {
        self.handlers.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Ends all that runs on the connection.
    pub(super) fn end_handlers(&self, why: Status) {
        self.handlers().iter().for_each(|handler| handler.ended(why));
    }

    /// Waits until the server has a subscription, or refuses it. Without a connection it is made later.
    pub(crate) fn flush_subscription(&self, id: u64) -> Result<()> {
        self.flush_subscriptions()?;
        // nats-server sends a refusal before the echo, but another task handles it. That task has run when the second
        // echo comes.
        self.flush_subscriptions()?;
        self.refusal(id).map_or(Ok(()), Err)
    }

    /// Waits until the server has all subscriptions. Without a connection they are made later.
    pub(crate) fn flush_subscriptions(&self) -> Result<()> {
        match self.flush(Some(self.options.connect_timeout)) {
            Err(error) if error.status == Status::Disconnected => self.check_open(),
            other => other,
        }
    }

    /// Waits until the server has all that was sent so far (`limit` None: without limit).
    pub(super) fn flush(&self, limit: Option<Duration>) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let key = random::random_u64();
        let wake = OnMessage(move |echo| {
            // `close` flushes, too.
            if echo != Err(Status::Closed) {
                let _ = sender.try_send(echo);
            }
        });
        let subject = self.inbox.expect(key, Arc::new(wake));
        // After `expect`: the loss of a connection first changes the state, and then ends what the inbox expects.
        let flushed = if self.is_connected() {
            self.outbox.push(OutgoingItem::Echo(subject));
            receive(&receiver, limit).map_err(|error| match error {
                RecvTimeoutError::Timeout => Status::Timeout,
                RecvTimeoutError::Disconnected => Status::Internal,
            })
        } else {
            Ok(Err(Status::Disconnected))
        };
        self.inbox.forget(key);
        flushed.flatten().map_err(|status| match (status, limit) {
            (Status::Timeout, Some(limit)) => {
                Error::new(Status::Timeout, format!("nats-server did not answer within {limit:?}"))
            }
            _ => Error::new(status, "there is no connection to nats-server, or it was lost just now"),
        })
    }

    /// Returns true if the server answers within the connect timeout: it has all that was sent so far.
    pub(super) async fn is_flushed(&self) -> bool {
        let echo = Arc::new(Notify::new());
        let key = random::random_u64();
        let subject = self.inbox.expect(key, notify_on_echo(&echo));
        self.outbox.push(OutgoingItem::Echo(subject));
        let is_flushed = timeout(self.options.connect_timeout, echo.notified()).await.is_ok();
        self.inbox.forget(key);
        is_flushed
    }
}

/// Notifies a task when an echo comes.
pub(super) fn notify_on_echo(task: &Arc<Notify>) -> Arc<dyn MessageHandler> {
    let task = Arc::clone(task);
    Arc::new(OnMessage(move |echo: Result<(), Status>| {
        if echo.is_ok() {
            task.notify_one();
        }
    }))
}

/// Waits until another thread sends a value, for `limit` at most (None: without limit).
pub(super) fn receive<T>(receiver: &mpsc::Receiver<T>, limit: Option<Duration>) -> Result<T, RecvTimeoutError> {
    match limit {
        None => Ok(receiver.recv()?),
        Some(limit) => receiver.recv_timeout(limit),
    }
}
