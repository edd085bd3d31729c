//! A lying peer: whatever bytes come, nothing panics, little memory is used for them, and each stream still ends once.

use super::schedule::Random;
use crate::lane::event::{LaneEvent, LaneEvents, Role};
use crate::lane::liveness::PeerTimeouts;
use crate::lane::state::State;
use crate::wire::frame::{self, Frames, Header};
use bytes::{Bytes, BytesMut};
use std::collections::HashSet;
use std::time::{Duration, Instant};

const LIVES: u64 = 20_000;
const MESSAGES: u64 = 40;

/// One end, and the events that it has reported.
struct Victim {
    state: State<u64>,
    now: Instant,
    /// The numbers of the last message that it has sent, and of the last that it has taken.
    sent: u64,
    taken: u64,
    /// How many streams have begun, and those that have ended.
    begun: u64,
    ended: HashSet<u64>,
}

impl Victim {
    fn new(role: Role, random: &mut Random) -> Victim {
        let timeouts = PeerTimeouts {
            heartbeat_interval: Duration::from_millis(100),
            local_grace: Duration::from_millis(100),
            remote_grace: Duration::from_millis(200),
            peer_reconnect: Duration::from_secs(1),
        };
        let now = Instant::now();
        let mut state = State::new(role, 10_000, timeouts, now);
        state.connected(1);
        let mut victim = Victim { state, now, sent: 0, taken: 0, begun: 0, ended: HashSet::new() };
        for _ in 0..random.below(if role == Role::Worker { 4 } else { 1 }) {
            let Some(window) = victim.state.open(random.next(), 1000, victim.begun, now) else { break };
            victim.begun += 1;
            for _ in 0..random.below(4) {
                let _ = victim.state.send(&window, &[7; 100]);
            }
        }
        victim.poll();
        victim
    }

    fn note(&mut self, events: &LaneEvents<u64>) {
        for (owner, event) in events {
            if matches!(event, LaneEvent::AcceptUndelivered) {
                assert!(*owner < self.begun);
                continue;
            }
            let is_last = !matches!(event, LaneEvent::Data { .. } | LaneEvent::Writable);
            assert!(*owner < self.begun && !self.ended.contains(owner), "{event:?} of an owner that has ended");
            if is_last {
                self.ended.insert(*owner);
            }
        }
    }

    fn receive(&mut self, message: &Bytes) {
        let (before, waited) =
            (self.state.owners().len() + self.state.ended_before_accept_acked(), self.state.backlog());
        let mut events = Vec::new();
        let begun = &mut self.begun;
        let was_over = self.state.is_closed();
        let received = self.state.receive(message, self.now, &mut events, |key, _| {
            (key % 4 > 0).then(|| {
                *begun += 1;
                (*begun - 1, 1000)
            })
        });
        self.note(&events);
        let is_next = Header::read(message).is_ok_and(|header| header.sequence == self.taken + 1);
        if is_next && message.len() > frame::HEADER && received.is_ok() && !was_over {
            self.taken += 1;
        }
        let frames = Frames::new(message.get(frame::HEADER..).unwrap_or_default()).count();
        assert!(events.len() <= 2 * (before + frames), "{} events of {frames} frames", events.len());
        let data = events.iter().map(|(_, event)| {
            if let LaneEvent::Data { run, .. } = event { run.bodies(message).map(<[u8]>::len).sum() } else { 0 }
        });
        assert!(data.sum::<usize>() <= message.len(), "more than came");
        assert!(self.state.backlog() <= waited + message.len(), "more is kept than came");
    }

    fn poll(&mut self) {
        let mut events = Vec::new();
        let most = self.state.backlog() + 3;
        for count in 0.. {
            assert!(count < most, "it sends without end");
            let Some(message) = self.state.poll(self.now, &mut events) else { break };
            let sequence = Header::read(&message).unwrap().sequence;
            assert!(sequence <= self.sent + 1, "number {sequence} follows {}", self.sent);
            self.sent = self.sent.max(sequence);
        }
        self.note(&events);
    }
}

/// A message that is nearly right.
fn lie(random: &mut Random, victim: &Victim, role: Role) -> Bytes {
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
        let usual: &[u8] = match role {
            Role::Worker => &[frame::CANCEL, frame::CREDIT],
            Role::Gateway => &[frame::ACCEPT, frame::DATA, frame::DATA, frame::END, frame::CODE, frame::ERROR],
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
fn lying_peers_do_no_harm() {
    let (mut begun, mut taken) = (0, 0);
    for seed in 0..LIVES {
        let mut random = Random::new(seed);
        let role = if random.chance(50) { Role::Worker } else { Role::Gateway };
        let mut victim = Victim::new(role, &mut random);
        for _ in 0..MESSAGES {
            let message = lie(&mut random, &victim, role);
            victim.receive(&message);
            if random.chance(20) {
                victim.now += Duration::from_millis(random.below(400));
            }
            if random.chance(10) {
                let mut events = Vec::new();
                victim.state.no_responders(victim.now, &mut events);
                victim.note(&events);
            }
            victim.poll();
        }
        let mut events = Vec::new();
        victim.state.close(&mut events);
        victim.note(&events);
        assert_eq!(victim.ended.len() as u64, victim.begun, "each has ended, of seed {seed}");
        begun += victim.begun;
        taken += victim.taken;
    }
    // Most messages were good enough to have an effect.
    assert!(begun > LIVES && taken > LIVES, "{begun} streams, {taken} messages");
}
