//! Errors that nats-server sends: missing permissions, refused subscriptions, limits. They are logged, end what they
//! concern, and a refused subscription is tried again.

use crate::config::ConnectOptions;
use crate::connection::Connection;
use crate::error::{Error, Status};
use crate::nats::client::OnServerError;
use crate::nats::outbox::OutgoingItem;
use crate::process::random::jitter;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::sleep;

impl Connection {
    /// The callback for errors of nats-server.
    pub(super) fn on_server_error(connection: Weak<Connection>) -> OnServerError {
        Arc::new(move |text| {
            if let Some(connection) = connection.upgrade() {
                connection.handle_server_error(&text);
            }
        })
    }

    fn handle_server_error(&self, text: &str) {
        let refused = self.inbound.mark_refused(text);
        if refused.is_some_and(|id| self.discovery_refused(id)) {
            return;
        }
        let subscribed = refused.and_then(|id| self.subscription(id)).map(|own| own.subject);
        let quoted = text.split('"').nth(1).filter(|_| text.contains("Permissions Violation"));
        let subject = subscribed.as_deref().or(quoted);
        let is_of_lanes = subject.is_some_and(|subject| self.lanes.refused(subject));
        if let Some(id) = refused {
            self.subscription_refused(id, text);
        }
        let published = subject.filter(|_| !is_of_lanes && text.contains("Violation for Publish"));
        let hint = published
            .and_then(|subject| self.handlers().iter().fold(None, |hint, handler| handler.refused(subject).or(hint)));
        let prefix = &self.options.inbox_prefix;
        self.log(Status::Disconnected, || match (is_of_lanes, hint) {
            (true, _) if self.lanes.is_forbidden() => format!(
                "nats-server says: {text}: this connection uses level 0 only from now on; allow publish and subscribe \
                 on {prefix}.>, or set lanes=false"
            ),
            (true, _) => format!(
                "nats-server says: {text}: the streams on this lane have ended; allow publish to the inboxes of \
                 gateways and workers, or set lanes=false"
            ),
            (false, Some(hint)) => format!("nats-server says: {text}: {hint}"),
            (false, None) => format!("nats-server says: {text}"),
        });
    }

    /// nats-server refuses a subscription: tells its handler, and subscribes again until it is accepted or ended.
    fn subscription_refused(&self, id: u64, text: &str) {
        let Some(subscription) = self.subscription(id) else { return };
        let (status, hint) = match text.contains("maximum subscriptions") {
            true => (Status::Full, "raise max_subscriptions of nats-server"),
            false => (Status::Disconnected, "allow this user to subscribe to it"),
        };
        let text = format!("nats-server refuses the subscription of {}: {text}; {hint}", subscription.subject);
        let why = Error::new(status, text);
        if self.refusals.lock().insert(id, why.clone()).is_none() {
            if status == Status::Full {
                self.end_discovery();
            }
            subscription.handler.subscription_refused(&why);
            let ConnectOptions { reconnect_min, reconnect_max, .. } = self.options;
            self.runtime.spawn(subscribe_again(self.this.clone(), id, reconnect_min, reconnect_max));
        }
    }
}

/// Makes a refused subscription again, with the delays of a reconnect, until it is accepted or ended.
async fn subscribe_again(connection: Weak<Connection>, id: u64, min: Duration, max: Duration) {
    let mut delay = min.min(max);
    loop {
        sleep(delay / 2 + jitter(delay / 2)).await;
        delay = (delay * 2).min(max);
        let Some(connection) = connection.upgrade() else { return };
        let Some(subscription) = connection.subscription(id).filter(|_| connection.check_open().is_ok()) else {
            connection.refusals.lock().remove(&id);
            return;
        };
        // After a reconnect it is not: the supervisor has made it.
        if connection.inbound.is_refused(id) == Some(true) {
            connection.outbox.push(OutgoingItem::Unsubscribe(id));
            connection.outbox.push(OutgoingItem::Subscribe(id));
        }
        // Twice: see `flush_subscription`.
        if connection.is_flushed().await
            && connection.is_flushed().await
            && connection.inbound.is_refused(id) == Some(false)
        {
            connection.refusals.lock().remove(&id);
            return subscription.handler.subscription_accepted();
        }
    }
}
