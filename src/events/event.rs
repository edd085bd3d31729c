//! Events: what the caller sees, what a queue stores, and the senders and streams that they come from. `Kind` is the
//! header's presence_event_kind.

use crate::error::Status;
use crate::process::fork;
use crate::status_word::StatusWord;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::wire::frame::Run;
use bytes::{Bytes, BytesMut};
use std::any::Any;
use std::collections::VecDeque;
use std::ffi::CStr;
use std::sync::Arc;

/// If less than this of a lane message is needed, it is copied. Otherwise an event that stays in the queue would keep
/// the NATS client's whole read buffer, which is 64 KiB or more.
const COPY_BELOW: usize = 4096;
/// The same for a payload that is alone in its message.
const COPY_ALONE_BELOW: usize = 32 << 10;

/// The kind of an event, with the fields that it sets besides `kind`, `status` and `tag`.
#[repr(i32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A service received a request. `sender` answers it: the caller owns it and must call presence_sender_free.
    /// `client` is the client's id, or empty; `subject` is what the request was sent to; `data` is its payload.
    Request = 1,
    /// A message of a stream: `stream`, `data`.
    Data = 2,
    /// The worker ended the stream: `stream`. It is the stream's last event.
    End = 3,
    /// The stream ended in another way: `stream`; `status` is why, `data` a text, and `error_code` the code that the
    /// worker gave, if it gave one. It is the stream's last event.
    Error = 4,
    /// A sender was stopped: `sender`, `client`; `status` is why. Delivered at most once, after REQUEST, and never for
    /// a sender that you ended yourself. The sender must still be freed.
    Stopped = 5,
    /// A sender that returned PRESENCE_FULL can send again: `sender`, `client`.
    Writable = 6,
    /// A client came online in this process: `client`. Only in queues that were passed to presence_watch.
    Online = 7,
    /// A client went offline in this process: `client`. Only in queues that were passed to presence_watch.
    Offline = 8,
    /// The connection to nats-server was made: `data` is the server's host:port. Only in queues that were passed to
    /// presence_conn_watch.
    ///
    /// With a `subject`, in a service's queue: nats-server has accepted the service's subscription again.
    Connected = 9,
    /// The connection to nats-server is lost: `data` is why. Streams and senders on level 0, and requests that no
    /// worker has accepted, end with PRESENCE_DISCONNECTED. The library reconnects, unless `status` is PRESENCE_CLOSED.
    /// Only in queues that were passed to presence_conn_watch.
    ///
    /// With a `subject`, in a service's queue: nats-server has refused the service's subscription or taken it back, so
    /// no requests come; `data` is why. See presence_serve.
    Disconnected = 10,
    /// Something that an operator should know: `data` is a text; `status` and `tag` say what it is about.
    Log = 11,
}

impl Kind {
    /// All kinds, in the order of their numbers, which begin with 1.
    pub(crate) const ALL: [Kind; 11] = [
        Kind::Request,
        Kind::Data,
        Kind::End,
        Kind::Error,
        Kind::Stopped,
        Kind::Writable,
        Kind::Online,
        Kind::Offline,
        Kind::Connected,
        Kind::Disconnected,
        Kind::Log,
    ];

    /// Returns its name in the ABI without the prefix, NUL-terminated for C.
    pub(crate) const fn c_text(self) -> &'static CStr {
        match self {
            Kind::Request => c"REQUEST",
            Kind::Data => c"DATA",
            Kind::End => c"END",
            Kind::Error => c"ERROR",
            Kind::Stopped => c"STOPPED",
            Kind::Writable => c"WRITABLE",
            Kind::Online => c"ONLINE",
            Kind::Offline => c"OFFLINE",
            Kind::Connected => c"CONNECTED",
            Kind::Disconnected => c"DISCONNECTED",
            Kind::Log => c"LOG",
        }
    }
}

/// What senders and streams have in common.
pub(crate) struct Source {
    pub(crate) handle_id: u64,
    /// The caller's number for its events.
    pub(crate) tag: AtomicU64,
    /// 0 while it runs. No event follows its last one.
    pub(crate) word: StatusWord,
    is_freed: AtomicBool,
}

impl Source {
    pub(crate) fn new(tag: u64) -> Source {
        let handle_id = fork::next_handle_id();
        Source { handle_id, tag: AtomicU64::new(tag), word: StatusWord::default(), is_freed: AtomicBool::new(false) }
    }

    #[inline]
    pub(crate) fn tag(&self) -> u64 {
        self.tag.load(Ordering::Relaxed)
    }

    pub(crate) fn is_running(&self) -> bool {
        self.word.check().is_ok()
    }

    /// The caller has freed it: its events are dropped from now on.
    pub(crate) fn set_freed(&self) {
        self.is_freed.store(true, Ordering::Release);
    }

    pub(crate) fn is_freed(&self) -> bool {
        self.is_freed.load(Ordering::Acquire)
    }
}

/// A sender or stream that events are about.
pub(crate) trait EventSource: Any + Send + Sync {
    fn source(&self) -> &Source;
    /// So many of its events, with so many bytes of payload, have left the queue: delivered by a wait, or else
    /// discarded with the queue.
    fn left_queue(&self, _kind: Kind, _count: u64, _bytes: u64, _is_delivered: bool) {}
}

/// Something that happened, as a wait shows it.
#[derive(Clone, Copy)]
pub struct Event<'a> {
    /// What happened.
    pub kind: Kind,
    /// Why, for Error, Stopped, Disconnected and Log; otherwise Ok.
    pub status: Status,
    /// The number that the caller passed to serve, request or watch.
    pub tag: u64,
    /// The client's id, if the event is about one; empty for a request without a client.
    pub client: &'a str,
    /// Error: the code that the worker gave, from 1 to 2,147,483,647; 0 if it gave none.
    pub error_code: i32,
    /// Request: the subject that it was sent to.
    pub subject: &'a [u8],
    /// A payload or a text.
    pub data: &'a [u8],
    /// The handle id of the sender or stream that it is about; 0 if there is none.
    pub(crate) handle_id: u64,
    pub(super) source: Option<&'a Arc<dyn EventSource>>,
}

impl Event<'_> {
    /// The sender or stream that it is about, if it is a `T`.
    pub(crate) fn source<T: EventSource>(&self) -> Option<Arc<T>> {
        let source: Arc<dyn Any + Send + Sync> = Arc::clone(self.source?) as _;
        source.downcast().ok()
    }
}

/// A queued event.
pub(crate) struct Single {
    pub(crate) kind: Kind,
    pub(crate) status: Status,
    pub(crate) error_code: i32,
    pub(crate) tag: u64,
    pub(crate) client: Option<Arc<str>>,
    pub(crate) subject: Bytes,
    pub(crate) data: Bytes,
    pub(crate) source: Option<Arc<dyn EventSource>>,
}

impl Single {
    /// Whether it is about a sender, and is not its request.
    pub(super) fn is_later_event_of_sender(&self) -> bool {
        matches!(self.kind, Kind::Stopped | Kind::Writable)
    }

    /// An event about no sender or stream.
    pub(crate) fn new(kind: Kind, status: Status, tag: u64, data: impl Into<Bytes>) -> Single {
        let (client, subject, data) = (None, Bytes::new(), data.into());
        Single { kind, status, error_code: 0, tag, client, subject, data, source: None }
    }

    pub(crate) fn of(kind: Kind, status: Status, source: Arc<dyn EventSource>, data: Bytes) -> Single {
        let tag = source.source().tag();
        Single { source: Some(source), ..Single::new(kind, status, tag, data) }
    }

    pub(super) fn show(&self) -> Event<'_> {
        Event {
            kind: self.kind,
            status: self.status,
            // Read now, because the caller may have set another one since the event was queued.
            tag: self.source.as_ref().map_or(self.tag, |source| source.source().tag()),
            client: self.client.as_deref().unwrap_or_default(),
            error_code: self.error_code,
            subject: &self.subject,
            data: &self.data,
            handle_id: self.source.as_ref().map_or(0, |source| source.source().handle_id),
            source: self.source.as_ref(),
        }
    }
}

/// The queued DATA events of one lane message. The events themselves are made when a wait shows them.
pub(crate) struct LaneBatch {
    message: Bytes,
    parts: VecDeque<(Arc<dyn EventSource>, Run)>,
    /// The events in all parts.
    count: usize,
}

impl LaneBatch {
    pub(crate) fn new(message: Bytes) -> LaneBatch {
        LaneBatch { message, parts: VecDeque::new(), count: 0 }
    }

    pub(crate) fn add(&mut self, source: Arc<dyn EventSource>, run: Run) {
        self.count += run.count as usize;
        self.parts.push_back((source, run));
    }

    pub(super) fn count(&self) -> usize {
        self.count
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    pub(super) fn retain(&mut self, is_kept: impl Fn(&Arc<dyn EventSource>) -> bool) {
        let count = &mut self.count;
        self.parts.retain(|(source, run)| {
            let is_kept = is_kept(source);
            if !is_kept {
                *count -= run.count as usize;
            }
            is_kept
        });
    }

    /// Copies what is needed of the message, unless that is most of it: it may stay in the queue for long.
    pub(super) fn compact(&mut self) {
        let needed: usize = self.parts.iter().map(|(_, run)| run.size()).sum();
        if needed >= COPY_BELOW && needed >= self.message.len() / 2 {
            return;
        }
        let mut copy = BytesMut::with_capacity(needed);
        for (_, run) in &mut self.parts {
            run.move_to(&mut copy, &self.message);
        }
        self.message = copy.freeze();
    }

    /// The senders or streams, each with its number of events and their bytes.
    pub(super) fn parts(&self) -> impl Iterator<Item = (&Arc<dyn EventSource>, u64, u64)> {
        self.parts.iter().map(|(source, run)| (source, run.count.into(), run.bytes))
    }

    /// Cuts off the first `count` events.
    pub(super) fn split(&mut self, count: usize) -> LaneBatch {
        let mut first = LaneBatch::new(self.message.clone());
        let mut left = count.min(self.count);
        self.count -= left;
        while left > 0
            && let Some((source, mut run)) = self.parts.pop_front()
        {
            if run.count as usize > left {
                first.add(Arc::clone(&source), run.split(&self.message, left as u32));
                self.parts.push_front((source, run));
                break;
            }
            left -= run.count as usize;
            first.add(source, run);
        }
        first
    }

    #[inline]
    pub(super) fn show(&self, show: &mut impl FnMut(Event<'_>)) {
        for (source, run) in &self.parts {
            let own = source.source();
            let (tag, handle_id) = (own.tag(), own.handle_id);
            for data in run.bodies(&self.message) {
                let (kind, status, source) = (Kind::Data, Status::Ok, Some(source));
                show(Event { kind, status, tag, client: "", error_code: 0, subject: &[], data, handle_id, source });
            }
        }
    }
}

/// A payload that may stay in the queue for long: a copy, unless it is most of the NATS client's read buffer.
pub(crate) fn unpin(payload: Bytes) -> Bytes {
    if payload.len() < COPY_ALONE_BELOW { Bytes::copy_from_slice(&payload) } else { payload }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queued_payload_does_not_keep_a_larger_buffer() {
        let buffer = Bytes::from(vec![7; 64 << 10]);
        for (length, is_copied) in [(0, true), (10, true), (COPY_ALONE_BELOW - 1, true), (COPY_ALONE_BELOW, false)] {
            let part = buffer.slice(100..100 + length);
            assert_eq!(unpin(part.clone()), part);
            assert_eq!(unpin(part.clone()).as_ptr() != part.as_ptr(), is_copied, "{length}");
        }
    }
}
