//! The gateway's side: a stream requested from a worker.

use crate::config::{Config, RequestOptions};
use crate::connection::{Connection, count};
use crate::error::{Error, Result, Status};
use crate::events::queue::{Event, EventSource, Kind, Queue, Single, unpin};
use crate::gateway::unanswered::Unanswered;
use crate::lane::driver::{Accepted, Lane, StreamObserver};
use crate::lane::state::{Grant, OVERHEAD};
use crate::nats::inbound::MessageHandler;
use crate::nats::outbox::Request;
use crate::presence::client_id;
use crate::presence::registry::{self, Notice, Stoppable};
use crate::process::fork;
use crate::process::random;
use crate::status_word::StatusWord;
use crate::sync::Mutex;
use crate::wire::level0::{self, Answer, Use};
use async_nats::{HeaderMap, Message, StatusCode};
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::task::AbortHandle;

/// The most that a worker may send on a lane before its reader has taken something.
const MAX_WINDOW: u32 = 4 << 20;
/// The same unless `stream_buffer_bytes` is set.
const WINDOW: u32 = 256 << 10;
/// The same once the windows of the connection's streams add up to `receive_buffer_bytes`.
const SMALL_WINDOW: u32 = 8 << 10;
/// What may wait for a reader on level 0, where nothing holds the worker back, unless `stream_buffer_bytes` is set.
const LEVEL_0_LIMIT: u64 = 64 << 20;
/// With more than `receive_buffer_bytes` unread, streams of level 0 end that have this part of it waiting.
const LARGE_PART: u64 = 64;

/// A stream that this process requested.
pub struct Stream {
    handle_id: u64,
    tag: u64,
    this: Weak<Stream>,
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    client: Box<str>,
    word: StatusWord,
    is_freed: AtomicBool,
    /// NOT_ASKED, ASKED, LEVEL_0 or LANE: what its worker has answered so far.
    answer: AtomicU8,
    /// Whether the request offered a lane.
    offers_lane: bool,
    /// JetStream's acknowledgement has come, and was ignored: there is one for each request.
    was_stored: AtomicBool,
    /// What was received and not yet taken (or, with manual credit, used), and how much that may be.
    waiting: AtomicU64,
    limit: u64,
    /// How far a worker on a lane may be ahead.
    window: u32,
    /// With manual credit: what has left the queue and was not used yet.
    held: Option<Box<Mutex<Held>>>,
    /// Its number in the inbox, which only those know who were asked.
    key: u64,
    /// The lane that it runs on, and its number there.
    lane: OnceCell<(Arc<Lane>, u32)>,
    grant: Grant,
    /// Until a worker accepts it on a lane.
    asking: Mutex<Option<Box<Asking>>>,
    timer: Mutex<Option<AbortHandle>>,
}

/// No worker has the request: it was not sent, or was refused.
const NOT_ASKED: u8 = 0;
/// The request was sent, and no worker has answered.
const ASKED: u8 = 1;
/// A worker has answered on level 0.
const LEVEL_0: u8 = 2;
/// A worker has accepted on a lane.
const LANE: u8 = 3;

/// Messages in the hands of a reader who tells when they are used.
#[derive(Default)]
struct Held {
    count: u64,
    bytes: u64,
}

impl Held {
    fn add(&mut self, count: u64, bytes: u64) {
        self.count += count;
        self.bytes += bytes;
    }

    /// What was taken with so many bytes used: as large a part of the messages as of their bytes. All of them are when all
    /// bytes are, so that a reader need not count messages, and those without bytes are held back too.
    fn take(&mut self, bytes: u64) -> u64 {
        let bytes = bytes.min(self.bytes);
        let count = if bytes == self.bytes { self.count } else { self.count * bytes / self.bytes };
        self.count -= count;
        self.bytes -= bytes;
        bytes + count * OVERHEAD
    }
}

/// Whom it asks, and how to ask again.
struct Asking {
    subject: Box<str>,
    retry: Option<Box<Retry>>,
}

struct Retry {
    request: Request,
    left: u32,
    delay: Duration,
}

impl Connection {
    /// Requests a stream for a client (empty id: for nobody): its messages are `Data` events with `tag` on `queue`, and
    /// then exactly one `End` or `Error`.
    ///
    /// # Errors
    /// `Invalid`, `TooLarge`, `Full`, `Disconnected`, `Closed`.
    pub fn request(
        &self,
        queue: &Arc<Queue>,
        subject: &str,
        data: &[u8],
        client: &[u8],
        config: &Config,
        tag: u64,
    ) -> Result<Arc<Stream>> {
        self.request_known(queue, subject, data, client, config, tag, |_| {})
    }

    /// As `request`; `known` hears of the stream before any event of it can come.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn request_known(
        &self,
        queue: &Arc<Queue>,
        subject: &str,
        data: &[u8],
        client: &[u8],
        config: &Config,
        tag: u64,
        known: impl FnOnce(&Arc<Stream>),
    ) -> Result<Arc<Stream>> {
        level0::check_subject("subject", subject, Use::Publish)?;
        let client = client_id::id(client)?;
        let options = config.for_request()?;
        let mut headers = headers(client, options)?;
        let (key, window) = (random::random_u64(), self.window(options.stream_buffer));
        let offer = self.lanes().and_then(|lanes| lanes.offer(key, window));
        let offers_lane = offer.is_some();
        if let Some(offer) = offer {
            headers.insert(level0::LANE, offer);
        }
        let headers = Some(headers).filter(|headers| !headers.is_empty());
        self.check_connected()?;
        let size = data.len() + headers.as_ref().map_or(0, wire_len);
        if size > self.max_payload() {
            let text = format!(
                "request of {size} bytes, headers included, is too large: the server takes {}",
                self.max_payload()
            );
            return Err(Error::new(Status::TooLarge, text));
        }
        let connection = self.shared()?;
        // Subtracted again when the stream is dropped.
        self.counters.windows.fetch_add(window.into(), Ordering::Relaxed);
        let stream = Arc::new_cyclic(|this| Stream {
            handle_id: fork::next_handle_id(),
            tag,
            this: this.clone(),
            connection,
            queue: Arc::clone(queue),
            client: client.into(),
            word: StatusWord::default(),
            is_freed: AtomicBool::new(false),
            answer: AtomicU8::new(ASKED),
            offers_lane,
            was_stored: AtomicBool::new(false),
            waiting: AtomicU64::new(0),
            limit: options.stream_buffer.map_or(LEVEL_0_LIMIT, |limit| limit as u64),
            window,
            held: options.manual_credit.then(Box::default),
            key,
            lane: OnceCell::new(),
            grant: Grant::new(window.into()),
            asking: Mutex::new(None),
            timer: Mutex::new(None),
        });
        known(&stream);
        let reply = self.inbox().expect(key, Arc::clone(&stream) as Arc<dyn MessageHandler>);
        count(&self.counters.streams);
        let request = Request { subject: subject.into(), reply, headers, payload: Bytes::copy_from_slice(data), size };
        let (left, delay) = (options.retries, options.retry_delay);
        let retry = (left > 0).then(|| Box::new(Retry { request: request.clone(), left, delay }));
        *stream.asking.lock() = Some(Box::new(Asking { subject: subject.into(), retry }));
        // Before it is sent: an offline mark from now on finds the stream.
        if options.only_online {
            if !registry::attach_if_online(client, stream.handle_id, Arc::clone(&stream) as _) && stream.withdraw() {
                let text = format!("client {client:?} is offline in this process, and only_online is set");
                return Err(Error::new(Status::Offline, text));
            }
        } else {
            registry::attach(client, stream.handle_id, Arc::clone(&stream) as _);
        }
        if stream.word.check().is_err() {
            // Ended before it was attached.
            registry::detach(client, stream.handle_id);
        }
        // After `expect`: a connection lost before has not ended this stream.
        let sent = self.check_connected().and_then(|()| Ok(self.outbox().request(&stream.word, request)?));
        if let Err(error) = sent
            && stream.withdraw()
        {
            return Err(error);
        }
        // Where somebody ended it meanwhile its last event is in the queue, and tells why.
        if let Some(timeout) = options.timeout {
            stream.end_after(timeout);
        }
        Ok(stream)
    }

    /// How far a worker on a lane may be ahead of the reader of a stream that is requested now.
    fn window(&self, stream_buffer: Option<usize>) -> u32 {
        let wanted = stream_buffer.map_or(WINDOW, |limit| u32::try_from(limit).unwrap_or(MAX_WINDOW).min(MAX_WINDOW));
        let taken = self.counters.windows.load(Ordering::Relaxed);
        if taken + u64::from(wanted) > self.receive_buffer() { wanted.min(SMALL_WINDOW) } else { wanted }
    }
}

/// The status of a stream that the other end ended with this text.
fn error_status(text: &[u8]) -> Status {
    if text == level0::BUSY.as_bytes() {
        Status::Busy
    } else if text == level0::OFFLINE.as_bytes() {
        Status::Offline
    } else {
        Status::Remote
    }
}

/// The request's headers: the client's id, and the caller's own.
fn headers(client: &str, options: &RequestOptions) -> Result<HeaderMap> {
    let mut headers = options.headers.clone();
    if !client.is_empty() {
        if client.trim() != client {
            return Err(Error::invalid(format!(
                "client id {client:?} begins or ends with white space, which is lost in a header: it may not in a request"
            )));
        }
        headers.insert(level0::CONNECT_ID, level0::value_of(client)?);
    }
    Ok(headers)
}

/// What headers add to a payload, as the server counts.
fn wire_len(headers: &HeaderMap) -> usize {
    let lines = headers.iter().flat_map(|(name, values)| {
        let name: &str = name.as_ref();
        values.iter().map(move |value| name.len() + value.as_str().len() + ": \r\n".len())
    });
    "NATS/1.0\r\n\r\n".len() + lines.sum::<usize>()
}

impl Stream {
    pub(crate) fn handle_id(&self) -> u64 {
        self.handle_id
    }

    /// Cancels it: it ends with `Cancelled`, and its worker is told as far as the wire can.
    ///
    /// # Errors
    /// `Closed` when it had ended.
    pub fn cancel(&self) -> Result<()> {
        if !self.end_here(Status::Cancelled, "the stream was cancelled") {
            return Err(Error::new(Status::Closed, "the stream has ended already"));
        }
        Ok(())
    }

    /// With `manual_credit`: so many bytes of its messages were used, and the worker may send as many more. Without it has
    /// no effect.
    ///
    /// # Errors
    /// `Closed` when it has ended.
    pub fn consumed(&self, bytes: u64) -> Result<()> {
        if self.word.check().is_err() {
            return Err(Error::new(Status::Closed, "the stream has ended already"));
        }
        if let Some(held) = &self.held {
            let used = held.lock().take(bytes);
            self.give_room(used);
        }
        Ok(())
    }

    fn give_room(&self, weight: u64) {
        match self.lane.get() {
            Some((lane, stream)) => {
                if let Some(told) = self.grant.take(weight) {
                    lane.grant(*stream, told);
                }
            }
            None => {
                let less = |waiting: u64| Some(waiting.saturating_sub(weight));
                if let Ok(waiting) = self.waiting.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
                    self.connection.counters.unread.fetch_sub(weight.min(waiting), Ordering::Relaxed);
                }
            }
        }
    }

    /// Wants no more events of it. One that runs is cancelled.
    pub fn free(&self) {
        self.is_freed.store(true, Ordering::Release);
        self.end_here(Status::Cancelled, "");
    }

    /// Takes it all back: nobody has heard of it. False if it was ended meanwhile, and that was told.
    fn withdraw(&self) -> bool {
        let is_first = self.word.try_stop(Status::Cancelled);
        if is_first {
            self.is_freed.store(true, Ordering::Release);
            registry::detach(&self.client, self.handle_id);
            self.cancel_on_lane(Status::Cancelled);
            self.connection.inbox().forget(self.key);
            self.conclude(Kind::Error, Status::Cancelled, "");
        }
        is_first
    }

    fn end_after(&self, timeout: Duration) {
        let this = self.this.clone();
        let task = self.connection.runtime().spawn(async move {
            tokio::time::sleep(timeout).await;
            if let Some(this) = this.upgrade() {
                this.end_here(Status::Timeout, format!("the stream did not end within {timeout:?}"));
            }
        });
        *self.timer.lock() = Some(task.abort_handle());
        if self.word.check().is_err() {
            self.stop_timer();
        }
    }

    fn stop_timer(&self) {
        if let Some(timer) = self.timer.lock().take() {
            timer.abort();
        }
    }

    /// The worker has ended it, or there is none: puts the last event into the queue. False if it had ended.
    fn end_by_worker(&self, kind: Kind, status: Status, text: impl Into<Bytes>) -> bool {
        if !self.word.try_stop(if kind == Kind::End { Status::Closed } else { status }) {
            return false;
        }
        self.connection.inbox().forget(self.key);
        registry::detach(&self.client, self.handle_id);
        self.conclude(kind, status, text);
        true
    }

    /// Ends it on this side, if it runs: notifies the worker, and puts the last event into the queue. False if it had ended.
    fn end_here(&self, why: Status, text: impl Into<Bytes>) -> bool {
        if !self.word.try_stop(why) {
            return false;
        }
        self.cancel_on_lane(why);
        if self.notice() == Notice::Announcement {
            registry::give_up(&self.client, self.handle_id, &*self.connection);
            self.connection.inbox().forget(self.key);
        } else {
            registry::detach(&self.client, self.handle_id);
            self.leave_inbox();
        }
        self.conclude(Kind::Error, why, text);
        true
    }

    /// Cancels it on its lane, if it has one. A worker that accepts it from now on is cancelled then.
    fn cancel_on_lane(&self, why: Status) {
        if let Some((lane, stream)) = self.lane.get() {
            lane.cancel(*stream, why);
        }
    }

    /// Expects no more messages, or only the first answer where that decides how the worker can be notified.
    fn leave_inbox(&self) {
        if self.notice() == Notice::Direct || self.client.is_empty() {
            self.connection.inbox().forget(self.key);
            return;
        }
        Unanswered::expect(&self.connection, self.key, &self.client);
        // The answer may have come to this stream meanwhile. The inbox's lock orders this and `accepted`: either its
        // `forget` comes after this `expect`, or its answer is seen here.
        match self.notice() {
            Notice::Unknown => {}
            Notice::Direct => {
                self.connection.inbox().forget(self.key);
            }
            Notice::Announcement => {
                if self.connection.inbox().forget(self.key) {
                    registry::give_up_detached(&self.client, &*self.connection);
                }
            }
        }
    }

    fn conclude(&self, kind: Kind, status: Status, text: impl Into<Bytes>) {
        self.connection.counters.streams.fetch_sub(1, Ordering::Relaxed);
        self.stop_timer();
        *self.asking.lock() = None;
        if let Some(this) = self.this.upgrade() {
            let event = Single::of(kind, status, this, text.into());
            self.connection.wakeups().push(&self.queue, || self.is_wanted().then_some(event));
        }
    }

    fn data(&self, payload: Bytes) {
        let weight = payload.len() as u64 + OVERHEAD;
        let waiting = self.waiting.load(Ordering::Relaxed) + weight;
        let (unread, most) =
            (self.connection.counters.unread.load(Ordering::Relaxed), self.connection.receive_buffer());
        let is_crowded = unread + weight > most && waiting > most / LARGE_PART;
        if waiting > self.limit || is_crowded {
            let subject = self.subject();
            let text = if is_crowded {
                format!(
                    "the reader of a stream of {subject} was too slow: {waiting} bytes waited for it when more than {most} \
                     (receive_buffer_bytes) waited on the connection"
                )
            } else {
                format!(
                    "the reader of a stream of {subject} was too slow: more than {} bytes waited for it",
                    self.limit
                )
            };
            if self.end_here(Status::Full, text.clone()) {
                self.connection.log(Status::Full, || text);
            }
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        self.connection.wakeups().push(&self.queue, || {
            // Asked with the queue locked: nothing comes after the last event.
            self.word.check().ok()?;
            self.waiting.fetch_add(weight, Ordering::Relaxed);
            self.connection.counters.unread.fetch_add(weight, Ordering::Relaxed);
            Some(Single::of(Kind::Data, Status::Ok, this, unpin(payload)))
        });
    }

    /// Whether a worker has answered.
    fn has_begun(&self) -> bool {
        self.answer.load(Ordering::Relaxed) >= LEVEL_0
    }

    /// What it asked for, in messages.
    fn subject(&self) -> String {
        self.asking.lock().as_ref().map_or_else(String::new, |asking| asking.subject.to_string())
    }

    /// Asks again later, if it may; false if it may not, or a worker has answered.
    fn ask_again(&self) -> bool {
        if self.has_begun() {
            return false;
        }
        // The worker has refused the request.
        let _ = self.answer.compare_exchange(ASKED, NOT_ASKED, Ordering::Relaxed, Ordering::Relaxed);
        let mut asking = self.asking.lock();
        let retry = asking.as_mut().and_then(|asking| asking.retry.as_mut()).filter(|retry| retry.left > 0);
        let Some(Retry { request, left, delay }) = retry.map(|retry| &mut **retry) else { return false };
        *left -= 1;
        let (request, this, delay) = (request.clone(), self.this.clone(), *delay);
        self.connection.runtime().spawn(async move {
            tokio::time::sleep(delay).await;
            if let Some(this) = this.upgrade() {
                let _ = this.answer.compare_exchange(NOT_ASKED, ASKED, Ordering::Relaxed, Ordering::Relaxed);
                if this.connection.outbox().request(&this.word, request) == Err(Status::Full) {
                    let _ = this.answer.compare_exchange(ASKED, NOT_ASKED, Ordering::Relaxed, Ordering::Relaxed);
                    this.end_here(Status::Full, "there was no room to send the request again");
                }
            }
        });
        true
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let counters = &self.connection.counters;
        counters.windows.fetch_sub(self.window.into(), Ordering::Relaxed);
        counters.unread.fetch_sub(self.waiting.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl MessageHandler for Stream {
    fn accepted(self: Arc<Self>, lane: &Arc<Lane>, stream: u32) -> Accepted {
        // Only a worker knows the key, so an answer on level 0 that came before does not count: somebody else may have sent
        // it. Another worker's ACCEPT does: two of them serve the subject without a group.
        if self.answer.swap(LANE, Ordering::Relaxed) == LANE {
            return None;
        }
        let _ = self.lane.set((Arc::clone(lane), stream));
        // Neither this stream nor the `Unanswered` in its place, if it was ended meanwhile, expects more on level 0.
        self.connection.inbox().forget(self.key);
        self.word.check_after_publishing().ok()?;
        *self.asking.lock() = None;
        let window = self.window;
        Some((self, window))
    }

    fn message(&self, message: Message) {
        if message.status == Some(StatusCode::NO_RESPONDERS) {
            // Once messages have come this is not about our request, but somebody's lie.
            if !self.has_begun() && !self.ask_again() {
                self.end_by_worker(Kind::Error, Status::NoResponders, format!("nobody serves {}", self.subject()));
            }
            return;
        }
        match level0::answer(&message.payload) {
            Answer::JetStreamAck if !self.was_stored.swap(true, Ordering::Relaxed) => {
                count(&self.connection.inbox().ignored);
            }
            Answer::Data | Answer::JetStreamAck => {
                self.answer.fetch_max(LEVEL_0, Ordering::Relaxed);
                self.data(message.payload);
            }
            Answer::End => {
                self.end_by_worker(Kind::End, Status::Ok, "");
            }
            Answer::Error(text) => {
                if text != level0::BUSY.as_bytes() || !self.ask_again() {
                    self.end_by_worker(Kind::Error, error_status(text), unpin(message.payload.slice_ref(text)));
                }
            }
        }
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        let is_asked = self.asking.lock().as_ref().is_some_and(|asking| *asking.subject == *subject);
        if !is_asked || self.has_begun() {
            return None;
        }
        let text = format!("nats-server does not allow requests to {subject}");
        self.end_by_worker(Kind::Error, Status::Disconnected, text)
            .then_some("the request was refused; allow to publish to it")
    }

    fn ended(&self, why: Status) {
        let text = match why {
            Status::Closed => "the connection was closed",
            Status::Internal => "this end of the lane has failed",
            Status::PeerGone => "the worker accepted on a lane on which nats-server does not allow to answer",
            _ => "the connection to nats-server was lost",
        };
        self.end_here(why, text);
    }
}

impl Stoppable for Stream {
    fn status_word(&self) -> &StatusWord {
        &self.word
    }

    fn stopped(&self, why: Status, is_announced: bool) {
        self.cancel_on_lane(why);
        if is_announced {
            self.connection.inbox().forget(self.key);
        } else {
            self.leave_inbox();
        }
        self.conclude(Kind::Error, why, level0::OFFLINE);
    }

    fn requested_on(&self) -> Option<u64> {
        Some(self.connection.handle_id())
    }

    fn notice(&self) -> Notice {
        match self.answer.load(Ordering::Relaxed) {
            ASKED if self.offers_lane => Notice::Unknown,
            ASKED | LEVEL_0 => Notice::Announcement,
            _ => Notice::Direct,
        }
    }

    fn answers_to(&self) -> Option<u64> {
        None
    }
}

impl StreamObserver for Stream {
    fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    fn ended(&self) {
        self.end_by_worker(Kind::End, Status::Ok, "");
    }

    fn failed(&self, text: Bytes) {
        self.end_by_worker(Kind::Error, error_status(&text), Bytes::copy_from_slice(&text));
    }

    fn overrun(&self) {
        self.end_here(Status::Full, "the worker sent more than the stream's window");
    }

    fn peer_gone(&self, _knew: bool) {
        self.end_here(Status::PeerGone, "the worker is gone: it does not answer any longer");
    }

    fn ended_here(&self, why: Status) {
        MessageHandler::ended(self, why);
    }
}

impl EventSource for Stream {
    fn handle_id(&self) -> u64 {
        self.handle_id
    }

    fn is_wanted(&self) -> bool {
        !self.is_freed.load(Ordering::Acquire)
    }

    fn tag(&self) -> u64 {
        self.tag
    }

    fn is_running(&self) -> bool {
        self.word.check().is_ok()
    }

    fn taken(&self, count: u64, bytes: u64) {
        match &self.held {
            Some(held) => held.lock().add(count, bytes),
            None => self.give_room(count * OVERHEAD + bytes),
        }
    }

    fn dropped(&self, count: u64, bytes: u64) {
        self.give_room(count * OVERHEAD + bytes);
    }
}

impl Event<'_> {
    /// The stream it is about.
    #[must_use]
    pub fn stream(&self) -> Option<Arc<Stream>> {
        self.origin()
    }
}
