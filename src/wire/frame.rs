//! The encoding of lane messages: a header, then frames. `docs/wire.md` describes each byte.
//!
//! Any bytes can be read: they give frames or [`Malformed`], and nothing is allocated for them.

use bytes::BytesMut;

/// The version of the lane protocol; a message's first byte.
pub(crate) const VERSION: u8 = 1;
/// The size of a message's header: version, flags, sequence, acknowledgement, the numbers of a PING and a PONG, and the
/// server, all little-endian.
pub(crate) const HEADER: usize = 30;
/// How many bytes a frame adds to its body at most.
pub(crate) const MAX_FRAME_HEADER: usize = 11;
const _: () = assert!(HEADER + MAX_FRAME_HEADER + crate::wire::level0::max_message(1024) <= 1024);

/// The peer must answer at once, with the PING's number.
pub(crate) const PING: u8 = 1;
/// The message answers the PING with the number in its header.
pub(crate) const PONG: u8 = 2;
/// Messages are missing: everything after the acknowledgement must be sent again.
pub(crate) const GAP: u8 = 4;
/// The lane is closed, or never existed.
pub(crate) const RESET: u8 = 8;
/// The worker has no acknowledgement yet: a gateway that does not know the lane begins it.
pub(crate) const NEW: u8 = 16;

/// A frame's kind: the worker accepts the request whose key is the body.
pub(crate) const ACCEPT: u8 = 1;
/// A message of the stream.
pub(crate) const DATA: u8 = 2;
/// The stream's end.
pub(crate) const END: u8 = 3;
/// The stream's end by an error; the body is its text.
pub(crate) const ERROR: u8 = 4;
/// The gateway cancels the stream; the body is one byte, the reason: a status without its sign.
pub(crate) const CANCEL: u8 = 5;
/// The gateway's reader has consumed so much of the window: eight bytes, little-endian.
pub(crate) const CREDIT: u8 = 6;
/// The code of the error that follows: four bytes, little-endian.
pub(crate) const CODE: u8 = 7;

/// Bytes that are not a lane message of this version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Malformed;

/// The part of a message before its frames.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) flags: u8,
    /// With frames: the message's own number, from 1 on. Without: the number of the last message with frames.
    pub(crate) sequence: u64,
    /// All messages up to this number have come.
    pub(crate) ack: u64,
    /// With PING: its number, one more for each PING.
    pub(crate) ping: u32,
    /// With PONG: the number of the PING that it answers.
    pub(crate) pong: u32,
    /// The nats-server that the sender is connected to, as [`server`] has it. 0: not known.
    pub(crate) server: u32,
}

/// A nats-server's id for the header, hashed by FNV-1a. The ends of a lane compare it to know whether they share a
/// server.
pub(crate) fn server(id: &str) -> u32 {
    id.bytes().fold(0x811c_9dc5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

impl Header {
    /// The header of a message without PING and PONG.
    pub(crate) fn of(flags: u8, sequence: u64, ack: u64) -> Header {
        Header { flags, sequence, ack, ping: 0, pong: 0, server: 0 }
    }

    pub(crate) fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    pub(crate) fn read(message: &[u8]) -> Result<Header, Malformed> {
        let (header, _) = message.split_first_chunk::<HEADER>().ok_or(Malformed)?;
        let [version, flags, numbers @ ..] = header;
        if *version != VERSION {
            return Err(Malformed);
        }
        let (sequence, rest) = numbers.split_first_chunk().ok_or(Malformed)?;
        let (ack, rest) = rest.split_first_chunk().ok_or(Malformed)?;
        let (ping, rest) = rest.split_first_chunk().ok_or(Malformed)?;
        let (pong, rest) = rest.split_first_chunk().ok_or(Malformed)?;
        let server = rest.first_chunk().ok_or(Malformed)?;
        Ok(Header {
            flags: *flags,
            sequence: u64::from_le_bytes(*sequence),
            ack: u64::from_le_bytes(*ack),
            ping: u32::from_le_bytes(*ping),
            pong: u32::from_le_bytes(*pong),
            server: u32::from_le_bytes(*server),
        })
    }

    pub(crate) fn bytes(&self) -> [u8; HEADER] {
        let mut bytes = [VERSION; HEADER];
        bytes[1] = self.flags;
        bytes[2..10].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[10..18].copy_from_slice(&self.ack.to_le_bytes());
        bytes[18..22].copy_from_slice(&self.ping.to_le_bytes());
        bytes[22..26].copy_from_slice(&self.pong.to_le_bytes());
        bytes[26..].copy_from_slice(&self.server.to_le_bytes());
        bytes
    }
}

/// The gateway has enlarged the stream's window to so many bytes: eight bytes, little-endian.
pub(crate) const WINDOW: u8 = 8;

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Frame<'a> {
    pub(crate) kind: u8,
    /// The stream's id.
    pub(crate) stream: u32,
    pub(crate) body: &'a [u8],
}

/// The requests that a lane message accepts: their keys, and the ids of their streams.
pub(crate) fn accepts(message: &[u8]) -> impl Iterator<Item = (u64, u32)> {
    let frames = Frames::new(message.get(HEADER..).unwrap_or_default()).map_while(Result::ok);
    frames.filter(|frame| frame.kind == ACCEPT).filter_map(|frame| {
        let key = frame.body.first_chunk()?;
        Some((u64::from_le_bytes(*key), frame.stream))
    })
}

/// Reads frames one after another.
#[derive(Clone)]
pub(crate) struct Frames<'a>(&'a [u8]);

impl<'a> Frames<'a> {
    pub(crate) fn new(bytes: &'a [u8]) -> Frames<'a> {
        Frames(bytes)
    }

    /// How many bytes are left to read.
    pub(crate) fn left(&self) -> usize {
        self.0.len()
    }

    #[inline]
    fn read(&mut self) -> Result<Frame<'a>, Malformed> {
        // Nearly all frames have a stream and a length of up to two bytes.
        let (kind, mut rest) = self.0.split_first().ok_or(Malformed)?;
        let stream = u32::try_from(number(&mut rest)?).map_err(|_| Malformed)?;
        let length = usize::try_from(number(&mut rest)?).map_err(|_| Malformed)?;
        let (body, rest) = rest.split_at_checked(length).ok_or(Malformed)?;
        self.0 = rest;
        Ok(Frame { kind: *kind, stream, body })
    }
}

impl<'a> Iterator for Frames<'a> {
    type Item = Result<Frame<'a>, Malformed>;

    /// Returns None after a malformed frame.
    #[inline]
    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let frame = self.read();
        if frame.is_err() {
            self.0 = &[];
        }
        Some(frame)
    }
}

/// Consecutive DATA frames of one stream: messages that lie one behind the other in a buffer, and are read one by one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Run {
    /// Their place in the message.
    start: u32,
    end: u32,
    pub(crate) count: u32,
    /// The bytes of all their bodies.
    pub(crate) bytes: u64,
}

impl Run {
    /// The run of `count` frames between two positions of a message, with `bytes` in their bodies.
    pub(crate) fn new(start: usize, end: usize, count: u32, bytes: u64) -> Run {
        Run { start: start as u32, end: end as u32, count, bytes }
    }

    /// How many bytes it takes in its message.
    pub(crate) fn size(&self) -> usize {
        (self.end - self.start) as usize
    }

    /// Copies the frames from `message` to the end of `copy`, and refers to them there from now on.
    pub(crate) fn move_to(&mut self, copy: &mut BytesMut, message: &[u8]) {
        let start = copy.len();
        copy.extend_from_slice(message.get(self.start as usize..self.end as usize).unwrap_or_default());
        (self.start, self.end) = (start as u32, copy.len() as u32);
    }

    /// The frames' bodies. `message` must be the message that contains the run.
    #[inline]
    pub(crate) fn bodies<'a>(&self, message: &'a [u8]) -> impl Iterator<Item = &'a [u8]> {
        let bytes = message.get(self.start as usize..self.end as usize).unwrap_or_default();
        Frames(bytes).map_while(|frame| Some(frame.ok()?.body))
    }

    /// Splits off the first `count` frames.
    pub(crate) fn split(&mut self, message: &[u8], count: u32) -> Run {
        let mut first = Run { count, ..*self };
        first.bytes = self.bodies(message).take(count as usize).map(|body| body.len() as u64).sum();
        let mut frames = Frames(message.get(self.start as usize..self.end as usize).unwrap_or_default());
        frames.by_ref().take(count as usize).for_each(drop);
        first.end = self.end - frames.left() as u32;
        (self.start, self.count, self.bytes) = (first.end, self.count - count, self.bytes - first.bytes);
        first
    }
}

/// Reads a variable-length number: seven bits in each byte, the lowest first; the eighth says that more follow.
#[inline]
fn number(bytes: &mut &[u8]) -> Result<u64, Malformed> {
    let mut value = 0;
    for shift in (0..35).step_by(7) {
        let (byte, rest) = bytes.split_first().ok_or(Malformed)?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err(Malformed)
}

/// Writes a frame.
#[inline]
pub(crate) fn write(to: &mut BytesMut, kind: u8, stream: u32, body: &[u8]) {
    let mut header = [kind; MAX_FRAME_HEADER];
    let mut at = 1;
    write_number(&mut header, &mut at, u64::from(stream));
    write_number(&mut header, &mut at, body.len() as u64);
    to.extend_from_slice(&header[..at]);
    to.extend_from_slice(body);
}

#[inline]
fn write_number(to: &mut [u8; MAX_FRAME_HEADER], at: &mut usize, mut number: u64) {
    while number >= 0x80 && *at < MAX_FRAME_HEADER {
        to[*at] = number as u8 | 0x80;
        *at += 1;
        number >>= 7;
    }
    to[*at] = number as u8;
    *at += 1;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_are_read_as_written() {
        let header = Header {
            flags: PING | NEW,
            sequence: 0x0102_0304_0506_0708,
            ack: u64::MAX,
            ping: 0x0102_0304,
            pong: 5,
            server: 0x0607_0809,
        };
        let bytes = header.bytes();
        assert_eq!(bytes[..10], [1, 17, 8, 7, 6, 5, 4, 3, 2, 1]);
        assert_eq!(bytes[18..], [4, 3, 2, 1, 5, 0, 0, 0, 9, 8, 7, 6]);
        assert_eq!(Header::read(&bytes), Ok(header));
        assert_eq!(Header::read(&bytes[..29]), Err(Malformed));
        assert_eq!(Header::read(&[2; 30]), Err(Malformed), "another version");
    }

    #[test]
    fn servers_are_hashed_as_in_the_document() {
        assert_eq!((server(""), server("a"), server("foobar")), (0x811c_9dc5, 0xe40c_292c, 0xbf9c_f968));
    }

    #[test]
    fn frames_are_read_as_written() {
        let mut bytes = BytesMut::new();
        let long = [7; 300];
        let frames = [(DATA, 1, &b"token"[..]), (END, 127, b""), (DATA, 128, &long), (99, u32::MAX, b"x")];
        for (kind, stream, body) in frames {
            write(&mut bytes, kind, stream, body);
        }
        assert_eq!(bytes[..8], [2, 1, 5, b't', b'o', b'k', b'e', b'n']);
        assert_eq!(bytes[8..11], [3, 127, 0]);
        assert_eq!(bytes[11..16], [2, 0x80, 1, 0xac, 2]);
        let read: Vec<_> = Frames::new(&bytes).map(Result::unwrap).map(|f| (f.kind, f.stream, f.body)).collect();
        assert_eq!(read, frames);
    }

    #[test]
    fn any_bytes_give_frames_or_malformed() {
        for bytes in [
            &[2][..],
            &[2, 1],
            &[2, 1, 5, 0],
            &[2, 0x80, 0x80, 0x80, 0x80, 0x80, 0],
            &[2, 0xff, 0xff, 0xff, 0xff, 0x7f, 0],
            &[2, 0, 0xff, 0xff, 0xff, 0xff, 0x7f],
        ] {
            let read: Vec<_> = Frames::new(bytes).collect();
            assert_eq!(read, [Err(Malformed)], "{bytes:?}");
        }
        let mut state = 1_u64;
        for _ in 0..if cfg!(miri) { 100 } else { 100_000 } {
            let bytes: Vec<u8> = (0..state % 40)
                .map(|_| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    (state >> 33) as u8
                })
                .collect();
            state = state.wrapping_add(1);
            let total: usize = Frames::new(&bytes).flatten().map(|frame| frame.body.len()).sum();
            assert!(total <= bytes.len());
        }
    }

    #[test]
    fn runs_are_split_where_frames_end() {
        let mut bytes = BytesMut::from(&b"before"[..]);
        for body in [&b"a"[..], b"bcd", b"", b"ef"] {
            write(&mut bytes, DATA, 300, body);
        }
        let all = Run { start: 6, end: bytes.len() as u32, count: 4, bytes: 6 };
        let mut rest = all;
        let first = rest.split(&bytes, 2);
        // Each frame has a kind, two bytes of its stream, and one of its length.
        assert_eq!(first, Run { start: 6, end: 18, count: 2, bytes: 4 });
        assert_eq!(rest, Run { start: 18, end: 28, count: 2, bytes: 2 });
        assert!(first.bodies(&bytes).eq([&b"a"[..], b"bcd"]) && rest.bodies(&bytes).eq([&b""[..], b"ef"]));
        let mut none = all;
        assert_eq!(none.split(&bytes, 0), Run { start: 6, end: 6, count: 0, bytes: 0 });
        assert_eq!(none, all);
    }
}
