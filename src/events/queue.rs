//! The queue: services, streams and watches push events, one thread takes them out.

use super::event::{Event, Kind, LaneBatch, Single};
use crate::error::{Error, Result, Status};
use crate::process::fork;
use crate::sync::{Condvar, Mutex, deadline};
use bytes::Bytes;
use nix::sys::eventfd::{EfdFlags, EventFd};
use std::collections::VecDeque;
use std::mem;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many ONLINE and OFFLINE events one queue holds.
const MAX_PRESENCE_EVENTS: usize = 65_536;
/// How many CONNECTED, DISCONNECTED and LOG events one queue holds.
const MAX_CONNECTION_EVENTS: usize = 1024;
/// For how many events memory is kept when all are taken.
const KEPT: usize = 4096;
/// With so many events in the queue, the waiting thread is woken without waiting for `flush`.
const MAX_DEFERRED: usize = 64;
/// The same where the events come in lane messages, with many events each.
const MAX_DEFERRED_IN_BATCHES: usize = 8192;

/// With a wakeup less than this ago, the next one is deferred.
const BUSY: Duration = Duration::from_micros(200);

enum Entry {
    Single(Single),
    LaneBatch(LaneBatch),
}

impl Entry {
    fn count(&self) -> usize {
        match self {
            Entry::Single(_) => 1,
            Entry::LaneBatch(batch) => batch.count(),
        }
    }

    /// Tells each sender or stream that its events have left the queue.
    fn left_queue(&self, is_delivered: bool) {
        match self {
            Entry::Single(Single { source: None, .. }) => {}
            Entry::Single(Single { kind, source: Some(source), data, .. }) => {
                source.left_queue(*kind, 1, data.len() as u64, is_delivered);
            }
            Entry::LaneBatch(batch) => {
                batch.parts().for_each(|(source, count, bytes)| {
                    source.left_queue(Kind::Data, count, bytes, is_delivered);
                });
            }
        }
    }

    /// Drops the events of freed senders and streams; returns false if no event is left.
    fn retain_unfreed(&mut self) -> bool {
        match self {
            Entry::Single(event) => event.source.as_ref().is_none_or(|source| !source.source().is_freed()),
            Entry::LaneBatch(batch) => {
                batch.retain(|source| !source.source().is_freed());
                !batch.is_empty()
            }
        }
    }

    #[inline]
    fn show(&self, show: &mut impl FnMut(Event<'_>)) {
        match self {
            Entry::Single(event) => show(event.show()),
            Entry::LaneBatch(batch) => batch.show(show),
        }
    }

    fn is_presence_event(&self) -> bool {
        matches!(self, Entry::Single(Single { kind: Kind::Online | Kind::Offline, .. }))
    }

    fn is_connection_event(&self) -> bool {
        matches!(self, Entry::Single(Single { kind: Kind::Connected | Kind::Disconnected | Kind::Log, .. }))
    }
}

/// Holds events until a thread waits for them.
pub struct Queue {
    pub(crate) handle_id: u64,
    inner: Mutex<Inner>,
    arrived: Condvar,
    /// The events of the last wait, kept until the next one; locked by the thread that waits.
    shown: Mutex<VecDeque<Entry>>,
}

#[derive(Default)]
struct Inner {
    entries: VecDeque<Entry>,
    /// The events in all entries.
    count: usize,
    presence_events: usize,
    /// Presence events were dropped, and a LOG says so. The limit is half as high until there is room again.
    drops_presence: bool,
    connection_events: usize,
    /// There may be STOPPED or WRITABLE events.
    has_sender_events: bool,
    woken: bool,
    closed: bool,
    /// A thread waits and was not notified yet.
    has_waiter: bool,
    /// When the waiting thread was last woken.
    woken_at: Option<Instant>,
    /// A caller of `push_deferred` is going to call `flush`.
    flush_pending: bool,
    /// Created on the first call of `fd`: a queue without it needs no system calls.
    fd: Option<Descriptor>,
}

struct Descriptor {
    event_fd: EventFd,
    readable: bool,
}

impl Inner {
    /// Whether a thread has to be woken for a new event.
    fn is_awaited(&self) -> bool {
        self.has_waiter || self.fd.as_ref().is_some_and(|fd| !fd.readable)
    }

    /// Whether the waiting thread was woken just before.
    #[cfg(not(shuttle))]
    fn is_busy(&self) -> bool {
        self.woken_at.is_some_and(|at| at.elapsed() < BUSY)
    }

    /// Any time may have passed.
    #[cfg(shuttle)]
    fn is_busy(&self) -> bool {
        shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng())
    }

    /// Puts back what follows a request and is about a sender: until the next wait, the caller may give the request's
    /// sender a tag of its own, which its further events must have.
    fn put_back_events_of_senders(&mut self, taken: &mut VecDeque<Entry>) {
        let is_request = |entry: &Entry| matches!(entry, Entry::Single(Single { kind: Kind::Request, .. }));
        let is_later = |entry: &Entry| matches!(entry, Entry::Single(event) if event.is_later_event_of_sender());
        let Some(request) = taken.iter().position(is_request) else { return };
        let Some(later) = taken.iter().skip(request).position(is_later) else { return };
        for entry in taken.drain(request + later..).rev() {
            self.count += entry.count();
            self.presence_events += usize::from(entry.is_presence_event());
            self.connection_events += usize::from(entry.is_connection_event());
            self.entries.push_front(entry);
        }
    }

    /// Makes the file descriptor readable exactly while a wait would return at once.
    fn update_fd(&mut self) {
        let ready = self.woken || self.closed || !self.entries.is_empty();
        if let Some(fd) = &mut self.fd
            && fd.readable != ready
        {
            // Neither can fail: the counter is 0 or 1, and the descriptor is ours and does not block.
            let _ = if ready { fd.event_fd.write(1).map(drop) } else { fd.event_fd.read().map(drop) };
            fd.readable = ready;
        }
    }
}

impl Queue {
    /// Creates a queue.
    #[must_use]
    pub fn new() -> Arc<Queue> {
        Arc::new(Queue {
            handle_id: fork::next_handle_id(),
            inner: Mutex::default(),
            arrived: Condvar::default(),
            shown: Mutex::default(),
        })
    }

    /// A file descriptor that is readable as long as a wait would return at once. It belongs to the queue.
    ///
    /// # Errors
    /// `Status::Full` if the system has no file descriptor left.
    pub fn fd(&self) -> Result<RawFd> {
        let mut inner = self.inner.lock();
        if inner.fd.is_none() {
            let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
            let event_fd = EventFd::from_value_and_flags(0, flags).map_err(|error| {
                Error::new(Status::Full, format!("cannot create an eventfd for the queue: {error}"))
            })?;
            inner.fd = Some(Descriptor { event_fd, readable: false });
            inner.update_fd();
        }
        match &inner.fd {
            Some(fd) => Ok(fd.event_fd.as_fd().as_raw_fd()),
            None => Err(Status::Internal.into()),
        }
    }

    /// Waits for events (`None`: without limit) and calls `show` with up to `max` of them, in order.
    ///
    /// Returns how many; 0 if the time passed or the queue was woken. The events stay allocated until the next wait.
    ///
    /// # Errors
    /// `Status::Busy` while another thread waits, `Status::Closed` if the queue was closed.
    pub fn wait(&self, max: usize, timeout: Option<Duration>, mut show: impl FnMut(Event<'_>)) -> Result<usize> {
        if max == 0 {
            return Err(Error::invalid("max is 0; it must be at least 1"));
        }
        let Some(mut shown) = self.shown.try_lock() else {
            Self::check_open(&self.inner.lock())?;
            return Err(Error::new(Status::Busy, "another thread waits on this queue; only one may at a time"));
        };
        shown.clear();
        shown.shrink_to(KEPT);
        let may_wait = timeout != Some(Duration::ZERO);
        // The clock is not read without need.
        let deadline = deadline(timeout.filter(|_| may_wait));
        loop {
            if !self.take(max, may_wait, deadline, &mut shown)? {
                return Ok(0);
            }
            shown.iter().for_each(|entry| entry.left_queue(true));
            shown.retain_mut(Entry::retain_unfreed);
            if !shown.is_empty() {
                let mut count = 0;
                shown.iter().for_each(|entry| {
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

    /// Waits if it may, and moves up to `max` events into the empty `taken`. Returns false if there are none.
    fn take(&self, max: usize, may_wait: bool, deadline: Option<Instant>, taken: &mut VecDeque<Entry>) -> Result<bool> {
        let mut inner = self.inner.lock();
        loop {
            Self::check_open(&inner)?;
            if !inner.entries.is_empty() {
                break;
            }
            if mem::take(&mut inner.woken) {
                inner.update_fd();
                return Ok(false);
            }
            if !may_wait {
                return Ok(false);
            }
            inner.has_waiter = true;
            let timed_out;
            (inner, timed_out) = self.arrived.wait_until(inner, deadline);
            inner.has_waiter = false;
            if timed_out && inner.entries.is_empty() && !inner.woken && !inner.closed {
                return Ok(false);
            }
        }
        if inner.count <= max {
            mem::swap(&mut inner.entries, taken);
            (inner.count, inner.presence_events, inner.connection_events) = (0, 0, 0);
        } else {
            let mut left = max;
            while left > 0
                && let Some(mut entry) = inner.entries.pop_front()
            {
                if let Entry::LaneBatch(batch) = &mut entry
                    && batch.count() > left
                {
                    taken.push_back(Entry::LaneBatch(batch.split(left)));
                    inner.entries.push_front(entry);
                    break;
                }
                left -= entry.count();
                taken.push_back(entry);
            }
            inner.count -= max;
            let presence_events = taken.iter().filter(|entry| entry.is_presence_event()).count();
            let connection_events = taken.iter().filter(|entry| entry.is_connection_event()).count();
            inner.presence_events = inner.presence_events.saturating_sub(presence_events);
            inner.connection_events = inner.connection_events.saturating_sub(connection_events);
        }
        if inner.has_sender_events {
            inner.put_back_events_of_senders(taken);
            inner.has_sender_events = !inner.entries.is_empty();
        }
        inner.update_fd();
        Ok(true)
    }

    /// Makes the waiting thread return, or the next one that would wait.
    pub fn wake(&self) {
        let mut inner = self.inner.lock();
        inner.woken = true;
        self.wake_waiter(&mut inner);
    }

    /// Drops all events and accepts no more. Returns when the waiting thread has left.
    pub fn close(&self) {
        let entries = {
            let mut inner = self.inner.lock();
            inner.closed = true;
            self.wake_waiter(&mut inner);
            inner.count = 0;
            mem::take(&mut inner.entries)
        };
        entries.iter().for_each(|entry| entry.left_queue(false));
        drop(entries);
        self.shown.lock().clear();
    }

    /// Adds an event. Returns false if the queue is closed.
    pub(crate) fn push(&self, event: Single) -> bool {
        let mut inner = self.inner.lock();
        if !inner.closed {
            self.put(&mut inner, event);
        }
        !inner.closed
    }

    /// Adds the event that `make` returns, without waking the waiting thread if it was woken just before, as a wakeup for
    /// each event would cost more than the event. `make` is called with the queue locked, so that what it reads agrees
    /// with the event's position.
    ///
    /// Returns None if the queue is closed, and true if the caller must call `flush` after its last event.
    pub(crate) fn push_deferred(&self, make: impl FnOnce() -> Option<Single>) -> Option<bool> {
        let mut inner = self.inner.lock();
        if inner.closed {
            return None;
        }
        let Some(event) = make() else { return Some(false) };
        Some(self.put_deferred(&mut inner, Entry::Single(event), MAX_DEFERRED))
    }

    /// As `push_deferred`, for the events of one lane message.
    pub(crate) fn push_batch(&self, mut batch: LaneBatch) -> Option<bool> {
        batch.compact();
        let mut inner = self.inner.lock();
        if inner.closed {
            drop(inner);
            Entry::LaneBatch(batch).left_queue(false);
            return None;
        }
        // With the queue locked, so that no event follows a stream's last one.
        batch.retain(|source| source.source().is_running());
        if batch.is_empty() {
            return Some(false);
        }
        Some(self.put_deferred(&mut inner, Entry::LaneBatch(batch), MAX_DEFERRED_IN_BATCHES))
    }

    fn put_deferred(&self, inner: &mut Inner, entry: Entry, max_deferred: usize) -> bool {
        inner.count += entry.count();
        inner.entries.push_back(entry);
        if inner.count < max_deferred {
            if !inner.is_awaited() || inner.flush_pending {
                return false;
            }
            // On a busy queue one wakeup is for many events. On a quiet one it would come later for nothing.
            inner.flush_pending = inner.is_busy();
            if inner.flush_pending {
                return true;
            }
        }
        self.wake_waiter(inner);
        false
    }

    /// Wakes the waiting thread for the events that were pushed without waking it.
    pub(crate) fn flush(&self) {
        let mut inner = self.inner.lock();
        if mem::take(&mut inner.flush_pending) {
            self.wake_waiter(&mut inner);
        }
    }

    fn put(&self, inner: &mut Inner, event: Single) {
        inner.count += 1;
        inner.has_sender_events |= event.is_later_event_of_sender();
        inner.entries.push_back(Entry::Single(event));
        self.wake_waiter(inner);
    }

    fn wake_waiter(&self, inner: &mut Inner) {
        if inner.is_awaited() {
            inner.woken_at = Some(Instant::now());
        }
        inner.update_fd();
        if mem::take(&mut inner.has_waiter) {
            self.arrived.notify_one();
        }
    }

    /// Adds an ONLINE or OFFLINE event. Above the limit it is dropped, and one LOG event says so.
    pub(crate) fn push_presence(&self, kind: Kind, tag: u64, client: &str) {
        let mut inner = self.inner.lock();
        if inner.closed {
            return;
        }
        let most = if inner.drops_presence { MAX_PRESENCE_EVENTS / 2 } else { MAX_PRESENCE_EVENTS };
        if inner.presence_events < most {
            inner.drops_presence = false;
            inner.presence_events += 1;
            let event = Single { client: Some(client.into()), ..Single::new(kind, Status::Ok, tag, "") };
            self.put(&mut inner, event);
        } else if !mem::replace(&mut inner.drops_presence, true) {
            let text = format!("presence events were dropped: the queue holds {MAX_PRESENCE_EVENTS} at most");
            self.put(&mut inner, Single::new(Kind::Log, Status::Full, tag, text));
        }
    }

    /// Adds a CONNECTED, DISCONNECTED or LOG event of a connection, or of a service if `subject` is not empty. Above
    /// the limit it is dropped.
    pub(crate) fn push_connection(&self, subject: &str, kind: Kind, status: Status, tag: u64, text: impl Into<Bytes>) {
        let mut inner = self.inner.lock();
        if inner.connection_events < MAX_CONNECTION_EVENTS && !inner.closed {
            inner.connection_events += 1;
            let subject = Bytes::copy_from_slice(subject.as_bytes());
            self.put(&mut inner, Single { subject, ..Single::new(kind, status, tag, text) });
        }
    }
}

#[cfg(all(test, shuttle))]
#[path = "../../tests/interleavings/queue.rs"]
mod interleavings;

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::events::{EventSource, Source};
    use crate::sync::atomic::{AtomicUsize, Ordering};
    use std::thread;

    struct Probe {
        source: Source,
        delivered_bytes: AtomicUsize,
        discarded_bytes: AtomicUsize,
        delivered: Mutex<Vec<Kind>>,
        discarded: Mutex<Vec<Kind>>,
    }

    impl Probe {
        fn new() -> Arc<Probe> {
            Arc::new(Probe {
                source: Source::new(7),
                delivered_bytes: AtomicUsize::new(0),
                discarded_bytes: AtomicUsize::new(0),
                delivered: Mutex::default(),
                discarded: Mutex::default(),
            })
        }

        fn event(self: &Arc<Self>, kind: Kind, data: &'static str) -> Single {
            Single::of(kind, Status::Ok, Arc::clone(self) as _, data.into())
        }
    }

    impl EventSource for Probe {
        fn source(&self) -> &Source {
            &self.source
        }

        fn left_queue(&self, kind: Kind, count: u64, bytes: u64, is_delivered: bool) {
            assert_eq!(count, 1);
            let (kinds, sum) = if is_delivered {
                (&self.delivered, &self.delivered_bytes)
            } else {
                (&self.discarded, &self.discarded_bytes)
            };
            sum.fetch_add(bytes as usize, Ordering::Relaxed);
            kinds.lock().push(kind);
        }
    }

    fn taken(queue: &Queue, max: usize) -> Vec<Bytes> {
        let mut data = Vec::new();
        queue.wait(max, Some(Duration::ZERO), |event| data.push(Bytes::copy_from_slice(event.data))).unwrap();
        data
    }

    pub(crate) fn is_readable(queue: &Queue) -> bool {
        let inner = queue.inner.lock();
        inner.fd.as_ref().unwrap().readable
    }

    /// Makes the queue believe that the waiting thread was woken just now, for a long time.
    pub(crate) fn keep_busy(queue: &Queue) {
        queue.inner.lock().woken_at = Some(Instant::now() + Duration::from_secs(3600));
    }

    #[test]
    fn events_come_in_order_and_at_most_max_at_once() {
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
    fn events_of_a_freed_source_are_dropped_but_reported_as_delivered() {
        let (queue, probe) = (Queue::new(), Probe::new());
        queue.push(probe.event(Kind::Data, "12345"));
        probe.source.set_freed();
        assert_eq!(taken(&queue, 8), [""; 0]);
        assert_eq!(probe.delivered_bytes.load(Ordering::Relaxed), 5);
    }

    #[test]
    fn close_discards_requests_wakes_the_waiter_and_accepts_no_more() {
        let (queue, probe) = (Queue::new(), Probe::new());
        let waiting = Arc::clone(&queue);
        let waiter = thread::spawn(move || waiting.wait(8, None, |_| ()).unwrap_err().status);
        while queue.shown.try_lock().is_some() {
            thread::yield_now();
        }
        assert_eq!(queue.wait(8, Some(Duration::ZERO), |_| ()).unwrap_err().status, Status::Busy);
        queue.close();
        assert_eq!(waiter.join().unwrap(), Status::Closed);
        assert!(!queue.push(probe.event(Kind::Request, "")));
        assert_eq!(queue.push_deferred(|| None), None);

        let queue = Queue::new();
        queue.push(probe.event(Kind::Request, ""));
        queue.close();
        assert_eq!(*probe.discarded.lock(), [Kind::Request]);
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
    fn deferred_events_ask_for_one_flush_and_many_wake_without_it() {
        let queue = Queue::new();
        let event = || Some(Single::new(Kind::Data, Status::Ok, 0, ""));
        assert_eq!(queue.push_deferred(event), Some(false), "nobody waits");
        taken(&queue, 8);
        queue.fd().unwrap();
        assert_eq!(queue.push_deferred(event), Some(false));
        assert!(is_readable(&queue), "a quiet queue wakes at once");
        taken(&queue, 8);
        keep_busy(&queue);
        assert_eq!(queue.push_deferred(event), Some(true));
        assert_eq!(queue.push_deferred(event), Some(false), "a flush is pending already");
        assert!(!is_readable(&queue));
        queue.flush();
        assert!(is_readable(&queue));
        taken(&queue, 8);
        keep_busy(&queue);
        assert_eq!(queue.push_deferred(event), Some(true));
        for _ in 1..MAX_DEFERRED {
            queue.push_deferred(event);
        }
        assert!(is_readable(&queue), "too many to be deferred");
    }

    #[test]
    fn presence_and_connection_events_are_bounded() {
        let queue = Queue::new();
        for _ in 0..MAX_PRESENCE_EVENTS + 10 {
            queue.push_presence(Kind::Online, 0, "a");
        }
        for _ in 0..MAX_CONNECTION_EVENTS + 10 {
            queue.push_connection("", Kind::Log, Status::Ok, 0, "a");
        }
        let mut kinds = Vec::new();
        queue.wait(usize::MAX, None, |event| kinds.push((event.kind, event.status))).unwrap();
        let count = |kind| kinds.iter().filter(|(other, _)| *other == kind).count();
        assert_eq!(count(Kind::Online), MAX_PRESENCE_EVENTS);
        assert_eq!(count(Kind::Log), MAX_CONNECTION_EVENTS + 1);
        assert_eq!(kinds.iter().filter(|event| **event == (Kind::Log, Status::Full)).count(), 1);
        queue.push_presence(Kind::Offline, 0, "a");
        assert_eq!(taken(&queue, 8).len(), 1, "there is room again");

        // A reader that is always too slow gets one LOG for each half of the limit that it takes.
        for _ in 0..MAX_PRESENCE_EVENTS + 10 {
            queue.push_presence(Kind::Online, 0, "a");
        }
        let (mut logs, mut events) = (0, 0);
        for _ in 0..MAX_PRESENCE_EVENTS / 2 + 10 {
            queue.wait(1, None, |event| if event.kind == Kind::Log { logs += 1 } else { events += 1 }).unwrap();
            queue.push_presence(Kind::Online, 0, "a");
        }
        assert_eq!((logs, events), (0, MAX_PRESENCE_EVENTS / 2 + 10));
        while queue.wait(1024, Some(Duration::ZERO), |event| logs += usize::from(event.kind == Kind::Log)).unwrap() > 0
        {
        }
        assert_eq!(logs, 1);
    }

    #[test]
    fn a_source_learns_whether_its_events_are_delivered_or_discarded() {
        let (queue, probe) = (Queue::new(), Probe::new());
        for kind in [Kind::Request, Kind::Writable, Kind::Stopped] {
            queue.push(probe.event(kind, ""));
        }
        assert_eq!(taken(&queue, 2).len(), 1, "a wait that returns a request returns no later event of a sender");
        taken(&queue, 1);
        assert_eq!(*probe.delivered.lock(), [Kind::Request, Kind::Writable]);
        queue.push(probe.event(Kind::Data, "12345"));
        queue.close();
        let bytes = |bytes: &AtomicUsize| bytes.load(Ordering::Relaxed);
        assert_eq!((bytes(&probe.delivered_bytes), bytes(&probe.discarded_bytes)), (0, 5));
        assert_eq!(*probe.discarded.lock(), [Kind::Stopped, Kind::Data]);
    }
}
