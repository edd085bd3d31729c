//! The protocol of lanes, as a state machine without input, output or clock. A [`State`] is one end of a lane.
//!
//! What its driver feeds it, in any order:
//! - **messages** that came: `receive`, and `no_responders` where nats-server answered 503;
//! - **the connection**: `connected` once, then `disconnected` and `reconnected` in turn; `set_max_payload`;
//! - **commands**: of the worker `open`, `send`, `notify_when_writable`, `finish`; of the gateway `set_window`,
//!   `return_credit`, `cancel`; of both `request_ack`, `close`. The two ends differ only in their [`Role`].
//!
//! What it returns:
//! - **messages** to send: `poll`. After anything was fed, and when the deadline has passed, `poll` is called until it
//!   returns None. `must_wake` says after a call whether a driver that sleeps must do that now.
//! - **events** for the owners of streams: each call that can cause some appends them to `events`. They are to be
//!   delivered in this order, before the next call's. `S` stands for a stream or sender, its owner.
//! - **the deadline**: `deadline`, when `poll` is to be called even if nothing happens.
//!
//! All calls with a time are made with times that do not decrease. Time passes only while there is a connection.
//!
//! The parts: [`Streams`] has the streams and their windows; frames gather in the [`Batcher`]; [`Retransmit`] keeps
//! what was sent until it is acknowledged; [`Acks`] is about what came; [`Path`] measures the round trip and bounds
//! what is in flight; [`Liveness`] judges whether the peer is there. All their timers are in one [`TimerTable`].

use crate::error::Status;
use crate::lane::acks::{ACK_AFTER, Acks, Arrival};
use crate::lane::batcher::{Batcher, MAX_BATCH};
use crate::lane::event::{LaneEvent, LaneEvents, Role};
use crate::lane::liveness::{LATE, Liveness, PeerTimeouts};
use crate::lane::path::Path;
use crate::lane::retransmit::Retransmit;
use crate::lane::streams::{OVERHEAD, SendWindow, Streams};
use crate::lane::timer::{Timer, TimerTable};
use crate::wire::frame::{self, Header, Malformed};
use crate::wire::level0;
use crate::wire::stream_error::StreamError;
use bytes::{Bytes, BytesMut};
use std::collections::VecDeque;
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The largest message that nats-server takes unless it says otherwise.
const MAX_PAYLOAD: usize = 1 << 20;
/// How large a batch may be at least, while the congestion window is small.
const MIN_BATCH: usize = 4 << 10;
/// The largest text of an error, in bytes, that is sent while the lane has no capacity left.
const SHORT_ERROR: usize = 256;
/// How many bytes may be unacknowledged in answers to what the peer alone decides, such as streams that nobody wants.
const MAX_CONTROL: usize = 4 << 20;
/// How many streams may have ended before their ACCEPT was acknowledged: more than fit into any round trip.
const MAX_ENDED_BEFORE_ACCEPT_ACKED: usize = 65_536;
/// How many PONGs in a row may show a loss while nothing is acknowledged.
const MAX_USELESS_PONGS: u32 = 20;

#[derive(Clone, Copy, PartialEq, Eq)]
enum LaneStatus {
    Open,
    /// It is closed, and a RESET is to be sent.
    Closing,
    Closed,
}

#[derive(Clone, Copy)]
enum DriverState {
    Awake,
    /// Until then, or until it is woken.
    Sleeping(Option<Instant>),
}

/// One end of a lane.
pub(crate) struct State<S> {
    /// How many bytes may be unacknowledged.
    limit: usize,
    /// How large a NATS message may be.
    max_payload: usize,
    status: LaneStatus,
    is_connected: bool,
    was_heard: bool,
    driver: DriverState,
    /// Flags of the next message. If there are any it is sent even if it has nothing else.
    flags: u8,
    /// The peer's PING that the next PONG answers.
    peer_ping: u32,
    batcher: Batcher,
    retransmit: Retransmit,
    acks: Acks,
    path: Path,
    liveness: Liveness,
    streams: Streams<S>,
    timers: TimerTable,
}

impl<S: Clone> State<S> {
    /// `limit`: how many bytes may be unacknowledged.
    pub(crate) fn new(role: Role, limit: usize, timeouts: PeerTimeouts, now: Instant) -> State<S> {
        let liveness = Liveness::new(timeouts, now);
        let mut timers = TimerTable::default();
        timers.set(Timer::Heartbeat, liveness.next_heartbeat(false, now));
        State {
            limit,
            max_payload: MAX_PAYLOAD,
            status: LaneStatus::Open,
            is_connected: false,
            was_heard: false,
            driver: DriverState::Awake,
            flags: 0,
            peer_ping: 0,
            batcher: Batcher::default(),
            retransmit: Retransmit::new(now),
            acks: Acks::default(),
            path: Path::new(limit),
            liveness,
            streams: Streams::new(role),
            timers,
        }
    }

    pub(crate) fn role(&self) -> Role {
        self.streams.role
    }

    /// Whether the peer ever sent anything.
    pub(crate) fn was_heard(&self) -> bool {
        self.was_heard
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.status != LaneStatus::Open
    }

    /// Whether the peer has all that was sent, or never will.
    pub(crate) fn is_drained(&self) -> bool {
        self.is_closed() || (self.retransmit.unacked.is_empty() && self.batcher.batches.is_empty())
    }

    /// Bytes that gather, or were sent and are not acknowledged.
    #[inline]
    pub(crate) fn backlog(&self) -> usize {
        self.batcher.bytes + self.retransmit.bytes
    }

    /// The smoothed round trip. None: it is not known.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.path.round_trip()
    }

    /// Returns how many messages were sent again since the last call.
    pub(crate) fn take_resent(&mut self) -> u64 {
        mem::take(&mut self.retransmit.resent)
    }

    /// The owners of all streams.
    pub(crate) fn owners(&self) -> Vec<S> {
        self.streams.owners()
    }

    #[cfg(test)]
    pub(crate) fn ended_before_accept_acked(&self) -> usize {
        self.streams.ended_before_accept_acked.len()
    }

    // The worker's commands -------------------------------------------------------------------------------------------

    /// Accepts the request with this key. None if the lane is closed, or has no stream ids left.
    pub(crate) fn open(&mut self, key: u64, window: u32, owner: S, now: Instant) -> Option<Arc<SendWindow>> {
        let stream = self.streams.last_id.checked_add(1).filter(|_| !self.is_closed())?;
        self.streams.last_id = stream;
        self.hasten_heartbeat(now);
        self.append(frame::ACCEPT, stream, &key.to_le_bytes());
        let accepted_in = self.retransmit.last_sent() + self.batcher.batches.len() as u64;
        Some(self.streams.serve(stream, window, owner, accepted_in))
    }

    /// Sends a message of a stream. Fails with `Full` while the stream's window or the lane is full, with `PeerGone` when
    /// the lane is closed, with `TooLarge` for a message that no NATS message can hold.
    #[inline]
    pub(crate) fn send(&mut self, window: &SendWindow, data: &[u8]) -> Result<(), Status> {
        if self.is_closed() {
            return Err(Status::PeerGone);
        }
        if data.len() > self.max_message() {
            return Err(Status::TooLarge);
        }
        let weight = data.len() as u64 + OVERHEAD;
        if !window.fits(weight) || !self.has_capacity(data.len()) {
            return Err(Status::Full);
        }
        window.take(weight);
        self.append(frame::DATA, window.stream, data);
        Ok(())
    }

    /// Sends messages that stand one behind the other, up to the first that is refused. Returns how many were sent, and
    /// why no more.
    pub(crate) fn send_many(
        &mut self,
        window: &SendWindow,
        mut data: &[u8],
        lengths: &[usize],
    ) -> (usize, Result<(), Status>) {
        for (sent, length) in lengths.iter().enumerate() {
            let (message, rest) = data.split_at(*length);
            if let Err(error) = self.send(window, message) {
                return (sent, Err(error));
            }
            data = rest;
        }
        (lengths.len(), Ok(()))
    }

    /// Reports `LaneEvent::Writable`, once, when a sender that was refused may send.
    pub(crate) fn notify_when_writable(&mut self, window: &SendWindow) {
        self.streams.blocked_senders.insert(window.stream);
    }

    /// Ends a stream; with an error if there is one.
    pub(crate) fn finish(&mut self, window: &SendWindow, error: Option<StreamError<'_>>) {
        let stream = window.stream;
        if !self.streams.finish(stream, self.retransmit.acked) {
            return;
        }
        match error {
            None => self.append(frame::END, stream, &[]),
            Some(StreamError { code, text }) => {
                if code != 0 {
                    self.append(frame::CODE, stream, &code.to_le_bytes());
                }
                // It is sent even if the lane is full. It is short then: thousands may end at once.
                let most = if self.has_capacity(text.len()) { self.max_message() } else { SHORT_ERROR };
                self.append(frame::ERROR, stream, level0::truncate_utf8(text, most.min(self.max_message())));
            }
        }
    }

    // The gateway's commands ------------------------------------------------------------------------------------------

    /// Enlarges a stream's window, in bytes.
    pub(crate) fn set_window(&mut self, stream: u32, size: u32) {
        if self.streams.set_window(stream, size) {
            self.append(frame::WINDOW, stream, &u64::from(size).to_le_bytes());
        }
    }

    /// A stream's reader has consumed so much: the worker may send as much more.
    pub(crate) fn return_credit(&mut self, stream: u32, weight: u64) {
        if let Some(weight) = self.streams.consumed(stream, weight) {
            self.append(frame::CREDIT, stream, &weight.to_le_bytes());
        }
    }

    /// Ends a stream from this side.
    pub(crate) fn cancel(&mut self, stream: u32, reason: u8) {
        if self.streams.cancel(stream) {
            self.append(frame::CANCEL, stream, &[reason]);
        }
    }

    // Commands of both ends -------------------------------------------------------------------------------------------

    /// Asks the peer to acknowledge everything at once.
    pub(crate) fn request_ack(&mut self, now: Instant) {
        self.hasten_heartbeat(now);
        self.flags |= frame::PING;
    }

    /// Closes the lane: its streams end as if the peer was gone, and the peer is sent a RESET.
    pub(crate) fn close(&mut self, events: &mut LaneEvents<S>) {
        if self.is_closed() {
            return;
        }
        self.status = LaneStatus::Closing;
        self.streams.close(self.retransmit.acked, events);
        (self.batcher, self.retransmit.unacked) = (Batcher::default(), VecDeque::new());
        (self.retransmit.bytes, self.retransmit.in_flight) = (0, 0);
    }

    // The connection --------------------------------------------------------------------------------------------------

    /// nats-server takes messages of so many bytes.
    pub(crate) fn set_max_payload(&mut self, max_payload: usize) {
        self.max_payload = max_payload;
    }

    /// There has been a connection to this nats-server (`frame::server`) since the lane was made.
    pub(crate) fn connected(&mut self, server: u32) {
        self.is_connected = true;
        self.liveness.server = server;
    }

    /// There is a connection to a nats-server again.
    pub(crate) fn reconnected(&mut self, server: u32, now: Instant) {
        self.is_connected = true;
        self.path.reset();
        self.liveness.reconnected(server, now, &mut self.timers);
        self.start_probing(now);
        self.flags |= frame::GAP;
    }

    /// The connection is lost: no time passes for the peer.
    pub(crate) fn disconnected(&mut self) {
        self.is_connected = false;
        self.flags = 0;
        self.timers = TimerTable::default();
        self.acks.is_due = false;
        self.liveness.is_suspect = false;
        self.retransmit.disconnected();
    }

    /// nats-server has answered 503: nobody subscribes to the peer's subject.
    pub(crate) fn no_responders(&mut self, now: Instant, events: &mut LaneEvents<S>) {
        if !self.is_connected || self.is_closed() || self.liveness.is_suspect {
            return;
        }
        self.liveness.suspect(self.path.silence(), now, &mut self.timers);
        if !self.liveness.is_probing {
            self.start_probing(now);
        }
        self.handle_timers(now, events);
    }

    /// A message came from the peer. `accept` returns the owner of the request with this key and its window, if
    /// somebody still wants the stream with this id.
    pub(crate) fn receive(
        &mut self,
        message: &Bytes,
        now: Instant,
        events: &mut LaneEvents<S>,
        mut accept: impl FnMut(u64, u32) -> Option<(S, u32)>,
    ) -> Result<(), Malformed> {
        let header = Header::read(message)?;
        self.was_heard = true;
        if self.is_closed() {
            if self.role() == Role::Gateway {
                // No other answer comes to the requests that it accepts.
                let lost = frame::accepts(message).filter_map(|(key, stream)| accept(key, stream));
                events.extend(lost.map(|(owner, _)| (owner, LaneEvent::PeerGone { accept_acked: true })));
            }
            return Ok(());
        }
        if header.has(frame::RESET) {
            self.close(events);
            self.status = LaneStatus::Closed;
            return Ok(());
        }
        if header.ack > self.retransmit.last_sent() {
            // It has heard another end in our place, or lies.
            self.close(events);
            return Err(Malformed);
        }
        self.receive_header(header, now, events);
        let size = (message.len() > frame::HEADER).then_some(message.len());
        match self.acks.arrived(header.sequence, size, now, &mut self.timers) {
            Arrival::Next => return self.receive_frames(message, now, events, &mut accept),
            Arrival::NewGap => self.flags |= frame::GAP,
            Arrival::Nothing => {}
        }
        Ok(())
    }

    /// The next message to send. None: there is none before `deadline`, unless something happens.
    pub(crate) fn poll(&mut self, now: Instant, events: &mut LaneEvents<S>) -> Option<Bytes> {
        self.driver = DriverState::Awake;
        if self.is_connected {
            self.handle_timers(now, events);
            let message = match self.status {
                LaneStatus::Open => self.next_message(now),
                LaneStatus::Closing => {
                    self.status = LaneStatus::Closed;
                    self.flags |= frame::RESET;
                    Some(self.message_without_frames(now))
                }
                LaneStatus::Closed => None,
            };
            if message.is_some() {
                return message;
            }
        }
        self.driver = DriverState::Sleeping(self.deadline());
        None
    }

    /// Whether the next message is a full batch, so that nothing is gained by waiting for more frames.
    pub(crate) fn has_full_batch(&self) -> bool {
        self.batcher.batches.len() > 1 && self.is_sendable()
    }

    /// When to poll again even if nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if self.is_connected && !self.is_closed() { self.timers.next() } else { None }
    }

    /// Whether the driver sleeps though there is something to do. Returns true once.
    #[inline]
    pub(crate) fn must_wake(&mut self) -> bool {
        let DriverState::Sleeping(until) = self.driver else { return false };
        let has_message = self.is_sendable() || self.flags != 0 || self.acks.is_due;
        let must_wake = self.is_closed()
            || (has_message && self.is_connected)
            || self.deadline().is_some_and(|at| until.is_none_or(|until| at < until));
        if must_wake {
            self.driver = DriverState::Awake;
        }
        must_wake
    }

    // What comes in ---------------------------------------------------------------------------------------------------

    fn receive_header(&mut self, header: Header, now: Instant, events: &mut LaneEvents<S>) {
        self.liveness.heard(header.server, self.is_idle(), now, &mut self.timers);
        self.timers.clear(Timer::RepeatAck);
        self.receive_ack(header.ack, now, events);
        if header.has(frame::PONG) {
            self.receive_pong(header, now);
        }
        if header.has(frame::GAP) && self.retransmit.is_new_gap(header.ack, header.has(frame::PING)) {
            self.send_again(now);
        }
        if header.has(frame::PING) {
            self.flags |= frame::PONG;
            self.peer_ping = header.ping;
        }
        self.set_loss_timer();
    }

    fn receive_ack(&mut self, ack: u64, now: Instant, events: &mut LaneEvents<S>) {
        let batcher = &mut self.batcher;
        if !self.retransmit.acknowledge(ack, now, |message| batcher.recycle(message)) {
            return;
        }
        if self.is_drained() {
            self.batcher.free_spares();
        }
        self.streams.acknowledged(ack, self.is_half_empty(), events);
    }

    /// The answer to a PING came. Only if the PING was sent after a message it can show that the message is missing.
    fn receive_pong(&mut self, header: Header, now: Instant) {
        let Some(ping) = self.retransmit.answered(header.pong) else { return };
        self.path.answered(ping.sent_at, now, ping.used_window);
        if ping.shows_loss {
            self.liveness.stop_probing(&mut self.timers);
            if header.ack < ping.covers {
                self.retransmit.useless_pongs += 1;
                self.send_again(now);
            }
        }
    }

    fn receive_frames(
        &mut self,
        message: &Bytes,
        now: Instant,
        events: &mut LaneEvents<S>,
        accept: &mut impl FnMut(u64, u32) -> Option<(S, u32)>,
    ) -> Result<(), Malformed> {
        let (is_half_empty, max_batch, last_stream) = (self.is_half_empty(), self.max_batch(), self.streams.last_id);
        let batcher = &mut self.batcher;
        let reply = |kind, stream, body: &[u8]| batcher.append(kind, stream, body, max_batch);
        let received = self.streams.receive(message, is_half_empty, events, accept, reply);
        if self.streams.last_id > last_stream {
            self.hasten_heartbeat(now);
        }
        if received.is_err() {
            self.close(events);
        }
        received
    }

    fn send_again(&mut self, now: Instant) {
        self.retransmit.start_over(now);
        if !self.liveness.is_probing {
            self.retransmit.disregard_pings();
        }
    }

    // Time ------------------------------------------------------------------------------------------------------------

    fn is_idle(&self) -> bool {
        self.streams.is_empty() && self.is_drained()
    }

    /// A stream begins: heartbeats are frequent from now on.
    fn hasten_heartbeat(&mut self, now: Instant) {
        self.timers.set_earlier(Timer::Heartbeat, self.liveness.next_heartbeat(false, now));
    }

    fn start_probing(&mut self, now: Instant) {
        if !self.liveness.is_probing {
            self.retransmit.disregard_pings();
        }
        self.liveness.start_probing(now, &mut self.timers);
        self.timers.clear(Timer::RepeatAck);
        self.set_loss_timer();
    }

    /// To be called after each change of what is unacknowledged, of the round trip, and of probing.
    fn set_loss_timer(&mut self) {
        let ask_at = if self.liveness.is_probing { None } else { self.retransmit.ask_at(&self.path) };
        self.timers.set(Timer::Loss, ask_at);
    }

    fn handle_timers(&mut self, now: Instant, events: &mut LaneEvents<S>) {
        if self.is_closed() {
            return;
        }
        let is_late = self.deadline().is_some_and(|due| now > due + LATE);
        let stood_still = self.liveness.stood_still(is_late);
        let is_idle = self.is_idle();
        for timer in TimerTable::ALL {
            if !self.timers.expire(timer, now) {
                continue;
            }
            match timer {
                Timer::Heartbeat => {
                    self.liveness.heartbeat_expired(stood_still, is_idle, now, &mut self.timers);
                    self.flags |= frame::PING;
                }
                Timer::Grace if stood_still => self.liveness.extend_grace(now, &mut self.timers),
                Timer::Grace => return self.close(events),
                Timer::Probe => {
                    self.liveness.probe_expired(now, &mut self.timers);
                    self.flags |= frame::PING;
                }
                Timer::Loss => {
                    self.retransmit.asked(now);
                    self.set_loss_timer();
                    self.flags |= frame::PING;
                }
                Timer::Ack => self.acks.is_due = true,
                Timer::RepeatAck => self.acks.repeat(!self.streams.is_empty(), now, &mut self.timers),
            }
        }
        if self.liveness.is_silent(self.path.silence(), now) || self.is_abused() {
            self.close(events);
        }
    }

    /// Whether the peer acknowledges nothing, makes this end keep more than it could ever need, or makes it send the
    /// same again and again.
    fn is_abused(&self) -> bool {
        self.backlog() > 2 * self.limit.max(MAX_PAYLOAD) + 64 * self.streams.len() + MAX_CONTROL
            || self.streams.ended_before_accept_acked.len() > MAX_ENDED_BEFORE_ACCEPT_ACKED
            || self.retransmit.useless_pongs > MAX_USELESS_PONGS
    }

    // What goes out ---------------------------------------------------------------------------------------------------

    /// How large a message of a stream may be.
    #[inline]
    fn max_message(&self) -> usize {
        level0::max_message(self.max_payload)
    }

    #[inline]
    fn has_capacity(&self, bytes: usize) -> bool {
        let backlog = self.backlog();
        backlog == 0 || backlog + bytes <= self.limit
    }

    /// Whether blocked senders may go on.
    fn is_half_empty(&self) -> bool {
        self.backlog() <= self.limit / 2
    }

    /// How large a batch may be. Two fit into the congestion window, so that one is on its way while the other is
    /// acknowledged.
    #[inline]
    fn max_batch(&self) -> usize {
        (self.path.window() / 2).clamp(MIN_BATCH, MAX_BATCH).min(self.max_payload)
    }

    #[inline]
    fn append(&mut self, kind: u8, stream: u32, body: &[u8]) {
        self.batcher.append(kind, stream, body, self.max_batch());
    }

    /// Whether there is a message with frames, and the congestion window lets it go. One may always be in flight.
    #[inline]
    fn is_sendable(&self) -> bool {
        if self.liveness.is_probing {
            return false;
        }
        let in_flight = self.retransmit.in_flight;
        let next = self.retransmit.next_size().or_else(|| self.batcher.batches.front().map(BytesMut::len));
        next.is_some_and(|size| in_flight == 0 || in_flight + size <= self.path.window())
    }

    fn next_message(&mut self, now: Instant) -> Option<Bytes> {
        if self.is_sendable() {
            if let Some((sequence, mut message)) = self.retransmit.next_again() {
                self.ask_with_frames();
                self.write_header(&mut message, sequence, now);
                return Some(message.freeze());
            }
            if let Some(mut batch) = self.batcher.pop() {
                let sequence = self.retransmit.send(batch.len(), now);
                self.ask_with_frames();
                self.write_header(&mut batch, sequence, now);
                let message = batch.freeze();
                self.retransmit.unacked.push_back(message.clone());
                self.set_loss_timer();
                return Some(message);
            }
        }
        (self.flags != 0 || self.acks.is_due).then(|| self.message_without_frames(now))
    }

    fn message_without_frames(&mut self, now: Instant) -> Bytes {
        let mut message = BytesMut::zeroed(frame::HEADER);
        self.write_header(&mut message, self.retransmit.sent_so_far(), now);
        message.freeze()
    }

    /// Sends a PING with the next message if its answer opens the congestion window, or shows how large that should be.
    fn ask_with_frames(&mut self) {
        let is_used = self.is_window_used();
        // Where the limit is so low, the peer would not acknowledge by itself before all of it is used.
        let is_blocked =
            (self.limit <= 2 * ACK_AFTER && !self.is_half_empty()) || (self.path.window() <= 2 * ACK_AFTER && is_used);
        if is_blocked || (is_used && self.retransmit.pings.is_empty()) {
            self.flags |= frame::PING;
        }
    }

    /// Whether more than half of the congestion window is in flight.
    fn is_window_used(&self) -> bool {
        self.retransmit.in_flight > self.path.window() / 2
    }

    /// Writes the header of a message that is sent now.
    fn write_header(&mut self, message: &mut BytesMut, sequence: u64, now: Instant) {
        let mut flags = mem::take(&mut self.flags);
        let is_measured = self.path.silence().is_some() || !self.retransmit.pings.is_empty();
        if self.liveness.needs_round_trip() && !is_measured && flags & frame::RESET == 0 {
            flags |= frame::PING;
        }
        let ping =
            if flags & frame::PING == 0 { 0 } else { self.retransmit.ping(sequence, self.is_window_used(), now) };
        let pong = if flags & frame::PONG == 0 { 0 } else { self.peer_ping };
        if self.role() == Role::Worker && self.retransmit.acked == 0 {
            flags |= frame::NEW;
        }
        let header = Header { flags, sequence, ack: self.acks.received, ping, pong, server: self.liveness.server };
        message[..frame::HEADER].copy_from_slice(&header.bytes());
        self.acks.sent(!self.streams.is_empty(), now, &mut self.timers);
    }
}

/// The answer to a message of a lane that is not known: that it is closed, or, if it may begin, that nothing has come.
/// It answers a PING as well: otherwise the worker would not send again.
pub(crate) fn unknown_lane_reply(message: &Header, may_begin: bool) -> Header {
    if !may_begin {
        return Header::of(frame::RESET, 0, 0);
    }
    let pong = if message.has(frame::PING) { frame::PONG } else { 0 };
    Header { pong: message.ping, ..Header::of(frame::GAP | pong, 0, 0) }
}

#[cfg(test)]
mod tests;
