//! The streams of a lane's end, and how far each sender may be ahead of its reader.

use crate::lane::event::{LaneEvent, LaneEvents, Role};
use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use crate::wire::frame::{self, Frame, Frames, Malformed, Run};
use crate::wire::stream_error;
use ahash::RandomState;
use bytes::Bytes;
use std::collections::{HashMap, HashSet};
use std::mem;
use std::sync::Arc;

/// What a message counts in its stream's window in addition to its bytes.
pub(crate) const OVERHEAD: u64 = 64;

/// A sender's part of its stream's window. Used under the lane's lock only.
#[derive(Debug)]
pub(crate) struct SendWindow {
    pub(super) stream: u32,
    size: AtomicU32,
    outstanding: AtomicU64,
    sent: AtomicU64,
}

impl SendWindow {
    /// How many messages were sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    #[inline]
    fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Relaxed)
    }

    #[inline]
    pub(super) fn fits(&self, weight: u64) -> bool {
        fits_window(self.outstanding(), self.size.load(Ordering::Relaxed).into(), weight)
    }

    /// Counts a message that is sent.
    #[inline]
    pub(super) fn take(&self, weight: u64) {
        self.outstanding.store(self.outstanding() + weight, Ordering::Relaxed);
        self.sent.store(self.sent() + 1, Ordering::Relaxed);
    }

    fn set_size(&self, size: u32) {
        self.size.store(size, Ordering::Relaxed);
    }

    fn give_back(&self, weight: u64) {
        self.outstanding.store(self.outstanding().saturating_sub(weight), Ordering::Relaxed);
    }
}

/// A message may exceed the window if at most half of the window is outstanding. So a message that is larger than the
/// window gets through, and the reader need not return credit for every message.
#[inline]
pub(super) fn fits_window(outstanding: u64, window: u64, weight: u64) -> bool {
    outstanding <= window / 2 || outstanding + weight <= window
}

/// A stream that is served at this end.
struct ServedStream<S> {
    owner: S,
    window: Arc<SendWindow>,
    /// The number of the message with its ACCEPT.
    accepted_in: u64,
}

/// A stream that was requested at this end.
struct RequestedStream<S> {
    owner: S,
    window: u32,
    /// The code of the error that is to follow; 0 if there is none.
    error_code: i32,
    has_messages: bool,
    unconsumed: u32,
}

pub(super) struct Streams<S> {
    pub(super) role: Role,
    /// The id of the last stream that was opened.
    pub(super) last_id: u32,
    served: HashMap<u32, ServedStream<S>, RandomState>,
    requested: HashMap<u32, RequestedStream<S>, RandomState>,
    /// Served streams that ended before the message with their ACCEPT, whose number stands here, was acknowledged.
    pub(super) ended_before_accept_acked: Vec<(u64, S)>,
    /// Streams whose senders were refused, and are to be notified when they may send.
    pub(super) blocked_senders: HashSet<u32, RandomState>,
}

/// Tests use a fixed seed, so that a simulated schedule is the same each time.
fn hasher() -> RandomState {
    if cfg!(test) { RandomState::with_seeds(1, 2, 3, 4) } else { RandomState::new() }
}

impl<S: Clone> Streams<S> {
    pub(super) fn new(role: Role) -> Streams<S> {
        Streams {
            role,
            last_id: 0,
            served: HashMap::with_hasher(hasher()),
            requested: HashMap::with_hasher(hasher()),
            ended_before_accept_acked: Vec::new(),
            blocked_senders: HashSet::with_hasher(hasher()),
        }
    }

    pub(super) fn len(&self) -> usize {
        self.served.len() + self.requested.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.served.is_empty() && self.requested.is_empty()
    }

    pub(super) fn owners(&self) -> Vec<S> {
        let served = self.served.values().map(|stream| &stream.owner);
        served.chain(self.requested.values().map(|stream| &stream.owner)).cloned().collect()
    }

    /// Ends all streams: the peer is gone.
    pub(super) fn close(&mut self, acked: u64, events: &mut LaneEvents<S>) {
        let gone = |accept_acked| LaneEvent::PeerGone { accept_acked };
        events.extend(self.served.drain().map(|(_, stream)| (stream.owner, gone(stream.accepted_in <= acked))));
        events.extend(self.requested.drain().map(|(_, stream)| (stream.owner, gone(true))));
        let undelivered = self.ended_before_accept_acked.drain(..);
        events.extend(undelivered.map(|(_, owner)| (owner, LaneEvent::AcceptUndelivered)));
        self.blocked_senders.clear();
    }

    // Served streams
    // ---------------------------------------------------------------------------------------------------

    /// Adds a stream whose ACCEPT is in the message with this number.
    pub(super) fn serve(&mut self, stream: u32, size: u32, owner: S, accepted_in: u64) -> Arc<SendWindow> {
        let (size, outstanding, sent) = (AtomicU32::new(size), AtomicU64::new(0), AtomicU64::new(0));
        let window = Arc::new(SendWindow { stream, size, outstanding, sent });
        self.served.insert(stream, ServedStream { owner, window: Arc::clone(&window), accepted_in });
        window
    }

    /// Removes a served stream. Returns false if it has ended before.
    pub(super) fn finish(&mut self, stream: u32, acked: u64) -> bool {
        self.blocked_senders.remove(&stream);
        let Some(served) = self.served.remove(&stream) else { return false };
        if served.accepted_in > acked {
            self.ended_before_accept_acked.push((served.accepted_in, served.owner));
        }
        true
    }

    /// The peer has all messages up to `acked`. `is_lane_writable`: so senders whose windows are not full may send.
    pub(super) fn acknowledged(&mut self, acked: u64, is_lane_writable: bool, events: &mut LaneEvents<S>) {
        self.ended_before_accept_acked.retain(|(accepted_in, _)| *accepted_in > acked);
        if self.blocked_senders.is_empty() || !is_lane_writable {
            return;
        }
        let served = &self.served;
        self.blocked_senders.retain(|stream| match served.get(stream) {
            Some(stream) if !stream.window.fits(OVERHEAD) => true,
            Some(stream) => {
                events.push((stream.owner.clone(), LaneEvent::Writable));
                false
            }
            None => false,
        });
    }

    /// Lets a sender send more, which `change` enters into its window.
    fn send_more(
        &mut self,
        stream: u32,
        is_lane_writable: bool,
        events: &mut LaneEvents<S>,
        change: impl FnOnce(&SendWindow),
    ) {
        let Some(served) = self.served.get(&stream) else { return };
        change(&served.window);
        if is_lane_writable && self.blocked_senders.remove(&stream) {
            events.push((served.owner.clone(), LaneEvent::Writable));
        }
    }

    // Requested streams
    // ------------------------------------------------------------------------------------------------

    /// The reader has consumed so much. Returns the credit to return.
    pub(super) fn consumed(&mut self, stream: u32, weight: u64) -> Option<u64> {
        let requested = self.requested.get_mut(&stream)?;
        // Never more than came, whatever the reader says: what is on its way counts already.
        let weight = weight.min(requested.unconsumed.into());
        requested.unconsumed -= weight as u32;
        Some(weight).filter(|weight| *weight > 0)
    }

    /// Lets the worker of a stream be this far ahead of its reader. Returns false if the stream has ended.
    pub(super) fn set_window(&mut self, stream: u32, size: u32) -> bool {
        let Some(requested) = self.requested.get_mut(&stream) else { return false };
        requested.window = size;
        true
    }

    /// Removes a requested stream. Returns false if it has ended before.
    pub(super) fn cancel(&mut self, stream: u32) -> bool {
        self.requested.remove(&stream).is_some()
    }

    // Frames from the peer
    // ---------------------------------------------------------------------------------------------

    /// Handles the frames of the next message. `reply` appends a frame for the peer.
    pub(super) fn receive(
        &mut self,
        message: &Bytes,
        is_lane_writable: bool,
        events: &mut LaneEvents<S>,
        accept: &mut impl FnMut(u64, u32) -> Option<(S, u32)>,
        mut reply: impl FnMut(u8, u32, &[u8]),
    ) -> Result<(), Malformed> {
        let mut frames = Frames::new(message.get(frame::HEADER..).unwrap_or_default());
        let mut start = frame::HEADER;
        while let Some(frame) = frames.next() {
            let frame = frame?;
            let Frame { kind, stream, body } = frame;
            match (kind, self.role) {
                (frame::DATA, Role::Gateway) => {
                    let requested = self.requested.get_mut(&stream);
                    let (mut unconsumed, window) =
                        requested.as_ref().map_or((0, u64::MAX), |own| (own.unconsumed.into(), own.window.into()));
                    let mut exceeds_window = false;
                    let run = read_run(body, stream, &mut frames, start, message.len(), |weight| {
                        exceeds_window |= !fits_window(unconsumed, window, weight);
                        unconsumed += weight;
                    });
                    if let Some(requested) = requested {
                        // At most the window and one message, unless the stream ends now.
                        requested.unconsumed = u32::try_from(unconsumed).unwrap_or(u32::MAX);
                        let owner = requested.owner.clone();
                        if exceeds_window {
                            self.requested.remove(&stream);
                            reply(frame::CANCEL, stream, &[0]);
                            events.push((owner, LaneEvent::WindowExceeded));
                        } else {
                            let is_first = !mem::replace(&mut requested.has_messages, true);
                            events.push((owner, LaneEvent::Data { run, is_first }));
                        }
                    }
                }
                (frame::ACCEPT, Role::Gateway) => {
                    if stream <= self.last_id {
                        return Err(Malformed);
                    }
                    let key = number(body)?;
                    self.last_id = stream;
                    match accept(key, stream) {
                        Some((owner, window)) => {
                            let (error_code, has_messages) = (0, false);
                            let requested = RequestedStream { owner, window, error_code, has_messages, unconsumed: 0 };
                            self.requested.insert(stream, requested);
                        }
                        // The request was given up, or was never made.
                        None => reply(frame::CANCEL, stream, &[0]),
                    }
                }
                (frame::END, Role::Gateway) => {
                    events.extend(self.requested.remove(&stream).map(|requested| (requested.owner, LaneEvent::Ended)));
                }
                (frame::CODE, Role::Gateway) => {
                    if let Some(requested) = self.requested.get_mut(&stream) {
                        requested.error_code = stream_error::code_in_frame(body);
                    }
                }
                (frame::ERROR, Role::Gateway) => {
                    if let Some(RequestedStream { owner, error_code, .. }) = self.requested.remove(&stream) {
                        events.push((owner, LaneEvent::Failed(error_code, message.slice_ref(body))));
                    }
                }
                (frame::CANCEL, Role::Worker) => {
                    self.blocked_senders.remove(&stream);
                    if let Some(served) = self.served.remove(&stream) {
                        let reason = body.first().copied().unwrap_or_default();
                        events.push((served.owner, LaneEvent::Cancelled(reason)));
                    }
                }
                (frame::CREDIT, Role::Worker) => {
                    let weight = number(body)?;
                    self.send_more(stream, is_lane_writable, events, |window| window.give_back(weight));
                }
                (frame::WINDOW, Role::Worker) => {
                    let size = u32::try_from(number(body)?).map_err(|_| Malformed)?;
                    self.send_more(stream, is_lane_writable, events, |window| window.set_size(size));
                }
                // A later version may send this, or the stream has ended.
                _ => {}
            }
            start = message.len() - frames.left();
        }
        Ok(())
    }
}

/// Reads the number that begins a body.
fn number(body: &[u8]) -> Result<u64, Malformed> {
    body.first_chunk().map(|number| u64::from_le_bytes(*number)).ok_or(Malformed)
}

/// Reads the DATA frames of the same stream that follow one with this body, and gives the weight of each to `count`.
#[inline]
fn read_run(
    body: &[u8],
    stream: u32,
    frames: &mut Frames<'_>,
    start: usize,
    length: usize,
    mut count_weight: impl FnMut(u64),
) -> Run {
    let (mut count, mut bytes) = (0, 0);
    let mut body = Some(body);
    while let Some(data) = body.take() {
        count_weight(data.len() as u64 + OVERHEAD);
        count += 1;
        bytes += data.len() as u64;
        let mut ahead = frames.clone();
        if let Some(Ok(next)) = ahead.next()
            && next.kind == frame::DATA
            && next.stream == stream
        {
            *frames = ahead;
            body = Some(next.body);
        }
    }
    Run::new(start, length - frames.left(), count, bytes)
}
