//! The connection to nats-server: made, kept up, and closed so that nothing that was sent is lost.
//!
//! One task per connection gives the NATS client what waits in the [`Outbox`], and replaces the client when it is lost.
//! The client never reconnects by itself: what waits inside it belongs to streams that the loss has ended, and must not
//! come out later as if nothing was missing. So a lost connection and a client that died inside are one and the same case.
//!
//! Messages come in on the client's own task, through the wakers of its subscriptions: each is handled while the client
//! hands it over, so that messages of different subscriptions keep the order in which they arrived.

use crate::config::{Announce, Config, ConnectOptions};
use crate::error::{Error, Result, Status};
use crate::outbox::{Batch, Item, Note, Outbox, Request};
use crate::queue::{Event, Kind, Queue};
use crate::registry::{self, Announcer};
use crate::wire;
use crate::{client, fork, runtime};
use async_nats::{Client, HeaderMap, Message, PublishErrorKind, ServerAddr, Subject, Subscriber};
use bytes::Bytes;
use dashmap::DashMap;
use futures_util::{FutureExt, StreamExt};
use parking_lot::{Mutex, RwLock};
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::panic::resume_unwind;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::task::{Context, Poll, Wake, Waker};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::task::coop::unconstrained;
use tokio::time::{Instant, sleep, sleep_until, timeout};

/// How many messages the NATS client buffers.
const CLIENT_CAPACITY: usize = 2048;
/// How often, at most, an echo asks the server what it has.
const ECHO_INTERVAL: Duration = Duration::from_millis(10);
/// The number of the inbox's own subscription, and of the echo that confirms notes.
const INBOX: u64 = 0;
const CONFIRM: u64 = 0;

/// Whom messages are for: a service, a stream, or whoever waits for an echo.
pub(crate) trait Receiver: Send + Sync {
    /// A message came. Called in the order of arrival, with the connection's link locked.
    fn message(&self, message: Message);
    /// The connection was lost (`Disconnected`) or closed (`Closed`): what runs on it has ended.
    fn ended(&self, why: Status);
}

/// What is to be subscribed as long as there is a connection.
struct Subscription {
    subject: Subject,
    group: String,
    receiver: Arc<dyn Receiver>,
}

/// The subscriptions of the present NATS client. Its lock is held while messages are handled.
#[derive(Default)]
struct Link {
    /// Counts the NATS clients; wakers of an earlier one are ignored.
    generation: u64,
    active: HashMap<u64, Active>,
}

struct Active {
    subscriber: Subscriber,
    waker: Waker,
    /// None: the inbox.
    receiver: Option<Arc<dyn Receiver>>,
}

/// What a connection has done so far, and what it has in hand.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Whether there is a connection to nats-server.
    pub connected: bool,
    /// How often one was made.
    pub connects: u64,
    /// Running streams requested here.
    pub streams: u64,
    /// Running streams served here.
    pub senders: u64,
    /// Requests that came.
    pub requests: u64,
    /// Requests answered with "server busy".
    pub requests_busy: u64,
    /// Requests ignored or refused.
    pub requests_ignored: u64,
    /// Messages given to the NATS client.
    pub messages_out: u64,
    /// Messages that came in.
    pub messages_in: u64,
    /// Messages that came in for nobody.
    pub messages_ignored: u64,
    /// Announcements sent.
    pub offline_out: u64,
    /// Announcements of other processes.
    pub offline_in: u64,
    /// Bytes that wait to be sent.
    pub bytes_waiting: u64,
}

#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) connects: AtomicU64,
    pub(crate) streams: AtomicU64,
    pub(crate) senders: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) requests_busy: AtomicU64,
    pub(crate) requests_ignored: AtomicU64,
    pub(crate) messages_out: AtomicU64,
    pub(crate) messages_in: AtomicU64,
    pub(crate) messages_ignored: AtomicU64,
    pub(crate) offline_out: AtomicU64,
    pub(crate) offline_in: AtomicU64,
}

/// Adds one to a counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A connection to nats-server, kept up until it is closed.
pub struct Connection {
    number: u64,
    this: Weak<Connection>,
    options: ConnectOptions,
    servers: Mutex<Vec<ServerAddr>>,
    runtime: &'static Handle,
    outbox: Outbox,
    /// What the subjects of this connection's inbox begin with, dot included.
    inbox: String,
    offline_subject: Subject,
    link: Mutex<Link>,
    subscriptions: Mutex<BTreeMap<u64, Arc<Subscription>>>,
    /// Who gets what comes to the inbox, by the last token of its subject.
    replies: DashMap<u64, Arc<dyn Receiver>>,
    listens: AtomicBool,
    watchers: RwLock<Vec<(Weak<Queue>, u64)>>,
    log_limit: LogLimit,
    connected: AtomicBool,
    closed: AtomicBool,
    max_payload: AtomicUsize,
    /// The present NATS client is dead.
    died: Notify,
    /// The echo that confirms notes came back.
    confirmed: Notify,
    end: Notify,
    pub(crate) counters: Counters,
}

impl Connection {
    /// Connects to nats-server: one URL or several with commas between. Waits until it is reached or cannot be.
    ///
    /// # Errors
    /// `Invalid` for a wrong URL or option, `Disconnected` and `Timeout` when no server takes us, `Forked`.
    pub fn connect(url: &str, config: &Config) -> Result<Arc<Connection>> {
        let options = config.for_connect()?.clone();
        let servers = parse_servers(url)?;
        let runtime = runtime::start(options.worker_threads)?;
        if let Some(grace) = options.session_grace {
            registry::set_session_grace(grace);
        }
        let connection = Arc::new_cyclic(|this| Connection {
            number: fork::number(),
            this: this.clone(),
            servers: Mutex::new(servers),
            runtime,
            outbox: Outbox::new(options.send_buffer),
            inbox: format!("{}.{}.", options.inbox_prefix, random_token()),
            offline_subject: options.offline_subject.as_str().into(),
            options,
            link: Mutex::default(),
            subscriptions: Mutex::default(),
            replies: DashMap::new(),
            listens: AtomicBool::new(false),
            watchers: RwLock::default(),
            log_limit: LogLimit::default(),
            connected: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            max_payload: AtomicUsize::new(1 << 20),
            died: Notify::new(),
            confirmed: Notify::new(),
            end: Notify::new(),
            counters: Counters::default(),
        });
        let (ready, is_ready) = mpsc::channel();
        let task = Arc::clone(&connection);
        runtime.spawn(async move {
            let first = if task.options.retry_on_initial_connect {
                None
            } else {
                match task.dial().await {
                    Ok(client) => Some(client),
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                }
            };
            if let Some(client) = &first {
                task.install(client).await;
            }
            let _ = ready.send(Ok(()));
            task.supervise(first).await;
        });
        is_ready.recv().unwrap_or_else(|_| Err(Status::Internal.into()))?;
        registry::add_announcer(Arc::clone(&connection) as Arc<dyn Announcer>);
        Ok(connection)
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// This connection, to be kept by what runs on it.
    pub(crate) fn shared(&self) -> Result<Arc<Connection>> {
        self.this.upgrade().ok_or_else(|| Status::Closed.into())
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(crate) fn runtime(&self) -> &'static Handle {
        self.runtime
    }

    /// The largest payload that the server takes, in bytes.
    pub(crate) fn max_payload(&self) -> usize {
        self.max_payload.load(Ordering::Relaxed)
    }

    pub(crate) fn offline_subject(&self) -> &str {
        &self.offline_subject
    }

    /// Applies the offline announcements of other processes in this one. A second call has no effect.
    ///
    /// # Errors
    /// `Closed`, `Timeout`, `Disconnected`.
    pub fn listen_offline(&self) -> Result<()> {
        self.check_open()?;
        if !self.listens.swap(true, Ordering::AcqRel) {
            let listener = Listener { connection: self.this.clone() };
            self.subscribe(fork::number(), self.offline_subject.clone(), "", Arc::new(listener));
        }
        self.settle()
    }

    /// Has the queue tell when this connection is made and lost, and what else people should know.
    ///
    /// # Errors
    /// `Closed`.
    pub fn watch(&self, queue: &Arc<Queue>, tag: u64) -> Result<()> {
        self.check_open()?;
        registry::add_watcher(&mut self.watchers.write(), queue, tag);
        Ok(())
    }

    /// What it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            connected: self.is_connected(),
            connects: get(&self.counters.connects),
            streams: get(&self.counters.streams),
            senders: get(&self.counters.senders),
            requests: get(&self.counters.requests),
            requests_busy: get(&self.counters.requests_busy),
            requests_ignored: get(&self.counters.requests_ignored),
            messages_out: get(&self.counters.messages_out),
            messages_in: get(&self.counters.messages_in),
            messages_ignored: get(&self.counters.messages_ignored),
            offline_out: get(&self.counters.offline_out),
            offline_in: get(&self.counters.offline_in),
            bytes_waiting: self.outbox.weight() as u64,
        }
    }

    /// Ends all that runs on it, waits until the server has what was sent (`None`: without limit), and closes it.
    ///
    /// # Errors
    /// `Timeout` or `Disconnected` when the server may not have it all, `Closed` when it was closed before.
    pub fn close(&self, drain: Option<Duration>) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Err(Error::new(Status::Closed, "the connection was closed before"));
        }
        registry::remove_announcer(self.number);
        self.end_all(Status::Closed);
        let drained = self.echo(drain);
        self.end.notify_one();
        drained
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.connected.load(Ordering::SeqCst)
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Status::Closed, "the connection was closed"));
        }
        Ok(())
    }

    pub(crate) fn check_connected(&self) -> Result<()> {
        self.check_open()?;
        if !self.is_connected() {
            return Err(Error::new(Status::Disconnected, "there is no connection to nats-server now"));
        }
        Ok(())
    }

    /// Keeps a subject subscribed from now on.
    pub(crate) fn subscribe(&self, number: u64, subject: Subject, group: &str, receiver: Arc<dyn Receiver>) {
        let subscription = Subscription { subject, group: group.into(), receiver };
        self.subscriptions.lock().insert(number, Arc::new(subscription));
        self.outbox.push(Item::Subscribe(number));
    }

    /// Ends a subscription. What is on its way may still come.
    pub(crate) fn unsubscribe(&self, number: u64) {
        self.subscriptions.lock().remove(&number);
        self.outbox.push(Item::Unsubscribe(number));
    }

    /// Waits until the server has what was subscribed; without a connection now it is done later.
    pub(crate) fn settle(&self) -> Result<()> {
        match self.echo(Some(self.options.connect_timeout)) {
            Err(error) if error.status == Status::Disconnected => Ok(()),
            other => other,
        }
    }

    /// Gives what comes to the inbox for `number` to `receiver`.
    pub(crate) fn expect(&self, number: u64, receiver: Arc<dyn Receiver>) -> Subject {
        self.replies.insert(number, receiver);
        format!("{}{number}", self.inbox).into()
    }

    /// Takes back `expect`.
    pub(crate) fn forget(&self, number: u64) {
        self.replies.remove(&number);
    }

    /// Waits until the server has all that was sent so far: a message of our own comes back after it.
    fn echo(&self, limit: Option<Duration>) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let number = fork::number();
        let subject = self.expect(number, Arc::new(Echo(sender)));
        // After `expect`: whoever loses the connection first says so, and then looks whom to tell.
        let came = if self.is_connected() {
            self.outbox.push(Item::Echo(subject));
            match limit {
                None => receiver.recv().map_err(|_| Status::Internal),
                Some(limit) => receiver.recv_timeout(limit).map_err(|_| Status::Timeout),
            }
        } else {
            Ok(Err(Status::Disconnected))
        };
        self.forget(number);
        match came.flatten() {
            Ok(()) => Ok(()),
            Err(Status::Timeout) => {
                Err(Error::new(Status::Timeout, format!("nats-server did not answer within {limit:?}")))
            }
            Err(status) => Err(Error::new(status, "there is no connection to nats-server, or it was lost just now")),
        }
    }

    fn end_all(&self, why: Status) {
        let subscriptions: Vec<_> = self.subscriptions.lock().values().cloned().collect();
        subscriptions.iter().for_each(|subscription| subscription.receiver.ended(why));
        // Not while iterating: each forgets itself.
        let replies: Vec<_> = self.replies.iter().map(|entry| Arc::clone(entry.value())).collect();
        replies.iter().for_each(|receiver| receiver.ended(why));
    }

    fn tell(&self, kind: Kind, status: Status, text: &str) {
        for (queue, tag) in self.watchers.read().iter() {
            if let Some(queue) = queue.upgrade() {
                queue.push(Event::new(kind, status, *tag, text.to_owned()));
            }
        }
    }

    /// Tells people something, but not more often than they can read.
    pub(crate) fn log(&self, status: Status, text: impl FnOnce() -> String) {
        let Some(suppressed) = self.log_limit.pass() else { return };
        let mut text = text();
        if suppressed > 0 {
            text += &format!(" (and {suppressed} messages before this one were not shown)");
        }
        for (queue, tag) in self.watchers.read().iter() {
            if let Some(queue) = queue.upgrade() {
                queue.push_log(status, *tag, text.clone());
            }
        }
    }
}

/// The connection's task: dial, drive, and begin again.
impl Connection {
    async fn supervise(self: Arc<Self>, mut first: Option<Client>) {
        loop {
            let client = match first.take() {
                Some(client) => client,
                None => {
                    let redialed = tokio::select! {
                        client = self.redial() => client,
                        () = self.end.notified() => return,
                    };
                    let Some(client) = redialed else {
                        self.closed.store(true, Ordering::Release);
                        registry::remove_announcer(self.number);
                        self.end_all(Status::Closed);
                        let text =
                            format!("gave up after {} failed attempts to reconnect", self.options.max_reconnects);
                        self.tell(Kind::Disconnected, Status::Closed, &text);
                        return;
                    };
                    self.install(&client).await;
                    client
                }
            };
            let mut notes = VecDeque::new();
            let ended = tokio::select! {
                () = self.drive(&client, &mut notes) => false,
                () = self.end.notified() => true,
            };
            self.disconnect(notes);
            if ended {
                return;
            }
            self.tell(Kind::Disconnected, Status::Disconnected, "the connection to nats-server is lost");
        }
    }

    /// Dials until a server takes us; None when that failed too often.
    async fn redial(&self) -> Option<Client> {
        let mut delay = self.options.reconnect_min;
        let mut failed = 0;
        // The first attempt is made at once, but for a little jitter: a server's restart disconnects everybody together.
        sleep(jitter(self.options.reconnect_min)).await;
        loop {
            match self.dial().await {
                Ok(client) => return Some(client),
                Err(error) => self.log(error.status, || format!("cannot connect: {error}")),
            }
            failed += 1;
            if failed == self.options.max_reconnects {
                return None;
            }
            sleep(delay / 2 + jitter(delay / 2)).await;
            delay = (delay * 2).min(self.options.reconnect_max);
        }
    }

    /// Tries each server once, in random order.
    async fn dial(&self) -> Result<Client> {
        let mut servers = self.servers.lock().clone();
        let start = usize::try_from(random()).unwrap_or_default() % servers.len().max(1);
        servers.rotate_left(start);
        let mut failures = Vec::new();
        let mut status = Status::Timeout;
        for server in &servers {
            let name = format!("{}:{}", server.host(), server.port());
            // The client limits each of its steps, but not the lookup of the name.
            let dialed = match self.client_options(server).await {
                Err(error) => return Err(error),
                Ok(options) => timeout(self.options.connect_timeout * 2, options.connect(server.clone())).await,
            };
            match dialed {
                Ok(Ok(client)) => return Ok(client),
                Ok(Err(error)) => {
                    if error.kind() != async_nats::ConnectErrorKind::TimedOut {
                        status = Status::Disconnected;
                    }
                    failures.push(format!("{name}: {error}"));
                }
                Err(_) => failures.push(format!("{name}: timed out")),
            }
        }
        Err(Error::new(status, failures.join("; ")))
    }

    async fn client_options(&self, server: &ServerAddr) -> Result<async_nats::ConnectOptions> {
        let own = &self.options;
        let this = self.this.clone();
        let dialed = AtomicBool::new(false);
        let mut options = async_nats::ConnectOptions::new()
            .name(&own.name)
            .connection_timeout(own.connect_timeout)
            .ping_interval(own.ping_interval)
            .client_capacity(CLIENT_CAPACITY)
            .require_tls(own.tls_required)
            .ignore_discovered_servers()
            // Callers' subjects are checked when they come in; peers' reply subjects too.
            .skip_subject_validation(true)
            .event_callback(move |event| {
                let this = this.clone();
                async move {
                    if let (async_nats::Event::ServerError(error), Some(this)) = (event, this.upgrade()) {
                        this.log(Status::Disconnected, || format!("nats-server says: {error}"));
                    }
                }
            })
            // Called before each attempt. The second is the client's own reconnect, which must not be (see above): there is
            // no option against it, so its task is ended here. This unwinds without a message; tokio contains it.
            .reconnect_delay_callback(move |_| {
                if dialed.swap(true, Ordering::Relaxed) {
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
        match (&own.tls_cert_file, &own.tls_key_file) {
            (Some(cert), Some(key)) => options = options.add_client_certificate(cert.clone(), key.clone()),
            (None, None) => {}
            _ => return Err(Error::invalid("tls_cert_file and tls_key_file go together: one is missing")),
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

    /// Makes a NATS client the present one.
    async fn install(&self, client: &Client) {
        let info = client.server_info();
        self.max_payload.store(client.max_payload(), Ordering::Relaxed);
        self.learn_servers(&info.connect_urls);
        {
            let mut link = self.link.lock();
            link.generation += 1;
            link.active.clear();
        }
        // The order of their numbers: announcements are listened to before the services that need them.
        let numbers: Vec<u64> = self.subscriptions.lock().keys().copied().collect();
        for number in [INBOX].into_iter().chain(numbers) {
            self.activate(client, number).await;
        }
        count(&self.counters.connects);
        self.connected.store(true, Ordering::SeqCst);
        self.tell(Kind::Connected, Status::Ok, &format!("{}:{}", info.host, info.port));
    }

    /// Adds the servers of a cluster to those that are dialed.
    fn learn_servers(&self, urls: &[String]) {
        let mut servers = self.servers.lock();
        let (scheme, userinfo) = servers.first().map_or(("nats", None), |first| {
            (
                if first.tls_required() { "tls" } else { "nats" },
                first.username().map(|user| (user.to_owned(), first.password().map(str::to_owned))),
            )
        });
        let userinfo = match userinfo {
            None => String::new(),
            Some((user, None)) => format!("{user}@"),
            Some((user, Some(password))) => format!("{user}:{password}@"),
        };
        for url in urls {
            if let Ok(server) = format!("{scheme}://{userinfo}{url}").parse::<ServerAddr>()
                && !servers.iter().any(|known| (known.host(), known.port()) == (server.host(), server.port()))
            {
                servers.push(server);
            }
        }
    }

    /// Gives the client what waits in the outbox until it is dead. Leaves in `notes` those that the server may not have.
    async fn drive(&self, client: &Client, notes: &mut VecDeque<Note>) {
        // How many of the notes the echo on its way confirms, and when the next may go.
        let mut asked = 0;
        let mut next_echo = Instant::now();
        // What an earlier client left behind.
        let _ = self.confirmed.notified().now_or_never();
        let _ = self.died.notified().now_or_never();
        if self.is_dead() {
            return;
        }
        loop {
            let is_due = asked == 0 && !notes.is_empty();
            tokio::select! {
                biased;
                () = self.died.notified() => return,
                () = self.confirmed.notified() => {
                    notes.drain(..asked);
                    asked = 0;
                }
                () = sleep_until(next_echo), if is_due => {
                    let subject = Subject::from(format!("{}{CONFIRM}", self.inbox));
                    if client.publish(subject, Bytes::new()).await.is_err() {
                        return;
                    }
                    asked = notes.len();
                    next_echo = Instant::now() + ECHO_INTERVAL;
                }
                batch = self.outbox.take() => {
                    if !self.hand_over(client, batch, notes).await {
                        return;
                    }
                }
            }
        }
    }

    /// Gives the client a batch; false when it is dead. Notes go to `notes` as they are handed over, or cannot be.
    async fn hand_over(&self, client: &Client, mut batch: Batch, notes: &mut VecDeque<Note>) -> bool {
        /// How much is handed over before the room is given back.
        const STEP: usize = 32 << 10;
        let (mut weight, mut messages) = (0, 0);
        while let Some(item) = batch.items.pop_front() {
            weight += item.weight();
            messages += 1;
            let given = match item {
                Item::Message(to, length) => client.publish(to, batch.bytes.split_to(length).freeze()).await,
                Item::Request(request) => {
                    let Request { subject, reply, headers, payload } = *request;
                    match headers {
                        None => client.publish_with_reply(subject, reply, payload).await,
                        Some(headers) => client.publish_with_reply_and_headers(subject, reply, headers, payload).await,
                    }
                }
                Item::Note(note) => {
                    notes.push_back(note.clone());
                    match note {
                        Note::End(to) => client.publish(to, Bytes::from_static(wire::END)).await,
                        Note::Error(to, payload) => client.publish(to, payload).await,
                        Note::Offline(to, id) => {
                            count(&self.counters.offline_out);
                            client.publish_with_headers(to, origin_header(), id).await
                        }
                    }
                }
                Item::Echo(to) => client.publish(to, Bytes::new()).await,
                Item::Subscribe(number) => {
                    self.activate(client, number).await;
                    Ok(())
                }
                Item::Unsubscribe(number) => {
                    let removed = self.link.lock().active.remove(&number);
                    drop(removed);
                    Ok(())
                }
            };
            match given {
                Ok(()) => {}
                Err(error) if error.kind() == PublishErrorKind::Send => {
                    notes.extend(batch.items.into_iter().filter_map(Item::into_note));
                    return false;
                }
                // The sizes were checked, but max_payload is the server's to change when it is another one.
                Err(error) => self.log(Status::TooLarge, || format!("a message was not sent: {error}")),
            }
            if weight >= STEP {
                self.outbox.handed_over(std::mem::take(&mut weight));
            }
        }
        self.outbox.handed_over(weight);
        self.counters.messages_out.fetch_add(messages, Ordering::Relaxed);
        true
    }

    /// Subscribes on the present client, if it is not done yet and still wanted.
    async fn activate(&self, client: &Client, number: u64) {
        let (subject, group, receiver) = if number == INBOX {
            (Subject::from(format!("{}*", self.inbox)), String::new(), None)
        } else {
            match self.subscriptions.lock().get(&number) {
                None => return,
                Some(own) => (own.subject.clone(), own.group.clone(), Some(Arc::clone(&own.receiver))),
            }
        };
        loop {
            {
                // Locked, so that the client's task, should it have a message for another subscription meanwhile, waits
                // until this one's waker is in place: else a request could be overtaken by an announcement.
                let mut link = self.link.lock();
                if link.active.contains_key(&number) {
                    return;
                }
                let subscribed = if group.is_empty() {
                    unconstrained(client.subscribe(subject.clone())).now_or_never()
                } else {
                    unconstrained(client.queue_subscribe(subject.clone(), group.clone())).now_or_never()
                };
                match subscribed {
                    Some(Ok(subscriber)) => {
                        let generation = link.generation;
                        let doorbell = Doorbell { connection: self.this.clone(), number, generation };
                        let active = Active { subscriber, waker: Waker::from(Arc::new(doorbell)), receiver };
                        link.active.insert(number, active);
                        self.receive(&mut link, number);
                        return;
                    }
                    // The client is dead; its inbox tells.
                    Some(Err(_)) => {
                        self.died.notify_one();
                        return;
                    }
                    None => {}
                }
            }
            // The client's buffer is full.
            tokio::task::yield_now().await;
        }
    }

    /// Whether the present client's inbox has ended.
    fn is_dead(&self) -> bool {
        !self.link.lock().active.contains_key(&INBOX)
    }

    /// Handles what a subscription has.
    fn receive(&self, link: &mut Link, number: u64) {
        let Some(Active { subscriber, waker, receiver }) = link.active.get_mut(&number) else { return };
        let mut context = Context::from_waker(waker);
        loop {
            // Unconstrained: the budget of the task that we happen to run on is not ours.
            match pin!(unconstrained(subscriber.next())).poll(&mut context) {
                Poll::Ready(Some(message)) => {
                    count(&self.counters.messages_in);
                    match receiver {
                        Some(receiver) => receiver.message(message),
                        None => self.reply(message),
                    }
                }
                Poll::Ready(None) => {
                    link.active.remove(&number);
                    self.died.notify_one();
                    return;
                }
                Poll::Pending => return,
            }
        }
    }

    /// Handles what came to the inbox.
    fn reply(&self, message: Message) {
        let number = message.subject.strip_prefix(&*self.inbox).and_then(|token| token.parse().ok());
        match number {
            Some(CONFIRM) => self.confirmed.notify_one(),
            Some(number) => match self.replies.get(&number).map(|entry| Arc::clone(entry.value())) {
                Some(receiver) => receiver.message(message),
                None => count(&self.counters.messages_ignored),
            },
            None => count(&self.counters.messages_ignored),
        }
    }

    /// Gives up the present client, and ends what ran on it.
    fn disconnect(&self, notes: VecDeque<Note>) {
        self.connected.store(false, Ordering::SeqCst);
        let active = {
            let mut link = self.link.lock();
            link.generation += 1;
            std::mem::take(&mut link.active)
        };
        drop(active);
        self.end_all(Status::Disconnected);
        self.outbox.lost(notes);
    }
}

impl Announcer for Connection {
    fn announce(&self, id: &str, requested: bool) {
        let announces = match self.options.announce {
            Announce::Always => true,
            Announce::Streams => requested,
            Announce::Never => false,
        };
        if announces {
            let id = Bytes::copy_from_slice(id.as_bytes());
            self.outbox.push(Item::Note(Note::Offline(self.offline_subject.clone(), id)));
        }
    }

    fn number(&self) -> u64 {
        self.number
    }
}

/// The waker of a subscription: rung by the NATS client's task for each message that it hands over.
struct Doorbell {
    connection: Weak<Connection>,
    number: u64,
    generation: u64,
}

impl Wake for Doorbell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(connection) = self.connection.upgrade() {
            let mut link = connection.link.lock();
            if link.generation == self.generation {
                connection.receive(&mut link, self.number);
            }
        }
    }
}

/// Applies the announcements of other processes.
struct Listener {
    connection: Weak<Connection>,
}

impl Receiver for Listener {
    fn message(&self, message: Message) {
        let Some(connection) = self.connection.upgrade() else { return };
        if wire::header(message.headers.as_ref(), wire::ORIGIN) == Some(process_token()) {
            return;
        }
        match client::id(&message.payload) {
            Ok("") => count(&connection.counters.messages_ignored),
            Ok(id) => {
                count(&connection.counters.offline_in);
                registry::apply_offline(id);
            }
            Err(error) => {
                count(&connection.counters.messages_ignored);
                connection.log(Status::Invalid, || format!("an offline announcement was ignored: {error}"));
            }
        }
    }

    fn ended(&self, _why: Status) {}
}

struct Echo(mpsc::SyncSender<Result<(), Status>>);

impl Receiver for Echo {
    fn message(&self, _message: Message) {
        let _ = self.0.try_send(Ok(()));
    }

    fn ended(&self, why: Status) {
        // Closing waits for an echo itself.
        if why != Status::Closed {
            let _ = self.0.try_send(Err(why));
        }
    }
}

/// Lets one message a second pass, and counts the others.
#[derive(Default)]
struct LogLimit(Mutex<(Option<Instant>, u64)>);

impl LogLimit {
    fn pass(&self) -> Option<u64> {
        let mut state = self.0.lock();
        let now = Instant::now();
        if state.0.is_some_and(|last| now.duration_since(last) < Duration::from_secs(1)) {
            state.1 += 1;
            return None;
        }
        let suppressed = state.1;
        *state = (Some(now), 0);
        Some(suppressed)
    }
}

fn parse_servers(url: &str) -> Result<Vec<ServerAddr>> {
    url.split(',').map(str::trim).map(parse_server).collect()
}

fn parse_server(url: &str) -> Result<ServerAddr> {
    // What stands before the @ may be a secret.
    let shown = url.rsplit_once('@').map_or_else(|| url.to_owned(), |(_, host)| format!("…@{host}"));
    let wrong =
        |why: &str| Error::invalid(format!("server URL {shown:?} {why}; right is nats://host:port or tls://host:port"));
    if url.is_empty() {
        return Err(wrong("is empty"));
    }
    let server: ServerAddr = url.parse().map_err(|_| wrong("cannot be read"))?;
    if !matches!(server.scheme(), "nats" | "tls") {
        return Err(wrong("has another scheme than nats and tls"));
    }
    if server.host().is_empty() {
        return Err(wrong("has no host"));
    }
    Ok(server)
}

/// The name of this process among all that announce; a forked child has its own.
fn process_token() -> &'static str {
    static TOKEN: fork::PerProcess<String> = fork::PerProcess::new();
    TOKEN.get(random_token)
}

fn origin_header() -> HeaderMap {
    let mut headers = HeaderMap::new();
    headers.insert(wire::ORIGIN, process_token());
    headers
}

/// 128 bits from the system, in hex: unlike a generator's in memory, they are another process's own after a fork.
fn random_token() -> String {
    format!("{:016x}{:016x}", random(), random())
}

fn random() -> u64 {
    // Without a source of randomness the time must do; uniqueness is all that is needed then.
    getrandom::u64().unwrap_or_else(|_| {
        let elapsed = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
        elapsed.as_nanos() as u64 ^ (u64::from(std::process::id()) << 32)
    })
}

fn jitter(most: Duration) -> Duration {
    most.mul_f64(random() as f64 / u64::MAX as f64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn server_urls() {
        assert_eq!(parse_servers("nats://a:1, tls://u:p@b ,c:3").unwrap().len(), 3);
        for bad in ["", "nats://", "http://a", "nats://a,", "nats://[::1", "nats://a:99999", "ws://a", "nats://a b"] {
            let error = parse_servers(bad).unwrap_err();
            assert_eq!(error.status, Status::Invalid, "{bad}");
        }
        let error = parse_servers("http://user:hunter2@a").unwrap_err();
        assert!(!error.message.contains("hunter2") && error.message.contains("…@a"), "{error}");
    }

    #[test]
    fn jitter_stays_below_its_limit() {
        for _ in 0..1000 {
            assert!(jitter(Duration::from_millis(50)) <= Duration::from_millis(50));
        }
    }
}
