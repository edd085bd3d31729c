//! Who is online: the mission's three functions, their forms with a length, sessions.

use super::guard::{bytes, c_bytes, guard, guard_or, handle, release};
use crate::presence::registry::{self, Session};
use std::ffi::c_char;

/// One of several connections of the same client (two tabs of a browser). Made by presence_session_open.
pub struct presence_session {
    _opaque: [u8; 0],
}

/// Marks a client online in this process, until mark_client_offline or an announcement says otherwise.
///
/// Marking it twice is the same as once. The empty id has no effect and is PRESENCE_OK. Nothing is announced to other
/// processes: a request tells the worker who its client is.
///
/// # Safety
/// `client_id` is NULL (PRESENCE_INVALID) or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mark_client_online(client_id: *const c_char) -> i32 {
    // SAFETY: the caller's promise is c_bytes'.
    guard(|| registry::mark_online(unsafe { c_bytes("client_id", client_id) }?))
}

/// Marks a client offline: its senders and streams in this process stop before this returns, its sessions are over, and
/// every open connection announces it to the other processes (unless its `announce` says otherwise).
///
/// Marking an unknown client offline announces it all the same, for other processes may know it. The empty id has no
/// effect and is PRESENCE_OK. Announcing never blocks; without a connection to the server it waits for the next one.
///
/// # Safety
/// `client_id` is NULL (PRESENCE_INVALID) or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mark_client_offline(client_id: *const c_char) -> i32 {
    // SAFETY: the caller's promise is c_bytes'.
    guard(|| registry::mark_offline(unsafe { c_bytes("client_id", client_id) }?))
}

/// Whether a client is online in this process: it is marked so, has an open session, or has a running stream here.
///
/// The empty id is always online; NULL, an invalid id and an unknown one are not.
///
/// # Safety
/// `client_id` is NULL or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn is_client_online(client_id: *const c_char) -> bool {
    // SAFETY: the caller's promise is c_bytes'.
    guard_or(false, || Ok(registry::is_online(unsafe { c_bytes("client_id", client_id) }?)))
}

/// mark_client_online for an id of `len` bytes that needs no NUL.
///
/// # Safety
/// `id` is readable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_mark_online(id: *const c_char, len: usize) -> i32 {
    // SAFETY: the caller's promise is bytes'.
    guard(|| registry::mark_online(unsafe { bytes("id", id.cast(), len) }?))
}

/// mark_client_offline for an id of `len` bytes that needs no NUL.
///
/// # Safety
/// `id` is readable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_mark_offline(id: *const c_char, len: usize) -> i32 {
    // SAFETY: the caller's promise is bytes'.
    guard(|| registry::mark_offline(unsafe { bytes("id", id.cast(), len) }?))
}

/// is_client_online for an id of `len` bytes that needs no NUL.
///
/// # Safety
/// `id` is readable for `len` bytes.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_is_online(id: *const c_char, len: usize) -> bool {
    // SAFETY: the caller's promise is bytes'.
    guard_or(false, || Ok(registry::is_online(unsafe { bytes("id", id.cast(), len) }?)))
}

/// How many clients are online in this process.
#[unsafe(no_mangle)]
pub extern "C" fn presence_online_count() -> u64 {
    guard_or(0, || Ok(registry::online_count()))
}

/// Opens a session of a client: one of its connections to this process. The client is online here as long as one of its
/// sessions is open. The caller owns the session and must call presence_session_close.
///
/// A client may have sessions in several gateway processes, and each knows its own only. The empty id gives a session
/// without effect.
///
/// # Safety
/// `id` is readable for `len` bytes; `out` is NULL (PRESENCE_INVALID) or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_session_open(id: *const c_char, len: usize, out: *mut *mut presence_session) -> i32 {
    // SAFETY: the caller's promises are those of handle and bytes.
    guard(|| unsafe { handle(out, || Session::open(bytes("id", id.cast(), len)?)) })
}

/// Closes a session and frees it. With a client's last one in this process, after `session_grace_ms` (see
/// presence_config_set; default 0: at once) without a new one, the streams that this process requested for the client end
/// with PRESENCE_OFFLINE, unless it is also marked online. Streams that other processes requested go on, since the client
/// may be connected to those; mark_client_offline ends them as well.
///
/// **A worker on level 0 can be stopped only by announcing the client offline to all processes.** So if one of the streams
/// that end here is on level 0, the client's streams at all other gateways end, too. Where clients have connections to several
/// gateways, have all workers use this library, with lanes.
#[unsafe(no_mangle)]
pub extern "C" fn presence_session_close(session: *mut presence_session) {
    guard_or((), || {
        if let Some(session) = release(session) {
            session.close();
        }
        Ok(())
    });
}
