//! Limits that the simulation does not come near, or varies.

use super::*;
use crate::lane::liveness::MAX_MISSED;
use crate::lane::streams::fits_window;
use crate::wire::frame::Frames;
use std::time::Duration;

const TIMEOUTS: PeerTimeouts = PeerTimeouts {
    heartbeat_interval: Duration::from_secs(5),
    local_grace: Duration::from_secs(1),
    remote_grace: Duration::from_secs(3),
    peer_reconnect: Duration::from_secs(10),
};

fn end(role: Role, now: Instant) -> State<u64> {
    let mut end = State::new(role, 4 << 20, TIMEOUTS, now);
    end.connected(1);
    end
}

/// Opens the window, as answers in no time do while it is used.
fn widen(end: &mut State<u64>, now: Instant) {
    for millis in 0..10 {
        let at = now + Duration::from_millis(millis);
        end.path.answered(at, at, true);
    }
    assert_eq!(end.path.window(), 4 << 20);
}

fn message(sequence: u64, frames: &[(u8, u32, &[u8])]) -> Bytes {
    let mut message = BytesMut::from(&Header::of(0, sequence, 0).bytes()[..]);
    frames.iter().for_each(|(kind, stream, body)| frame::write(&mut message, *kind, *stream, body));
    message.freeze()
}

#[test]
fn max_payload_limits_the_size_of_a_message() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    assert_eq!((worker.role(), end(Role::Gateway, now).role()), (Role::Worker, Role::Gateway));
    let window = worker.open(1, 8 << 20, 0, now).unwrap();
    // One MiB, unless nats-server says otherwise.
    let most = level0::max_message(1 << 20);
    assert_eq!(worker.send(&window, &vec![0; most + 1]), Err(Status::TooLarge));
    assert_eq!(worker.send(&window, &vec![0; most]), Ok(()));
    worker.set_max_payload(1000);
    assert_eq!(worker.send(&window, &[0; 1000]), Err(Status::TooLarge));
    assert_eq!(worker.send(&window, &[0; 900]), Ok(()));
    assert_eq!(window.sent(), 2);
}

#[test]
fn small_messages_gather_up_to_the_largest_batch() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    widen(&mut worker, now);
    let window = worker.open(1, 8 << 20, 0, now).unwrap();
    for _ in 0..(3 * MAX_BATCH + MAX_BATCH / 2) / 1000 {
        worker.send(&window, &[0; 1000]).unwrap();
    }
    let sent: Vec<usize> = std::iter::from_fn(|| worker.poll(now, &mut vec![])).map(|message| message.len()).collect();
    assert_eq!(sent.len(), 4);
    assert!(sent[..3].iter().all(|length| (MAX_BATCH - 1100..=MAX_BATCH).contains(length)), "{sent:?}");
}

#[test]
fn two_batches_are_acknowledged_at_once() {
    let now = Instant::now();
    let mut gateway = end(Role::Gateway, now);
    assert!(!gateway.was_heard());
    let key = 1_u64.to_le_bytes();
    let body = [0; 60_000];
    for sequence in 1..=3 {
        let accept = (frame::ACCEPT, 1, &key[..]);
        let frames = [accept, (frame::DATA, 1, &body)];
        let frames = if sequence == 1 { &frames[..] } else { &frames[1..] };
        gateway.receive(&message(sequence, frames), now, &mut vec![], |_, _| Some((0, 1 << 20))).unwrap();
        let answer = gateway.poll(now, &mut vec![]).map(|answer| Header::read(&answer).unwrap().ack);
        assert_eq!(answer, (sequence == 3).then_some(3));
    }
    assert!(gateway.was_heard());
}

/// Each ACCEPT that nobody wants is answered with CANCEL. If the peer acknowledges none, the backlog stays bounded.
#[test]
fn a_peer_that_acknowledges_nothing_is_given_up() {
    for wanted in [0, 2000] {
        let now = Instant::now();
        let mut gateway = end(Role::Gateway, now);
        let most = 2 * (4 << 20) + (4 << 20) + 64 * wanted as usize;
        // Answers of 8 bytes: where none is wanted they reach the limit exactly.
        let (first, mut sequence) = (1 << 28, 0);
        let mut stream = first;
        let mut has_been_at_most = false;
        while !gateway.is_closed() {
            assert!(gateway.backlog() <= most);
            has_been_at_most |= gateway.backlog() == most;
            let mut accepts = BytesMut::from(&message(sequence + 1, &[])[..]);
            for _ in 0..4096 {
                frame::write(&mut accepts, frame::ACCEPT, stream, &[0; 8]);
                stream += 1;
            }
            sequence += 1;
            let accept = |_, stream| (stream < first + wanted).then_some((0, 1));
            gateway.receive(&accepts.freeze(), now, &mut vec![], accept).unwrap();
            let before = gateway.backlog();
            while gateway.poll(now, &mut vec![]).is_some() {}
            assert_eq!(gateway.is_closed(), before > most, "{before}");
        }
        assert_eq!(has_been_at_most, wanted == 0);
    }
}

#[test]
fn must_wake_is_true_once_if_there_is_something_to_do() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    assert!(said(&mut worker, now).is_none());
    assert!(!worker.must_wake());
    worker.request_ack(now);
    assert!(worker.must_wake());
    assert!(!worker.must_wake());
}

/// A timer that is late by `LATE` does not mean that the process stood still.
#[test]
fn a_silent_peer_is_gone_after_three_heartbeats() {
    let mut now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let _credit = worker.open(1, 1000, 0, now).unwrap();
    while said(&mut worker, now).is_some() {}
    // The ACCEPT is acknowledged: only heartbeats are due.
    hear(&mut worker, now, 0, 1);
    for missed in 1..=MAX_MISSED {
        assert!(said(&mut worker, now).is_none());
        now = worker.deadline().unwrap() + LATE;
        assert!(said(&mut worker, now).is_some());
        assert_eq!(worker.is_closed(), missed == MAX_MISSED);
    }
}

#[test]
fn any_message_fits_while_half_of_the_window_is_free() {
    assert!(fits_window(50, 100, 1000) && !fits_window(51, 100, 1000));
    assert!(fits_window(60, 100, 40) && !fits_window(60, 100, 41));
}

fn said(end: &mut State<u64>, now: Instant) -> Option<Header> {
    end.poll(now, &mut vec![]).map(|message| Header::read(&message).unwrap())
}

fn hear(end: &mut State<u64>, now: Instant, flags: u8, ack: u64) -> LaneEvents<u64> {
    let mut events = vec![];
    // A PONG answers the last PING.
    let header = Header { pong: end.retransmit.last_ping, ..Header::of(flags, 0, ack) };
    let message = Bytes::copy_from_slice(&header.bytes());
    end.receive(&message, now, &mut events, |_, _| None).unwrap();
    events
}

#[test]
fn no_more_credit_is_returned_than_messages_came() {
    let now = Instant::now();
    let mut gateway = end(Role::Gateway, now);
    let accept = (frame::ACCEPT, 1, &[0; 8][..]);
    let message = message(1, &[accept, (frame::DATA, 1, &[0; 10])]);
    gateway.receive(&message, now, &mut vec![], |_, _| Some((0, 1 << 20))).unwrap();
    gateway.return_credit(1, 0);
    assert_eq!(gateway.backlog(), 0);
    gateway.return_credit(1, 1 << 30);
    let backlog = gateway.backlog();
    assert!(backlog > 0);
    gateway.return_credit(1, 1 << 30);
    assert_eq!(gateway.backlog(), backlog);
}

#[test]
fn request_ack_sends_a_ping_at_once() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    worker.request_ack(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    assert!(said(&mut worker, now).is_none());
}

#[test]
fn a_reconnect_sends_ping_and_gap() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    worker.disconnected();
    worker.reconnected(1, now);
    let first = said(&mut worker, now).unwrap();
    assert!(first.has(frame::PING) && first.has(frame::GAP));
    // A message came, but no PONG: the next PING is sent after the interval.
    hear(&mut worker, now, 0, 0);
    assert!(said(&mut worker, now).is_none());
}

#[test]
fn a_pong_that_shows_no_loss_causes_no_retransmission() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 1 << 20, 0, now).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 1);
    worker.request_ack(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    worker.send(&window, b"later").unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    hear(&mut worker, now, frame::PONG, 1);
    assert!(said(&mut worker, now).is_none());
    // The ACCEPT is acknowledged.
    worker.finish(&window, None);
    assert_eq!(worker.ended_before_accept_acked(), 0);
}

#[test]
fn the_last_acknowledgement_is_repeated_while_streams_run() {
    let mut now = Instant::now();
    let mut gateway = end(Role::Gateway, now);
    let accept = (frame::ACCEPT, 1, &[0; 8][..]);
    gateway.receive(&message(1, &[accept]), now, &mut vec![], |_, _| Some((0, 1 << 20))).unwrap();
    for pause in [25, 25, 50, 100, 200] {
        assert!(said(&mut gateway, now).is_none());
        now += Duration::from_millis(pause);
        assert_eq!(gateway.deadline(), Some(now));
        assert_eq!(said(&mut gateway, now).map(|header| (header.flags, header.ack)), Some((0, 1)));
    }
    assert!(said(&mut gateway, now).is_none());
    assert!(gateway.deadline().unwrap() > now + Duration::from_secs(1));
}

#[test]
fn an_accept_on_a_closed_lane_ends_the_stream_at_once() {
    let now = Instant::now();
    let mut gateway = end(Role::Gateway, now);
    gateway.close(&mut vec![]);
    let (accept, mut events) = ((frame::ACCEPT, 1, &7u64.to_le_bytes()[..]), vec![]);
    let asked = |key, _| (key == 7).then_some((70, 1 << 20));
    gateway.receive(&message(1, &[accept]), now, &mut events, asked).unwrap();
    assert!(matches!(events[..], [(70, LaneEvent::PeerGone { accept_acked: true })]), "{events:?}");
}

/// With so small a limit the peer would not acknowledge by itself before the limit is reached.
#[test]
fn a_small_limit_causes_pings() {
    let now = Instant::now();
    for (limit, bytes, asks) in [
        (2 * ACK_AFTER, ACK_AFTER + 1, true),
        (2 * ACK_AFTER, ACK_AFTER, false),
        (2 * ACK_AFTER + 1, ACK_AFTER + 100, false),
        (1000, 501, true),
        (1000, 500, false),
    ] {
        let mut worker = State::new(Role::Worker, limit, TIMEOUTS, now);
        worker.connected(1);
        // The congestion window causes no PING.
        worker.path = Path::new(4 << 20);
        widen(&mut worker, now);
        let window = worker.open(1, 8 << 20, 0, now).unwrap();
        while said(&mut worker, now).is_some() {}
        hear(&mut worker, now, 0, 1);
        assert_eq!(worker.backlog(), 0);
        // A frame's header has one byte for its kind, one for the stream, and up to three for the length.
        let header = if bytes > 1 << 14 { 5 } else { 4 };
        worker.send(&window, &vec![0; bytes - header]).unwrap();
        assert_eq!(worker.backlog(), bytes);
        assert_eq!(said(&mut worker, now).unwrap().has(frame::PING), asks, "{limit} {bytes}");
    }
}

#[test]
fn a_pong_that_shows_a_loss_causes_retransmission() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 1 << 20, 0, now).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 1);
    worker.send(&window, b"lost").unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    worker.request_ack(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    hear(&mut worker, now, frame::PONG, 1);
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    assert!(said(&mut worker, now).is_none());
}

/// The round trip is longer than the time until the next PING: an earlier PONG says nothing about what was sent later.
#[test]
fn a_late_pong_causes_no_retransmission() {
    let mut now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 1 << 20, 0, now).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 1);
    now = worker.deadline().unwrap();
    let first = said(&mut worker, now).unwrap();
    worker.send(&window, b"later").unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    now = worker.deadline().unwrap();
    let second = said(&mut worker, now).unwrap();
    assert!(first.has(frame::PING) && second.has(frame::PING) && first.ping != second.ping);
    let answer = |worker: &mut State<u64>, now, pong, ack| {
        let header = Header { pong, ..Header::of(frame::PONG, 0, ack) };
        worker.receive(&Bytes::copy_from_slice(&header.bytes()), now, &mut vec![], |_, _| None).unwrap();
    };
    now += Duration::from_millis(100);
    answer(&mut worker, now, first.ping, 1);
    assert!(said(&mut worker, now).is_none());
    // Neither does a PONG that came twice, nor one to a PING that was never sent.
    answer(&mut worker, now, first.ping, 1);
    answer(&mut worker, now, second.ping + 1, 1);
    assert!(said(&mut worker, now).is_none());
    answer(&mut worker, now, second.ping, 1);
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2, "that one was lost");
    // The PONG to a PING from before the retransmission says nothing about it.
    worker.request_ack(now);
    let third = said(&mut worker, now).unwrap();
    let gap = Header { pong: third.ping, ..Header::of(frame::PONG | frame::GAP, 0, 1) };
    worker.receive(&Bytes::copy_from_slice(&gap.bytes()), now, &mut vec![], |_, _| None).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    answer(&mut worker, now, third.ping, 1);
    assert!(said(&mut worker, now).is_none());
}

/// Further messages are sent when the window opens.
#[test]
fn the_congestion_window_bounds_what_is_in_flight() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 8 << 20, 0, now).unwrap();
    (0..1000).for_each(|_| worker.send(&window, &[0; 100]).unwrap());
    let window = worker.path.window();
    let mut sent: Vec<usize> = Vec::new();
    let mut last = None;
    while let Some(message) = worker.poll(now, &mut vec![]) {
        sent.push(message.len());
        last = Header::read(&message).ok();
    }
    assert!(sent.len() > 1 && sent.iter().sum::<usize>() <= window, "{sent:?}");
    assert!(last.unwrap().has(frame::PING), "the PONG opens the window");
    assert!(!worker.must_wake());
    hear(&mut worker, now, frame::PONG, last.unwrap().sequence);
    assert!(worker.must_wake() && worker.path.window() > window);
    assert!(said(&mut worker, now).is_some());
    // Messages that were lost are sent again within the window, too.
    worker.disconnected();
    worker.reconnected(1, now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING) && said(&mut worker, now).is_none());
    let acked = worker.retransmit.acked;
    hear(&mut worker, now, frame::PONG, acked);
    let again = std::iter::from_fn(|| worker.poll(now, &mut vec![])).map(|message| message.len()).sum::<usize>();
    assert!((1..=worker.path.window()).contains(&again), "{again}");
}

/// A peer on another server gets the time that a route between servers takes; a peer on our server does not.
#[test]
fn grace_depends_on_the_peers_server() {
    let now = Instant::now();
    let silence = |server, is_heard: bool, timeouts: PeerTimeouts| {
        let mut worker = State::<u64>::new(Role::Worker, 4 << 20, timeouts, now);
        worker.connected(1);
        if is_heard {
            let header = Header { server, ..Header::of(0, 0, 0) };
            worker.receive(&Bytes::copy_from_slice(&header.bytes()), now, &mut vec![], |_, _| None).unwrap();
        }
        worker.no_responders(now, &mut vec![]);
        worker.timers.get(Timer::Grace).unwrap() - now
    };
    assert_eq!(silence(1, true, TIMEOUTS), TIMEOUTS.local_grace);
    assert_eq!(silence(2, true, TIMEOUTS), TIMEOUTS.remote_grace);
    assert_eq!(silence(0, true, TIMEOUTS), TIMEOUTS.remote_grace, "it may be on another one");
    assert_eq!(silence(0, false, TIMEOUTS), TIMEOUTS.remote_grace);
}

#[test]
fn grace_is_at_least_as_long_as_an_answer_takes() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    worker.request_ack(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    let now = now + Duration::from_secs(2);
    hear(&mut worker, now, frame::PONG, 0);
    worker.no_responders(now, &mut vec![]);
    let silence = worker.path.silence().unwrap();
    assert!(silence > TIMEOUTS.remote_grace);
    assert_eq!(worker.timers.get(Timer::Grace), Some(now + silence));
}

/// On a long path, a peer is given up by the round trip and not by heartbeats alone.
#[test]
fn a_peer_is_not_given_up_before_an_answer_can_have_come() {
    let mut now = Instant::now();
    let timeouts = PeerTimeouts { heartbeat_interval: Duration::from_millis(100), ..TIMEOUTS };
    let mut worker = State::<u64>::new(Role::Worker, 4 << 20, timeouts, now);
    worker.connected(1);
    let _credit = worker.open(1, 1000, 0, now).unwrap();
    let begun = now;
    let until_over = |worker: &mut State<u64>, mut now: Instant, most: Instant| {
        while !worker.is_closed() && now < most {
            while said(worker, now).is_some() {}
            now = worker.deadline().map_or(now, |at| at.max(now));
        }
        now
    };
    // The round trip is not known yet.
    now = until_over(&mut worker, now, begun + Duration::from_millis(2500));
    assert!(!worker.is_closed());
    hear(&mut worker, now, frame::PONG, 1);
    let heard = now;
    now = until_over(&mut worker, now, heard + Duration::from_secs(20));
    // The PING that was answered was the last one: the round trip is short.
    let silence = worker.path.silence().unwrap();
    assert!(worker.is_closed() && now - heard >= silence.max(3 * timeouts.heartbeat_interval), "{:?}", now - heard);
    assert!(now - heard < silence + 2 * timeouts.heartbeat_interval, "{:?}, {silence:?}", now - heard);
}

#[test]
fn a_batch_is_at_most_max_payload() {
    let now = Instant::now();
    for (more, messages) in [(0, 1), (1, 2)] {
        let mut worker = end(Role::Worker, now);
        worker.set_max_payload(1000);
        let window = worker.open(1, 1 << 20, 0, now).unwrap();
        assert!(said(&mut worker, now).is_some());
        worker.send(&window, &[0; 100]).unwrap();
        let used = frame::HEADER + 3 + 100;
        worker.send(&window, &vec![0; 1000 - used - frame::MAX_FRAME_HEADER + more]).unwrap();
        assert_eq!(std::iter::from_fn(|| said(&mut worker, now)).count(), messages);
    }
}

/// A process that stood still while the grace of its peer ran out first reads the messages that came meanwhile.
#[test]
fn grace_is_extended_after_standing_still() {
    let mut now = Instant::now();
    let mut worker = end(Role::Worker, now);
    while said(&mut worker, now).is_some() {}
    worker.no_responders(now, &mut vec![]);
    while said(&mut worker, now).is_some() {}
    now += TIMEOUTS.remote_grace + Duration::from_secs(1);
    while said(&mut worker, now).is_some() {}
    assert!(!worker.is_closed());
    let until = now + LATE;
    now = until - Duration::from_millis(1);
    while said(&mut worker, now).is_some() {}
    assert!(!worker.is_closed());
    assert!(said(&mut worker, until).is_some());
    assert!(worker.is_closed());
}

/// Sends messages, one at a time, until one is refused.
fn fill(worker: &mut State<u64>, window: &SendWindow, now: Instant) {
    while worker.send(window, &[0; 100]).is_ok() {
        assert!(said(worker, now).is_some());
    }
    worker.notify_when_writable(window);
}

fn is_writable(events: &[(u64, LaneEvent)], who: u64) -> bool {
    match events {
        [] => false,
        [(to, LaneEvent::Writable)] => *to == who,
        _ => panic!("{events:?}"),
    }
}

fn give_credit(worker: &mut State<u64>, now: Instant, sequence: u64, ack: u64, stream: u32, weight: u64) -> bool {
    let mut bytes = BytesMut::from(&Header::of(0, sequence, ack).bytes()[..]);
    frame::write(&mut bytes, frame::CREDIT, stream, &weight.to_le_bytes());
    let mut events = vec![];
    worker.receive(&bytes.freeze(), now, &mut events, |_, _| None).unwrap();
    is_writable(&events, u64::from(stream))
}

/// A lane with a small limit, a stream with a small window (1), and one with a large window (2).
fn crowded(now: Instant) -> (State<u64>, Arc<SendWindow>, Arc<SendWindow>) {
    let mut worker = State::new(Role::Worker, 1000, TIMEOUTS, now);
    worker.connected(1);
    let small = worker.open(1, 200, 1, now).unwrap();
    let large = worker.open(2, 8 << 20, 2, now).unwrap();
    assert!(said(&mut worker, now).is_some());
    hear(&mut worker, now, 0, 1);
    (worker, small, large)
}

#[test]
fn writable_is_reported_when_half_of_the_limit_is_free() {
    let now = Instant::now();
    let (mut worker, _, large) = crowded(now);
    fill(&mut worker, &large, now);
    let mut ack = 1;
    loop {
        ack += 1;
        let is_reported = is_writable(&hear(&mut worker, now, 0, ack), 2);
        assert_eq!(is_reported, worker.backlog() <= 500);
        if is_reported {
            return assert!(worker.backlog() > 300);
        }
    }
}

#[test]
fn writable_is_reported_when_both_window_and_lane_have_capacity() {
    let now = Instant::now();
    let (mut worker, small, large) = crowded(now);
    fill(&mut worker, &small, now);
    // Everything is acknowledged, and nothing was consumed.
    let ack = worker.retransmit.last_sent();
    assert!(!is_writable(&hear(&mut worker, now, 0, ack), 1));
    fill(&mut worker, &large, now);
    assert!(!give_credit(&mut worker, now, 1, ack, 1, 1000));
    let mut ack = ack;
    while worker.backlog() > 500 {
        ack += 1;
        hear(&mut worker, now, 0, ack);
    }
    // Both were notified. The small window is full again.
    fill(&mut worker, &small, now);
    let ack = worker.retransmit.last_sent();
    hear(&mut worker, now, 0, ack);
    worker.send(&large, &[0; 300]).unwrap();
    assert!((1..=500).contains(&worker.backlog()));
    let ack = worker.retransmit.last_sent();
    assert!(give_credit(&mut worker, now, 2, ack, 1, 1000));
}

#[test]
fn a_worker_that_exceeds_the_window_is_reported() {
    let now = Instant::now();
    for (bodies, is_overrun) in [(&[40, 40][..], false), (&[40, 200], true), (&[200, 40], true), (&[200], false)] {
        let mut gateway = end(Role::Gateway, now);
        let contents: Vec<_> = bodies.iter().map(|length| vec![0; *length]).collect();
        let mut frames = vec![(frame::ACCEPT, 1, &[0; 8][..])];
        // Less than half of the window: the next message may exceed it.
        frames.push((frame::DATA, 1, &[0; 100]));
        frames.extend(contents.iter().map(|body| (frame::DATA, 1, &body[..])));
        let mut events = vec![];
        gateway.receive(&message(1, &frames), now, &mut events, |_, _| Some((7, 400))).unwrap();
        assert_eq!(matches!(&events[..], [(7, LaneEvent::WindowExceeded)]), is_overrun, "{events:?}");
    }
}

#[test]
fn a_stream_that_ended_early_is_forgotten_once_its_accept_is_acknowledged() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 1000, 0, now).unwrap();
    assert!(said(&mut worker, now).is_some());
    worker.finish(&window, None);
    assert!(said(&mut worker, now).is_some());
    assert_eq!(worker.ended_before_accept_acked(), 1);
    hear(&mut worker, now, 0, 1);
    assert_eq!(worker.ended_before_accept_acked(), 0);
}

fn frames_of(message: &Bytes) -> Vec<(u8, u32, &[u8])> {
    Frames::new(&message[frame::HEADER..]).map(Result::unwrap).map(|f| (f.kind, f.stream, f.body)).collect()
}

#[test]
fn the_code_of_an_error_is_sent_before_it() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let windows = [1, 2].map(|key| worker.open(key, 1000, key, now).unwrap());
    assert!(said(&mut worker, now).is_some());
    worker.finish(&windows[0], Some(StreamError { code: 404, text: b"no such model" }));
    worker.finish(&windows[1], Some(StreamError::new(b"failed")));
    // A second end has no effect.
    worker.finish(&windows[0], Some(StreamError { code: 1, text: b"" }));
    let message = worker.poll(now, &mut vec![]).unwrap();
    let code = (frame::CODE, 1, &404_i32.to_le_bytes()[..]);
    assert_eq!(frames_of(&message), [code, (frame::ERROR, 1, b"no such model"), (frame::ERROR, 2, b"failed")]);
}

#[test]
fn the_code_of_an_error_arrives_with_it() {
    let now = Instant::now();
    let (accept, data, end_frame) =
        ((frame::ACCEPT, 1, &[0; 8][..]), (frame::DATA, 1, &b"x"[..]), (frame::END, 1, &b""[..]));
    let (code, other) = ((frame::CODE, 1, &[42, 0, 0, 0][..]), (frame::CODE, 1, &[7, 0, 0, 0][..]));
    let (lie, stranger) = ((frame::CODE, 1, &[0xff; 4][..]), (frame::CODE, 9, &[1, 0, 0, 0][..]));
    let error = (frame::ERROR, 1, &b"text"[..]);
    // Each inner list is one message; `order` says in which order they arrive, some of them twice.
    type Frames<'a> = &'a [(u8, u32, &'a [u8])];
    let cases: [(&[Frames<'_>], &[usize], Option<i32>); 10] = [
        (&[&[accept, code, error]], &[0], Some(42)),
        (&[&[accept, data, code], &[error]], &[0, 1], Some(42)),
        (&[&[accept], &[code], &[error]], &[0, 2, 1, 2], Some(42)),
        (&[&[accept], &[code], &[error]], &[0, 1, 0, 1, 2, 2, 1], Some(42)),
        (&[&[accept, error], &[code]], &[0, 1], Some(0)),
        (&[&[accept, code], &[other, error]], &[0, 1], Some(7)),
        (&[&[accept, code, lie, error]], &[0], Some(0)),
        (&[&[accept, stranger, error]], &[0], Some(0)),
        (&[&[code, accept, error]], &[0], Some(0)),
        (&[&[accept, code, end_frame]], &[0], None),
    ];
    for (messages, order, expected) in cases {
        let mut gateway = end(Role::Gateway, now);
        let mut ends = Vec::new();
        for index in order {
            let mut events = Vec::new();
            let next = message(1 + *index as u64, messages[*index]);
            gateway.receive(&next, now, &mut events, |_, _| Some((7, 1000))).unwrap();
            ends.extend(events.into_iter().filter_map(|(_, event)| match event {
                LaneEvent::Failed(code, text) => {
                    assert_eq!(text, "text");
                    Some(Some(code))
                }
                LaneEvent::Ended => Some(None),
                _ => None,
            }));
        }
        assert_eq!(ends, [expected], "{messages:?}, {order:?}");
    }
}

#[test]
fn thousands_of_long_errors_do_not_close_the_lane() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let windows: Vec<_> = (0..3000).map(|key| worker.open(key, 1 << 20, key, now).unwrap()).collect();
    let text = "\u{20ac}".repeat(10_000);
    windows.iter().for_each(|window| worker.finish(window, Some(StreamError::new(text.as_bytes()))));
    let (mut texts, mut events) = (Vec::new(), Vec::new());
    while let Some(message) = worker.poll(now, &mut events) {
        let frames = Frames::new(&message[frame::HEADER..]).map(Result::unwrap);
        texts.extend(frames.filter(|frame| frame.kind == frame::ERROR).map(|frame| frame.body.len()));
        let ack = worker.retransmit.last_sent();
        hear(&mut worker, now, 0, ack);
    }
    assert!(!worker.is_closed() && events.is_empty());
    assert_eq!((texts.len(), texts[0], texts[2999]), (3000, 30_000, 255));
}

#[test]
fn a_peer_that_answers_pings_and_acknowledges_nothing_is_given_up() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 1 << 20, 7, now).unwrap();
    worker.send(&window, b"x").unwrap();
    while worker.poll(now, &mut vec![]).is_some() {}
    let mut answers = 0;
    while !worker.is_closed() {
        worker.request_ack(now);
        while worker.poll(now, &mut vec![]).is_some() {}
        hear(&mut worker, now, frame::PONG, 0);
        worker.poll(now, &mut vec![]);
        answers += 1;
    }
    assert_eq!(answers, MAX_USELESS_PONGS + 1);
    // A peer that acknowledges now and then is not.
    let mut worker = end(Role::Worker, now);
    let window = worker.open(1, 1 << 20, 7, now).unwrap();
    for ack in 0..3 * u64::from(MAX_USELESS_PONGS) {
        worker.send(&window, b"x").unwrap();
        worker.request_ack(now);
        while worker.poll(now, &mut vec![]).is_some() {}
        hear(&mut worker, now, frame::PONG, ack / 10);
    }
    assert!(!worker.is_closed());
}

#[test]
fn streams_that_ended_before_their_accept_was_acknowledged_are_bounded() {
    let now = Instant::now();
    let mut worker = end(Role::Worker, now);
    for key in 0..=MAX_ENDED_BEFORE_ACCEPT_ACKED as u64 {
        assert!(!worker.is_closed());
        let window = worker.open(key, 1, key, now).unwrap();
        worker.finish(&window, None);
        while worker.poll(now, &mut vec![]).is_some() {}
    }
    assert!(worker.is_closed() || worker.poll(now, &mut vec![]).is_some_and(|_| worker.is_closed()));
}
