//! The texts of the ABI's constants. The constants themselves are the core's.

pub use crate::error::Status as presence_status;
pub use crate::events::Kind as presence_event_kind;

use std::ffi::{CStr, c_char};

const UNKNOWN: &CStr = c"unknown status";
const UNKNOWN_KIND: &CStr = c"unknown kind";
const VERSION: &CStr = match CStr::from_bytes_with_nul(concat!(env!("CARGO_PKG_VERSION"), "\0").as_bytes()) {
    Ok(version) => version,
    Err(_) => c"",
};

/// Returns a short English text for a status. It is never NULL and need not be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_status_text(status: i32) -> *const c_char {
    presence_status::from_code(status).map_or(UNKNOWN, presence_status::c_text).as_ptr()
}

/// Returns the name of an event's kind, such as "REQUEST", for logs. It is never NULL and need not be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_event_kind_text(kind: i32) -> *const c_char {
    let known = presence_event_kind::ALL.into_iter().find(|known| *known as i32 == kind);
    known.map_or(UNKNOWN_KIND, presence_event_kind::c_text).as_ptr()
}

/// Returns the library's version, "major.minor.patch". It need not be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_version() -> *const c_char {
    VERSION.as_ptr()
}
