//! The worker's end of a stream. It refuses to send the moment its client is gone: each send reads one word.

use crate::connection::Connection;
use crate::error::{Result, Status};
use crate::fork;
use crate::outbox::{LOST, Note, Writer, stopped};
use crate::queue::{Event, Kind, Origin, Queue};
use crate::registry::{self, Running};
use crate::service::Service;
use crate::wire;
use async_nats::{HeaderMap, Subject};
use bytes::Bytes;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The worker's end of one stream. It comes with a `Request` event.
pub struct Sender {
    /// 0 while it may send; then, for ever, the status that says why not.
    word: AtomicU32,
    is_waiting_for_room: AtomicBool,
    is_freed: AtomicBool,
    sent: AtomicU64,
    number: u64,
    tag: u64,
    reply: Subject,
    answers_to: Option<u64>,
    client: Arc<str>,
    headers: Option<HeaderMap>,
    service: Arc<Service>,
    queue: Arc<Queue>,
    this: Weak<Sender>,
}

impl Sender {
    pub(crate) fn new(
        service: Arc<Service>,
        queue: Arc<Queue>,
        tag: u64,
        reply: Subject,
        client: Arc<str>,
        headers: Option<HeaderMap>,
    ) -> Arc<Sender> {
        Arc::new_cyclic(|this| Sender {
            word: AtomicU32::new(0),
            is_waiting_for_room: AtomicBool::new(false),
            is_freed: AtomicBool::new(false),
            sent: AtomicU64::new(0),
            number: fork::number(),
            tag,
            answers_to: registry::owner_of(&reply),
            reply,
            client,
            headers,
            service,
            queue,
            this: this.clone(),
        })
    }

    /// Sends one message; `Full` when there is no room now, and a `Writable` event when there is again.
    ///
    /// # Errors
    /// Why it may send no more; `TooLarge`, `Reserved`, `Full`.
    pub fn send(&self, data: &[u8]) -> Result<(), Status> {
        self.check(data)?;
        self.connection().outbox().send(&self.word, &self.reply, data, || self.wait_for_room())?;
        self.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Sends one message, waiting for room (`None`: without limit).
    ///
    /// # Errors
    /// As `send`, with `Timeout` in place of `Full`.
    pub fn send_wait(&self, data: &[u8], timeout: Option<Duration>) -> Result<(), Status> {
        self.check(data)?;
        self.connection().outbox().send_wait(&self.word, &self.reply, data, timeout)?;
        self.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Ends the stream. Once more is fine.
    ///
    /// # Errors
    /// Why it was stopped.
    pub fn end(&self) -> Result<(), Status> {
        match self.finish(|| Note::End(self.reply.clone())) {
            Ok(()) | Err(Status::Closed) => Ok(()),
            stopped => stopped,
        }
    }

    /// Ends the stream with an error, whose text the reader gets.
    ///
    /// # Errors
    /// `Closed` when it had ended; why it was stopped.
    pub fn error(&self, text: &[u8]) -> Result<(), Status> {
        self.finish(|| self.error_note(text))
    }

    /// Whether it may send no more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        stopped(&self.word).is_err()
    }

    /// How many messages it sent.
    #[must_use]
    pub fn send_count(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    /// 0 while it may send; then, for ever, the code of the status that says why not, as an unsigned number.
    #[must_use]
    pub fn status_word(&self) -> &AtomicU32 {
        &self.word
    }

    /// The first value of a header of the request.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        wire::header(self.headers.as_ref(), name)
    }

    /// Wants no more events of it. A stream that was not ended ends with an error.
    pub fn free(&self) {
        self.is_freed.store(true, Ordering::Release);
        self.abandon();
    }

    /// Ends a stream that nobody answers any longer.
    pub(crate) fn abandon(&self) {
        let _ = self.error(b"the worker left the stream unfinished");
    }

    /// Stops it because its connection was lost or closed.
    pub(crate) fn connection_ended(&self, why: Status) {
        if self.forbid(why) {
            registry::detach(&self.client, self.number);
            self.stopped(why);
        }
    }

    fn connection(&self) -> &Connection {
        self.service.connection()
    }

    fn check(&self, data: &[u8]) -> Result<(), Status> {
        stopped(&self.word)?;
        if data.len() > self.connection().max_payload() {
            return Err(Status::TooLarge);
        }
        if wire::is_reserved(data) {
            return Err(Status::Reserved);
        }
        Ok(())
    }

    fn finish(&self, note: impl FnOnce() -> Note) -> Result<(), Status> {
        self.connection().outbox().finish(&self.word, Status::Closed, note)?;
        self.service.forget(self.number);
        registry::detach(&self.client, self.number);
        Ok(())
    }

    fn error_note(&self, text: &[u8]) -> Note {
        Note::Error(self.reply.clone(), wire::error(text, self.connection().max_payload()))
    }

    /// Registers it as waiting for room, once.
    fn wait_for_room(&self) -> Option<Arc<dyn Writer>> {
        if self.is_waiting_for_room.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.this.upgrade().map(|this| this as Arc<dyn Writer>)
    }

    fn event(&self, kind: Kind, status: Status) {
        if let Some(this) = self.this.upgrade() {
            let event = Event::of(kind, status, self.tag, this, Bytes::new());
            self.queue.push(Event { client: Some(Arc::clone(&self.client)), ..event });
        }
    }
}

impl Running for Sender {
    fn forbid(&self, why: Status) -> bool {
        self.word.compare_exchange(0, why.code().cast_unsigned(), Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    fn stopped(&self, why: Status) {
        let text: &str = match why {
            Status::Offline => "the client is offline",
            Status::Disconnected => LOST,
            _ => "the worker closed its connection",
        };
        // Pushing it wakes a thread that waits for room, too.
        self.connection().outbox().push(self.error_note(text.as_bytes()).into());
        self.service.forget(self.number);
        self.event(Kind::Stopped, why);
    }

    fn requested_on(&self) -> Option<u64> {
        None
    }

    fn answers_to(&self) -> Option<u64> {
        self.answers_to
    }
}

impl Writer for Sender {
    fn room(&self) {
        self.is_waiting_for_room.store(false, Ordering::Release);
        if !self.is_closed() {
            self.event(Kind::Writable, Status::Ok);
        }
    }
}

impl Origin for Sender {
    fn number(&self) -> u64 {
        self.number
    }

    fn is_wanted(&self) -> bool {
        !self.is_freed.load(Ordering::Acquire)
    }

    fn abandoned(&self) {
        self.abandon();
    }
}

impl Event {
    /// The sender it is about.
    #[must_use]
    pub fn sender(&self) -> Option<Arc<Sender>> {
        self.origin()
    }
}
