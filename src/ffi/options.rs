//! Options, by name.

use super::boundary::{guard, guard_error, guard_or};
use super::codes::presence_status;
use super::raw::{c_text, config_mut, config_ref, free_config, into_config_pointer};
use super::types::{presence_config, presence_error};
use crate::config::Config;
use std::ffi::c_char;

/// Creates a set of options, all of which have their defaults.
///
/// Returns NULL only after a defect of the library. The caller owns the result and must call presence_config_free.
#[must_use]
#[unsafe(no_mangle)]
pub extern "C" fn presence_config_new() -> *mut presence_config {
    guard_or(std::ptr::null_mut(), || Ok(into_config_pointer(Config::new())))
}

/// Sets one option. Files are read when they are used.
///
/// Returns PRESENCE_OK; PRESENCE_INVALID for an unknown key or an invalid value, which changes nothing:
/// presence_config_error says what was wrong.
///
/// Options for presence_connect
///   - name: the connection's name in the monitoring of nats-server. Default "nats-presence".
///   - user and password, token, nkey_seed, or creds_file: how to authenticate. The URL may contain user and password,
///     or a token, instead.
///   - auth_socket: in place of all these, the path of a Unix socket. For each attempt to connect, the library connects
///     to it and writes the nonce of nats-server and a line feed. It then reads lines until the end, each of which is a
///     name, a space and a value: user, password, token, jwt, nkey, signature (of the nonce, in hexadecimal digits), or
///     error and a text. Use it for secrets that change, or that another process has.
///   - tls_required, tls_first: true or false (default). tls_ca_file, tls_cert_file, tls_key_file: PEM files. Each of
///     these except tls_required implies tls_required.
///   - connect_timeout_ms: the limit for each address of each server, and for presence_serve and
///     presence_listen_offline to get an answer of nats-server. Default 5000.
///   - retry_on_initial_connect: true: presence_connect returns at once and connects in the background. Default false.
///   - reconnect_min_ms, reconnect_max_ms: the delay before a reconnect doubles from the one to the other; a random
///     half of it is jitter. Defaults 50 and 4000. The first attempt is made at once, unless the connection was lost as
///     soon as it was made.
///   - max_reconnects: the connection is closed after so many failed attempts in a row. Default 0: never.
///   - ping_interval_ms: how often nats-server is pinged. The connection is lost after two unanswered pings. Default
///     20000.
///   - inbox_prefix: the prefix of the subjects that answers are sent to. Default "_INBOX".
///   - offline_subject: the subject of offline announcements, the same in all processes. Default "client.offline".
///   - announce: which calls of mark_client_offline are announced to other processes: always (default): all; streams:
///     those for clients with running streams that were requested here and are not on a lane; never: none. With always
///     and streams, the ends of level-0 streams, and of sessions with such streams, are announced too.
///   - lanes: true (default): streams use a lane if the other end runs this library; false: all streams of the
///     connection use level 0.
///   - discovery: true (default): a connection that serves subjects answers NATS's service protocol ($SRV.PING, INFO and
///     STATS), so that `nats micro ls`, `info` and `stats` show it, under the option name; false: it does not.
///   - heartbeat_ms: how often the peer of a lane that sends nothing is probed while streams run. It is gone after
///     three intervals without a message. Default 5000.
///   - peer_grace_ms: how long the peer of a lane may be away after nats-server has reported that it is not there (it
///     was killed, or it reconnects), before it is gone. Set 0 to stop at once. Default 1000 for a peer on the same
///     nats-server, and 3000 for others, because servers need a little over a second to restore a broken link.
///   - send_buffer_bytes: how many bytes may wait to be sent and, on each lane, to be acknowledged. Above it, sends
///     return PRESENCE_FULL. Default 4194304.
///   - receive_buffer_bytes: how many bytes may be unread on the connection. Default 67108864. On lanes: once the
///     windows of its streams (stream_buffer_bytes) add up to it, further streams get windows of 8192 bytes. On level
///     0: while so much is unread, a stream that has more than a 64th of it ends with PRESENCE_FULL.
///   - session_grace_ms: how long a client stays online after its last session. It applies to all sessions of the
///     process; the last presence_connect that sets it wins. Default 0.
///   - worker_threads: how many threads the library runs in this process, 1 to 64. The first presence_connect decides.
///     Default 1.
///
/// Options for presence_request
///   - timeout_ms: the limit from the request to the end of the stream, which then ends with PRESENCE_TIMEOUT. Default
///     0: no limit.
///   - retries, retry_delay_ms: how often, and after what delay, the request is sent again while no worker serves the
///     subject or the worker is busy, and no message has come. Defaults 0 and 100.
///   - stream_buffer_bytes: how many bytes of the stream may wait in the queue, plus 64 for each message. On a lane it
///     is the stream's window, at most 4194304: the worker is slowed down, and a stream carries at most so much per
///     round trip. Each slow reader keeps up to so much in memory. Without this option the window is 262144 at first,
///     and grows up to 4194304 while the reader is fast. On level 0 nothing slows the worker down, and the stream ends
///     with PRESENCE_FULL. Default 67108864.
///   - manual_credit: true: a message counts towards stream_buffer_bytes until presence_stream_consumed reports it;
///     false (default): until it has left the queue.
///   - only_online: true: a request for a client that is offline in this process fails with PRESENCE_OFFLINE. Use it
///     for clients that are marked online or have a session, so that a late request does not bring them back. Default
///     false.
///   - header.NAME: a header of the request, such as header.X-Model. Connect-ID, Nats-* and Presence-* are reserved.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_config_set(
    config: *mut presence_config,
    key: *const c_char,
    value: *const c_char,
) -> presence_status {
    // SAFETY: the caller's promises are those of config_mut and c_text.
    guard(|| unsafe {
        let config = config_mut(config)?;
        match (c_text("key", key), c_text("value", value)) {
            (Ok(key), Ok(value)) => config.set(key, value),
            (Err(error), _) | (_, Err(error)) => Err(config.keep_error(error)),
        }
    })
}

/// Fills `error` with what was wrong in the last presence_config_set that failed on these options.
///
/// Returns the status of that call, or PRESENCE_OK if none failed, which leaves `error` unchanged.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_config_error(
    config: *const presence_config,
    error: *mut presence_error,
) -> presence_status {
    // SAFETY: the caller's promises are those of guard_error and config_ref.
    unsafe { guard_error(error, || config_ref(config)?.last_error().map_or(Ok(()), Err)) }
}

/// Frees a set of options. Connections and streams that were made with it do not need it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn presence_config_free(config: *mut presence_config) {
    // SAFETY: the caller's promise is free_config's.
    guard_or((), || unsafe { free_config(config) });
}
