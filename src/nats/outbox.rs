//! What waits to be given to the NATS client: callers append under a short lock, the connection's task takes it all.

use crate::error::Status;
use crate::status_word::StatusWord;
use crate::sync::{Condvar, Mutex};
use crate::wire::level0;
use async_nats::{HeaderMap, Subject};
use bytes::{Bytes, BytesMut};
use std::collections::{HashSet, VecDeque, vec_deque};
use std::mem;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::Notify;

/// What one waiting message counts in addition to its bytes.
const OVERHEAD: usize = 64;
/// How many bytes of notes are kept, while there is no connection, or nothing confirms them; then the oldest are dropped.
const MAX_NOTES: usize = 16 << 20;

/// One thing to do on the connection. Payloads of `Message` stand in the batch's bytes, in order.
pub(crate) enum Item {
    /// A message of a stream: so many bytes.
    Message(Subject, usize),
    /// A stream's last word or a client's; it survives the loss of a connection.
    DurableMessage(DurableMessage),
    /// A request, with its reply subject, headers and payload.
    Request(Box<Request>),
    /// Subscribe, end at the server, or unsubscribe, the subscription with this number.
    Subscribe(u64),
    EndAtServer(u64),
    Unsubscribe(u64),
    /// Send an empty message to this subject of our own, to see when the server has all that came before.
    Echo(Subject),
}

/// What must reach the server even if the connection is lost on the way: it is kept until an echo confirms it.
#[derive(Clone)]
pub(crate) enum DurableMessage {
    /// The stream with this reply subject ended.
    End(Subject),
    /// It ended with an error: the payload.
    Error(Subject, Bytes),
    /// The client is offline: the subject, the id, and the announcement's number, 0 until it is sent.
    Offline(Subject, Bytes, u64),
}

impl From<DurableMessage> for Item {
    fn from(note: DurableMessage) -> Item {
        Item::DurableMessage(note)
    }
}

impl DurableMessage {
    fn weight(&self) -> usize {
        OVERHEAD
            + match self {
                DurableMessage::End(_) => 0,
                DurableMessage::Error(_, payload) | DurableMessage::Offline(_, payload, _) => payload.len(),
            }
    }

    fn after_loss(self) -> DurableMessage {
        match self {
            DurableMessage::End(to) => DurableMessage::Error(to, level0::error(LOST.as_bytes(), usize::MAX)),
            note => note,
        }
    }
}

/// Notes that are kept, the last ones of them.
#[derive(Default)]
pub(crate) struct DurableMessages {
    notes: VecDeque<DurableMessage>,
    weight: usize,
}

impl DurableMessages {
    pub(crate) fn len(&self) -> usize {
        self.notes.len()
    }

    /// Adds one, and returns how many of the oldest had to go for it.
    pub(crate) fn push(&mut self, note: DurableMessage) -> usize {
        self.weight += note.weight();
        self.notes.push_back(note);
        let mut dropped = 0;
        while self.weight > MAX_NOTES {
            dropped += self.drop_oldest(1);
        }
        dropped
    }

    /// Drops so many of the oldest; returns how many there were.
    pub(crate) fn drop_oldest(&mut self, count: usize) -> usize {
        let dropped = self.notes.drain(..count.min(self.notes.len()));
        dropped.map(|note| self.weight -= note.weight()).count()
    }
}

impl IntoIterator for DurableMessages {
    type Item = DurableMessage;
    type IntoIter = vec_deque::IntoIter<DurableMessage>;

    fn into_iter(self) -> Self::IntoIter {
        self.notes.into_iter()
    }
}

/// Announcements that processes may have missed which were about a reconnect when they were made, the last ones of them.
/// They are repeated once.
#[derive(Default)]
pub(crate) struct Recent {
    announcements: VecDeque<Announcement>,
    weight: usize,
    /// When they are to be repeated, if they are.
    repeat_at: Option<Instant>,
}

pub(crate) struct Announcement {
    pub(crate) id: Bytes,
    pub(crate) number: u64,
    at: Instant,
}

impl Recent {
    /// How long they are kept while there is a connection: those that the server has may not have reached others when it
    /// dies.
    const KEPT: Duration = Duration::from_secs(1);

    /// An announcement is made.
    pub(crate) fn note(&mut self, id: Bytes, number: u64, now: Instant) {
        self.weight += OVERHEAD + id.len();
        self.announcements.push_back(Announcement { id, number, at: now });
        while let Some(oldest) = self.announcements.front()
            && (self.weight > MAX_NOTES
                || self.repeat_at.is_none() && now.saturating_duration_since(oldest.at) > Recent::KEPT)
        {
            self.weight -= OVERHEAD + oldest.id.len();
            self.announcements.pop_front();
        }
    }

    /// There is a connection again: what was announced, and what will be until then, is repeated at this time.
    pub(crate) fn repeat(&mut self, at: Instant) {
        self.repeat_at = Some(at);
    }

    pub(crate) fn repeat_at(&self) -> Option<Instant> {
        self.repeat_at
    }

    /// Takes the announcements to repeat now: the last one of each client.
    pub(crate) fn take(&mut self) -> Vec<Announcement> {
        let taken = mem::take(self).announcements;
        let mut seen = HashSet::new();
        let mut last: Vec<_> = taken.into_iter().rev().filter(|own| seen.insert(own.id.clone())).collect();
        last.reverse();
        last
    }
}

/// The text of a stream's error when the worker's connection was lost.
pub(crate) const LOST: &str = "the worker lost its connection to nats-server";

#[derive(Clone)]
pub(crate) struct Request {
    pub(crate) subject: Subject,
    pub(crate) reply: Subject,
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) payload: Bytes,
    /// Bytes of headers and payload.
    pub(crate) size: usize,
}

impl Item {
    pub(crate) fn into_note(self) -> Option<DurableMessage> {
        match self {
            Item::DurableMessage(note) => Some(note),
            _ => None,
        }
    }

    /// What it weighs if it is an announcement.
    fn announcement(&self) -> usize {
        if matches!(self, Item::DurableMessage(DurableMessage::Offline(..))) { self.weight() } else { 0 }
    }

    pub(crate) fn weight(&self) -> usize {
        match self {
            Item::Message(_, length) => OVERHEAD + length,
            Item::DurableMessage(note) => note.weight(),
            Item::Request(request) => OVERHEAD + request.size,
            Item::Subscribe(_) | Item::EndAtServer(_) | Item::Unsubscribe(_) | Item::Echo(_) => OVERHEAD,
        }
    }
}

/// Whoever was refused for want of room.
pub(crate) trait BlockedSender: Send + Sync {
    /// There is room again.
    fn room(&self);
}

pub(crate) struct Outbox {
    waiting: Mutex<Waiting>,
    /// Bytes that wait, or were taken and not handed over yet.
    weight: AtomicUsize,
    limit: usize,
    /// Some wait for room: when enough was handed over, see to them.
    wanted: AtomicUsize,
    room: Condvar,
    arrived: Notify,
}

#[derive(Default)]
struct Waiting {
    batch: OutgoingBatch,
    /// Whether the connection's task knows that there is something.
    announced: bool,
    refused: Vec<Arc<dyn BlockedSender>>,
}

/// What was taken at once.
#[derive(Default)]
pub(crate) struct OutgoingBatch {
    pub(crate) items: VecDeque<Item>,
    pub(crate) bytes: BytesMut,
    /// What those of the items weigh that are announcements.
    announcements: usize,
}

impl Outbox {
    pub(crate) fn new(limit: usize) -> Outbox {
        Outbox {
            waiting: Mutex::default(),
            weight: AtomicUsize::new(0),
            limit,
            wanted: AtomicUsize::new(0),
            room: Condvar::default(),
            arrived: Notify::new(),
        }
    }

    /// Bytes that wait.
    pub(crate) fn weight(&self) -> usize {
        self.weight.load(Ordering::Relaxed)
    }

    /// Appends a message, if `word` is 0 and there is room; else the status in the word, or `Full`, and then `writer`, if
    /// it gives one, hears when there is room.
    ///
    /// The word is read with the lock held: whoever ends the stream sets it, and appends its last note, under the same
    /// lock. So no message ever follows the end.
    pub(crate) fn send(
        &self,
        word: &StatusWord,
        to: &Subject,
        data: &[u8],
        writer: impl FnOnce() -> Option<Arc<dyn BlockedSender>>,
    ) -> Result<(), Status> {
        let mut waiting = self.waiting.lock();
        let sent = self.append(&mut waiting, word, to, data);
        if sent != Err(Status::Full) {
            return sent;
        }
        // First to be known as waiting, then to look again: otherwise the room could be made in between, unnoticed.
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let sent = self.append(&mut waiting, word, to, data);
        match (sent == Err(Status::Full)).then(writer).flatten() {
            Some(writer) => waiting.refused.push(writer),
            None => {
                self.wanted.fetch_sub(1, Ordering::SeqCst);
            }
        }
        sent
    }

    fn append(&self, waiting: &mut Waiting, word: &StatusWord, to: &Subject, data: &[u8]) -> Result<(), Status> {
        word.check()?;
        self.check_room(data.len())?;
        waiting.batch.bytes.extend_from_slice(data);
        self.put(waiting, Item::Message(to.clone(), data.len()));
        Ok(())
    }

    /// One message finds room in an empty outbox, however small its limit.
    fn check_room(&self, length: usize) -> Result<(), Status> {
        let weight = self.weight.load(Ordering::SeqCst);
        if weight > 0 && weight + OVERHEAD + length > self.limit { Err(Status::Full) } else { Ok(()) }
    }

    /// As `send`, waiting for room (`None`: without limit).
    pub(crate) fn send_wait(
        &self,
        word: &StatusWord,
        to: &Subject,
        data: &[u8],
        timeout: Option<Duration>,
    ) -> Result<(), Status> {
        let mut waiting = self.waiting.lock();
        let mut sent = self.append(&mut waiting, word, to, data);
        if sent != Err(Status::Full) {
            return sent;
        }
        let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
        self.wanted.fetch_add(1, Ordering::SeqCst);
        let mut timed_out = false;
        loop {
            sent = self.append(&mut waiting, word, to, data);
            if sent != Err(Status::Full) {
                break;
            }
            if timed_out {
                sent = Err(Status::Timeout);
                break;
            }
            match deadline {
                None => waiting = self.room.wait(waiting),
                Some(deadline) => (waiting, timed_out) = self.room.wait_until(waiting, deadline),
            }
        }
        self.wanted.fetch_sub(1, Ordering::SeqCst);
        sent
    }

    /// Sets `word` to `why` if it is 0, and then appends a note: so nothing of the stream follows it.
    pub(crate) fn finish(
        &self,
        word: &StatusWord,
        why: Status,
        note: impl FnOnce() -> DurableMessage,
    ) -> Result<(), Status> {
        let mut waiting = self.waiting.lock();
        if !word.try_stop(why) {
            return word.check();
        }
        self.put(&mut waiting, Item::DurableMessage(note()));
        self.call_waiters();
        Ok(())
    }

    /// Appends what is not a message of a stream. It always finds room: each is bounded by what it belongs to, but for
    /// announcements, the oldest of which go when there are too many.
    pub(crate) fn push(&self, item: Item) {
        let mut waiting = self.waiting.lock();
        let announcement = item.announcement();
        self.put(&mut waiting, item);
        let batch = &mut waiting.batch;
        batch.announcements += announcement;
        while batch.announcements > MAX_NOTES
            && let Some(oldest) = batch.items.iter().position(|item| item.announcement() > 0)
        {
            let dropped = batch.items.remove(oldest).map_or(0, |item| item.weight());
            batch.announcements -= dropped;
            self.weight.fetch_sub(dropped, Ordering::SeqCst);
        }
        // A sender that waits for room may have been stopped by whoever says this.
        self.call_waiters();
    }

    fn call_waiters(&self) {
        if self.wanted.load(Ordering::SeqCst) > 0 {
            self.room.notify_all();
        }
    }

    /// Appends a request, if `word` is 0 and there is room.
    pub(crate) fn request(&self, word: &StatusWord, request: Request) -> Result<(), Status> {
        let mut waiting = self.waiting.lock();
        word.check()?;
        self.check_room(request.size)?;
        self.put(&mut waiting, Item::Request(Box::new(request)));
        Ok(())
    }

    fn put(&self, waiting: &mut Waiting, item: Item) {
        self.weight.fetch_add(item.weight(), Ordering::Relaxed);
        waiting.batch.items.push_back(item);
        if !mem::replace(&mut waiting.announced, true) {
            self.arrived.notify_one();
        }
    }

    /// Waits until there is something, and takes it all.
    pub(crate) async fn take(&self) -> OutgoingBatch {
        loop {
            {
                let mut waiting = self.waiting.lock();
                if !waiting.batch.items.is_empty() {
                    return mem::take(&mut waiting.batch);
                }
                waiting.announced = false;
            }
            self.arrived.notified().await;
        }
    }

    /// Drops what belongs to a lost connection, and keeps the notes: those `handed_over` and not confirmed, then those
    /// that wait. An end becomes an error, for what came before it may be lost.
    pub(crate) fn lost(&self, handed_over: impl IntoIterator<Item = DurableMessage>) {
        let mut waiting = self.waiting.lock();
        let batch = mem::take(&mut waiting.batch);
        let waited = batch.items.into_iter().filter_map(Item::into_note);
        let mut notes = DurableMessages::default();
        for note in handed_over.into_iter().chain(waited) {
            notes.push(note.after_loss());
        }
        self.weight.store(notes.weight, Ordering::SeqCst);
        waiting.batch.items = notes.into_iter().map(Item::DurableMessage).collect();
        waiting.batch.announcements = waiting.batch.items.iter().map(Item::announcement).sum();
        let refused = mem::take(&mut waiting.refused);
        self.wanted.fetch_sub(refused.len(), Ordering::SeqCst);
        self.room.notify_all();
    }

    /// Notes that items of this weight were handed over, and tells those who wait when half of the room is free.
    pub(crate) fn handed_over(&self, weight: usize) {
        let before = self.weight.fetch_sub(weight, Ordering::SeqCst);
        if self.wanted.load(Ordering::SeqCst) > 0 && before - weight <= self.limit / 2 {
            let refused = {
                let mut waiting = self.waiting.lock();
                let refused = mem::take(&mut waiting.refused);
                self.wanted.fetch_sub(refused.len(), Ordering::SeqCst);
                self.room.notify_all();
                refused
            };
            refused.iter().for_each(|writer| writer.room());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures_util::FutureExt;
    use std::sync::atomic::AtomicBool;
    use std::thread;

    struct Probe(AtomicBool);

    impl BlockedSender for Probe {
        fn room(&self) {
            assert!(!self.0.swap(true, Ordering::Relaxed), "told twice");
        }
    }

    fn nobody() -> Option<Arc<dyn BlockedSender>> {
        None
    }

    fn take(outbox: &Outbox) -> Option<OutgoingBatch> {
        outbox.take().now_or_never()
    }

    #[test]
    fn announcements_are_repeated_once_for_each_client() {
        let (mut recent, begin) = (Recent::default(), Instant::now());
        let note = |recent: &mut Recent, id: &'static str, number, ms| {
            recent.note(id.into(), number, begin + Duration::from_millis(ms));
        };
        note(&mut recent, "long ago", 1, 0);
        note(&mut recent, "before", 2, 2000);
        recent.repeat(begin + Duration::from_secs(9));
        note(&mut recent, "twice", 3, 3000);
        note(&mut recent, "after", 4, 4000);
        note(&mut recent, "twice", 5, 8000);
        let taken: Vec<_> = recent.take().into_iter().map(|own| (own.id, own.number)).collect();
        assert_eq!(taken, [("before".into(), 2), ("after".into(), 4), ("twice".into(), 5)]);
        assert!(recent.repeat_at().is_none() && recent.take().is_empty());
        // And no more than fit.
        recent.repeat(begin);
        for number in 0..1 << 19 {
            note(&mut recent, "a", number, 0);
        }
        assert!(recent.weight <= MAX_NOTES && recent.announcements.len() > 1 << 16);
    }

    #[test]
    fn messages_come_out_in_order_and_none_follows_the_end() {
        let (outbox, word, to) = (Outbox::new(1 << 20), StatusWord::default(), Subject::from("to"));
        assert!(take(&outbox).is_none());
        outbox.send(&word, &to, b"one", nobody).unwrap();
        outbox.send(&word, &to, b"", nobody).unwrap();
        outbox.finish(&word, Status::Closed, || DurableMessage::End(to.clone())).unwrap();
        assert_eq!(outbox.send(&word, &to, b"x", nobody), Err(Status::Closed));
        assert_eq!(outbox.send_wait(&word, &to, b"x", None), Err(Status::Closed));
        assert_eq!(outbox.finish(&word, Status::Closed, || DurableMessage::End(to.clone())), Err(Status::Closed));
        let batch = take(&outbox).unwrap();
        assert_eq!(&batch.bytes[..], b"one");
        let items: Vec<_> = batch.items.iter().collect();
        assert!(matches!(
            items[..],
            [Item::Message(_, 3), Item::Message(_, 0), Item::DurableMessage(DurableMessage::End(_))]
        ));
        let weight = batch.items.iter().map(Item::weight).sum();
        assert_eq!(outbox.weight(), weight);
        outbox.handed_over(weight);
        assert_eq!(outbox.weight(), 0);
    }

    #[test]
    fn a_full_outbox_refuses_and_tells_once_when_there_is_room() {
        let (outbox, word, to) = (Outbox::new(100), StatusWord::default(), Subject::from("to"));
        outbox.send(&word, &to, &[0; 500], nobody).unwrap();
        let probe = Arc::new(Probe(AtomicBool::new(false)));
        let writer = || Some(Arc::clone(&probe) as Arc<dyn BlockedSender>);
        assert_eq!(outbox.send(&word, &to, b"x", writer), Err(Status::Full));
        outbox.push(Item::DurableMessage(DurableMessage::End(to.clone())));
        let soon = Some(Duration::from_millis(1));
        assert_eq!(outbox.send_wait(&word, &to, b"x", soon), Err(Status::Timeout));
        let weight = outbox.weight();
        outbox.handed_over(weight - 80);
        assert!(!probe.0.load(Ordering::Relaxed), "not yet half empty");
        outbox.handed_over(80);
        assert!(probe.0.load(Ordering::Relaxed));
        outbox.send(&word, &to, b"x", writer).unwrap();
        outbox.handed_over(65);
        assert_eq!(outbox.wanted.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn who_waits_for_room_leaves_with_room_and_with_the_end() {
        let (outbox, word, to) = (Outbox::new(100), StatusWord::default(), Subject::from("to"));
        outbox.send(&word, &to, &[0; 500], nobody).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| outbox.send_wait(&word, &to, b"x", None));
            while outbox.wanted.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            outbox.handed_over(564);
            assert_eq!(waiter.join().unwrap(), Ok(()));

            outbox.send(&word, &to, &[0; 20], nobody).unwrap_err();
            let waiter = scope.spawn(|| outbox.send_wait(&word, &to, &[0; 100], None));
            while outbox.wanted.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            assert!(word.try_stop(Status::Offline));
            outbox.push(Item::DurableMessage(DurableMessage::End(to.clone())));
            assert_eq!(waiter.join().unwrap(), Err(Status::Offline));
        });
    }

    #[test]
    fn a_loss_keeps_notes_in_order_and_never_an_end() {
        let (outbox, word, to) = (Outbox::new(100), StatusWord::default(), Subject::from("to"));
        let offline = |id: &'static str| DurableMessage::Offline("client.offline".into(), id.into(), 0);
        outbox.send(&word, &to, b"lost", nobody).unwrap();
        outbox.push(Item::DurableMessage(offline("second")));
        outbox.push(Item::DurableMessage(DurableMessage::End("waited".into())));
        outbox.push(Item::Echo(to.clone()));
        outbox.lost([offline("first"), DurableMessage::End("handed over".into())]);
        let batch = take(&outbox).unwrap();
        let shown: Vec<_> = batch
            .items
            .into_iter()
            .map(|item| match item {
                Item::DurableMessage(DurableMessage::Offline(_, id, _)) => id,
                Item::DurableMessage(DurableMessage::Error(to, payload)) => {
                    assert!(payload.starts_with(level0::ERROR));
                    to.into_string().into()
                }
                _ => panic!("not to be kept"),
            })
            .collect();
        assert_eq!(shown, ["first", "handed over", "second", "waited"]);
        assert!(batch.bytes.is_empty());
        outbox.lost((0..300_000).map(|_| offline("0123456789")));
        assert!(outbox.weight() <= MAX_NOTES);
    }

    #[test]
    fn announcements_have_a_limit_and_the_last_are_kept() {
        let (outbox, word, to) = (Outbox::new(1 << 20), StatusWord::default(), Subject::from("to"));
        let offline = |id: String| Item::DurableMessage(DurableMessage::Offline("client.offline".into(), id.into(), 0));
        outbox.send(&word, &to, b"before", nobody).unwrap();
        for round in 0..2 {
            for i in 0..300_000 {
                outbox.push(offline(format!("{i:010}")));
            }
            assert!(outbox.weight() <= MAX_NOTES + OVERHEAD + 6, "round {round}");
            if round == 0 {
                // Those that are kept over a loss count on.
                outbox.lost([]);
            }
        }
        let batch = take(&outbox).unwrap();
        assert_eq!(outbox.weight(), batch.items.iter().map(Item::weight).sum::<usize>());
        let last = batch.items.into_iter().next_back().and_then(Item::into_note);
        assert!(matches!(last, Some(DurableMessage::Offline(_, id, _)) if id == "0000299999"));
        outbox.push(offline("after".into()));
        assert_eq!(take(&outbox).unwrap().items.len(), 1);
    }

    #[test]
    fn notes_that_nobody_confirms_have_a_limit() {
        let mut notes = DurableMessages::default();
        let dropped: usize = (0..300_000).map(|_| notes.push(DurableMessage::End("to".into()))).sum();
        assert_eq!(notes.len() + dropped, 300_000);
        assert_eq!(notes.len() * OVERHEAD, MAX_NOTES);
        assert_eq!((notes.drop_oldest(10), notes.drop_oldest(usize::MAX)), (10, MAX_NOTES / OVERHEAD - 10));
        assert_eq!((notes.len(), notes.weight), (0, 0));
    }
}
