//! Level 0 of the wire, byte for byte: subjects, headers and markers. `docs/wire.md` tells it to people.

use crate::error::{Error, Result, Status};
use async_nats::{HeaderMap, HeaderValue};
use bytes::Bytes;

/// The request's header with the client's id.
pub const CONNECT_ID: &str = "Connect-ID";
/// An announcement's header with the process that made it, so that it knows its own.
pub const ORIGIN: &str = "Presence-Origin";
/// The request's header that offers a lane.
pub const LANE: &str = "Presence-Lane";
/// The payload that ends a stream.
pub const END: &[u8] = b"__STREAM_END__";
/// What the payload begins with that ends a stream with an error; the text follows.
pub const ERROR: &[u8] = b"__STREAM_ERROR__:";
/// ERROR's beginning that data may not have: without the colon, to be on the safe side with peers that look no further.
const ERROR_STEM: &[u8] = b"__STREAM_ERROR__";
/// The text of a refusal over the service's limit.
pub const BUSY: &str = "server busy";
/// The text of a stream's error when its worker's process has learned that the client is offline.
pub const OFFLINE: &str = "the client is offline";

/// What a message to a stream's inbox means.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<'a> {
    /// A message of the stream.
    Data,
    /// Its end.
    End,
    /// Its end by an error with this text.
    Error(&'a [u8]),
    /// A JetStream stream has stored the request, and nats-server acknowledges that.
    JetStreamAck,
}

/// Reads a payload that came to a stream's inbox.
#[must_use]
pub fn answer(payload: &[u8]) -> Answer<'_> {
    // Every payload that is no marker begins otherwise: one comparison decides for nearly all.
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

/// Returns true for data that a reader on level 0 would take for a marker or an acknowledgement of JetStream's.
#[must_use]
pub fn is_reserved(data: &[u8]) -> bool {
    (data.starts_with(b"__STREAM_") && (data.starts_with(END) || data.starts_with(ERROR_STEM)))
        || is_jetstream_ack(data)
}

/// Returns true for a payload of exactly the form in which nats-server acknowledges to the reply subject of a message that
/// a JetStream stream has captured, or reports that the stream refused it.
fn is_jetstream_ack(payload: &[u8]) -> bool {
    // One comparison decides for nearly all payloads.
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

/// The payload that ends a stream with an error, cut to `max` bytes.
#[must_use]
pub fn error(text: &[u8], max: usize) -> Bytes {
    [ERROR, cut(text, max.saturating_sub(ERROR.len()))].concat().into()
}

/// Text of at most `max` bytes, without a part of a character at its end.
#[must_use]
pub fn cut(text: &[u8], max: usize) -> &[u8] {
    let is_inside = |at: usize| text.get(at).is_some_and(|byte| byte & 0xc0 == 0x80);
    let end = max.min(text.len());
    let whole = (end.saturating_sub(3)..=end).rev().find(|at| !is_inside(*at));
    text.get(..whole.unwrap_or(end)).unwrap_or_default()
}

/// What nats-server's max_payload leaves for other things than a stream's message: on a lane, its header and the frame's.
const MESSAGE_RESERVE: usize = 64;

/// How large a message of a stream may be where nats-server takes payloads of so many bytes: the same on both levels, so
/// that a worker does not depend on which of them the gateway speaks.
#[must_use]
pub const fn max_message(max_payload: usize) -> usize {
    max_payload.saturating_sub(MESSAGE_RESERVE)
}

/// How many bytes a subject has at most: nats-server closes a connection that sends it a line of more than 4096, and
/// two subjects may stand in one.
pub const MAX_SUBJECT: usize = 2048;
/// The same for what a subject is made of, and for groups.
pub const MAX_PREFIX: usize = 1024;

/// Where a subject stands; it decides whether wildcards may be in it.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Use {
    /// To publish to.
    Publish,
    /// To subscribe to.
    Subscribe,
}

/// Checks a subject (`what` names it in the message).
///
/// # Errors
/// `Status::Invalid`, with a message that names the subject and what is wrong with it.
pub fn check_subject(what: &str, subject: &str, purpose: Use) -> Result<()> {
    let wrong = |why: &str| Err(Error::invalid(format!("{what} {subject:?} {why}")));
    check_length(what, subject, MAX_SUBJECT)?;
    if subject.is_empty() {
        return wrong("is empty");
    }
    if subject.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return wrong("has white space or a control character: a subject may have none");
    }
    let mut tokens = subject.split('.').peekable();
    while let Some(token) = tokens.next() {
        match token {
            "" => return wrong("has an empty token: dots stand between tokens only"),
            "*" | ">" if purpose == Use::Publish => return wrong("has a wildcard: here it may have none"),
            ">" if tokens.peek().is_some() => return wrong("has > before its end: it stands for all that follows"),
            _ => {}
        }
    }
    Ok(())
}

/// Checks a length (`what` names whose). The text itself is too long to be shown.
///
/// # Errors
/// `Status::Invalid`.
pub fn check_length(what: &str, text: &str, max: usize) -> Result<()> {
    if text.len() > max {
        return Err(Error::invalid(format!("{what} has {} bytes: it may have at most {max}", text.len())));
    }
    Ok(())
}

/// Whether a request may be answered at this reply subject: whoever sends a request chooses it, so it must not make us
/// announce clients offline or talk to the server's own subjects.
#[must_use]
pub fn is_valid_reply_subject(reply: &str, offline_subject: &str) -> bool {
    !reply.starts_with('$') && reply != offline_subject && check_subject("reply", reply, Use::Publish).is_ok()
}

/// The first value of a header.
#[must_use]
pub fn header<'a>(headers: Option<&'a HeaderMap>, name: &str) -> Option<&'a str> {
    let (_, values) = headers?.iter().find(|(key, _)| AsRef::<str>::as_ref(key) == name)?;
    values.first().map(HeaderValue::as_str)
}

/// A request's own headers, each with its first value, in as little memory as can be: they live as long as its sender.
pub(crate) type Headers = Box<[(Box<str>, Box<str>)]>;

/// What to keep of a request's headers: all but those that this library reads itself.
pub(crate) fn own_headers(headers: Option<&HeaderMap>) -> Headers {
    let all = headers.into_iter().flat_map(HeaderMap::iter).filter_map(|(name, values)| {
        let name: &str = name.as_ref();
        (name != CONNECT_ID && name != LANE).then_some((name.into(), values.first()?.as_str().into()))
    });
    all.collect()
}

/// Checks a header that a caller wants to send with a request, and adds it.
///
/// # Errors
/// `Status::Invalid` for a name or value that cannot be sent, or a name that is not the caller's.
pub fn add_header(headers: &mut HeaderMap, name: &str, value: &str) -> Result<()> {
    let token = |c: char| c.is_ascii_graphic() && c != ':';
    if name.is_empty() || !name.chars().all(token) {
        return Err(Error::invalid(format!("header name {name:?} is not of visible ASCII characters without a colon")));
    }
    let lower = name.to_ascii_lowercase();
    if lower == "connect-id" || lower.starts_with("nats-") || lower.starts_with("presence-") {
        return Err(Error::invalid(format!(
            "header {name} is not for callers: Connect-ID, Nats-… and Presence-… are taken"
        )));
    }
    if value.chars().any(char::is_control) {
        // Not shown: it may be a secret.
        return Err(Error::invalid(format!("the value of header {name} has a control character: it may have none")));
    }
    headers.append(name, value_of(value)?);
    Ok(())
}

/// A header's value. Ids have no control characters, so this fails for none of them.
pub(crate) fn value_of(text: &str) -> Result<HeaderValue> {
    text.parse().map_err(|_| Error::new(Status::Invalid, format!("{text:?} cannot be a header's value")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers() {
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
    fn text_is_cut_between_characters() {
        let text = "a\u{e4}\u{20ac}\u{1f600}";
        let cuts: Vec<_> =
            (0..=11).map(|max| str::from_utf8(cut(text.as_bytes(), max)).unwrap().chars().count()).collect();
        assert_eq!(cuts, [0, 1, 1, 2, 2, 2, 3, 3, 3, 3, 4, 4]);
        assert_eq!(cut(&[0x80; 10], 5), [0x80; 5], "what is no text is cut as well");
    }

    #[test]
    fn what_looks_like_a_marker_is_reserved() {
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
    fn subjects() {
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
    fn replies_that_must_not_be_answered() {
        assert!(is_valid_reply_subject("_INBOX.x.1", "client.offline"));
        for bad in ["", "client.offline", "$SYS.REQ", "$JS.API", "a.*", "a.>", "a b"] {
            assert!(!is_valid_reply_subject(bad, "client.offline"), "{bad:?}");
        }
    }

    #[test]
    fn headers_of_callers() {
        let mut headers = HeaderMap::new();
        add_header(&mut headers, "X-Model", "gpt").unwrap();
        assert_eq!(header(Some(&headers), "X-Model"), Some("gpt"));
        assert_eq!(header(Some(&headers), "x y"), None);
        for (name, value) in [("", "x"), ("a b", "x"), ("a:", "x"), ("ä", "x"), ("X", "a\r\nb"), ("X", "a\rb")] {
            assert!(add_header(&mut headers, name, value).is_err(), "{name:?} {value:?}");
        }
        for taken in ["Connect-ID", "connect-id", "Nats-Expected", "Presence-Lane"] {
            assert!(add_header(&mut headers, taken, "x").is_err(), "{taken}");
        }
    }
}
