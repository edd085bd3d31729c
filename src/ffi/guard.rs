//! The boundary: the only place where pointers, NULL, panics and forks of C become Rust, and the other way round.
//!
//! Handles are of two kinds. A sender and a set of options are real pointers: the one for the speed of its sends, the other
//! for its simplicity. All other handles are numbers in the shape of a pointer, looked up in a table: one that was freed
//! is found missing, from whichever thread and however often, instead of being followed into freed memory.

use crate::config::Config;
use crate::connection::Connection;
use crate::error::{Error, Result, Status};
use crate::events::{EventSource, Queue};
use crate::gateway::stream::Stream;
use crate::presence::registry::Session;
use crate::process::fork::{self, PerProcess};
use crate::worker::sender::Sender;
use crate::worker::service::Service;
use std::cell::Cell;
use std::ffi::{CStr, c_char};
use std::mem::MaybeUninit;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::ptr;
use std::sync::{Arc, Once};
use std::thread;
use std::time::Duration;

use super::connection::{presence_config, presence_conn};
use super::gateway::presence_stream;
use super::presence::presence_session;
use super::queue::presence_queue;
use super::table::Table;
use super::worker::{presence_sender, presence_service};

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

// Panics and forks ----------------------------------------------------------------------------------------------------

/// Runs the body of a function that returns a status.
pub(super) fn guard<E: Into<Status>>(body: impl FnOnce() -> Result<(), E>) -> i32 {
    guard_value(body).map_or_else(|status| status, |()| Status::Ok.code())
}

/// Runs the body of a function that returns a value or a status.
pub(super) fn guard_value<T, E: Into<Status>>(body: impl FnOnce() -> Result<T, E>) -> Result<T, i32> {
    match caught(body) {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => Err(error.into().code()),
        Err(_) => Err(Status::Internal.code()),
    }
}

fn caught<T>(body: impl FnOnce() -> T) -> thread::Result<T> {
    watch_forks();
    // Unwind safe: the core's locks do not poison, and what they protect is whole between any two statements that may panic.
    catch_unwind(AssertUnwindSafe(|| {
        #[cfg(test)]
        super::panics::if_forced();
        body()
    }))
}

/// Runs the body of a function that cannot tell an error: it returns `otherwise`.
pub(super) fn guard_or<T>(otherwise: T, body: impl FnOnce() -> Result<T>) -> T {
    guard_value(body).unwrap_or(otherwise)
}

/// Runs the body of a function that returns a status and fills an error.
///
/// # Safety
/// `error` is NULL or writable.
pub(super) unsafe fn guard_error(error: *mut presence_error, body: impl FnOnce() -> Result<()>) -> i32 {
    let failed = match caught(body) {
        Ok(Ok(())) => return Status::Ok.code(),
        Ok(Err(failed)) => failed,
        Err(_) => Status::Internal.into(),
    };
    if !error.is_null() && error.is_aligned() {
        let mut message = [0; PRESENCE_ERROR_MESSAGE];
        // Cut between two characters, and the last byte stays NUL.
        let whole = failed.message.char_indices().map(|(at, character)| at + character.len_utf8());
        let end = whole.take_while(|end| *end < PRESENCE_ERROR_MESSAGE).last().unwrap_or_default();
        for (slot, byte) in message.iter_mut().zip(failed.message.bytes().take(end)) {
            // A NUL within would cut the message for C.
            *slot = c_char::from_ne_bytes([if byte == 0 { b'?' } else { byte }]);
        }
        // SAFETY: not NULL and aligned, so it is writable, by the caller's promise.
        unsafe { error.write(presence_error { status: failed.status.code(), message }) };
    }
    failed.status.code()
}

impl From<Error> for Status {
    fn from(error: Error) -> Status {
        error.status
    }
}

/// Notices forks from now on. Handlers stay for ever, as the library does (it is never unloaded).
fn watch_forks() {
    extern "C" fn child() {
        fork::child();
    }
    static WATCHED: Once = Once::new();
    // SAFETY: the handler only stores to atomics, which is all that may be done in a forked child.
    WATCHED.call_once(|| unsafe {
        libc::pthread_atfork(None, None, Some(child));
    });
}

// Handles -------------------------------------------------------------------------------------------------------------

/// A type of handle that is a number in a table.
pub(super) trait Handle: Sized {
    type Core: 'static;
    fn table() -> &'static Table<Self::Core>;
    fn handle_id(core: &Self::Core) -> u64;
}

macro_rules! handle_type {
    ($handle:ty, $core:ty) => {
        impl Handle for $handle {
            type Core = $core;
            fn table() -> &'static Table<$core> {
                static TABLE: PerProcess<Table<$core>> = PerProcess::new();
                TABLE.get(Table::default)
            }
            fn handle_id(core: &$core) -> u64 {
                core.handle_id()
            }
        }
    };
}
handle_type!(presence_conn, Connection);
handle_type!(presence_queue, Queue);
handle_type!(presence_service, Service);
handle_type!(presence_session, Session);
handle_type!(presence_stream, Stream);

/// Where numbers begin to be pointers: above the page that NULL points to, and in steps that look aligned, for the sake of
/// tools and garbage collectors that have opinions on pointers.
const BASE: usize = 1 << 16;
const STEP: usize = 16;

/// The handle with a number.
pub(super) fn pointer<H>(number: u64) -> *mut H {
    ptr::without_provenance_mut(BASE + usize::try_from(number).unwrap_or_default() * STEP)
}

fn number<H>(handle: *const H) -> Result<u64> {
    if handle.is_null() {
        return Err(Error::invalid(format!("{} is NULL", name_of::<H>())));
    }
    let number = (handle.addr().wrapping_sub(BASE) / STEP) as u64;
    fork::check(number)?;
    Ok(number)
}

fn name_of<H>() -> &'static str {
    std::any::type_name::<H>().rsplit("::").next().unwrap_or_default()
}

/// Makes what a handle stands for, and writes the handle to `out`.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn handle<H: Handle, C: Into<Arc<H::Core>>>(
    out: *mut *mut H,
    make: impl FnOnce() -> Result<C>,
) -> Result<()> {
    if out.is_null() {
        return Err(Error::invalid(format!("out is NULL: it must point to where the {}* goes", name_of::<H>())));
    }
    check_aligned("out", out)?;
    let core = make()?.into();
    let number = H::handle_id(&core);
    H::table().insert(number, core);
    // SAFETY: not NULL and aligned, so it is writable, by the caller's promise.
    unsafe { out.write(pointer(number)) };
    Ok(())
}

/// As `handle`, for what events may name before it is made: `make` gives it to its argument before any can come.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn handle_known<H: Handle>(
    out: *mut *mut H,
    make: impl FnOnce(&dyn Fn(&Arc<H::Core>)) -> Result<Arc<H::Core>>,
) -> Result<()> {
    let known = Cell::new(None);
    let know = |core: &Arc<H::Core>| {
        let number = H::handle_id(core);
        H::table().insert(number, Arc::clone(core));
        known.set(Some(number));
    };
    // SAFETY: the caller's promise is write_out's.
    let made = unsafe { write_out(out, || make(&know).map(|core| pointer(H::handle_id(&core)))) };
    if let (Err(_), Some(number)) = (&made, known.get()) {
        H::table().remove(number);
    }
    made
}

/// What a handle stands for.
pub(super) fn borrow<H: Handle>(handle: *const H) -> Result<Arc<H::Core>> {
    H::table().get(number(handle)?).ok_or_else(ended::<H>)
}

/// What a handle stands for, and ends the handle.
pub(super) fn take<H: Handle>(handle: *mut H) -> Result<Arc<H::Core>> {
    H::table().remove(number(handle)?).ok_or_else(ended::<H>)
}

/// `take` for functions that free: None where there is nothing to free.
pub(super) fn release<H: Handle>(handle: *mut H) -> Option<Arc<H::Core>> {
    take(handle).ok()
}

fn ended<H>() -> Error {
    Error::new(Status::Closed, format!("the {} has ended already", name_of::<H>()))
}

// Pointers ------------------------------------------------------------------------------------------------------------

/// The senders and options that this process gave and did not free. A debug build knows better than to follow others.
#[cfg(any(debug_assertions, test))]
fn given() -> crate::sync::MutexGuard<'static, std::collections::HashSet<usize>> {
    static GIVEN: PerProcess<crate::sync::Mutex<std::collections::HashSet<usize>>> = PerProcess::new();
    GIVEN.get(Default::default).lock()
}

fn note_given<T>(_pointer: *mut T) {
    #[cfg(any(debug_assertions, test))]
    given().insert(_pointer.addr());
}

/// Whether it was not freed before: from now on it is. Always true in a release build.
fn note_freed<T>(_pointer: *mut T) -> bool {
    #[cfg(any(debug_assertions, test))]
    return given().remove(&_pointer.addr()) || fork::is_child();
    #[cfg(not(any(debug_assertions, test)))]
    true
}

/// Fails for what was freed, in a debug build. A child asks what it inherited, which is still there.
fn check_given<T>(_pointer: *const T) -> Result<(), Status> {
    #[cfg(any(debug_assertions, test))]
    if !_pointer.is_null() && !given().contains(&_pointer.addr()) && !fork::is_child() {
        return Err(Status::Closed);
    }
    Ok(())
}

// Senders -------------------------------------------------------------------------------------------------------------

/// The pointer by which events name a sender.
pub(super) fn sender_pointer(sender: &Arc<Sender>) -> *mut presence_sender {
    Arc::as_ptr(sender).cast_mut().cast()
}

/// The pointer that owns a sender, to be freed by `free_sender`.
pub(super) fn give_sender(sender: Arc<Sender>) -> *mut presence_sender {
    #[allow(clippy::disallowed_methods)]
    let pointer = Arc::into_raw(sender).cast_mut().cast();
    note_given(pointer);
    pointer
}

/// # Safety
/// `sender` is NULL or came from `give_sender` and was not freed.
pub(super) unsafe fn sender_ref<'a>(sender: *const presence_sender) -> Result<&'a Sender, Status> {
    check_given(sender)?;
    // SAFETY: the pointer is an Arc's that `give_sender` leaked and nobody freed, so what it points to lives.
    let sender = unsafe { sender.cast::<Sender>().as_ref() }.ok_or(Status::Invalid)?;
    fork::check(sender.handle_id())?;
    Ok(sender)
}

/// # Safety
/// `sender` is NULL or came from `give_sender` and was not freed; nobody uses it any longer.
pub(super) unsafe fn free_sender(sender: *mut presence_sender) -> Result<()> {
    // SAFETY: the caller's promise is sender_ref's.
    if let Ok(own) = unsafe { sender_ref(sender) }
        && note_freed(sender)
    {
        own.free();
        #[allow(clippy::disallowed_methods)]
        // SAFETY: from `give_sender`, once; `own` is not used any more.
        drop(unsafe { Arc::from_raw(sender.cast::<Sender>().cast_const()) });
    }
    Ok(())
}

// Options -------------------------------------------------------------------------------------------------------------

/// The pointer that owns a set of options.
pub(super) fn give_config(config: Config) -> *mut presence_config {
    #[allow(clippy::disallowed_methods)]
    let pointer = Box::into_raw(Box::new(config)).cast();
    note_given(pointer);
    pointer
}

/// # Safety
/// `config` is NULL or came from `give_config`, was not freed, and nobody changes it meanwhile.
pub(super) unsafe fn config_ref<'a>(config: *const presence_config) -> Result<&'a Config> {
    check_given(config)?;
    // SAFETY: the pointer is a Box's that `give_config` leaked and nobody freed.
    unsafe { config.cast::<Config>().as_ref() }.ok_or_else(|| Error::invalid("presence_config is NULL"))
}

/// # Safety
/// `config` is NULL or came from `give_config`, was not freed, and nobody else uses it meanwhile.
pub(super) unsafe fn config_mut<'a>(config: *mut presence_config) -> Result<&'a mut Config> {
    check_given(config)?;
    // SAFETY: the pointer is a Box's that `give_config` leaked and nobody freed, and nobody else uses.
    unsafe { config.cast::<Config>().as_mut() }.ok_or_else(|| Error::invalid("presence_config is NULL"))
}

/// # Safety
/// `config` is NULL or came from `give_config` and was not freed; nobody uses it any longer.
pub(super) unsafe fn free_config(config: *mut presence_config) -> Result<()> {
    if !config.is_null() && note_freed(config) {
        #[allow(clippy::disallowed_methods)]
        // SAFETY: from `give_config`, once.
        drop(unsafe { Box::from_raw(config.cast::<Config>()) });
    }
    Ok(())
}

// Data ----------------------------------------------------------------------------------------------------------------

/// # Safety
/// `data` is readable for `len` bytes.
pub(super) unsafe fn bytes<'a>(name: &str, data: *const std::ffi::c_void, len: usize) -> Result<&'a [u8]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(Error::invalid(format!("{name} is NULL, with a length of {len} bytes")));
    }
    if isize::try_from(len).is_err() {
        return Err(Error::invalid(format!("{name} has a length of {len} bytes, more than any memory has")));
    }
    // SAFETY: not NULL, and readable for that many bytes, by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), len) })
}

/// Fails for a pointer through which nothing may be read or written.
pub(super) fn check_aligned<T>(name: &str, pointer: *const T) -> Result<()> {
    if !pointer.is_aligned() {
        return Err(Error::invalid(format!(
            "{name} is not aligned: its address must be a multiple of {}",
            align_of::<T>()
        )));
    }
    Ok(())
}

/// # Safety
/// `lens` is readable for `count` elements.
pub(super) unsafe fn lengths<'a>(lens: *const usize, count: usize) -> Result<&'a [usize]> {
    // SAFETY: as many bytes as the elements have are readable, by the caller's promise.
    unsafe { bytes("lens", lens.cast(), count.saturating_mul(size_of::<usize>())) }?;
    if count == 0 {
        return Ok(&[]);
    }
    check_aligned("lens", lens)?;
    // SAFETY: not NULL, aligned, and readable, as checked and promised.
    Ok(unsafe { std::slice::from_raw_parts(lens, count) })
}

/// # Safety
/// `text` is NULL or NUL-terminated.
pub(super) unsafe fn c_bytes<'a>(name: &str, text: *const c_char) -> Result<&'a [u8]> {
    if text.is_null() {
        return Err(Error::invalid(format!("{name} is NULL")));
    }
    // SAFETY: not NULL, so it is NUL-terminated, by the caller's promise.
    Ok(unsafe { CStr::from_ptr(text) }.to_bytes())
}

/// # Safety
/// `text` is NULL or NUL-terminated.
pub(super) unsafe fn c_text<'a>(name: &str, text: *const c_char) -> Result<&'a str> {
    // SAFETY: the caller's promise is c_bytes'.
    let bytes = unsafe { c_bytes(name, text) }?;
    std::str::from_utf8(bytes)
        .map_err(|error| Error::invalid(format!("{name} is not UTF-8 from byte {} on", error.valid_up_to())))
}

/// # Safety
/// `out` is NULL or writable for `len` elements.
pub(super) unsafe fn slice_out<'a, T>(out: *mut T, len: usize) -> Result<&'a mut [MaybeUninit<T>]> {
    if out.is_null() || len == 0 {
        return Err(Error::invalid("there is no room for an event: NULL was given, or a length of 0"));
    }
    check_aligned("events", out)?;
    if len.checked_mul(size_of::<T>()).and_then(|size| isize::try_from(size).ok()).is_none() {
        return Err(Error::invalid(format!("{len} events are more than any memory has")));
    }
    // SAFETY: not NULL, aligned, of a possible size, and writable for that many elements, by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(out.cast(), len) })
}

/// Writes a value that is made only if there is a place for it.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn write_out<T>(out: *mut T, make: impl FnOnce() -> Result<T>) -> Result<()> {
    if out.is_null() {
        return Err(Error::invalid("out is NULL"));
    }
    check_aligned("out", out)?;
    let value = make()?;
    // SAFETY: not NULL and aligned, so it is writable, by the caller's promise.
    unsafe { out.write(value) };
    Ok(())
}

/// A time of the ABI: negative is without limit.
pub(super) fn limit(timeout_ms: i64) -> Option<Duration> {
    u64::try_from(timeout_ms).ok().map(Duration::from_millis)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Undefined in a release build; a debug build, as this one is in this respect, follows no pointer that was freed.
    #[test]
    fn what_was_freed_is_not_followed() {
        let config = give_config(Config::new());
        // SAFETY: what this build checks, is what is tested.
        unsafe {
            assert!(config_ref(config).is_ok());
            free_config(config).unwrap();
            free_config(config).unwrap();
            assert_eq!(config_ref(config).unwrap_err().status, Status::Closed);
            assert_eq!(config_mut(config).unwrap_err().status, Status::Closed);
        }
        let freed = AtomicUsize::new(0);
        let pointer = give_config(Config::new()).addr();
        thread::scope(|scope| {
            for _ in 0..8 {
                scope.spawn(|| {
                    let config: *mut presence_config = ptr::with_exposed_provenance_mut(pointer);
                    freed.fetch_add(usize::from(note_freed(config)), Ordering::Relaxed);
                });
            }
        });
        assert_eq!(freed.into_inner(), 1);
        #[allow(clippy::disallowed_methods)]
        // SAFETY: from `give_config`, and only noted as freed so far.
        drop(unsafe { Box::from_raw(ptr::with_exposed_provenance_mut::<Config>(pointer)) });
        let never: *const presence_sender = ptr::without_provenance(BASE);
        // SAFETY: as above.
        assert_eq!(unsafe { sender_ref(never) }.err(), Some(Status::Closed));
    }

    /// The same for a sender of a service that waits for its first connection.
    #[test]
    fn a_sender_that_was_freed_is_not_followed() {
        let mut config = Config::new();
        config.set("retry_on_initial_connect", "true").unwrap();
        let connection = Connection::connect("nats://127.0.0.1:1", &config).unwrap();
        let service = connection.serve(&Queue::new(), "freed", "", 0, 0).unwrap();
        let sender = Sender::new(service, "reply".into(), "".into(), Box::default());
        // It stays where it is, so that nothing else is given under its address meanwhile.
        let pointer = give_sender(Arc::clone(&sender));
        // SAFETY: what this build checks, is what is tested.
        unsafe {
            assert!(sender_ref(pointer).is_ok());
            free_sender(pointer).unwrap();
            assert_eq!(Arc::strong_count(&sender), 1);
            free_sender(pointer).unwrap();
            assert_eq!(Arc::strong_count(&sender), 1);
            assert_eq!(sender_ref(pointer).err(), Some(Status::Closed));
        }
        assert!(sender.is_closed());
        connection.close(None).unwrap_err();
    }
}
