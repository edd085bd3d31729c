//! Announcements that clients are offline: those of this connection, and those of other processes.
//!
//! A process that is reconnecting misses what is announced meanwhile, so announcements around a reconnect are repeated
//! once. Each carries its process, connection and number, so that a receiver recognises its own, and repeated ones that
//! it has.

use crate::connection::log::Log;
use crate::error::Status;
use crate::events::{Kind, Queue};
use crate::metrics::{Counters, count};
use crate::nats::inbound::MessageHandler;
use crate::nats::outbox::{DurableMessage, MAX_DURABLE, OVERHEAD};
use crate::nats::{HeaderMap, Message, Subject};
use crate::presence::client_id;
use crate::presence::registry;
use crate::process::fork;
use crate::process::random;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, RwLock};
use crate::wire::level0;
use bytes::Bytes;
use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// Of how many connections of other processes the announcements are recognised when they are repeated.
const MAX_ORIGINS: usize = 4096;

/// The announcements of one connection, and those that it has received.
pub(crate) struct Announcements {
    /// The handle id of the connection.
    connection: u64,
    pub(crate) subject: Subject,
    /// How many were numbered.
    numbered: AtomicU64,
    recent: Mutex<RecentAnnouncements>,
    received: Mutex<ReceivedAnnouncements>,
    log: Arc<Log>,
    /// The queues that get an OFFLINE event for each announcement of another process.
    watchers: RwLock<Vec<(Weak<Queue>, u64)>>,
    counters: Arc<Counters>,
}

impl Announcements {
    pub(crate) fn new(connection: u64, subject: &str, log: Arc<Log>, counters: Arc<Counters>) -> Announcements {
        Announcements {
            connection,
            subject: subject.into(),
            numbered: AtomicU64::new(0),
            recent: Mutex::default(),
            received: Mutex::default(),
            log,
            watchers: RwLock::default(),
            counters,
        }
    }

    /// Adds a queue that gets an OFFLINE event with this tag for each announcement of another process.
    pub(crate) fn watch(&self, queue: &Arc<Queue>, tag: u64) {
        registry::add_watcher(&mut self.watchers.write(), queue, tag);
    }

    fn notify_watchers(&self, id: &str) {
        for (queue, tag) in self.watchers.read().iter() {
            if let Some(queue) = queue.upgrade() {
                queue.push_presence(Kind::Offline, *tag, id);
            }
        }
    }

    /// An announcement is about to be sent: numbers it when that is the first time, and keeps it for a repetition.
    pub(crate) fn number(&self, message: &mut DurableMessage) {
        if let DurableMessage::Offline(id, number) = message {
            if *number == 0 {
                *number = self.numbered.fetch_add(1, Ordering::Relaxed) + 1;
            }
            self.recent.lock().push(id.clone(), *number, Instant::now());
        }
    }

    /// Returns the header that names this process, its connection, and the announcement.
    pub(crate) fn header(&self, number: u64, is_repeated: bool) -> HeaderMap {
        let mut headers = HeaderMap::new();
        let again = if is_repeated { " again" } else { "" };
        headers.insert(level0::ORIGIN, format!("{} {} {number}{again}", process_token(), self.connection));
        headers
    }

    /// There is another connection to nats-server. `repeat_at`: by then other processes have reconnected, too.
    pub(crate) fn reconnected(&self, repeat_at: Option<Instant>) {
        *self.received.lock() = ReceivedAnnouncements { since: fork::next_handle_id(), first: HashMap::new() };
        if repeat_at.is_some() {
            self.recent.lock().repeat_at = repeat_at;
        }
    }

    /// Returns when to repeat the recent announcements, if they are to be repeated.
    pub(crate) fn repeat_at(&self) -> Option<Instant> {
        self.recent.lock().repeat_at
    }

    /// Takes the announcements to repeat now: the clients that are not back online in this process.
    pub(crate) fn take_repeated(&self) -> impl Iterator<Item = Announcement> {
        let recent = self.recent.lock().take();
        recent.into_iter().filter(|announcement| !registry::is_online(&announcement.id))
    }
}

/// Applies the announcements of other processes in this one.
impl MessageHandler for Announcements {
    fn message(&self, message: Message) {
        let origin = message.header(level0::ORIGIN).and_then(Origin::parse);
        match client_id::id(&message.payload) {
            Ok("") => count(&self.counters.messages_ignored),
            Ok(id) => match origin {
                Some(own) if own.process == process_token() => {
                    if !own.is_repeated {
                        registry::apply_own_offline(id, own.connection);
                    }
                }
                origin => {
                    count(&self.counters.offline_in);
                    match origin.map_or(Receipt::First, |origin| self.received.lock().receive(&origin)) {
                        Receipt::First => registry::apply_offline(id, None),
                        Receipt::Missed { since } => registry::apply_offline(id, Some(since)),
                        Receipt::Duplicate => return,
                    }
                    self.notify_watchers(id);
                }
            },
            Err(error) => {
                count(&self.counters.messages_ignored);
                self.log.log(Status::Invalid, || format!("an offline announcement was ignored: {error}"));
            }
        }
    }
}

/// The last announcements that other processes may have missed because they were reconnecting.
#[derive(Default)]
struct RecentAnnouncements {
    announcements: VecDeque<Announcement>,
    weight: usize,
    repeat_at: Option<Instant>,
}

/// An announcement to repeat.
pub(crate) struct Announcement {
    pub(crate) id: Bytes,
    pub(crate) number: u64,
    at: Instant,
}

impl RecentAnnouncements {
    /// How long announcements are kept while there is a connection. When the server dies, those of the last moment may
    /// not have reached other processes.
    const KEPT: Duration = Duration::from_secs(1);

    fn push(&mut self, id: Bytes, number: u64, now: Instant) {
        self.weight += OVERHEAD + id.len();
        self.announcements.push_back(Announcement { id, number, at: now });
        while let Some(oldest) = self.announcements.front()
            && (self.weight > MAX_DURABLE
                || self.repeat_at.is_none() && now.saturating_duration_since(oldest.at) > RecentAnnouncements::KEPT)
        {
            self.weight -= OVERHEAD + oldest.id.len();
            self.announcements.pop_front();
        }
    }

    /// Takes all: the last announcement of each client.
    fn take(&mut self) -> Vec<Announcement> {
        let taken = mem::take(self).announcements;
        let mut seen = HashSet::new();
        let mut last: Vec<_> = taken.into_iter().rev().filter(|own| seen.insert(own.id.clone())).collect();
        last.reverse();
        last
    }
}

/// The name of this process in its announcements; a forked child has its own.
fn process_token() -> &'static str {
    static TOKEN: fork::PerProcess<String> = fork::PerProcess::new();
    TOKEN.get(random::token)
}

/// The header of an announcement.
struct Origin<'a> {
    process: &'a str,
    connection: u64,
    /// Counts the announcements of the connection from 1. 0: an older peer, which does not number them.
    number: u64,
    is_repeated: bool,
}

impl<'a> Origin<'a> {
    fn parse(header: &'a str) -> Option<Origin<'a>> {
        let mut words = header.split(' ');
        let (process, connection) = (words.next()?, words.next()?.parse().ok()?);
        let number = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Some(Origin { process, connection, number, is_repeated: words.next() == Some("again") })
    }
}

/// The announcements that came since the connection to nats-server was made.
#[derive(Default)]
struct ReceivedAnnouncements {
    /// Handle ids of this process below this one are older than the connection to nats-server.
    since: u64,
    /// For each process and connection, the number of the first announcement. All that followed came, too, for the
    /// server keeps their order.
    first: HashMap<(Box<str>, u64), u64>,
}

/// What an announcement means for this process.
enum Receipt {
    First,
    /// The announcement came before.
    Duplicate,
    /// It is a repetition of one that this process missed. It does not apply to what began here after `since`.
    Missed {
        since: u64,
    },
}

impl ReceivedAnnouncements {
    fn receive(&mut self, origin: &Origin<'_>) -> Receipt {
        let key = (origin.process.into(), origin.connection);
        if origin.is_repeated {
            return match self.first.get(&key) {
                Some(first) if *first <= origin.number => Receipt::Duplicate,
                _ => Receipt::Missed { since: self.since },
            };
        }
        if origin.number > 0 && self.first.len() < MAX_ORIGINS {
            self.first.entry(key).or_insert(origin.number);
        }
        Receipt::First
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recent_announcements_are_repeated_once_for_each_client() {
        let (mut recent, begin) = (RecentAnnouncements::default(), Instant::now());
        let push = |recent: &mut RecentAnnouncements, id: &'static str, number, ms| {
            recent.push(id.into(), number, begin + Duration::from_millis(ms));
        };
        push(&mut recent, "long ago", 1, 0);
        push(&mut recent, "before", 2, 2000);
        recent.repeat_at = Some(begin + Duration::from_secs(9));
        push(&mut recent, "twice", 3, 3000);
        push(&mut recent, "after", 4, 4000);
        push(&mut recent, "twice", 5, 8000);
        let taken: Vec<_> = recent.take().into_iter().map(|own| (own.id, own.number)).collect();
        assert_eq!(taken, [("before".into(), 2), ("after".into(), 4), ("twice".into(), 5)]);
        assert!(recent.repeat_at.is_none() && recent.take().is_empty());
        // They have a limit.
        recent.repeat_at = Some(begin);
        for number in 0..1 << 19 {
            push(&mut recent, "a", number, 0);
        }
        assert!(recent.weight <= MAX_DURABLE && recent.announcements.len() > 1 << 16);
    }
}
