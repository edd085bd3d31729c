//! All lanes of a connection: how they are offered, begun and found again.
//!
//! A gateway offers one inbox to all its workers. Each worker makes an inbox for each gateway, and shows it to that
//! gateway only. So a lane is found by its worker's inbox, which nobody else knows. The inboxes are below the
//! connection's own one, so nats-server answers 503 as soon as the process is gone.

use crate::error::{Error, Result, Status};
use crate::events::Wakeups;
use crate::lane::driver::{Accepted, Lane, StreamObserver};
use crate::lane::event::Role;
use crate::lane::liveness::PeerTimeouts;
use crate::lane::state::unknown_lane_reply;
use crate::lane::streams::SendWindow;
use crate::metrics::{Counters, count};
use crate::nats::client::Client;
use crate::nats::inbound::MessageHandler;
use crate::nats::inbox::Inbox;
use crate::nats::{Message, Subject, detach};
use crate::process::random;
use crate::process::runtime;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::wire::frame::{self, Header};
use crate::wire::level0;
use dashmap::DashMap;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::watch;

/// The most lanes of a connection, so that a stranger cannot make us begin any number of them.
const MAX_LANES: usize = 8192;

/// More requests than this that wait for an ACCEPT at once are unusual: their memory is freed afterwards.
const MANY_PENDING: usize = 1024;

/// How many gateways that cannot be reached on a lane are remembered.
const MAX_UNREACHABLE: usize = 1024;

/// All lanes of a connection.
pub(crate) struct Lanes {
    this: Weak<Lanes>,
    runtime: &'static Handle,
    wakeups: Arc<Wakeups>,
    /// The beginning of the subjects of all ends, dot included.
    prefix: String,
    offline_subject: String,
    /// The last token of the inbox that is offered.
    offer: String,
    limit: usize,
    timeouts: PeerTimeouts,
    clients: watch::Sender<Option<Client>>,
    /// The max_payload of the last server.
    max_payload: AtomicUsize,
    /// Lanes by the last token of this end's subject. At the worker's end the token is random; at the gateway's end it
    /// is the offer followed by a number.
    by_token: DashMap<String, Arc<Lane>, ahash::RandomState>,
    /// The same lanes by the peer's subject.
    by_peer: DashMap<String, Arc<Lane>, ahash::RandomState>,
    inbox: Arc<Inbox>,
    /// Requests that offered a lane and were not accepted on one yet, by their keys.
    pending: Mutex<HashMap<u64, Pending, ahash::RandomState>>,
    /// nats-server does not allow lanes.
    forbidden: AtomicBool,
    /// Offers of gateways from which no message ever came. Requests with such an offer are answered on level 0.
    unreachable: Mutex<VecDeque<String>>,
    log: Box<dyn Fn(String) + Send + Sync>,
    counters: Arc<Counters>,
}

/// Figures about the lanes of a connection.
#[derive(Default)]
pub(crate) struct LaneGauges {
    /// The lanes of this process as a worker, and as a gateway.
    pub(crate) workers: u64,
    pub(crate) gateways: u64,
    /// Bytes that are not sent or not acknowledged.
    pub(crate) backlog: usize,
    /// The longest smoothed round trip of them.
    pub(crate) round_trip: Option<Duration>,
}

/// A request that offered a lane.
struct Pending {
    observer: Weak<dyn StreamObserver>,
    window: u32,
}

impl Lanes {
    pub(crate) fn new(
        runtime: &'static Handle,
        wakeups: Arc<Wakeups>,
        inbox: Arc<Inbox>,
        offline_subject: &str,
        limit: usize,
        timeouts: PeerTimeouts,
        log: impl Fn(String) + Send + Sync + 'static,
    ) -> Arc<Lanes> {
        Arc::new_cyclic(|this| Lanes {
            this: this.clone(),
            runtime,
            wakeups,
            prefix: format!("{}lane.", inbox.prefix),
            offline_subject: offline_subject.into(),
            offer: random::token(),
            limit,
            timeouts,
            clients: watch::channel(None).0,
            max_payload: AtomicUsize::new(1 << 20),
            by_token: DashMap::default(),
            by_peer: DashMap::default(),
            counters: Arc::clone(&inbox.counters),
            inbox,
            pending: Mutex::default(),
            forbidden: AtomicBool::new(false),
            unreachable: Mutex::default(),
            log: Box::new(log),
        })
    }

    /// The subject to subscribe for all ends in this process.
    pub(crate) fn wildcard(&self) -> Subject {
        format!("{}*", self.prefix).into()
    }

    /// Whether lanes are neither offered nor accepted.
    pub(crate) fn is_forbidden(&self) -> bool {
        self.forbidden.load(Ordering::Relaxed)
    }

    /// nats-server refuses a publication or subscription to this subject. Returns false if no lane uses the subject.
    ///
    /// A gateway offers no lanes from then on, because they would fail as well, unless it has lanes to other workers:
    /// then the refusal concerns this worker only. At a worker it concerns this gateway only: a stranger may name any
    /// subject as its inbox.
    pub(crate) fn refused(&self, subject: &str) -> bool {
        if subject == self.wildcard().as_str() {
            self.forbidden.store(true, Ordering::Relaxed);
            return true;
        }
        let Some(lane) = find(&self.by_peer, subject) else { return false };
        let is_gateway = |lane: &Lane| lane.role == Role::Gateway;
        let is_other = |other: &Arc<Lane>| is_gateway(other) && !other.is_closed() && !Arc::ptr_eq(other, &lane);
        // Before the streams end: a request that is repeated at once must not offer a lane again.
        self.forbidden.fetch_or(is_gateway(&lane) && !self.all().iter().any(is_other), Ordering::Relaxed);
        lane.close(&self.wakeups);
        true
    }

    /// Returns figures about the lanes, for metrics.
    pub(crate) fn gauges(&self) -> LaneGauges {
        self.all().iter().fold(LaneGauges::default(), |mut sum, lane| {
            match lane.role {
                Role::Worker => sum.workers += 1,
                Role::Gateway => sum.gateways += 1,
            }
            let (backlog, round_trip) = lane.gauges();
            sum.backlog += backlog;
            sum.round_trip = sum.round_trip.max(round_trip);
            sum
        })
    }

    /// There is another NATS client, or none.
    pub(crate) fn set_client(&self, client: Option<Client>) {
        if let Some(client) = &client {
            self.max_payload.store(client.max_payload(), Ordering::Relaxed);
        }
        self.clients.send_replace(client);
    }

    /// Waits until the peers have all that was sent. Returns false if the connection is lost before.
    pub(crate) async fn drain(&self) -> bool {
        let mut clients = self.clients.subscribe();
        let drained = async {
            for lane in self.all() {
                lane.drain().await;
            }
        };
        tokio::select! {
            () = drained => true,
            _ = clients.wait_for(Option::is_none) => false,
        }
    }

    /// Closes all lanes now.
    pub(crate) fn end(&self) {
        self.all().iter().for_each(|lane| lane.close(&self.wakeups));
    }

    fn all(&self) -> Vec<Arc<Lane>> {
        self.by_token.iter().map(|lane| Arc::clone(&lane)).collect()
    }

    // The gateway's side ----------------------------------------------------------------------------------------------

    /// The value of the header with which a request offers a lane. None if there are too many lanes already: a worker
    /// without one would be turned away.
    pub(crate) fn offer(&self, key: u64, window: u32) -> Option<String> {
        self.has_capacity().then(|| format!("{} {}{} {key:016x} {window}", frame::VERSION, self.prefix, self.offer))
    }

    /// Expects an ACCEPT with this key, until one comes or `forget_accept` is called.
    pub(crate) fn expect_accept(&self, key: u64, window: u32, observer: Weak<dyn StreamObserver>) {
        self.pending.lock().insert(key, Pending { observer, window });
    }

    pub(crate) fn forget_accept(&self, key: u64) {
        self.take_pending(key);
    }

    fn take_pending(&self, key: u64) -> Option<Pending> {
        let mut pending = self.pending.lock();
        let taken = pending.remove(&key);
        if pending.is_empty() && pending.capacity() > MANY_PENDING {
            pending.shrink_to_fit();
        }
        taken
    }

    /// A worker accepts a request. Only the first ACCEPT counts: two workers may serve the subject without a group.
    fn accept(&self, lane: &Arc<Lane>, key: u64, stream: u32) -> Accepted {
        let Pending { observer, window } = self.take_pending(key)?;
        let accepted = observer.upgrade().filter(|observer| observer.accepted(lane, stream));
        // The stream expects no answer on level 0 any longer, not even one that has ended before it was answered.
        self.inbox.forget(key);
        Some((accepted?, window))
    }

    /// Begins the lane of a worker that has none here, if this is its first message.
    fn begin(&self, peer: &Subject, payload: &[u8]) -> Option<Arc<Lane>> {
        let header = Header::read(payload).ok()?;
        let is_first = header.has(frame::NEW) && header.sequence == 1 && payload.len() > frame::HEADER;
        (is_first && self.has_capacity() && level0::is_valid_reply_subject(peer, &self.offline_subject))
            .then(|| self.start(format!("{}-{}", self.offer, random::random_u64()), detach(peer), Role::Gateway))
    }

    // The worker's side -----------------------------------------------------------------------------------------------

    /// Accepts a request whose header offers a lane. Returns the lane and the sender's window, or None if the gateway
    /// is known to be unreachable on a lane.
    pub(crate) fn open(
        &self,
        offer: &str,
        owner: &Arc<dyn StreamObserver>,
    ) -> Result<Option<(Arc<Lane>, Arc<SendWindow>)>> {
        let wrong =
            || Error::invalid(format!("{} {offer:?} offers no lane of version {}", level0::LANE, frame::VERSION));
        let mut words = offer.split(' ');
        let (version, inbox, key, window) = (words.next(), words.next(), words.next(), words.next());
        if version.and_then(|version| version.parse().ok()) != Some(frame::VERSION) {
            return Err(wrong());
        }
        let inbox =
            inbox.filter(|inbox| level0::is_valid_reply_subject(inbox, &self.offline_subject)).ok_or_else(wrong)?;
        if self.unreachable.lock().iter().any(|offer| offer == inbox) {
            return Ok(None);
        }
        let key = key.and_then(|key| u64::from_str_radix(key, 16).ok()).ok_or_else(wrong)?;
        let window = window.and_then(|window| window.parse().ok()).ok_or_else(wrong)?;
        for _ in 0..2 {
            let lane = match find(&self.by_peer, inbox) {
                Some(lane) => lane,
                None if self.has_capacity() => self.start(random::token(), inbox.into(), Role::Worker),
                None => break,
            };
            if let Some(window) = lane.open(key, window, Arc::clone(owner)) {
                return Ok(Some((lane, window)));
            }
            // It is closed, or has no stream ids left: requests use another one from now on.
            self.by_peer.remove_if(inbox, |_, other| Arc::ptr_eq(other, &lane));
        }
        Err(Error::new(
            Status::Full,
            format!("there are {MAX_LANES} lanes already, which is the limit for a connection"),
        ))
    }

    // Both ------------------------------------------------------------------------------------------------------------

    fn has_capacity(&self) -> bool {
        self.by_token.len() < MAX_LANES
    }

    /// Makes an end, and runs its task until it is closed.
    fn start(&self, token: String, peer: Subject, role: Role) -> Arc<Lane> {
        let subject = format!("{}{token}", self.prefix).into();
        let max_payload = self.max_payload.load(Ordering::Relaxed);
        let lane = Lane::new(subject, peer, role, self.limit, self.timeouts, max_payload);
        self.by_peer.insert(lane.peer_subject.to_string(), Arc::clone(&lane));
        self.by_token.insert(token.clone(), Arc::clone(&lane));
        let (clients, wakeups) = (self.clients.subscribe(), Arc::clone(&self.wakeups));
        let counters = Arc::clone(&self.counters);
        let (lanes, task) = (self.this.clone(), Arc::clone(&lane));
        self.runtime.spawn(async move {
            let what = if role == Role::Worker { "a worker's lane" } else { "a gateway's lane" };
            let result = runtime::catch_panic(what, task.run(clients, &wakeups, &counters)).await;
            if let Some(lanes) = lanes.upgrade() {
                lanes.by_token.remove(&token);
                lanes.by_peer.remove_if(task.peer_subject.as_str(), |_, other| Arc::ptr_eq(other, &task));
                match result {
                    Ok(()) if role == Role::Worker && !task.was_heard() => lanes.note_unreachable(&task.peer_subject),
                    Ok(()) => {}
                    Err(_) => lanes.send_control(&task.subject, &task.peer_subject, &Header::of(frame::RESET, 0, 0)),
                }
            }
            if result.is_err() {
                task.close_streams(Status::Internal);
                task.close(&wakeups);
            }
        });
        lane
    }

    /// The lane to this gateway is closed, and no message ever came on it.
    fn note_unreachable(&self, offer: &Subject) {
        {
            let mut unreachable = self.unreachable.lock();
            unreachable.push_back(offer.to_string());
            if unreachable.len() > MAX_UNREACHABLE {
                unreachable.pop_front();
            }
        }
        (self.log)(format!(
            "no message ever came from the gateway at {offer}: it is gone, is in another account, or this user may not \
             publish there; its requests are answered on level 0 from now on"
        ));
    }

    /// Answers a message of a lane that is not known here: either its first message is still to come, or it is closed.
    fn reject_unknown_lane(&self, subject: &Subject, peer: &Subject, payload: &[u8]) {
        let Ok(header) = Header::read(payload) else { return };
        if header.has(frame::RESET) || !level0::is_valid_reply_subject(peer, &self.offline_subject) {
            return;
        }
        // Only at the offer can its first message begin it. Elsewhere it would be asked for that again and again.
        let is_offer = subject.strip_prefix(&*self.prefix).is_some_and(|token| token == self.offer);
        let may_begin = is_offer && header.has(frame::NEW) && self.has_capacity();
        self.send_control(subject, peer, &unknown_lane_reply(&header, may_begin));
    }

    /// Sends a message without frames for a lane that is not known here, or has failed.
    fn send_control(&self, subject: &Subject, peer: &Subject, header: &Header) {
        let message = header.bytes().to_vec().into();
        if let Some(client) = self.clients.borrow().clone() {
            // At once or not at all: a peer that sends faster than the server takes the answers must not fill our
            // memory.
            client.try_publish(peer.clone(), subject.clone(), message);
        }
    }

    fn count_ignored(&self) {
        count(&self.counters.messages_ignored);
    }
}

/// Does not keep the entry locked: what is done with the lane may change the map.
fn find(lanes: &DashMap<String, Arc<Lane>, ahash::RandomState>, key: &str) -> Option<Arc<Lane>> {
    lanes.get(key).map(|lane| Arc::clone(&lane))
}

impl MessageHandler for Lanes {
    fn subscription_accepted(&self) {
        self.forbidden.store(false, Ordering::Relaxed);
    }

    fn message(&self, message: Message) {
        let Some(token) = message.subject.strip_prefix(&*self.prefix) else { return self.count_ignored() };
        if message.is_no_responders {
            return match find(&self.by_token, token) {
                Some(lane) => lane.no_responders(&self.wakeups),
                None => self.count_ignored(),
            };
        }
        let Some(peer) = &message.reply else { return self.count_ignored() };
        let known = if token == self.offer {
            // A worker's message: the worker's subject identifies the lane.
            find(&self.by_peer, peer).or_else(|| self.begin(peer, &message.payload))
        } else {
            find(&self.by_token, token)
        };
        let Some(lane) = known else {
            self.count_ignored();
            if !self.is_forbidden() {
                self.reject_unknown_lane(&message.subject, peer, &message.payload);
            } else if token == self.offer {
                // The worker cannot be notified, so no other answer comes to the requests that it accepts.
                let accepted = frame::accepts(&message.payload).filter_map(|(key, _)| {
                    self.pending.lock().get(&key).and_then(|pending| pending.observer.upgrade())
                });
                accepted.for_each(|observer| observer.closed_here(Status::PeerGone));
            }
            return;
        };
        // A gateway's own subject is the inbox that it offered, followed by the lane's number.
        let is_from_peer =
            peer.strip_prefix(lane.peer_subject.as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        if is_from_peer && !lane.is_same_end(peer) {
            // The gateway has made another end: what the one before had is lost.
            lane.close(&self.wakeups);
            return self.count_ignored();
        }
        let accept = |key, stream| self.accept(&lane, key, stream);
        if !is_from_peer || lane.receive(&message.payload, &self.wakeups, accept).is_err() {
            self.count_ignored();
        }
    }

    fn ended(&self, why: Status) {
        // Lanes outlive a lost connection.
        if why == Status::Closed {
            // Requested streams first: those that this connection serves itself must not see their senders' ends.
            let (workers, gateways): (Vec<_>, Vec<_>) =
                self.all().into_iter().partition(|lane| lane.role == Role::Worker);
            gateways.iter().chain(&workers).for_each(|lane| lane.close_streams(why));
        }
    }
}
