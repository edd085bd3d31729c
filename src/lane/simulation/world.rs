//! Two processes with their lanes, nats-server between them, and what must always hold.
//!
//! It follows `driver.rs` and `lanes.rs`: when a lane is polled, what wakes its driver, how ends are found and disowned.

use super::schedule::{Random, Reader, Schedule, Setup, Side, Spec, Step, Weather, mix};
use crate::lane::frame::{self, Header};
use crate::lane::state::{Credit, Grant, OVERHEAD, Patience, Refusal, State, Tell};
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
/// As `state.rs` has them.
const LATE: Time = 250 * MILLI;
const ASK_AFTER: Time = 500 * MILLI;
/// What no honest schedule needs: more is a storm of messages.
const MAX_EVENTS: u32 = 100_000;
const ERROR_TEXT: &[u8] = b"the worker failed";

/// A promise that was not kept.
#[derive(Clone, Debug)]
pub(super) struct Failure {
    /// Which; a shrunk schedule must break the same.
    pub(super) promise: &'static str,
    pub(super) text: String,
}

/// What was seen, to know that the simulation reaches it.
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
    pub(super) sent_again: u64,
    pub(super) nobody_there: u64,
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
        self.sent_again += other.sent_again;
        self.nobody_there += other.nobody_there;
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
    /// What came while it stood still.
    socket: VecDeque<Packet>,
    /// Requests that were not accepted yet: the stream of each key.
    asked: HashMap<u64, usize>,
    lanes: u32,
    disowned: u64,
    /// Until when what was sent before is on its way, to the server and from there.
    up_at: Time,
    down_at: Time,
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
            disowned: 0,
            up_at: 0,
            down_at: 0,
        }
    }
}

/// What the task of a lane does.
enum Driver {
    /// It begins then.
    New(Time),
    /// It polls then: it was woken, or writes until then.
    Ready(Time),
    /// It sleeps until then, or until it is woken.
    Asleep(Option<Time>),
    /// It writes to a connection that is lost.
    Stuck,
}

/// One end of a lane. Senders and streams are told apart by their numbers in the world.
struct Lane {
    own: Address,
    peer: Address,
    state: State<usize>,
    driver: Driver,
    /// A worker's: which of the gateway's ends it has heard.
    heard: Option<Address>,
    /// The connection that the driver knows of.
    seen: Option<Link>,
    /// How many streams were opened on it.
    opened: u32,
    /// How many messages it sent, repeats included.
    published: u64,
    /// The frames of each message that had some, as a number and a size.
    sent: Vec<(u64, usize)>,
    /// The number of the last message with frames.
    sent_last: u64,
    /// The other end gave reason to send again, and asked for it: with a GAP behind this number.
    may_repeat: bool,
    must_repeat: bool,
    gap_heard: Option<u64>,
    gap_told: Option<u64>,
    gaps_told: u32,
    acked: u64,
    /// The numbers of messages that came, from the first missing on.
    came: BTreeSet<u64>,
    came_all: u64,
    /// When the other end was heard, or the lane began.
    heard_at: Time,
    /// How often its own process had stood still by then.
    suspensions: u32,
    linked_at: Time,
    /// It was linked again, and has not heard of the other end since.
    is_relinked: bool,
    suspect_since: Option<Time>,
    is_held: bool,
    busy_since: Option<Time>,
}

/// The worker's part of a stream.
struct Sender {
    stream: usize,
    lane: Address,
    number: u32,
    credit: Arc<Credit>,
    /// How many messages are to be sent.
    pending: u32,
    sent: u32,
    wants_room: bool,
    /// To be finished when nothing is pending: with an error?
    finish: Option<bool>,
    finished: Option<bool>,
    /// The gateway has its ACCEPT.
    is_known: bool,
    /// Its lane will tell no more of it.
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
    /// What the reader has not taken: each message's weight.
    unread: VecDeque<u64>,
    reader: Reader,
    will_read: bool,
    grant: Grant,
    cancelled: Option<u8>,
    is_done: bool,
    is_closed: bool,
    is_lost: bool,
}

#[derive(Clone)]
enum Cargo {
    Lane(Bytes),
    /// nats-server's 503.
    Nobody,
    Request(usize),
}

#[derive(Clone)]
struct Packet {
    from: Address,
    to: Address,
    cargo: Cargo,
    luck: u64,
}

/// What an owner does after a lane told it something.
#[derive(Clone, Copy)]
enum Reaction {
    Read(usize),
    Room(usize),
    SenderOver(usize),
    StreamOver(usize),
    /// Those who wait for room look again.
    Retry(Address),
}

enum Event {
    AtServer(Packet, Link),
    AtEnd(Packet, Link),
    Notice(Side),
    Resume(Side),
    React(Side, u32, Reaction),
    /// A slow reader takes one.
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
    has_lost: bool,
    has_restarted: bool,
    /// When something last happened that may be taken for a death.
    disturbed_at: Time,
    processes: [Process; 2],
    lanes: Vec<Lane>,
    /// Lanes that are over: by the worker's address, and where.
    over: HashSet<(Side, u32, Address)>,
    streams: Vec<Stream>,
    senders: Vec<Sender>,
    buffer: Vec<u8>,
    seen: Seen,
    failure: Option<Failure>,
    trace: Option<Vec<String>>,
}

/// Runs a schedule: what was seen, or the promise that was broken; and, if `traced`, what happened.
pub(super) fn run(schedule: &Schedule, traced: bool) -> (Result<Seen, Failure>, Vec<String>) {
    let mut world = World::new(schedule.setup, traced);
    for step in &schedule.steps {
        world.note(|| format!("-- {step:?}"));
        world.step(*step);
        world.check_patience();
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
            has_lost: false,
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

    fn grace(&self) -> Time {
        self.setup.grace_ms * MILLI
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

    /// Has time pass until then, or until `done`.
    fn run_until(&mut self, until: Time, done: impl Fn(&World) -> bool) {
        while self.failure.is_none() && !done(self) {
            let event_at = self.events.peek().map(|Reverse(entry)| entry.0);
            let driver = (0..self.lanes.len()).filter_map(|index| Some((self.due(index)?, index))).min();
            let at = event_at.into_iter().chain(driver.map(|(at, _)| at)).min().filter(|at| *at <= until);
            let Some(at) = at else { break };
            self.now = self.now.max(at);
            self.count += 1;
            if self.count > MAX_EVENTS {
                return self.fail("no storms", format!("{MAX_EVENTS} events"));
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

    /// When the task of a lane does something next.
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
            // The rest is done by the process: later, when it stands still.
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

    // Steps -----------------------------------------------------------------------------------------------------------

    fn step(&mut self, step: Step) {
        match step {
            Step::Wait(time) => self.pass(time),
            Step::Weather(weather) => {
                self.disturbed_at = self.now;
                self.weather = weather;
                self.max_delay = self.max_delay.max(weather.delay);
                self.has_lost |= weather.drop > 0;
            }
            Step::Request(spec) => self.request(spec),
            Step::Send { stream, count } => {
                if let Some(sender) = self.number(stream, self.senders.len()) {
                    if self.senders[sender].finish.is_none() {
                        self.senders[sender].pending += count;
                    }
                    self.send(sender);
                }
            }
            Step::Finish { stream, error, now } => {
                if let Some(sender) = self.number(stream, self.senders.len())
                    && self.senders[sender].finish.is_none()
                {
                    self.senders[sender].finish = Some(error);
                    if now {
                        self.senders[sender].pending = 0;
                    }
                    self.send(sender);
                }
            }
            Step::Read { stream, reader } => {
                if let Some(stream) = self.number(stream, self.streams.len()) {
                    self.streams[stream].reader = reader;
                    self.read(stream, false);
                }
            }
            Step::Cancel { stream } => {
                if let Some(stream) = self.number(stream, self.streams.len()) {
                    self.cancel(stream);
                }
            }
            Step::Cut(side) => self.cut(side),
            Step::Link(side) => self.link(side),
            Step::Blink(side) => {
                self.cut(side);
                self.link(side);
            }
            Step::CutBoth => Side::BOTH.into_iter().for_each(|side| self.cut(side)),
            Step::LinkBoth => Side::BOTH.into_iter().for_each(|side| self.link(side)),
            Step::Suspend(side, time) => {
                if self.is_awake(side) {
                    self.disturbed_at = self.now;
                    let (now, until) = (self.now, self.now + time * MILLI);
                    let process = self.process(side);
                    process.suspensions += 1;
                    (process.suspended_at, process.suspended_until) = (now, Some(until));
                    self.at(until, Event::Resume(side));
                }
            }
            Step::Restart(side) => self.restart(side),
            Step::End(side) => {
                let open = |lane: &Lane| lane.own.side == side && !lane.state.is_over();
                if let Some(index) = self.lanes.iter().rposition(open)
                    && self.is_awake(side)
                {
                    self.end(index);
                }
            }
            Step::Ask(side) => {
                if self.is_awake(side) {
                    self.ask(side);
                }
            }
        }
    }

    fn number(&self, number: usize, count: usize) -> Option<usize> {
        (count > 0).then(|| number % count)
    }

    fn request(&mut self, spec: Spec) {
        let stream = self.streams.len();
        let process = &mut self.processes[Side::Gateway as usize];
        let (Some(link), None) = (process.link, process.suspended_until) else { return };
        let key = mix(self.setup.luck ^ stream as u64);
        process.asked.insert(key, stream);
        let from = Address { side: Side::Gateway, generation: process.generation, number: 0 };
        self.seen.streams += 1;
        self.streams.push(Stream {
            spec,
            key,
            generation: from.generation,
            on: None,
            got: 0,
            unread: VecDeque::new(),
            reader: spec.reader,
            will_read: false,
            grant: Grant::new(spec.window.into()),
            cancelled: None,
            is_done: false,
            is_closed: false,
            is_lost: false,
        });
        for copy in 0..1 + u64::from(spec.twice) {
            let to = Address { side: Side::Worker, generation: 0, number: 0 };
            let luck = mix(key ^ copy);
            self.post(Packet { from, to, cargo: Cargo::Request(stream), luck }, link);
        }
    }

    fn cancel(&mut self, number: usize) {
        let stream = &mut self.streams[number];
        if stream.is_closed || self.processes[Side::Gateway as usize].suspended_until.is_some() {
            return;
        }
        stream.is_closed = true;
        self.processes[Side::Gateway as usize].asked.remove(&stream.key);
        let Some((lane, stream_number, _)) = stream.on else { return };
        let reason = 1 + (number % 250) as u8;
        if !stream.is_done {
            stream.is_done = true;
            stream.cancelled = Some(reason);
        }
        if let Some(index) = self.find(lane) {
            self.lanes[index].state.cancel(stream_number, reason);
            self.changed(index);
        }
    }

    fn cut(&mut self, side: Side) {
        let process = &mut self.processes[side as usize];
        if process.link.take().is_none() {
            return;
        }
        self.disturbed_at = self.now;
        process.socket.clear();
        // On level 0 they have ended.
        for (_, stream) in process.asked.drain() {
            self.streams[stream].is_closed = true;
        }
        self.at(self.now + self.setup.lag, Event::Notice(side));
    }

    fn link(&mut self, side: Side) {
        let process = &mut self.processes[side as usize];
        if process.link.is_some() {
            return;
        }
        self.disturbed_at = self.now;
        process.links += 1;
        process.link = Some(process.links);
        self.at(self.now + self.setup.lag, Event::Notice(side));
    }

    /// Drivers learn of a connection that is lost, or there again.
    fn notice(&mut self, side: Side) {
        self.disturbed_at = self.now;
        let (link, now) = (self.process(side).link, self.instant());
        for lane in self.lanes.iter_mut().filter(|lane| lane.own.side == side) {
            if lane.seen == link || matches!(lane.driver, Driver::New(_)) {
                continue;
            }
            lane.seen = link;
            lane.state.link_down();
            lane.suspect_since = None;
            lane.must_repeat = false;
            if link.is_some() {
                lane.state.link_up(now);
                (lane.linked_at, lane.is_relinked, lane.is_held) = (self.now, true, true);
            }
            lane.driver = Driver::Ready(self.now);
        }
    }

    fn restart(&mut self, side: Side) {
        self.disturbed_at = self.now;
        self.has_restarted = true;
        self.lanes.retain(|lane| lane.own.side != side);
        let resumed_at = self.now;
        let process = self.process(side);
        *process = Process { resumed_at, ..Process::new(process.generation + 1, process.links) };
        match side {
            Side::Worker => self.senders.iter_mut().for_each(|sender| {
                sender.is_lost |= !sender.is_closed;
                (sender.is_done, sender.is_closed) = (true, true);
            }),
            Side::Gateway => self.streams.iter_mut().for_each(|stream| {
                stream.is_lost |= !stream.is_closed;
                (stream.is_done, stream.is_closed) = (true, true);
            }),
        }
    }

    fn resume(&mut self, side: Side) {
        let now = self.now;
        let process = self.process(side);
        if process.suspended_until != Some(now) {
            return;
        }
        self.disturbed_at = self.now;
        let process = self.process(side);
        process.suspended_until = None;
        process.resumed_at = now;
        let luck = mix(self.setup.luck ^ now);
        self.note(|| format!("{side:?} resumes"));
        if luck & 1 == 0 {
            // Its timers come first.
            for own in self.lanes.iter().map(|lane| lane.own).collect::<Vec<_>>() {
                if own.side == side
                    && let Some(index) = self.find(own)
                    && self.due(index).is_some_and(|due| due <= now)
                {
                    self.drive(index);
                }
            }
        }
        while let Some(packet) = self.process(side).socket.pop_front() {
            self.arrive(packet);
        }
        match side {
            Side::Worker => (0..self.senders.len()).for_each(|sender| self.send(sender)),
            Side::Gateway => (0..self.streams.len()).for_each(|stream| self.read(stream, false)),
        }
    }

    fn ask(&mut self, side: Side) {
        let now = self.instant();
        for index in 0..self.lanes.len() {
            if self.lanes[index].own.side == side {
                self.lanes[index].state.ask(now);
                self.changed(index);
            }
        }
    }

    // The network -----------------------------------------------------------------------------------------------------

    fn post(&mut self, packet: Packet, link: Link) {
        let weather = self.weather;
        let mut random = Random::new(packet.luck);
        let is_lane = matches!(packet.cargo, Cargo::Lane(_));
        if is_lane && random.chance(weather.drop) {
            return self.note(|| "    lost".into());
        }
        let copies = 1 + u32::from(is_lane && random.chance(weather.double));
        for _ in 0..copies {
            let mut at = self.now + 1 + random.below(weather.delay);
            if !weather.reorder {
                let process = self.process(packet.from.side);
                process.up_at = process.up_at.max(at);
                at = process.up_at;
            }
            self.at(at, Event::AtServer(Packet { luck: random.next(), ..packet.clone() }, link));
        }
    }

    fn at_server(&mut self, mut packet: Packet, link: Link) {
        let mut random = Random::new(packet.luck);
        let from = &self.processes[packet.from.side as usize];
        let is_from_there = from.generation == packet.from.generation && from.link == Some(link);
        if !is_from_there && random.chance(50) {
            // The connection was lost before it was out.
            return;
        }
        let to = &self.processes[packet.to.side as usize];
        let is_request = matches!(packet.cargo, Cargo::Request(_));
        let there = to.link.filter(|_| is_request || to.generation == packet.to.generation);
        packet.luck = random.next();
        let (packet, link) = match (there, &packet.cargo) {
            (Some(there), _) => (Packet { to: Address { generation: to.generation, ..packet.to }, ..packet }, there),
            (None, Cargo::Lane(_)) if is_from_there => {
                if random.chance(self.weather.drop) {
                    return self.note(|| format!("503 to {} is lost", packet.from));
                }
                (Packet { from: packet.to, to: packet.from, cargo: Cargo::Nobody, luck: 0 }, link)
            }
            _ => return self.note(|| format!("{} is not there", packet.to)),
        };
        let mut at = self.now + 1 + random.below(self.weather.delay);
        if !self.weather.reorder {
            let process = self.process(packet.to.side);
            process.down_at = process.down_at.max(at);
            at = process.down_at;
        }
        self.at(at, Event::AtEnd(packet, link));
    }

    /// A message has come to a process: as `Lanes::message`.
    fn arrive(&mut self, packet: Packet) {
        if self.failure.is_some() {
            return;
        }
        let Packet { from, to, cargo, .. } = packet;
        match cargo {
            Cargo::Request(stream) => self.accept(stream),
            Cargo::Nobody => {
                if let Some(index) = self.find(to) {
                    self.nobody_there(index);
                }
            }
            Cargo::Lane(message) => {
                let is_offer = to.side == Side::Gateway && to.number == 0;
                let known = if is_offer {
                    let known = |lane: &Lane| lane.own.side == Side::Gateway && lane.peer == from;
                    self.lanes.iter().position(known).or_else(|| self.begin(from, &message))
                } else {
                    self.find(to)
                };
                match known {
                    Some(index) if self.is_another(index, from) => self.end(index),
                    Some(index) => self.receive(index, &message),
                    None => self.disown(to, from, &message),
                }
            }
        }
    }

    /// A worker hears of an end that is not the one that it knows: that one is over.
    fn is_another(&mut self, index: usize, from: Address) -> bool {
        let lane = &mut self.lanes[index];
        let is_end = lane.own.side == Side::Worker && from.number > 0;
        is_end && *lane.heard.get_or_insert(from) != from
    }

    fn begin(&mut self, peer: Address, message: &Bytes) -> Option<usize> {
        let header = Header::read(message).ok()?;
        let is_first = header.has(frame::NEW) && header.sequence == 1 && message.len() > frame::HEADER;
        is_first.then(|| self.make(Side::Gateway, peer))
    }

    fn disown(&mut self, own: Address, peer: Address, message: &Bytes) {
        let Ok(header) = Header::read(message) else { return };
        if header.has(frame::RESET) {
            return;
        }
        let is_new = header.has(frame::NEW);
        let worker = if own.side == Side::Worker { own } else { peer };
        if !is_new && !self.over.contains(&(own.side, own.generation, worker)) {
            return self.fail("only what is over is disowned", format!("{own} does not know {peer}"));
        }
        let flags = if is_new { frame::GAP | frame::PONG } else { frame::RESET };
        self.note(|| format!("{own} disowns {peer}: {}", names(flags)));
        let answer = Header { flags, sequence: 0, ack: 0 }.bytes().to_vec().into();
        let process = self.process(own.side);
        if let Some(link) = process.link {
            process.disowned += 1;
            let luck = mix(self.process(own.side).disowned ^ self.setup.luck.rotate_left(7));
            self.post(Packet { from: own, to: peer, cargo: Cargo::Lane(answer), luck }, link);
        }
    }

    // Lanes -----------------------------------------------------------------------------------------------------------

    fn make(&mut self, side: Side, peer: Address) -> usize {
        let (now, lag) = (self.instant(), self.setup.lag);
        let patience = Patience {
            heartbeat: Duration::from_millis(self.setup.heartbeat_ms),
            grace: Duration::from_millis(self.setup.grace_ms),
            reconnect: Duration::from_millis(self.setup.reconnect_ms),
        };
        let process = self.process(side);
        process.lanes += 1;
        let own = Address { side, generation: process.generation, number: process.lanes };
        self.seen.lanes += 1;
        let mut state = State::new(side == Side::Worker, self.setup.limit, patience, now);
        state.set_max_payload(self.setup.max_payload);
        self.lanes.push(Lane {
            own,
            peer,
            state,
            driver: Driver::New(self.now + lag),
            heard: None,
            seen: None,
            opened: 0,
            published: 0,
            sent: Vec::new(),
            sent_last: 0,
            may_repeat: false,
            must_repeat: false,
            gap_heard: None,
            gap_told: None,
            gaps_told: 0,
            acked: 0,
            came: BTreeSet::new(),
            came_all: 0,
            heard_at: self.now,
            suspensions: self.processes[side as usize].suspensions,
            linked_at: self.now,
            is_relinked: false,
            suspect_since: None,
            is_held: false,
            busy_since: None,
        });
        self.note(|| format!("{own} begins, with {peer}"));
        self.lanes.len() - 1
    }

    /// The worker accepts a request: as `Lanes::open`.
    fn accept(&mut self, stream: usize) {
        let peer = Address { side: Side::Gateway, generation: self.streams[stream].generation, number: 0 };
        let open = |lane: &Lane| lane.own.side == Side::Worker && lane.peer == peer && !lane.state.is_over();
        let index = self.lanes.iter().position(open).unwrap_or_else(|| self.make(Side::Worker, peer));
        let (now, sender) = (self.instant(), self.senders.len());
        let Stream { key, spec, .. } = self.streams[stream];
        let lane = &mut self.lanes[index];
        lane.opened += 1;
        let (own, number) = (lane.own, lane.opened);
        let Some(credit) = lane.state.open(key, spec.window, sender, now) else {
            return self.fail("an open lane opens streams", format!("{own} does not"));
        };
        self.note(|| format!("{own} accepts stream {stream} as {number}, sender {sender}"));
        self.senders.push(Sender {
            stream,
            lane: own,
            number,
            credit,
            pending: 0,
            sent: 0,
            wants_room: false,
            finish: None,
            finished: None,
            is_known: false,
            is_done: false,
            is_closed: false,
            is_lost: false,
        });
        self.changed(index);
    }

    /// After each call of a lane's state.
    fn changed(&mut self, index: usize) {
        let lane = &mut self.lanes[index];
        let must_wake = lane.state.must_wake();
        if matches!(lane.driver, Driver::Asleep(_)) {
            if must_wake {
                lane.driver = Driver::Ready(self.now);
            } else if lane.must_repeat && !lane.is_held && lane.seen.is_some() && !lane.state.is_over() {
                let text = format!("{} sleeps", lane.own);
                self.fail("what is missing is sent at once", text);
            }
        }
        self.note_over(index);
    }

    fn note_over(&mut self, index: usize) {
        let lane = &self.lanes[index];
        if lane.state.is_over() {
            let worker = if lane.own.side == Side::Worker { lane.own } else { lane.peer };
            self.over.insert((lane.own.side, lane.own.generation, worker));
        }
    }

    /// What the lane's task does when it runs: as `Lane::drive`.
    fn drive(&mut self, index: usize) {
        let now = self.instant();
        let lane = &mut self.lanes[index];
        if matches!(lane.driver, Driver::New(_)) {
            lane.seen = self.processes[lane.own.side as usize].link;
            if lane.seen.is_some() {
                lane.state.begin();
            }
        }
        let mut tells = Vec::new();
        let was_over = lane.state.is_over();
        let message = lane.state.poll(now, &mut tells);
        let (deadline, is_over, seen) = (lane.state.deadline(), lane.state.is_over(), lane.seen);
        let own = lane.own;
        if is_over && !was_over {
            self.check_gone(index);
        }
        let lane = &self.lanes[index];
        if message.is_none() && seen.is_some() && lane.must_repeat && !lane.is_held && !is_over {
            self.fail("what is missing is sent at once", format!("{own} does not"));
        }
        let mut random = Random::new(mix(self.setup.luck ^ self.lanes[index].published));
        let late = random.below(self.setup.lag + 1);
        self.lanes[index].driver = match (&message, seen) {
            // It is written.
            (Some(_), Some(link)) if self.process(own.side).link == Some(link) => Driver::Ready(self.now + late),
            (Some(_), Some(_)) => Driver::Stuck,
            (Some(_), None) => Driver::Ready(self.now),
            (None, _) => Driver::Asleep(deadline.map(|at| {
                let at = at.saturating_duration_since(self.base).as_micros() as Time;
                at.max(self.now) + late.min(MILLI)
            })),
        };
        self.note_over(index);
        if !tells.is_empty() || is_over {
            self.told(index, tells, &Bytes::new());
        }
        match (message, seen) {
            (Some(message), Some(link)) => self.publish(own, message, link),
            (None, _) if is_over => {
                self.note(|| format!("{own} is over"));
                self.lanes.retain(|lane| lane.own != own);
            }
            _ => {}
        }
    }

    fn publish(&mut self, own: Address, message: Bytes, link: Link) {
        let Some(index) = self.find(own) else { return };
        self.check_message(index, &message);
        let lane = &mut self.lanes[index];
        lane.published += 1;
        let (peer, count) = (lane.peer, lane.published);
        // A gateway answers to the inbox of its worker, and its own one stands behind.
        let luck = mix(self.setup.luck ^ mix(count ^ u64::from(own.number) << 32 ^ (own.side as u64) << 62));
        self.note(|| format!("{own} -> {peer}: {}", described(&message)));
        self.seen.messages += 1;
        if self.process(own.side).link == Some(link) {
            self.post(Packet { from: own, to: peer, cargo: Cargo::Lane(message), luck }, link);
        }
    }

    fn receive(&mut self, index: usize, message: &Bytes) {
        let now = self.instant();
        let (own, peer) = (self.lanes[index].own, self.lanes[index].peer);
        self.note(|| format!("{own} <- {peer}: {}", described(message)));
        let was_over = self.lanes[index].state.is_over();
        if !was_over {
            self.hear(index, message);
        }
        let Self { lanes, streams, senders, processes, .. } = self;
        let asked = &mut processes[own.side as usize].asked;
        let mut nobody = None;
        let mut tells = Vec::new();
        let received = lanes[index].state.receive(message, now, &mut tells, |key, number| {
            let Some(sender) = senders.iter().position(|sender| sender.lane == peer && sender.number == number) else {
                nobody = Some(number);
                return None;
            };
            senders[sender].is_known = true;
            let stream = asked.remove(&key)?;
            let window = streams[stream].spec.window;
            streams[stream].on = Some((own, number, sender));
            Some((stream, window))
        });
        if let Some(number) = nobody {
            self.fail("what is accepted was opened", format!("{peer} accepts a stream {number}"));
        }
        // An honest worker answers to an earlier end at most, one that is over.
        if received.is_err() {
            self.has_restarted = true;
            if !self.over.contains(&(Side::Gateway, own.generation, peer)) {
                self.fail("messages are well-formed", format!("{own} refuses {}", described(message)));
            }
        }
        self.changed(index);
        self.told(index, tells, message);
        self.check_memory(index);
    }

    fn end(&mut self, index: usize) {
        self.has_restarted = true;
        let mut tells = Vec::new();
        self.lanes[index].state.end(&mut tells);
        self.changed(index);
        self.told(index, tells, &Bytes::new());
    }

    fn nobody_there(&mut self, index: usize) {
        let now = self.instant();
        let lane = &mut self.lanes[index];
        let (own, was_over) = (lane.own, lane.state.is_over());
        self.seen.nobody_there += 1;
        if lane.seen.is_some() && !was_over && lane.suspect_since.is_none() {
            lane.suspect_since = Some(self.now);
            lane.is_held = true;
        }
        let mut tells = Vec::new();
        lane.state.nobody_there(now, &mut tells);
        let is_over = lane.state.is_over();
        self.note(|| format!("{own}: nobody there"));
        if is_over && !was_over {
            self.check_gone(index);
        }
        self.changed(index);
        self.told(index, tells, &Bytes::new());
    }

    // Owners ----------------------------------------------------------------------------------------------------------

    /// A lane tells its owners: what it says is checked now, and they react soon.
    fn told(&mut self, index: usize, tells: Vec<Tell<usize>>, message: &Bytes) {
        let own = self.lanes[index].own;
        let mut reactions = Vec::new();
        for tell in tells {
            self.note(|| format!("{own} tells {}", told_what(&tell)));
            let (number, is_last) = match &tell {
                Tell::Data(number, _) | Tell::Room(number) => (*number, false),
                Tell::End(number) | Tell::Error(number, _) | Tell::Overrun(number) => (*number, true),
                Tell::Cancelled(number, _) | Tell::Gone(number, _) => (*number, true),
            };
            let is_done = match own.side {
                Side::Worker => &mut self.senders[number].is_done,
                Side::Gateway => &mut self.streams[number].is_done,
            };
            let was_done = *is_done;
            *is_done |= is_last;
            if was_done {
                self.fail("nothing follows the end", format!("{own} tells {}", told_what(&tell)));
            }
            match tell {
                Tell::Data(stream, run) => {
                    let mut bytes = 0;
                    let mut count = 0;
                    for body in run.bodies(message) {
                        self.check_data(stream, body);
                        bytes += body.len() as u64;
                        count += 1;
                    }
                    if (count, bytes) != (run.count, run.bytes) {
                        self.fail("runs are counted", format!("{run:?} of {count} messages, {bytes} bytes"));
                    }
                    reactions.push(Reaction::Read(stream));
                }
                Tell::End(stream) => {
                    self.check_end(stream, false);
                    reactions.push(Reaction::StreamOver(stream));
                }
                Tell::Error(stream, text) => {
                    if text != ERROR_TEXT {
                        self.fail("errors have their text", format!("{text:?}"));
                    }
                    self.check_end(stream, true);
                    reactions.push(Reaction::StreamOver(stream));
                }
                Tell::Overrun(stream) => self.fail("honest workers do not overrun", format!("stream {stream}")),
                Tell::Cancelled(sender, why) => {
                    self.seen.cancelled += 1;
                    self.check_cancelled(sender, why);
                    reactions.push(Reaction::SenderOver(sender));
                }
                Tell::Room(sender) => reactions.push(Reaction::Room(sender)),
                Tell::Gone(number, knew) => {
                    self.seen.gone += 1;
                    if own.side == Side::Worker {
                        if knew && !self.senders[number].is_known {
                            self.fail("who knew of a stream is known", format!("sender {number}"));
                        }
                        reactions.push(Reaction::SenderOver(number));
                    } else {
                        reactions.push(Reaction::StreamOver(number));
                    }
                }
            }
        }
        if own.side == Side::Worker && self.setup.waits {
            reactions.push(Reaction::Retry(own));
        }
        for reaction in reactions {
            if self.setup.lag == 0 {
                self.react(reaction);
            } else {
                self.at(self.now + self.setup.lag / 2, Event::React(own.side, own.generation, reaction));
            }
        }
    }

    fn react(&mut self, reaction: Reaction) {
        match reaction {
            Reaction::Read(stream) => self.read(stream, false),
            Reaction::Room(sender) => {
                self.senders[sender].wants_room = false;
                self.send(sender);
            }
            Reaction::SenderOver(sender) => self.senders[sender].is_closed = true,
            Reaction::StreamOver(stream) => self.streams[stream].is_closed = true,
            Reaction::Retry(lane) => {
                for sender in 0..self.senders.len() {
                    if self.senders[sender].lane == lane {
                        self.senders[sender].wants_room = false;
                        self.send(sender);
                    }
                }
            }
        }
    }

    /// A sender's owner sends what is pending, as far as there is room, and ends the stream if it wants to.
    fn send(&mut self, number: usize) {
        if !self.is_awake(Side::Worker) || self.failure.is_some() {
            return;
        }
        while self.senders[number].pending > 0 && !self.senders[number].is_closed && !self.senders[number].wants_room {
            self.send_some(number);
        }
        let sender = &mut self.senders[number];
        if let Some(error) = sender.finish
            && sender.pending == 0
            && !sender.is_closed
        {
            sender.is_closed = true;
            if !sender.is_done {
                sender.is_done = true;
                sender.finished = Some(error);
            }
            if let Some(index) = self.find(self.senders[number].lane) {
                let credit = Arc::clone(&self.senders[number].credit);
                self.lanes[index].state.finish(&credit, error.then_some(ERROR_TEXT));
                self.changed(index);
                self.check_memory(index);
            }
        }
    }

    fn send_some(&mut self, number: usize) {
        let Some(index) = self.find(self.senders[number].lane) else {
            // It is over, and the owner will hear of it.
            self.senders[number].wants_room = true;
            return;
        };
        let Sender { sent, pending, .. } = self.senders[number];
        let mut data = std::mem::take(&mut self.buffer);
        data.clear();
        let count = if self.setup.many { pending } else { 1 };
        let lengths: Vec<usize> = (sent..sent + count).map(|index| self.message(number, index, &mut data)).collect();
        let credit = Arc::clone(&self.senders[number].credit);
        let state = &mut self.lanes[index].state;
        let (sent, result) = if self.setup.many {
            state.send_many(&credit, &data, &lengths)
        } else {
            let result = state.send(&credit, &data);
            (usize::from(result.is_ok()), result)
        };
        let most = sent.checked_sub(1).map(|last| self.setup.limit.max(lengths[last]) + frame::MAX_FRAME_HEADER);
        let backlog = state.backlog();
        if result == Err(Refusal::Full) && !self.setup.waits {
            state.want_room(&credit);
        }
        self.changed(index);
        self.buffer = data;
        let sender = &mut self.senders[number];
        sender.sent += sent as u32;
        sender.pending -= sent as u32;
        sender.wants_room = result.is_err();
        self.seen.refused += u64::from(result.is_err());
        if result == Err(Refusal::TooLarge) {
            self.fail("messages that fit are taken", format!("{lengths:?}"));
        }
        if let Some(most) = most.filter(|most| backlog > *most) {
            self.fail("a lane's limit holds", format!("{backlog} bytes wait after a send, {most} may"));
        }
    }

    /// A reader takes what it wants of what waits.
    fn read(&mut self, number: usize, one: bool) {
        if !self.is_awake(Side::Gateway) {
            return;
        }
        let now = self.now;
        let stream = &mut self.streams[number];
        let count = match stream.reader {
            Reader::Eager => stream.unread.len(),
            Reader::Every(_) if one => stream.unread.len().min(1),
            _ => 0,
        };
        if let (Reader::Every(pause), false) = (stream.reader, stream.will_read || stream.unread.len() == count) {
            stream.will_read = true;
            self.at(now + pause * MILLI, Event::TakeOne(number));
        }
        if count == 0 {
            return;
        }
        let stream = &mut self.streams[number];
        let weight = stream.unread.drain(..count).sum::<u64>();
        let part = if stream.spec.in_parts { weight / 3 } else { 0 };
        let Some((lane, stream_number, _)) = stream.on else { return };
        for weight in [part, weight - part] {
            if let Some(told) = self.streams[number].grant.take(weight)
                && !self.streams[number].is_closed
                && let Some(index) = self.find(lane)
            {
                self.lanes[index].state.grant(stream_number, told);
                self.changed(index);
                self.check_memory(index);
            }
        }
    }

    /// Appends the content of a sender's message, and returns its length.
    fn message(&self, sender: usize, index: u32, data: &mut Vec<u8>) -> usize {
        let spec = &self.streams[self.senders[sender].stream].spec;
        let content = mix((sender as u64) << 32 ^ u64::from(index));
        let most = spec.size.min(self.setup.max_payload - frame::HEADER - frame::MAX_FRAME_HEADER);
        let size = if spec.is_varied { content as usize % (most + 1) } else { most };
        data.extend(content.to_le_bytes().into_iter().cycle().take(size));
        size
    }

    // What must always hold -------------------------------------------------------------------------------------------

    /// Before a message is sent.
    fn check_message(&mut self, index: usize, message: &Bytes) {
        let Ok(header) = Header::read(message) else {
            return self.fail("messages are well-formed", described(message));
        };
        let lane = &mut self.lanes[index];
        let (own, is_over) = (lane.own, lane.state.is_over());
        let has_frames = message.len() > frame::HEADER;
        if header.has(frame::GAP) && !header.has(frame::PING) {
            // Once; and once more if what was missing came while it was about to be told.
            lane.gaps_told = if lane.gap_told == Some(header.ack) { lane.gaps_told + 1 } else { 1 };
            lane.gap_told = Some(header.ack);
            if lane.gaps_told > 2 {
                return self.fail("a gap is told once", format!("{own}: {}", described(message)));
            }
        }
        if message.len() > self.setup.max_payload {
            return self.fail("messages are not too large", format!("{own}: {} bytes", message.len()));
        }
        if header.has(frame::RESET) != is_over {
            return self.fail("a RESET is the last word", format!("{own} sends {}", described(message)));
        }
        if header.ack > lane.came_all {
            let text = format!("{own} acknowledges {}, it has all up to {}", header.ack, lane.came_all);
            return self.fail("what is acknowledged has come", text);
        }
        if !has_frames {
            return;
        }
        if lane.is_held {
            return self.fail("nothing but PINGs until there is an answer", format!("{own}: {}", described(message)));
        }
        // One after the other, or again from the first that is not acknowledged.
        let missing = lane.acked + 1;
        let repeats = header.sequence == missing && lane.sent_last >= missing;
        let is_next = header.sequence == missing.max(lane.sent_last + 1);
        if !(header.sequence == missing || is_next && !lane.must_repeat) {
            let text = format!("{own} sends #{} after #{}, missing is #{missing}", header.sequence, lane.sent_last);
            return self.fail("what is missing is sent in order", text);
        }
        if repeats && !lane.may_repeat {
            return self.fail("nothing is sent again without reason", format!("{own}: {}", described(message)));
        }
        lane.sent_last = header.sequence;
        lane.may_repeat &= !repeats;
        lane.must_repeat = false;
        let frames = &message[frame::HEADER..];
        let frames = (frames.iter().fold(7, |sum, byte| mix(sum ^ u64::from(*byte))), frames.len());
        let next = lane.sent.len() as u64 + 1;
        if header.sequence == next {
            lane.sent.push(frames);
            let most = lane.sent[lane.acked as usize..].iter().map(|(_, size)| size).sum::<usize>();
            self.check_backlog(index, most);
        } else if header.sequence > next || lane.sent[header.sequence as usize - 1] != frames {
            self.fail("what is sent again is the same", format!("{own}: {}", described(message)));
        } else {
            self.seen.sent_again += 1;
        }
    }

    /// Before a message is received: who has heard what.
    fn hear(&mut self, index: usize, message: &Bytes) {
        let Ok(header) = Header::read(message) else { return };
        let lane = &mut self.lanes[index];
        if !header.has(frame::RESET) {
            (lane.heard_at, lane.is_relinked, lane.suspect_since) = (self.now, false, None);
            lane.suspensions = self.processes[lane.own.side as usize].suspensions;
            lane.is_held &= !header.has(frame::PONG);
            lane.acked = lane.acked.max(header.ack);
            let is_missing = lane.sent.len() as u64 > lane.acked;
            let asks = header.has(frame::GAP) && (header.has(frame::PING) || lane.gap_heard != Some(header.ack));
            if asks {
                lane.gap_heard = is_missing.then_some(header.ack);
            }
            let is_gap = asks && is_missing;
            lane.may_repeat |= is_gap || header.has(frame::PONG);
            lane.must_repeat = is_missing && (is_gap || lane.must_repeat);
        }
        if message.len() > frame::HEADER {
            lane.came.insert(header.sequence);
            while lane.came.remove(&(lane.came_all + 1)) {
                lane.came_all += 1;
            }
        }
    }

    fn check_data(&mut self, number: usize, body: &[u8]) {
        let stream = &self.streams[number];
        let Some((_, _, sender)) = stream.on else {
            return self.fail("data comes after ACCEPT", format!("stream {number}"));
        };
        let mut expected = std::mem::take(&mut self.buffer);
        expected.clear();
        self.message(sender, stream.got, &mut expected);
        if self.streams[number].got >= self.senders[sender].sent || body != expected {
            let text = format!("stream {number}, message {}: {} bytes", self.streams[number].got, body.len());
            self.fail("what comes is what was sent", text);
        }
        self.buffer = expected;
        let stream = &mut self.streams[number];
        let (weight, window) = (body.len() as u64 + OVERHEAD, u64::from(stream.spec.window));
        let unread = stream.unread.iter().sum::<u64>();
        stream.got += 1;
        stream.unread.push_back(weight);
        if unread > window / 2 && unread + weight > window {
            self.fail("a window holds", format!("stream {number}: {unread} + {weight} unread, window {window}"));
        }
    }

    fn check_end(&mut self, number: usize, error: bool) {
        let stream = &self.streams[number];
        let Some((_, _, sender)) = stream.on else {
            return self.fail("the end comes after ACCEPT", format!("stream {number}"));
        };
        let sender = &self.senders[sender];
        if sender.finished != Some(error) || stream.got != sender.sent {
            let text = format!("stream {number} got {} of {}, {:?}", stream.got, sender.sent, sender.finished);
            return self.fail("what has ended is complete", text);
        }
        self.seen.complete += 1;
    }

    fn check_cancelled(&mut self, number: usize, why: u8) {
        let sender = &self.senders[number];
        let stream = &self.streams[sender.stream];
        let is_its = stream.on.is_some_and(|(_, _, accepted)| accepted == number);
        let is_right = match stream.cancelled {
            Some(reason) if is_its && why == reason => true,
            // It was never wanted, or is accepted again by a lane that knows nothing of it.
            _ => why == 0 && (!is_its || stream.is_done),
        };
        if !is_right {
            self.fail("only what was cancelled is", format!("sender {number}, reason {why}"));
        }
    }

    fn check_memory(&mut self, index: usize) {
        let backlog = self.lanes[index].state.backlog();
        self.check_backlog(index, backlog);
    }

    /// What waits is limited, but for control frames, and these are limited by the streams.
    fn check_backlog(&mut self, index: usize, backlog: usize) {
        const CONTROL: usize = frame::MAX_FRAME_HEADER + 8;
        let lane = &self.lanes[index];
        let (data, streams) = match lane.own.side {
            Side::Worker => (self.setup.limit.max(self.setup.max_payload), lane.opened as usize),
            Side::Gateway => (0, self.senders.iter().filter(|sender| sender.lane == lane.peer).count()),
        };
        let most = data + CONTROL + streams * (4 * CONTROL + ERROR_TEXT.len());
        if backlog > most {
            let text = format!("{}: {backlog} bytes wait, {most} may", lane.own);
            self.fail("memory is limited", text);
        }
    }

    /// A lane has just given up its other end: had it reason to?
    fn check_gone(&mut self, index: usize) {
        self.seen.lanes_gone += 1;
        let now = self.now;
        let lane = &self.lanes[index];
        let (own, peer) = (lane.own, lane.peer);
        let process = &self.processes[own.side as usize];
        let until = if lane.is_relinked { lane.linked_at + self.reconnect() } else { 0 };
        let suspect = lane.suspect_since.map(|since| (since + self.grace()).max(until));
        let silent = (lane.heard_at.max(lane.linked_at) + 3 * self.heartbeat()).max(until);
        let is_due = suspect.is_some_and(|at| at <= now) || silent <= now;
        if !is_due {
            let text = format!("{own} was patient until {now}, should be until {suspect:?} or {silent}");
            return self.fail("patience has its time", text);
        }
        // What came while the process stood still says that the other end was there. Once in a silence it must be read.
        let waits = process.socket.iter().any(|packet| {
            let Cargo::Lane(message) = &packet.cargo else { return false };
            let is_to_it = packet.to == own || (own.side == Side::Gateway && packet.from == peer);
            is_to_it && Header::read(message).is_ok_and(|header| !header.has(frame::RESET))
        });
        let since = process.suspended_at;
        let due = suspect.map_or(since + self.heartbeat(), |at| at.max(since + LATE));
        let is_first = process.suspensions == lane.suspensions + 1;
        if process.resumed_at == now && waits && is_first && now > due + LATE && lane.busy_since.is_some() {
            let text = format!("{own} stood still since {since}, and has not read what came");
            return self.fail("who stood still reads before it judges", text);
        }
        let them = &self.processes[peer.side as usize];
        let is_there = |lane: &Lane| !lane.state.is_over() && (lane.own == peer || lane.peer == own);
        let is_alive = them.generation == peer.generation
            && self.lanes.iter().any(is_there)
            && self.processes.iter().all(|process| process.link.is_some() && process.suspended_until.is_none())
            && self.weather.drop == 0
            // An answer takes less time than the beats that wait for it.
            && 2 * self.heartbeat() > 4 * self.max_delay + 4 * self.setup.lag + 10 * MILLI;
        let worker = if own.side == Side::Worker { own } else { peer };
        let is_known = !self.over.contains(&(peer.side, peer.generation, worker));
        let mut slack = 8 * self.max_delay + 4 * self.setup.lag + LATE + 10 * MILLI;
        if self.has_lost {
            slack += 13 * self.heartbeat() + ASK_AFTER;
        }
        if is_alive && is_known && now > self.disturbed_at + slack {
            let text = format!("{own} gives up {peer}; nothing has happened since {}", self.disturbed_at);
            self.fail("who is there is not gone", text);
        }
    }

    /// Between steps: who is not there must be found out in time.
    fn check_patience(&mut self) {
        let slack = LATE + 4 * self.setup.lag + 10 * MILLI;
        for index in 0..self.lanes.len() {
            let lane = &self.lanes[index];
            let own = lane.own;
            let process = &self.processes[own.side as usize];
            let is_busy = match own.side {
                Side::Worker => self.senders.iter().any(|sender| sender.lane == own && !sender.is_done),
                Side::Gateway => {
                    self.streams.iter().any(|stream| stream.on.is_some_and(|(lane, ..)| lane == own) && !stream.is_done)
                }
            };
            let since = lane.busy_since.filter(|_| is_busy).or(is_busy.then_some(self.now));
            let is_running = lane.seen.is_some()
                && lane.seen == process.link
                && process.suspended_until.is_none()
                && !lane.state.is_over()
                && self.now >= process.resumed_at + slack;
            let until = if lane.is_relinked { lane.linked_at + self.reconnect() } else { 0 };
            let silent = since.map(|since| {
                let since = since.max(lane.heard_at).max(lane.linked_at).max(process.resumed_at);
                since.max(until).max(since + 3 * self.heartbeat()) + self.heartbeat()
            });
            let suspect = lane.suspect_since.map(|since| (since + self.grace()).max(until).max(process.resumed_at));
            let is_late = [silent, suspect].into_iter().flatten().any(|at| self.now > at + slack);
            self.lanes[index].busy_since = since;
            if is_running && is_late {
                let text = format!("{own} should have given up by {silent:?} or {suspect:?}");
                self.fail("the dead are found in time", text);
            }
        }
    }

    // The end ---------------------------------------------------------------------------------------------------------

    /// All is well again: all streams end, all lanes drain, and then it is quiet.
    fn heal(&mut self) {
        self.note(|| "-- all is well again".into());
        let resumes = self.processes.iter().filter_map(|process| process.suspended_until).max();
        if let Some(until) = resumes {
            self.run_until(until, |_| false);
        }
        Side::BOTH.into_iter().for_each(|side| self.link(side));
        self.weather = Weather::CALM;
        self.disturbed_at = self.now;
        for number in 0..self.senders.len() {
            self.senders[number].finish.get_or_insert(false);
            self.send(number);
        }
        let blocked = self.setup.blocked;
        let is_blocked = move |stream: &Stream| blocked && stream.reader == Reader::Stopped;
        for number in 0..self.streams.len() {
            if !is_blocked(&self.streams[number]) {
                self.streams[number].reader = Reader::Eager;
                self.read(number, false);
            }
        }
        // Requests that are still on their way come to senders that end at once.
        let patience = self.patience();
        self.finish_late_ones();
        let until = self.now + patience;
        self.run_until(until, |world| world.is_settled(is_blocked));
        self.check_settled(is_blocked, "streams end, whoever else is slow");
        for number in 0..self.streams.len() {
            self.streams[number].reader = Reader::Eager;
            self.read(number, false);
        }
        let until = self.now + patience;
        self.run_until(until, |world| world.is_settled(|_| false));
        self.check_settled(|_| false, "all streams end");
        // Those that nobody accepts.
        (0..self.streams.len()).for_each(|stream| self.cancel(stream));
        Side::BOTH.into_iter().for_each(|side| self.ask(side));
        let until = self.now + patience;
        self.run_until(until, |world| world.lanes.iter().all(|lane| lane.state.is_drained()));
        let full = self.lanes.iter().find(|lane| !lane.state.is_drained() || lane.state.backlog() > 0);
        if let Some(lane) = full
            && self.failure.is_none()
        {
            let text = format!("{}: {} bytes wait", lane.own, lane.state.backlog());
            return self.fail("lanes drain", text);
        }
        self.pass(patience);
        let (published, lanes) = (self.seen.messages, self.lanes.len() as u64);
        self.pass(24 * self.heartbeat());
        let published = self.seen.messages - published;
        if published > 8 * lanes && self.failure.is_none() {
            self.fail("idle lanes are quiet", format!("{published} messages on {lanes} ends"));
        }
    }

    /// How long it may take until all is as it should be.
    fn patience(&self) -> Time {
        let pending = self.senders.iter().map(|sender| u64::from(sender.pending) + 2).sum::<u64>();
        let judges = self.has_restarted || self.seen.lanes_gone > 0;
        let judgement = if judges { self.heartbeat() + self.grace().max(self.reconnect()) } else { 0 };
        3 * SECOND + judgement + 60 * MILLI * pending + 4 * self.max_delay
    }

    fn finish_late_ones(&mut self) {
        self.pass(2 * self.max_delay + 2 * self.setup.lag);
        for number in 0..self.senders.len() {
            self.senders[number].finish.get_or_insert(false);
            self.send(number);
        }
    }

    fn is_settled(&self, is_blocked: impl Fn(&Stream) -> bool) -> bool {
        let is_over = |stream: &Stream| stream.is_closed || stream.on.is_none() || is_blocked(stream);
        self.senders.iter().all(|sender| sender.is_closed || is_blocked(&self.streams[sender.stream]))
            && self.streams.iter().all(is_over)
    }

    fn check_settled(&mut self, is_blocked: impl Fn(&Stream) -> bool, promise: &'static str) {
        if self.is_settled(&is_blocked) || self.failure.is_some() {
            return;
        }
        let senders = self.senders.iter().enumerate();
        let senders = senders.filter(|(_, sender)| !sender.is_closed && !is_blocked(&self.streams[sender.stream]));
        let senders: Vec<_> = senders
            .map(|(number, sender)| {
                format!("sender {number} (of stream {}, {} pending)", sender.stream, sender.pending)
            })
            .collect();
        let streams = self.streams.iter().enumerate();
        let streams = streams.filter(|(_, stream)| !stream.is_closed && stream.on.is_some() && !is_blocked(stream));
        let streams: Vec<_> = streams.map(|(number, stream)| format!("stream {number} (got {})", stream.got)).collect();
        self.fail(promise, format!("these run: {}", [senders, streams].concat().join(", ")));
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

/// A message, for people.
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
            _ => "other",
        };
        format!("{kind} {} ({})", frame.stream, frame.body.len())
    });
    let frames = frames.collect::<Vec<_>>().join(", ");
    format!("#{} ack {} {} [{frames}]", header.sequence, header.ack, names(header.flags))
}

fn told_what(tell: &Tell<usize>) -> String {
    format!("{tell:?}")
}
