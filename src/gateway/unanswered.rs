//! Streams that were ended here before their workers answered.
//!
//! A worker that accepts on a lane is sent CANCEL, which stops this stream only. A worker on level 0 can be stopped by an
//! announcement only, which stops the client's streams from all gateways. So nothing is announced until the first answer
//! shows that the worker is on level 0, or none has come for some time.

use crate::connection::{Connection, count};
use crate::error::Status;
use crate::lane::driver::{Accepted, Lane};
use crate::nats::inbound::MessageHandler;
use crate::presence::registry;
use crate::wire::level0::{self, Answer};
use async_nats::{Message, StatusCode};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How long to wait for the first answer, while there is a connection. A worker on a lane accepts within a round trip,
/// before its host has done anything; a worker on level 0 that answers nothing is stopped so much later.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Takes the stream's place in the inbox, and expects the first answer.
pub(crate) struct Unanswered {
    key: u64,
    client: Box<str>,
    connection: Weak<Connection>,
}

impl Unanswered {
    /// Expects the answer to the request with this key from now on.
    pub(crate) fn expect(connection: &Arc<Connection>, key: u64, client: &str) {
        let this = Arc::new(Unanswered { key, client: client.into(), connection: Arc::downgrade(connection) });
        connection.inbox().expect(key, Arc::clone(&this) as Arc<dyn MessageHandler>);
        let waits = Arc::downgrade(&this);
        connection.runtime().spawn(async move {
            loop {
                let before = connects(&waits);
                tokio::time::sleep(ANSWER_WAIT).await;
                let Some(this) = waits.upgrade() else { return };
                // While there is no connection the answer cannot come; it comes after the reconnect.
                if before.is_some() && before == connects(&waits) {
                    return this.no_answer();
                }
            }
        });
    }

    /// Takes the request out of the inbox. Returns the connection if this was the first call.
    fn forget(&self) -> Option<Arc<Connection>> {
        let connection = self.connection.upgrade()?;
        connection.inbox().forget(self.key).then_some(connection)
    }

    /// The worker needs an announcement.
    fn announce(&self) {
        if let Some(connection) = self.forget() {
            registry::give_up_detached(&self.client, &*connection);
        }
    }
}

/// Counts the connections to nats-server that were made; None while there is none.
fn connects(this: &Weak<Unanswered>) -> Option<u64> {
    let connection = this.upgrade()?.connection.upgrade()?;
    connection.is_connected().then(|| connection.counters.connects.load(Ordering::Relaxed))
}

impl MessageHandler for Unanswered {
    fn message(&self, message: Message) {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            self.forget();
            return;
        }
        match level0::answer(&message.payload) {
            Answer::Data => self.announce(),
            // It has ended by itself.
            Answer::End | Answer::Error(_) => {
                self.forget();
            }
            Answer::JetStreamAck => {
                if let Some(connection) = self.connection.upgrade() {
                    count(&connection.inbox().ignored);
                }
            }
        }
    }

    fn accepted(self: Arc<Self>, _lane: &Arc<Lane>, _stream: u32) -> Accepted {
        // The lane sends CANCEL.
        self.forget();
        None
    }

    fn ended(&self, _why: Status) {}

    fn no_answer(&self) {
        self.announce();
    }
}
