//! The connection's own subject for answers, with one token below it for each answer that is expected.

use crate::error::{Error, Status};
use crate::metrics::{Counters, count};
use crate::nats::inbound::MessageHandler;
use crate::nats::message::{Message, Subject};
use crate::process::random::RandomPool;
use crate::sync::atomic::{AtomicUsize, Ordering};
use dashmap::DashMap;
use std::sync::Arc;

/// The key of `unserved`.
const UNSERVED: u64 = 0;
/// The table is shrunk when it becomes empty after it had more entries than this.
const LARGE_TABLE: usize = 1024;

/// The connection's own subject for answers. A key identifies an expected answer.
pub(crate) struct Inbox {
    /// What its subjects begin with, dot included.
    pub(crate) prefix: String,
    unserved: String,
    expected: DashMap<u64, Arc<dyn MessageHandler>, ahash::RandomState>,
    /// How many entries `expected` has, and the most that it had since it was last empty.
    count: AtomicUsize,
    peak: AtomicUsize,
    pub(crate) counters: Arc<Counters>,
    /// For the keys of requests.
    pub(crate) keys: RandomPool,
}

impl Inbox {
    pub(crate) fn new(prefix: String, counters: Arc<Counters>) -> Inbox {
        let (count, peak) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let unserved = format!("{prefix}{UNSERVED:x}");
        Inbox { prefix, unserved, expected: DashMap::default(), count, peak, counters, keys: RandomPool::default() }
    }

    /// Returns the subject to subscribe to for all answers.
    pub(crate) fn wildcard(&self) -> Subject {
        format!("{}*", self.prefix).into()
    }

    /// Returns a subject at which no answer is expected.
    pub(crate) fn unserved(&self) -> &str {
        &self.unserved
    }

    /// Gives messages to the subject that this returns to `handler`. The key must be random, so that a peer that has
    /// seen another of these subjects cannot guess this one.
    pub(crate) fn expect(&self, key: u64, handler: Arc<dyn MessageHandler>) -> Subject {
        if self.expected.insert(key, handler).is_none() {
            let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
            self.peak.fetch_max(count, Ordering::Relaxed);
        }
        format!("{}{key:x}", self.prefix).into()
    }

    /// Returns the handler for a key. The entry is not locked when this returns, for a handler may forget itself.
    fn expected(&self, key: u64) -> Option<Arc<dyn MessageHandler>> {
        self.expected.get(&key).map(|entry| Arc::clone(entry.value()))
    }

    fn all(&self) -> Vec<Arc<dyn MessageHandler>> {
        self.expected.iter().map(|entry| Arc::clone(entry.value())).collect()
    }

    /// Tells all handlers that still wait for a first answer that none will come.
    pub(crate) fn give_up_answers(&self) {
        self.all().iter().for_each(|handler| handler.no_answer());
    }

    /// Expects no more messages for a key. Returns false if none were expected.
    pub(crate) fn forget(&self, key: u64) -> bool {
        let was_expected = self.expected.remove(&key).is_some();
        if was_expected
            && self.count.fetch_sub(1, Ordering::Relaxed) == 1
            && self.peak.swap(0, Ordering::Relaxed) > LARGE_TABLE
        {
            self.expected.shrink_to_fit();
        }
        was_expected
    }
}

impl MessageHandler for Inbox {
    fn message(&self, message: Message) {
        let token = message.subject.strip_prefix(&*self.prefix);
        let key = token.and_then(|token| u64::from_str_radix(token, 16).ok());
        match key.and_then(|key| self.expected(key)) {
            Some(handler) => handler.message(message),
            // It is our own: see `Client::send_unsub` and `Client::publish_encoded`.
            None if key == Some(UNSERVED) => {}
            None => count(&self.counters.messages_ignored),
        }
    }

    fn ended(&self, why: Status) {
        self.all().iter().for_each(|handler| handler.ended(why));
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        self.all().iter().fold(None, |hint, handler| handler.refused(subject).or(hint))
    }

    fn subscription_refused(&self, _why: &Error) {
        // Answers cannot come any longer.
        self.ended(Status::Disconnected);
    }
}
