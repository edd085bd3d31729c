//! One end of a lane, without input, output or clock: it is fed messages and instants, and returns what to send and what
//! to tell. Both ends are the same but for who may open streams.
//!
//! Messages with frames are numbered, and kept until the other end has acknowledged them. What is missing is found out by
//! the other end (a number too high: GAP) or by asking (PING; the PONG with its number acknowledges all that came before
//! it), and sent again from the first missing on. How much is in flight at once follows the round trip (`path`). After a
//! reconnect, and after a 503, nothing but PINGs is sent until a PONG came.

use crate::lane::path::{self, Path};
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::wire::frame::{self, Frames, Header, Malformed, Run};
use crate::wire::level0;
use bytes::{Bytes, BytesMut};
use std::collections::{HashMap, HashSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// What a message counts in its stream's window in addition to its bytes.
pub(crate) const OVERHEAD: u64 = 64;
/// The largest message that nats-server takes unless it says otherwise.
const MAX_PAYLOAD: usize = 1 << 20;
/// How large messages with several frames get.
const CHUNK: usize = 64 << 10;
/// And how large they may get at least, while the window is small.
const MIN_CHUNK: usize = 4 << 10;
/// How many of their buffers are kept when nothing is in them.
const MAX_SPARES: usize = 64;
/// An acknowledgement is sent after so many bytes, or so much later when nothing is sent that could carry it.
const ACK_AFTER: usize = 2 * CHUNK;
const ACK_DELAY: Duration = Duration::from_millis(25);
/// The last acknowledgement before a pause is said again after ACK_DELAY, and then after twice as long …, up to this.
const CONFIRM_UNTIL: Duration = Duration::from_millis(200);
/// While we must know whether the other end is there, the first PING is repeated after this, then after twice as long …
const PING_AGAIN: Duration = Duration::from_millis(20);
/// … up to this.
const PING_AGAIN_UNTIL: Duration = Duration::from_millis(500);
/// How many PINGs without an answer are remembered.
const MAX_QUESTIONS: usize = 64;
/// A timer that is so late was not the only one: this process, or its machine, stood still.
const LATE: Duration = Duration::from_millis(250);
/// How long an error's text is where there is no room for more, in bytes.
const SHORT: usize = 256;
/// How much may wait in answers to what the other end alone decides, such as streams that nobody wants.
const MAX_CONTROL: usize = 4 << 20;
/// How many streams that ended before their ACCEPT was acknowledged are kept: more than fit into any round trip.
const MAX_UNHEARD: usize = 65_536;
/// How many answers in a row may acknowledge nothing of what they were asked about.
const MAX_VAIN: u32 = 20;
/// How many beats of silence are one too many.
const MAX_MISSED: u32 = 3;
/// How much rarer beats are while no streams run.
const IDLE_FACTOR: u32 = 12;

/// How long to be patient.
#[derive(Clone, Copy, Debug)]
pub(crate) struct PeerTimeouts {
    /// A silent peer is probed this often, and gone after three.
    pub(crate) heartbeat: Duration,
    /// How long a peer on our nats-server may be away when the server says that it is not there.
    pub(crate) grace: Duration,
    /// The same for a peer on another server: the link between the servers may be down.
    pub(crate) remote_grace: Duration,
    /// How long the other end may take for its reconnect after we had ours.
    pub(crate) reconnect: Duration,
}

/// What an end has to tell; `S` stands for a stream or sender.
#[derive(Debug)]
pub(crate) enum LaneEvent<S> {
    /// Messages came, all in the one that was received.
    Data(S, Run),
    /// The worker ended it.
    End(S),
    /// The worker ended it with an error.
    Error(S, Bytes),
    /// The worker sent more than there was room for: it was cancelled.
    Overrun(S),
    /// The gateway cancelled it for this reason.
    Cancelled(S, u8),
    /// There may be room for what was refused.
    Room(S),
    /// The other end is gone. `false`: it may never have heard of this stream.
    Gone(S, bool),
    /// The other end is gone, and may never have heard of this stream, which had ended already.
    Unheard(S),
}

/// Why a message was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The stream's reader, or the lane, has no room.
    Full,
    /// The other end is gone, or the lane was closed.
    Over,
    /// It has no room in a NATS message.
    TooLarge,
}

/// A sender's share in its stream's window. Used under the lane's lock only.
#[derive(Debug)]
pub(crate) struct Credit {
    stream: u32,
    window: u32,
    outstanding: AtomicU64,
    sent: AtomicU64,
}

impl Credit {
    /// How many messages were sent.
    pub(crate) fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }

    fn outstanding(&self) -> u64 {
        self.outstanding.load(Ordering::Relaxed)
    }

    fn has_room(&self, weight: u64) -> bool {
        has_room(self.outstanding(), self.window.into(), weight)
    }
}

/// A message may pass the window's end by itself, as long as less than half of it is taken: so even one that is larger
/// than the window gets through, and the reader need not tell of every message that it took.
fn has_room(outstanding: u64, window: u64, weight: u64) -> bool {
    outstanding <= window / 2 || outstanding + weight <= window
}

/// What a reader has taken and not yet given credit for: it gives credit for more than a quarter of the window.
#[derive(Debug)]
pub(crate) struct Grant {
    window: u64,
    taken: AtomicU64,
}

impl Grant {
    pub(crate) fn new(window: u64) -> Grant {
        Grant { window, taken: AtomicU64::new(0) }
    }

    /// Notes what was taken, and returns what to tell.
    pub(crate) fn take(&self, weight: u64) -> Option<u64> {
        let weight = weight.min(1 << 40);
        let taken = self.taken.fetch_add(weight, Ordering::Relaxed) + weight;
        // At most a half may be without credit: then the sender has room whatever it sends. With a quarter it gets the credit
        // before its window is used up, which is a third faster with the default window.
        (taken > self.window / 4).then(|| self.taken.swap(0, Ordering::Relaxed))
    }
}

/// A stream that is served at this end.
struct Out<S> {
    to: S,
    credit: Arc<Credit>,
    /// The number of the message with its ACCEPT.
    accepted_in: u64,
}

/// A stream that was requested at this end.
struct In<S> {
    to: S,
    window: u32,
    unconsumed: u64,
}

/// A PING that was not answered yet.
struct Question {
    number: u32,
    sent_at: Instant,
    /// The last message with frames that was sent before it.
    covers: u64,
    /// Whether its answer shows what is missing: not if messages were sent again after it.
    counts: bool,
    /// Whether more than half of the window was in flight.
    fills: bool,
}

/// One end of a lane.
pub(crate) struct State<S> {
    patience: PeerTimeouts,
    /// How many bytes may wait for their acknowledgement.
    limit: usize,
    /// How large a NATS message may be.
    max_payload: usize,
    /// Whether this is the worker's end.
    serves: bool,
    life: Life,

    /// What gathers; each has room for its header in front.
    chunks: VecDeque<BytesMut>,
    chunk_size: usize,
    /// Full-sized buffers to be used again: fresh ones cost the system more than what they are filled with.
    spares: Vec<BytesMut>,
    /// Sent; the first has the number `acked + 1`.
    unacked: VecDeque<Bytes>,
    acked: u64,
    /// Which of them is to be sent again next.
    resend: Option<usize>,
    backlog: usize,
    /// Bytes of messages in `unacked` that were sent, and not found missing.
    in_flight: usize,
    path: Path,

    /// Whether the other end ever said anything.
    was_heard: bool,
    received: u64,
    /// Bytes that came since our last acknowledgement.
    unacknowledged: usize,
    ack_at: Option<Instant>,
    /// What was last acknowledged, and when that is said again: to one who died the moment before, it may have vanished
    /// without a 503, and there would be nothing more to say to it.
    acknowledged: u64,
    confirm_at: Option<Instant>,
    confirm_after: Duration,
    /// Flags of the next message; it is sent even if it has nothing else.
    flags: u8,
    ack_now: bool,
    /// Where the gap begins that was last told, and the one last heard of: once each, or repeats would multiply.
    gap_told: Option<u64>,
    gap_heard: Option<u64>,

    is_linked: bool,
    /// Nothing but PINGs until there was a PONG.
    is_held: bool,
    ping_at: Instant,
    ping_interval: Duration,
    /// The number of the last PING, and those without an answer.
    last_ping: u32,
    questions: VecDeque<Question>,
    /// The PING to be answered.
    pong: u32,
    /// Answers in a row that showed messages to be missing, and acknowledged nothing.
    vain: u32,
    progress_at: Instant,
    /// How often unacknowledged messages were asked for since.
    asked: u32,
    /// The servers of both ends; 0: not known.
    server: u32,
    peer_server: u32,
    /// nats-server says that nobody is there.
    suspect_since: Option<Instant>,
    /// Until when the other end may be about its own reconnect.
    reconnecting: Option<Instant>,
    beat_at: Instant,
    missed: u32,
    heard_at: Instant,
    was_late: bool,

    last_stream: u32,
    outs: HashMap<u32, Out<S>, ahash::RandomState>,
    /// Streams that ended before the message with their ACCEPT, whose number stands here, was acknowledged.
    unheard: Vec<(u64, S)>,
    ins: HashMap<u32, In<S>, ahash::RandomState>,
    /// Streams whose senders were refused and want to hear of room.
    wanting: HashSet<u32, ahash::RandomState>,

    /// Set while the driver sleeps: until when.
    asleep: Option<Option<Instant>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Life {
    Open,
    /// Over, and the other end is to be told.
    Over,
    Told,
}

impl<S: Clone> State<S> {
    /// `serves`: the worker's end. `limit`: how many bytes may wait for their acknowledgement.
    pub(crate) fn new(serves: bool, limit: usize, patience: PeerTimeouts, now: Instant) -> State<S> {
        State {
            patience,
            limit,
            max_payload: MAX_PAYLOAD,
            serves,
            life: Life::Open,
            chunks: VecDeque::new(),
            chunk_size: 0,
            spares: Vec::new(),
            unacked: VecDeque::new(),
            acked: 0,
            resend: None,
            backlog: 0,
            in_flight: 0,
            path: Path::new(limit),
            was_heard: false,
            received: 0,
            unacknowledged: 0,
            ack_at: None,
            acknowledged: 0,
            confirm_at: None,
            confirm_after: ACK_DELAY,
            flags: 0,
            ack_now: false,
            gap_told: None,
            gap_heard: None,
            is_linked: false,
            is_held: false,
            ping_at: now,
            ping_interval: PING_AGAIN,
            last_ping: 0,
            questions: VecDeque::new(),
            pong: 0,
            vain: 0,
            progress_at: now,
            asked: 0,
            server: 0,
            peer_server: 0,
            suspect_since: None,
            reconnecting: None,
            beat_at: now + patience.heartbeat,
            missed: 0,
            heard_at: now,
            was_late: false,
            last_stream: 0,
            outs: HashMap::default(),
            unheard: Vec::new(),
            ins: HashMap::default(),
            wanting: HashSet::default(),
            asleep: None,
        }
    }

    pub(crate) fn serves(&self) -> bool {
        self.serves
    }

    /// Whether the other end ever said anything.
    pub(crate) fn was_heard(&self) -> bool {
        self.was_heard
    }

    pub(crate) fn is_over(&self) -> bool {
        self.life != Life::Open
    }

    /// Whether the other end has all that was sent, or never will.
    pub(crate) fn is_drained(&self) -> bool {
        self.is_over() || (self.unacked.is_empty() && self.chunks.is_empty())
    }

    /// Bytes that were sent or wait, and are not acknowledged.
    pub(crate) fn backlog(&self) -> usize {
        self.backlog
    }

    fn has_streams(&self) -> bool {
        !self.outs.is_empty() || !self.ins.is_empty()
    }

    fn last_sent(&self) -> u64 {
        self.acked + self.unacked.len() as u64
    }

    /// The number up to which all was sent, or sent again.
    fn sent_so_far(&self) -> u64 {
        self.resend.map_or_else(|| self.last_sent(), |index| self.acked + index as u64)
    }

    // The worker's calls ----------------------------------------------------------------------------------------------

    /// Accepts the request with this key. None when the lane is over, or has no numbers left.
    pub(crate) fn open(&mut self, key: u64, window: u32, to: S, now: Instant) -> Option<Arc<Credit>> {
        let stream = self.last_stream.checked_add(1).filter(|_| !self.is_over())?;
        self.last_stream = stream;
        self.wake_beat(now);
        self.append(frame::ACCEPT, stream, &key.to_le_bytes());
        let credit = Arc::new(Credit { stream, window, outstanding: AtomicU64::new(0), sent: AtomicU64::new(0) });
        let accepted_in = self.last_sent() + self.chunks.len() as u64;
        self.outs.insert(stream, Out { to, credit: Arc::clone(&credit), accepted_in });
        Some(credit)
    }

    /// Sends a message of a stream.
    #[inline]
    pub(crate) fn send(&mut self, credit: &Credit, data: &[u8]) -> Result<(), Refusal> {
        if self.is_over() {
            return Err(Refusal::Over);
        }
        if data.len() > self.max_message() {
            return Err(Refusal::TooLarge);
        }
        let weight = data.len() as u64 + OVERHEAD;
        if !credit.has_room(weight) || !self.has_room(data.len()) {
            return Err(Refusal::Full);
        }
        credit.outstanding.store(credit.outstanding() + weight, Ordering::Relaxed);
        credit.sent.store(credit.sent() + 1, Ordering::Relaxed);
        self.append(frame::DATA, credit.stream, data);
        Ok(())
    }

    /// Sends messages that stand one behind the other, up to the first that is refused: how many were sent, and why no more.
    pub(crate) fn send_many(
        &mut self,
        credit: &Credit,
        mut data: &[u8],
        lengths: &[usize],
    ) -> (usize, Result<(), Refusal>) {
        for (sent, length) in lengths.iter().enumerate() {
            let (message, rest) = data.split_at(*length);
            if let Err(refusal) = self.send(credit, message) {
                return (sent, Err(refusal));
            }
            data = rest;
        }
        (lengths.len(), Ok(()))
    }

    /// Has `Tell::Room` said, once, when there may be room for what was refused.
    pub(crate) fn want_room(&mut self, credit: &Credit) {
        self.wanting.insert(credit.stream);
    }

    /// Ends a stream; with an error if there is a text.
    pub(crate) fn finish(&mut self, credit: &Credit, error: Option<&[u8]>) {
        self.wanting.remove(&credit.stream);
        if let Some(out) = self.outs.remove(&credit.stream) {
            if out.accepted_in > self.acked {
                self.unheard.push((out.accepted_in, out.to));
            }
            match error {
                None => self.append(frame::END, credit.stream, &[]),
                Some(text) => {
                    // It need not wait for room. So where there is none it is short: thousands may end at once.
                    let most = if self.has_room(text.len()) { self.max_message() } else { SHORT };
                    self.append(frame::ERROR, credit.stream, level0::truncate_utf8(text, most.min(self.max_message())));
                }
            }
        }
    }

    // The gateway's calls ---------------------------------------------------------------------------------------------

    /// Gives a stream's worker room for so much more.
    pub(crate) fn grant(&mut self, stream: u32, weight: u64) {
        if let Some(own) = self.ins.get_mut(&stream) {
            // Never more than came, whatever the reader says: what is on its way counts already.
            let weight = weight.min(own.unconsumed);
            own.unconsumed -= weight;
            if weight > 0 {
                self.append(frame::CREDIT, stream, &weight.to_le_bytes());
            }
        }
    }

    /// Ends a stream from this side.
    pub(crate) fn cancel(&mut self, stream: u32, reason: u8) {
        if self.ins.remove(&stream).is_some() {
            self.append(frame::CANCEL, stream, &[reason]);
        }
    }

    // The connection's calls ------------------------------------------------------------------------------------------

    /// nats-server takes messages of so many bytes.
    pub(crate) fn set_max_payload(&mut self, max_payload: usize) {
        self.max_payload = max_payload;
    }

    /// There is a connection to this nats-server (`frame::server`), and was since the lane was made.
    pub(crate) fn begin(&mut self, server: u32) {
        self.is_linked = true;
        self.server = server;
    }

    /// There is a connection to a nats-server again.
    pub(crate) fn link_up(&mut self, server: u32, now: Instant) {
        self.is_linked = true;
        self.server = server;
        self.path.reset();
        self.reconnecting = Some(now + self.patience.reconnect);
        self.hold(now);
        self.flags |= frame::GAP;
        self.beat_at = now + self.patience.heartbeat;
        self.missed = 0;
        self.heard_at = now;
    }

    /// The connection is lost: no time passes for the other end.
    pub(crate) fn link_down(&mut self) {
        self.is_linked = false;
        self.suspect_since = None;
        self.questions.clear();
        self.flags = 0;
        self.ack_now = false;
        self.confirm_at = None;
        self.resend = None;
        self.in_flight = self.unacked.iter().map(Bytes::len).sum();
    }

    /// nats-server says that nobody is there.
    pub(crate) fn nobody_there(&mut self, now: Instant, tells: &mut Vec<LaneEvent<S>>) {
        if self.is_linked && self.suspect_since.is_none() && !self.is_over() {
            self.suspect_since = Some(now);
            if !self.is_held {
                self.hold(now);
            }
            self.tick(now, tells);
        }
    }

    /// Ends the lane: all that runs on it is told so, and then the other end.
    pub(crate) fn end(&mut self, tells: &mut Vec<LaneEvent<S>>) {
        if self.is_over() {
            return;
        }
        self.life = Life::Over;
        let acked = self.acked;
        tells.extend(self.outs.drain().map(|(_, out)| LaneEvent::Gone(out.to, out.accepted_in <= acked)));
        tells.extend(self.ins.drain().map(|(_, own)| LaneEvent::Gone(own.to, true)));
        tells.extend(self.unheard.drain(..).map(|(_, to)| LaneEvent::Unheard(to)));
        self.wanting.clear();
        self.chunks.clear();
        self.unacked.clear();
        self.backlog = 0;
        self.in_flight = 0;
    }

    #[cfg(test)]
    pub(crate) fn unheard(&self) -> usize {
        self.unheard.len()
    }

    /// All that runs on it.
    pub(crate) fn parties(&self) -> Vec<S> {
        self.outs.values().map(|out| &out.to).chain(self.ins.values().map(|own| &own.to)).cloned().collect()
    }

    /// Asks the other end to acknowledge all at once.
    pub(crate) fn ask(&mut self, now: Instant) {
        self.wake_beat(now);
        self.flags |= frame::PING;
    }

    /// A message came from the other end. `accept` says, for a request's key, who it was that asked, if somebody still
    /// wants the stream with this number.
    pub(crate) fn receive(
        &mut self,
        message: &Bytes,
        now: Instant,
        tells: &mut Vec<LaneEvent<S>>,
        mut accept: impl FnMut(u64, u32) -> Option<(S, u32)>,
    ) -> Result<(), Malformed> {
        let header = Header::read(message)?;
        self.was_heard = true;
        if self.is_over() {
            if !self.serves {
                // No other answer comes to the requests that it accepts.
                let lost = frame::accepts(message).filter_map(|(key, stream)| accept(key, stream));
                tells.extend(lost.map(|(to, _)| LaneEvent::Gone(to, true)));
            }
            return Ok(());
        }
        if header.has(frame::RESET) {
            self.end(tells);
            self.life = Life::Told;
            return Ok(());
        }
        if header.ack > self.last_sent() {
            // It heard another end in our place, or lies.
            self.end(tells);
            return Err(Malformed);
        }
        if self.suspect_since.take().is_some() && self.is_held {
            // It is back: ask at once, and not when it is our turn.
            self.hold(now);
        }
        self.reconnecting = None;
        self.missed = 0;
        self.heard_at = now;
        self.confirm_at = None;
        self.beat_at = now + self.beat();
        if header.server != 0 {
            self.peer_server = header.server;
        }
        self.acknowledged(header.ack, now, tells);
        if header.has(frame::PONG) {
            self.answered(header, now);
        }
        if header.has(frame::GAP) && (header.has(frame::PING) || self.gap_heard != Some(header.ack)) {
            // Heard is what was heeded: a question after nothing is none.
            self.gap_heard = (!self.unacked.is_empty()).then_some(header.ack);
            self.send_again(now);
        }
        if header.has(frame::PING) {
            self.flags |= frame::PONG;
            self.pong = header.ping;
        }
        let frames = message.len() > frame::HEADER;
        if frames && header.sequence <= self.received {
            self.ack_now = true;
        } else if frames && header.sequence == self.received + 1 {
            self.received += 1;
            self.unacknowledged += message.len();
            self.ack_now |= self.unacknowledged >= ACK_AFTER;
            self.ack_at.get_or_insert(now + ACK_DELAY);
            if self.take_frames(message, now, tells, &mut accept).is_err() {
                self.end(tells);
                return Err(Malformed);
            }
        } else if header.sequence > self.received && self.gap_told != Some(self.received) {
            self.gap_told = Some(self.received);
            self.flags |= frame::GAP;
        }
        Ok(())
    }

    /// What to send next. None: nothing before `deadline`, unless something happens.
    pub(crate) fn poll(&mut self, now: Instant, tells: &mut Vec<LaneEvent<S>>) -> Option<Bytes> {
        self.asleep = None;
        if self.is_linked {
            self.tick(now, tells);
            match self.life {
                Life::Open => {
                    if let Some(message) = self.next_message(now) {
                        return Some(message);
                    }
                }
                Life::Over => {
                    self.life = Life::Told;
                    return Some(self.header_only(frame::RESET, now));
                }
                Life::Told => {}
            }
        }
        self.asleep = Some(self.deadline());
        None
    }

    /// When to poll again even if nothing happens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        if !self.is_linked || self.is_over() {
            return None;
        }
        let asks_at = (!self.unacked.is_empty() && !self.is_held).then(|| self.asks_at());
        let ping_at = self.is_held.then_some(self.ping_at);
        [Some(self.beat_at), asks_at, ping_at, self.ack_at, self.confirm_at, self.gone_at()].into_iter().flatten().min()
    }

    /// Whether the driver sleeps though there is something to do: said once.
    #[inline]
    pub(crate) fn must_wake(&mut self) -> bool {
        let Some(until) = self.asleep else { return false };
        let is_due = self.is_sendable() || self.flags != 0 || self.ack_now;
        let wakes = self.is_over()
            || (is_due && self.is_linked)
            || self.deadline().is_some_and(|at| until.is_none_or(|until| at < until));
        if wakes {
            self.asleep = None;
        }
        wakes
    }

    // Inside ----------------------------------------------------------------------------------------------------------

    fn beat(&self) -> Duration {
        let is_idle = !self.has_streams() && self.is_drained();
        if is_idle { self.patience.heartbeat * IDLE_FACTOR } else { self.patience.heartbeat }
    }

    /// A stream begins: from now on the beats are frequent.
    fn wake_beat(&mut self, now: Instant) {
        self.beat_at = self.beat_at.min(now + self.patience.heartbeat);
    }

    /// When what was sent and not acknowledged is asked for.
    fn asks_at(&self) -> Instant {
        self.progress_at + self.path.ask_after(self.asked)
    }

    /// Whether there is a message with frames, and the window lets it go. One may always be in flight.
    #[inline]
    fn is_sendable(&self) -> bool {
        if self.is_held {
            return false;
        }
        let next = match self.resend {
            Some(index) => self.unacked.get(index).map(Bytes::len),
            None => self.chunks.front().map(BytesMut::len),
        };
        next.is_some_and(|size| self.in_flight == 0 || self.in_flight + size <= self.path.window())
    }

    /// The answer to a PING came: only one that was sent after a message can show that the message is missing.
    fn answered(&mut self, header: Header, now: Instant) {
        let Some(index) = self.questions.iter().position(|question| question.number == header.pong) else { return };
        // NATS keeps the order: those before it are lost, or so are their answers.
        let Some(question) = self.questions.drain(..=index).next_back() else { return };
        self.path.answered(question.sent_at, now, question.fills);
        self.asked = 0;
        if question.counts {
            self.is_held = false;
            if header.ack < question.covers {
                self.vain += 1;
                self.send_again(now);
            }
        }
    }

    /// Answers to PINGs from before are not about what is sent from now on.
    fn forget_questions(&mut self) {
        self.questions.iter_mut().for_each(|question| question.counts = false);
    }

    fn hold(&mut self, now: Instant) {
        if !self.is_held {
            self.forget_questions();
        }
        self.is_held = true;
        self.confirm_at = None;
        self.ping_at = now;
        self.ping_interval = PING_AGAIN;
    }

    fn send_again(&mut self, now: Instant) {
        self.resend = (!self.unacked.is_empty()).then_some(0);
        self.in_flight = 0;
        self.progress_at = now;
        if !self.is_held {
            self.forget_questions();
        }
    }

    /// When a suspect is gone.
    fn gone_at(&self) -> Option<Instant> {
        let at = self.suspect_since? + self.grace();
        Some(self.reconnecting.map_or(at, |until| at.max(until)))
    }

    /// How long a suspect may be away: until an answer can have come, unless there is no grace at all.
    fn grace(&self) -> Duration {
        let is_near = self.server != 0 && self.server == self.peer_server;
        let grace = if is_near { self.patience.grace } else { self.patience.remote_grace };
        if grace.is_zero() { grace } else { grace.max(self.path.silence().unwrap_or_default()) }
    }

    /// Whether the other end has been silent for too long: for so many beats, and longer than an answer takes.
    fn is_silent(&self, now: Instant) -> bool {
        self.missed >= MAX_MISSED
            && now >= self.heard_at + self.path.silence().unwrap_or(path::FIRST_ANSWER)
            && self.reconnecting.is_none_or(|until| now >= until)
    }

    /// Whether we stood still ourselves until now: what came meanwhile is still to be read. Twice in a row is overload, and
    /// no reason to wait for the dead for ever.
    fn stood_still(&mut self, now: Instant) -> bool {
        let is_late = self.deadline().is_some_and(|due| now > due + LATE);
        let was_late = mem::replace(&mut self.was_late, is_late);
        is_late && !was_late
    }

    /// A peer that acknowledges nothing, has us keep more than it could ever need, or send the same for ever, lies.
    fn is_abused(&self) -> bool {
        self.backlog > self.most_backlog() || self.unheard.len() > MAX_UNHEARD || self.vain > MAX_VAIN
    }

    fn most_backlog(&self) -> usize {
        2 * self.limit.max(MAX_PAYLOAD) + 64 * (self.outs.len() + self.ins.len()) + MAX_CONTROL
    }

    fn tick(&mut self, now: Instant, tells: &mut Vec<LaneEvent<S>>) {
        if self.is_over() {
            return;
        }
        let stood_still = self.stood_still(now);
        if stood_still {
            // We wait for one more beat: what came while we were not there ourselves is still to be read.
            self.missed = self.missed.min(MAX_MISSED - 1);
        }
        if now >= self.beat_at {
            self.missed += u32::from(!stood_still);
            self.beat_at = now + self.beat();
            self.flags |= frame::PING;
        }
        match self.gone_at() {
            Some(at) if now >= at && stood_still => self.reconnecting = Some(now + LATE),
            Some(at) if now >= at => return self.end(tells),
            _ if self.is_silent(now) || self.is_abused() => return self.end(tells),
            _ => {}
        }
        if self.is_held && now >= self.ping_at {
            self.flags |= frame::PING;
            self.ping_at = now + self.ping_interval;
            self.ping_interval = (self.ping_interval * 2).min(PING_AGAIN_UNTIL);
        }
        if !self.is_held && !self.unacked.is_empty() && now >= self.asks_at() {
            self.flags |= frame::PING;
            self.progress_at = now;
            self.asked = self.asked.saturating_add(1);
        }
        if self.ack_at.is_some_and(|at| now >= at) {
            self.ack_now = true;
        }
        if self.confirm_at.is_some_and(|at| now >= at) {
            self.ack_now |= self.has_streams();
            self.confirm_after *= 2;
            self.confirm_at = Some(now + self.confirm_after).filter(|_| self.confirm_after <= CONFIRM_UNTIL);
        }
    }

    fn next_message(&mut self, now: Instant) -> Option<Bytes> {
        if self.is_sendable() {
            if let Some(index) = self.resend.take()
                && let Some(sent) = self.unacked.get(index)
            {
                self.resend = (index + 1 < self.unacked.len()).then_some(index + 1);
                let mut again = BytesMut::from(&sent[..]);
                let sequence = self.acked + 1 + index as u64;
                self.in_flight += again.len();
                self.ask_with_frames();
                self.seal(&mut again, sequence, now);
                return Some(again.freeze());
            }
            if let Some(mut chunk) = self.chunks.pop_front() {
                if self.unacked.is_empty() {
                    self.progress_at = now;
                    self.asked = 0;
                }
                self.chunk_size = chunk.len();
                self.in_flight += chunk.len();
                self.ask_with_frames();
                self.unacked.push_back(Bytes::new());
                let sequence = self.last_sent();
                self.seal(&mut chunk, sequence, now);
                let message = chunk.freeze();
                if let Some(last) = self.unacked.back_mut() {
                    *last = message.clone();
                }
                return Some(message);
            }
        }
        (self.flags != 0 || self.ack_now).then(|| self.header_only(0, now))
    }

    /// Sends a PING with the next message where its answer opens the window, or shows how large that should be.
    fn ask_with_frames(&mut self) {
        let fills = self.fills();
        // Where so little may wait, all of it would wait for an acknowledgement that comes by itself.
        let waits = (self.limit <= 2 * ACK_AFTER && self.backlog > self.limit / 2)
            || (self.path.window() <= 2 * ACK_AFTER && fills);
        if waits || (fills && self.questions.is_empty()) {
            self.flags |= frame::PING;
        }
    }

    /// Whether more than half of the window is in flight.
    fn fills(&self) -> bool {
        self.in_flight > self.path.window() / 2
    }

    fn header_only(&mut self, flags: u8, now: Instant) -> Bytes {
        let mut message = BytesMut::zeroed(frame::HEADER);
        self.flags |= flags;
        let sequence = self.sent_so_far();
        self.seal(&mut message, sequence, now);
        message.freeze()
    }

    /// Writes the header of a message that is sent now.
    fn seal(&mut self, message: &mut BytesMut, sequence: u64, now: Instant) {
        let mut flags = mem::take(&mut self.flags);
        let (mut ping, mut pong) = (0, 0);
        let is_unmeasured = self.path.silence().is_none() && self.questions.is_empty();
        if is_unmeasured && self.patience.heartbeat * MAX_MISSED < path::FIRST_ANSWER && flags & frame::RESET == 0 {
            // With such short heartbeats, silence is judged late until the round trip is known: measure it at once.
            flags |= frame::PING;
        }
        if flags & frame::PING != 0 {
            self.last_ping = self.last_ping.wrapping_add(1);
            ping = self.last_ping;
            if self.questions.len() == MAX_QUESTIONS {
                self.questions.pop_front();
            }
            let fills = self.fills();
            self.questions.push_back(Question { number: ping, sent_at: now, covers: sequence, counts: true, fills });
        }
        if flags & frame::PONG != 0 {
            pong = self.pong;
        }
        if self.serves && self.acked == 0 {
            flags |= frame::NEW;
        }
        let header = Header { flags, sequence, ack: self.received, ping, pong, server: self.server };
        message[..frame::HEADER].copy_from_slice(&header.bytes());
        self.ack_now = false;
        self.ack_at = None;
        self.unacknowledged = 0;
        if self.received > self.acknowledged && self.has_streams() {
            self.confirm_after = ACK_DELAY;
            self.confirm_at = Some(now + ACK_DELAY);
        }
        self.acknowledged = self.received;
    }

    /// How large a message of a stream may be.
    fn max_message(&self) -> usize {
        level0::max_message(self.max_payload)
    }

    fn has_room(&self, bytes: usize) -> bool {
        self.backlog == 0 || self.backlog + bytes <= self.limit
    }

    #[inline]
    fn append(&mut self, kind: u8, stream: u32, body: &[u8]) {
        let size = body.len() + frame::MAX_FRAME_HEADER;
        // Two messages fit into the window, so that one is on its way while the other is acknowledged.
        let chunk = (self.path.window() / 2).clamp(MIN_CHUNK, CHUNK);
        let most = chunk.min(self.max_payload);
        let has_room = self.chunks.back().is_some_and(|chunk| chunk.len() + size <= most);
        if !has_room {
            // As much as the last one took, so that neither a busy lane copies nor an idle one wastes.
            let capacity = (frame::HEADER + size).max(self.chunk_size.next_power_of_two().min(CHUNK));
            let spare = if capacity == CHUNK { self.spares.pop() } else { None };
            let mut chunk = spare.unwrap_or_else(|| BytesMut::with_capacity(capacity));
            chunk.extend_from_slice(&[0; frame::HEADER]);
            self.chunks.push_back(chunk);
        }
        if let Some(chunk) = self.chunks.back_mut() {
            let before = chunk.len();
            frame::write(chunk, kind, stream, body);
            self.backlog += chunk.len() - before;
        }
    }

    fn acknowledged(&mut self, ack: u64, now: Instant, tells: &mut Vec<LaneEvent<S>>) {
        if ack <= self.acked {
            return;
        }
        self.vain = 0;
        let count = usize::try_from(ack - self.acked).unwrap_or(usize::MAX).min(self.unacked.len());
        let sent = self.resend.unwrap_or(usize::MAX);
        for (index, message) in self.unacked.drain(..count).enumerate() {
            self.backlog -= message.len() - frame::HEADER;
            if index < sent {
                self.in_flight -= message.len();
            }
            if self.spares.len() < MAX_SPARES
                && let Ok(mut buffer) = message.try_into_mut()
                && buffer.capacity() == CHUNK
            {
                buffer.clear();
                self.spares.push(buffer);
            }
        }
        if self.is_drained() {
            // Nothing is on its way: whoever sends little keeps nothing.
            self.spares = Vec::new();
        }
        self.acked = ack;
        self.unheard.retain(|(accepted_in, _)| *accepted_in > ack);
        self.resend = self.resend.map(|index| index.saturating_sub(count)).filter(|index| *index < self.unacked.len());
        self.progress_at = now;
        self.asked = 0;
        if !self.wanting.is_empty() && self.backlog <= self.limit / 2 {
            let outs = &self.outs;
            self.wanting.retain(|stream| match outs.get(stream) {
                Some(out) if !out.credit.has_room(OVERHEAD) => true,
                Some(out) => {
                    tells.push(LaneEvent::Room(out.to.clone()));
                    false
                }
                None => false,
            });
        }
    }

    fn take_frames(
        &mut self,
        message: &Bytes,
        now: Instant,
        tells: &mut Vec<LaneEvent<S>>,
        accept: &mut impl FnMut(u64, u32) -> Option<(S, u32)>,
    ) -> Result<(), Malformed> {
        let mut frames = Frames::new(&message[frame::HEADER..]);
        let mut start = frame::HEADER;
        while let Some(frame) = frames.next() {
            let frame = frame?;
            match (frame.kind, self.serves) {
                (frame::DATA, false) => {
                    let (mut count, mut bytes) = (0, 0);
                    let mut body = Some(frame.body);
                    let own = self.ins.get_mut(&frame.stream);
                    let mut room = own.as_ref().map(|own| (own.unconsumed, own.window.into()));
                    let mut is_overrun = false;
                    while let Some(data) = body.take() {
                        let weight = data.len() as u64 + OVERHEAD;
                        if let Some((unconsumed, window)) = &mut room {
                            is_overrun |= !has_room(*unconsumed, *window, weight);
                            *unconsumed += weight;
                        }
                        count += 1;
                        bytes += data.len() as u64;
                        let mut ahead = frames.clone();
                        if let Some(Ok(next)) = ahead.next()
                            && next.kind == frame::DATA
                            && next.stream == frame.stream
                        {
                            frames = ahead;
                            body = Some(next.body);
                        }
                    }
                    let run = Run::new(start, message.len() - frames.left(), count, bytes);
                    if let (Some(own), Some((unconsumed, _))) = (own, room) {
                        own.unconsumed = unconsumed;
                        let to = own.to.clone();
                        if is_overrun {
                            self.cancel(frame.stream, 0);
                            tells.push(LaneEvent::Overrun(to));
                        } else {
                            tells.push(LaneEvent::Data(to, run));
                        }
                    }
                }
                (frame::ACCEPT, false) => {
                    if frame.stream <= self.last_stream {
                        return Err(Malformed);
                    }
                    let key = u64::from_le_bytes(*frame.body.first_chunk().ok_or(Malformed)?);
                    self.last_stream = frame.stream;
                    self.wake_beat(now);
                    match accept(key, frame.stream) {
                        Some((to, window)) => {
                            self.ins.insert(frame.stream, In { to, window, unconsumed: 0 });
                        }
                        // Nobody wants it any longer, or nobody ever asked.
                        None => self.append(frame::CANCEL, frame.stream, &[0]),
                    }
                }
                (frame::END, false) => {
                    if let Some(own) = self.ins.remove(&frame.stream) {
                        tells.push(LaneEvent::End(own.to));
                    }
                }
                (frame::ERROR, false) => {
                    if let Some(own) = self.ins.remove(&frame.stream) {
                        tells.push(LaneEvent::Error(own.to, message.slice_ref(frame.body)));
                    }
                }
                (frame::CANCEL, true) => {
                    self.wanting.remove(&frame.stream);
                    if let Some(out) = self.outs.remove(&frame.stream) {
                        tells.push(LaneEvent::Cancelled(out.to, frame.body.first().copied().unwrap_or_default()));
                    }
                }
                (frame::CREDIT, true) => {
                    let weight = u64::from_le_bytes(*frame.body.first_chunk().ok_or(Malformed)?);
                    if let Some(out) = self.outs.get(&frame.stream) {
                        let left = out.credit.outstanding().saturating_sub(weight);
                        out.credit.outstanding.store(left, Ordering::Relaxed);
                        if self.backlog <= self.limit / 2 && self.wanting.remove(&frame.stream) {
                            tells.push(LaneEvent::Room(out.to.clone()));
                        }
                    }
                }
                // What a later version may say, or a stream that has ended.
                _ => {}
            }
            start = message.len() - frames.left();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
