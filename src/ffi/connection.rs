//! The connection to nats-server.

use super::boundary::{guard, guard_error, limit};
use super::codes::presence_status;
use super::handles::{borrow, create, take};
use super::raw::{c_text, config_ref};
use super::types::{presence_config, presence_conn, presence_error, presence_queue};
use crate::config::Config;
use crate::connection::Connection;
use crate::process::runtime;
use std::ffi::c_char;

/// Connects to nats-server. Waits until a server has accepted the connection, or until all have failed.
///
/// `url` is one URL or several separated by commas, such as "nats://a:4222,tls://b:4222". A URL may contain user and
/// password, or a token. `config` is NULL for the defaults; the library does not keep it.
///
/// Servers, and the addresses of a server's name, are tried in random order, those that failed in the last minute after
/// the others. The next one is tried as well when one has not answered for 250 ms. The other servers of a cluster,
/// which nats-server names, are tried too; the certificate of one that is named by its address may be for the host name
/// in the URL. The library reconnects whenever the connection is lost.
///
/// Returns PRESENCE_OK; PRESENCE_INVALID (URL, options), PRESENCE_DISCONNECTED (no server is reached, or all refuse),
/// PRESENCE_TIMEOUT, PRESENCE_FULL (the system gives no thread or file descriptor), PRESENCE_FORKED.
///
/// The caller owns `*out` and must call presence_close.
#[must_use]
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_connect(
    url: *const c_char,
    config: *const presence_config,
    out: *mut *mut presence_conn,
    error: *mut presence_error,
) -> presence_status {
    // SAFETY: the caller's promises are those of guard_error, config_ref, create and c_text.
    unsafe {
        guard_error(error, || {
            runtime::keep_panics();
            let config = if config.is_null() { &Config::new() } else { config_ref(config)? };
            create(out, || Connection::connect(c_text("url", url)?, config))
        })
    }
}

/// Applies the offline announcements of other processes in this one. presence_serve does so too. A second call has no
/// effect.
///
/// Waits until nats-server has the subscription. Without a connection it returns at once, and the subscription is made
/// after the reconnect.
///
/// Returns PRESENCE_OK; PRESENCE_TIMEOUT, PRESENCE_CLOSED; PRESENCE_DISCONNECTED (permissions) or PRESENCE_FULL
/// (max_subscriptions) if nats-server refuses the subscription, which is then tried again.
#[unsafe(no_mangle)]
pub extern "C" fn presence_listen_offline(conn: *mut presence_conn) -> presence_status {
    guard(|| borrow(conn)?.listen_offline())
}

/// Adds events with `tag` to the queue when this connection is made (PRESENCE_EVENT_CONNECTED) and lost
/// (PRESENCE_EVENT_DISCONNECTED), and when there is something that an operator should know (PRESENCE_EVENT_LOG).
///
/// Up to 16 LOG events from before the first call come first. A second call for the same queue changes its tag.
///
/// Returns PRESENCE_OK or PRESENCE_CLOSED.
#[unsafe(no_mangle)]
pub extern "C" fn presence_conn_watch(
    conn: *mut presence_conn,
    queue: *mut presence_queue,
    tag: u64,
) -> presence_status {
    guard(|| borrow(conn)?.watch(&borrow(queue)?, tag))
}

/// Closes a connection and frees it.
///
/// Services stop. Senders and streams that still run end with PRESENCE_CLOSED, and the other ends are notified. Then it
/// waits, for at most `drain_ms`, until nats-server and the other ends of lanes have all that was sent before. It never
/// waits for a reconnect. The handles of the connection's services, senders and streams must still be freed.
///
/// Returns PRESENCE_OK if all was delivered. After PRESENCE_TIMEOUT and PRESENCE_DISCONNECTED (there is no connection,
/// or it was lost meanwhile) it may not have been, but the connection is closed all the same. PRESENCE_CLOSED: it was
/// closed before.
#[unsafe(no_mangle)]
pub extern "C" fn presence_close(conn: *mut presence_conn, drain_ms: i64) -> presence_status {
    guard(|| take(conn)?.close(limit(drain_ms)))
}
