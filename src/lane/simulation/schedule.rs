//! A schedule: the settings and steps of a simulation, made from a seed.

use crate::lane::event::Role;
use std::fmt;

/// Pseudo-random numbers (splitmix64).
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Random {
        Random(seed)
    }

    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.0)
    }

    /// A number below `limit`.
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    pub(super) fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub(super) fn pick<T: Copy>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize]
    }
}

/// A hash of a number.
pub(super) fn mix(number: u64) -> u64 {
    let number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
}

/// Which process.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) enum Side {
    Worker,
    Gateway,
}

impl Side {
    pub(super) const BOTH: [Side; 2] = [Side::Worker, Side::Gateway];

    pub(super) fn role(self) -> Role {
        match self {
            Side::Worker => Role::Worker,
            Side::Gateway => Role::Gateway,
        }
    }
}

/// How the network treats messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Weather {
    /// How many percent of the messages are lost.
    pub(super) drop: u64,
    /// How many percent arrive twice.
    pub(super) double: u64,
    /// Whether messages may overtake each other.
    pub(super) reorder: bool,
    /// The longest delay to the server, and from there, in microseconds.
    pub(super) delay: u64,
    /// Bytes per second in each of the four directions; 0: unlimited.
    pub(super) rate: u64,
}

impl Weather {
    pub(super) const CALM: Weather = Weather { drop: 0, double: 0, reorder: false, delay: 1000, rate: 0 };
}

/// How a stream is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Reader {
    /// Each message at once.
    Eager,
    /// One message each so many milliseconds.
    Every(u64),
    /// Nothing, for now.
    Stopped,
}

/// A stream as it is requested.
#[derive(Clone, Copy, Debug)]
pub(super) struct Spec {
    pub(super) window: u32,
    /// The gateway enlarges the window for a fast reader.
    pub(super) window_grows: bool,
    /// The size of its messages, or their largest size.
    pub(super) size: usize,
    pub(super) is_varied: bool,
    pub(super) reader: Reader,
    /// Credit is returned in two parts.
    pub(super) in_parts: bool,
    /// Two workers receive the request.
    pub(super) twice: bool,
}

/// The settings of a simulation.
#[derive(Clone, Copy, Debug)]
pub(super) struct Setup {
    /// The seed for the fate of each message.
    pub(super) luck: u64,
    pub(super) heartbeat_ms: u64,
    pub(super) grace_ms: u64,
    pub(super) remote_grace_ms: u64,
    /// Both processes are on the same server; otherwise a route connects their servers.
    pub(super) is_one_server: bool,
    pub(super) reconnect_ms: u64,
    /// How many bytes of a lane may be unacknowledged.
    pub(super) limit: usize,
    pub(super) max_payload: usize,
    /// How late tasks and threads may run after they were woken, in microseconds.
    pub(super) lag: u64,
    /// Blocked senders wait in `send_wait`, and not for `Writable`.
    pub(super) waits: bool,
    /// Senders send many messages at once.
    pub(super) many: bool,
    /// Readers that are stopped stay so until all other streams have ended.
    pub(super) blocked: bool,
}

impl Setup {
    /// The server of a process, as the header has it.
    pub(super) fn server(&self, side: Side) -> u32 {
        if self.is_one_server || side == Side::Worker { 1 } else { 2 }
    }
}

/// One step. A stream's number is taken modulo the number of streams.
#[derive(Clone, Copy, Debug)]
pub(super) enum Step {
    /// So many microseconds pass.
    Wait(u64),
    Weather(Weather),
    Request(Spec),
    /// The worker gets so many more messages to send.
    Send {
        stream: usize,
        count: u32,
    },
    /// The worker ends the stream; `now`: without the messages that are blocked.
    Finish {
        stream: usize,
        error: bool,
        now: bool,
    },
    Read {
        stream: usize,
        reader: Reader,
    },
    Cancel {
        stream: usize,
    },
    /// The connection to nats-server is lost.
    Cut(Side),
    Link(Side),
    /// It is lost and made again before any driver notices.
    Blink(Side),
    /// nats-server restarts.
    CutBoth,
    LinkBoth,
    /// The route between the servers is made (`true`) or breaks.
    Route(bool),
    /// The process, or its machine, stands still for so many milliseconds.
    Suspend(Side, u64),
    /// The process is killed, and started again.
    Restart(Side),
    /// The process closes one of its lanes.
    End(Side),
    /// The process requests acknowledgement of everything, as before a close.
    RequestAck(Side),
}

/// A whole simulation.
#[derive(Clone, Debug)]
pub(super) struct Schedule {
    pub(super) setup: Setup,
    pub(super) steps: Vec<Step>,
}

impl Schedule {
    pub(super) fn of(seed: u64) -> Schedule {
        let mut random = Random::new(mix(seed));
        let setup = Setup {
            luck: random.next(),
            heartbeat_ms: random.pick(&[100, 500, 5000, 5000]),
            grace_ms: random.pick(&[0, 50, 300, 1000, 1000]),
            remote_grace_ms: random.pick(&[0, 300, 3000, 3000]),
            is_one_server: random.chance(60),
            reconnect_ms: random.pick(&[200, 1200, 3000, 9000]),
            limit: random.pick(&[1, 100, 1000, 10_000, 4 << 20, 4 << 20]),
            max_payload: random.pick(&[300, 4096, 1 << 20, 1 << 20, 1 << 20]),
            lag: random.pick(&[0, 100, 2000]),
            waits: random.chance(30),
            many: random.chance(30),
            blocked: random.chance(30),
        };
        // Only some kinds of faults each time: a combination of two shows best without a third.
        let faults: Vec<u64> = (0..FAULTS).filter(|_| random.chance(30)).collect();
        let count = random.pick(&[6, 12, 24, 48]) + random.below(8);
        let mut steps = vec![Step::Request(spec(&mut random))];
        for _ in 0..count {
            let fault = if faults.is_empty() || random.chance(60) { FAULTS } else { random.pick(&faults) };
            steps.push(step(&mut random, &setup, fault));
            if random.chance(50) {
                steps.push(Step::Wait(wait(&mut random, &setup)));
            }
        }
        Schedule { setup, steps }
    }
}

/// How many kinds of faults there are.
const FAULTS: u64 = 10;

fn step(random: &mut Random, setup: &Setup, fault: u64) -> Step {
    let stream = random.below(16) as usize;
    let side = random.pick(&Side::BOTH);
    match fault {
        0 => Step::Weather(weather(random)),
        1 => random.pick(&[Step::Cut(side), Step::Link(side), Step::Link(side)]),
        2 => Step::Blink(side),
        3 => random.pick(&[Step::CutBoth, Step::LinkBoth, Step::LinkBoth]),
        4 => Step::Suspend(side, random.pick(&[1, 20, 200, 400, 1000, 4 * setup.heartbeat_ms])),
        5 => Step::Restart(side),
        6 => Step::End(side),
        7 => Step::Cancel { stream },
        8 => Step::Read { stream, reader: reader(random) },
        9 => random.pick(&[Step::Route(false), Step::Route(true), Step::Route(true)]),
        _ => match random.below(20) {
            0..=4 => Step::Request(spec(random)),
            5..=14 => Step::Send { stream, count: random.pick(&[1, 1, 2, 5, 20]) },
            15..=17 => Step::Finish { stream, error: random.chance(30), now: random.chance(30) },
            18 => Step::Read { stream, reader: Reader::Eager },
            _ => Step::RequestAck(side),
        },
    }
}

fn wait(random: &mut Random, setup: &Setup) -> u64 {
    let longest = random.pick(&[
        100,
        1000,
        1000,
        30_000,
        30_000,
        200_000,
        700_000,
        setup.grace_ms * 1200,
        setup.heartbeat_ms * 1200,
        setup.heartbeat_ms * 5000,
        setup.reconnect_ms * 1200,
    ]);
    random.below(longest + 1)
}

fn weather(random: &mut Random) -> Weather {
    Weather {
        drop: random.pick(&[0, 0, 0, 5, 30, 60, 100]),
        double: random.pick(&[0, 0, 10, 50]),
        reorder: random.chance(40),
        delay: random.pick(&[100, 1000, 10_000, 100_000, 1_000_000]),
        rate: random.pick(&[0, 0, 0, 0, 20_000, 400_000]),
    }
}

fn reader(random: &mut Random) -> Reader {
    random.pick(&[Reader::Eager, Reader::Every(1), Reader::Every(30), Reader::Stopped])
}

fn spec(random: &mut Random) -> Spec {
    let is_large = random.chance(2);
    Spec {
        window: random.pick(&[1, 64, 130, 200, 1000, 10_000, 4 << 20]),
        window_grows: random.chance(50),
        size: if is_large {
            random.pick(&[20_000, 70_000, 150_000])
        } else {
            random.pick(&[0, 1, 16, 16, 100, 300, 1000])
        },
        is_varied: random.chance(50),
        reader: if random.chance(50) { Reader::Eager } else { reader(random) },
        in_parts: random.chance(30),
        twice: random.chance(5),
    }
}

impl fmt::Display for Schedule {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(to, "{:?}", self.setup)?;
        self.steps.iter().enumerate().try_for_each(|(number, step)| writeln!(to, "{number:4} {step:?}"))
    }
}
