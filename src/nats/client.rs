//! One connection to one nats-server, by async-nats. It ends when the connection is lost.
//!
//! What async-nats 0.51 does not offer, or does otherwise than this library needs, is worked around here. Each
//! workaround has a test `…_works` in `tests`, and where that can be shown a test `…_is_needed`, which fails when an
//! upgrade has made the workaround unnecessary:
//!
//! - `never_reconnects`: async-nats reconnects at least once (`max_reconnects(0)` means without limit), and then sends
//!   what it had buffered for the lost connection. So the delay callback ends its task by unwinding. Waits for an
//!   option not to reconnect; nats.rs#1186 brought only `max_reconnects`.
//! - `unsub_in_a_subject`: `unsubscribe` drops messages that come after it, and `drain` those that come after the next
//!   wakeup of the task; neither waits for the server. So [`Client::send_unsub`] writes UNSUB as a part of a subject,
//!   which subject validation would refuse. Waits for a `drain` that ends with the PONG: nats.rs#1325, nats.rs#1504.
//! - `encoded_messages`: to give the client one message costs it more than nats-server needs to handle it (a channel, a
//!   semaphore, reference counts, formatting). So [`Client::publish_encoded`] gives it many messages as the payload of
//!   one, whose first line ends in UNSUB of a subscription that does not exist. Waits for a `publish` of many messages.
//! - `counted_sids`: async-nats numbers subscriptions from 1 and does not show the number, which UNSUB and some errors
//!   need. So [`Client::try_subscribe`] counts, too. Waits for a getter.
//! - `refusals_are_read`: `subscribe` succeeds where nats-server refuses, and the error is a text. So `inbound` parses
//!   it. Waits for nats.rs#1284, nats.rs#1485.
//! - `wakers_are_the_message_loop`: each subscription has a channel of its own, so that the order between subscriptions
//!   is lost. So the wakers in `inbound` handle messages. Waits for one channel, or a callback, for several
//!   subscriptions.
//! - `force_reconnect_closes_the_socket`: there is no `close`, and dropping the client does not shut down a socket that
//!   a forked child has, too. So [`Client::close`] forces a reconnect, which never comes. Waits for nats.rs#685.
//! - `flush_is_no_round_trip`: `flush` returns when the bytes are written. So `connection::subscriptions` sends echoes.
//!   Waits for PING and PONG in `flush`.
//! - `a_malformed_message_ends_the_client`: a lone CR in a header value panics the task, while the state stays
//!   Connected. So `inbound` detects that a subscription ends, and `connection::supervisor` replaces the client. Waits
//!   for nats.rs#1612.
//! - `messages_share_the_read_buffer`: the parts of a message are slices of the read buffer (nats.rs#888). So what is
//!   kept is copied. Waits for nothing: copying every message would cost more.

use crate::config::ConnectOptions;
use crate::error::{Error, Result, Status};
use crate::nats::encoded::{EncodedMessage, EncodedMessages};
use crate::nats::message::{HeaderMap, Message, Subject};
use crate::nats::{auth, tls};
use crate::process::runtime;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use async_nats::client::traits::Publisher;
use async_nats::message::OutboundMessage;
use async_nats::rustls::ClientConfig;
use async_nats::{ConnectErrorKind, Event, PublishErrorKind, ServerAddr};
use bytes::Bytes;
use futures_util::{FutureExt, StreamExt};
use once_cell::sync::Lazy;
use std::io;
use std::panic::resume_unwind;
use std::path::Path;
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::task::coop::unconstrained;
use tokio::time::timeout;

/// How many commands async-nats buffers: messages to publish, subscriptions, flushes.
const COMMAND_CAPACITY: usize = 2048;

/// So many encoded messages are published together.
const MANY: usize = 8;

/// The number of a subscription that no client has.
const NO_SID: &str = "none";

/// Called with the text of each error that nats-server sends.
pub(crate) type OnServerError = Arc<dyn Fn(String) + Send + Sync>;

/// A connection to one nats-server, until it is lost. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    inner: async_nats::Client,
    /// The number that async-nats gave to its last subscription.
    last_sid: Arc<AtomicU64>,
}

/// Why a message was not given to the client.
#[derive(Debug)]
pub(crate) enum PublishError {
    /// The client has ended: the connection is lost, or its task has panicked.
    Closed,
    /// This message cannot be sent, such as one that is larger than the server takes.
    Rejected(String),
}

impl From<async_nats::PublishError> for PublishError {
    fn from(error: async_nats::PublishError) -> PublishError {
        match error.kind() {
            PublishErrorKind::Send => PublishError::Closed,
            _ => PublishError::Rejected(error.to_string()),
        }
    }
}

impl Client {
    /// Connects to one server, named `shown` in errors. `tls`: how its certificate is checked, if not against the host
    /// in `server`.
    pub(crate) async fn connect(
        options: &ConnectOptions,
        server: ServerAddr,
        shown: &str,
        tls: Option<ClientConfig>,
        on_server_error: OnServerError,
    ) -> Result<Client> {
        let mut connect = connect_options(options, &server, on_server_error).await?;
        if let Some(tls) = tls {
            connect = connect.tls_client_config(tls);
        }
        // async-nats can panic at what a server sends. It limits the time of each of its steps, but not of the lookup
        // of a name.
        let attempt = runtime::catch_panic("the NATS client", connect.connect(server));
        match timeout(options.connect_timeout * 2, attempt).await {
            Ok(Ok(Ok(inner))) => Ok(Client { inner, last_sid: Arc::default() }),
            Ok(Err(panic)) => Err(Error::new(Status::Disconnected, format!("{shown}: {panic}"))),
            Ok(Ok(Err(error))) => {
                let status = match error.kind() {
                    ConnectErrorKind::TimedOut => Status::Timeout,
                    _ if is_out_of_files(&error) => Status::Full,
                    _ => Status::Disconnected,
                };
                Err(Error::new(status, format!("{shown}: {}", tls::explain(&error.to_string(), options))))
            }
            Err(_) => Err(Error::new(Status::Timeout, format!("{shown}: timed out"))),
        }
    }

    /// Returns the server's own address, as it names it.
    pub(crate) fn address(&self) -> String {
        let info = self.inner.server_info();
        format!("{}:{}", info.host, info.port)
    }

    /// Returns the addresses of the servers of its cluster, as far as the server knows them.
    pub(crate) fn cluster_addresses(&self) -> Vec<String> {
        self.inner.server_info().connect_urls
    }

    pub(crate) fn server_id(&self) -> String {
        self.inner.server_info().server_id
    }

    /// Returns how many bytes a payload may have.
    pub(crate) fn max_payload(&self) -> usize {
        self.inner.max_payload()
    }

    /// Waits until the client has a place for the message in its buffer.
    pub(crate) async fn publish(&self, subject: Subject, payload: Bytes) -> Result<(), PublishError> {
        self.publish_with(subject, None, None, payload).await
    }

    /// As `publish`, with a reply subject and headers.
    pub(crate) async fn publish_with(
        &self,
        subject: Subject,
        reply: Option<Subject>,
        headers: Option<HeaderMap>,
        payload: Bytes,
    ) -> Result<(), PublishError> {
        Ok(self.inner.publish_message(OutboundMessage { subject, reply, headers, payload }).await?)
    }

    /// Publishes messages that are encoded already. `unserved`: a subject of our own whose messages are ignored.
    ///
    /// A few messages are published one by one. If there are many, the client takes them for the payload of one
    /// message: its subject ends an empty message, and begins UNSUB, which has the size of the payload as its maximum.
    /// The empty message comes back, which costs about as much as to give the client a few messages.
    pub(crate) async fn publish_encoded(
        &self,
        mut messages: EncodedMessages,
        unserved: &str,
    ) -> Result<(), PublishError> {
        if messages.count >= MANY && messages.bytes.len() <= self.max_payload() {
            let begin = format!("{unserved} 0\r\n\r\nUNSUB {NO_SID}");
            return self.publish(begin.into(), messages.bytes.freeze()).await;
        }
        let mut result = Ok(());
        while let Some(EncodedMessage { subject, reply, headers, payload }) = messages.take_first() {
            let headers = (!headers.is_empty()).then(|| header_map(&headers));
            let reply = (!reply.is_empty()).then(|| reply.into());
            match self.publish_with(subject.into(), reply, headers, payload).await {
                Ok(()) => {}
                Err(PublishError::Closed) => return Err(PublishError::Closed),
                Err(rejected) => result = Err(rejected),
            }
        }
        result
    }

    /// Publishes if the client's buffer has a place now; else drops the message.
    pub(crate) fn try_publish(&self, subject: Subject, reply: Subject, payload: Bytes) {
        let _ = unconstrained(self.inner.publish_with_reply(subject, reply, payload)).now_or_never();
    }

    /// Waits until the client has written all that it was given to the socket. The server may not have it.
    pub(crate) async fn flush(&self) -> Result<(), PublishError> {
        self.inner.flush().await.map_err(|_| PublishError::Closed)
    }

    /// Subscribes; an empty `group` means none. Returns None if the client's buffer is full. Calls must not overlap.
    pub(crate) fn try_subscribe(&self, subject: Subject, group: &str) -> Option<Result<Subscriber, PublishError>> {
        // async-nats counts calls, whether they succeed or not.
        let sid = self.last_sid.fetch_add(1, Ordering::Relaxed) + 1;
        let subscribed = if group.is_empty() {
            unconstrained(self.inner.subscribe(subject)).now_or_never()
        } else {
            unconstrained(self.inner.queue_subscribe(subject, group.to_owned())).now_or_never()
        };
        Some(subscribed?.map(|inner| Subscriber { inner, sid }).map_err(|_| PublishError::Closed))
    }

    /// Sends UNSUB to the server, while the client goes on to deliver what the server has sent before it processes
    /// that.
    ///
    /// To the client this is an empty message to `unserved`, a subject of our own whose messages are ignored: its
    /// subject ends that message, adds UNSUB, and begins another.
    pub(crate) async fn send_unsub(&self, sid: u64, unserved: &str) -> Result<(), PublishError> {
        self.publish(format!("{unserved} 0\r\n\r\nUNSUB {sid}\r\nPUB {unserved}").into(), Bytes::new()).await
    }

    /// Shuts the socket down, for all processes that have it, and ends the client.
    pub(crate) async fn close(&self) {
        let _ = self.inner.force_reconnect().await;
        // The client processes its commands in order: after this one it has processed the reconnect.
        let _ = self.inner.flush().await;
    }
}

/// The messages of one subscription.
pub(crate) struct Subscriber {
    inner: async_nats::Subscriber,
    /// The number of the subscription in the protocol between client and server.
    pub(crate) sid: u64,
}

impl Subscriber {
    /// Returns the next message, or None when the client has ended. Without a message now, `waker` is called by the
    /// client's task while it hands the next one over.
    pub(crate) fn poll_next(&mut self, waker: &Waker) -> Poll<Option<Message>> {
        // Unconstrained: the caller may run on a task whose cooperative budget is not for this.
        let next = pin!(unconstrained(self.inner.next())).poll(&mut Context::from_waker(waker));
        next.map(|message| message.map(Message::from))
    }
}

/// Reads a headers block of our own. Equal blocks give headers in the same order, so that a retried request looks the
/// same.
fn header_map(block: &str) -> HeaderMap {
    // A clone has the same hash function, which decides the order; a new one would have another.
    static EMPTY: Lazy<HeaderMap> = Lazy::new(HeaderMap::new);
    let mut headers = EMPTY.clone();
    for (name, value) in block.lines().skip(1).filter_map(|line| line.split_once(": ")) {
        headers.append(name, value);
    }
    headers
}

async fn connect_options(
    own: &ConnectOptions,
    server: &ServerAddr,
    on_server_error: OnServerError,
) -> Result<async_nats::ConnectOptions> {
    let is_connected = AtomicBool::new(false);
    let options = match &own.auth_socket {
        None => async_nats::ConnectOptions::new(),
        Some(path) => {
            let path: Arc<Path> = Arc::from(path.as_path());
            async_nats::ConnectOptions::with_auth_callback(move |nonce| {
                let path = Arc::clone(&path);
                async move { auth::ask(&path, &nonce).await.map_err(async_nats::AuthError::new) }
            })
        }
    };
    let mut options = options
        .name(&own.name)
        .connection_timeout(own.connect_timeout)
        .ping_interval(own.ping_interval)
        .client_capacity(COMMAND_CAPACITY)
        .require_tls(own.needs_tls())
        // One client, one server: `dial` tries the others.
        .ignore_discovered_servers()
        .skip_subject_validation(true)
        .event_callback(move |event| {
            match event {
                Event::ServerError(error) => on_server_error(error.to_string()),
                Event::LameDuckMode => {
                    on_server_error("it is in lame duck mode and will close this connection soon".into());
                }
                _ => {}
            }
            std::future::ready(())
        })
        // async-nats calls this before each attempt to connect. The second one would be a reconnect: unwinding ends its
        // task, without a message of the panic hook, and tokio catches it.
        .reconnect_delay_callback(move |_| {
            if is_connected.swap(true, Ordering::Relaxed) {
                resume_unwind(Box::new("the connection is lost"));
            }
            Duration::ZERO
        });
    if own.tls_first {
        options = options.tls_first();
    }
    if let Some(file) = &own.tls_ca_file {
        options = options.add_root_certificates(file.clone());
    }
    if let (Some(cert), Some(key)) = (&own.tls_cert_file, &own.tls_key_file) {
        options = options.add_client_certificate(cert.clone(), key.clone());
    }
    if let Some(seed) = &own.nkey_seed {
        options = options.nkey(seed.0.clone());
    }
    if let Some(file) = &own.creds_file {
        options = options
            .credentials_file(file)
            .await
            .map_err(|error| Error::invalid(format!("creds_file {}: {error}", file.display())))?;
    }
    let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    if let Some(user) = server.username() {
        options = match server.password() {
            Some(password) => options.user_and_password(decode(user), decode(password)),
            None => options.token(decode(user)),
        };
    } else if let Some(token) = &own.token {
        options = options.token(token.0.clone());
    } else if let Some(user) = &own.user {
        let password = own.password.as_ref().map_or("", |password| &password.0);
        options = options.user_and_password(user.clone(), password.into());
    }
    Ok(options)
}

/// Returns true if the process, or the machine, may open no more files, and so no sockets.
pub(crate) fn is_out_of_files(error: &(dyn std::error::Error + 'static)) -> bool {
    let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    matches!(code, Some(libc::EMFILE | libc::ENFILE)) || error.source().is_some_and(is_out_of_files)
}

#[cfg(test)]
#[cfg(not(shuttle))]
mod tests;
