//! Options, by key and value. `presence_config_set` documents them.

pub mod keys;

use crate::error::{Error, Result, Status};
use crate::wire::level0::{self, Use};
use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

/// Which offline marks a connection announces.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Announce {
    Always,
    /// Those of clients with streams requested on it.
    Streams,
    Never,
}

/// A secret: its `Debug` output hides it.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Secret(pub(crate) String);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// The options of a connection.
#[derive(Clone, Debug)]
pub(crate) struct ConnectOptions {
    pub(crate) name: String,
    pub(crate) user: Option<String>,
    pub(crate) password: Option<Secret>,
    pub(crate) token: Option<Secret>,
    pub(crate) nkey_seed: Option<Secret>,
    pub(crate) creds_file: Option<PathBuf>,
    pub(crate) auth_socket: Option<PathBuf>,
    pub(crate) tls_required: bool,
    pub(crate) tls_first: bool,
    pub(crate) tls_ca_file: Option<PathBuf>,
    pub(crate) tls_cert_file: Option<PathBuf>,
    pub(crate) tls_key_file: Option<PathBuf>,
    pub(crate) connect_timeout: Duration,
    pub(crate) retry_on_initial_connect: bool,
    pub(crate) reconnect_min: Duration,
    pub(crate) reconnect_max: Duration,
    pub(crate) max_reconnects: u32,
    pub(crate) ping_interval: Duration,
    pub(crate) inbox_prefix: String,
    pub(crate) offline_subject: String,
    pub(crate) announce: Announce,
    pub(crate) lanes: bool,
    pub(crate) discovery: bool,
    pub(crate) heartbeat: Duration,
    pub(crate) peer_grace: Duration,
    /// For a peer on another nats-server; the option sets both.
    pub(crate) remote_peer_grace: Duration,
    pub(crate) send_buffer: usize,
    pub(crate) receive_buffer: u64,
    pub(crate) session_grace: Option<Duration>,
    pub(crate) worker_threads: usize,
}

impl ConnectOptions {
    /// Returns how long the other end of a lane may take to reconnect after this connection has reconnected: one
    /// attempt that began too early and times out, the delay after it, and one that succeeds at one of several servers.
    /// This assumes that the other end has the same options.
    pub(crate) fn peer_reconnect(&self) -> Duration {
        self.connect_timeout + self.reconnect_max + SUCCESSFUL_ATTEMPT
    }

    /// Returns true if a connection must use TLS: an option with a certificate implies it.
    pub(crate) fn needs_tls(&self) -> bool {
        self.tls_required || self.tls_first || self.tls_ca_file.is_some() || self.tls_cert_file.is_some()
    }
}

/// How long a successful attempt to connect may take while other servers do not answer.
pub(crate) const SUCCESSFUL_ATTEMPT: Duration = Duration::from_secs(2);

/// The options of a request.
#[derive(Clone, Debug)]
pub(crate) struct RequestOptions {
    pub(crate) timeout: Option<Duration>,
    pub(crate) retries: u32,
    pub(crate) retry_delay: Duration,
    /// How many bytes may be queued for the reader of the stream, if it was set.
    pub(crate) stream_buffer: Option<usize>,
    pub(crate) manual_credit: bool,
    pub(crate) only_online: bool,
    /// The caller's own, checked.
    pub(crate) headers: Vec<(String, String)>,
}

/// A set of options. Each has its default value until it is set.
#[derive(Clone, Debug)]
pub struct Config {
    connect: ConnectOptions,
    request: RequestOptions,
    /// The first option of each kind that was set.
    connect_key: Option<String>,
    request_key: Option<String>,
    last_error: Option<Error>,
}

impl Default for Config {
    fn default() -> Config {
        Config::new()
    }
}

impl Config {
    /// Makes a set of options with the defaults.
    #[must_use]
    pub fn new() -> Config {
        Config {
            connect: ConnectOptions {
                name: "nats-presence".into(),
                user: None,
                password: None,
                token: None,
                nkey_seed: None,
                creds_file: None,
                auth_socket: None,
                tls_required: false,
                tls_first: false,
                tls_ca_file: None,
                tls_cert_file: None,
                tls_key_file: None,
                connect_timeout: Duration::from_secs(5),
                retry_on_initial_connect: false,
                reconnect_min: Duration::from_millis(50),
                reconnect_max: Duration::from_secs(4),
                max_reconnects: 0,
                ping_interval: Duration::from_secs(20),
                inbox_prefix: "_INBOX".into(),
                offline_subject: "client.offline".into(),
                announce: Announce::Always,
                lanes: true,
                discovery: true,
                heartbeat: Duration::from_secs(5),
                peer_grace: Duration::from_secs(1),
                remote_peer_grace: Duration::from_secs(3),
                send_buffer: 4 << 20,
                receive_buffer: 64 << 20,
                session_grace: None,
                worker_threads: 1,
            },
            request: RequestOptions {
                timeout: None,
                retries: 0,
                retry_delay: Duration::from_millis(100),
                stream_buffer: None,
                manual_credit: false,
                only_online: false,
                headers: Vec::new(),
            },
            connect_key: None,
            request_key: None,
            last_error: None,
        }
    }

    /// Sets one option.
    ///
    /// # Errors
    /// `Status::Invalid` for an unknown key or a wrong value. The message has the value, unless it is a secret.
    pub fn set(&mut self, key: &str, value: &str) -> Result<()> {
        self.try_set(key, value).map_err(|error| self.keep_error(error))
    }

    /// Keeps the error of a call that failed before it could call `set`, for `last_error`.
    pub(crate) fn keep_error(&mut self, error: Error) -> Error {
        self.last_error = Some(error.clone());
        error
    }

    /// Returns the error of the last `set` that failed.
    #[must_use]
    pub fn last_error(&self) -> Option<Error> {
        self.last_error.clone()
    }

    /// Returns the options of a connection. Fails if an option of a request was set.
    pub(crate) fn for_connect(&self) -> Result<&ConnectOptions> {
        match &self.request_key {
            Some(key) => Err(Error::invalid(format!("option {key} is an option of a request, not of a connection"))),
            None if self.connect.tls_cert_file.is_some() != self.connect.tls_key_file.is_some() => {
                Err(Error::invalid("tls_cert_file and tls_key_file must both be set"))
            }
            None => Ok(&self.connect),
        }
    }

    /// Returns the options of a request. Fails if an option of a connection was set.
    pub(crate) fn for_request(&self) -> Result<&RequestOptions> {
        match &self.connect_key {
            Some(key) => Err(Error::invalid(format!("option {key} is an option of a connection, not of a request"))),
            None => Ok(&self.request),
        }
    }

    fn try_set(&mut self, key: &str, value: &str) -> Result<()> {
        let (connect, request) = (&mut self.connect, &mut self.request);
        let text = || Some(value.to_owned());
        let secret =
            || if value.is_empty() { Err(wrong(key, "***", "not empty")) } else { Ok(Some(Secret(value.into()))) };
        let file = || if value.is_empty() { Err(wrong(key, value, "a file's path")) } else { Ok(Some(value.into())) };
        let mut is_for_request = false;
        match key {
            "name" => connect.name = line(key, value)?,
            "user" => connect.user = text(),
            "password" => connect.password = Some(Secret(value.into())),
            "token" => connect.token = secret()?,
            "nkey_seed" => connect.nkey_seed = secret()?,
            "creds_file" => connect.creds_file = file()?,
            "auth_socket" => connect.auth_socket = file()?,
            "tls_required" => connect.tls_required = boolean(key, value)?,
            "tls_first" => connect.tls_first = boolean(key, value)?,
            "tls_ca_file" => connect.tls_ca_file = file()?,
            "tls_cert_file" => connect.tls_cert_file = file()?,
            "tls_key_file" => connect.tls_key_file = file()?,
            "connect_timeout_ms" => connect.connect_timeout = millis(key, value, 1)?,
            "retry_on_initial_connect" => connect.retry_on_initial_connect = boolean(key, value)?,
            "reconnect_min_ms" => connect.reconnect_min = millis(key, value, 1)?,
            "reconnect_max_ms" => connect.reconnect_max = millis(key, value, 1)?,
            "max_reconnects" => connect.max_reconnects = number(key, value, 0, u32::MAX.into())?,
            "ping_interval_ms" => connect.ping_interval = millis(key, value, 10)?,
            "inbox_prefix" => {
                level0::check_length("option inbox_prefix", value, level0::MAX_PREFIX)?;
                connect.inbox_prefix = subject(key, value)?;
            }
            "offline_subject" => connect.offline_subject = subject(key, value)?,
            "announce" => {
                connect.announce = match value {
                    "always" => Announce::Always,
                    "streams" => Announce::Streams,
                    "never" => Announce::Never,
                    _ => return Err(wrong(key, value, "always, streams or never")),
                }
            }
            "lanes" => connect.lanes = boolean(key, value)?,
            "discovery" => connect.discovery = boolean(key, value)?,
            "heartbeat_ms" => connect.heartbeat = millis(key, value, 10)?,
            "peer_grace_ms" => {
                connect.peer_grace = millis(key, value, 0)?;
                connect.remote_peer_grace = connect.peer_grace;
            }
            "send_buffer_bytes" => connect.send_buffer = number(key, value, 1, 1 << 40)?,
            "receive_buffer_bytes" => connect.receive_buffer = number(key, value, 1, 1 << 40)?,
            "session_grace_ms" => connect.session_grace = Some(millis(key, value, 0)?),
            "worker_threads" => connect.worker_threads = number(key, value, 1, 64)?,
            _ => {
                is_for_request = true;
                match key {
                    "timeout_ms" => request.timeout = Some(millis(key, value, 0)?).filter(|timeout| !timeout.is_zero()),
                    "retries" => request.retries = number(key, value, 0, u32::MAX.into())?,
                    "retry_delay_ms" => request.retry_delay = millis(key, value, 0)?,
                    "manual_credit" => request.manual_credit = boolean(key, value)?,
                    "only_online" => request.only_online = boolean(key, value)?,
                    "stream_buffer_bytes" => request.stream_buffer = Some(number(key, value, 1, 1 << 40)?),
                    _ => match key.strip_prefix(keys::HEADER) {
                        Some(name) => {
                            level0::check_header(name, value)?;
                            request.headers.push((name.into(), value.into()));
                        }
                        None => {
                            return Err(Error::invalid(format!(
                                "unknown option {key:?}; use: {} {} {}NAME",
                                keys::CONNECT.join(" "),
                                keys::REQUEST.join(" "),
                                keys::HEADER
                            )));
                        }
                    },
                }
            }
        }
        let first = if is_for_request { &mut self.request_key } else { &mut self.connect_key };
        first.get_or_insert_with(|| key.into());
        Ok(())
    }
}

fn wrong(key: &str, value: &str, right: &str) -> Error {
    Error::new(Status::Invalid, format!("option {key} is {value:?}: it must be {right}"))
}

fn boolean(key: &str, value: &str) -> Result<bool> {
    value.parse().map_err(|_| wrong(key, value, "true or false"))
}

fn number<T: TryFrom<u64>>(key: &str, value: &str, min: u64, max: u64) -> Result<T> {
    let number = value.parse().ok().filter(|number| (min..=max).contains(number));
    number
        .and_then(|number| T::try_from(number).ok())
        .ok_or_else(|| wrong(key, value, &format!("a whole number from {min} to {max}")))
}

/// The limit is ten years, so that no sum of times can overflow.
fn millis(key: &str, value: &str, min: u64) -> Result<Duration> {
    number(key, value, min, 10 * 366 * 86_400_000).map(Duration::from_millis)
}

fn line(key: &str, value: &str) -> Result<String> {
    if value.chars().any(char::is_control) {
        return Err(wrong(key, value, "without control characters"));
    }
    Ok(value.into())
}

fn subject(key: &str, value: &str) -> Result<String> {
    level0::check_subject(&format!("option {key}"), value, Use::Publish)?;
    Ok(value.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nats::dial::ATTEMPT_DELAY;

    #[test]
    fn wrong_values_are_in_the_error_and_change_nothing() {
        for (key, value, text) in [
            ("nonsense", "1", "unknown option \"nonsense\"; use: name user"),
            ("tls_first", "yes", "option tls_first is \"yes\": it must be true or false"),
            ("connect_timeout_ms", "-1", "option connect_timeout_ms is \"-1\": it must be a whole number from 1"),
            ("connect_timeout_ms", "5s", "\"5s\""),
            ("worker_threads", "65", "from 1 to 64"),
            ("announce", "sometimes", "always, streams or never"),
            ("offline_subject", "client.*", "option offline_subject \"client.*\" has a wildcard"),
            ("inbox_prefix", "", "is empty"),
            ("creds_file", "", "a file's path"),
            ("auth_socket", "", "a file's path"),
            ("header.Connect-ID", "x", "is reserved"),
            ("header.", "x", "header name"),
        ] {
            let mut config = Config::new();
            let error = config.set(key, value).unwrap_err();
            assert_eq!(error.status, Status::Invalid);
            assert!(error.message.contains(text), "{key}: {error} does not have {text:?}");
            assert_eq!(config.last_error(), Some(error));
            assert!(config.for_connect().is_ok() && config.for_request().is_ok());
        }
    }

    #[test]
    fn options_of_the_other_kind_are_refused() {
        let mut config = Config::new();
        config.set("timeout_ms", "5").unwrap();
        assert!(config.for_connect().unwrap_err().message.contains("timeout_ms"));
        config.set("user", "x").unwrap();
        assert!(config.for_request().unwrap_err().message.contains("user"));
    }

    #[test]
    fn every_option_in_the_list_can_be_set() {
        let header = format!("{}X", keys::HEADER);
        let is_set = |config: &mut Config, key| {
            ["x", "1", "20", "true", "always"].iter().any(|value| config.set(key, value).is_ok())
        };
        for key in keys::CONNECT {
            let mut config = Config::new();
            assert!(is_set(&mut config, key) && config.for_request().is_err(), "{key}");
        }
        for key in keys::REQUEST.into_iter().chain([&header[..]]) {
            let mut config = Config::new();
            assert!(is_set(&mut config, key) && config.for_connect().is_err(), "{key}");
        }
    }

    /// docs/times.md gives the reasons.
    #[test]
    fn default_times_fit_together() {
        let config = Config::new();
        let ConnectOptions {
            connect_timeout,
            reconnect_min,
            reconnect_max,
            ping_interval,
            heartbeat,
            peer_grace,
            session_grace,
            ..
        } = config.connect;
        let peer_reconnect = config.connect.peer_reconnect();
        // All servers of a cluster are tried within one attempt, even if only the last of them answers.
        let servers = 8;
        let dialing = ATTEMPT_DELAY * (servers - 1);
        assert!(dialing < SUCCESSFUL_ATTEMPT && dialing < connect_timeout);
        assert!(ATTEMPT_DELAY < connect_timeout && reconnect_min <= reconnect_max);
        assert!(peer_reconnect >= connect_timeout + reconnect_max + dialing, "a peer has time to reconnect");
        assert!(reconnect_max < peer_reconnect && peer_grace < peer_reconnect);
        // A silent peer is detected before a silent server, or the lane would end for the wrong reason.
        assert!(3 * heartbeat < 2 * ping_interval);
        assert!(peer_grace < 3 * heartbeat, "a peer that nats-server does not know is detected before a silent one");
        assert!(session_grace.is_none() && config.request.timeout.is_none(), "neither ends during a reconnect");
        assert!(config.request.retry_delay < connect_timeout);
    }

    /// docs/times.md gives the reasons.
    #[test]
    fn default_times_of_lanes_fit_together() {
        let config = Config::new();
        let connect = config.for_connect().unwrap();
        // nats-server restores a broken link to another server after 1 s, or with its second attempt.
        assert!(connect.remote_peer_grace >= Duration::from_millis(2500));
        assert!(connect.remote_peer_grace >= connect.peer_grace);
        // A peer whose connection broke reconnects in time: it waits between half of each delay and all of it.
        let attempts = connect.reconnect_min * (1 + 2 + 4);
        assert!(attempts < connect.peer_grace);
        // The heartbeat timeout does not end the lane before the grace period has passed.
        assert!(3 * connect.heartbeat > connect.remote_peer_grace);
        // After a reconnect of this end, the peer has time to reconnect, too, with its longest delay.
        assert!(connect.peer_reconnect() > connect.remote_peer_grace);
        // Two unanswered PINGs detect a silent server; the lane detects a silent peer before that.
        assert!(2 * connect.ping_interval > 3 * connect.heartbeat);
        // The windows of many streams fit.
        assert!(connect.receive_buffer >= 100 * (256 << 10));
    }

    #[test]
    fn secrets_are_not_printed() {
        let mut config = Config::new();
        for key in ["password", "token", "nkey_seed"] {
            config.set(key, "hunter2").unwrap();
        }
        assert!(!format!("{config:?}").contains("hunter2"));
    }
}
