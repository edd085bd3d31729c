//! The names of options. `build.rs` writes them into the header.

/// The options of `presence_connect`.
pub const CONNECT: [&str; 29] = [
    "name",
    "user",
    "password",
    "token",
    "nkey_seed",
    "creds_file",
    "auth_socket",
    "tls_required",
    "tls_first",
    "tls_ca_file",
    "tls_cert_file",
    "tls_key_file",
    "connect_timeout_ms",
    "retry_on_initial_connect",
    "reconnect_min_ms",
    "reconnect_max_ms",
    "max_reconnects",
    "ping_interval_ms",
    "inbox_prefix",
    "offline_subject",
    "announce",
    "lanes",
    "discovery",
    "heartbeat_ms",
    "peer_grace_ms",
    "send_buffer_bytes",
    "receive_buffer_bytes",
    "session_grace_ms",
    "worker_threads",
];

/// The options of `presence_request`.
pub const REQUEST: [&str; 6] =
    ["timeout_ms", "retries", "retry_delay_ms", "stream_buffer_bytes", "manual_credit", "only_online"];

/// What comes before the name of a request's header.
pub const HEADER: &str = "header.";
