//! Messages in the protocol of nats-server, one behind the other: what a send appends is what the socket carries.

use bytes::{Buf, BufMut, Bytes, BytesMut};

/// How large several messages together may be.
const MAX: usize = 32 << 10;

/// What a first line has besides subjects: a verb, spaces, two sizes and two line breaks.
const LINE: usize = "HPUB    \r\n\r\n".len() + 2 * 20;

/// Encoded messages, without the line break after the last one.
#[derive(Default)]
pub(crate) struct EncodedMessages {
    pub(crate) bytes: BytesMut,
    pub(crate) count: usize,
}

/// A message that was taken out of [`EncodedMessages`].
pub(crate) struct EncodedMessage {
    pub(crate) subject: String,
    /// Empty: none.
    pub(crate) reply: String,
    /// A whole block, or empty.
    pub(crate) headers: String,
    pub(crate) payload: Bytes,
}

impl EncodedMessages {
    /// `capacity`: how many bytes are expected.
    pub(crate) fn with_capacity(capacity: usize) -> EncodedMessages {
        EncodedMessages { bytes: BytesMut::with_capacity(capacity.min(MAX)), count: 0 }
    }

    /// Whether a message of this size may follow.
    #[inline]
    pub(crate) fn has_room(&self, size: usize) -> bool {
        self.bytes.len() + size <= MAX
    }

    /// Adds a message. `headers` is a whole block with the empty line at its end, or empty.
    #[inline]
    pub(crate) fn push(&mut self, subject: &str, reply: &str, headers: &[u8], payload: &[u8]) {
        self.begin_message();
        let to = &mut self.bytes;
        to.reserve(LINE + subject.len() + reply.len() + headers.len() + payload.len());
        to.put_slice(if headers.is_empty() { b"PUB " } else { b"HPUB " });
        to.put_slice(subject.as_bytes());
        to.put_u8(b' ');
        if !reply.is_empty() {
            to.put_slice(reply.as_bytes());
            to.put_u8(b' ');
        }
        let mut number = itoa::Buffer::new();
        if !headers.is_empty() {
            to.put_slice(number.format(headers.len()).as_bytes());
            to.put_u8(b' ');
        }
        to.put_slice(number.format(headers.len() + payload.len()).as_bytes());
        to.put_slice(b"\r\n");
        to.put_slice(headers);
        to.put_slice(payload);
    }

    /// Adds a message that was encoded before.
    pub(crate) fn append(&mut self, message: &Bytes) {
        self.begin_message();
        self.bytes.put_slice(message);
    }

    #[inline]
    fn begin_message(&mut self) {
        if self.count > 0 {
            self.bytes.put_slice(b"\r\n");
        }
        self.count += 1;
    }

    /// Takes the first message.
    pub(crate) fn take_first(&mut self) -> Option<EncodedMessage> {
        let end = self.bytes.windows(2).position(|pair| pair == b"\r\n")?;
        let line = self.bytes.split_to(end);
        self.bytes.advance(2);
        let words: Vec<&str> = std::str::from_utf8(&line).ok()?.split(' ').collect();
        let (subject, reply, headers, size) = match words[..] {
            ["PUB", subject, size] => (subject, "", "0", size),
            ["PUB", subject, reply, size] => (subject, reply, "0", size),
            ["HPUB", subject, headers, size] => (subject, "", headers, size),
            ["HPUB", subject, reply, headers, size] => (subject, reply, headers, size),
            _ => return None,
        };
        let (headers, size) = (headers.parse::<usize>().ok()?, size.parse::<usize>().ok()?);
        let mut payload = self.bytes.split_to(size.min(self.bytes.len()));
        let headers = payload.split_to(headers.min(payload.len()));
        self.bytes.advance(self.bytes.len().min(2));
        self.count -= 1;
        let headers = String::from_utf8_lossy(&headers).into_owned();
        Some(EncodedMessage { subject: subject.into(), reply: reply.into(), headers, payload: payload.freeze() })
    }
}

/// Encodes headers as a block with the empty line at its end. Without headers it is empty.
pub(crate) fn headers_block<'a>(headers: impl IntoIterator<Item = (&'a str, &'a str)>) -> String {
    let mut headers = headers.into_iter().peekable();
    if headers.peek().is_none() {
        return String::new();
    }
    // Enough for a lane's offer and a client's id.
    let mut block = String::with_capacity(256);
    block.push_str("NATS/1.0\r\n");
    for (name, value) in headers {
        block.extend([name, ": ", value, "\r\n"]);
    }
    block.push_str("\r\n");
    block
}

#[cfg(test)]
mod tests {
    use super::*;

    fn encoded() -> EncodedMessages {
        let mut messages = EncodedMessages::default();
        messages.push("a", "", b"", b"x\r\ny");
        messages.push("b", "r", b"NATS/1.0\r\nN: v\r\n\r\n", b"");
        messages.push("c", "", b"", b"");
        messages
    }

    #[test]
    fn messages_are_encoded_as_nats_server_reads_them() {
        let messages = encoded();
        let expected = "PUB a 4\r\nx\r\ny\r\nHPUB b r 18 18\r\nNATS/1.0\r\nN: v\r\n\r\n\r\nPUB c 0\r\n";
        assert_eq!((&messages.bytes[..], messages.count), (expected.as_bytes(), 3));
        let mut again = EncodedMessages::default();
        again.append(&Bytes::from_static(b"PUB a 4\r\nx\r\ny"));
        again.append(&Bytes::from_static(b"PUB c 0\r\n"));
        assert_eq!(&again.bytes[..], b"PUB a 4\r\nx\r\ny\r\nPUB c 0\r\n");
    }

    #[test]
    fn headers_end_with_an_empty_line() {
        assert_eq!(headers_block([("A", "1"), ("B", "2 3")]), "NATS/1.0\r\nA: 1\r\nB: 2 3\r\n\r\n");
        assert_eq!(headers_block([]), "");
    }

    #[test]
    fn messages_are_taken_in_order() {
        let mut messages = encoded();
        let mut taken = std::iter::from_fn(|| messages.take_first());
        for (subject, reply, headers, payload) in
            [("a", "", "", &b"x\r\ny"[..]), ("b", "r", "NATS/1.0\r\nN: v\r\n\r\n", b""), ("c", "", "", b"")]
        {
            let one = taken.next().unwrap();
            let read = (&one.subject[..], &one.reply[..], &one.headers[..], &one.payload[..]);
            assert_eq!(read, (subject, reply, headers, payload));
        }
        assert!(taken.next().is_none());
        assert_eq!((messages.count, messages.bytes.len()), (0, 0));
    }

    #[test]
    fn several_messages_have_a_limit() {
        let mut messages = EncodedMessages::with_capacity(1 << 30);
        assert!(messages.bytes.capacity() <= 2 * MAX && messages.has_room(MAX) && !messages.has_room(MAX + 1));
        messages.push("a", "", b"", &[0; 1000]);
        assert!(messages.has_room(MAX - 1100) && !messages.has_room(MAX - 1000));
    }
}
