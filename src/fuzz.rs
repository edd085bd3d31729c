//! Properties that must hold for any input bytes. `fuzz/` drives them, and `cargo test` replays the inputs it has
//! found.

use crate::MAX_ID;
use crate::config::Config;
use crate::lane::event::{LaneEvent, Role};
use crate::lane::liveness::PeerTimeouts;
use crate::lane::state::State;
use crate::nats::dial;
use crate::nats::{HeaderMap, Message};
use crate::presence::client_id;
use crate::wire::frame::{self, Frame, Frames, Header, Run};
use crate::wire::level0::{self, Answer, Use};
use crate::wire::stream_error::{self, StreamError};
use bytes::{Bytes, BytesMut};
use std::collections::HashSet;
use std::time::{Duration, Instant};

pub use crate::ffi::fuzz::abi;

/// Takes numbers and slices from the input; 0 and empty slices when it is used up.
pub(crate) struct Choices<'a>(pub(crate) &'a [u8]);

impl<'a> Choices<'a> {
    pub(crate) fn is_over(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn byte(&mut self) -> u8 {
        self.0.split_off_first().copied().unwrap_or_default()
    }

    pub(crate) fn below(&mut self, limit: u8) -> u8 {
        self.byte() % limit
    }

    pub(crate) fn slice(&mut self) -> &'a [u8] {
        let length = usize::from(self.byte()).min(self.0.len());
        let (slice, rest) = self.0.split_at(length);
        self.0 = rest;
        slice
    }
}

/// The encoding of lane messages: what can be parsed is written the same again, and runs are split between frames.
pub fn frames(data: &[u8]) {
    if let Ok(header) = Header::read(data) {
        assert_eq!(header.bytes(), data[..frame::HEADER]);
    }
    let frames: Vec<Frame<'_>> = Frames::new(data).map_while(Result::ok).collect();
    let mut again = BytesMut::new();
    frames.iter().for_each(|frame| frame::write(&mut again, frame.kind, frame.stream, frame.body));
    assert_eq!(Frames::new(&again).collect::<Result<Vec<_>, _>>().as_deref(), Ok(&frames[..]));
    // The input may have numbers that are longer than necessary.
    assert!(again.len() <= data.len());
    let bodies: Vec<&[u8]> = frames.iter().map(|frame| frame.body).collect();
    let bytes = bodies.iter().map(|body| body.len() as u64).sum();
    let whole = Run::new(0, again.len(), frames.len() as u32, bytes);
    for count in 0..=frames.len().min(8) {
        let (mut rest, (before, behind)) = (whole, bodies.split_at(count));
        let first = rest.split(&again, count as u32);
        assert!(first.bodies(&again).eq(before.iter().copied()) && rest.bodies(&again).eq(behind.iter().copied()));
        assert_eq!((first.count + rest.count, first.bytes + rest.bytes), (whole.count, whole.bytes));
    }
}

/// One end of a lane, with any messages and calls: its memory is bounded, and each stream ends once.
pub fn lane(data: &[u8]) {
    let mut choices = Choices(data);
    let role = if choices.below(2) == 0 { Role::Worker } else { Role::Gateway };
    let ms = Duration::from_millis;
    let timeouts = PeerTimeouts {
        heartbeat_interval: ms(100),
        local_grace: ms(100),
        remote_grace: ms(200),
        peer_reconnect: ms(1000),
    };
    let mut now = Instant::now();
    let limit = 1 << (4 + choices.below(12));
    let mut state = State::new(role, limit, timeouts, now);
    state.set_max_payload(64 << choices.below(12));
    let (mut begun, mut ended) = (0_u64, HashSet::new());
    let (mut windows, mut events) = (Vec::new(), Vec::new());
    let (mut received, mut sent) = (0_u64, 0_u64);
    while !choices.is_over() {
        match choices.below(16) {
            0 => {
                let message = Bytes::copy_from_slice(choices.slice());
                received += u64::from(Header::read(&message).is_ok_and(|header| header.sequence == received + 1));
                let _ = state.receive(&message, now, &mut events, |_, _| None);
            }
            // An almost valid message: the next number, or one close to it, and some frames.
            1..=5 => {
                let (flags, ahead) = (choices.byte(), choices.below(4));
                let sequence = (received + u64::from(ahead)).saturating_sub(1);
                let ack = sent.saturating_sub(choices.below(3).into());
                // Small PING numbers, so that some of them were sent.
                let (ping, pong) = (choices.below(4).into(), choices.below(16).into());
                let server = choices.below(3).into();
                let header = Header { ping, pong, server, ..Header::of(flags, sequence, ack) };
                let mut message = BytesMut::from(&header.bytes()[..]);
                for _ in 0..choices.below(4) {
                    let kind = choices.below(8);
                    frame::write(&mut message, kind, choices.below(8).into(), choices.slice());
                }
                let message = message.freeze();
                let accept = |key: u64, _: u32| {
                    key.is_multiple_of(2).then(|| {
                        begun += 1;
                        (begun - 1, 1 << (key % 20))
                    })
                };
                received += u64::from(sequence == received + 1);
                let _ = state.receive(&message, now, &mut events, accept);
            }
            6 if role == Role::Worker => {
                if let Some(window) = state.open(choices.byte().into(), u32::from(choices.byte()) << 8, begun, now) {
                    windows.push(window);
                    begun += 1;
                }
            }
            7 => {
                if let Some(window) = windows.get(usize::from(choices.byte()))
                    && state.send(window, choices.slice()).is_err()
                {
                    state.notify_when_writable(window);
                }
            }
            8 => {
                if let Some(window) = windows.get(usize::from(choices.byte())) {
                    let lengths = [1, choices.below(8).into()];
                    let data = [7; 8];
                    let _ = state.send_many(window, &data[..1 + lengths[1]], &lengths);
                }
            }
            9 => {
                if let Some(window) = windows.get(usize::from(choices.byte())) {
                    // It has not ended: PeerGone or AcceptUndelivered may still come.
                    let coded = StreamError { code: 42, text: b"text" };
                    let errors = [None, Some(StreamError::new(b"text")), Some(coded)];
                    state.finish(window, errors[usize::from(choices.below(3))]);
                }
            }
            10 if choices.below(4) == 0 => state.set_window(choices.below(8).into(), u32::from(choices.byte()) << 14),
            10 => state.return_credit(choices.below(8).into(), u64::from(choices.byte()) << choices.below(56)),
            11 => state.cancel(choices.below(8).into(), choices.byte()),
            12 => now += ms(u64::from(choices.byte()) * 8),
            13 => match choices.below(4) {
                0 => state.connected(1),
                1 => state.disconnected(),
                2 => state.reconnected(choices.below(3).into(), now),
                _ => state.set_max_payload(usize::from(choices.byte()) << 8),
            },
            14 => match choices.below(8) {
                0 => state.close(&mut events),
                1..4 => state.request_ack(now),
                _ => state.no_responders(now, &mut events),
            },
            _ => {}
        }
        for _ in 0..choices.below(3) {
            let Some(message) = state.poll(now, &mut events) else {
                assert!(state.is_closed() || state.deadline().is_none_or(|at| at > now) || state.must_wake());
                break;
            };
            let Ok(header) = Header::read(&message) else { unreachable!("the state wrote it") };
            assert!(header.ack <= received, "acknowledges a message that never came");
            assert!(Frames::new(&message[frame::HEADER..]).all(|frame| frame.is_ok()));
            sent = sent.max(header.sequence);
        }
        for (owner, event) in events.drain(..) {
            let is_last = !matches!(event, LaneEvent::Data { .. } | LaneEvent::Writable);
            assert!(owner < begun && !ended.contains(&owner), "{event:?} for a stream that has ended");
            assert!(!matches!(event, LaneEvent::Failed(..0, _)), "{event:?} has a negative code");
            if is_last {
                ended.insert(owner);
            }
        }
    }
    assert!(state.backlog() <= 2 * limit.max(1 << 20) + (8 << 20) + data.len() * 64);
}

/// Level 0: markers, subjects, headers.
pub fn level0(data: &[u8]) {
    let means_data = level0::answer(data) == Answer::Data;
    assert!(means_data || level0::is_reserved(data));
    let max = data.len() / 2;
    let error = level0::error(data, max);
    assert!(error.len() <= max.max(level0::ERROR.len()));
    assert!(matches!(level0::answer(&error), Answer::Error(text) if data.starts_with(text)));
    let Ok(text) = std::str::from_utf8(data) else { return };
    let code = stream_error::code_in_header(text);
    assert!(code == 0 || (code > 0 && code.to_string() == text), "{text:?} is no code");
    let (publish, subscribe) =
        (level0::check_subject("x", text, Use::Publish), level0::check_subject("x", text, Use::Subscribe));
    assert!(publish.is_err() || subscribe.is_ok(), "a subject to publish to can be subscribed to");
    if subscribe.is_ok() {
        assert!(text.len() <= level0::MAX_SUBJECT && !text.contains([' ', '\t', '\r', '\n', '\0']));
        assert!(text.split('.').all(|token| !token.is_empty()));
    }
    assert!(!level0::is_valid_reply_subject(text, "client.offline") || (publish.is_ok() && text != "client.offline"));
    let (name, value) = text.split_once('=').unwrap_or((text, ""));
    if level0::check_header(name, value).is_ok() {
        assert!(!name.contains([':', '\r', '\n', ' ']) && !value.contains(['\r', '\n', '\0']));
        let mut headers = HeaderMap::new();
        headers.append(name, value);
        assert_eq!(Message::from_headers(headers).header(name), Some(value));
        assert!(!name.eq_ignore_ascii_case(level0::CONNECT_ID));
    }
}

/// Client ids: a valid id is its input, and can be a header value.
pub fn ids(data: &[u8]) {
    if let Ok(id) = client_id::id(data) {
        assert!(id.as_bytes() == data && data.len() <= MAX_ID && !id.chars().any(char::is_control));
        assert!(!id.contains(['\r', '\n']));
    }
}

/// Options and URLs: no error has a secret.
pub fn options(data: &[u8]) {
    let mut config = Config::new();
    let mut choices = Choices(data);
    while !choices.is_over() {
        let keys =
            ["password", "token", "nkey_seed", "user", "header.a", "inbox_prefix", "timeout_ms", "tls_cert_file"];
        let other = String::from_utf8_lossy(choices.slice());
        let key = keys.get(usize::from(choices.byte())).copied().unwrap_or(&other);
        let is_secret = ["password", "token", "nkey_seed"].contains(&key);
        let value = format!("{}{}", if is_secret { "hunter2" } else { "" }, String::from_utf8_lossy(choices.slice()));
        if let Err(error) = config.set(key, &value) {
            assert!(!is_secret || !error.message.contains("hunter2"), "{error}");
            assert_eq!(config.last_error(), Some(error));
        }
        let shown = format!("{config:?}");
        assert!(!shown.contains("hunter2"));
        assert!(config.set("password", "hunter2").is_ok());
    }
    let _ = (config.for_connect().is_ok(), config.for_request().is_ok());
    let text = String::from_utf8_lossy(data);
    let _ = dial::parse_servers(&text);
    // With a secret before it.
    if let Err(error) = dial::parse_servers(&format!("nats://someone:hunter2{text}@host:1")) {
        assert!(!error.message.contains("hunter2"), "{error}");
    }
}

/// Replays the inputs that `fuzz/` has kept.
#[cfg(test)]
#[test]
fn replay() {
    let names = ["frames", "lane", "level0", "ids", "options", "abi"];
    for (name, target) in names.into_iter().zip([frames, lane, level0, ids, options, abi]) {
        let folder = format!("{}/fuzz/corpus/{name}", env!("CARGO_MANIFEST_DIR"));
        let files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|file| file.unwrap().path()).collect();
        assert!(files.len() > 10, "{folder} has too few files");
        for file in files {
            target(&std::fs::read(&file).unwrap());
        }
    }
}
