//! Pointers that are followed: senders, options, and the caller's data.

use super::types::{presence_config, presence_request_args, presence_sender};
use crate::config::Config;
use crate::error::{Error, Result, Status};
use crate::events::EventSource;
use crate::process::fork;
use crate::worker::sender::Sender;
use std::ffi::{CStr, c_char, c_void};
use std::mem::MaybeUninit;
use std::sync::Arc;

/// The addresses of the senders and options that this process created and did not free. A debug build follows no
/// others.
#[cfg(any(debug_assertions, test))]
fn live() -> crate::sync::MutexGuard<'static, std::collections::HashSet<usize>> {
    use crate::sync::Mutex;
    static LIVE: fork::PerProcess<Mutex<std::collections::HashSet<usize>>> = fork::PerProcess::new();
    LIVE.get(Default::default).lock()
}

fn note_created<T>(_pointer: *mut T) {
    #[cfg(any(debug_assertions, test))]
    live().insert(_pointer.addr());
}

/// Returns true the first time that it is called for a pointer. Always true in a release build.
fn note_freed<T>(_pointer: *mut T) -> bool {
    #[cfg(any(debug_assertions, test))]
    return live().remove(&_pointer.addr()) || fork::is_child();
    #[cfg(not(any(debug_assertions, test)))]
    true
}

/// In a debug build, fails for a pointer that was freed. A forked child may use what it inherited, which still exists.
fn check_live<T>(_pointer: *const T) -> Result<(), Status> {
    #[cfg(any(debug_assertions, test))]
    if !_pointer.is_null() && !live().contains(&_pointer.addr()) && !fork::is_child() {
        return Err(Status::Closed);
    }
    Ok(())
}

// Senders -------------------------------------------------------------------------------------------------------------

/// The pointer by which events name a sender. It does not own the sender.
pub(super) fn sender_pointer(sender: &Arc<Sender>) -> *mut presence_sender {
    Arc::as_ptr(sender).cast_mut().cast()
}

/// The pointer that owns a sender, for `free_sender`.
pub(super) fn into_sender_pointer(sender: Arc<Sender>) -> *mut presence_sender {
    #[allow(clippy::disallowed_methods)]
    let pointer = Arc::into_raw(sender).cast_mut().cast();
    note_created(pointer);
    pointer
}

/// # Safety
/// `sender` is NULL or came from `into_sender_pointer` and was not freed.
pub(super) unsafe fn sender_ref<'a>(sender: *const presence_sender) -> Result<&'a Sender, Status> {
    check_live(sender)?;
    // SAFETY: the pointer is that of an Arc that `into_sender_pointer` leaked and nobody freed, so the sender exists.
    let sender = unsafe { sender.cast::<Sender>().as_ref() }.ok_or(Status::Invalid)?;
    fork::check(sender.source().handle_id)?;
    Ok(sender)
}

/// # Safety
/// `sender` is NULL or came from `into_sender_pointer` and was not freed; nobody uses it any longer.
pub(super) unsafe fn free_sender(sender: *mut presence_sender) -> Result<()> {
    // SAFETY: the caller's promise is sender_ref's.
    if let Ok(own) = unsafe { sender_ref(sender) }
        && note_freed(sender)
    {
        own.free();
        #[allow(clippy::disallowed_methods)]
        // SAFETY: from `into_sender_pointer`, once; `own` is not used any more.
        drop(unsafe { Arc::from_raw(sender.cast::<Sender>().cast_const()) });
    }
    Ok(())
}

// Options -------------------------------------------------------------------------------------------------------------

/// The pointer that owns options, for `free_config`.
pub(super) fn into_config_pointer(config: Config) -> *mut presence_config {
    #[allow(clippy::disallowed_methods)]
    let pointer = Box::into_raw(Box::new(config)).cast();
    note_created(pointer);
    pointer
}

/// # Safety
/// `config` is NULL or came from `into_config_pointer`, was not freed, and nobody changes it meanwhile.
pub(super) unsafe fn config_ref<'a>(config: *const presence_config) -> Result<&'a Config> {
    check_live(config)?;
    // SAFETY: the pointer is that of a Box that `into_config_pointer` leaked and nobody freed.
    unsafe { config.cast::<Config>().as_ref() }.ok_or_else(|| Error::invalid("presence_config is NULL"))
}

/// # Safety
/// `config` is NULL or came from `into_config_pointer`, was not freed, and nobody else uses it meanwhile.
pub(super) unsafe fn config_mut<'a>(config: *mut presence_config) -> Result<&'a mut Config> {
    check_live(config)?;
    // SAFETY: the pointer is that of a Box that `into_config_pointer` leaked, nobody freed and nobody else uses.
    unsafe { config.cast::<Config>().as_mut() }.ok_or_else(|| Error::invalid("presence_config is NULL"))
}

/// # Safety
/// `config` is NULL or came from `into_config_pointer` and was not freed; nobody uses it any longer.
pub(super) unsafe fn free_config(config: *mut presence_config) -> Result<()> {
    if !config.is_null() && note_freed(config) {
        #[allow(clippy::disallowed_methods)]
        // SAFETY: from `into_config_pointer`, once.
        drop(unsafe { Box::from_raw(config.cast::<Config>()) });
    }
    Ok(())
}

// Data ----------------------------------------------------------------------------------------------------------------

/// Fails for a pointer that is not aligned, through which nothing may be read or written.
pub(super) fn check_aligned<T>(name: &str, pointer: *const T) -> Result<()> {
    if !pointer.is_aligned() {
        let text = format!("{name} is not aligned: its address must be a multiple of {}", align_of::<T>());
        return Err(Error::invalid(text));
    }
    Ok(())
}

/// The largest structure that a later version of the header is expected to have.
const MAX_ARGS: usize = 4096;

/// Reads the arguments of a request. A caller that was compiled for a later version may pass a larger structure, whose
/// further fields must be 0: this version does not know them.
///
/// # Safety
/// `args` is NULL or readable for as many bytes as its first field says.
pub(super) unsafe fn request_args(args: *const presence_request_args) -> Result<presence_request_args> {
    const KNOWN: usize = size_of::<presence_request_args>();
    if args.is_null() {
        return Err(Error::invalid("args is NULL"));
    }
    check_aligned("args", args)?;
    // SAFETY: not NULL and aligned; the size is readable, by the caller's promise.
    let size = unsafe { args.cast::<usize>().read() };
    if !(KNOWN..=MAX_ARGS).contains(&size) {
        let text = format!("args->size is {size}: it must be sizeof(struct presence_request_args), here {KNOWN}");
        return Err(Error::invalid(text));
    }
    // SAFETY: readable for so many bytes, by the caller's promise.
    let all = unsafe { std::slice::from_raw_parts(args.cast::<u8>(), size) };
    if all[KNOWN..].iter().any(|byte| *byte != 0) {
        let text = format!("args has a field after its first {KNOWN} bytes, which this version does not know");
        return Err(Error::invalid(text));
    }
    // SAFETY: not NULL and aligned, and all of it is readable, by the caller's promise.
    Ok(unsafe { args.read() })
}

/// # Safety
/// `data` is readable for `len` bytes.
pub(super) unsafe fn bytes<'a>(name: &str, data: *const c_void, len: usize) -> Result<&'a [u8]> {
    if len == 0 {
        return Ok(&[]);
    }
    if data.is_null() {
        return Err(Error::invalid(format!("{name} is NULL, but its length is {len} bytes")));
    }
    if isize::try_from(len).is_err() {
        return Err(Error::invalid(format!("the length of {name} is {len} bytes; the limit is {}", isize::MAX)));
    }
    // SAFETY: not NULL, and readable for that many bytes, by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts(data.cast(), len) })
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

/// The bytes of `count` slices, which are one after the other in `data`, and their lengths.
///
/// # Safety
/// `lens` is readable for `count` elements, and `data` for as many bytes as their sum.
pub(super) unsafe fn concatenated<'a>(
    name: &str,
    data: *const c_void,
    lens: *const usize,
    count: usize,
) -> Result<(&'a [u8], &'a [usize])> {
    // SAFETY: the caller's promise is lengths'.
    let lengths = unsafe { lengths(lens, count) }?;
    let sum = lengths.iter().try_fold(0, |sum: usize, length| sum.checked_add(*length));
    // SAFETY: the caller's promise is bytes'. A sum that is too large is refused.
    let data = unsafe { bytes(name, data, sum.unwrap_or(usize::MAX)) }?;
    Ok((data, lengths))
}

/// As `concatenated`, one slice after the other.
///
/// # Safety
/// As for `concatenated`.
pub(super) unsafe fn slices<'a>(
    name: &str,
    data: *const c_void,
    lens: *const usize,
    count: usize,
) -> Result<impl Iterator<Item = &'a [u8]>> {
    // SAFETY: the caller's promise is concatenated's.
    let (mut rest, lengths) = unsafe { concatenated(name, data, lens, count) }?;
    Ok(lengths.iter().map(move |length| {
        let (next, others) = rest.split_at(*length);
        rest = others;
        next
    }))
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
        .map_err(|error| Error::invalid(format!("{name} is not UTF-8: the byte at {} is wrong", error.valid_up_to())))
}

/// # Safety
/// `events` is NULL or writable for `len` elements.
pub(super) unsafe fn slice_out<'a, T>(events: *mut T, len: usize) -> Result<&'a mut [MaybeUninit<T>]> {
    if events.is_null() || len == 0 {
        return Err(Error::invalid("events is NULL or max is 0: a wait needs memory for at least one event"));
    }
    check_aligned("events", events)?;
    if len.checked_mul(size_of::<T>()).and_then(|size| isize::try_from(size).ok()).is_none() {
        return Err(Error::invalid(format!("max is {len} events, which do not fit into memory")));
    }
    // SAFETY: not NULL, aligned, of a possible size, and writable for that many elements, by the caller's promise.
    Ok(unsafe { std::slice::from_raw_parts_mut(events.cast(), len) })
}

/// The address of a text for C. That of an empty one in Rust is no valid address.
pub(super) fn text_start(text: &str) -> *const c_char {
    if text.is_empty() { c"".as_ptr() } else { text.as_ptr().cast() }
}

/// Writes the beginning of a text that is made only if it can be written, and a NUL after it. Returns the length of the
/// whole text.
///
/// # Safety
/// `buf` is NULL or writable for `cap` bytes.
pub(super) unsafe fn text_out(
    name: &str,
    buf: *mut c_char,
    cap: usize,
    make: impl FnOnce() -> String,
) -> Result<usize> {
    if buf.is_null() && cap > 0 {
        return Err(Error::invalid(format!("{name} is NULL, but cap is {cap}")));
    }
    if isize::try_from(cap).is_err() {
        return Err(Error::invalid(format!("cap is {cap} bytes; the limit is {}", isize::MAX)));
    }
    let text = make();
    if let Some(last) = cap.checked_sub(1) {
        let length = text.len().min(last);
        // SAFETY: not NULL, and writable for `cap` bytes, of which there is one more than `length`, by the caller's
        // promise. A text that was made here overlaps no memory of the caller.
        unsafe {
            std::ptr::copy_nonoverlapping(text.as_ptr(), buf.cast(), length);
            buf.add(length).write(0);
        }
    }
    Ok(text.len())
}

/// Fails for a pointer through which a result cannot be written.
pub(super) fn check_out<T>(out: *const T) -> Result<()> {
    if out.is_null() {
        return Err(Error::invalid("out is NULL"));
    }
    check_aligned("out", out)
}

/// Writes a value, which is made only if it can be written.
///
/// # Safety
/// `out` is NULL or writable.
pub(super) unsafe fn write_out<T>(out: *mut T, make: impl FnOnce() -> Result<T>) -> Result<()> {
    check_out(out)?;
    let value = make()?;
    // SAFETY: not NULL and aligned, so it is writable, by the caller's promise.
    unsafe { out.write(value) };
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connection::Connection;
    use crate::events::Queue;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::{ptr, thread};

    /// Undefined in a release build. A debug build, and this one, does not follow a pointer that was freed.
    #[test]
    fn a_freed_config_is_refused() {
        let config = into_config_pointer(Config::new());
        // SAFETY: what this build checks, is what is tested.
        unsafe {
            assert!(config_ref(config).is_ok());
            free_config(config).unwrap();
            free_config(config).unwrap();
            assert_eq!(config_ref(config).unwrap_err().status, Status::Closed);
            assert_eq!(config_mut(config).unwrap_err().status, Status::Closed);
        }
        let freed = AtomicUsize::new(0);
        let pointer = into_config_pointer(Config::new()).addr();
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
        // SAFETY: from `into_config_pointer`, and only noted as freed so far.
        drop(unsafe { Box::from_raw(ptr::with_exposed_provenance_mut::<Config>(pointer)) });
        let never: *const presence_sender = ptr::without_provenance(1 << 16);
        // SAFETY: as above.
        assert_eq!(unsafe { sender_ref(never) }.err(), Some(Status::Closed));
    }

    /// The same for a sender, whose service waits for its first connection.
    #[test]
    fn a_freed_sender_is_refused() {
        let mut config = Config::new();
        config.set("retry_on_initial_connect", "true").unwrap();
        let connection = Connection::connect("nats://127.0.0.1:1", &config).unwrap();
        let service = connection.serve(&Queue::new(), "freed", "", 0, 0).unwrap();
        let sender =
            Sender::new(service, Arc::clone(&connection), Queue::new(), 0, "reply".into(), "".into(), Box::default());
        // This Arc keeps the sender, so that nothing else gets its address meanwhile.
        let pointer = into_sender_pointer(Arc::clone(&sender));
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
