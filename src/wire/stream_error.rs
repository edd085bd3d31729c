//! The error with which a worker ends a stream: a text, and a code if the application gives one.

/// An error with which a worker ends a stream.
#[derive(Clone, Copy, Debug)]
pub(crate) struct StreamError<'a> {
    /// A number of the application's choice, from 1 to `i32::MAX`. 0: none.
    pub(crate) code: i32,
    pub(crate) text: &'a [u8],
}

impl<'a> StreamError<'a> {
    /// An error without a code.
    pub(crate) fn new(text: &'a [u8]) -> StreamError<'a> {
        StreamError { code: 0, text }
    }
}

/// Reads a code from the value of a header. Returns 0 for a value that no code is written as.
pub(crate) fn code_in_header(value: &str) -> i32 {
    let is_canonical = value.starts_with(|c: char| ('1'..='9').contains(&c)) && value.len() <= 10;
    if is_canonical { value.parse().unwrap_or_default() } else { 0 }
}

/// Reads a code from the body of a frame. Returns 0 for a body that has no code.
pub(crate) fn code_in_frame(body: &[u8]) -> i32 {
    body.first_chunk().map_or(0, |bytes| i32::from_le_bytes(*bytes).max(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_codes_are_read() {
        for code in [1, 42, 404, i32::MAX] {
            assert_eq!((code_in_header(&code.to_string()), code_in_frame(&code.to_le_bytes())), (code, code));
        }
        for value in ["", "0", "-1", "+1", "007", " 1", "1 ", "1.5", "0x1", "2147483648", "99999999999", "one", "٣"] {
            assert_eq!(code_in_header(value), 0, "{value:?}");
        }
        for body in [&[][..], &[1], &[1, 0, 0], &[0; 4], &[0, 0, 0, 0x80], &[0xff; 4]] {
            assert_eq!(code_in_frame(body), 0, "{body:?}");
        }
        assert_eq!(code_in_frame(&[7, 0, 0, 0, 9]), 7, "more bytes may follow one day");
    }
}
