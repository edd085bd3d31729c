//! What is waiting to be given to the NATS client: callers append under a short lock, the connection's task takes it
//! all.

use crate::error::Status;
use crate::nats::encoded::{self, EncodedMessages};
use crate::nats::message::Subject;
use crate::status_word::StatusWord;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, deadline};
use crate::wire::level0;
use bytes::Bytes;
use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// How much a waiting item counts in addition to its bytes.
pub(crate) const OVERHEAD: usize = 64;
/// How many bytes of durable messages are kept while there is no connection, or no echo confirms them. Beyond, the
/// oldest are dropped.
pub(crate) const MAX_DURABLE: usize = 16 << 20;

/// The text of a stream's error when the worker's connection was lost.
pub(crate) const LOST: &str = "the worker lost its connection to nats-server";

/// Something to do at the NATS client.
pub(crate) enum OutgoingItem {
    /// Publish messages, which have this weight.
    Messages(EncodedMessages, usize),
    /// Publish a message that must survive the loss of the connection.
    DurableMessage(DurableMessage),
    /// Make the subscription with this id; end it at the server; end it at the client.
    Subscribe(u64),
    SendUnsub(u64),
    Unsubscribe(u64),
    /// Publish an empty message to this subject of our own: when it comes back, the server has all that was sent before
    /// it.
    Echo(Subject),
}

/// A message that is kept until an echo confirms that the server has it, and sent again after the loss of the
/// connection.
#[derive(Clone)]
pub(crate) enum DurableMessage {
    /// The stream with this reply subject ended.
    End(Box<str>),
    /// The stream with this reply subject ended with an error: the payload, and the code, or 0.
    Error { to: Box<str>, code: i32, payload: Bytes },
    /// A client is offline: its id, and the number of the announcement, 0 until it is first sent.
    Offline(Bytes, u64),
}

/// How much a subject counts in addition to the overhead of its message: a peer may choose a long one.
fn excess(subject: &str) -> usize {
    subject.len().saturating_sub(OVERHEAD)
}

impl From<DurableMessage> for OutgoingItem {
    fn from(message: DurableMessage) -> OutgoingItem {
        OutgoingItem::DurableMessage(message)
    }
}

impl DurableMessage {
    fn weight(&self) -> usize {
        OVERHEAD
            + match self {
                DurableMessage::End(to) => excess(to),
                DurableMessage::Error { to, payload, .. } => excess(to) + payload.len(),
                DurableMessage::Offline(payload, _) => payload.len(),
            }
    }

    /// Adds the end of a stream to encoded messages. An announcement is sent by the connection, which knows its headers.
    pub(crate) fn encode(&self, messages: &mut EncodedMessages) {
        match self {
            DurableMessage::End(to) => messages.push(to, "", b"", level0::END),
            DurableMessage::Error { to, code, payload } => {
                let code = (*code != 0).then(|| code.to_string());
                let headers = encoded::headers_block(code.as_deref().map(|code| (level0::ERROR_CODE, code)));
                messages.push(to, "", headers.as_bytes(), payload);
            }
            DurableMessage::Offline(..) => {}
        }
    }

    /// Turns an end into an error: messages of the stream that were sent before it may be lost.
    fn after_loss(self) -> DurableMessage {
        match self {
            DurableMessage::End(to) => {
                DurableMessage::Error { to, code: 0, payload: level0::error(LOST.as_bytes(), usize::MAX) }
            }
            other => other,
        }
    }
}

/// The last durable messages, up to a limit.
#[derive(Default)]
pub(crate) struct DurableMessages {
    pub(crate) messages: VecDeque<DurableMessage>,
    weight: usize,
}

impl DurableMessages {
    /// Adds a message. Returns how many of the oldest were dropped to stay within the limit.
    pub(crate) fn push(&mut self, message: DurableMessage) -> usize {
        self.weight += message.weight();
        self.messages.push_back(message);
        let mut dropped = 0;
        while self.weight > MAX_DURABLE {
            dropped += self.drop_oldest(1);
        }
        dropped
    }

    /// Drops the oldest messages, at most `count`. Returns how many.
    pub(crate) fn drop_oldest(&mut self, count: usize) -> usize {
        let dropped = self.messages.drain(..count.min(self.messages.len()));
        dropped.map(|message| self.weight -= message.weight()).count()
    }
}

impl OutgoingItem {
    pub(crate) fn into_durable(self) -> Option<DurableMessage> {
        match self {
            OutgoingItem::DurableMessage(message) => Some(message),
            _ => None,
        }
    }

    /// Returns its weight if it is an announcement, else 0.
    fn announcement_weight(&self) -> usize {
        let is_announcement = matches!(self, OutgoingItem::DurableMessage(DurableMessage::Offline(..)));
        if is_announcement { self.weight() } else { 0 }
    }

    pub(crate) fn weight(&self) -> usize {
        match self {
            OutgoingItem::Messages(_, weight) => *weight,
            OutgoingItem::DurableMessage(message) => message.weight(),
            _ => OVERHEAD,
        }
    }
}

/// A sender whose message was refused because the outbox was full.
pub(crate) trait BlockedSender: Send + Sync {
    /// The outbox takes messages again.
    fn writable(&self);
}

pub(crate) struct Outbox {
    pending: Mutex<Pending>,
    /// The weight of the items that are pending, or were taken and not released yet.
    weight: AtomicUsize,
    limit: usize,
    /// How many senders are blocked: those in `Pending::blocked`, and threads that wait for `writable`.
    blocked: AtomicUsize,
    writable: Condvar,
    not_empty: Notify,
}

#[derive(Default)]
struct Pending {
    batch: OutgoingBatch,
    /// How large the last encoded messages were.
    last_size: usize,
    /// The connection's task has been notified since it last found the batch empty.
    is_task_notified: bool,
    blocked: Vec<Arc<dyn BlockedSender>>,
}

/// The items that are taken at once.
#[derive(Default)]
pub(crate) struct OutgoingBatch {
    pub(crate) items: VecDeque<OutgoingItem>,
    /// The durable messages that are among the encoded ones.
    pub(crate) durable: Vec<DurableMessage>,
    /// The weight of the announcements among the items.
    announcements: usize,
}

impl Outbox {
    pub(crate) fn new(limit: usize) -> Outbox {
        Outbox {
            pending: Mutex::default(),
            weight: AtomicUsize::new(0),
            limit,
            blocked: AtomicUsize::new(0),
            writable: Condvar::default(),
            not_empty: Notify::new(),
        }
    }

    /// Returns the weight of all items that are not released yet.
    pub(crate) fn weight(&self) -> usize {
        self.weight.load(Ordering::Relaxed)
    }

    /// Appends a message if `word` is 0 and the message fits. Else returns the status in the word, or `Full`; with
    /// `Full`, the sender that `blocked` returns is notified when the outbox is writable again.
    ///
    /// The word is read with the lock held. Whoever ends the stream sets the word and appends the stream's last message
    /// under the same lock, so no message follows the end.
    pub(crate) fn send(
        &self,
        word: &StatusWord,
        to: &str,
        data: &[u8],
        blocked: impl FnOnce() -> Option<Arc<dyn BlockedSender>>,
    ) -> Result<(), Status> {
        let mut pending = self.pending.lock();
        let sent = self.append(&mut pending, word, to, data);
        if sent != Err(Status::Full) {
            return sent;
        }
        // First count as blocked, then try again: else a `release` in between would notify no one.
        self.blocked.fetch_add(1, Ordering::SeqCst);
        let sent = self.append(&mut pending, word, to, data);
        match (sent == Err(Status::Full)).then(blocked).flatten() {
            Some(sender) => pending.blocked.push(sender),
            None => {
                self.blocked.fetch_sub(1, Ordering::SeqCst);
            }
        }
        sent
    }

    fn append(&self, pending: &mut Pending, word: &StatusWord, to: &str, data: &[u8]) -> Result<(), Status> {
        word.check()?;
        let length = data.len() + excess(to);
        self.check_limit(length)?;
        self.encode(pending, OVERHEAD + length, |messages| messages.push(to, "", b"", data));
        Ok(())
    }

    /// Has `push` append a message of this weight, which is about its size, to the encoded ones.
    #[inline]
    fn encode(&self, pending: &mut Pending, weight: usize, push: impl FnOnce(&mut EncodedMessages)) {
        if let Some(OutgoingItem::Messages(messages, total)) = pending.batch.items.back_mut() {
            if messages.has_room(weight) {
                push(messages);
                *total += weight;
                return self.added(pending, weight);
            }
            pending.last_size = messages.bytes.len();
        }
        // As large as the last one, so that a busy connection does not copy and an idle one wastes no memory.
        let mut messages = EncodedMessages::with_capacity(pending.last_size);
        push(&mut messages);
        pending.batch.items.push_back(OutgoingItem::Messages(messages, weight));
        self.added(pending, weight);
    }

    /// An empty outbox takes one message of any size.
    fn check_limit(&self, length: usize) -> Result<(), Status> {
        let weight = self.weight.load(Ordering::SeqCst);
        if weight > 0 && weight + OVERHEAD + length > self.limit { Err(Status::Full) } else { Ok(()) }
    }

    /// As `send`, but blocks until the message fits (`timeout` None: without limit).
    pub(crate) fn send_wait(
        &self,
        word: &StatusWord,
        to: &str,
        data: &[u8],
        timeout: Option<Duration>,
    ) -> Result<(), Status> {
        let mut pending = self.pending.lock();
        let sent = self.append(&mut pending, word, to, data);
        if sent != Err(Status::Full) {
            return sent;
        }
        let deadline = deadline(timeout);
        self.blocked.fetch_add(1, Ordering::SeqCst);
        let mut timed_out = false;
        let sent = loop {
            match self.append(&mut pending, word, to, data) {
                Err(Status::Full) if timed_out => break Err(Status::Timeout),
                Err(Status::Full) => {}
                sent => break sent,
            }
            (pending, timed_out) = self.writable.wait_until(pending, deadline);
        };
        self.blocked.fetch_sub(1, Ordering::SeqCst);
        sent
    }

    /// Sets `word` to `Closed` if it is 0, and appends the last message of the stream, so that no message follows it.
    pub(crate) fn finish(&self, word: &StatusWord, last: impl FnOnce() -> DurableMessage) -> Result<(), Status> {
        let mut pending = self.pending.lock();
        if !word.try_stop(Status::Closed) {
            return word.check();
        }
        let last = last();
        self.encode(&mut pending, last.weight(), |messages| last.encode(messages));
        pending.batch.durable.push(last);
        self.wake_blocked_threads();
        Ok(())
    }

    /// Appends an item that is not a message of a stream, whether it fits or not: the number of each kind is bounded
    /// elsewhere. When announcements exceed their limit the oldest are dropped.
    pub(crate) fn push(&self, item: OutgoingItem) {
        let mut pending = self.pending.lock();
        let announcement = item.announcement_weight();
        self.put(&mut pending, item);
        let batch = &mut pending.batch;
        batch.announcements += announcement;
        while batch.announcements > MAX_DURABLE
            && let Some(oldest) = batch.items.iter().position(|item| item.announcement_weight() > 0)
        {
            let dropped = batch.items.remove(oldest).map_or(0, |item| item.weight());
            batch.announcements -= dropped;
            self.weight.fetch_sub(dropped, Ordering::SeqCst);
        }
        // The item may be the last message of a stream whose sender is blocked.
        self.wake_blocked_threads();
    }

    fn wake_blocked_threads(&self) {
        if self.blocked.load(Ordering::SeqCst) > 0 {
            self.writable.notify_all();
        }
    }

    /// Appends an encoded request if `word` is 0 and the request fits.
    pub(crate) fn request(&self, word: &StatusWord, request: &Bytes) -> Result<(), Status> {
        let mut pending = self.pending.lock();
        word.check()?;
        self.check_limit(request.len())?;
        self.encode(&mut pending, OVERHEAD + request.len(), |messages| messages.append(request));
        Ok(())
    }

    fn put(&self, pending: &mut Pending, item: OutgoingItem) {
        let weight = item.weight();
        pending.batch.items.push_back(item);
        self.added(pending, weight);
    }

    #[inline]
    fn added(&self, pending: &mut Pending, weight: usize) {
        self.weight.fetch_add(weight, Ordering::Relaxed);
        if !mem::replace(&mut pending.is_task_notified, true) {
            self.not_empty.notify_one();
        }
    }

    /// Waits until there is an item, and takes all.
    pub(crate) async fn take(&self) -> OutgoingBatch {
        loop {
            {
                let mut pending = self.pending.lock();
                if !pending.batch.items.is_empty() {
                    if let Some(OutgoingItem::Messages(messages, _)) = pending.batch.items.back() {
                        pending.last_size = messages.bytes.len();
                    }
                    return mem::take(&mut pending.batch);
                }
                pending.is_task_notified = false;
            }
            self.not_empty.notified().await;
        }
    }

    /// Drops what belongs to a lost connection, and keeps the durable messages: first those in `unconfirmed`, then
    /// those that are pending. An end becomes an error.
    pub(crate) fn connection_lost(&self, unconfirmed: impl IntoIterator<Item = DurableMessage>) {
        let mut pending = self.pending.lock();
        let batch = mem::take(&mut pending.batch);
        let durable = batch.items.into_iter().filter_map(OutgoingItem::into_durable).chain(batch.durable);
        let mut kept = DurableMessages::default();
        for message in unconfirmed.into_iter().chain(durable) {
            kept.push(message.after_loss());
        }
        self.weight.store(kept.weight, Ordering::SeqCst);
        pending.batch.items = kept.messages.into_iter().map(OutgoingItem::DurableMessage).collect();
        pending.batch.announcements = pending.batch.items.iter().map(OutgoingItem::announcement_weight).sum();
        // These senders have ended with the connection, and are not notified.
        self.take_blocked(&mut pending);
    }

    /// Releases items that were given to the NATS client. Notifies blocked senders when at most half of the limit is in
    /// use.
    pub(crate) fn release(&self, weight: usize) {
        let before = self.weight.fetch_sub(weight, Ordering::SeqCst);
        if self.blocked.load(Ordering::SeqCst) > 0 && before - weight <= self.limit / 2 {
            let blocked = self.take_blocked(&mut self.pending.lock());
            blocked.iter().for_each(|sender| sender.writable());
        }
    }

    /// Wakes the threads that wait, and returns the other blocked senders.
    fn take_blocked(&self, pending: &mut Pending) -> Vec<Arc<dyn BlockedSender>> {
        let blocked = mem::take(&mut pending.blocked);
        self.blocked.fetch_sub(blocked.len(), Ordering::SeqCst);
        self.writable.notify_all();
        blocked
    }
}

#[cfg(all(test, shuttle))]
#[path = "../../tests/interleavings/outbox.rs"]
pub(crate) mod interleavings;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::atomic::AtomicBool;
    use futures_util::FutureExt;
    use std::thread;

    struct Probe(AtomicBool);

    impl BlockedSender for Probe {
        fn writable(&self) {
            assert!(!self.0.swap(true, Ordering::Relaxed), "notified twice");
        }
    }

    fn no_sender() -> Option<Arc<dyn BlockedSender>> {
        None
    }

    fn take(outbox: &Outbox) -> Option<OutgoingBatch> {
        outbox.take().now_or_never()
    }

    #[test]
    fn messages_come_out_in_order_and_none_follows_the_end() {
        let (outbox, word, to) = (Outbox::new(1 << 20), StatusWord::default(), "to");
        assert!(take(&outbox).is_none());
        outbox.send(&word, to, b"one", no_sender).unwrap();
        outbox.send(&word, to, b"", no_sender).unwrap();
        outbox.finish(&word, || DurableMessage::End(to.into())).unwrap();
        assert_eq!(outbox.send(&word, to, b"x", no_sender), Err(Status::Closed));
        assert_eq!(outbox.send_wait(&word, to, b"x", None), Err(Status::Closed));
        assert_eq!(outbox.finish(&word, || DurableMessage::End(to.into())), Err(Status::Closed));
        let other = StatusWord::default();
        let error = DurableMessage::Error { to: to.into(), code: 7, payload: "text".into() };
        outbox.finish(&other, || error).unwrap();
        let batch = take(&outbox).unwrap();
        let Some(OutgoingItem::Messages(messages, _)) = batch.items.front() else { panic!("not encoded") };
        let expected = "PUB to 3\r\none\r\nPUB to 0\r\n\r\nPUB to 14\r\n__STREAM_END__\r\n\
                        HPUB to 31 35\r\nNATS/1.0\r\nPresence-Error: 7\r\n\r\ntext";
        assert_eq!((&messages.bytes[..], messages.count, batch.items.len()), (expected.as_bytes(), 4, 1));
        assert!(matches!(&batch.durable[..], [DurableMessage::End(_), DurableMessage::Error { code: 7, .. }]));
        let weight = batch.items.iter().map(OutgoingItem::weight).sum();
        assert_eq!(outbox.weight(), weight);
        outbox.release(weight);
        assert_eq!(outbox.weight(), 0);
    }

    #[test]
    fn a_long_subject_counts_for_the_limit() {
        let (outbox, word, to) = (Outbox::new(10_000), StatusWord::default(), "s".repeat(2000));
        let accepted = (0..100).take_while(|_| outbox.send(&word, &to, b"x", no_sender).is_ok()).count();
        assert_eq!((accepted, outbox.weight()), (4, 4 * 2001));
    }

    #[test]
    fn full_outbox_refuses_and_notifies_once_when_writable() {
        let (outbox, word, to) = (Outbox::new(100), StatusWord::default(), "to");
        outbox.send(&word, to, &[0; 500], no_sender).unwrap();
        let probe = Arc::new(Probe(AtomicBool::new(false)));
        let sender = || Some(Arc::clone(&probe) as Arc<dyn BlockedSender>);
        assert_eq!(outbox.send(&word, to, b"x", sender), Err(Status::Full));
        outbox.push(OutgoingItem::DurableMessage(DurableMessage::End(to.into())));
        let soon = Some(Duration::from_millis(1));
        assert_eq!(outbox.send_wait(&word, to, b"x", soon), Err(Status::Timeout));
        let weight = outbox.weight();
        outbox.release(weight - 80);
        assert!(!probe.0.load(Ordering::Relaxed), "not yet half empty");
        outbox.release(80);
        assert!(probe.0.load(Ordering::Relaxed));
        outbox.send(&word, to, b"x", sender).unwrap();
        outbox.release(65);
        assert_eq!(outbox.blocked.load(Ordering::Relaxed), 0);
    }

    #[test]
    fn blocked_thread_returns_when_writable_and_when_the_stream_ends() {
        let (outbox, word, to) = (Outbox::new(100), StatusWord::default(), "to");
        outbox.send(&word, to, &[0; 500], no_sender).unwrap();
        thread::scope(|scope| {
            let waiter = scope.spawn(|| outbox.send_wait(&word, to, b"x", None));
            while outbox.blocked.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            outbox.release(564);
            assert_eq!(waiter.join().unwrap(), Ok(()));

            outbox.send(&word, to, &[0; 20], no_sender).unwrap_err();
            let waiter = scope.spawn(|| outbox.send_wait(&word, to, &[0; 100], None));
            while outbox.blocked.load(Ordering::Relaxed) == 0 {
                thread::yield_now();
            }
            assert!(word.try_stop(Status::Offline));
            outbox.push(OutgoingItem::DurableMessage(DurableMessage::End(to.into())));
            assert_eq!(waiter.join().unwrap(), Err(Status::Offline));
        });
    }

    #[test]
    fn loss_keeps_durable_messages_in_order_and_turns_ends_into_errors() {
        let (outbox, word, to) = (Outbox::new(100), StatusWord::default(), "to");
        let offline = |id: &'static str| DurableMessage::Offline(id.into(), 0);
        outbox.send(&word, to, b"lost", no_sender).unwrap();
        outbox.push(OutgoingItem::DurableMessage(offline("second")));
        outbox.finish(&word, || DurableMessage::End("waited".into())).unwrap();
        outbox.push(OutgoingItem::Echo(to.into()));
        outbox.connection_lost([offline("first"), DurableMessage::End("unconfirmed".into())]);
        let batch = take(&outbox).unwrap();
        let shown: Vec<_> = batch
            .items
            .into_iter()
            .map(|item| match item {
                OutgoingItem::DurableMessage(DurableMessage::Offline(id, _)) => id,
                OutgoingItem::DurableMessage(DurableMessage::Error { to, payload, .. }) => {
                    assert!(payload.starts_with(level0::ERROR));
                    to.into_string().into()
                }
                _ => panic!("kept though it is not durable"),
            })
            .collect();
        assert_eq!(shown, ["first", "unconfirmed", "second", "waited"]);
        assert!(batch.durable.is_empty());
        outbox.connection_lost((0..300_000).map(|_| offline("0123456789")));
        assert!(outbox.weight() <= MAX_DURABLE);
    }

    #[test]
    fn oldest_announcements_are_dropped_beyond_the_limit() {
        let (outbox, word, to) = (Outbox::new(1 << 20), StatusWord::default(), "to");
        let offline = |id: String| OutgoingItem::DurableMessage(DurableMessage::Offline(id.into(), 0));
        outbox.send(&word, to, b"before", no_sender).unwrap();
        for round in 0..2 {
            for i in 0..300_000 {
                outbox.push(offline(format!("{i:010}")));
            }
            assert!(outbox.weight() <= MAX_DURABLE + OVERHEAD + 6, "round {round}");
            if round == 0 {
                // Those that are kept after a loss still count.
                outbox.connection_lost([]);
            }
        }
        let batch = take(&outbox).unwrap();
        assert_eq!(outbox.weight(), batch.items.iter().map(OutgoingItem::weight).sum::<usize>());
        let last = batch.items.into_iter().next_back().and_then(OutgoingItem::into_durable);
        assert!(matches!(last, Some(DurableMessage::Offline(id, _)) if id == "0000299999"));
        outbox.push(offline("after".into()));
        assert_eq!(take(&outbox).unwrap().items.len(), 1);
    }

    #[test]
    fn unconfirmed_durable_messages_have_a_limit() {
        let mut messages = DurableMessages::default();
        let dropped: usize = (0..300_000).map(|_| messages.push(DurableMessage::End("to".into()))).sum();
        assert_eq!(messages.messages.len() + dropped, 300_000);
        assert_eq!(messages.messages.len() * OVERHEAD, MAX_DURABLE);
        assert_eq!((messages.drop_oldest(10), messages.drop_oldest(usize::MAX)), (10, MAX_DURABLE / OVERHEAD - 10));
        assert_eq!((messages.messages.len(), messages.weight), (0, 0));
    }
}
