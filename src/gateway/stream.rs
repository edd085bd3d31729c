//! The gateway's side: a stream requested from a worker.

use crate::config::{Config, RequestOptions};
use crate::connection::Connection;
use crate::error::{Error, Result, Status};
use crate::events::{Event, EventSource, Kind, Queue, Single, Source, unpin};
use crate::lane::driver::{Lane, StreamObserver};
use crate::lane::event::LaneEvent;
use crate::lane::read_window::{MAX_WINDOW, ReadWindow};
use crate::lane::streams::OVERHEAD;
use crate::metrics::{StreamTimes, count};
use crate::nats::Message;
use crate::nats::encoded::{self, EncodedMessages};
use crate::nats::inbound::MessageHandler;
use crate::presence::client_id;
use crate::presence::registry::{self, Notice, Stoppable};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};
use crate::wire::level0::{self, Answer, Use};
use crate::wire::stream_error;
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::task::AbortHandle;

/// The window at first, unless `stream_buffer_bytes` is set: how far a worker on a lane may be ahead of the reader, in
/// bytes.
const WINDOW: u32 = 256 << 10;
/// The window once the windows of the connection's streams add up to `receive_buffer_bytes`.
const SMALL_WINDOW: u32 = 8 << 10;
/// How much may be unread on level 0, where nothing slows the worker down, unless `stream_buffer_bytes` is set.
const LEVEL_0_LIMIT: u64 = 64 << 20;
/// While more than `receive_buffer_bytes` is unread, a level-0 stream ends if it has more than this fraction of it.
const LARGE_PART: u64 = 64;

/// How long to wait for the first answer to a stream that has ended here, while there is a connection. A worker on a
/// lane accepts within a round trip, before its host has done anything. A worker on level 0 that does not answer is
/// stopped after this time.
const ANSWER_WAIT: Duration = Duration::from_secs(5);

/// A stream that this process requested.
pub struct Stream {
    pub(crate) source: Source,
    this: Weak<Stream>,
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    client: Box<str>,
    /// What its worker has answered so far: the constants below.
    answer: AtomicU8,
    /// Whether the request offered a lane.
    offers_lane: bool,
    /// JetStream's acknowledgement of the request has come, and was ignored. There is one for each request.
    was_stored: AtomicBool,
    /// On level 0: what was received and is still unread (with manual credit: not consumed), and its limit, in bytes.
    unread: AtomicU64,
    limit: u64,
    /// How far a worker on a lane may be ahead. It counts for the connection until it is released.
    window: ReadWindow,
    /// With manual credit: what was delivered to the reader and is not consumed yet.
    unconsumed: Option<Box<Mutex<Unconsumed>>>,
    /// The request's number in the inbox, which is random, and known only to the workers that got the request.
    key: u64,
    /// The lane that it runs on, and its number there.
    lane: OnceCell<(Arc<Lane>, u32)>,
    /// The request, until a worker accepts it on a lane.
    pending: Mutex<Option<Box<Pending>>>,
    timer: Mutex<Option<AbortHandle>>,
    times: StreamTimes,
}

/// No worker has the request: it was refused, and is to be sent again later.
const NOT_SENT: u8 = 0;
/// The request was sent, and no worker has answered.
const SENT: u8 = 1;
/// The stream has ended here before a worker answered: the first answer decides how the worker is stopped.
const UNANSWERED: u8 = 2;
/// A worker has answered on level 0.
const ON_LEVEL_0: u8 = 3;
/// A worker has accepted on a lane.
const ON_LANE: u8 = 4;

/// Messages that a reader has, and has not reported as consumed.
#[derive(Default)]
struct Unconsumed {
    count: u64,
    bytes: u64,
}

impl Unconsumed {
    fn add(&mut self, count: u64, bytes: u64) {
        self.count += count;
        self.bytes += bytes;
    }

    /// Returns the credit for so many consumed bytes. The same fraction of the messages counts as consumed, and all of
    /// them with the last byte: so a reader need not count messages, and empty messages are counted too.
    fn take(&mut self, bytes: u64) -> u64 {
        let bytes = bytes.min(self.bytes);
        let count = if bytes == self.bytes { self.count } else { self.count * bytes / self.bytes };
        self.count -= count;
        self.bytes -= bytes;
        bytes + count * OVERHEAD
    }
}

/// A request that no worker has accepted on a lane.
struct Pending {
    subject: Box<str>,
    retry: Option<Box<Retry>>,
}

struct Retry {
    /// As nats-server reads it.
    request: Bytes,
    left: u32,
    delay: Duration,
}

impl Connection {
    /// Requests a stream for a client (empty id: for no client). Its messages become `Data` events with `tag` in
    /// `queue`, followed by exactly one `End` or `Error`.
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
        self.request_registered(queue, subject, data, client, config, tag, |_| {})
    }

    /// As `request`. Calls `register` with the stream before there can be an event of it.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn request_registered(
        &self,
        queue: &Arc<Queue>,
        subject: &str,
        data: &[u8],
        client: &[u8],
        config: &Config,
        tag: u64,
        register: impl FnOnce(&Arc<Stream>),
    ) -> Result<Arc<Stream>> {
        level0::check_subject("subject", subject, Use::Publish)?;
        let client = client_id::id(client)?;
        let options = config.for_request()?;
        check_client(client)?;
        let (key, window) = (self.inbox.keys.next(), self.window(options.stream_buffer));
        let lanes = self.lanes();
        let offer = lanes.and_then(|lanes| lanes.offer(key, window));
        let offers_lane = offer.is_some();
        let headers = headers(client, offer.as_deref(), options);
        self.check_connected()?;
        let size = data.len() + headers.len();
        if size > self.max_payload() {
            let text = format!(
                "the request is {size} bytes, headers included; the limit of nats-server (max_payload) is {}",
                self.max_payload()
            );
            return Err(Error::new(Status::TooLarge, text));
        }
        let connection = self.shared()?;
        // `release_window` subtracts it.
        self.counters.windows.fetch_add(window.into(), Ordering::Relaxed);
        let stream = Arc::new_cyclic(|this| Stream {
            source: Source::new(tag),
            this: this.clone(),
            connection,
            queue: Arc::clone(queue),
            client: client.into(),
            answer: AtomicU8::new(SENT),
            offers_lane,
            was_stored: AtomicBool::new(false),
            unread: AtomicU64::new(0),
            limit: options.stream_buffer.map_or(LEVEL_0_LIMIT, |limit| limit as u64),
            window: ReadWindow::new(window, options.stream_buffer.is_none()),
            unconsumed: options.manual_credit.then(Box::default),
            key,
            lane: OnceCell::new(),
            pending: Mutex::new(None),
            timer: Mutex::new(None),
            times: StreamTimes::begin(&self.counters.requested),
        });
        register(&stream);
        let reply = self.inbox.expect(key, Arc::clone(&stream) as Arc<dyn MessageHandler>);
        if let Some(lanes) = lanes.filter(|_| offers_lane) {
            lanes.expect_accept(key, window, stream.this.clone());
        }
        let mut request = EncodedMessages::default();
        request.push(subject, &reply, headers.as_bytes(), data);
        let request = request.bytes.freeze();
        let (left, delay) = (options.retries, options.retry_delay);
        let retry = (left > 0).then(|| Box::new(Retry { request: request.clone(), left, delay }));
        *stream.pending.lock() = Some(Box::new(Pending { subject: subject.into(), retry }));
        // Before the request is sent, so that an offline mark from now on stops the stream.
        if options.only_online {
            if !registry::attach_if_online(client, Arc::clone(&stream) as _) && stream.withdraw() {
                let text = format!("client {client:?} is offline in this process, and only_online is set");
                return Err(Error::new(Status::Offline, text));
            }
        } else {
            registry::attach(client, Arc::clone(&stream) as _);
        }
        if !stream.source.is_running() {
            // It may have ended before it was attached.
            registry::detach(client, stream.source.handle_id);
        }
        // After `expect`, as a connection that was lost before it has not ended this stream.
        let sent = self.check_connected().and_then(|()| Ok(self.outbox.request(&stream.source.word, &request)?));
        if let Err(error) = sent
            && stream.withdraw()
        {
            return Err(error);
        }
        stream.times.started();
        // If it was ended meanwhile, its last event is in the queue with the reason.
        if let Some(timeout) = options.timeout {
            stream.end_after(timeout);
        }
        Ok(stream)
    }

    /// The window of a stream that is requested now.
    fn window(&self, stream_buffer: Option<usize>) -> u32 {
        let wanted = stream_buffer.map_or(WINDOW, |limit| u32::try_from(limit).unwrap_or(MAX_WINDOW).min(MAX_WINDOW));
        let taken = self.counters.windows.load(Ordering::Relaxed);
        if taken + u64::from(wanted) > self.options.receive_buffer { wanted.min(SMALL_WINDOW) } else { wanted }
    }
}

/// The status of a stream that its worker ended with this text.
fn error_status(text: &[u8]) -> Status {
    if text == level0::BUSY.as_bytes() {
        Status::Busy
    } else if text == level0::OFFLINE.as_bytes() {
        Status::Offline
    } else {
        Status::Remote
    }
}

/// Fails if a request's header would change the client's id.
fn check_client(client: &str) -> Result<()> {
    if client.trim() != client {
        return Err(Error::invalid(format!(
            "client id {client:?} begins or ends with white space, which a request's header would lose"
        )));
    }
    Ok(())
}

/// The request's headers as nats-server reads them: the client's id, the offer of a lane, and the caller's own. Empty if
/// there are none.
fn headers(client: &str, offer: Option<&str>, options: &RequestOptions) -> String {
    let own = options.headers.iter().map(|(name, value)| (&**name, &**value));
    let client = Some((level0::CONNECT_ID, client)).filter(|(_, client)| !client.is_empty());
    encoded::headers_block(own.chain(client).chain(offer.map(|offer| (level0::LANE, offer))))
}

impl Stream {
    /// The tag that was passed to `request`.
    #[must_use]
    pub fn tag(&self) -> u64 {
        self.source.tag()
    }

    /// The client's id; empty for no client.
    #[must_use]
    pub fn client(&self) -> &str {
        &self.client
    }

    /// Cancels it: it ends with `Cancelled`, and its worker is notified if the wire allows it.
    ///
    /// # Errors
    /// `Closed` if it had ended.
    pub fn cancel(&self) -> Result<()> {
        if !self.end_here(Status::Cancelled, "the stream was cancelled") {
            return Err(Error::new(Status::Closed, "the stream has ended already"));
        }
        Ok(())
    }

    /// With `manual_credit`: so many bytes of its messages were consumed, and the worker may send as many more. Without
    /// `manual_credit` this has no effect.
    ///
    /// # Errors
    /// `Closed` if it has ended.
    pub fn consumed(&self, bytes: u64) -> Result<()> {
        if !self.source.is_running() {
            return Err(Error::new(Status::Closed, "the stream has ended already"));
        }
        if let Some(unconsumed) = &self.unconsumed {
            let credit = unconsumed.lock().take(bytes);
            self.return_credit(credit);
        }
        Ok(())
    }

    /// Lets the worker send so much more, in bytes with the overhead of each message.
    fn return_credit(&self, credit: u64) {
        match self.lane.get() {
            Some((lane, stream)) => {
                if let Some(due) = self.window.consume(credit) {
                    let growth = self.window.growth(due, || self.times.age(), || lane.round_trip());
                    lane.return_credit(*stream, due, growth.and_then(|growth| self.grow_window(growth)));
                }
            }
            None => {
                let less = |unread: u64| Some(unread.saturating_sub(credit));
                if let Ok(unread) = self.unread.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less) {
                    self.connection.counters.unread.fetch_sub(credit.min(unread), Ordering::Relaxed);
                }
            }
        }
    }

    /// Drops the events that are still queued for it. A stream that has not ended is cancelled.
    pub fn free(&self) {
        self.source.set_freed();
        self.end_here(Status::Cancelled, "");
    }

    /// Undoes the request before it was sent. Returns false if the stream was ended meanwhile, which has queued its
    /// last event.
    fn withdraw(&self) -> bool {
        let is_first = self.source.word.try_stop(Status::Cancelled);
        if is_first {
            self.source.set_freed();
            registry::detach(&self.client, self.source.handle_id);
            self.cancel_on_lane(Status::Cancelled);
            self.connection.forget_request(self.key);
            self.times.withdrawn();
            *self.pending.lock() = None;
        }
        is_first
    }

    fn end_after(&self, timeout: Duration) {
        let this = self.this.clone();
        let task = self.connection.runtime.spawn(async move {
            tokio::time::sleep(timeout).await;
            if let Some(this) = this.upgrade() {
                this.end_here(Status::Timeout, format!("the stream did not end within {timeout:?}"));
            }
        });
        *self.timer.lock() = Some(task.abort_handle());
        if !self.source.is_running() {
            self.stop_timer();
        }
    }

    fn stop_timer(&self) {
        if let Some(timer) = self.timer.lock().take() {
            timer.abort();
        }
    }

    /// The worker has ended it, or there is none: puts the last event into the queue. False if it had ended.
    fn end_by_worker(&self, kind: Kind, status: Status, error_code: i32, text: impl Into<Bytes>) -> bool {
        // Also if it had ended here: no answer is to come, and no worker is to be stopped.
        self.connection.forget_request(self.key);
        if !self.source.word.try_stop(if kind == Kind::End { Status::Closed } else { status }) {
            return false;
        }
        registry::detach(&self.client, self.source.handle_id);
        self.conclude(kind, status, error_code, text);
        true
    }

    /// Ends it on this side, if it runs: notifies the worker, and puts the last event into the queue. False if it had
    /// ended.
    fn end_here(&self, why: Status, text: impl Into<Bytes>) -> bool {
        if !self.source.word.try_stop(why) {
            return false;
        }
        self.cancel_on_lane(why);
        if self.notice() == Notice::Announcement {
            registry::give_up(&self.client, self.source.handle_id, &*self.connection);
            self.connection.forget_request(self.key);
        } else {
            registry::detach(&self.client, self.source.handle_id);
            self.leave_inbox();
        }
        self.conclude(Kind::Error, why, 0, text);
        true
    }

    /// Cancels it on its lane, if it has one. `accepted` cancels a worker that accepts it later.
    fn cancel_on_lane(&self, why: Status) {
        if let Some((lane, stream)) = self.lane.get() {
            lane.cancel(*stream, why);
        }
    }

    /// It has ended: expects no more messages, but the first answer if that decides how the worker can be stopped.
    ///
    /// If the worker accepts on a lane, it is sent CANCEL, which stops this stream only. A worker on level 0 can be
    /// stopped only by an announcement, which stops the client's streams at all gateways. So nothing is announced until
    /// the first answer shows that the worker is on level 0, or until there was no answer for some time.
    fn leave_inbox(&self) {
        let may_wait = self.offers_lane && !self.client.is_empty();
        let wait = || self.answer.compare_exchange(SENT, UNANSWERED, Ordering::Relaxed, Ordering::Relaxed);
        if may_wait && wait().is_ok() {
            self.wait_for_first_answer();
        } else if self.notice() == Notice::Announcement {
            // The answer has come just now.
            self.stop_worker();
        } else {
            self.connection.forget_request(self.key);
        }
    }

    fn wait_for_first_answer(&self) {
        self.release_window();
        // None while there is no connection: the answer comes after the reconnect.
        let connects = |this: Arc<Stream>| {
            let connection = &this.connection;
            connection.is_connected().then(|| connection.counters.connects.load(Ordering::Relaxed))
        };
        let waiting = self.this.clone();
        self.connection.runtime.spawn(async move {
            loop {
                let before = waiting.upgrade().and_then(connects);
                tokio::time::sleep(ANSWER_WAIT).await;
                let Some(this) = waiting.upgrade() else { return };
                if before.is_some() && before == connects(Arc::clone(&this)) {
                    return this.stop_worker();
                }
            }
        });
    }

    /// It has ended, and its worker can be stopped by an announcement only: announces the client offline, unless it is
    /// online for another reason. A second call has no effect.
    fn stop_worker(&self) {
        if self.connection.forget_request(self.key) && !self.client.is_empty() {
            registry::give_up_detached(&self.client, &*self.connection);
        }
    }

    /// Enlarges the window while all windows add up to half of `receive_buffer_bytes`: the other half is for further
    /// streams. Returns the new size.
    fn grow_window(&self, by: u32) -> Option<u32> {
        let windows = &self.connection.counters.windows;
        let before = windows.fetch_add(by.into(), Ordering::Relaxed);
        let is_allowed = before + u64::from(by) <= self.connection.options.receive_buffer / 2;
        let grown = is_allowed.then(|| self.window.grow(by)).flatten();
        if grown.is_none() {
            windows.fetch_sub(by.into(), Ordering::Relaxed);
        }
        grown
    }

    fn release_window(&self) {
        let window = self.window.release();
        self.connection.counters.windows.fetch_sub(window.into(), Ordering::Relaxed);
    }

    fn conclude(&self, kind: Kind, status: Status, error_code: i32, text: impl Into<Bytes>) {
        self.times.ended(status);
        self.stop_timer();
        *self.pending.lock() = None;
        if let Some(this) = self.this.upgrade() {
            let event = Single { error_code, ..Single::of(kind, status, this, text.into()) };
            self.connection.wakeups.push(&self.queue, || (!self.source.is_freed()).then_some(event));
        }
    }

    fn data(&self, payload: Bytes) {
        let weight = payload.len() as u64 + OVERHEAD;
        let unread = self.unread.load(Ordering::Relaxed) + weight;
        let (total, most) =
            (self.connection.counters.unread.load(Ordering::Relaxed), self.connection.options.receive_buffer);
        let is_connection_full = total + weight > most && unread > most / LARGE_PART;
        if unread > self.limit || is_connection_full {
            let subject = self.subject();
            let text = if is_connection_full {
                format!(
                    "the reader of a stream of {subject} was too slow: {unread} of its bytes were unread, and more than \
                     {most} (receive_buffer_bytes) on the connection"
                )
            } else {
                format!(
                    "the reader of a stream of {subject} was too slow: more than {} bytes (stream_buffer_bytes) were \
                     unread",
                    self.limit
                )
            };
            if self.end_here(Status::Full, text.clone()) {
                self.connection.log(Status::Full, || text);
            }
            return;
        }
        let Some(this) = self.this.upgrade() else { return };
        self.connection.wakeups.push(&self.queue, || {
            // With the queue locked, so that no event follows the last one.
            self.source.word.check().ok()?;
            self.unread.fetch_add(weight, Ordering::Relaxed);
            self.connection.counters.unread.fetch_add(weight, Ordering::Relaxed);
            Some(Single::of(Kind::Data, Status::Ok, this, unpin(payload)))
        });
    }

    /// Whether a worker has answered.
    fn has_begun(&self) -> bool {
        self.answer.load(Ordering::Relaxed) >= ON_LEVEL_0
    }

    /// The subject of the request, for texts.
    fn subject(&self) -> String {
        self.pending.lock().as_ref().map_or_else(String::new, |pending| pending.subject.to_string())
    }

    /// Sends the request again after `retry_delay_ms`. Returns false if no retries are left, or a worker has answered.
    fn retry(&self) -> bool {
        if self.has_begun() {
            return false;
        }
        // The worker has refused the request.
        let _ = self.answer.compare_exchange(SENT, NOT_SENT, Ordering::Relaxed, Ordering::Relaxed);
        let mut pending = self.pending.lock();
        let retry = pending.as_mut().and_then(|pending| pending.retry.as_mut()).filter(|retry| retry.left > 0);
        let Some(Retry { request, left, delay }) = retry.map(|retry| &mut **retry) else { return false };
        *left -= 1;
        let (request, this, delay) = (request.clone(), self.this.clone(), *delay);
        self.connection.runtime.spawn(async move {
            tokio::time::sleep(delay).await;
            if let Some(this) = this.upgrade() {
                let _ = this.answer.compare_exchange(NOT_SENT, SENT, Ordering::Relaxed, Ordering::Relaxed);
                if this.connection.outbox.request(&this.source.word, &request) == Err(Status::Full) {
                    let _ = this.answer.compare_exchange(SENT, NOT_SENT, Ordering::Relaxed, Ordering::Relaxed);
                    this.end_here(Status::Full, "cannot send the request again: the send buffer is full");
                }
            }
        });
        true
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.release_window();
        self.connection.counters.unread.fetch_sub(self.unread.load(Ordering::Relaxed), Ordering::Relaxed);
    }
}

impl MessageHandler for Stream {
    fn message(&self, message: Message) {
        if message.is_no_responders {
            // Once a worker has answered, nats-server did not send this: it is forged.
            if !self.has_begun() && !self.retry() {
                self.end_by_worker(Kind::Error, Status::NoResponders, 0, format!("nobody serves {}", self.subject()));
            }
            return;
        }
        match level0::answer(&message.payload) {
            Answer::JetStreamAck if !self.was_stored.swap(true, Ordering::Relaxed) || !self.source.is_running() => {
                count(&self.connection.counters.messages_ignored);
            }
            Answer::Data | Answer::JetStreamAck => {
                match self.answer.fetch_max(ON_LEVEL_0, Ordering::Relaxed) {
                    UNANSWERED => return self.stop_worker(),
                    NOT_SENT | SENT => self.times.first_message(),
                    _ => {}
                }
                self.data(message.payload);
            }
            Answer::End => {
                self.end_by_worker(Kind::End, Status::Ok, 0, "");
            }
            Answer::Error(text) => {
                if text != level0::BUSY.as_bytes() || !self.retry() {
                    let code = message.header(level0::ERROR_CODE).map_or(0, stream_error::code_in_header);
                    self.end_by_worker(Kind::Error, error_status(text), code, unpin(message.payload.slice_ref(text)));
                }
            }
        }
    }

    fn no_answer(&self) {
        if self.answer.load(Ordering::Relaxed) == UNANSWERED {
            self.stop_worker();
        }
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        let is_pending = self.pending.lock().as_ref().is_some_and(|pending| *pending.subject == *subject);
        if !is_pending || self.has_begun() {
            return None;
        }
        let text = format!("nats-server does not allow requests to {subject}");
        self.end_by_worker(Kind::Error, Status::Disconnected, 0, text)
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
    fn stopped(&self, why: Status, is_announced: bool) {
        self.cancel_on_lane(why);
        if is_announced {
            self.connection.forget_request(self.key);
        } else {
            self.leave_inbox();
        }
        self.conclude(Kind::Error, why, 0, level0::OFFLINE);
    }

    fn requested_on(&self) -> Option<u64> {
        Some(self.connection.handle_id)
    }

    fn notice(&self) -> Notice {
        match self.answer.load(Ordering::Relaxed) {
            SENT if self.offers_lane => Notice::Unknown,
            SENT | ON_LEVEL_0 => Notice::Announcement,
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

    fn first_message(&self) {
        self.times.first_message();
    }

    fn accepted(&self, lane: &Arc<Lane>, stream: u32) -> bool {
        // Only workers know the key. So an earlier answer on level 0 does not count, as a stranger may have sent it.
        self.answer.store(ON_LANE, Ordering::Relaxed);
        let _ = self.lane.set((Arc::clone(lane), stream));
        let is_running = self.source.word.check_after_publishing().is_ok();
        if is_running {
            *self.pending.lock() = None;
        }
        is_running
    }

    fn notify(&self, event: LaneEvent) {
        match event {
            LaneEvent::Ended => {
                self.end_by_worker(Kind::End, Status::Ok, 0, "");
            }
            LaneEvent::Failed(code, text) => {
                self.end_by_worker(Kind::Error, error_status(&text), code, Bytes::copy_from_slice(&text));
            }
            LaneEvent::WindowExceeded => {
                self.end_here(Status::Full, "the worker sent more than the stream's window");
            }
            LaneEvent::PeerGone { .. } => {
                self.end_here(Status::PeerGone, "the worker is gone: it does not answer any longer");
            }
            // Only senders have these.
            LaneEvent::Data { .. } | LaneEvent::Cancelled(_) | LaneEvent::Writable | LaneEvent::AcceptUndelivered => {}
        }
    }

    fn closed_here(&self, why: Status) {
        MessageHandler::ended(self, why);
    }
}

impl EventSource for Stream {
    fn source(&self) -> &Source {
        &self.source
    }

    fn left_queue(&self, kind: Kind, count: u64, bytes: u64, is_delivered: bool) {
        match &self.unconsumed {
            _ if kind != Kind::Data => {}
            Some(unconsumed) if is_delivered => unconsumed.lock().add(count, bytes),
            _ => self.return_credit(count * OVERHEAD + bytes),
        }
    }
}

impl Event<'_> {
    /// The stream it is about.
    #[must_use]
    pub fn stream(&self) -> Option<Arc<Stream>> {
        self.source()
    }
}
