//! The worker's end of a stream. Each send reads its status word, so it refuses to send as soon as its client has left.

use crate::connection::Connection;
use crate::error::{Result, Status};
use crate::events::{Event, EventSource, Kind, Queue, Single, Source};
use crate::lane::driver::{Lane, StreamObserver};
use crate::lane::event::LaneEvent;
use crate::lane::streams::SendWindow;
use crate::metrics::{ServiceCounters, StopTimer, StreamTimes};
use crate::nats::outbox::{BlockedSender, DurableMessage, LOST, Outbox};
use crate::presence::registry::{self, Notice, Stoppable};
use crate::status_word::StatusWord;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::wire::level0::{self, Headers};
use crate::wire::stream_error::StreamError;
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::sync::{Arc, Weak};
use std::time::Duration;

/// The worker's end of one stream. It comes with a `Request` event.
pub struct Sender {
    source: Source,
    /// It is registered to be notified when it can send again.
    is_blocked: AtomicBool,
    /// A WRITABLE event is in the queue.
    writable_queued: AtomicBool,
    /// What has happened: the bits below.
    steps: AtomicU8,
    times: StreamTimes,
    stop_timer: StopTimer,
    /// Messages sent on level 0.
    sent: AtomicU64,
    reply: Box<str>,
    /// The lane that the requester offered, and the stream's share of it.
    lane: OnceCell<(Arc<Lane>, Arc<SendWindow>)>,
    client: Arc<str>,
    headers: Headers,
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    service: Arc<dyn SenderObserver>,
    this: Weak<Sender>,
}

/// The REQUEST event is in the queue, and the sender was stopped: after both, STOPPED is queued.
const REQUEST_QUEUED: u8 = 1;
const STOPPED: u8 = 2;
/// The REQUEST event has left the queue, and the stream has ended: after both, the service has capacity for another
/// one.
const REQUEST_TAKEN: u8 = 4;
const ENDED: u8 = 8;

/// The service of a sender.
pub(crate) trait SenderObserver: Send + Sync {
    /// What the service counts.
    fn counters(&self) -> &ServiceCounters;
    /// The sender with this handle id has ended. Called once.
    fn sender_ended(&self, handle_id: u64);
    /// The sender has ended, and its REQUEST event has left the queue. Called once.
    fn capacity_freed(&self);
}

/// How the messages of a stream are sent.
enum Route<'a> {
    /// As plain NATS messages to the reply subject.
    Level0(&'a Outbox),
    Lane(&'a Lane, &'a SendWindow),
}

impl Sender {
    pub(crate) fn new(
        service: Arc<dyn SenderObserver>,
        connection: Arc<Connection>,
        queue: Arc<Queue>,
        tag: u64,
        reply: Box<str>,
        client: Arc<str>,
        headers: Headers,
    ) -> Arc<Sender> {
        let times = StreamTimes::begin(&service.counters().streams);
        times.started();
        Arc::new_cyclic(|this| Sender {
            source: Source::new(tag),
            is_blocked: AtomicBool::new(false),
            writable_queued: AtomicBool::new(false),
            steps: AtomicU8::new(0),
            times,
            stop_timer: StopTimer::default(),
            sent: AtomicU64::new(0),
            reply,
            lane: OnceCell::new(),
            client,
            headers,
            connection,
            queue,
            service,
            this: this.clone(),
        })
    }

    /// Sets the tag of the sender's `Stopped` and `Writable` events. It is that of the service at first.
    pub fn set_tag(&self, tag: u64) {
        self.source.tag.store(tag, Ordering::Relaxed);
    }

    /// Switches to a lane. Called before the worker gets the sender.
    pub(crate) fn use_lane(&self, lane: Arc<Lane>, window: Arc<SendWindow>) {
        let (lane, window) = self.lane.get_or_init(|| (lane, window));
        if let Err(why) = self.source.word.check_after_publishing() {
            // It was stopped before it had a lane, so the lane has not sent its end.
            lane.stop(window, reason(why).as_bytes());
        }
    }

    #[inline]
    fn route(&self) -> Route<'_> {
        match self.lane.get() {
            Some((lane, window)) => Route::Lane(lane, window),
            None => Route::Level0(&self.connection.outbox),
        }
    }

    /// The REQUEST event is in the queue: STOPPED may follow it, and is queued now if the sender was stopped before.
    pub(crate) fn request_queued(&self) {
        self.queue_stopped_after(REQUEST_QUEUED);
    }

    pub(crate) fn is_on_lane(&self) -> bool {
        matches!(self.route(), Route::Lane(..))
    }

    /// Sends one message. After `Full`, a `Writable` event says when to try again.
    ///
    /// # Errors
    /// Why the stream has ended; `TooLarge`, `Reserved`, `Full`.
    #[inline]
    pub fn send(&self, data: &[u8]) -> Result<(), Status> {
        match self.route() {
            Route::Lane(lane, window) => {
                self.on_lane(lane.send(&self.source.word, window, data, || self.times.first_message()))
            }
            Route::Level0(outbox) => {
                self.on_level0(data, || outbox.send(&self.source.word, &self.reply, data, || self.register_blocked()))
            }
        }
    }

    /// Sends several messages, which are concatenated in `data`, up to the first that is refused. Returns how many were
    /// sent.
    ///
    /// # Errors
    /// As `send` if the first is refused; `Invalid` if the lengths do not add up to that of `data`.
    pub fn send_many(&self, data: &[u8], lengths: &[usize]) -> Result<usize, Status> {
        if lengths.iter().try_fold(0, |sum: usize, length| sum.checked_add(*length)) != Some(data.len()) {
            return Err(Status::Invalid);
        }
        if lengths.is_empty() {
            return Ok(0);
        }
        if let Route::Lane(lane, window) = self.route() {
            return self
                .on_lane(lane.send_many(&self.source.word, window, data, lengths, || self.times.first_message()));
        }
        let mut rest = data;
        for (sent, length) in lengths.iter().enumerate() {
            let (message, following) = rest.split_at(*length);
            match self.send(message) {
                Ok(()) => rest = following,
                Err(status) if sent == 0 => return Err(status),
                Err(_) => return Ok(sent),
            }
        }
        Ok(lengths.len())
    }

    /// Sends one message. Where `send` would return `Full`, waits until it is sent (`None`: without limit).
    ///
    /// # Errors
    /// As `send`, with `Timeout` in place of `Full`.
    #[inline]
    pub fn send_wait(&self, data: &[u8], timeout: Option<Duration>) -> Result<(), Status> {
        match self.route() {
            Route::Lane(lane, window) => {
                self.on_lane(lane.send_wait(&self.source.word, window, data, timeout, || self.times.first_message()))
            }
            Route::Level0(outbox) => {
                self.on_level0(data, || outbox.send_wait(&self.source.word, &self.reply, data, timeout))
            }
        }
    }

    /// Ends the stream. A second call has no effect.
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
    /// `Closed` if it had ended; why it was stopped.
    pub fn error(&self, text: &[u8]) -> Result<(), Status> {
        self.finish(Some(StreamError::new(text)))
    }

    /// As `error`, and the reader also gets a code, which the application chooses: 1 to 2,147,483,647, or 0 for none.
    ///
    /// # Errors
    /// As `error`; `Invalid` for a negative code, and the stream goes on.
    pub fn error_with_code(&self, code: i32, text: &[u8]) -> Result<(), Status> {
        if code < 0 {
            return Err(Status::Invalid);
        }
        self.finish(Some(StreamError { code, text }))
    }

    /// Whether the stream has ended, so that no message can be sent.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        !self.source.is_running()
    }

    /// The size limit of a message, in bytes. It depends on the nats-server of the present connection.
    #[must_use]
    pub fn max_message(&self) -> usize {
        level0::max_message(self.connection.max_payload())
    }

    /// How many messages were sent.
    #[must_use]
    pub fn send_count(&self) -> u64 {
        match self.route() {
            Route::Lane(_, window) => window.sent(),
            Route::Level0(_) => self.sent.load(Ordering::Relaxed),
        }
    }

    /// Says whether it may send, and why not.
    #[must_use]
    pub fn status_word(&self) -> &StatusWord {
        &self.source.word
    }

    /// The first value of a header of the request.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        if name == level0::CONNECT_ID {
            return Some(&*self.client).filter(|client| !client.is_empty());
        }
        self.headers.iter().find(|(own, _)| **own == *name).map(|(_, value)| &**value)
    }

    /// The request's header number `index`, counted from 0: its name and value. The client's id comes first; a name with
    /// several values has a number for each of them.
    #[must_use]
    pub fn header_at(&self, index: usize) -> Option<(&str, &str)> {
        let client = Some((level0::CONNECT_ID, &*self.client)).filter(|(_, client)| !client.is_empty());
        client.into_iter().chain(self.headers.iter().map(|(name, value)| (&**name, &**value))).nth(index)
    }

    /// The request's reply subject, which the messages of a stream on level 0 are sent to.
    #[must_use]
    pub fn reply(&self) -> &str {
        &self.reply
    }

    /// Drops the events that are still queued for it. A stream that has not ended ends with an error.
    pub fn free(&self) {
        self.source.set_freed();
        self.abandon();
    }

    fn abandon(&self) {
        let _ = self.error(b"the worker left the stream unfinished");
    }

    /// Ends the stream because its connection was lost or closed. A lane outlives a lost connection.
    pub(crate) fn connection_ended(&self, why: Status) {
        if why == Status::Closed || !self.is_on_lane() {
            self.stop(why);
        }
    }

    /// Whether it sends to this subject, on level 0.
    pub(crate) fn sends_to(&self, subject: &str) -> bool {
        *self.reply == *subject
    }

    /// Ends the stream because nats-server refuses its messages.
    pub(crate) fn refused(&self) {
        self.stop(Status::Disconnected);
    }

    /// A call may learn that the peer is gone before the lane reports it: then its result is the stream's end.
    #[inline]
    fn on_lane<T>(&self, result: Result<T, Status>) -> Result<T, Status> {
        result.inspect_err(|why| {
            if *why == Status::PeerGone {
                self.stop(*why);
            }
        })
    }

    fn stop(&self, why: Status) {
        if self.source.word.try_stop(why) {
            registry::detach(&self.client, self.source.handle_id);
            self.stopped(why, true);
        }
    }

    #[inline]
    fn on_level0(&self, data: &[u8], send: impl FnOnce() -> Result<(), Status>) -> Result<(), Status> {
        self.source.word.check()?;
        if data.len() > self.max_message() {
            return Err(Status::TooLarge);
        }
        if level0::is_reserved(data) {
            return Err(Status::Reserved);
        }
        send()?;
        if self.sent.fetch_add(1, Ordering::Relaxed) == 0 {
            self.times.first_message();
        }
        Ok(())
    }

    fn finish(&self, error: Option<StreamError<'_>>) -> Result<(), Status> {
        self.stop_timer.released(&self.times);
        self.source.word.check()?;
        // Before the reader can see the end, so that the service has capacity for the reader's next request.
        self.free_capacity_after(ENDED);
        match self.route() {
            Route::Lane(lane, window) => self.on_lane(lane.finish(&self.source.word, window, error))?,
            Route::Level0(outbox) => outbox.finish(&self.source.word, || match error {
                None => DurableMessage::End(self.reply.clone()),
                Some(error) => self.error_message(error),
            })?,
        }
        self.leave_service(match error {
            None => Status::Ok,
            // The host has refused the request itself.
            Some(error) if *error.text == *level0::BUSY.as_bytes() => Status::Busy,
            Some(_) => Status::Remote,
        });
        registry::detach(&self.client, self.source.handle_id);
        Ok(())
    }

    fn error_message(&self, error: StreamError<'_>) -> DurableMessage {
        let StreamError { code, text } = error;
        let header = if code == 0 { 0 } else { level0::MAX_ERROR_CODE };
        let max = self.connection.max_payload().saturating_sub(header);
        DurableMessage::Error { to: self.reply.clone(), code, payload: level0::error(text, max) }
    }

    /// Itself, to be notified when it can send again; None if it is registered for that already.
    fn register_blocked(&self) -> Option<Arc<dyn BlockedSender>> {
        if self.is_blocked.swap(true, Ordering::AcqRel) {
            return None;
        }
        self.this.upgrade().map(|this| this as Arc<dyn BlockedSender>)
    }

    /// Notes a step. Returns true if it is the last of `all` and was not noted before.
    fn completes(&self, step: u8, all: u8) -> bool {
        let before = self.steps.fetch_or(step, Ordering::AcqRel);
        before & step == 0 && (before | step) & all == all
    }

    /// Queues STOPPED after the second of two steps, so that it never comes before the REQUEST.
    fn queue_stopped_after(&self, step: u8) {
        if self.completes(step, REQUEST_QUEUED | STOPPED)
            && let Err(why) = self.source.word.check()
        {
            self.push_event(Kind::Stopped, why);
        }
    }

    /// Frees its capacity in the service after the second of two steps.
    fn free_capacity_after(&self, step: u8) {
        if self.completes(step, REQUEST_TAKEN | ENDED) {
            self.service.capacity_freed();
        }
    }

    /// Called once, when the stream has ended. `status`: as the reader's end has it, unless that is stopped itself.
    /// Returns how long it ran.
    fn leave_service(&self, status: Status) -> Duration {
        let duration = self.times.ended(status);
        self.service.sender_ended(self.source.handle_id);
        self.free_capacity_after(ENDED);
        duration
    }

    /// The peer is gone, and may not have the ACCEPT of this stream.
    fn accept_undelivered(&self) {
        // If the gateway is there after all, it waits for an answer.
        self.connection.outbox.push(self.error_message(StreamError::new(LOST.as_bytes())).into());
    }

    fn push_event(&self, kind: Kind, status: Status) {
        if let Some(this) = self.this.upgrade() {
            let event = Single::of(kind, status, this, Bytes::new());
            self.queue.push(Single { client: Some(Arc::clone(&self.client)), ..event });
        }
    }
}

/// The text that the reader gets when a sender is stopped.
fn reason(why: Status) -> &'static str {
    match why {
        Status::Offline => level0::OFFLINE,
        Status::Disconnected => LOST,
        Status::Internal => "the worker's end of the lane has failed",
        _ => "the worker closed its connection",
    }
}

impl Stoppable for Sender {
    fn stopped(&self, why: Status, _is_announced: bool) {
        let text = reason(why).as_bytes();
        // Both also wake a thread that is blocked in `send_wait`.
        match self.route() {
            Route::Lane(lane, window) => lane.stop(window, text),
            Route::Level0(outbox) => outbox.push(self.error_message(StreamError::new(text)).into()),
        }
        let duration = self.leave_service(why);
        self.stop_timer.stopped(&self.times, duration);
        self.queue_stopped_after(STOPPED);
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
        &self.queue
    }

    fn notify(&self, event: LaneEvent) {
        match event {
            LaneEvent::Cancelled(reason) => {
                let is_offline = reason == Status::Offline.code().unsigned_abs() as u8;
                self.stop(if is_offline { Status::Offline } else { Status::Cancelled });
            }
            LaneEvent::Writable => self.writable(),
            LaneEvent::PeerGone { accept_acked } => {
                if !accept_acked {
                    self.accept_undelivered();
                }
                self.stop(Status::PeerGone);
            }
            LaneEvent::AcceptUndelivered => self.accept_undelivered(),
            // Only streams have these.
            LaneEvent::Data { .. } | LaneEvent::Ended | LaneEvent::Failed(..) | LaneEvent::WindowExceeded => {}
        }
    }

    fn closed_here(&self, why: Status) {
        self.stop(why);
    }
}

impl BlockedSender for Sender {
    fn writable(&self) {
        self.is_blocked.store(false, Ordering::Release);
        if !self.is_closed() && !self.writable_queued.swap(true, Ordering::AcqRel) {
            self.push_event(Kind::Writable, Status::Ok);
        }
    }
}

impl EventSource for Sender {
    fn source(&self) -> &Source {
        &self.source
    }

    fn left_queue(&self, kind: Kind, _count: u64, _bytes: u64, is_delivered: bool) {
        match kind {
            Kind::Request => {
                self.free_capacity_after(REQUEST_TAKEN);
                if !is_delivered {
                    self.abandon();
                }
            }
            Kind::Writable => self.writable_queued.store(false, Ordering::Release),
            _ => {}
        }
    }
}

impl Event<'_> {
    /// The sender it is about.
    #[must_use]
    pub fn sender(&self) -> Option<Arc<Sender>> {
        self.source()
    }
}
