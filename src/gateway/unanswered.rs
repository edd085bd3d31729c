//! Streams that were ended here before their workers answered.
//!
//! If the worker accepts on a lane, it is sent CANCEL, which stops this stream only. A worker on level 0 can be stopped
//! only by an announcement, which stops the client's streams at all gateways. So nothing is announced until the first
//! answer shows that the worker is on level 0, or until there was no answer for some time.

use crate::connection::{Connection, count};
use crate::error::Status;
use crate::nats::Message;
use crate::nats::inbound::MessageHandler;
use crate::presence::registry;
use crate::sync::atomic::Ordering;
use crate::wire::level0::{self, Answer};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// How long to wait for the first answer, while there is a connection. A worker on a lane accepts within a round trip,
/// before its host has done anything. A worker on level 0 that does not answer is stopped after this time.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// Handles the first answer in place of the stream.
pub(crate) struct Unanswered {
    key: u64,
    client: Box<str>,
    connection: Weak<Connection>,
}

impl Unanswered {
    /// Handles the answer to the request with this key from now on.
    pub(crate) fn expect(connection: &Arc<Connection>, key: u64, client: &str) {
        let this = Arc::new(Unanswered { key, client: client.into(), connection: Arc::downgrade(connection) });
        connection.inbox().expect(key, Arc::clone(&this) as Arc<dyn MessageHandler>);
        let waiting = Arc::downgrade(&this);
        connection.runtime().spawn(async move {
            loop {
                let before = connects(&waiting);
                tokio::time::sleep(ANSWER_WAIT).await;
                let Some(this) = waiting.upgrade() else { return };
                // Without a connection the answer cannot come. It comes after the reconnect.
                if before.is_some() && before == connects(&waiting) {
                    return this.no_answer();
                }
            }
        });
    }

    /// Removes the request from the inbox. Returns the connection if this was the first call.
    fn forget(&self) -> Option<Arc<Connection>> {
        let connection = self.connection.upgrade()?;
        connection.forget_request(self.key).then_some(connection)
    }

    /// Announces the client offline, unless it is online for another reason: the worker can be stopped in no other way.
    fn announce(&self) {
        if let Some(connection) = self.forget() {
            registry::give_up_detached(&self.client, &*connection);
        }
    }
}

/// How many connections to nats-server were made; None while there is none.
fn connects(this: &Weak<Unanswered>) -> Option<u64> {
    let connection = this.upgrade()?.connection.upgrade()?;
    connection.is_connected().then(|| connection.counters.connects.load(Ordering::Relaxed))
}

impl MessageHandler for Unanswered {
    fn message(&self, message: Message) {
        if message.is_no_responders {
            self.forget();
            return;
        }
        match level0::answer(&message.payload) {
            Answer::Data => self.announce(),
            // The stream has ended by itself.
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

    fn ended(&self, _why: Status) {}

    fn no_answer(&self) {
        self.announce();
    }
}
