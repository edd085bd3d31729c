//! The connection to nats-server: made, kept up, and closed so that nothing that was sent is lost.
//!
//! One task per connection gives the NATS client what waits in the [`Outbox`], and replaces the client when it is lost.
//! The client never reconnects by itself: what waits inside it belongs to streams that the loss has ended, and must not
//! come out later as if nothing was missing. So a lost connection and a client that died inside are one and the same case.
//!
//! Messages come in on the client's own task, through the wakers of its subscriptions: each is handled while the client
//! hands it over, so that messages of different subscriptions keep the order in which they arrived.

use crate::config::{Announce, Config, ConnectOptions, SUCCESSFUL_ATTEMPT};
use crate::error::{Error, Result, Status};
use crate::events::{Kind, Queue, Wakeups};
use crate::lane::lanes::Lanes;
use crate::lane::state::PeerTimeouts;
use crate::nats::dial::{self, Dialer};
use crate::nats::inbound::{Inbound, Inbox, MessageHandler, Subscription};
use crate::nats::outbox::{DurableMessage, DurableMessages, Item, Outbox, Recent};
use crate::nats::writer::{Confirmation, Drive};
use crate::presence::client_id;
use crate::presence::registry::{self, Announcer};
use crate::process::fork;
use crate::process::random::{self, jitter};
use crate::process::runtime;
use crate::sync::{Mutex, RwLock};
use crate::wire::level0;
use async_nats::{Client, HeaderMap, Message, Subject};
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::{Instant, sleep, timeout};

/// A connection that is lost before this is a reason to pause before the next, each time for longer, up to a limit.
const SHORT_LIVED: Duration = Duration::from_millis(100);
const MAX_PAUSE: Duration = Duration::from_millis(100);
/// Of how many connections a process remembers what it has heard.
const MAX_ORIGINS: usize = 4096;
/// How many LOG events may come at once.
const LOGS_AT_ONCE: u64 = 16;
/// How many LOG events are kept for who watches first.
const MAX_EARLY_LOGS: usize = 16;

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
    /// Bytes that wait to be sent, and on lanes, to be acknowledged.
    pub bytes_waiting: u64,
    /// Processes that streams share a lane with.
    pub lanes: u64,
}

/// What the parts of a connection count.
#[derive(Default)]
pub(crate) struct Counters {
    pub(crate) connects: AtomicU64,
    pub(crate) streams: AtomicU64,
    /// The windows of all streams requested here, and on level 0 what waits for their readers, in bytes.
    pub(crate) windows: AtomicU64,
    pub(crate) unread: AtomicU64,
    pub(crate) senders: AtomicU64,
    pub(crate) requests: AtomicU64,
    pub(crate) requests_busy: AtomicU64,
    pub(crate) requests_ignored: AtomicU64,
    pub(crate) messages_out: AtomicU64,
    pub(crate) offline_out: AtomicU64,
    offline_in: AtomicU64,
    offline_ignored: AtomicU64,
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
    runtime: &'static Handle,
    dialer: Dialer,
    inbound: Arc<Inbound>,
    wakeups: Arc<Wakeups>,
    inbox: Arc<Inbox>,
    lanes: Arc<Lanes>,
    outbox: Outbox,
    offline_subject: Subject,
    /// What is to be subscribed whenever there is a connection, in the order of their numbers.
    subscriptions: Mutex<BTreeMap<u64, Subscription>>,
    /// Who was ever subscribed and still exists: a service that takes no more requests may have senders that run.
    receivers: Mutex<Vec<Weak<dyn MessageHandler>>>,
    /// The subscription to announcements, if there is one.
    listens: OnceCell<u64>,
    /// How many announcements it has made, and those that others may have missed.
    announcements: AtomicU64,
    pub(crate) recent: Mutex<Recent>,
    heard: Mutex<Heard>,
    /// Subscriptions that nats-server refuses, and why. Each is tried again by a task of its own.
    refusals: Mutex<HashMap<u64, Error>>,
    watchers: RwLock<Vec<(Weak<Queue>, u64)>>,
    /// What there was to log before anybody watched.
    early_logs: Mutex<Vec<(Status, String)>>,
    log_limit: LogLimit,
    connected: AtomicBool,
    closed: AtomicBool,
    max_payload: AtomicUsize,
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
        let servers = dial::parse_servers(url)?;
        let runtime = runtime::start(options.worker_threads)?;
        let wakeups: Arc<Wakeups> = Arc::default();
        let inbox = Arc::new(Inbox::new(format!("{}.{}.", options.inbox_prefix, random::token())));
        let patience = PeerTimeouts {
            heartbeat: options.heartbeat,
            grace: options.peer_grace,
            remote_grace: options.remote_peer_grace,
            reconnect: options.peer_reconnect(),
        };
        let connection = Arc::new_cyclic(|this| Connection {
            number: fork::next_handle_id(),
            this: this.clone(),
            runtime,
            dialer: Dialer::new(servers, options.clone(), server_error_logger(this.clone())),
            lanes: Lanes::new(
                runtime,
                Arc::clone(&wakeups),
                Arc::clone(&inbox),
                &options.offline_subject,
                options.send_buffer,
                patience,
                log_to(this.clone()),
            ),
            inbound: Arc::default(),
            wakeups,
            inbox,
            outbox: Outbox::new(options.send_buffer),
            offline_subject: options.offline_subject.as_str().into(),
            options,
            subscriptions: Mutex::default(),
            receivers: Mutex::default(),
            listens: OnceCell::new(),
            announcements: AtomicU64::new(0),
            recent: Mutex::default(),
            heard: Mutex::default(),
            refusals: Mutex::default(),
            watchers: RwLock::default(),
            early_logs: Mutex::default(),
            log_limit: LogLimit::new(),
            connected: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            max_payload: AtomicUsize::new(1 << 20),
            end: Notify::new(),
            counters: Counters::default(),
        });
        // Numbers rise: what answers come to is subscribed before all else.
        let (inbox, lanes) = (Arc::clone(&connection.inbox), Arc::clone(&connection.lanes));
        connection.subscribe(fork::next_handle_id(), inbox.wildcard(), "", inbox);
        if connection.options.lanes {
            connection.subscribe(fork::next_handle_id(), lanes.wildcard(), "", lanes);
        }
        let (ready, is_ready) = mpsc::channel();
        let task = Arc::clone(&connection);
        runtime.spawn(async move {
            let mut first = None;
            if !task.options.retry_on_initial_connect {
                match task.dialer.dial().await {
                    Ok(client) => {
                        task.install(&client).await;
                        first = Some(client);
                    }
                    Err(error) => {
                        let _ = ready.send(Err(error));
                        return;
                    }
                }
            }
            let _ = ready.send(Ok(()));
            let wakeups = Arc::clone(&task.wakeups);
            let caller = runtime
                .spawn(async move { while runtime::catch_panic("calling wakeups", wakeups.run()).await.is_err() {} });
            Arc::clone(&task).supervise(first).await;
            caller.abort();
            task.wakeups.end();
        });
        is_ready.recv().unwrap_or_else(|_| Err(Status::Internal.into()))?;
        registry::add_announcer(Arc::clone(&connection) as Arc<dyn Announcer>, connection.inbox.prefix());
        if connection.check_open().is_err() {
            // It has given up meanwhile.
            registry::remove_announcer(connection.number);
        }
        if let Some(grace) = connection.options.session_grace {
            registry::set_session_grace(grace);
        }
        Ok(connection)
    }

    pub(crate) fn handle_id(&self) -> u64 {
        self.number
    }

    /// This connection, to be kept by what runs on it.
    pub(crate) fn shared(&self) -> Result<Arc<Connection>> {
        self.this.upgrade().ok_or_else(|| Status::Closed.into())
    }

    pub(crate) fn outbox(&self) -> &Outbox {
        &self.outbox
    }

    pub(crate) fn inbound(&self) -> &Arc<Inbound> {
        &self.inbound
    }

    pub(crate) fn wakeups(&self) -> &Wakeups {
        &self.wakeups
    }

    /// The lanes, if this connection has any.
    pub(crate) fn lanes(&self) -> Option<&Lanes> {
        (self.options.lanes && !self.lanes.is_forbidden()).then_some(&*self.lanes)
    }

    /// Expects no more answers to the request with this key. Returns false if that was done before.
    pub(crate) fn forget_request(&self, key: u64) -> bool {
        self.lanes.forget_accept(key);
        self.inbox.forget(key)
    }

    pub(crate) fn receive_buffer(&self) -> u64 {
        self.options.receive_buffer
    }

    pub(crate) fn send_buffer(&self) -> usize {
        self.options.send_buffer
    }

    /// What is to be subscribed under this number, if it still is.
    pub(crate) fn subscription(&self, number: u64) -> Option<Subscription> {
        self.subscriptions.lock().get(&number).cloned()
    }

    pub(crate) fn inbox(&self) -> &Inbox {
        &self.inbox
    }

    pub(crate) fn runtime(&self) -> &'static Handle {
        self.runtime
    }

    /// The largest payload that the server takes, in bytes.
    pub(crate) fn max_payload(&self) -> usize {
        self.max_payload.load(Ordering::Relaxed)
    }

    /// The number of the announcement that is made now.
    pub(crate) fn next_announcement(&self) -> u64 {
        self.announcements.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(crate) fn offline_subject(&self) -> &str {
        &self.offline_subject
    }

    /// Applies the offline announcements of other processes in this one. A second call has no effect.
    ///
    /// # Errors
    /// `Closed`, `Timeout`; `Disconnected` (or `Full`, when there are too many) where nats-server refuses the subscription.
    /// It is then tried again while the connection lives.
    pub fn listen_offline(&self) -> Result<()> {
        let number = self.subscribe_offline()?;
        self.flush_subscription(number)
    }

    /// Subscribes to announcements; the number of the subscription.
    pub(crate) fn subscribe_offline(&self) -> Result<u64> {
        self.check_open()?;
        let number = *self.listens.get_or_init(|| {
            let listener = Listener { connection: self.this.clone() };
            let number = fork::next_handle_id();
            self.subscribe(number, self.offline_subject.clone(), "", Arc::new(listener));
            number
        });
        self.flush_subscriptions()?;
        Ok(number)
    }

    /// Waits until the server has a subscription, or refuses it; without a connection now it is done later.
    pub(crate) fn flush_subscription(&self, number: u64) -> Result<()> {
        self.flush_subscriptions()?;
        // A refusal comes before the echo, but is told by another task. It has had its turn when the second echo comes.
        self.flush_subscriptions()?;
        self.refusal(number).map_or(Ok(()), Err)
    }

    /// Why nats-server refuses a subscription, if it does.
    pub(crate) fn refusal(&self, number: u64) -> Option<Error> {
        self.refusals.lock().get(&number).cloned()
    }

    /// nats-server refuses a subscription: notifies its receiver, and subscribes again until it is accepted or ended.
    fn subscription_refused(&self, number: u64, said: &str) {
        let Some(subscription) = self.subscription(number) else { return };
        let (status, hint) = match said.contains("maximum subscriptions") {
            true => (Status::Full, "raise max_subscriptions of nats-server"),
            false => (Status::Disconnected, "allow this user to subscribe to it"),
        };
        let text = format!("nats-server refuses the subscription of {}: {said}; {hint}", subscription.subject);
        let why = Error::new(status, text);
        if self.refusals.lock().insert(number, why.clone()).is_none() {
            subscription.receiver.subscription_refused(&why);
            let ConnectOptions { reconnect_min, reconnect_max, .. } = self.options;
            self.runtime.spawn(subscribe_again(self.this.clone(), number, reconnect_min, reconnect_max));
        }
    }

    /// Whether the server answers: it has all that was sent so far.
    async fn is_answered(&self) -> bool {
        let answered = Arc::new(Notify::new());
        let number = random::random_u64();
        let subject = self.inbox.expect(number, Arc::new(Confirmation(Arc::clone(&answered))));
        self.outbox.push(Item::Echo(subject));
        let is_answered = timeout(self.options.connect_timeout, answered.notified()).await.is_ok();
        self.inbox.forget(number);
        is_answered
    }

    /// Has the queue tell when this connection is made and lost, and what else people should know.
    ///
    /// # Errors
    /// `Closed`.
    pub fn watch(&self, queue: &Arc<Queue>, tag: u64) -> Result<()> {
        self.check_open()?;
        let mut watchers = self.watchers.write();
        registry::add_watcher(&mut watchers, queue, tag);
        for (status, text) in self.early_logs.lock().drain(..) {
            queue.push_connection("", Kind::Log, status, tag, text);
        }
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
            messages_out: get(&self.counters.messages_out) + get(&self.lanes.sent),
            messages_in: get(&self.inbound.messages),
            messages_ignored: get(&self.inbox.ignored) + get(&self.lanes.ignored) + get(&self.counters.offline_ignored),
            offline_out: get(&self.counters.offline_out),
            offline_in: get(&self.counters.offline_in),
            bytes_waiting: (self.outbox.weight() + self.lanes.backlog()) as u64,
            lanes: self.lanes.count() as u64,
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
        let deadline = drain.and_then(|drain| Instant::now().checked_add(drain));
        self.end_all(Status::Closed);
        // All but those for answers: requests that are on their way are refused.
        let answers = if self.options.lanes { 2 } else { 1 };
        let services: Vec<u64> = self.subscriptions.lock().keys().skip(answers).copied().collect();
        services.into_iter().for_each(|number| self.unsubscribe(number));
        // What was on its way has come with the first echo, and the refusals are at the server with the second.
        let left = || deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let drained = self.echo(left()).and_then(|()| self.drain_lanes(left()));
        self.inbox.give_up_answers();
        self.lanes.end();
        let drained = self.echo(left()).and(drained);
        self.end.notify_one();
        drained
    }

    /// Waits until the other ends of all lanes have what was sent.
    fn drain_lanes(&self, limit: Option<Duration>) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let lanes = Arc::clone(&self.lanes);
        self.runtime.spawn(async move {
            let _ = sender.try_send(lanes.drain().await);
        });
        let drained = match limit {
            None => receiver.recv().ok(),
            Some(limit) => receiver.recv_timeout(limit).ok(),
        };
        match drained {
            Some(true) => Ok(()),
            Some(false) => Err(Error::new(Status::Disconnected, "the connection was lost before all was acknowledged")),
            None => Err(Error::new(Status::Timeout, "not all peers acknowledged what was sent in the time given")),
        }
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
        // Without the inbox no answer would come. It has the lowest number.
        let refusals = self.refusals.lock();
        if !refusals.is_empty()
            && let Some(why) = self.subscriptions.lock().keys().next().and_then(|inbox| refusals.get(inbox))
        {
            return Err(Error::new(Status::Disconnected, why.message.clone()));
        }
        Ok(())
    }

    /// Keeps a subject subscribed from now on.
    pub(crate) fn subscribe(&self, number: u64, subject: Subject, group: &str, receiver: Arc<dyn MessageHandler>) {
        {
            let mut receivers = self.receivers.lock();
            receivers.retain(|other| other.strong_count() > 0);
            receivers.push(Arc::downgrade(&receiver));
        }
        let subscription = Subscription { subject, group: group.into(), receiver };
        self.subscriptions.lock().insert(number, subscription);
        self.outbox.push(Item::Subscribe(number));
    }

    /// Ends a subscription, once what is on its way has come.
    pub(crate) fn unsubscribe(&self, number: u64) {
        let subscribed = self.subscriptions.lock().remove(&number);
        if subscribed.is_some() {
            UnsubscribeBarrier::say(self, number);
        }
    }

    /// Waits until the server has what was subscribed; without a connection now it is done later.
    pub(crate) fn flush_subscriptions(&self) -> Result<()> {
        match self.echo(Some(self.options.connect_timeout)) {
            Err(error) if error.status == Status::Disconnected => self.check_open(),
            other => other,
        }
    }

    /// Waits until the server has all that was sent so far: a message of our own comes back after it.
    fn echo(&self, limit: Option<Duration>) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let number = random::random_u64();
        let subject = self.inbox.expect(number, Arc::new(Echo(sender)));
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
        self.inbox.forget(number);
        match came.flatten() {
            Ok(()) => Ok(()),
            Err(Status::Timeout) => Err(Error::new(
                Status::Timeout,
                format!("nats-server did not answer within {:?}", limit.unwrap_or_default()),
            )),
            Err(status) => Err(Error::new(status, "there is no connection to nats-server, or it was lost just now")),
        }
    }

    fn all_receivers(&self) -> Vec<Arc<dyn MessageHandler>> {
        self.receivers.lock().iter().filter_map(Weak::upgrade).collect()
    }

    fn end_all(&self, why: Status) {
        self.all_receivers().iter().for_each(|receiver| receiver.ended(why));
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        self.all_receivers().iter().fold(None, |so, receiver| receiver.refused(subject).or(so))
    }

    fn tell(&self, kind: Kind, status: Status, text: &str) {
        tell(&self.watchers.read(), kind, status, text);
    }

    /// Tells people something, but not more often than they can read.
    pub(crate) fn log(&self, status: Status, text: impl FnOnce() -> String) {
        let Some(suppressed) = self.log_limit.pass() else { return };
        let mut text = text();
        if suppressed > 0 {
            text += &format!(" (and {suppressed} messages before this one were not shown)");
        }
        let watchers = self.watchers.read();
        if watchers.is_empty() {
            let mut early = self.early_logs.lock();
            // Attempts to connect are over when somebody asks; what nats-server complained of may not be.
            if early.len() < MAX_EARLY_LOGS && self.is_connected() {
                early.push((status, text));
            }
            return;
        }
        tell(&watchers, Kind::Log, status, &text);
    }
}

/// The connection's task: dial, drive, and begin again.
impl Connection {
    async fn supervise(self: Arc<Self>, mut client: Option<Client>) {
        let mut pause = Duration::ZERO;
        loop {
            if let Some(client) = client.take() {
                let begun = Instant::now();
                let mut drive = Drive::new(&self, &client);
                let driven = tokio::select! {
                    driven = runtime::catch_panic("sending", drive.run()) => Some(driven),
                    () = self.end.notified() => None,
                };
                let notes = drive.into_notes();
                self.disconnect(notes);
                let Some(driven) = driven else {
                    // This shuts its socket down: dropping it would not, where a forked child has inherited it. With the
                    // flush it has seen to it before it is dropped.
                    let _ = client.force_reconnect().await;
                    let _ = client.flush().await;
                    return;
                };
                let why = match driven {
                    Err(error) => Some(format!(": {error}")),
                    Ok(()) => runtime::last_panic().map(|panic| format!(": the NATS client failed: {panic}")),
                };
                let text = format!("the connection to nats-server is lost{}", why.unwrap_or_default());
                self.tell(Kind::Disconnected, Status::Disconnected, &text);
                // One that is lost as soon as it is made, may be so again and again.
                pause = match begun.elapsed() < SHORT_LIVED {
                    true => (pause * 2).max(self.options.reconnect_min).min(MAX_PAUSE).min(self.options.reconnect_max),
                    false => Duration::ZERO,
                };
            }
            let next = tokio::select! {
                client = self.redial(pause) => client,
                () = self.end.notified() => return,
            };
            match next {
                Some(next) => match runtime::catch_panic("subscribing", self.install(&next)).await {
                    Ok(()) => client = Some(next),
                    Err(error) => {
                        self.disconnect(DurableMessages::default());
                        self.log(error.status, || error.to_string());
                    }
                },
                None => return self.give_up(),
            }
        }
    }

    /// Dials until a server takes us; None when that failed too often.
    async fn redial(&self, pause: Duration) -> Option<Client> {
        let mut delay = self.options.reconnect_min.min(self.options.reconnect_max);
        let mut failed = 0;
        // The first attempt is made at once, but for a little jitter: a server's restart disconnects everybody together.
        sleep(pause / 2 + jitter(delay.max(pause / 2))).await;
        loop {
            match self.dialer.dial().await {
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

    fn give_up(&self) {
        self.closed.store(true, Ordering::Release);
        registry::remove_announcer(self.number);
        self.end_all(Status::Closed);
        self.inbox.give_up_answers();
        self.lanes.end();
        let text = format!("gave up after {} failed attempts to reconnect", self.options.max_reconnects);
        self.tell(Kind::Disconnected, Status::Closed, &text);
    }

    /// Makes a NATS client the present one.
    async fn install(&self, client: &Client) {
        let info = client.server_info();
        self.max_payload.store(client.max_payload(), Ordering::Relaxed);
        self.dialer.learn(&info.connect_urls);
        self.inbound.reset();
        *self.heard.lock() = Heard { since: fork::next_handle_id(), first: HashMap::new() };
        if self.counters.connects.load(Ordering::Relaxed) > 0 {
            // By then others have reconnected, too.
            self.recent.lock().repeat((Instant::now() + self.options.reconnect_max + SUCCESSFUL_ATTEMPT).into());
        }
        // In this order: announcements are listened to before the services that need them.
        let subscriptions = self.subscriptions.lock().clone();
        for (number, subscription) in subscriptions {
            self.inbound.subscribe(client, number, subscription).await;
        }
        count(&self.counters.connects);
        self.lanes.set_client(Some(client.clone()));
        // Who begins to watch when it is connected is not told of that.
        let watchers = self.watchers.read();
        self.connected.store(true, Ordering::SeqCst);
        tell(&watchers, Kind::Connected, Status::Ok, &format!("{}:{}", info.host, info.port));
    }

    /// Gives up the present client, and ends what ran on it. `notes`: what the server may not have.
    fn disconnect(&self, notes: DurableMessages) {
        self.connected.store(false, Ordering::SeqCst);
        self.lanes.set_client(None);
        self.inbound.reset();
        self.end_all(Status::Disconnected);
        self.outbox.lost(notes);
    }
}

fn tell(watchers: &[(Weak<Queue>, u64)], kind: Kind, status: Status, text: &str) {
    for (queue, tag) in watchers {
        if let Some(queue) = queue.upgrade() {
            queue.push_connection("", kind, status, *tag, text.to_owned());
        }
    }
}

/// Tells people what a part of the connection found.
fn log_to(connection: Weak<Connection>) -> impl Fn(String) + Send + Sync {
    move |text| {
        if let Some(connection) = connection.upgrade() {
            connection.log(Status::PeerGone, || text);
        }
    }
}

/// Tells what nats-server complains of, such as a missing permission.
fn server_error_logger(connection: Weak<Connection>) -> Arc<dyn Fn(String) + Send + Sync> {
    Arc::new(move |text| {
        if let Some(connection) = connection.upgrade() {
            let prefix = &connection.options.inbox_prefix;
            let subscription = connection.inbound.note_refusal(&text);
            let subscribed = subscription.and_then(|number| connection.subscription(number)).map(|own| own.subject);
            let quoted = text.split('"').nth(1).filter(|_| text.contains("Permissions Violation"));
            let subject = subscribed.as_deref().or(quoted);
            let is_of_lanes = subject.is_some_and(|subject| connection.lanes.refused(subject));
            if let Some(number) = subscription {
                connection.subscription_refused(number, &text);
            }
            let published = subject.filter(|_| !is_of_lanes && text.contains("Violation for Publish"));
            let refused = published.and_then(|subject| connection.refused(subject));
            connection.log(Status::Disconnected, || match (is_of_lanes, refused) {
                (true, _) if connection.lanes.is_forbidden() => format!(
                    "nats-server says: {text}: no lanes from now on, level 0 only; allow {prefix}.> for both directions, or \
                     set lanes=false"
                ),
                (true, _) => format!(
                    "nats-server says: {text}: what ran on this lane has ended; allow to publish to the others' inboxes, or \
                     set lanes=false"
                ),
                (false, Some(so)) => format!("nats-server says: {text}: {so}"),
                (false, None) => format!("nats-server says: {text}"),
            });
        }
    })
}

/// Subscribes again what nats-server refuses, with the delays of a reconnect, until it is accepted or wanted no longer.
async fn subscribe_again(connection: Weak<Connection>, number: u64, least: Duration, most: Duration) {
    let mut delay = least.min(most);
    loop {
        sleep(delay / 2 + jitter(delay / 2)).await;
        delay = (delay * 2).min(most);
        let Some(connection) = connection.upgrade() else { return };
        let Some(subscription) = connection.subscription(number).filter(|_| connection.check_open().is_ok()) else {
            connection.refusals.lock().remove(&number);
            return;
        };
        // After a reconnect it was subscribed by that.
        if connection.inbound.is_refused(number) == Some(true) {
            connection.outbox.push(Item::Unsubscribe(number));
            connection.outbox.push(Item::Subscribe(number));
        }
        // Twice: see `settle_subscription`.
        if connection.is_answered().await
            && connection.is_answered().await
            && connection.inbound.is_refused(number) == Some(false)
        {
            connection.refusals.lock().remove(&number);
            subscription.receiver.subscription_accepted();
            return;
        }
    }
}

impl Announcer for Connection {
    fn announce(&self, id: &str, requested: bool) -> bool {
        let announces = match self.options.announce {
            Announce::Always => true,
            Announce::Streams => requested,
            Announce::Never => false,
        };
        if announces {
            let id = Bytes::copy_from_slice(id.as_bytes());
            self.outbox.push(Item::DurableMessage(DurableMessage::Offline(self.offline_subject.clone(), id, 0)));
        }
        announces
    }

    fn number(&self) -> u64 {
        self.number
    }
}

/// Applies the announcements of other processes.
struct Listener {
    connection: Weak<Connection>,
}

impl MessageHandler for Listener {
    fn message(&self, message: Message) {
        let Some(connection) = self.connection.upgrade() else { return };
        let origin = level0::header(message.headers.as_ref(), level0::ORIGIN).and_then(AnnouncedBy::read);
        match client_id::id(&message.payload) {
            Ok("") => count(&connection.counters.offline_ignored),
            Ok(id) => match origin {
                Some(own) if own.process == process_token() => {
                    if !own.is_repeated {
                        registry::apply_own_offline(id, own.connection);
                    }
                }
                origin => {
                    count(&connection.counters.offline_in);
                    match origin.map_or(Hearing::First, |origin| connection.heard.lock().hear(&origin)) {
                        Hearing::First => registry::apply_offline(id),
                        Hearing::Missed { since } => registry::apply_missed_offline(id, since),
                        Hearing::Repeated => {}
                    }
                }
            },
            Err(error) => {
                count(&connection.counters.offline_ignored);
                connection.log(Status::Invalid, || format!("an offline announcement was ignored: {error}"));
            }
        }
    }

    fn ended(&self, _why: Status) {}
}

/// Somebody waits until the server has what was sent.
struct Echo(mpsc::SyncSender<Result<(), Status>>);

impl MessageHandler for Echo {
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

/// The end of a subscription: when its echo comes back, all that was on its way has come, and was refused by the service,
/// which has stopped.
struct UnsubscribeBarrier {
    connection: Weak<Connection>,
    subscription: u64,
    echo: u64,
}

impl UnsubscribeBarrier {
    fn say(connection: &Connection, subscription: u64) {
        let echo = random::random_u64();
        let farewell = UnsubscribeBarrier { connection: connection.this.clone(), subscription, echo };
        let subject = connection.inbox.expect(echo, Arc::new(farewell));
        connection.outbox.push(Item::EndAtServer(subscription));
        connection.outbox.push(Item::Echo(subject));
    }
}

impl MessageHandler for UnsubscribeBarrier {
    fn message(&self, _message: Message) {
        if let Some(connection) = self.connection.upgrade() {
            connection.inbox.forget(self.echo);
            connection.outbox.push(Item::Unsubscribe(self.subscription));
        }
    }

    fn ended(&self, why: Status) {
        if let Some(connection) = self.connection.upgrade().filter(|_| why != Status::Closed) {
            connection.inbox.forget(self.echo);
        }
    }
}

/// Lets some messages pass at once and then one a second, and counts the others.
struct LogLimit(Mutex<LogAllowance>);

struct LogAllowance {
    left: u64,
    since: Instant,
    suppressed: u64,
}

impl LogLimit {
    fn new() -> LogLimit {
        LogLimit(Mutex::new(LogAllowance { left: LOGS_AT_ONCE, since: Instant::now(), suppressed: 0 }))
    }

    /// How many were not shown before this one; None: nor is this.
    fn pass(&self) -> Option<u64> {
        let mut state = self.0.lock();
        let seconds = state.since.elapsed().as_secs();
        state.since += Duration::from_secs(seconds);
        state.left = (state.left + seconds).min(LOGS_AT_ONCE);
        let Some(left) = state.left.checked_sub(1) else {
            state.suppressed += 1;
            return None;
        };
        state.left = left;
        Some(mem::take(&mut state.suppressed))
    }
}

/// The name of this process among all that announce; a forked child has its own.
fn process_token() -> &'static str {
    static TOKEN: fork::PerProcess<String> = fork::PerProcess::new();
    TOKEN.get(random::token)
}

/// Names this process, its connection, and the announcement.
pub(crate) fn origin_header(connection: u64, number: u64, is_repeated: bool) -> HeaderMap {
    let mut headers = HeaderMap::new();
    let again = if is_repeated { " again" } else { "" };
    headers.insert(level0::ORIGIN, format!("{} {connection} {number}{again}", process_token()));
    headers
}

/// What an announcement's header names.
struct AnnouncedBy<'a> {
    process: &'a str,
    connection: u64,
    /// Counts the announcements of the connection from 1; 0: an older peer, which does not number them.
    number: u64,
    is_repeated: bool,
}

impl<'a> AnnouncedBy<'a> {
    fn read(header: &'a str) -> Option<AnnouncedBy<'a>> {
        let mut words = header.split(' ');
        let (process, connection) = (words.next()?, words.next()?.parse().ok()?);
        let number = words.next().and_then(|number| number.parse().ok()).unwrap_or(0);
        Some(AnnouncedBy { process, connection, number, is_repeated: words.next() == Some("again") })
    }
}

/// The announcements that came since the connection was made.
#[derive(Default)]
struct Heard {
    /// Numbers of this process that are lower were given before.
    since: u64,
    /// Of each process and connection, the number of the first. All that followed came, too: the server keeps their order.
    first: HashMap<(Box<str>, u64), u64>,
}

/// What an announcement is to this process.
enum Hearing {
    First,
    /// It came before.
    Repeated,
    /// It is a repetition of one that was missed; what began here since then is not meant by it.
    Missed {
        since: u64,
    },
}

impl Heard {
    fn hear(&mut self, origin: &AnnouncedBy<'_>) -> Hearing {
        let key = (origin.process.into(), origin.connection);
        if origin.is_repeated {
            return match self.first.get(&key) {
                Some(first) if *first <= origin.number => Hearing::Repeated,
                _ => Hearing::Missed { since: self.since },
            };
        }
        if origin.number > 0 && self.first.len() < MAX_ORIGINS {
            self.first.entry(key).or_insert(origin.number);
        }
        Hearing::First
    }
}
