//! The connection to nats-server: made, kept up, and closed so that nothing that was sent is lost.
//!
//! | module | what is in it |
//! |---|---|
//! | `supervisor` | the connection's task: connects, and connects again when the connection is lost |
//! | `writer` | gives what is waiting in the outbox to the NATS client |
//! | `subscriptions` | the subscriptions, which are kept across connections; round trips to nats-server |
//! | `server_errors` | errors that nats-server sends; subscribes again what it refuses |
//! | `announcements` | announcements that clients are offline |
//! | `discovery` | answers for `nats micro`, by NATS's service protocol |
//! | `log` | events about the connection |
//! | `stats` | what presence_conn_stats returns |
//! | `exposition` | what presence_metrics returns |
//!
//! The NATS client never reconnects by itself. What is waiting inside it belongs to level-0 streams that the loss of
//! the connection has ended; sent later, it would look as if nothing was missing. So a lost connection and a client
//! that died of a malformed message are the same case: the client is replaced.

mod announcements;
pub(crate) mod discovery;
mod exposition;
mod log;
mod server_errors;
mod stats;
mod subscriptions;
mod supervisor;
mod writer;

pub use exposition::metrics;
pub use stats::Stats;

use crate::config::{Announce, Config, ConnectOptions};
use crate::error::{Error, Result, Status};
use crate::events::{Queue, Wakeups};
use crate::lane::lanes::Lanes;
use crate::lane::liveness::PeerTimeouts;
use crate::metrics::{Counters, ServiceCounters};
use crate::nats::dial::{self, ServerPool};
use crate::nats::inbound::{Inbound, MessageHandler, Subscription};
use crate::nats::inbox::Inbox;
use crate::nats::outbox::{DurableMessage, Outbox};
use crate::presence::registry::{self, Announcer};
use crate::process::{fork, random, runtime};
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use announcements::Announcements;
use bytes::Bytes;
use discovery::Discovery;
use log::Log;
use once_cell::sync::OnceCell;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Weak, mpsc};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::Notify;
use tokio::time::Instant;

/// A connection to nats-server, kept up until it is closed.
pub struct Connection {
    pub(crate) handle_id: u64,
    this: Weak<Connection>,
    pub(crate) options: ConnectOptions,
    pub(crate) runtime: &'static Handle,
    pool: ServerPool,
    pub(crate) inbound: Arc<Inbound>,
    pub(crate) wakeups: Arc<Wakeups>,
    pub(crate) inbox: Arc<Inbox>,
    lanes: Arc<Lanes>,
    pub(crate) outbox: Outbox,
    /// Kept across connections. They are made at each client in the order of their ids, which are handle ids.
    subscriptions: Mutex<BTreeMap<u64, Subscription>>,
    /// All handlers that were ever subscribed and still exist: a service that takes no more requests may have running
    /// senders.
    handlers: Mutex<Vec<Weak<dyn MessageHandler>>>,
    /// The subscriptions that nats-server refuses, and why. A task of its own tries each of them again.
    refusals: Mutex<HashMap<u64, Error>>,
    announcements: Arc<Announcements>,
    /// The subscription to announcements, if there is one.
    announcement_subscription: OnceCell<u64>,
    discovery: Arc<Discovery>,
    log: Arc<Log>,
    closed: AtomicBool,
    max_payload: AtomicUsize,
    /// Ends the connection's task.
    end: Notify,
    pub(crate) counters: Arc<Counters>,
}

impl Connection {
    /// Connects to nats-server: one URL, or several separated by commas. Blocks until a server is connected or none can
    /// be.
    ///
    /// # Errors
    /// `Invalid` for a wrong URL or option, `Disconnected` or `Timeout` when no server can be connected, `Forked`.
    pub fn connect(url: &str, config: &Config) -> Result<Arc<Connection>> {
        let options = config.for_connect()?.clone();
        let servers = dial::parse_servers(url)?;
        let runtime = runtime::start(options.worker_threads)?;
        let handle_id = fork::next_handle_id();
        let wakeups: Arc<Wakeups> = Arc::default();
        let counters: Arc<Counters> = Arc::default();
        let inbox_prefix = format!("{}.{}.", options.inbox_prefix, random::token());
        let inbox = Arc::new(Inbox::new(inbox_prefix, Arc::clone(&counters)));
        let log = Arc::new(Log::new());
        let lane_log = Arc::clone(&log);
        let peer_timeouts = PeerTimeouts {
            heartbeat_interval: options.heartbeat,
            local_grace: options.peer_grace,
            remote_grace: options.remote_peer_grace,
            peer_reconnect: options.peer_reconnect(),
        };
        let connection = Arc::new_cyclic(|this| Connection {
            handle_id,
            this: this.clone(),
            runtime,
            pool: ServerPool::new(servers, options.clone(), Connection::on_server_error(this.clone())),
            lanes: Lanes::new(
                runtime,
                Arc::clone(&wakeups),
                Arc::clone(&inbox),
                &options.offline_subject,
                options.send_buffer,
                peer_timeouts,
                move |text| lane_log.log(Status::PeerGone, || text),
            ),
            inbound: Arc::new(Inbound::new(Arc::clone(&counters))),
            wakeups,
            inbox,
            outbox: Outbox::new(options.send_buffer),
            subscriptions: Mutex::default(),
            handlers: Mutex::default(),
            refusals: Mutex::default(),
            announcements: Arc::new(Announcements::new(
                handle_id,
                &options.offline_subject,
                Arc::clone(&log),
                Arc::clone(&counters),
            )),
            announcement_subscription: OnceCell::new(),
            discovery: Arc::new(Discovery::new(this.clone(), &options.name)),
            log,
            options,
            closed: AtomicBool::new(false),
            max_payload: AtomicUsize::new(1 << 20),
            end: Notify::new(),
            counters,
        });
        // Ids rise: the subjects for answers are subscribed before all others.
        let (inbox, lanes) = (Arc::clone(&connection.inbox), Arc::clone(&connection.lanes));
        connection.subscribe(fork::next_handle_id(), inbox.wildcard(), "", inbox);
        if connection.options.lanes {
            connection.subscribe(fork::next_handle_id(), lanes.wildcard(), "", lanes);
        }
        let (sender, receiver) = mpsc::channel();
        runtime.spawn(Arc::clone(&connection).run(move |connected| {
            let _ = sender.send(connected);
        }));
        receiver.recv().unwrap_or_else(|_| Err(Status::Internal.into()))?;
        exposition::add_connection(&connection);
        registry::add_announcer(Arc::clone(&connection) as Arc<dyn Announcer>, &connection.inbox.prefix);
        if connection.check_open().is_err() {
            // It has given up in the meantime.
            registry::remove_announcer(connection.handle_id);
        }
        if let Some(grace) = connection.options.session_grace {
            registry::set_session_grace(grace);
        }
        Ok(connection)
    }

    /// Returns this connection for what runs on it, which keeps it.
    pub(crate) fn shared(&self) -> Result<Arc<Connection>> {
        self.this.upgrade().ok_or_else(|| Status::Closed.into())
    }

    /// Returns the lanes, if this connection may have any.
    pub(crate) fn lanes(&self) -> Option<&Lanes> {
        (self.options.lanes && !self.lanes.is_forbidden()).then_some(&*self.lanes)
    }

    /// Expects no more answers to the request with this key. Returns false if that was done before.
    pub(crate) fn forget_request(&self, key: u64) -> bool {
        self.lanes.forget_accept(key);
        self.inbox.forget(key)
    }

    /// Returns the largest payload that the server takes, in bytes.
    pub(crate) fn max_payload(&self) -> usize {
        self.max_payload.load(Ordering::Relaxed)
    }

    /// Applies the offline announcements of other processes in this one. A second call has no effect.
    ///
    /// # Errors
    /// `Closed`, `Timeout`; `Disconnected` (or `Full`, when there are too many) where nats-server refuses the
    /// subscription, which is then tried again while the connection lives.
    pub fn listen_offline(&self) -> Result<()> {
        let subscription = self.subscribe_offline()?;
        self.flush_subscription(subscription)
    }

    /// Pushes an `Offline` event with this tag to `queue` for each announcement of another process, whether or not the
    /// client is known here. Call `listen_offline` to receive announcements.
    pub fn watch_announcements(&self, queue: &Arc<Queue>, tag: u64) {
        self.announcements.watch(queue, tag);
    }

    /// Subscribes to announcements. Returns the id of the subscription.
    pub(crate) fn subscribe_offline(&self) -> Result<u64> {
        self.check_open()?;
        let id = *self.announcement_subscription.get_or_init(|| {
            let id = fork::next_handle_id();
            let announcements = Arc::clone(&self.announcements);
            self.subscribe(id, announcements.subject.clone(), "", announcements);
            id
        });
        self.flush_subscriptions()?;
        Ok(id)
    }

    /// Pushes an event with this tag to `queue` when this connection is made or lost, and for what people should know.
    ///
    /// # Errors
    /// `Closed`.
    pub fn watch(&self, queue: &Arc<Queue>, tag: u64) -> Result<()> {
        self.check_open()?;
        self.log.watch(queue, tag);
        Ok(())
    }

    /// Pushes a LOG event, unless there are too many.
    pub(crate) fn log(&self, status: Status, text: impl FnOnce() -> String) {
        self.log.log(status, text);
    }

    /// Returns what it has done so far.
    #[must_use]
    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let (counters, lanes) = (&self.counters, self.lanes.gauges());
        let services = counters.services();
        let served = |counter: fn(&ServiceCounters) -> &AtomicU64| {
            services.iter().map(|(_, service)| get(counter(service))).sum()
        };
        Stats {
            connected: self.is_connected().into(),
            connects: get(&counters.connects),
            streams: get(&counters.requested.running),
            senders: served(|own| &own.streams.running),
            requests: served(|own| &own.requests),
            requests_busy: served(|own| &own.requests_busy),
            requests_ignored: served(|own| &own.requests_ignored),
            messages_out: get(&counters.messages_out),
            messages_in: get(&counters.messages_in),
            messages_ignored: get(&counters.messages_ignored),
            offline_out: get(&counters.offline_out),
            offline_in: get(&counters.offline_in),
            bytes_waiting: (self.outbox.weight() + lanes.backlog) as u64,
            lanes: lanes.workers + lanes.gateways,
            reserved: [0; 6],
        }
    }

    /// Ends all that runs on it, waits until the server has what was sent (`drain` None: without limit), and closes it.
    ///
    /// # Errors
    /// `Timeout` or `Disconnected` when the server may not have it all, `Closed` when it was closed before.
    pub fn close(&self, drain: Option<Duration>) -> Result<()> {
        if self.closed.swap(true, Ordering::AcqRel) {
            return Err(Error::new(Status::Closed, "the connection was closed before"));
        }
        registry::remove_announcer(self.handle_id);
        let deadline = drain.and_then(|drain| Instant::now().checked_add(drain));
        self.end_handlers(Status::Closed);
        // All subscriptions but those for answers: requests that are on their way are refused.
        let answers = if self.options.lanes { 2 } else { 1 };
        let services: Vec<u64> = self.subscriptions.lock().keys().skip(answers).copied().collect();
        services.into_iter().for_each(|id| self.unsubscribe(id));
        // After the first flush all requests have come, and after the second the server has the refusals.
        let left = || deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
        let drained = self.flush(left()).and_then(|()| self.drain_lanes(left()));
        self.inbox.give_up_answers();
        self.lanes.end();
        let drained = self.flush(left()).and(drained);
        self.end.notify_one();
        drained
    }

    /// Waits until the peers of all lanes have what was sent.
    fn drain_lanes(&self, limit: Option<Duration>) -> Result<()> {
        let (sender, receiver) = mpsc::sync_channel(1);
        let lanes = Arc::clone(&self.lanes);
        self.runtime.spawn(async move {
            let _ = sender.try_send(lanes.drain().await);
        });
        match subscriptions::receive(&receiver, limit) {
            Ok(true) => Ok(()),
            Ok(false) => Err(Error::new(
                Status::Disconnected,
                "the connection was lost before the peers acknowledged what was sent",
            )),
            Err(_) => {
                Err(Error::new(Status::Timeout, "not all peers acknowledged what was sent within the drain timeout"))
            }
        }
    }

    pub(crate) fn is_connected(&self) -> bool {
        self.log.is_connected()
    }

    pub(crate) fn check_open(&self) -> Result<()> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Error::new(Status::Closed, "the connection is closed"));
        }
        Ok(())
    }

    pub(crate) fn check_connected(&self) -> Result<()> {
        self.check_open()?;
        if !self.is_connected() {
            return Err(Error::new(Status::Disconnected, "there is no connection to nats-server now"));
        }
        // Without the inbox, which has the lowest id, no answer would come.
        let refusals = self.refusals.lock();
        if !refusals.is_empty()
            && let Some(why) = self.subscriptions.lock().keys().next().and_then(|inbox| refusals.get(inbox))
        {
            return Err(Error::new(Status::Disconnected, why.message.clone()));
        }
        Ok(())
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
            self.outbox.push(DurableMessage::Offline(id, 0).into());
        }
        announces
    }

    fn number(&self) -> u64 {
        self.handle_id
    }
}
