//! Level 0 of the wire protocol, byte for byte: subjects, headers and markers. `docs/wire.md` describes it.

use crate::error::{Error, Result};
use bytes::Bytes;

/// The header of a request with the client's id.
pub const CONNECT_ID: &str = "Connect-ID";
/// The header of an announcement with the process that made it, so that each process recognises its own.
pub const ORIGIN: &str = "Presence-Origin";
/// The header of a request that offers a lane.
pub const LANE: &str = "Presence-Lane";
/// The header of a stream's error with the code of that error.
pub const ERROR_CODE: &str = "Presence-Error";
/// How many bytes the header with a code adds to a payload at most, as nats-server counts them.
pub const MAX_ERROR_CODE: usize = "NATS/1.0\r\n: 2147483647\r\n\r\n".len() + ERROR_CODE.len();
/// The payload that ends a stream.
pub const END: &[u8] = b"__STREAM_END__";
/// The beginning of the payload that ends a stream with an error; the text follows.
pub const ERROR: &[u8] = b"__STREAM_ERROR__:";
/// Data must not begin with this part of ERROR: a peer may compare no more of it.
const ERROR_STEM: &[u8] = b"__STREAM_ERROR__";
/// The text of a stream's error when its service is at its limit.
pub const BUSY: &str = "server busy";
/// The text of a stream's error when the client is offline in the worker's process.
pub const OFFLINE: &str = "the client is offline";

/// The meaning of a message to a stream's inbox.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// A message of the stream.
    Data,
    /// The end of the stream.
    End,
    /// The end of the stream by an error with this text.
    Error(&'a [u8]),
    /// nats-server acknowledges that a JetStream stream has stored the request.
    JetStreamAck,
}

/// Parses a payload that came to a stream's inbox.
#[must_use]
pub fn answer(payload: &[u8]) -> Answer<'_> {
    // Hardly any other payload begins like a marker, so that one comparison decides nearly always.
    if !payload.starts_with(b"__STREAM_") {
        if is_jetstream_ack(payload) { Answer::JetStreamAck } else { Answer::Data }
    } else if payload == END {
        Answer::End
    } else if let Some(text) = payload.strip_prefix(ERROR) {
        Answer::Error(text)
    } else {
        Answer::Data
    }
}

/// Returns true for data that a reader on level 0 would take for a marker or an acknowledgement of JetStream.
#[must_use]
pub fn is_reserved(data: &[u8]) -> bool {
    (data.starts_with(b"__STREAM_") && (data.starts_with(END) || data.starts_with(ERROR_STEM)))
        || is_jetstream_ack(data)
}

/// Returns true for a payload of exactly the form that nats-server sends to the reply subject of a message when a
/// JetStream stream has stored it, or has refused it.
fn is_jetstream_ack(payload: &[u8]) -> bool {
    // This one comparison decides for nearly all payloads.
    if !payload.starts_with(b"{\"") {
        return false;
    }
    let Ok(text) = std::str::from_utf8(payload) else { return false };
    let text = match text.strip_prefix("{\"error\":{\"code\":") {
        Some(error) => error.split_once("},").map(|(_, rest)| rest),
        None => text.strip_prefix('{'),
    };
    // Names have no quotation marks, so the next one ends the name.
    let Some(rest) = text.and_then(|text| text.strip_prefix("\"stream\":\"")) else { return false };
    let Some((_, rest)) = rest.split_once("\",") else { return false };
    let rest = match rest.strip_prefix("\"domain\":\"") {
        Some(domain) => domain.split_once("\",").map_or("", |(_, rest)| rest),
        None => rest,
    };
    let Some(rest) = rest.trim_start().strip_prefix("\"seq\":") else { return false };
    let rest = rest.trim_start_matches(|c: char| c == ' ' || c.is_ascii_digit());
    matches!(rest, "}" | ",\"duplicate\":true}" | ",\"duplicate\": true}")
}

/// Returns the payload that ends a stream with an error, truncated to `max` bytes.
#[must_use]
pub fn error(text: &[u8], max: usize) -> Bytes {
    [ERROR, truncate_utf8(text, max.saturating_sub(ERROR.len()))].concat().into()
}

/// Truncates a text to `max` bytes, between two characters.
#[must_use]
pub fn truncate_utf8(text: &[u8], max: usize) -> &[u8] {
    let is_inside = |at: usize| text.get(at).is_some_and(|byte| byte & 0xc0 == 0x80);
    let end = max.min(text.len());
    let whole = (end.saturating_sub(3)..=end).rev().find(|at| !is_inside(*at));
    text.get(..whole.unwrap_or(end)).unwrap_or_default()
}

/// How much of nats-server's max_payload is not for a message of a stream but for the headers of a lane message and its
/// frame.
const MESSAGE_RESERVE: usize = 64;

/// Returns how large a message of a stream may be, for a nats-server with this max_payload. It is the same on both
/// levels, so that a worker need not know which of them the gateway uses.
#[must_use]
pub const fn max_message(max_payload: usize) -> usize {
    max_payload.saturating_sub(MESSAGE_RESERVE)
}

/// The limit of a subject, in bytes: nats-server closes a connection that sends a line of more than 4096 bytes, and a
/// line may have two subjects.
pub const MAX_SUBJECT: usize = 2048;
/// The limit of a prefix of subjects, and of a queue group.
pub const MAX_PREFIX: usize = 1024;

/// What a subject is for: this decides whether it may have wildcards.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To publish to.
    Publish,
    /// To subscribe to.
    Subscribe,
}

/// Checks a subject, which the error calls `what`.
///
/// # Errors
/// `Status::Invalid`, with a message that has the subject and what is wrong with it.
pub fn check_subject(what: &str, subject: &str, purpose: Use) -> Result<()> {
    let wrong = |why: &str| Err(Error::invalid(format!("{what} {subject:?} {why}")));
    check_length(what, subject, MAX_SUBJECT)?;
    if subject.is_empty() {
        return wrong("is empty");
    }
    // Nearly all subjects are visible ASCII. A few vector instructions check that, because unlike `all` this does not stop
    // early.
    let is_visible = subject.bytes().fold(true, |is_visible, byte| is_visible & byte.is_ascii_graphic());
    if !is_visible && subject.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return wrong("has white space or a control character");
    }
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        match token {
            "" => return wrong("has an empty token: a dot must be between two tokens"),
            "*" | ">" if purpose == Use::Publish => {
                return wrong("has a wildcard, which only a subject to subscribe to may have");
            }
            ">" if tokens.peek().is_some() => return wrong("has > before its end: > must be the last token"),
            _ => {}
        }
    }
    Ok(())
}

/// Checks the length of a text, which the error calls `what`. The error does not have the text, which is too long for
/// it.
///
/// # Errors
/// `Status::Invalid`.
pub fn check_length(what: &str, text: &str, max: usize) -> Result<()> {
    if text.len() > max {
        return Err(Error::invalid(format!("{what} is {} bytes; the limit is {max}", text.len())));
    }
    Ok(())
}

/// Returns true if a request may be answered at this reply subject. The sender of a request chooses it, so it must not
/// make this process announce clients offline or publish to the server's own subjects.
#[must_use]
pub fn is_valid_reply_subject(reply: &str, offline_subject: &str) -> bool {
    !reply.starts_with('$') && reply != offline_subject && check_subject("reply", reply, Use::Publish).is_ok()
}

/// A request's own headers, in as little memory as possible: they live as long as its sender. A name with several values
/// is there several times.
pub(crate) type Headers = Box<[(Box<str>, Box<str>)]>;

/// Checks a header that a caller wants to send with a request.
///
/// # Errors
/// `Status::Invalid` for a name or value that cannot be sent, or a name that is reserved.
pub fn check_header(name: &str, value: &str) -> Result<()> {
    let is_valid = |c: char| c.is_ascii_graphic() && c != ':';
    if name.is_empty() || !name.chars().all(is_valid) {
        return Err(Error::invalid(format!("header name {name:?} must be visible ASCII characters without a colon")));
    }
    let lower = name.to_ascii_lowercase();
    if lower == "connect-id" || lower.starts_with("nats-") || lower.starts_with("presence-") {
        return Err(Error::invalid(format!("header {name} is reserved, as are Connect-ID, Nats-… and Presence-…")));
    }
    if value.chars().any(char::is_control) {
        // The value is not in the error: it may be a secret.
        return Err(Error::invalid(format!("the value of header {name} has a control character")));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_parsed() {
        assert_eq!(answer(b"__STREAM_END__"), Answer::End);
        assert_eq!(answer(b"__STREAM_ERROR__:no such model"), Answer::Error(b"no such model"));
        assert_eq!(answer(b"__STREAM_ERROR__:"), Answer::Error(b""));
        for data in [&b""[..], b"token", b"__STREAM_", b"__STREAM_END", b"__STREAM_ERROR__", b"__STREAM_END__ "] {
            assert_eq!(answer(data), Answer::Data, "{data:?}");
        }
        assert_eq!(error(b"server busy", 1024), "__STREAM_ERROR__:server busy");
        assert_eq!(error(b"0123456789", 20), "__STREAM_ERROR__:012");
        assert_eq!(error(b"0123456789", 1), "__STREAM_ERROR__:");
    }

    #[test]
    fn text_is_truncated_between_characters() {
        let text = "a\u{e4}\u{20ac}\u{1f600}";
        let lengths: Vec<_> =
            (0..=11).map(|max| str::from_utf8(truncate_utf8(text.as_bytes(), max)).unwrap().chars().count()).collect();
        assert_eq!(lengths, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4]);
        assert_eq!(truncate_utf8(&[0x80; 10], 5), [0x80; 5], "bytes that are not UTF-8 are truncated, too");
    }

    #[test]
    fn data_that_looks_like_a_marker_is_reserved() {
        for data in [&b"__STREAM_END__"[..], b"__STREAM_END__ and more", b"__STREAM_ERROR__", b"__STREAM_ERROR__:x"] {
            assert!(is_reserved(data), "{data:?}");
        }
        for data in [&b""[..], b"__STREAM_", b"__STREAM_END_", b" __STREAM_END__", b"__STREAM_ERROR_"] {
            assert!(!is_reserved(data), "{data:?}");
        }
    }

    #[test]
    fn acknowledgements_of_jetstream_are_recognized_and_reserved() {
        for ack in [
            r#"{"stream":"AUDIT","seq":12}"#,
            r#"{"stream":"AUDIT", "seq":12}"#,
            r#"{"stream":"AUDIT","domain":"hub","seq":12}"#,
            r#"{"stream":"AUDIT","seq":12,"duplicate":true}"#,
            r#"{"stream":"AUDIT","seq":12,"duplicate": true}"#,
            r#"{"error":{"code":503,"err_code":10077,"description":"maximum messages exceeded"},"stream":"AUDIT","seq":0}"#,
        ] {
            assert_eq!(answer(ack.as_bytes()), Answer::JetStreamAck, "{ack}");
            assert!(is_reserved(ack.as_bytes()), "{ack}");
        }
        for data in [
            r#"{"#,
            r#"{""#,
            r#"{"stream":"AUDIT"}"#,
            r#"{"stream":"AUDIT","seq":12,"text":"hello"}"#,
            r#"{"stream":"AUDIT","seq":12} "#,
            r#"{"stream":"AUDIT","seq":"12"}"#,
            r#"{"seq":12,"stream":"AUDIT"}"#,
            r#"{"error":{"code":503}}"#,
            r#"{"stream":"AUDIT","domain":"hub"}"#,
        ] {
            assert_eq!(answer(data.as_bytes()), Answer::Data, "{data}");
            assert!(!is_reserved(data.as_bytes()), "{data}");
        }
    }

    #[test]
    fn subjects_are_checked() {
        for good in ["a", "a.b.c", "llm.generate", "a*b.c>d", "客户.离线"] {
            assert!(check_subject("subject", good, Use::Publish).is_ok(), "{good}");
        }
        for bad in ["", ".", "a.", ".a", "a..b", "a b", "a\tb", "a\r\nb", "a\0", "a.*", ">", "a.>"] {
            assert!(check_subject("subject", bad, Use::Publish).is_err(), "{bad:?}");
        }
        for good in ["*", ">", "a.*.c", "a.>"] {
            assert!(check_subject("subject", good, Use::Subscribe).is_ok(), "{good}");
        }
        assert!(check_subject("subject", "a.>.b", Use::Subscribe).is_err());
    }

    #[test]
    fn dangerous_reply_subjects_are_invalid() {
        assert!(is_valid_reply_subject("_INBOX.x.1", "client.offline"));
        for bad in ["", "client.offline", "$SYS.REQ", "$JS.API", "a.*", "a.>", "a b"] {
            assert!(!is_valid_reply_subject(bad, "client.offline"), "{bad:?}");
        }
    }

    #[test]
    fn headers_that_cannot_be_sent_or_are_reserved_are_refused() {
        check_header("X-Model", "gpt").unwrap();
        for (name, value) in [("", "x"), ("a b", "x"), ("a:", "x"), ("ä", "x"), ("X", "a\r\nb"), ("X", "a\rb")] {
            assert!(check_header(name, value).is_err(), "{name:?} {value:?}");
        }
        for reserved in ["Connect-ID", "connect-id", "Nats-Expected", "Presence-Lane"] {
            assert!(check_header(reserved, "x").is_err(), "{reserved}");
        }
    }
}
