//! Messages out: gives the items of the outbox to a NATS client, as long as it lives.

use crate::connection::Connection;
use crate::connection::announcements::Announcement;
use crate::connection::subscriptions::notify_on_echo;
use crate::error::Status;
use crate::metrics::count;
use crate::nats::client::{Client, PublishError};
use crate::nats::encoded::EncodedMessages;
use crate::nats::outbox::{DurableMessage, DurableMessages, OutgoingBatch, OutgoingItem};
use crate::process::random;
use crate::sync::atomic::Ordering;
use bytes::Bytes;
use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// The shortest time between two echoes that confirm durable messages.
const ECHO_INTERVAL: Duration = Duration::from_millis(10);

/// Gives the items of the outbox to one client.
pub(super) struct Writer<'a> {
    connection: &'a Connection,
    client: &'a Client,
    /// Given to the client, and not yet confirmed by an echo.
    unconfirmed: DurableMessages,
    /// How many of them the pending echo confirms, if there is one.
    pending_echo: Option<usize>,
    /// The weight of the items that were given to the client since it was last flushed.
    unwritten: usize,
    /// The limit of `unwritten`. What waits inside the client counts for the limit of the outbox, too.
    max_unwritten: usize,
}

impl<'a> Writer<'a> {
    pub(super) fn new(connection: &'a Connection, client: &'a Client) -> Writer<'a> {
        let max_unwritten = (connection.options.send_buffer / 4).min(256 << 10);
        let unconfirmed = DurableMessages::default();
        Writer { connection, client, unconfirmed, pending_echo: None, unwritten: 0, max_unwritten }
    }

    /// Returns the durable messages that the server may not have.
    pub(super) fn into_unconfirmed(self) -> VecDeque<DurableMessage> {
        self.unconfirmed.messages
    }

    /// Returns when the client has ended.
    pub(super) async fn run(&mut self) {
        let connection = self.connection;
        let confirmed = Arc::new(Notify::new());
        let key = random::random_u64();
        let echo = connection.inbox.expect(key, notify_on_echo(&confirmed));
        let mut next_echo = Instant::now();
        while !connection.inbound.has_client_ended() {
            let repeat_at = connection.announcements.repeat_at();
            let is_echo_due = self.pending_echo.is_none() && !self.unconfirmed.messages.is_empty();
            let is_alive = tokio::select! {
                biased;
                () = connection.inbound.client_ended.notified() => continue,
                () = confirmed.notified() => {
                    let confirmed = self.pending_echo.take().unwrap_or_default();
                    self.unconfirmed.drop_oldest(confirmed);
                    true
                }
                () = sleep_until(next_echo), if is_echo_due => {
                    self.pending_echo = Some(self.unconfirmed.messages.len());
                    next_echo = Instant::now() + ECHO_INTERVAL;
                    self.client.publish(echo.clone(), Bytes::new()).await.is_ok()
                }
                () = sleep_until(repeat_at.map_or(next_echo, Instant::from_std)), if repeat_at.is_some() => {
                    self.repeat_announcements().await.is_ok()
                }
                batch = connection.outbox.take() => self.write(batch).await,
            };
            if !is_alive {
                break;
            }
        }
        connection.inbox.forget(key);
    }

    async fn repeat_announcements(&self) -> Result<(), PublishError> {
        for Announcement { id, number, .. } in self.connection.announcements.take_repeated() {
            self.announce(id, number, true).await?;
        }
        Ok(())
    }

    async fn announce(&self, id: Bytes, number: u64, is_repeated: bool) -> Result<(), PublishError> {
        let announcements = &self.connection.announcements;
        let headers = announcements.header(number, is_repeated);
        self.client.publish_with(announcements.subject.clone(), None, Some(headers), id).await
    }

    /// Gives a batch to the client. Returns false if the client has ended.
    async fn write(&mut self, mut batch: OutgoingBatch) -> bool {
        let connection = self.connection;
        let mut weight = 0;
        // Before the first item is given to the client: all of them are unconfirmed if it ends on the way.
        mem::take(&mut batch.durable).into_iter().for_each(|message| self.keep_until_confirmed(message));
        while let Some(item) = batch.items.pop_front() {
            weight += item.weight();
            let mut is_alive = match self.write_item(item).await {
                Ok(()) => true,
                Err(PublishError::Closed) => false,
                // Its size was checked, but another server may have a lower max_payload.
                Err(PublishError::Rejected(error)) => {
                    connection.log(Status::TooLarge, || format!("a message was not sent: {error}"));
                    true
                }
            };
            if self.unwritten + weight >= self.max_unwritten {
                is_alive = is_alive && self.client.flush().await.is_ok();
                self.unwritten = 0;
                connection.outbox.release(mem::take(&mut weight));
            }
            if !is_alive {
                let unsent = batch.items.into_iter().filter_map(OutgoingItem::into_durable);
                unsent.for_each(|message| self.keep_until_confirmed(message));
                return false;
            }
        }
        self.unwritten += weight;
        connection.outbox.release(weight);
        true
    }

    fn keep_until_confirmed(&mut self, message: DurableMessage) {
        let dropped = self.unconfirmed.push(message);
        self.pending_echo = self.pending_echo.map(|count| count.saturating_sub(dropped));
    }

    async fn write_item(&mut self, item: OutgoingItem) -> Result<(), PublishError> {
        let (client, connection) = (self.client, self.connection);
        match item {
            OutgoingItem::Messages(messages, _) => {
                connection.counters.messages_out.fetch_add(messages.count as u64, Ordering::Relaxed);
                client.publish_encoded(messages, connection.inbox.unserved()).await
            }
            OutgoingItem::DurableMessage(mut message) => {
                count(&connection.counters.messages_out);
                connection.announcements.number(&mut message);
                self.keep_until_confirmed(message.clone());
                if let DurableMessage::Offline(id, number) = message {
                    count(&connection.counters.offline_out);
                    return self.announce(id, number, false).await;
                }
                let mut end = EncodedMessages::default();
                message.encode(&mut end);
                client.publish_encoded(end, connection.inbox.unserved()).await
            }
            OutgoingItem::Echo(to) => {
                count(&connection.counters.messages_out);
                client.publish(to, Bytes::new()).await
            }
            OutgoingItem::Subscribe(id) => {
                if let Some(subscription) = connection.subscription(id) {
                    connection.inbound.subscribe(client, id, subscription).await;
                }
                Ok(())
            }
            OutgoingItem::SendUnsub(id) => connection.inbound.send_unsub(client, id, connection.inbox.unserved()).await,
            OutgoingItem::Unsubscribe(id) => {
                connection.inbound.unsubscribe(id);
                Ok(())
            }
        }
    }
}
