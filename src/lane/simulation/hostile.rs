//! The other end lies: whatever bytes come, nothing panics, little is kept for them, and each stream still ends once.

use super::schedule::Random;
use crate::lane::state::{LaneEvent, PeerTimeouts, State};
use crate::wire::frame::{self, Frames, Header};
use bytes::{Bytes, BytesMut};
use std::collections::HashSet;
use std::time::{Duration, Instant};

const LIVES: u64 = 20_000;
const MESSAGES: u64 = 40;

/// One end, and what it has told.
struct Victim {
    state: State<u64>,
    now: Instant,
    /// The last number that it has sent, and the last that it has taken.
    sent: u64,
    taken: u64,
    /// Those who were begun, and those who have ended.
    begun: u64,
    ended: HashSet<u64>,
}

impl Victim {
    fn new(serves: bool, random: &mut Random) -> Victim {
        let patience = PeerTimeouts {
            heartbeat: Duration::from_millis(100),
            grace: Duration::from_millis(100),
            remote_grace: Duration::from_millis(200),
            reconnect: Duration::from_secs(1),
        };
        let now = Instant::now();
        let mut state = State::new(serves, 10_000, patience, now);
        state.begin(1);
        let mut victim = Victim { state, now, sent: 0, taken: 0, begun: 0, ended: HashSet::new() };
        for _ in 0..random.below(if serves { 4 } else { 1 }) {
            let Some(credit) = victim.state.open(random.next(), 1000, victim.begun, now) else { break };
            victim.begun += 1;
            for _ in 0..random.below(4) {
                let _ = victim.state.send(&credit, &[7; 100]);
            }
        }
        victim.poll();
        victim
    }

    fn note(&mut self, tells: &[LaneEvent<u64>]) {
        for tell in tells {
            let (who, is_last) = match tell {
                LaneEvent::Unheard(who) => {
                    assert!(*who < self.begun);
                    continue;
                }
                LaneEvent::Data(who, _) | LaneEvent::Room(who) => (who, false),
                LaneEvent::End(who) | LaneEvent::Error(who, _) | LaneEvent::Overrun(who) => (who, true),
                LaneEvent::Cancelled(who, _) | LaneEvent::Gone(who, _) => (who, true),
            };
            assert!(*who < self.begun && !self.ended.contains(who), "{tell:?} of one who has ended");
            if is_last {
                self.ended.insert(*who);
            }
        }
    }

    fn receive(&mut self, message: &Bytes) {
        let (before, waited) = (self.state.parties().len() + self.state.unheard(), self.state.backlog());
        let mut tells = Vec::new();
        let begun = &mut self.begun;
        let was_over = self.state.is_over();
        let received = self.state.receive(message, self.now, &mut tells, |key, _| {
            (key % 4 > 0).then(|| {
                *begun += 1;
                (*begun - 1, 1000)
            })
        });
        self.note(&tells);
        let is_next = Header::read(message).is_ok_and(|header| header.sequence == self.taken + 1);
        if is_next && message.len() > frame::HEADER && received.is_ok() && !was_over {
            self.taken += 1;
        }
        let frames = Frames::new(message.get(frame::HEADER..).unwrap_or_default()).count();
        assert!(tells.len() <= 2 * (before + frames), "{} tells of {frames} frames", tells.len());
        let data = tells.iter().map(|tell| {
            if let LaneEvent::Data(_, run) = tell { run.bodies(message).map(<[u8]>::len).sum() } else { 0 }
        });
        assert!(data.sum::<usize>() <= message.len(), "more than came");
        assert!(self.state.backlog() <= waited + message.len(), "more is kept than came");
    }

    fn poll(&mut self) {
        let mut tells = Vec::new();
        let most = self.state.backlog() + 3;
        for count in 0.. {
            assert!(count < most, "it sends without end");
            let Some(message) = self.state.poll(self.now, &mut tells) else { break };
            let sequence = Header::read(&message).unwrap().sequence;
            assert!(sequence <= self.sent + 1, "number {sequence} follows {}", self.sent);
            self.sent = self.sent.max(sequence);
        }
        self.note(&tells);
    }
}

/// Bytes that are nearly right.
fn lie(random: &mut Random, victim: &Victim, serves: bool) -> Bytes {
    let mut message = BytesMut::new();
    if random.chance(5) {
        message.extend((0..random.below(60)).map(|_| random.next() as u8));
        return message.freeze();
    }
    let flags = if random.chance(50) { 0 } else { random.next() as u8 };
    let flags = if random.chance(98) { flags & !frame::RESET } else { flags };
    let sequence =
        if random.chance(90) { victim.taken + 1 } else { random.pick(&[0, victim.taken, victim.taken + 2, u64::MAX]) };
    let ack = if random.chance(98) { random.below(victim.sent + 1) } else { random.next() };
    let (ping, pong) = (random.next() as u32, random.below(20) as u32);
    let header = Header { ping, pong, server: random.below(3) as u32, ..Header::of(flags, sequence, ack) };
    message.extend_from_slice(&header.bytes());
    for _ in 0..random.below(6) {
        let usual: &[u8] = match serves {
            true => &[frame::CANCEL, frame::CREDIT],
            false => &[frame::ACCEPT, frame::DATA, frame::DATA, frame::END, frame::ERROR],
        };
        let kind = if random.chance(90) { random.pick(usual) } else { random.next() as u8 };
        let stream = if random.chance(95) { random.below(12) as u32 } else { random.next() as u32 };
        let length = random.pick(&[0, 1, 8, 8, 8, 100, 700]);
        let body: Vec<u8> = (0..length).map(|_| random.next() as u8).collect();
        frame::write(&mut message, kind, stream, &body);
    }
    if random.chance(10) {
        let at = random.below(message.len() as u64) as usize;
        message[at] = random.next() as u8;
    }
    if random.chance(5) {
        message.truncate(random.below(message.len() as u64) as usize);
    }
    message.freeze()
}

#[test]
fn lies_do_no_harm() {
    let (mut begun, mut taken) = (0, 0);
    for seed in 0..LIVES {
        let mut random = Random::new(seed);
        let serves = random.chance(50);
        let mut victim = Victim::new(serves, &mut random);
        for _ in 0..MESSAGES {
            let message = lie(&mut random, &victim, serves);
            victim.receive(&message);
            if random.chance(20) {
                victim.now += Duration::from_millis(random.below(400));
            }
            if random.chance(10) {
                let mut tells = Vec::new();
                victim.state.nobody_there(victim.now, &mut tells);
                victim.note(&tells);
            }
            victim.poll();
        }
        let mut tells = Vec::new();
        victim.state.end(&mut tells);
        victim.note(&tells);
        assert_eq!(victim.ended.len() as u64, victim.begun, "each has ended, of seed {seed}");
        begun += victim.begun;
        taken += victim.taken;
    }
    // They were believed for a while.
    assert!(begun > LIVES && taken > LIVES, "{begun} streams, {taken} messages");
}
