//! The worker's end of a stream. It refuses to send the moment its client is gone: each send reads one word.

use crate::connection::Connection;
use crate::error::{Result, Status};
use crate::events::queue::{Event, EventSource, Kind, Queue, Single};
use crate::lane::driver::{Lane, StreamObserver};
use crate::lane::state::Credit;
use crate::nats::outbox::{BlockedSender, DurableMessage, LOST};
use crate::presence::registry::{self, Notice, Stoppable};
use crate::process::fork;
use crate::status_word::StatusWord;
use crate::wire::level0::{self, Headers};
use crate::worker::service::Service;
use async_nats::Subject;
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The worker's end of one stream. It comes with a `Request` event.
pub struct Sender {
    word: StatusWord,
    is_waiting_for_room: AtomicBool,
    /// A WRITABLE is in the queue.
    writable_queued: AtomicBool,
    is_freed: AtomicBool,
    /// Of its events REQUEST and STOPPED, those that have come, or are due.
    due: AtomicU8,
    sent: AtomicU64,
    handle_id: u64,
    reply: Subject,
    /// Where it sends, and its share in it, if the requester offered a lane; else to `reply`.
    lane: OnceCell<(Arc<Lane>, Arc<Credit>)>,
    client: Arc<str>,
    headers: Headers,
    service: Arc<Service>,
    this: Weak<Sender>,
}

const REQUEST: u8 = 1;
const STOPPED: u8 = 2;
/// Its REQUEST is in the queue no longer; it has ended: with both its place is free.
const SHOWN: u8 = 4;
const ENDED: u8 = 8;

impl Sender {
    pub(crate) fn new(service: Arc<Service>, reply: Subject, client: Arc<str>, headers: Headers) -> Arc<Sender> {
        Arc::new_cyclic(|this| Sender {
            word: StatusWord::default(),
            is_waiting_for_room: AtomicBool::new(false),
            writable_queued: AtomicBool::new(false),
            is_freed: AtomicBool::new(false),
            due: AtomicU8::new(0),
            sent: AtomicU64::new(0),
            handle_id: fork::next_handle_id(),
            reply,
            lane: OnceCell::new(),
            client,
            headers,
            service,
            this: this.clone(),
        })
    }

    /// Has it send on a lane from now on, before anybody uses it.
    pub(crate) fn use_lane(&self, lane: Arc<Lane>, credit: Arc<Credit>) {
        let (lane, credit) = self.lane.get_or_init(|| (lane, credit));
        if let Err(why) = self.word.check_after_publishing() {
            // It was stopped before it had a lane, so the lane has not sent its end.
            lane.stop(credit, reason(why).as_bytes());
        }
    }

    /// The REQUEST is in the queue: now STOPPED may come, and does, if it was due before.
    pub(crate) fn request_queued(&self) {
        self.mark_due(REQUEST);
    }

    pub(crate) fn is_on_lane(&self) -> bool {
        self.lane.get().is_some()
    }

    /// Sends one message; `Full` when there is no room now, and a `Writable` event when there is again.
    ///
    /// # Errors
    /// Why it may send no more; `TooLarge`, `Reserved`, `Full`.
    #[inline]
    pub fn send(&self, data: &[u8]) -> Result<(), Status> {
        if let Some((lane, credit)) = self.lane.get() {
            return lane.send(&self.word, credit, data).inspect_err(|why| self.stop_if_peer_gone(*why));
        }
        self.check(data)?;
        self.connection().outbox().send(&self.word, &self.reply, data, || self.wait_for_room())?;
        self.sent.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    /// Sends messages that stand one behind the other in `data`, up to the first that is refused: how many were sent.
    ///
    /// # Errors
    /// As `send`, when the first is refused; `Invalid` when the lengths are not those of `data`.
    pub fn send_many(&self, data: &[u8], lengths: &[usize]) -> Result<usize, Status> {
        if lengths.iter().try_fold(0, |sum: usize, length| sum.checked_add(*length)) != Some(data.len()) {
            return Err(Status::Invalid);
        }
        if lengths.is_empty() {
            return Ok(0);
        }
        if let Some((lane, credit)) = self.lane.get() {
            return lane.send_many(&self.word, credit, data, lengths).inspect_err(|why| self.stop_if_peer_gone(*why));
        }
        let mut rest = data;
        for (sent, length) in lengths.iter().enumerate() {
            let (message, behind) = rest.split_at(*length);
            match self.send(message) {
                Ok(()) => rest = behind,
                Err(status) if sent == 0 => return Err(status),
                Err(_) => return Ok(sent),
            }
        }
        Ok(lengths.len())
    }

    /// Sends one message, waiting for room (`None`: without limit).
    ///
    /// # Errors
    /// As `send`, with `Timeout` in place of `Full`.
    #[inline]
    pub fn send_wait(&self, data: &[u8], timeout: Option<Duration>) -> Result<(), Status> {
        if let Some((lane, credit)) = self.lane.get() {
            return lane.send_wait(&self.word, credit, data, timeout).inspect_err(|why| self.stop_if_peer_gone(*why));
        }
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
        match self.finish(None) {
            Ok(()) | Err(Status::Closed) => Ok(()),
            stopped => stopped,
        }
    }

    /// Ends the stream with an error, whose text the reader gets.
    ///
    /// # Errors
    /// `Closed` when it had ended; why it was stopped.
    pub fn error(&self, text: &[u8]) -> Result<(), Status> {
        self.finish(Some(text))
    }

    /// Whether it may send no more.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.word.check().is_err()
    }

    /// How large a message may be, in bytes. It depends on the server of the present connection.
    #[must_use]
    pub fn max_message(&self) -> usize {
        level0::max_message(self.connection().max_payload())
    }

    /// How many messages it sent.
    #[must_use]
    pub fn send_count(&self) -> u64 {
        self.lane.get().map_or_else(|| self.sent.load(Ordering::Relaxed), |(_, credit)| credit.sent())
    }

    /// Says whether it may send, and why not.
    #[must_use]
    pub fn status_word(&self) -> &StatusWord {
        &self.word
    }

    /// The first value of a header of the request.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        if name == level0::CONNECT_ID {
            return Some(&*self.client).filter(|client| !client.is_empty());
        }
        self.headers.iter().find(|(own, _)| **own == *name).map(|(_, value)| &**value)
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

    /// Its connection was lost or closed: a loss concerns only what is not on a lane.
    pub(crate) fn connection_ended(&self, why: Status) {
        if why == Status::Closed || self.lane.get().is_none() {
            self.stop(why);
        }
    }

    /// Whether it answers at this subject, on level 0.
    pub(crate) fn answers(&self, subject: &str) -> bool {
        self.reply.as_str() == subject
    }

    /// nats-server does not pass on what it sends.
    pub(crate) fn refused(&self) {
        self.stop(Status::Disconnected);
    }

    /// A call may find the other end gone before we are told: what it said is the stream's end.
    fn stop_if_peer_gone(&self, why: Status) {
        if why == Status::PeerGone {
            self.stop(why);
        }
    }

    fn stop(&self, why: Status) {
        if self.word.try_stop(why) {
            registry::detach(&self.client, self.handle_id);
            self.stopped(why, true);
        }
    }

    fn connection(&self) -> &Connection {
        self.service.connection()
    }

    fn check(&self, data: &[u8]) -> Result<(), Status> {
        self.word.check()?;
        if data.len() > self.max_message() {
            return Err(Status::TooLarge);
        }
        if level0::is_reserved(data) {
            return Err(Status::Reserved);
        }
        Ok(())
    }

    fn finish(&self, error: Option<&[u8]>) -> Result<(), Status> {
        self.word.check()?;
        // Before the reader can see the end: its next request is to find a free place.
        self.leave(ENDED);
        match self.lane.get() {
            Some((lane, credit)) => {
                lane.finish(&self.word, Status::Closed, credit, error)
                    .inspect_err(|why| self.stop_if_peer_gone(*why))?;
            }
            None => self.connection().outbox().finish(&self.word, Status::Closed, || match error {
                None => DurableMessage::End(self.reply.clone()),
                Some(text) => self.error_note(text),
            })?,
        }
        self.leave_service();
        registry::detach(&self.client, self.handle_id);
        Ok(())
    }

    fn error_note(&self, text: &[u8]) -> DurableMessage {
        DurableMessage::Error(self.reply.clone(), level0::error(text, self.connection().max_payload()))
    }

    /// Registers it as waiting for room, once.
    fn wait_for_room(&self) -> Option<Arc<dyn BlockedSender>> {
        if self.is_waiting_for_room.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.this.upgrade().map(|this| this as Arc<dyn BlockedSender>)
    }

    /// Whichever of both comes second tells of the stop: no STOPPED comes before its REQUEST.
    fn mark_due(&self, event: u8) {
        let before = self.due.fetch_or(event, Ordering::AcqRel);
        if before & event == 0
            && (before | event) & (REQUEST | STOPPED) == (REQUEST | STOPPED)
            && let Err(why) = self.word.check()
        {
            self.event(Kind::Stopped, why);
        }
    }

    /// It has ended: said once.
    fn leave_service(&self) {
        self.service.forget(self.handle_id);
        self.leave(ENDED);
    }

    /// Whichever of both comes second frees its place among the service's streams.
    fn leave(&self, event: u8) {
        let before = self.due.fetch_or(event, Ordering::AcqRel);
        if before & event == 0 && (before | event) & (SHOWN | ENDED) == (SHOWN | ENDED) {
            self.service.free_place();
        }
    }

    fn event(&self, kind: Kind, status: Status) {
        if let Some(this) = self.this.upgrade() {
            let event = Single::of(kind, status, this, Bytes::new());
            self.service.queue().push(Single { client: Some(Arc::clone(&self.client)), ..event });
        }
    }
}

/// What its reader is told of why a sender was stopped.
fn reason(why: Status) -> &'static str {
    match why {
        Status::Offline => level0::OFFLINE,
        Status::Disconnected => LOST,
        Status::Internal => "the worker's end of the lane has failed",
        _ => "the worker closed its connection",
    }
}

impl Stoppable for Sender {
    fn status_word(&self) -> &StatusWord {
        &self.word
    }

    fn stopped(&self, why: Status, _is_announced: bool) {
        let text = reason(why);
        // Either wakes a thread that waits for room, too.
        match self.lane.get() {
            Some((lane, credit)) => lane.stop(credit, text.as_bytes()),
            None => self.connection().outbox().push(self.error_note(text.as_bytes()).into()),
        }
        self.leave_service();
        self.mark_due(STOPPED);
    }

    fn requested_on(&self) -> Option<u64> {
        None
    }

    fn notice(&self) -> Notice {
        Notice::Direct
    }

    fn answers_to(&self) -> Option<u64> {
        registry::owner_of(&self.reply)
    }
}

impl StreamObserver for Sender {
    fn queue(&self) -> &Arc<Queue> {
        self.service.queue()
    }

    fn cancelled(&self, why: Status) {
        self.stop(why);
    }

    fn room(&self) {
        BlockedSender::room(self);
    }

    fn peer_gone(&self, knew: bool) {
        if !knew {
            self.unheard();
        }
        self.stop(Status::PeerGone);
    }

    fn unheard(&self) {
        // Should the gateway be there after all, it waits for an answer.
        self.connection().outbox().push(self.error_note(LOST.as_bytes()).into());
    }

    fn ended_here(&self, why: Status) {
        self.stop(why);
    }
}

impl BlockedSender for Sender {
    fn room(&self) {
        self.is_waiting_for_room.store(false, Ordering::Release);
        if !self.is_closed() && !self.writable_queued.swap(true, Ordering::AcqRel) {
            self.event(Kind::Writable, Status::Ok);
        }
    }
}

impl EventSource for Sender {
    fn handle_id(&self) -> u64 {
        self.handle_id
    }

    fn tag(&self) -> u64 {
        self.service.tag()
    }

    fn is_running(&self) -> bool {
        !self.is_closed()
    }

    fn is_wanted(&self) -> bool {
        !self.is_freed.load(Ordering::Acquire)
    }

    fn shown(&self, kind: Kind) {
        match kind {
            Kind::Writable => self.writable_queued.store(false, Ordering::Release),
            _ => self.leave(SHOWN),
        }
    }

    fn abandoned(&self) {
        self.leave(SHOWN);
        self.abandon();
    }
}

impl Event<'_> {
    /// The sender it is about.
    #[must_use]
    pub fn sender(&self) -> Option<Arc<Sender>> {
        self.origin()
    }
}
