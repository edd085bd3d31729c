//! Two processes with their lanes, nats-server between them, and the promises that must always hold.
//!
//! It follows `driver.rs` and `lanes.rs`: when a lane is polled, what wakes its driver, how ends are found and
//! rejected.

mod ends;
mod healing;
mod network;
mod owners;
mod promises;
mod steps;

use super::schedule::{Random, Reader, Schedule, Setup, Side, Spec, Step, Weather, mix};
use crate::error::Status;
use crate::lane::event::{LaneEvent, LaneEvents};
use crate::lane::liveness::PeerTimeouts;
use crate::lane::path;
use crate::lane::read_window::{MAX_WINDOW, ReadWindow};
use crate::lane::state::{State, unknown_lane_reply};
use crate::lane::streams::{OVERHEAD, SendWindow};
use crate::wire::frame::{self, Header};
use crate::wire::level0;
use crate::wire::stream_error::StreamError;
use bytes::Bytes;
use std::cmp::Reverse;
use std::collections::{BTreeSet, BinaryHeap, HashMap, HashSet, VecDeque};
use std::fmt;
use std::ops::AddAssign;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Microseconds since the beginning.
type Time = u64;

const MILLI: Time = 1000;
const SECOND: Time = 1_000_000;
/// As `liveness.rs` and `acks.rs` have them.
const LATE: Time = 250 * MILLI;
const ACK_DELAY: Time = 25 * MILLI;
/// More events than any schedule needs.
const MAX_EVENTS: u32 = 100_000;
const ERROR_TEXT: &[u8] = b"the worker failed";

/// The code of a sender's error: every other one has none.
fn error_code(sender: usize) -> i32 {
    if sender.is_multiple_of(2) { 0 } else { i32::MAX - sender as i32 }
}

/// A promise that was not kept.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// Its name; a shrunk schedule must break the same promise.
    pub(super) promise: &'static str,
    pub(super) text: String,
}

/// Counts of what happened, to know that the simulation reaches it.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    pub(super) events: u64,
    pub(super) lanes: u64,
    pub(super) streams: u64,
    pub(super) messages: u64,
    pub(super) complete: u64,
    pub(super) cancelled: u64,
    pub(super) gone: u64,
    pub(super) lanes_gone: u64,
    pub(super) refused: u64,
    pub(super) grown_windows: u64,
    pub(super) sent_again: u64,
    pub(super) no_responders: u64,
}

impl AddAssign for Seen {
    fn add_assign(&mut self, other: Seen) {
        self.events += other.events;
        self.lanes += other.lanes;
        self.streams += other.streams;
        self.messages += other.messages;
        self.complete += other.complete;
        self.cancelled += other.cancelled;
        self.gone += other.gone;
        self.lanes_gone += other.lanes_gone;
        self.refused += other.refused;
        self.grown_windows += other.grown_windows;
        self.sent_again += other.sent_again;
        self.no_responders += other.no_responders;
    }
}

/// The subject of a lane's end. Number 0 of a gateway is what it offers to its workers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Address {
    side: Side,
    generation: u32,
    number: u32,
}

impl fmt::Display for Address {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        let side = if self.side == Side::Worker { 'W' } else { 'G' };
        write!(to, "{side}{}.{}", self.generation, self.number)
    }
}

/// A connection to nats-server: each is another one.
type Link = u32;

struct Process {
    generation: u32,
    link: Option<Link>,
    links: u32,
    /// How often it stood still, since when, and until when.
    suspensions: u32,
    suspended_at: Time,
    suspended_until: Option<Time>,
    resumed_at: Time,
    /// Messages that came while it stood still.
    socket: VecDeque<Packet>,
    /// Requests that were not accepted yet: the stream of each key.
    asked: HashMap<u64, usize>,
    lanes: u32,
    rejected: u64,
    /// When the last message arrives, to the server and from there; and until when the ways are busy.
    up_at: Time,
    down_at: Time,
    up_busy: Time,
    down_busy: Time,
}

impl Process {
    fn new(generation: u32, links: u32) -> Process {
        Process {
            generation,
            link: Some(links + 1),
            links: links + 1,
            suspensions: 0,
            suspended_at: 0,
            suspended_until: None,
            resumed_at: 0,
            socket: VecDeque::new(),
            asked: HashMap::new(),
            lanes: 0,
            rejected: 0,
            up_at: 0,
            down_at: 0,
            up_busy: 0,
            down_busy: 0,
        }
    }
}

/// To nats-server, or from there.
#[derive(Clone, Copy)]
enum Way {
    Up,
    Down,
}

/// The state of a lane's task.
enum Driver {
    /// It starts then.
    New(Time),
    /// It polls then: it was woken, or writes until then.
    Ready(Time),
    /// It sleeps until then, or until it is woken.
    Asleep(Option<Time>),
    /// It waits for a connection that is lost.
    Stuck,
}

/// One end of a lane. Its owners are the numbers of senders or streams.
struct Lane {
    own: Address,
    peer: Address,
    state: State<usize>,
    driver: Driver,
    /// At the worker: the gateway's end that it has heard.
    heard: Option<Address>,
    /// The connection that the driver uses.
    seen: Option<Link>,
    /// How many streams were opened on it.
    opened: u32,
    /// How many messages it sent, including repeated ones.
    published: u64,
    /// A hash and the size of the frames of each message with frames.
    sent: Vec<(u64, usize)>,
    /// The number of the last message with frames.
    sent_last: u64,
    /// The peer has shown a loss: messages may be sent again, and must be.
    may_repeat: bool,
    must_repeat: bool,
    /// PINGs without an answer: number, the last message before it, and whether the answer can show a loss.
    asked: Vec<(u32, u64, bool)>,
    /// The peer's server, as its messages say.
    peer_server: u32,
    /// A PING was answered on this connection.
    knows_trip: bool,
    gap_followed: Option<u64>,
    gap_reported: Option<u64>,
    gap_reports: u32,
    /// The last message that it has taken; the gap that it has seen and must report; until when it must acknowledge.
    taken: u64,
    gap_seen: Option<u64>,
    must_report_gap: bool,
    must_answer_by: Option<Time>,
    /// It has sent or received a RESET.
    is_reset: bool,
    acked: u64,
    /// The numbers of messages that came after the first missing one.
    came: BTreeSet<u64>,
    came_all: u64,
    /// When the last message came, or the lane began.
    heard_at: Time,
    /// How often its own process had stood still by then.
    suspensions: u32,
    linked_at: Time,
    /// It has reconnected, and no message has come since.
    is_relinked: bool,
    suspect_since: Option<Time>,
    is_probing: bool,
    busy_since: Option<Time>,
}

/// The worker's part of a stream.
struct Sender {
    stream: usize,
    lane: Address,
    number: u32,
    window: Arc<SendWindow>,
    /// How many messages are to be sent.
    pending: u32,
    sent: u32,
    is_blocked: bool,
    /// It is to end when nothing is pending; `true`: with an error.
    finish: Option<bool>,
    finished: Option<bool>,
    /// The gateway has its ACCEPT.
    is_known: bool,
    /// `AcceptUndelivered` was reported.
    accept_undelivered: bool,
    /// Its lane reports no more events of it.
    is_done: bool,
    /// Its owner knows that it has ended.
    is_closed: bool,
    is_lost: bool,
}

/// The gateway's part of a stream.
struct Stream {
    spec: Spec,
    key: u64,
    generation: u32,
    /// Where it was accepted, and by which sender.
    on: Option<(Address, u32, usize)>,
    got: u32,
    /// The weights of the messages that were not read.
    unread: VecDeque<u64>,
    reader: Reader,
    will_read: bool,
    window: ReadWindow,
    /// The window that the gateway has announced.
    window_size: u32,
    cancelled: Option<u8>,
    is_done: bool,
    is_closed: bool,
    is_lost: bool,
}

#[derive(Clone)]
enum Cargo {
    Lane(Bytes),
    /// nats-server's 503.
    NoResponders,
    Request(usize),
}

#[derive(Clone)]
struct Packet {
    from: Address,
    to: Address,
    cargo: Cargo,
    luck: u64,
}

/// What an owner does after an event.
#[derive(Clone, Copy)]
enum Reaction {
    Read(usize),
    Writable(usize),
    SenderOver(usize),
    StreamOver(usize),
    /// Threads in `send_wait` try again.
    Retry(Address),
}

enum Event {
    AtServer(Packet, Link),
    AtEnd(Packet, Link),
    Notice(Side),
    Resume(Side),
    React(Side, u32, Reaction),
    /// A slow reader reads one message.
    TakeOne(usize),
}

struct Entry(Time, u64, Event);

impl Entry {
    fn key(&self) -> (Time, u64) {
        (self.0, self.1)
    }
}

impl PartialEq for Entry {
    fn eq(&self, other: &Entry) -> bool {
        self.key() == other.key()
    }
}

impl Eq for Entry {}

impl PartialOrd for Entry {
    fn partial_cmp(&self, other: &Entry) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Entry {
    fn cmp(&self, other: &Entry) -> std::cmp::Ordering {
        self.key().cmp(&other.key())
    }
}

pub(super) struct World {
    setup: Setup,
    base: Instant,
    now: Time,
    order: u64,
    events: BinaryHeap<Reverse<Entry>>,
    count: u32,
    weather: Weather,
    max_delay: Time,
    has_lost_messages: bool,
    /// Messages may have been lost or reordered.
    has_disorder: bool,
    /// The servers of the two processes are connected.
    is_route_up: bool,
    /// The longest time that a process stood still.
    max_pause: Time,
    has_restarted: bool,
    /// When something last happened that may look like a peer's death.
    disturbed_at: Time,
    processes: [Process; 2],
    lanes: Vec<Lane>,
    /// Lanes that are closed: at which end, by the worker's address.
    over: HashSet<(Side, u32, Address)>,
    streams: Vec<Stream>,
    senders: Vec<Sender>,
    buffer: Vec<u8>,
    seen: Seen,
    failure: Option<Failure>,
    trace: Option<Vec<String>>,
}

/// Runs a schedule. Returns what was seen, or the broken promise; and, if `traced`, the trace.
pub(super) fn run(schedule: &Schedule, traced: bool) -> (Result<Seen, Failure>, Vec<String>) {
    let mut world = World::new(schedule.setup, traced);
    for step in &schedule.steps {
        world.note(|| format!("-- {step:?}"));
        world.step(*step);
        world.check_dead_peers();
        if world.failure.is_some() {
            break;
        }
    }
    if world.failure.is_none() {
        world.heal();
    }
    let mut seen = world.seen;
    seen.events = u64::from(world.count);
    (world.failure.map_or(Ok(seen), Err), world.trace.unwrap_or_default())
}

impl World {
    fn new(setup: Setup, traced: bool) -> World {
        World {
            setup,
            base: Instant::now(),
            now: 0,
            order: 0,
            events: BinaryHeap::new(),
            count: 0,
            weather: Weather::CALM,
            max_delay: Weather::CALM.delay,
            has_lost_messages: false,
            has_disorder: false,
            is_route_up: true,
            max_pause: 0,
            has_restarted: false,
            disturbed_at: 0,
            processes: [Process::new(1, 0), Process::new(1, 0)],
            lanes: Vec::new(),
            over: HashSet::new(),
            streams: Vec::new(),
            senders: Vec::new(),
            buffer: Vec::new(),
            seen: Seen::default(),
            failure: None,
            trace: traced.then(Vec::new),
        }
    }

    fn note(&mut self, text: impl FnOnce() -> String) {
        if let Some(trace) = &mut self.trace {
            trace.push(format!("{:>12.3} ms  {}", self.now as f64 / 1e3, text()));
        }
    }

    fn fail(&mut self, promise: &'static str, text: String) {
        self.note(|| format!("!! {promise}: {text}"));
        self.failure.get_or_insert(Failure { promise, text });
    }

    fn instant(&self) -> Instant {
        self.base + Duration::from_micros(self.now)
    }

    fn process(&mut self, side: Side) -> &mut Process {
        &mut self.processes[side as usize]
    }

    fn is_awake(&self, side: Side) -> bool {
        self.processes[side as usize].suspended_until.is_none()
    }

    fn heartbeat(&self) -> Time {
        self.setup.heartbeat_ms * MILLI
    }

    /// The grace of this end's peer: shorter if the peer is on the same server.
    fn grace(&self, lane: &Lane) -> Time {
        let is_near = lane.peer_server == self.setup.server(lane.own.side);
        MILLI * if is_near { self.setup.grace_ms } else { self.setup.remote_grace_ms }
    }

    fn max_grace(&self) -> Time {
        MILLI * self.setup.grace_ms.max(self.setup.remote_grace_ms)
    }

    /// No end that has measured the round trip gives up a peer after less silence than this.
    fn max_silence(&self) -> Time {
        // A smoothed round trip and four deviations, twice.
        let trip = 4 * self.max_delay + 2 * self.max_pause + 4 * self.setup.lag;
        (6 * trip).min(path::MAX_ANSWER.as_micros() as Time)
    }

    fn reconnect(&self) -> Time {
        self.setup.reconnect_ms * MILLI
    }

    fn at(&mut self, at: Time, event: Event) {
        self.order += 1;
        self.events.push(Reverse(Entry(at, self.order, event)));
    }

    fn find(&self, own: Address) -> Option<usize> {
        self.lanes.iter().position(|lane| lane.own == own)
    }

    // Time ------------------------------------------------------------------------------------------------------------

    /// Lets time pass until then, or until `done`.
    fn run_until(&mut self, until: Time, done: impl Fn(&World) -> bool) {
        while self.failure.is_none() && !done(self) {
            let event_at = self.events.peek().map(|Reverse(entry)| entry.0);
            let driver = (0..self.lanes.len()).filter_map(|index| Some((self.due(index)?, index))).min();
            let at = event_at.into_iter().chain(driver.map(|(at, _)| at)).min().filter(|at| *at <= until);
            let Some(at) = at else { break };
            self.now = self.now.max(at);
            self.count += 1;
            if self.count > MAX_EVENTS {
                return self.fail("the number of messages is bounded", format!("{MAX_EVENTS} events"));
            }
            match driver {
                Some((due, index)) if event_at.is_none_or(|event_at| due < event_at) => self.drive(index),
                _ => {
                    let event = self.events.pop();
                    event.into_iter().for_each(|Reverse(Entry(_, _, event))| self.happen(event));
                }
            }
        }
        if self.failure.is_none() && !done(self) {
            self.now = until;
        }
    }

    fn pass(&mut self, time: Time) {
        self.run_until(self.now + time, |_| false);
    }

    /// When the task of a lane runs next.
    fn due(&self, index: usize) -> Option<Time> {
        let lane = &self.lanes[index];
        match lane.driver {
            _ if !self.is_awake(lane.own.side) => None,
            Driver::New(at) | Driver::Ready(at) => Some(at),
            Driver::Asleep(until) => until,
            Driver::Stuck => None,
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::AtServer(packet, link) => self.at_server(packet, link),
            Event::AtEnd(packet, link) => {
                let process = self.process(packet.to.side);
                if process.generation != packet.to.generation || process.link != Some(link) {
                    return self.note(|| format!("{} is away: lost", packet.to));
                }
                if process.suspended_until.is_some() {
                    process.socket.push_back(packet);
                } else {
                    self.arrive(packet);
                }
            }
            Event::Resume(side) => self.resume(side),
            // The process does the rest: later, if it stands still.
            Event::Notice(side) => match self.process(side).suspended_until {
                Some(until) => self.at(until, event),
                None => self.notice(side),
            },
            Event::React(side, generation, reaction) => match self.process(side) {
                process if process.generation != generation => {}
                Process { suspended_until: Some(until), .. } => {
                    let until = *until;
                    self.at(until, event);
                }
                _ => self.react(reaction),
            },
            Event::TakeOne(stream) => match self.process(Side::Gateway).suspended_until {
                Some(until) => self.at(until, event),
                None => {
                    self.streams[stream].will_read = false;
                    self.read(stream, true);
                }
            },
        }
    }
}

fn names(flags: u8) -> String {
    let all = [
        (frame::PING, "PING"),
        (frame::PONG, "PONG"),
        (frame::GAP, "GAP"),
        (frame::RESET, "RESET"),
        (frame::NEW, "NEW"),
    ];
    all.into_iter().filter(|(flag, _)| flags & flag != 0).map(|(_, name)| name).collect::<Vec<_>>().join("|")
}

/// A message as text.
fn described(message: &Bytes) -> String {
    let Ok(header) = Header::read(message) else { return format!("{message:?}") };
    let frames = frame::Frames::new(&message[frame::HEADER..]).map(|frame| {
        let Ok(frame) = frame else { return "malformed".into() };
        let kind = match frame.kind {
            frame::ACCEPT => "ACCEPT",
            frame::DATA => "DATA",
            frame::END => "END",
            frame::ERROR => "ERROR",
            frame::CANCEL => "CANCEL",
            frame::CREDIT => "CREDIT",
            frame::CODE => "CODE",
            frame::WINDOW => "WINDOW",
            _ => "other",
        };
        format!("{kind} {} ({})", frame.stream, frame.body.len())
    });
    let frames = frames.collect::<Vec<_>>().join(", ");
    format!("#{} ack {} {} [{frames}]", header.sequence, header.ack, names(header.flags))
}
