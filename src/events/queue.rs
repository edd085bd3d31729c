//! Events out of the library: any number of services, streams and watches put them in, one thread takes them out.

use crate::error::{Error, Result, Status};
use crate::process::fork;
use crate::sync::{Condvar, Mutex};
use crate::wire::frame::Run;
use bytes::{Bytes, BytesMut};
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::any::Any;
use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many ONLINE and OFFLINE events may wait in one queue.
const MAX_WATCH_EVENTS: usize = 65_536;
/// How many CONNECTED, DISCONNECTED and LOG events may wait in one queue.
const MAX_NEWS: usize = 1024;
/// What of a lane message needs fewer bytes is copied out of the NATS client's read buffer: if it waits, it would keep all
/// of that, which is 64 KiB and more.
const COPY_BELOW: usize = 4096;
/// The same for what is alone in its message.
const COPY_ALONE_BELOW: usize = 32 << 10;
/// For how many events room is kept when all are taken.
const KEPT: usize = 4096;
/// How many events may gather before the waiting thread is called in any case.
const PATIENCE: usize = 64;
/// The same for events that come by the thousand.
const PATIENCE_WITH_BATCHES: usize = 8192;

/// What an event tells.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A request arrived at a service.
    Request = 1,
    /// A message of a stream.
    Data = 2,
    /// The worker ended the stream.
    End = 3,
    /// The stream ended otherwise.
    Error = 4,
    /// A sender may send no more.
    Stopped = 5,
    /// A sender that had no room may try again.
    Writable = 6,
    /// A client came online in this process.
    Online = 7,
    /// A client went offline in this process.
    Offline = 8,
    /// The connection has reached nats-server.
    Connected = 9,
    /// The connection to nats-server is lost.
    Disconnected = 10,
    /// Something that people should know.
    Log = 11,
}

/// The sender or stream that an event is about.
pub(crate) trait EventSource: Any + Send + Sync {
    /// The number of its handle.
    fn handle_id(&self) -> u64;
    /// The caller's number, for its events.
    fn tag(&self) -> u64;
    /// Whether somebody still wants its events: it was not freed.
    fn is_wanted(&self) -> bool;
    /// Whether it has not ended: after its last event there are no more.
    fn is_running(&self) -> bool;
    /// So many DATA events of it, with so many bytes in all, have left the queue.
    fn taken(&self, _count: u64, _bytes: u64) {}
    /// So many DATA events were dropped with a queue, or for want of one.
    fn dropped(&self, _count: u64, _bytes: u64) {}
    /// Its REQUEST or WRITABLE has left the queue.
    fn shown(&self, _kind: Kind) {}
    /// Its request was dropped with the queue: nobody will answer it.
    fn abandoned(&self) {}
}

/// Something that happened, as it is shown to whoever waits.
#[derive(Clone, Copy)]
pub struct Event<'a> {
    /// What.
    pub kind: Kind,
    /// Why, for Error, Stopped, Disconnected and Log; else Ok.
    pub status: Status,
    /// The number that the caller gave to serve, request or watch.
    pub tag: u64,
    /// The client's id, where the event is about one; empty for an anonymous one.
    pub client: &'a str,
    /// Request: the subject it came on.
    pub subject: &'a [u8],
    /// A payload or a text.
    pub data: &'a [u8],
    handle_id: u64,
    origin: Option<&'a Arc<dyn EventSource>>,
}

impl Event<'_> {
    /// The sender or stream it is about, if it is a `T`.
    pub(crate) fn origin<T: EventSource>(&self) -> Option<Arc<T>> {
        let origin: Arc<dyn Any + Send + Sync> = Arc::clone(self.origin?) as _;
        origin.downcast().ok()
    }

    /// The number of the sender or stream it is about; 0: of none.
    pub(crate) fn handle_id(&self) -> u64 {
        self.handle_id
    }
}

/// What waits for one event.
pub(crate) struct Single {
    pub(crate) kind: Kind,
    pub(crate) status: Status,
    pub(crate) tag: u64,
    pub(crate) client: Option<Arc<str>>,
    pub(crate) subject: Bytes,
    pub(crate) data: Bytes,
    pub(crate) origin: Option<Arc<dyn EventSource>>,
}

impl Single {
    /// An event about no sender or stream.
    pub(crate) fn new(kind: Kind, status: Status, tag: u64, data: impl Into<Bytes>) -> Single {
        Single { kind, status, tag, client: None, subject: Bytes::new(), data: data.into(), origin: None }
    }

    pub(crate) fn of(kind: Kind, status: Status, origin: Arc<dyn EventSource>, data: Bytes) -> Single {
        let tag = origin.tag();
        Single { origin: Some(origin), ..Single::new(kind, status, tag, data) }
    }

    fn is_wanted(&self) -> bool {
        self.origin.as_ref().is_none_or(|origin| origin.is_wanted())
    }

    fn show(&self) -> Event<'_> {
        Event {
            kind: self.kind,
            status: self.status,
            tag: self.tag,
            client: self.client.as_deref().unwrap_or_default(),
            subject: &self.subject,
            data: &self.data,
            handle_id: self.origin.as_ref().map_or(0, |origin| origin.handle_id()),
            origin: self.origin.as_ref(),
        }
    }
}

/// DATA events that came in one lane message: nothing is made for each of them before it is shown.
pub(crate) struct LaneBatch {
    message: Bytes,
    parts: VecDeque<(Arc<dyn EventSource>, Run)>,
    /// Events in all parts.
    count: usize,
}

impl LaneBatch {
    pub(crate) fn new(message: Bytes) -> LaneBatch {
        LaneBatch { message, parts: VecDeque::new(), count: 0 }
    }

    pub(crate) fn add(&mut self, origin: Arc<dyn EventSource>, run: Run) {
        self.count += run.count as usize;
        self.parts.push_back((origin, run));
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    fn retain(&mut self, is_kept: impl Fn(&Arc<dyn EventSource>) -> bool) {
        let count = &mut self.count;
        self.parts.retain(|(origin, run)| {
            let is_kept = is_kept(origin);
            if !is_kept {
                *count -= run.count as usize;
            }
            is_kept
        });
    }

    /// Keeps no more of a NATS client's buffer than is worth it: what waits here may wait long.
    fn compact(&mut self) {
        let needed: usize = self.parts.iter().map(|(_, run)| (run.end - run.start) as usize).sum();
        if needed >= COPY_BELOW && needed >= self.message.len() / 2 {
            return;
        }
        let mut copy = BytesMut::with_capacity(needed);
        for (_, run) in &mut self.parts {
            let start = copy.len() as u32;
            copy.extend_from_slice(self.message.get(run.start as usize..run.end as usize).unwrap_or_default());
            (run.start, run.end) = (start, copy.len() as u32);
        }
        self.message = copy.freeze();
    }

    /// Nobody will read it: its workers are not to wait for that.
    fn drop_all(&self) {
        self.parts.iter().for_each(|(origin, run)| origin.dropped(run.count.into(), run.bytes));
    }

    /// Cuts off the first `count` events.
    fn split(&mut self, count: usize) -> LaneBatch {
        let mut first = LaneBatch::new(self.message.clone());
        let mut left = count.min(self.count);
        self.count -= left;
        while left > 0
            && let Some((origin, mut run)) = self.parts.pop_front()
        {
            if run.count as usize > left {
                first.add(Arc::clone(&origin), run.split(&self.message, left as u32));
                self.parts.push_front((origin, run));
                break;
            }
            left -= run.count as usize;
            first.add(origin, run);
        }
        first
    }
}

enum Entry {
    Single(Single),
    LaneBatch(LaneBatch),
}

impl Entry {
    fn count(&self) -> usize {
        match self {
            Entry::Single(_) => 1,
            Entry::LaneBatch(batch) => batch.count,
        }
    }

    fn note_taken(&self) {
        match self {
            Entry::Single(Single { kind: Kind::Data, origin: Some(origin), data, .. }) => {
                origin.taken(1, data.len() as u64);
            }
            Entry::Single(Single { kind: kind @ (Kind::Request | Kind::Writable), origin: Some(origin), .. }) => {
                origin.shown(*kind);
            }
            Entry::Single(_) => {}
            Entry::LaneBatch(batch) => {
                batch.parts.iter().for_each(|(origin, run)| origin.taken(run.count.into(), run.bytes))
            }
        }
    }

    /// Leaves out what nobody wants any longer; false when nothing is left.
    fn keep_wanted(&mut self) -> bool {
        match self {
            Entry::Single(event) => event.is_wanted(),
            Entry::LaneBatch(batch) => {
                batch.retain(|origin| origin.is_wanted());
                !batch.is_empty()
            }
        }
    }

    #[inline]
    fn show(&self, show: &mut impl FnMut(Event<'_>)) {
        match self {
            Entry::Single(event) => show(event.show()),
            Entry::LaneBatch(batch) => {
                for (origin, run) in &batch.parts {
                    let (tag, handle_id) = (origin.tag(), origin.handle_id());
                    for data in run.bodies(&batch.message) {
                        let (kind, status, origin) = (Kind::Data, Status::Ok, Some(origin));
                        show(Event { kind, status, tag, client: "", subject: &[], data, handle_id, origin });
                    }
                }
            }
        }
    }

    fn is_watch(&self) -> bool {
        matches!(self, Entry::Single(Single { kind: Kind::Online | Kind::Offline, .. }))
    }

    fn is_news(&self) -> bool {
        matches!(self, Entry::Single(Single { kind: Kind::Connected | Kind::Disconnected | Kind::Log, .. }))
    }
}

/// A payload as it may wait: without the NATS client's read buffer around it, but where that is mostly payload.
pub(crate) fn unpin(payload: Bytes) -> Bytes {
    if payload.len() < COPY_ALONE_BELOW { Bytes::copy_from_slice(&payload) } else { payload }
}

/// Until when to wait.
#[derive(Clone, Copy)]
enum Deadline {
    /// Not at all: not even the clock is read.
    Now,
    At(Instant),
    Never,
}

impl Deadline {
    fn new(timeout: Option<Duration>) -> Deadline {
        match timeout {
            Some(Duration::ZERO) => Deadline::Now,
            // A time too far away to be told is no limit.
            Some(timeout) => Instant::now().checked_add(timeout).map_or(Deadline::Never, Deadline::At),
            None => Deadline::Never,
        }
    }
}

/// Where events arrive.
pub struct Queue {
    handle_id: u64,
    inner: Mutex<Inner>,
    arrived: Condvar,
    /// What the last wait gave, kept until the next; locked by whoever waits.
    given: Mutex<VecDeque<Entry>>,
}

#[derive(Default)]
struct Inner {
    entries: VecDeque<Entry>,
    /// Events that all entries give.
    count: usize,
    watch_events: usize,
    /// Some were dropped, and a LOG says so; until half of them have been taken.
    drops_watch: bool,
    news: usize,
    woken: bool,
    closed: bool,
    /// A thread waits and nobody has called it yet.
    sleeps: bool,
    /// Somebody has promised to `flush`.
    deferred: bool,
    /// Made when first asked for: a queue that is only waited on needs no system calls to signal it.
    fd: Option<Signal>,
}

struct Signal {
    event_fd: EventFd,
    raised: bool,
}

impl Inner {
    /// Whether somebody is to be called when there is something.
    fn is_awaited(&self) -> bool {
        self.sleeps || self.fd.as_ref().is_some_and(|signal| !signal.raised)
    }

    /// Makes the file descriptor readable exactly while a wait would return at once.
    fn signal(&mut self) {
        let ready = self.woken || self.closed || !self.entries.is_empty();
        if let Some(signal) = &mut self.fd
            && signal.raised != ready
        {
            // Neither can fail: the counter is 0 or 1, and the descriptor is ours and does not block.
            let _ = if ready { signal.event_fd.write(1).map(drop) } else { signal.event_fd.read().map(drop) };
            signal.raised = ready;
        }
    }
}

impl Queue {
    /// Makes a queue.
    #[must_use]
    pub fn new() -> Arc<Queue> {
        Arc::new(Queue {
            handle_id: fork::next_handle_id(),
            inner: Mutex::default(),
            arrived: Condvar::default(),
            given: Mutex::default(),
        })
    }

    pub(crate) fn handle_id(&self) -> u64 {
        self.handle_id
    }

    /// A file descriptor that is readable as long as a wait would return at once. It belongs to the queue.
    ///
    /// # Errors
    /// `Status::Internal` when the system gives none.
    pub fn fd(&self) -> Result<RawFd> {
        let mut inner = self.inner.lock();
        if inner.fd.is_none() {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let event_fd = EventFd::from_value_and_flags(0, flags).map_err(|error| {
                Error::new(Status::Full, format!("no file descriptor to be had for the queue: {error}"))
            })?;
            inner.fd = Some(Signal { event_fd, raised: false });
            inner.signal();
        }
        match &inner.fd {
            Some(signal) => Ok(signal.event_fd.as_fd().as_raw_fd()),
            None => Err(Status::Internal.into()),
        }
    }

    /// Waits for events (`None`: without limit) and shows up to `max` of them, in their order, to `show`.
    ///
    /// Returns how many; 0 when the time passed or the queue was woken. What it showed stays allocated until the next wait.
    ///
    /// # Errors
    /// `Status::Busy` while another thread waits, `Status::Closed` when the queue was closed.
    pub fn wait(&self, max: usize, timeout: Option<Duration>, mut show: impl FnMut(Event<'_>)) -> Result<usize> {
        if max == 0 {
            return Err(Error::invalid("max is 0: a wait takes at least one event"));
        }
        let Some(mut given) = self.given.try_lock() else {
            Self::check_open(&self.inner.lock())?;
            return Err(Error::new(Status::Busy, "another thread waits on this queue: it has one waiter at a time"));
        };
        given.clear();
        given.shrink_to(KEPT);
        let deadline = Deadline::new(timeout);
        loop {
            if !self.take(max, deadline, &mut given)? {
                return Ok(0);
            }
            given.iter().for_each(Entry::note_taken);
            given.retain_mut(Entry::keep_wanted);
            if !given.is_empty() {
                let mut count = 0;
                given.iter().for_each(|entry| {
                    entry.show(&mut |event| {
                        count += 1;
                        show(event);
                    });
                });
                return Ok(count);
            }
        }
    }

    fn check_open(inner: &Inner) -> Result<()> {
        if inner.closed {
            return Err(Error::new(Status::Closed, "the queue was freed"));
        }
        Ok(())
    }

    /// Waits, and moves up to `max` events into the empty `given`; false when there is none.
    fn take(&self, max: usize, deadline: Deadline, given: &mut VecDeque<Entry>) -> Result<bool> {
        let mut inner = self.inner.lock();
        loop {
            Self::check_open(&inner)?;
            if !inner.entries.is_empty() {
                break;
            }
            if mem::take(&mut inner.woken) {
                inner.signal();
                return Ok(false);
            }
            match deadline {
                Deadline::Never => {
                    inner.sleeps = true;
                    inner = self.arrived.wait(inner);
                    inner.sleeps = false;
                }
                Deadline::Now => return Ok(false),
                Deadline::At(deadline) => {
                    inner.sleeps = true;
                    let timed_out;
                    (inner, timed_out) = self.arrived.wait_until(inner, deadline);
                    inner.sleeps = false;
                    if timed_out && inner.entries.is_empty() && !inner.woken && !inner.closed {
                        return Ok(false);
                    }
                }
            }
        }
        if inner.count <= max {
            mem::swap(&mut inner.entries, given);
            (inner.count, inner.watch_events, inner.news) = (0, 0, 0);
        } else {
            let mut left = max;
            while left > 0
                && let Some(mut entry) = inner.entries.pop_front()
            {
                if let Entry::LaneBatch(batch) = &mut entry
                    && batch.count > left
                {
                    given.push_back(Entry::LaneBatch(batch.split(left)));
                    inner.entries.push_front(entry);
                    break;
                }
                left -= entry.count();
                given.push_back(entry);
            }
            inner.count -= max;
            inner.watch_events =
                inner.watch_events.saturating_sub(given.iter().filter(|entry| entry.is_watch()).count());
            inner.news = inner.news.saturating_sub(given.iter().filter(|entry| entry.is_news()).count());
        }
        inner.signal();
        Ok(true)
    }

    /// Makes the waiting thread return, or the next one that would wait.
    pub fn wake(&self) {
        let mut inner = self.inner.lock();
        inner.woken = true;
        self.call(&mut inner);
    }

    /// Drops all events and takes no more. Returns when a waiting thread has left.
    pub fn close(&self) {
        let entries = {
            let mut inner = self.inner.lock();
            inner.closed = true;
            self.call(&mut inner);
            inner.count = 0;
            mem::take(&mut inner.entries)
        };
        for entry in entries {
            match entry {
                Entry::Single(Single { kind: Kind::Request, origin: Some(origin), .. }) => origin.abandoned(),
                Entry::Single(Single { kind: Kind::Data, origin: Some(origin), data, .. }) => {
                    origin.dropped(1, data.len() as u64);
                }
                Entry::Single(_) => {}
                Entry::LaneBatch(batch) => batch.drop_all(),
            }
        }
        self.given.lock().clear();
    }

    /// Adds an event. False when the queue is closed.
    pub(crate) fn push(&self, event: Single) -> bool {
        self.push_if(|| Some(event))
    }

    /// Adds the event that `make` gives, if it gives one: it is asked with the queue locked, so that what it looks at and
    /// the event's place in the queue agree. False when the queue is closed.
    pub(crate) fn push_if(&self, make: impl FnOnce() -> Option<Single>) -> bool {
        let mut inner = self.inner.lock();
        if inner.closed {
            return false;
        }
        if let Some(event) = make() {
            self.put(&mut inner, event);
        }
        true
    }

    /// As `push_if`, for events that come in crowds: to call the waiting thread for each costs more than the event. None
    /// when the queue is closed, and true when `flush` must be called once the crowd is over.
    pub(crate) fn push_patiently(&self, make: impl FnOnce() -> Option<Single>) -> Option<bool> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return None;
        }
        let Some(event) = make() else { return Some(false) };
        Some(self.put_patiently(&mut inner, Entry::Single(event), PATIENCE))
    }

    /// As `push_patiently`, for what came in one lane message.
    pub(crate) fn push_batch(&self, mut batch: LaneBatch) -> Option<bool> {
        batch.compact();
        let mut inner = self.inner.lock();
        if inner.closed {
            drop(inner);
            batch.drop_all();
            return None;
        }
        // Asked with the queue locked: nothing comes after a stream's last event.
        batch.retain(|origin| origin.is_running());
        if batch.is_empty() {
            return Some(false);
        }
        Some(self.put_patiently(&mut inner, Entry::LaneBatch(batch), PATIENCE_WITH_BATCHES))
    }

    fn put_patiently(&self, inner: &mut Inner, entry: Entry, patience: usize) -> bool {
        inner.count += entry.count();
        inner.entries.push_back(entry);
        if inner.count < patience {
            return inner.is_awaited() && !mem::replace(&mut inner.deferred, true);
        }
        self.call(inner);
        false
    }

    /// Calls the waiting thread, if there is something for it.
    pub(crate) fn flush(&self) {
        let mut inner = self.inner.lock();
        if mem::take(&mut inner.deferred) {
            self.call(&mut inner);
        }
    }

    fn put(&self, inner: &mut Inner, event: Single) {
        inner.count += 1;
        inner.entries.push_back(Entry::Single(event));
        self.call(inner);
    }

    fn call(&self, inner: &mut Inner) {
        inner.signal();
        if mem::take(&mut inner.sleeps) {
            self.arrived.notify_one();
        }
    }

    /// Adds an ONLINE or OFFLINE event. Over the limit it is dropped, and a LOG event says so once.
    pub(crate) fn push_watch(&self, kind: Kind, tag: u64, client: &str) {
        let mut inner = self.inner.lock();
        if inner.closed {
            return;
        }
        let most = if inner.drops_watch { MAX_WATCH_EVENTS / 2 } else { MAX_WATCH_EVENTS };
        if inner.watch_events < most {
            inner.drops_watch = false;
            inner.watch_events += 1;
            let event = Single { client: Some(client.into()), ..Single::new(kind, Status::Ok, tag, "") };
            self.put(&mut inner, event);
        } else if !mem::replace(&mut inner.drops_watch, true) {
            let text = format!("{MAX_WATCH_EVENTS} presence events wait in the queue: further ones were dropped");
            self.put(&mut inner, Single::new(Kind::Log, Status::Full, tag, text));
        }
    }

    /// Adds a CONNECTED, DISCONNECTED or LOG event. Over the limit it is dropped: nobody reads them.
    pub(crate) fn push_news(&self, kind: Kind, status: Status, tag: u64, text: impl Into<Bytes>) {
        self.push_news_about("", kind, status, tag, text);
    }

    /// The same about a service's subject.
    pub(crate) fn push_news_about(&self, subject: &str, kind: Kind, status: Status, tag: u64, text: impl Into<Bytes>) {
        let mut inner = self.inner.lock();
        if inner.news < MAX_NEWS && !inner.closed {
            inner.news += 1;
            let subject = Bytes::copy_from_slice(subject.as_bytes());
            self.put(&mut inner, Single { subject, ..Single::new(kind, status, tag, text) });
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
    use std::thread;

    struct Probe {
        wanted: AtomicBool,
        taken: AtomicUsize,
        dropped: AtomicUsize,
        shown: Mutex<Vec<Kind>>,
        abandoned: AtomicBool,
    }

    impl Probe {
        fn new() -> Arc<Probe> {
            let (wanted, abandoned) = (AtomicBool::new(true), AtomicBool::new(false));
            let zero = || AtomicUsize::new(0);
            Arc::new(Probe { wanted, taken: zero(), dropped: zero(), shown: Mutex::default(), abandoned })
        }

        fn event(self: &Arc<Self>, kind: Kind, data: &'static str) -> Single {
            Single::of(kind, Status::Ok, Arc::clone(self) as _, data.into())
        }
    }

    impl EventSource for Probe {
        fn handle_id(&self) -> u64 {
            1
        }

        fn tag(&self) -> u64 {
            7
        }

        fn is_wanted(&self) -> bool {
            self.wanted.load(Ordering::Relaxed)
        }

        fn is_running(&self) -> bool {
            true
        }

        fn taken(&self, _count: u64, bytes: u64) {
            self.taken.fetch_add(bytes as usize, Ordering::Relaxed);
        }

        fn dropped(&self, _count: u64, bytes: u64) {
            self.dropped.fetch_add(bytes as usize, Ordering::Relaxed);
        }

        fn shown(&self, kind: Kind) {
            self.shown.lock().push(kind);
        }

        fn abandoned(&self) {
            self.abandoned.store(true, Ordering::Relaxed);
        }
    }

    fn taken(queue: &Queue, max: usize) -> Vec<Bytes> {
        let mut data = Vec::new();
        queue.wait(max, Some(Duration::ZERO), |event| data.push(Bytes::copy_from_slice(event.data))).unwrap();
        data
    }

    pub(crate) fn is_readable(queue: &Queue) -> bool {
        let inner = queue.inner.lock();
        inner.fd.as_ref().unwrap().raised
    }

    #[test]
    fn events_come_in_order_and_in_portions() {
        let queue = Queue::new();
        for text in ["a", "b", "c"] {
            assert!(queue.push(Single::new(Kind::Data, Status::Ok, 0, text)));
        }
        assert_eq!(taken(&queue, 2), ["a", "b"]);
        assert_eq!(taken(&queue, 2), ["c"]);
        assert_eq!(taken(&queue, 2), [""; 0]);
        assert_eq!(queue.wait(0, None, |_| ()).unwrap_err().status, Status::Invalid);
    }

    #[test]
    fn unwanted_events_are_left_out_but_accounted_for() {
        let (queue, probe) = (Queue::new(), Probe::new());
        queue.push(probe.event(Kind::Data, "12345"));
        probe.wanted.store(false, Ordering::Relaxed);
        assert_eq!(taken(&queue, 8), [""; 0]);
        assert_eq!(probe.taken.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn close_abandons_requests_frees_the_waiter_and_takes_no_more() {
        let (queue, probe) = (Queue::new(), Probe::new());
        let waiting = Arc::clone(&queue);
        let waiter = thread::spawn(move || waiting.wait(8, None, |_| ()).unwrap_err().status);
        while queue.given.try_lock().is_some() {
            thread::yield_now();
        }
        assert_eq!(queue.wait(8, Some(Duration::ZERO), |_| ()).unwrap_err().status, Status::Busy);
        queue.close();
        assert_eq!(waiter.join().unwrap(), Status::Closed);
        assert!(!queue.push(probe.event(Kind::Request, "")));
        assert_eq!(queue.push_patiently(|| None), None);

        let queue = Queue::new();
        queue.push(probe.event(Kind::Request, ""));
        queue.close();
        assert!(probe.abandoned.load(Ordering::Relaxed));
    }

    #[test]
    fn a_wake_is_remembered_once() {
        let queue = Queue::new();
        queue.wake();
        queue.wake();
        assert_eq!(queue.wait(8, None, |_| ()).unwrap(), 0);
        assert_eq!(queue.wait(8, Some(Duration::ZERO), |_| ()).unwrap(), 0);
    }

    #[test]
    fn the_descriptor_is_readable_while_a_wait_would_return() {
        let queue = Queue::new();
        queue.push(Single::new(Kind::Data, Status::Ok, 0, "a"));
        let fd = queue.fd().unwrap();
        assert_eq!(queue.fd().unwrap(), fd);
        assert!(is_readable(&queue));
        queue.push(Single::new(Kind::Data, Status::Ok, 0, "b"));
        taken(&queue, 1);
        assert!(is_readable(&queue), "one is left");
        taken(&queue, 1);
        assert!(!is_readable(&queue));
        queue.wake();
        assert!(is_readable(&queue));
        taken(&queue, 1);
        assert!(!is_readable(&queue));
        queue.close();
        assert!(is_readable(&queue));
    }

    #[test]
    fn patient_events_ask_for_one_flush_or_call_when_there_are_many() {
        let queue = Queue::new();
        let event = || Some(Single::new(Kind::Data, Status::Ok, 0, ""));
        assert_eq!(queue.push_patiently(event), Some(false), "nobody waits");
        taken(&queue, 8);
        queue.fd().unwrap();
        assert_eq!(queue.push_patiently(event), Some(true));
        assert_eq!(queue.push_patiently(event), Some(false), "a flush is promised already");
        assert!(!is_readable(&queue));
        queue.flush();
        assert!(is_readable(&queue));
        taken(&queue, 8);
        assert_eq!(queue.push_patiently(event), Some(true));
        for _ in 1..PATIENCE {
            queue.push_patiently(event);
        }
        assert!(is_readable(&queue), "too many to be patient");
    }

    #[test]
    fn watch_events_and_news_are_bounded() {
        let queue = Queue::new();
        for _ in 0..MAX_WATCH_EVENTS + 10 {
            queue.push_watch(Kind::Online, 0, "a");
        }
        for _ in 0..MAX_NEWS + 10 {
            queue.push_news(Kind::Log, Status::Ok, 0, "a");
        }
        let mut kinds = Vec::new();
        queue.wait(usize::MAX, None, |event| kinds.push((event.kind, event.status))).unwrap();
        let count = |kind| kinds.iter().filter(|(other, _)| *other == kind).count();
        assert_eq!(count(Kind::Online), MAX_WATCH_EVENTS);
        assert_eq!(count(Kind::Log), MAX_NEWS + 1);
        assert_eq!(kinds.iter().filter(|event| **event == (Kind::Log, Status::Full)).count(), 1);
        queue.push_watch(Kind::Offline, 0, "a");
        assert_eq!(taken(&queue, 8).len(), 1, "there is room again");

        // A reader that is slow for ever hears of it once for each half of them that it takes.
        for _ in 0..MAX_WATCH_EVENTS + 10 {
            queue.push_watch(Kind::Online, 0, "a");
        }
        let (mut logs, mut events) = (0, 0);
        for _ in 0..MAX_WATCH_EVENTS / 2 + 10 {
            queue.wait(1, None, |event| if event.kind == Kind::Log { logs += 1 } else { events += 1 }).unwrap();
            queue.push_watch(Kind::Online, 0, "a");
        }
        assert_eq!((logs, events), (0, MAX_WATCH_EVENTS / 2 + 10));
        while queue.wait(1024, Some(Duration::ZERO), |event| logs += usize::from(event.kind == Kind::Log)).unwrap() > 0
        {
        }
        assert_eq!(logs, 1);
    }

    #[test]
    fn who_waits_in_a_queue_hears_what_becomes_of_it() {
        let (queue, probe) = (Queue::new(), Probe::new());
        for kind in [Kind::Request, Kind::Writable, Kind::Stopped] {
            queue.push(probe.event(kind, ""));
        }
        taken(&queue, 2);
        assert_eq!(*probe.shown.lock(), [Kind::Request, Kind::Writable]);
        queue.push(probe.event(Kind::Data, "12345"));
        queue.close();
        assert_eq!((probe.taken.load(Ordering::Relaxed), probe.dropped.load(Ordering::Relaxed)), (0, 5));
    }

    #[test]
    fn what_waits_keeps_no_more_than_it_is() {
        let buffer = Bytes::from(vec![7; 64 << 10]);
        for (length, is_copied) in [(0, true), (10, true), (COPY_ALONE_BELOW - 1, true), (COPY_ALONE_BELOW, false)] {
            let part = buffer.slice(100..100 + length);
            assert_eq!(unpin(part.clone()), part);
            assert_eq!(unpin(part.clone()).as_ptr() != part.as_ptr(), is_copied, "{length}");
        }
    }
}
