//! Options and the connection to nats-server.

use super::guard::{
    borrow, c_text, config_mut, config_ref, free_config, give_config, guard, guard_error, guard_or, handle, limit,
    presence_error, take, write_out,
};
use super::queue::presence_queue;
use crate::config::Config;
use crate::connection::{Connection, Stats};
use crate::process::runtime;
use std::ffi::c_char;

/// A set of options. Not for use by several threads at once. Made by presence_config_new.
pub struct presence_config {
    _opaque: [u8; 0],
}

/// A connection to nats-server, kept up until presence_close. Made by presence_connect.
pub struct presence_conn {
    _opaque: [u8; 0],
}

/// What a connection has done since presence_connect, and what it has in hand.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct presence_stats {
    /// 1 while there is a connection to nats-server, else 0.
    pub connected: u64,
    /// How often a connection to nats-server was made; above 1: it was lost in between.
    pub connects: u64,
    /// Running streams that were requested here.
    pub streams: u64,
    /// Running streams that are served here.
    pub senders: u64,
    /// Requests that came to the services here.
    pub requests: u64,
    /// Requests answered with "server busy".
    pub requests_busy: u64,
    /// Requests not answered or refused: no reply subject, one that must not be answered to, a wrong Connect-ID.
    pub requests_ignored: u64,
    /// Messages given to the NATS client, of all kinds.
    pub messages_out: u64,
    /// Messages that came in, of all kinds.
    pub messages_in: u64,
    /// Messages that came in for no running stream, or that nobody should have sent.
    pub messages_ignored: u64,
    /// Offline announcements sent.
    pub offline_out: u64,
    /// Offline announcements of other processes that came in.
    pub offline_in: u64,
    /// Bytes that wait to be given to the NATS client; on lanes, to be acknowledged.
    pub bytes_waiting: u64,
    /// Lanes: other processes with this library that streams run, or ran, to or from.
    pub lanes: u64,
    /// 0.
    pub reserved: [u64; 6],
}

/// Makes an empty set of options: every one has its default. NULL only should the library itself fail.
#[unsafe(no_mangle)]
pub extern "C" fn presence_config_new() -> *mut presence_config {
    guard_or(std::ptr::null_mut(), || Ok(give_config(Config::new())))
}

/// Sets one option. Files are read when they are used. An unknown key or a wrong value is PRESENCE_INVALID, changes
/// nothing, and presence_config_error tells what was wrong.
///
/// For presence_connect
///   - name: the connection's name in the server's monitoring. Default "nats-presence".
///   - user, password · token · nkey_seed · creds_file: how to authenticate; also possible in the URL.
///   - tls_required, tls_first: true or false (default). tls_ca_file, tls_cert_file, tls_key_file: PEM files. Each but
///     tls_required implies that.
///   - connect_timeout_ms: for each address of each server, and for serve and listen to reach it. Default 5000.
///   - retry_on_initial_connect: true: presence_connect returns at once and goes on trying. Default false.
///   - reconnect_min_ms, reconnect_max_ms: the delay before a reconnect doubles between them, each time with a random
///     half of it as jitter. Defaults 50 and 4000. The first attempt is made at once, unless the connection was
///     lost as soon as it was made.
///   - max_reconnects: failed attempts in a row before giving up for good. Default 0: never.
///   - ping_interval_ms: how often the server is probed; it is lost after two unanswered. Default 20000.
///   - inbox_prefix: of the subjects that answers come to. Default "_INBOX".
///   - offline_subject: where clients are announced offline. Default "client.offline". The same in all processes.
///   - announce: which mark_client_offline is announced to other processes. always (default): each; streams: only of
///     clients with running streams that were requested here and are not on a lane; never. Also whether the ends of level-0
///     streams and of sessions with such streams are announced: always and streams: yes; never: no.
///   - lanes: true (default): where the other end runs this library too, streams are batched, flow-controlled and resumed
///     after a reconnect; false: all streams of the connection are on level 0 of the wire.
///   - heartbeat_ms: how often a silent process at the other end of a lane is probed while streams run; after three
///     intervals without a sign of life it is gone. Default 5000.
///   - peer_grace_ms: how long a process at the other end of a lane may be away when nats-server says that it is not
///     there (it was killed, or it reconnects) before it is gone. 0: not at all. Default 1000 for a process on the same
///     nats-server, 3000 for others, because servers take a little over a second to make a broken link between them again.
///   - send_buffer_bytes: how much may wait to be sent, and on each lane, to be acknowledged; beyond, sends are
///     PRESENCE_FULL. Default 4194304.
///   - receive_buffer_bytes: how much may wait unread on the connection. On lanes: when the windows of its streams
///     (stream_buffer_bytes) add up to it, further streams have windows of 8192 bytes. On level 0: when so much waits, a
///     stream that has more than a 64th of it waiting ends with PRESENCE_FULL. Default 67108864.
///   - session_grace_ms: for all sessions of the process (the last connect that sets it wins). Default 0.
///   - worker_threads: of the process's runtime, 1 to 64 (the first connect decides). Default 1.
///
/// For presence_request
///   - timeout_ms: from request to end; beyond, the stream ends with PRESENCE_TIMEOUT. Default 0: none.
///   - retries, retry_delay_ms: how often, and how much later, to ask again while nobody serves the subject or the
///     worker is busy, and no message has come. Defaults 0 and 100.
///   - stream_buffer_bytes: what may wait in the queue for one stream, with 64 for each message. On a lane the worker is
///     held back in time; it is 4194304 at most, and 262144 by default. So many slow readers keep as many times
///     that in memory, and one stream carries at most so much in a round trip. On level 0, where nothing holds the
///     worker back, the stream ends with PRESENCE_FULL; default 67108864.
///   - manual_credit: true: a message waits, for stream_buffer_bytes, until presence_stream_consumed tells that it was
///     used; false (default): until it has left the queue.
///   - only_online: true: a request for a client that is offline in this process fails with PRESENCE_OFFLINE. For clients
///     that are marked online or have a session: a request that is late then does not bring them back. Default false.
///   - header.NAME: a header for the worker, as in header.X-Model. Connect-ID, Nats-… and Presence-… are not yours.
///
/// # Safety
/// `config` is NULL or was made by presence_config_new; `key` and `value` are NULL (PRESENCE_INVALID) or NUL-terminated.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_config_set(
    config: *mut presence_config,
    key: *const c_char,
    value: *const c_char,
) -> i32 {
    // SAFETY: the caller's promises are those of config_mut and c_text.
    guard(|| unsafe {
        let config = config_mut(config)?;
        match (c_text("key", key), c_text("value", value)) {
            (Ok(key), Ok(value)) => config.set(key, value),
            (Err(error), _) | (_, Err(error)) => Err(config.note(error)),
        }
    })
}

/// Tells what the last failed presence_config_set on this set of options found wrong.
///
/// Returns its status, which is PRESENCE_OK when none failed; then `error` is left alone.
///
/// # Safety
/// `config` is NULL (PRESENCE_INVALID) or was made by presence_config_new; `error` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_config_error(config: *const presence_config, error: *mut presence_error) -> i32 {
    // SAFETY: the caller's promises are those of guard_error and config_ref.
    unsafe { guard_error(error, || config_ref(config)?.last_error().map_or(Ok(()), Err)) }
}

/// Frees a set of options. What was made with it does not need it any longer.
///
/// # Safety
/// `config` is NULL or was made by presence_config_new and not freed yet.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_config_free(config: *mut presence_config) {
    // SAFETY: the caller's promise is free_config's.
    guard_or((), || unsafe { free_config(config) });
}

/// Connects to nats-server, waiting until it is reached or cannot be.
///
/// `url` is one URL or several with commas between, as in "nats://a:4222,tls://b:4222"; user and password, or a token,
/// may stand in it. Servers, and the addresses of a server's name, are tried in random order, those that failed in the
/// last minute after the others; the next one when the one before has not answered for 250 ms. The others of a cluster,
/// as the server that took us names them, are tried as well; the certificate of one that is named by its address may be
/// for the host name in the URL. The connection is made anew whenever it is lost.
/// Errors: PRESENCE_INVALID (URL, options), PRESENCE_DISCONNECTED (cannot be reached, or refuses us), PRESENCE_TIMEOUT,
/// PRESENCE_FULL (the system gives no thread or file descriptor), PRESENCE_FORKED.
///
/// # Safety
/// `url` is NULL (PRESENCE_INVALID) or NUL-terminated; `config` is NULL (defaults) or was made by presence_config_new;
/// `out` is NULL (PRESENCE_INVALID) or writable; `error` is NULL or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_connect(
    url: *const c_char,
    config: *const presence_config,
    out: *mut *mut presence_conn,
    error: *mut presence_error,
) -> i32 {
    // SAFETY: the caller's promises are those of the guard's functions.
    unsafe {
        guard_error(error, || {
            runtime::keep_panics();
            let config = if config.is_null() { &Config::new() } else { config_ref(config)? };
            handle(out, || Connection::connect(c_text("url", url)?, config))
        })
    }
}

/// Applies the offline announcements of other processes in this one. presence_serve does it too; a second call is fine.
///
/// Waits until the server has the subscription. Without a connection now it returns at once, and it is done later. Where
/// nats-server refuses it: PRESENCE_DISCONNECTED (permissions) or PRESENCE_FULL (max_subscriptions); it is tried again.
#[unsafe(no_mangle)]
pub extern "C" fn presence_listen_offline(conn: *mut presence_conn) -> i32 {
    guard(|| borrow(conn)?.listen_offline())
}

/// Has the queue tell from now on, with `tag`, when this connection is made and lost, and what else people should know
/// of it (PRESENCE_EVENT_CONNECTED, DISCONNECTED, LOG). What nats-server complained of before anybody watched comes first, up to 16
/// events. A second call for the same queue changes its tag.
#[unsafe(no_mangle)]
pub extern "C" fn presence_conn_watch(conn: *mut presence_conn, queue: *mut presence_queue, tag: u64) -> i32 {
    guard(|| borrow(conn)?.watch(&borrow(queue)?, tag))
}

/// Closes a connection and frees it. Services stop; senders and streams that still run end with PRESENCE_CLOSED, and the
/// other ends are told; then it waits, at most `drain_ms` (negative: without limit), until the server has all that was
/// sent before. It does not wait for a connection: without one now, or when it is lost meanwhile, PRESENCE_DISCONNECTED
/// comes at once.
///
/// PRESENCE_OK: the server has it all. PRESENCE_TIMEOUT, PRESENCE_DISCONNECTED: it may not; the connection is closed all
/// the same. PRESENCE_CLOSED: it was closed already. The handles of its services, senders and streams remain to be freed.
#[unsafe(no_mangle)]
pub extern "C" fn presence_close(conn: *mut presence_conn, drain_ms: i64) -> i32 {
    guard(|| take(conn)?.close(limit(drain_ms)))
}

/// Reads what a connection has done so far.
///
/// # Safety
/// `out` is NULL (PRESENCE_INVALID) or writable.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_conn_stats(conn: *const presence_conn, out: *mut presence_stats) -> i32 {
    // SAFETY: the caller's promise is write_out's.
    guard(|| unsafe { write_out(out, || Ok(export(&borrow(conn)?.stats()))) })
}

fn export(stats: &Stats) -> presence_stats {
    presence_stats {
        connected: stats.connected.into(),
        connects: stats.connects,
        streams: stats.streams,
        senders: stats.senders,
        requests: stats.requests,
        requests_busy: stats.requests_busy,
        requests_ignored: stats.requests_ignored,
        messages_out: stats.messages_out,
        messages_in: stats.messages_in,
        messages_ignored: stats.messages_ignored,
        offline_out: stats.offline_out,
        offline_in: stats.offline_in,
        bytes_waiting: stats.bytes_waiting,
        lanes: stats.lanes,
        reserved: [0; 6],
    }
}
