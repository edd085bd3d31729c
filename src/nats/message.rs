//! What the crate calls a message, a subject and headers.
//!
//! [`Message`] is the crate's own. [`Subject`] and [`HeaderMap`] are those of async-nats: they are plain data, and an
//! own type would have to check (`Subject`) or copy (`HeaderMap`) what async-nats has already checked and built, for
//! each message.

pub(crate) use async_nats::{HeaderMap, Subject};

use crate::wire::level0;
use async_nats::{HeaderValue, StatusCode};
use bytes::Bytes;

/// A message that came in.
///
/// Its parts are slices of async-nats's read buffer (up to 64 KiB), all of which stays allocated as long as one of them
/// is kept. Copy what outlives the handling of the message: `detach`, `Message::copy_headers`, `events::queue::unpin`.
pub(crate) struct Message {
    pub(crate) subject: Subject,
    pub(crate) reply: Option<Subject>,
    pub(crate) headers: Option<HeaderMap>,
    pub(crate) payload: Bytes,
    /// This is nats-server's status 503: the message whose reply subject is `subject` had no subscriber.
    pub(crate) is_no_responders: bool,
}

impl From<async_nats::Message> for Message {
    fn from(message: async_nats::Message) -> Message {
        let async_nats::Message { subject, reply, headers, payload, status, .. } = message;
        Message { subject, reply, headers, payload, is_no_responders: status == Some(StatusCode::NO_RESPONDERS) }
    }
}

impl Message {
    #[cfg(any(test, fuzzing))]
    pub(crate) fn from_headers(headers: HeaderMap) -> Message {
        let subject = Subject::from_static("a");
        Message { subject, reply: None, headers: Some(headers), payload: Bytes::new(), is_no_responders: false }
    }

    /// Returns the first value of a header.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let (_, values) = self.headers.as_ref()?.iter().find(|(key, _)| AsRef::<str>::as_ref(key) == name)?;
        values.first().map(HeaderValue::as_str)
    }

    /// Copies all headers but those in `except` into as little memory as possible.
    pub(crate) fn copy_headers(&self, except: &[&str]) -> level0::Headers {
        let all = self.headers.iter().flat_map(HeaderMap::iter).flat_map(|(name, values)| {
            let name: &str = name.as_ref();
            let values = if except.contains(&name) { &[] } else { &values[..] };
            values.iter().map(move |value| (name.into(), value.as_str().into()))
        });
        all.collect()
    }
}

/// Copies a subject of a message, so that it does not keep async-nats's read buffer allocated.
pub(crate) fn detach(subject: &Subject) -> Subject {
    Subject::from(subject.as_str().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn first_value_of_a_header_is_found() {
        let mut headers = HeaderMap::new();
        headers.append("X-Model", "gpt");
        headers.append("X-Model", "other");
        let mut message = Message::from_headers(headers);
        assert_eq!((message.header("X-Model"), message.header("x y")), (Some("gpt"), None));
        message.headers = None;
        assert_eq!(message.header("X-Model"), None);
    }
}
