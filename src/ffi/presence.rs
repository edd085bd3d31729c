//! Who is online: marks and sessions.

use super::boundary::{guard, guard_error, guard_or};
use super::codes::presence_status;
use super::handles::{borrow, create, release};
use super::raw::{bytes, c_bytes, slices};
use super::types::{presence_error, presence_queue, presence_session};
use crate::error::Result;
use crate::presence::registry::{self, Session};
use std::ffi::c_char;

/// Marks a client online in this process, until mark_client_offline or an announcement marks it offline.
///
/// A second mark has no effect, and neither has the empty id. The mark is not announced: a request tells the worker
/// which client it is for.
///
/// Returns PRESENCE_OK or PRESENCE_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mark_client_online(client_id: *const c_char) -> presence_status {
    // SAFETY: the caller's promise is c_bytes'.
    guard(|| registry::mark_online(unsafe { c_bytes("client_id", client_id) }?))
}

/// Marks a client offline. Before this returns, the client's senders and streams in this process have stopped, and its
/// sessions are over: no send to this client is accepted any more. Every open connection announces it to the other
/// processes, unless its option announce says otherwise.
///
/// A client that is unknown here is announced too, because other processes may know it. The empty id has no effect.
/// This never blocks: without a connection to nats-server the announcement waits for the reconnect.
///
/// Returns PRESENCE_OK or PRESENCE_INVALID.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mark_client_offline(client_id: *const c_char) -> presence_status {
    // SAFETY: the caller's promise is c_bytes'.
    guard(|| registry::mark_offline(unsafe { c_bytes("client_id", client_id) }?))
}

/// Returns true if a client is online in this process: it is marked online, has an open session, or has a running
/// stream.
///
/// The empty id is always online. NULL, an invalid id and an unknown id are not.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn is_client_online(client_id: *const c_char) -> bool {
    // SAFETY: the caller's promise is c_bytes'.
    guard_or(false, || Ok(registry::is_online(unsafe { c_bytes("client_id", client_id) }?)))
}

/// As mark_client_online, for an id of `len` bytes without a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_mark_online(id: *const c_char, len: usize) -> presence_status {
    // SAFETY: the caller's promise is bytes'.
    guard(|| registry::mark_online(unsafe { bytes("id", id.cast(), len) }?))
}

/// As mark_client_offline, for an id of `len` bytes without a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_mark_offline(id: *const c_char, len: usize) -> presence_status {
    // SAFETY: the caller's promise is bytes'.
    guard(|| registry::mark_offline(unsafe { bytes("id", id.cast(), len) }?))
}

/// Marks many clients online (`online` is true) or offline, each as presence_mark_online and presence_mark_offline do.
///
/// `ids` contains the ids one after the other, and `lens` their `count` lengths. The more ids a call has, up to about
/// 10,000, the less time each one needs. The order in which different clients are marked is not defined.
///
/// Returns PRESENCE_OK; PRESENCE_INVALID if one of the ids is invalid: `error` says which one, counted from 0, and why,
/// and no client was marked.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_mark_many(
    online: bool,
    ids: *const c_char,
    lens: *const usize,
    count: usize,
    error: *mut presence_error,
) -> presence_status {
    // SAFETY: the caller's promises are those of guard_error and slices.
    unsafe { guard_error(error, || registry::mark_many(online, slices("ids", ids.cast(), lens, count)?)) }
}

/// As is_client_online, for an id of `len` bytes without a NUL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_is_online(id: *const c_char, len: usize) -> bool {
    // SAFETY: the caller's promise is bytes'.
    guard_or(false, || Ok(registry::is_online(unsafe { bytes("id", id.cast(), len) }?)))
}

/// Returns how many clients are online in this process.
#[unsafe(no_mangle)]
pub extern "C" fn presence_online_count() -> u64 {
    guard_or(0, || Ok(registry::online_count()))
}

/// Opens a session of a client, for one of its connections to this process. The client is online here as long as one of
/// its sessions is open.
///
/// A client may have sessions in several gateway processes, each of which knows its own only. A session of the empty id
/// has no effect.
///
/// Returns PRESENCE_OK or PRESENCE_INVALID. The caller owns `*out` and must call presence_session_close.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_session_open(
    id: *const c_char,
    len: usize,
    out: *mut *mut presence_session,
) -> presence_status {
    // SAFETY: the caller's promises are those of create and bytes.
    guard(|| unsafe { create(out, || Session::open(bytes("id", id.cast(), len)?)) })
}

/// Returns true if the client is still online by this session: it was not closed, and the client was not marked offline
/// since it was opened, not even if the client has come back meanwhile. False for NULL.
#[unsafe(no_mangle)]
pub extern "C" fn presence_session_is_open(session: *const presence_session) -> bool {
    guard_or(false, || Ok(borrow(session)?.is_open()))
}

/// Closes a session and frees it.
///
/// When a client's last session in this process is closed, and none is opened within session_grace_ms (default 0: at
/// once), the streams that this process requested for the client end with PRESENCE_OFFLINE, unless the client is also
/// marked online. Streams that other processes requested go on, because the client may be connected to those processes;
/// mark_client_offline ends them too.
///
/// **A worker on level 0 can be stopped only by announcing the client offline to all processes.** So if one of the
/// streams that end here is on level 0, the client's streams at all other gateways end too. If clients are connected to
/// several gateways at a time, run this library in all workers, with lanes.
#[unsafe(no_mangle)]
pub extern "C" fn presence_session_close(session: *mut presence_session) {
    guard_or((), || release(session, Session::close));
}

/// Adds an event with `tag` to the queue whenever a client comes online (PRESENCE_EVENT_ONLINE) or goes offline
/// (PRESENCE_EVENT_OFFLINE) in this process.
///
/// A second call for the same queue changes its tag. The queue holds at most 65,536 of these events. Further ones are
/// dropped, and one PRESENCE_EVENT_LOG with PRESENCE_FULL says so.
///
/// Returns PRESENCE_OK or PRESENCE_CLOSED.
#[unsafe(no_mangle)]
pub extern "C" fn presence_watch(queue: *mut presence_queue, tag: u64) -> presence_status {
    guard(|| -> Result<()> {
        registry::watch(&borrow(queue)?, tag);
        Ok(())
    })
}
