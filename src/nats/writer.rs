//! Messages out: what waits in the outbox is given to a NATS client, as long as it lives.

use crate::connection::{Connection, count, origin_header};
use crate::error::Status;
use crate::nats::inbound::MessageHandler;
use crate::nats::outbox::{Announcement, DurableMessage, DurableMessages, Item, OutgoingBatch, Request};
use crate::presence::registry;
use crate::process::random;
use crate::wire::level0;
use async_nats::{Client, Message, PublishError, PublishErrorKind};
use bytes::Bytes;
use std::mem;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep_until};

/// How often, at most, an echo asks the server what it has.
const ECHO_INTERVAL: Duration = Duration::from_millis(10);

/// The work on one NATS client.
pub(crate) struct Drive<'a> {
    connection: &'a Connection,
    client: &'a Client,
    /// Handed over, but not yet confirmed by the server.
    notes: DurableMessages,
    /// How many of them the echo confirms that is on its way, if one is.
    asked: Option<usize>,
    /// Handed over since the client was last seen to have written all it had.
    unwritten: usize,
    /// How much of that there may be: what waits inside the client counts, too, for the bound of the outbox.
    most_unwritten: usize,
}

impl<'a> Drive<'a> {
    pub(crate) fn new(connection: &'a Connection, client: &'a Client) -> Drive<'a> {
        let most_unwritten = (connection.send_buffer() / 4).min(256 << 10);
        Drive { connection, client, notes: DurableMessages::default(), asked: None, unwritten: 0, most_unwritten }
    }

    /// The notes that the server may not have.
    pub(crate) fn into_notes(self) -> DurableMessages {
        self.notes
    }

    /// Returns when the client is dead.
    pub(crate) async fn run(&mut self) {
        let connection = self.connection;
        let confirmed = Arc::new(Notify::new());
        let number = random::random_u64();
        let echo = connection.inbox().expect(number, Arc::new(Confirmation(Arc::clone(&confirmed))));
        let mut next_echo = Instant::now();
        while !connection.inbound().is_dead() {
            let repeat_at = connection.recent.lock().repeat_at();
            let is_echo_due = self.asked.is_none() && self.notes.len() > 0;
            let is_alive = tokio::select! {
                biased;
                () = connection.inbound().died.notified() => continue,
                () = confirmed.notified() => {
                    self.notes.drop_oldest(self.asked.take().unwrap_or_default());
                    true
                }
                () = sleep_until(next_echo), if is_echo_due => {
                    self.asked = Some(self.notes.len());
                    next_echo = Instant::now() + ECHO_INTERVAL;
                    self.client.publish(echo.clone(), Bytes::new()).await.is_ok()
                }
                () = sleep_until(repeat_at.unwrap_or(next_echo.into()).into()), if repeat_at.is_some() => self.repeat().await,
                batch = connection.outbox().take() => self.hand_over(batch).await,
            };
            if !is_alive {
                break;
            }
        }
        connection.inbox().forget(number);
    }

    /// Announces once more what others may have missed, unless the client is back here; false when the client is dead.
    async fn repeat(&mut self) -> bool {
        let connection = self.connection;
        let missed = connection.recent.lock().take();
        for Announcement { id, number, .. } in missed.into_iter().filter(|own| !registry::is_online(&own.id)) {
            let headers = origin_header(connection.handle_id(), number, true);
            let subject = connection.offline_subject().to_owned();
            if self.client.publish_with_headers(subject, headers, id).await.is_err() {
                return false;
            }
        }
        true
    }

    /// Gives the client a batch; false when it is dead.
    async fn hand_over(&mut self, mut batch: OutgoingBatch) -> bool {
        let mut weight = 0;
        self.connection.counters.messages_out.fetch_add(batch.items.len() as u64, Ordering::Relaxed);
        while let Some(item) = batch.items.pop_front() {
            weight += item.weight();
            let mut is_alive = match self.give(item, &mut batch).await {
                Ok(()) => true,
                Err(error) if error.kind() == PublishErrorKind::Send => false,
                // The sizes were checked, but max_payload is the server's to change when it is another one.
                Err(error) => {
                    self.connection.log(Status::TooLarge, || format!("a message was not sent: {error}"));
                    true
                }
            };
            if self.unwritten + weight >= self.most_unwritten {
                is_alive = is_alive && self.client.flush().await.is_ok();
                self.unwritten = 0;
                self.connection.outbox().handed_over(mem::take(&mut weight));
            }
            if !is_alive {
                batch.items.into_iter().filter_map(Item::into_note).for_each(|note| self.keep(note));
                return false;
            }
        }
        self.unwritten += weight;
        self.connection.outbox().handed_over(weight);
        true
    }

    /// Keeps a note until it is confirmed: where nothing ever is, the oldest are not kept for ever.
    fn keep(&mut self, note: DurableMessage) {
        let dropped = self.notes.push(note);
        self.asked = self.asked.map(|asked| asked.saturating_sub(dropped));
    }

    async fn give(&mut self, item: Item, batch: &mut OutgoingBatch) -> Result<(), PublishError> {
        let (client, connection) = (self.client, self.connection);
        match item {
            Item::Message(to, length) => client.publish(to, batch.bytes.split_to(length).freeze()).await,
            Item::Request(request) => {
                let Request { subject, reply, headers, payload, size: _ } = *request;
                match headers {
                    None => client.publish_with_reply(subject, reply, payload).await,
                    Some(headers) => client.publish_with_reply_and_headers(subject, reply, headers, payload).await,
                }
            }
            Item::DurableMessage(mut note) => {
                if let DurableMessage::Offline(_, id, number) = &mut note {
                    if *number == 0 {
                        *number = connection.next_announcement();
                    }
                    connection.recent.lock().note(id.clone(), *number, Instant::now().into());
                }
                self.keep(note.clone());
                match note {
                    DurableMessage::End(to) => client.publish(to, Bytes::from_static(level0::END)).await,
                    DurableMessage::Error(to, payload) => client.publish(to, payload).await,
                    DurableMessage::Offline(to, id, number) => {
                        count(&connection.counters.offline_out);
                        client.publish_with_headers(to, origin_header(connection.handle_id(), number, false), id).await
                    }
                }
            }
            Item::Echo(to) => client.publish(to, Bytes::new()).await,
            Item::Subscribe(number) => {
                if let Some(subscription) = self.connection.subscription(number) {
                    self.connection.inbound().subscribe(client, number, subscription).await;
                }
                Ok(())
            }
            Item::EndAtServer(number) => {
                let nowhere = self.connection.inbox().nowhere();
                self.connection.inbound().end_at_server(client, number, &nowhere).await
            }
            Item::Unsubscribe(number) => {
                self.connection.inbound().unsubscribe(number);
                Ok(())
            }
        }
    }
}

/// The server has the notes that were sent before this came back.
pub(crate) struct Confirmation(pub(crate) Arc<Notify>);

impl MessageHandler for Confirmation {
    fn message(&self, _message: Message) {
        self.0.notify_one();
    }

    fn ended(&self, _why: Status) {}
}
