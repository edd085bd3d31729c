//! Events about the connection itself: CONNECTED, DISCONNECTED, and LOG for what people should know.

use crate::error::Status;
use crate::events::{Kind, Queue};
use crate::presence::registry;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, RwLock};
use std::mem;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::time::Instant;

/// How many LOG events may come at once. After that there is one each second.
const BURST: u64 = 16;
/// How many LOG events are kept for the first queue that watches.
const MAX_EARLY: usize = 16;

/// The queues that watch a connection, and its state as they know it.
pub(crate) struct Log {
    watchers: RwLock<Vec<(Weak<Queue>, u64)>>,
    /// LOG events from before the first queue watched.
    early: Mutex<Vec<(Status, String)>>,
    limit: Mutex<TokenBucket>,
    is_connected: AtomicBool,
}

impl Log {
    pub(crate) fn new() -> Log {
        Log {
            watchers: RwLock::default(),
            early: Mutex::default(),
            limit: Mutex::new(TokenBucket { tokens: BURST, since: Instant::now(), suppressed: 0 }),
            is_connected: AtomicBool::new(false),
        }
    }

    /// Adds a queue, whose events have this tag.
    pub(crate) fn watch(&self, queue: &Arc<Queue>, tag: u64) {
        let mut watchers = self.watchers.write();
        registry::add_watcher(&mut watchers, queue, tag);
        for (status, text) in self.early.lock().drain(..) {
            queue.push_connection("", Kind::Log, status, tag, text);
        }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.is_connected.load(Ordering::SeqCst)
    }

    /// There is a connection to the server with this address.
    pub(crate) fn set_connected(&self, address: &str) {
        // Locked before the state changes: a queue that watches after the change gets no event for it.
        let watchers = self.watchers.read();
        self.is_connected.store(true, Ordering::SeqCst);
        push(&watchers, Kind::Connected, Status::Ok, address);
    }

    /// There is no connection. `push_disconnected` follows when all that ran on it has ended.
    pub(crate) fn set_disconnected(&self) {
        self.is_connected.store(false, Ordering::SeqCst);
    }

    /// Pushes a DISCONNECTED event. Its status is `Closed` if there will be no other connection.
    pub(crate) fn push_disconnected(&self, status: Status, text: &str) {
        push(&self.watchers.read(), Kind::Disconnected, status, text);
    }

    /// Pushes a LOG event, unless there are too many.
    pub(crate) fn log(&self, status: Status, text: impl FnOnce() -> String) {
        let Some(suppressed) = self.limit.lock().take() else { return };
        let mut text = text();
        if suppressed > 0 {
            text += &format!(" ({suppressed} messages before this one were suppressed)");
        }
        let watchers = self.watchers.read();
        if watchers.is_empty() {
            let mut early = self.early.lock();
            // Failed attempts to connect are of no interest later; the errors of a connected nats-server may be.
            if early.len() < MAX_EARLY && self.is_connected() {
                early.push((status, text));
            }
            return;
        }
        push(&watchers, Kind::Log, status, &text);
    }
}

fn push(watchers: &[(Weak<Queue>, u64)], kind: Kind, status: Status, text: &str) {
    for (queue, tag) in watchers {
        if let Some(queue) = queue.upgrade() {
            queue.push_connection("", kind, status, *tag, text.to_owned());
        }
    }
}

/// Allows `BURST` messages at once and then one each second, and counts the suppressed ones.
struct TokenBucket {
    tokens: u64,
    since: Instant,
    suppressed: u64,
}

impl TokenBucket {
    /// Returns how many messages were suppressed before this one; None if this one is suppressed, too.
    fn take(&mut self) -> Option<u64> {
        let seconds = self.since.elapsed().as_secs();
        self.since += Duration::from_secs(seconds);
        self.tokens = (self.tokens + seconds).min(BURST);
        let Some(left) = self.tokens.checked_sub(1) else {
            self.suppressed += 1;
            return None;
        };
        self.tokens = left;
        Some(mem::take(&mut self.suppressed))
    }
}
