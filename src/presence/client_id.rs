//! Which ids are valid for a client.

use crate::error::{Error, Result};

/// The size limit of a client's id, in bytes.
pub const MAX_ID: usize = 1024;

/// Checks an id: UTF-8, at most [`MAX_ID`] bytes, no control characters. The empty id stands for no client.
///
/// # Errors
/// `Status::Invalid`, with a message that says what is wrong.
pub fn id(bytes: &[u8]) -> Result<&str> {
    if bytes.len() > MAX_ID {
        return Err(Error::invalid(format!("client id is {} bytes; the limit is {MAX_ID}", bytes.len())));
    }
    // Nearly all ids are printable ASCII. A few vector instructions check that, because unlike `all` this does not stop
    // early.
    let is_plain = bytes.iter().fold(true, |is_plain, byte| is_plain & (b' '..=b'~').contains(byte));
    let id = std::str::from_utf8(bytes).map_err(|error| {
        Error::invalid(format!("client id is not UTF-8: the byte at {} is wrong", error.valid_up_to()))
    })?;
    if is_plain {
        return Ok(id);
    }
    match id.char_indices().find(|(_, character)| character.is_control()) {
        None => Ok(id),
        Some((at, character)) => Err(Error::invalid(format!(
            "client id has the control character {character:?} at byte {at}, which is not allowed"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn valid_ids_are_accepted() {
        for good in ["", "a", "Ünïcødé-客户端", "with space", &"x".repeat(MAX_ID)] {
            assert_eq!(id(good.as_bytes()), Ok(good));
        }
    }

    #[test]
    fn invalid_ids_are_refused_with_the_reason() {
        let long = "x".repeat(MAX_ID + 1);
        for (bad, why) in [
            (&b"a\xff"[..], "not UTF-8: the byte at 1"),
            (b"a\nb", "'\\n' at byte 1"),
            (b"\0", "'\\0' at byte 0"),
            ("a\u{85}".as_bytes(), "control character"),
            (long.as_bytes(), "1025 bytes"),
        ] {
            let error = id(bad).unwrap_err();
            assert_eq!(error.status, crate::Status::Invalid);
            assert!(error.message.contains(why), "{error} does not say {why}");
        }
    }
}
