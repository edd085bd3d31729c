//! The subscriptions that a connection keeps, whatever client it has.

use crate::error::{Error, Status};
use crate::nats::inbound::{MessageHandler, Subscription};
use crate::sync::Mutex;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak};

/// The subscriptions that a connection keeps. Their ids are handle ids.
#[derive(Default)]
pub(crate) struct Subscriptions {
    /// In the order of their ids, in which they are made at each client.
    kept: Mutex<BTreeMap<u64, Subscription>>,
    /// All handlers that were ever subscribed and still exist: a service that takes no more requests may have running senders.
    handlers: Mutex<Vec<Weak<dyn MessageHandler>>>,
    /// Those that nats-server refuses, and why. A task of its own tries each of them again.
    refusals: Mutex<HashMap<u64, Error>>,
}

impl Subscriptions {
    pub(crate) fn insert(&self, id: u64, subscription: Subscription) {
        {
            let mut handlers = self.handlers.lock();
            handlers.retain(|other| other.strong_count() > 0);
            handlers.push(Arc::downgrade(&subscription.receiver));
        }
        self.kept.lock().insert(id, subscription);
    }

    /// Returns false if it was removed before.
    pub(crate) fn remove(&self, id: u64) -> bool {
        self.kept.lock().remove(&id).is_some()
    }

    pub(crate) fn get(&self, id: u64) -> Option<Subscription> {
        self.kept.lock().get(&id).cloned()
    }

    pub(crate) fn all(&self) -> BTreeMap<u64, Subscription> {
        self.kept.lock().clone()
    }

    fn handlers(&self) -> Vec<Arc<dyn MessageHandler>> {
        self.handlers.lock().iter().filter_map(Weak::upgrade).collect()
    }

    /// Ends all that runs on the connection.
    pub(crate) fn end_handlers(&self, why: Status) {
        self.handlers().iter().for_each(|handler| handler.ended(why));
    }

    /// nats-server refuses what is published to this subject: returns what that ended, and what to do about it.
    pub(crate) fn publish_refused(&self, subject: &str) -> Option<&'static str> {
        self.handlers().iter().fold(None, |hint, handler| handler.refused(subject).or(hint))
    }

    /// Returns true if the subscription was not refused before.
    pub(crate) fn set_refused(&self, id: u64, why: Error) -> bool {
        self.refusals.lock().insert(id, why).is_none()
    }

    pub(crate) fn clear_refused(&self, id: u64) {
        self.refusals.lock().remove(&id);
    }

    /// Returns why nats-server refuses a subscription, if it does.
    pub(crate) fn refusal(&self, id: u64) -> Option<Error> {
        self.refusals.lock().get(&id).cloned()
    }

    /// Returns why nats-server refuses the inbox, which is the first subscription, if it does.
    pub(crate) fn inbox_refusal(&self) -> Option<Error> {
        let refusals = self.refusals.lock();
        if refusals.is_empty() {
            return None;
        }
        self.kept.lock().keys().next().and_then(|inbox| refusals.get(inbox)).cloned()
    }
}
