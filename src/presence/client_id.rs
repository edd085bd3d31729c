//! What may be a client's id.

use crate::error::{Error, Result};

/// The longest id, in bytes.
pub const MAX_ID: usize = 1024;

/// Reads an id: UTF-8, at most [`MAX_ID`] bytes, no control characters. The empty one means "no client".
///
/// # Errors
/// `Status::Invalid`, with a message that names what is wrong.
pub fn id(bytes: &[u8]) -> Result<&str> {
    if bytes.len() > MAX_ID {
        return Err(Error::invalid(format!("client id of {} bytes is too long: {MAX_ID} are the most", bytes.len())));
    }
    // Nearly all ids are printable ASCII, which a few vector instructions tell: unlike `all`, this does not stop early.
    let is_plain = bytes.iter().fold(true, |is_plain, byte| is_plain & (b' '..=b'~').contains(byte));
    let id = std::str::from_utf8(bytes)
        .map_err(|error| Error::invalid(format!("client id is not UTF-8 from byte {} on", error.valid_up_to())))?;
    if is_plain {
        return Ok(id);
    }
    match id.char_indices().find(|(_, character)| character.is_control()) {
        None => Ok(id),
        Some((at, character)) => Err(Error::invalid(format!(
            "client id has the control character {character:?} at byte {at}: it may have none"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_the_design_allows() {
        for good in ["", "a", "Ünïcødé-客户端", "with space", &"x".repeat(MAX_ID)] {
            assert_eq!(id(good.as_bytes()), Ok(good));
        }
    }

    #[test]
    fn refuses_the_rest_and_says_why() {
        let long = "x".repeat(MAX_ID + 1);
        for (bad, why) in [
            (&b"a\xff"[..], "UTF-8 from byte 1"),
            (b"a\nb", "'\\n' at byte 1"),
            (b"\0", "'\\0' at byte 0"),
            ("a\u{85}".as_bytes(), "control character"),
            (long.as_bytes(), "1025 bytes"),
        ] {
            let error = id(bad).unwrap_err();
            assert_eq!(error.status, crate::Status::Invalid);
            assert!(error.message.contains(why), "{error} does not tell {why}");
        }
    }
}
