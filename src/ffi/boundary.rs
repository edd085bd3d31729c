//! Panics and errors: no panic leaves a function of the ABI, and each error becomes a status.

use super::codes::presence_status;
use super::types::{PRESENCE_ERROR_MESSAGE, presence_error};
use crate::error::{Error, Result, Status};
use crate::process::fork;
use std::ffi::c_char;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Once;
use std::thread;
use std::time::Duration;

/// Runs the body of a function that returns a status.
pub(super) fn guard<E: Into<Status>>(body: impl FnOnce() -> Result<(), E>) -> presence_status {
    guard_value(body).err().unwrap_or(Status::Ok)
}

/// Runs the body of a function that returns a value or a status.
pub(super) fn guard_value<T, E: Into<Status>>(body: impl FnOnce() -> Result<T, E>) -> Result<T, Status> {
    match catch(body) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Status::Internal),
    }
}

/// Runs the body of a function that cannot return a status: after an error it returns `otherwise`.
pub(super) fn guard_or<T>(otherwise: T, body: impl FnOnce() -> Result<T>) -> T {
    guard_value(body).unwrap_or(otherwise)
}

/// Runs the body of a function that returns a status and fills an error.
///
/// # Safety
/// `error` is NULL or writable.
pub(super) unsafe fn guard_error(error: *mut presence_error, body: impl FnOnce() -> Result<()>) -> presence_status {
    let failed = match catch(body) {
        Ok(Ok(())) => return Status::Ok,
        Ok(Err(failed)) => failed,
        Err(_) => Status::Internal.into(),
    };
    if !error.is_null() && error.is_aligned() {
        let mut message = [0; PRESENCE_ERROR_MESSAGE];
        // Truncated between two characters, and the last byte stays NUL.
        let ends = failed.message.char_indices().map(|(at, character)| at + character.len_utf8());
        let end = ends.take_while(|end| *end < PRESENCE_ERROR_MESSAGE).last().unwrap_or_default();
        for (slot, byte) in message.iter_mut().zip(failed.message.bytes().take(end)) {
            // A NUL in the text would end it for C.
            *slot = c_char::from_ne_bytes([if byte == 0 { b'?' } else { byte }]);
        }
        // SAFETY: not NULL and aligned, so it is writable, by the caller's promise.
        unsafe { error.write(presence_error { status: failed.status.code(), message }) };
    }
    failed.status
}

fn catch<T>(body: impl FnOnce() -> T) -> thread::Result<T> {
    watch_forks();
    // Unwind safe: the core's locks do not poison, and what they protect is valid between any two statements that may
    // panic.
    catch_unwind(AssertUnwindSafe(|| {
        #[cfg(test)]
        super::panics::if_forced();
        body()
    }))
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        error.status
    }
}

/// Registers the handler that runs in forked children, once. It stays registered, as the library is never unloaded.
fn watch_forks() {
    extern "C" fn child() {
        fork::child();
    }
    static WATCHED: Once = Once::new();
    // SAFETY: the handler only stores to atomics, which is allowed in a forked child.
    WATCHED.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(child));
    });
}

/// A timeout of the ABI: a negative one is no limit.
pub(super) fn limit(timeout_ms: i64) -> Option<Duration> {
    u64::try_from(timeout_ms).ok().map(Duration::from_millis)
}
