//! Limits of an end that the simulation does not come near, or varies.

use super::*;

const PATIENCE: PeerTimeouts = PeerTimeouts {
    heartbeat: Duration::from_secs(5),
    grace: Duration::from_secs(1),
    remote_grace: Duration::from_secs(3),
    reconnect: Duration::from_secs(10),
};

fn end(serves: bool, now: Instant) -> State<u64> {
    let mut end = State::new(serves, 4 << 20, PATIENCE, now);
    end.begin(1);
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
fn a_message_is_as_large_as_nats_server_takes_it() {
    let now = Instant::now();
    let mut worker = end(true, now);
    assert!(worker.serves() && !end(false, now).serves());
    let credit = worker.open(1, 8 << 20, 0, now).unwrap();
    // A mebibyte, until nats-server says otherwise.
    let most = level0::max_message(1 << 20);
    assert_eq!(worker.send(&credit, &vec![0; most + 1]), Err(Refusal::TooLarge));
    assert_eq!(worker.send(&credit, &vec![0; most]), Ok(()));
    worker.set_max_payload(1000);
    assert_eq!(worker.send(&credit, &[0; 1000]), Err(Refusal::TooLarge));
    assert_eq!(worker.send(&credit, &[0; 900]), Ok(()));
    assert_eq!(credit.sent(), 2);
}

#[test]
fn small_messages_gather_up_to_a_chunk() {
    let now = Instant::now();
    let mut worker = end(true, now);
    widen(&mut worker, now);
    let credit = worker.open(1, 8 << 20, 0, now).unwrap();
    for _ in 0..200 {
        worker.send(&credit, &[0; 1000]).unwrap();
    }
    let sent: Vec<usize> = std::iter::from_fn(|| worker.poll(now, &mut vec![])).map(|message| message.len()).collect();
    assert_eq!(sent.len(), 4);
    assert!(sent[..3].iter().all(|length| (CHUNK - 1100..=CHUNK).contains(length)), "{sent:?}");
}

#[test]
fn two_chunks_are_acknowledged_at_once() {
    let now = Instant::now();
    let mut gateway = end(false, now);
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

/// Each ACCEPT that nobody wants is answered, and a peer that acknowledges no answer has us keep so much, and no more.
#[test]
fn a_peer_that_acknowledges_nothing_is_given_up_in_the_end() {
    for wanted in [0, 2000] {
        let now = Instant::now();
        let mut gateway = end(false, now);
        let most = 2 * (4 << 20) + (4 << 20) + 64 * wanted as usize;
        // Answers of 8 bytes: where none is wanted they reach the limit exactly.
        let (first, mut sequence) = (1 << 28, 0);
        let mut stream = first;
        let mut has_been_at_most = false;
        while !gateway.is_over() {
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
            assert_eq!(gateway.is_over(), before > most, "{before}");
        }
        assert_eq!(has_been_at_most, wanted == 0);
    }
}

#[test]
fn a_driver_sleeps_while_there_is_nothing_to_do() {
    let now = Instant::now();
    let mut worker = end(true, now);
    assert!(said(&mut worker, now).is_none());
    assert!(!worker.must_wake());
    worker.ask(now);
    assert!(worker.must_wake());
    assert!(!worker.must_wake());
}

/// To be late by as much as everybody may be is not to have stood still.
#[test]
fn three_beats_are_three_beats() {
    let mut now = Instant::now();
    let mut worker = end(true, now);
    let _credit = worker.open(1, 1000, 0, now).unwrap();
    while said(&mut worker, now).is_some() {}
    // The ACCEPT is acknowledged: nothing but beats is due.
    hear(&mut worker, now, 0, 1);
    for missed in 1..=MAX_MISSED {
        assert!(said(&mut worker, now).is_none());
        now = worker.deadline().unwrap() + LATE;
        assert!(said(&mut worker, now).is_some());
        assert_eq!(worker.is_over(), missed == MAX_MISSED);
    }
}

#[test]
fn a_window_has_room_for_all_while_half_is_free() {
    assert!(has_room(50, 100, 1000) && !has_room(51, 100, 1000));
    assert!(has_room(60, 100, 40) && !has_room(60, 100, 41));
    let grant = Grant::new(100);
    assert_eq!([25, 1, 25, 50].map(|weight| grant.take(weight)), [None, Some(26), None, Some(75)]);
}

fn said(end: &mut State<u64>, now: Instant) -> Option<Header> {
    end.poll(now, &mut vec![]).map(|message| Header::read(&message).unwrap())
}

fn hear(end: &mut State<u64>, now: Instant, flags: u8, ack: u64) -> Vec<LaneEvent<u64>> {
    let mut tells = vec![];
    // A PONG answers the last PING.
    let header = Header { pong: end.last_ping, ..Header::of(flags, 0, ack) };
    let message = Bytes::copy_from_slice(&header.bytes());
    end.receive(&message, now, &mut tells, |_, _| None).unwrap();
    tells
}

#[test]
fn room_is_given_for_what_came_and_nothing_else() {
    let now = Instant::now();
    let mut gateway = end(false, now);
    let accept = (frame::ACCEPT, 1, &[0; 8][..]);
    let message = message(1, &[accept, (frame::DATA, 1, &[0; 10])]);
    gateway.receive(&message, now, &mut vec![], |_, _| Some((0, 1 << 20))).unwrap();
    gateway.grant(1, 0);
    assert_eq!(gateway.backlog(), 0);
    gateway.grant(1, 1 << 30);
    let told = gateway.backlog();
    assert!(told > 0);
    gateway.grant(1, 1 << 30);
    assert_eq!(gateway.backlog(), told);
}

#[test]
fn a_question_is_asked_at_once() {
    let now = Instant::now();
    let mut worker = end(true, now);
    worker.ask(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    assert!(said(&mut worker, now).is_none());
}

#[test]
fn who_is_connected_again_asks_for_what_is_missing() {
    let now = Instant::now();
    let mut worker = end(true, now);
    worker.link_down();
    worker.link_up(1, now);
    let first = said(&mut worker, now).unwrap();
    assert!(first.has(frame::PING) && first.has(frame::GAP));
    // It was heard, but not answered: the next question has its time.
    hear(&mut worker, now, 0, 0);
    assert!(said(&mut worker, now).is_none());
}

#[test]
fn an_answer_that_covers_the_question_has_nothing_sent_again() {
    let now = Instant::now();
    let mut worker = end(true, now);
    let credit = worker.open(1, 1 << 20, 0, now).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 1);
    worker.ask(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    worker.send(&credit, b"later").unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    hear(&mut worker, now, frame::PONG, 1);
    assert!(said(&mut worker, now).is_none());
    // A stream whose ACCEPT has arrived is not told that it had not.
    worker.finish(&credit, None);
    assert_eq!(worker.unheard(), 0);
}

#[test]
fn an_acknowledgement_is_repeated_in_pauses_while_streams_run() {
    let mut now = Instant::now();
    let mut gateway = end(false, now);
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
fn what_is_accepted_when_the_lane_is_over_is_lost_at_once() {
    let now = Instant::now();
    let mut gateway = end(false, now);
    gateway.end(&mut vec![]);
    let (accept, mut tells) = ((frame::ACCEPT, 1, &7u64.to_le_bytes()[..]), vec![]);
    let asked = |key, _| (key == 7).then_some((70, 1 << 20));
    gateway.receive(&message(1, &[accept]), now, &mut tells, asked).unwrap();
    assert!(matches!(tells[..], [LaneEvent::Gone(70, true)]), "{tells:?}");
}

/// Where so little may wait that a peer would not acknowledge it by itself, it is asked to.
#[test]
fn a_small_limit_asks_for_acknowledgements() {
    let now = Instant::now();
    for (limit, bytes, asks) in [
        (2 * ACK_AFTER, ACK_AFTER + 1, true),
        (2 * ACK_AFTER, ACK_AFTER, false),
        (2 * ACK_AFTER + 1, ACK_AFTER + 100, false),
        (1000, 501, true),
        (1000, 500, false),
    ] {
        let mut worker = State::new(true, limit, PATIENCE, now);
        worker.begin(1);
        // The window is no reason to ask.
        worker.path = Path::new(4 << 20);
        widen(&mut worker, now);
        let credit = worker.open(1, 8 << 20, 0, now).unwrap();
        while said(&mut worker, now).is_some() {}
        hear(&mut worker, now, 0, 1);
        assert_eq!(worker.backlog(), 0);
        // A frame's header has one byte for its kind, one for the stream, and up to three for the length.
        let header = if bytes > 1 << 14 { 5 } else { 4 };
        worker.send(&credit, &vec![0; bytes - header]).unwrap();
        assert_eq!(worker.backlog(), bytes);
        assert_eq!(said(&mut worker, now).unwrap().has(frame::PING), asks, "{limit} {bytes}");
    }
}

#[test]
fn an_answer_that_does_not_cover_the_question_has_the_rest_sent_again() {
    let now = Instant::now();
    let mut worker = end(true, now);
    let credit = worker.open(1, 1 << 20, 0, now).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 1);
    worker.send(&credit, b"lost").unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    worker.ask(now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING));
    hear(&mut worker, now, frame::PONG, 1);
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    assert!(said(&mut worker, now).is_none());
}

/// The round trip is longer than it takes to ask again: the answer to an earlier question says nothing of what was sent later.
#[test]
fn a_late_answer_has_nothing_sent_again() {
    let mut now = Instant::now();
    let mut worker = end(true, now);
    let credit = worker.open(1, 1 << 20, 0, now).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 1);
    now = worker.deadline().unwrap();
    let first = said(&mut worker, now).unwrap();
    worker.send(&credit, b"later").unwrap();
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
    // Neither does an answer that came twice, nor one to a PING that was never sent.
    answer(&mut worker, now, first.ping, 1);
    answer(&mut worker, now, second.ping + 1, 1);
    assert!(said(&mut worker, now).is_none());
    answer(&mut worker, now, second.ping, 1);
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2, "that one was lost");
    // What was asked before it was sent again says nothing of the repeat.
    worker.ask(now);
    let third = said(&mut worker, now).unwrap();
    let gap = Header { pong: third.ping, ..Header::of(frame::PONG | frame::GAP, 0, 1) };
    worker.receive(&Bytes::copy_from_slice(&gap.bytes()), now, &mut vec![], |_, _| None).unwrap();
    assert_eq!(said(&mut worker, now).unwrap().sequence, 2);
    answer(&mut worker, now, third.ping, 1);
    assert!(said(&mut worker, now).is_none());
}

/// What is not in flight yet is sent when the window has space for it.
#[test]
fn window_bounds_what_is_in_flight() {
    let now = Instant::now();
    let mut worker = end(true, now);
    let credit = worker.open(1, 8 << 20, 0, now).unwrap();
    (0..1000).for_each(|_| worker.send(&credit, &[0; 100]).unwrap());
    let window = worker.path.window();
    let mut sent: Vec<usize> = Vec::new();
    let mut last = None;
    while let Some(message) = worker.poll(now, &mut vec![]) {
        sent.push(message.len());
        last = Header::read(&message).ok();
    }
    assert!(sent.len() > 1 && sent.iter().sum::<usize>() <= window, "{sent:?}");
    assert!(last.unwrap().has(frame::PING), "the answer opens the window");
    assert!(!worker.must_wake());
    hear(&mut worker, now, frame::PONG, last.unwrap().sequence);
    assert!(worker.must_wake() && worker.path.window() > window);
    assert!(said(&mut worker, now).is_some());
    // Messages that were lost are sent again within the window, too.
    worker.link_down();
    worker.link_up(1, now);
    assert!(said(&mut worker, now).unwrap().has(frame::PING) && said(&mut worker, now).is_none());
    let acked = worker.acked;
    hear(&mut worker, now, frame::PONG, acked);
    let again = std::iter::from_fn(|| worker.poll(now, &mut vec![])).map(|message| message.len()).sum::<usize>();
    assert!((1..=worker.path.window()).contains(&again), "{again}");
}

/// A peer on another server is given the time that a link between servers takes; one on ours is not.
#[test]
fn grace_depends_on_the_peers_server() {
    let now = Instant::now();
    let silence = |server, is_heard: bool, patience: PeerTimeouts| {
        let mut worker = State::<u64>::new(true, 4 << 20, patience, now);
        worker.begin(1);
        if is_heard {
            let header = Header { server, ..Header::of(0, 0, 0) };
            worker.receive(&Bytes::copy_from_slice(&header.bytes()), now, &mut vec![], |_, _| None).unwrap();
        }
        worker.nobody_there(now, &mut vec![]);
        worker.gone_at().unwrap() - now
    };
    assert_eq!(silence(1, true, PATIENCE), PATIENCE.grace);
    assert_eq!(silence(2, true, PATIENCE), PATIENCE.remote_grace);
    assert_eq!(silence(0, true, PATIENCE), PATIENCE.remote_grace, "it may be on another one");
    assert_eq!(silence(0, false, PATIENCE), PATIENCE.remote_grace);
}

/// On a long path, silence is judged by the round trip and not by beats alone.
#[test]
fn silence_is_longer_than_an_answer_takes() {
    let mut now = Instant::now();
    let patience = PeerTimeouts { heartbeat: Duration::from_millis(100), ..PATIENCE };
    let mut worker = State::<u64>::new(true, 4 << 20, patience, now);
    worker.begin(1);
    let _credit = worker.open(1, 1000, 0, now).unwrap();
    let begun = now;
    let until_over = |worker: &mut State<u64>, mut now: Instant, most: Instant| {
        while !worker.is_over() && now < most {
            while said(worker, now).is_some() {}
            now = worker.deadline().map_or(now, |at| at.max(now));
        }
        now
    };
    // Not known yet.
    now = until_over(&mut worker, now, begun + Duration::from_millis(2500));
    assert!(!worker.is_over());
    hear(&mut worker, now, frame::PONG, 1);
    let heard = now;
    now = until_over(&mut worker, now, heard + Duration::from_secs(20));
    // The PING that was answered was the last one: the round trip is short.
    let silence = worker.path.silence().unwrap();
    assert!(worker.is_over() && now - heard >= silence.max(3 * patience.heartbeat), "{:?}", now - heard);
    assert!(now - heard < silence + 2 * patience.heartbeat, "{:?}, {silence:?}", now - heard);
}

#[test]
fn as_much_gathers_as_nats_server_takes() {
    let now = Instant::now();
    for (more, messages) in [(0, 1), (1, 2)] {
        let mut worker = end(true, now);
        worker.set_max_payload(1000);
        let credit = worker.open(1, 1 << 20, 0, now).unwrap();
        assert!(said(&mut worker, now).is_some());
        worker.send(&credit, &[0; 100]).unwrap();
        let used = frame::HEADER + 3 + 100;
        worker.send(&credit, &vec![0; 1000 - used - frame::MAX_FRAME_HEADER + more]).unwrap();
        assert_eq!(std::iter::from_fn(|| said(&mut worker, now)).count(), messages);
    }
}

/// Who stood still himself while a suspect's grace ran out, reads for a while what came meanwhile.
#[test]
fn who_stood_still_judges_later() {
    let mut now = Instant::now();
    let mut worker = end(true, now);
    while said(&mut worker, now).is_some() {}
    worker.nobody_there(now, &mut vec![]);
    while said(&mut worker, now).is_some() {}
    now += PATIENCE.remote_grace + Duration::from_secs(1);
    while said(&mut worker, now).is_some() {}
    assert!(!worker.is_over());
    let until = now + LATE;
    now = until - Duration::from_millis(1);
    while said(&mut worker, now).is_some() {}
    assert!(!worker.is_over());
    assert!(said(&mut worker, until).is_some());
    assert!(worker.is_over());
}

/// Each message goes alone; all is sent up to the first that is refused.
fn fill(worker: &mut State<u64>, credit: &Credit, now: Instant) {
    while worker.send(credit, &[0; 100]).is_ok() {
        assert!(said(worker, now).is_some());
    }
    worker.want_room(credit);
}

fn is_room_for(tells: &[LaneEvent<u64>], who: u64) -> bool {
    match tells {
        [] => false,
        [LaneEvent::Room(to)] => *to == who,
        _ => panic!("{tells:?}"),
    }
}

fn give_credit(worker: &mut State<u64>, now: Instant, sequence: u64, ack: u64, stream: u32, weight: u64) -> bool {
    let mut bytes = BytesMut::from(&Header::of(0, sequence, ack).bytes()[..]);
    frame::write(&mut bytes, frame::CREDIT, stream, &weight.to_le_bytes());
    let mut tells = vec![];
    worker.receive(&bytes.freeze(), now, &mut tells, |_, _| None).unwrap();
    is_room_for(&tells, u64::from(stream))
}

/// A lane with little room, a stream with a small window (1), and one with a large one (2).
fn crowded(now: Instant) -> (State<u64>, Arc<Credit>, Arc<Credit>) {
    let mut worker = State::new(true, 1000, PATIENCE, now);
    worker.begin(1);
    let small = worker.open(1, 200, 1, now).unwrap();
    let large = worker.open(2, 8 << 20, 2, now).unwrap();
    assert!(said(&mut worker, now).is_some());
    hear(&mut worker, now, 0, 1);
    (worker, small, large)
}

#[test]
fn room_is_told_when_half_of_the_lane_is_free() {
    let now = Instant::now();
    let (mut worker, _, large) = crowded(now);
    fill(&mut worker, &large, now);
    let mut ack = 1;
    loop {
        ack += 1;
        let told = is_room_for(&hear(&mut worker, now, 0, ack), 2);
        assert_eq!(told, worker.backlog() <= 500);
        if told {
            return assert!(worker.backlog() > 300);
        }
    }
}

#[test]
fn room_is_told_when_the_window_has_some_and_the_lane() {
    let now = Instant::now();
    let (mut worker, small, large) = crowded(now);
    fill(&mut worker, &small, now);
    // All is acknowledged, and nothing was taken.
    let ack = worker.last_sent();
    assert!(!is_room_for(&hear(&mut worker, now, 0, ack), 1));
    fill(&mut worker, &large, now);
    assert!(!give_credit(&mut worker, now, 1, ack, 1, 1000));
    let mut ack = ack;
    while worker.backlog() > 500 {
        ack += 1;
        hear(&mut worker, now, 0, ack);
    }
    // Both have heard of it. The small one's window is full again.
    fill(&mut worker, &small, now);
    let ack = worker.last_sent();
    hear(&mut worker, now, 0, ack);
    worker.send(&large, &[0; 300]).unwrap();
    assert!((1..=500).contains(&worker.backlog()));
    let ack = worker.last_sent();
    assert!(give_credit(&mut worker, now, 2, ack, 1, 1000));
}

#[test]
fn who_sends_more_than_its_window_is_told_of() {
    let now = Instant::now();
    for (bodies, is_overrun) in [(&[40, 40][..], false), (&[40, 200], true), (&[200, 40], true), (&[200], false)] {
        let mut gateway = end(false, now);
        let contents: Vec<_> = bodies.iter().map(|length| vec![0; *length]).collect();
        let mut frames = vec![(frame::ACCEPT, 1, &[0; 8][..])];
        // Less than half of the window: one more may pass its end.
        frames.push((frame::DATA, 1, &[0; 100]));
        frames.extend(contents.iter().map(|body| (frame::DATA, 1, &body[..])));
        let mut tells = vec![];
        gateway.receive(&message(1, &frames), now, &mut tells, |_, _| Some((7, 400))).unwrap();
        assert_eq!(matches!(&tells[..], [LaneEvent::Overrun(7)]), is_overrun, "{tells:?}");
    }
}

#[test]
fn a_stream_that_ended_early_is_known_once_its_accept_was_acknowledged() {
    let now = Instant::now();
    let mut worker = end(true, now);
    let credit = worker.open(1, 1000, 0, now).unwrap();
    assert!(said(&mut worker, now).is_some());
    worker.finish(&credit, None);
    assert!(said(&mut worker, now).is_some());
    assert_eq!(worker.unheard(), 1);
    hear(&mut worker, now, 0, 1);
    assert_eq!(worker.unheard(), 0);
}

#[test]
fn thousands_that_end_with_long_errors_do_not_end_their_lane() {
    let now = Instant::now();
    let mut worker = end(true, now);
    let credits: Vec<_> = (0..3000).map(|key| worker.open(key, 1 << 20, key, now).unwrap()).collect();
    let text = "\u{20ac}".repeat(10_000);
    credits.iter().for_each(|credit| worker.finish(credit, Some(text.as_bytes())));
    let (mut texts, mut tells) = (Vec::new(), Vec::new());
    while let Some(message) = worker.poll(now, &mut tells) {
        let frames = Frames::new(&message[frame::HEADER..]).map(Result::unwrap);
        texts.extend(frames.filter(|frame| frame.kind == frame::ERROR).map(|frame| frame.body.len()));
        let ack = worker.last_sent();
        hear(&mut worker, now, 0, ack);
    }
    assert!(!worker.is_over() && tells.is_empty());
    assert_eq!((texts.len(), texts[0], texts[2999]), (3000, 30_000, 255));
}

#[test]
fn a_peer_that_answers_for_ever_and_acknowledges_nothing_is_given_up() {
    let now = Instant::now();
    let mut worker = end(true, now);
    let credit = worker.open(1, 1 << 20, 7, now).unwrap();
    worker.send(&credit, b"x").unwrap();
    while worker.poll(now, &mut vec![]).is_some() {}
    let mut answers = 0;
    while !worker.is_over() {
        worker.ask(now);
        while worker.poll(now, &mut vec![]).is_some() {}
        hear(&mut worker, now, frame::PONG, 0);
        worker.poll(now, &mut vec![]);
        answers += 1;
    }
    assert_eq!(answers, MAX_VAIN + 1);
    // One that acknowledges now and then is borne.
    let mut worker = end(true, now);
    let credit = worker.open(1, 1 << 20, 7, now).unwrap();
    for ack in 0..3 * u64::from(MAX_VAIN) {
        worker.send(&credit, b"x").unwrap();
        worker.ask(now);
        while worker.poll(now, &mut vec![]).is_some() {}
        hear(&mut worker, now, frame::PONG, ack / 10);
    }
    assert!(!worker.is_over());
}

#[test]
fn so_many_that_ended_unheard_and_no_more_are_kept() {
    let now = Instant::now();
    let mut worker = end(true, now);
    for key in 0..=MAX_UNHEARD as u64 {
        assert!(!worker.is_over());
        let credit = worker.open(key, 1, key, now).unwrap();
        worker.finish(&credit, None);
        while worker.poll(now, &mut vec![]).is_some() {}
    }
    assert!(worker.is_over() || worker.poll(now, &mut vec![]).is_some_and(|_| worker.is_over()));
}
