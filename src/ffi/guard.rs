use std::ffi::c_char;
/// Bytes in a presence_error's message, its NUL included.
pub const PRESENCE_ERROR_MESSAGE: usize = 508;

/// What was wrong: filled by a call that fails.
#[repr(C)]
pub struct presence_error {
    /// A presence_status; the same as the call returned.
    pub status: i32,
    /// Which value was wrong and what would be right, for people: UTF-8, NUL-terminated, cut where it is too long.
    pub message: [c_char; PRESENCE_ERROR_MESSAGE],
}
