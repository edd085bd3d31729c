//! All lanes of a connection: how they are offered, begun and found again.
//!
//! A gateway offers one inbox to all its workers; each worker makes an inbox of its own for each gateway, which it shows
//! to that gateway only. So a lane is found by its worker's inbox, which nobody else knows. The inboxes stand below the
//! connection's own: nats-server answers 503 as soon as its process is gone.

use crate::error::{Error, Result, Status};
use crate::events::Wakeups;
use crate::lane::driver::{Accepted, Lane, StreamObserver};
use crate::lane::state::{Credit, PeerTimeouts};
use crate::nats::client::Client;
use crate::nats::inbound::MessageHandler;
use crate::nats::inbox::Inbox;
use crate::nats::{Message, Subject, detach};
use crate::process::random;
use crate::process::runtime;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use crate::wire::frame::{self, Header};
use crate::wire::level0;
use dashmap::DashMap;
use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Weak};
use tokio::runtime::Handle;
use tokio::sync::watch;

/// How many lanes a connection has at most, so that a stranger cannot have us make them without end.
const MAX_LANES: usize = 8192;

/// More requests than this that wait for an ACCEPT at once are unusual: their memory is freed afterwards.
const MANY_PENDING: usize = 1024;

/// How many gateways are remembered that cannot be reached on a lane.
const MAX_UNREACHABLE: usize = 1024;

/// All lanes of a connection.
pub(crate) struct Lanes {
    this: Weak<Lanes>,
    runtime: &'static Handle,
    wakeups: Arc<Wakeups>,
    /// What the subjects of all ends begin with, dot included.
    prefix: String,
    offline_subject: String,
    /// The last token of the inbox that is offered.
    offer: String,
    limit: usize,
    patience: PeerTimeouts,
    clients: watch::Sender<Option<Client>>,
    /// What the last server took.
    max_payload: AtomicUsize,
    /// Lanes by the last token of this end's subject: as the worker's end it came with the request, as the gateway's end
    /// it is the offer with a number behind.
    own: DashMap<String, Arc<Lane>>,
    /// The same lanes by the other end's subject.
    by_peer: DashMap<String, Arc<Lane>>,
    inbox: Arc<Inbox>,
    /// Requests that offered a lane and were not accepted on one yet, by their keys.
    pending: Mutex<HashMap<u64, Pending, ahash::RandomState>>,
    /// nats-server does not allow them.
    forbidden: AtomicBool,
    /// Offers that led nowhere: nothing was ever heard from there. Requests with one are answered on level 0.
    unreachable: Mutex<VecDeque<String>>,
    /// Tells people.
    log: Box<dyn Fn(String) + Send + Sync>,
    pub(crate) sent: Arc<AtomicU64>,
    pub(crate) ignored: AtomicU64,
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
        patience: PeerTimeouts,
        log: impl Fn(String) + Send + Sync + 'static,
    ) -> Arc<Lanes> {
        Arc::new_cyclic(|this| Lanes {
            this: this.clone(),
            runtime,
            wakeups,
            prefix: format!("{}lane.", inbox.prefix()),
            offline_subject: offline_subject.into(),
            offer: random::token(),
            limit,
            patience,
            clients: watch::channel(None).0,
            max_payload: AtomicUsize::new(1 << 20),
            own: DashMap::new(),
            by_peer: DashMap::new(),
            inbox,
            pending: Mutex::default(),
            forbidden: AtomicBool::new(false),
            unreachable: Mutex::default(),
            log: Box::new(log),
            sent: Arc::default(),
            ignored: AtomicU64::new(0),
        })
    }

    /// What to subscribe for all ends that are here.
    pub(crate) fn wildcard(&self) -> Subject {
        format!("{}*", self.prefix).into()
    }

    /// Whether none is to be offered or accepted.
    pub(crate) fn is_forbidden(&self) -> bool {
        self.forbidden.load(Ordering::Relaxed)
    }

    /// nats-server refuses a publication or subscription to this subject. False if that is nothing to do with lanes.
    ///
    /// As a gateway we offer none any longer, for the next one would hurt as well: unless there are lanes to other workers,
    /// which shows that it concerns this worker only. As a worker it concerns this gateway only: a stranger may name any
    /// subject as its inbox.
    pub(crate) fn refused(&self, subject: &str) -> bool {
        if subject == self.wildcard().as_str() {
            self.forbidden.store(true, Ordering::Relaxed);
            return true;
        }
        let Some(lane) = find(&self.by_peer, subject) else { return false };
        let is_other = |other: &Arc<Lane>| !other.serves() && !other.is_over() && !Arc::ptr_eq(other, &lane);
        // Before its streams hear of their end: who asks again at once must not be offered what was refused.
        self.forbidden.fetch_or(!lane.serves() && !self.all().iter().any(is_other), Ordering::Relaxed);
        lane.end(&self.wakeups);
        true
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.own.len()
    }

    /// Bytes that wait to be sent or acknowledged.
    pub(crate) fn backlog(&self) -> usize {
        self.own.iter().map(|lane| lane.backlog()).sum()
    }

    /// The present NATS client; None: there is none.
    pub(crate) fn set_client(&self, client: Option<Client>) {
        if let Some(client) = &client {
            self.max_payload.store(client.max_payload(), Ordering::Relaxed);
        }
        self.clients.send_replace(client);
    }

    /// Waits until the other ends have all that was sent; false when the connection is lost before.
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

    /// Ends all now.
    pub(crate) fn end(&self) {
        self.all().iter().for_each(|lane| lane.end(&self.wakeups));
    }

    fn all(&self) -> Vec<Arc<Lane>> {
        self.own.iter().map(|lane| Arc::clone(&lane)).collect()
    }

    // The gateway's side ----------------------------------------------------------------------------------------------

    /// The value of a request's header, which offers a lane for the stream with this key: its number in the inbox. None
    /// where there is no room for another lane: a worker without one would be turned away.
    pub(crate) fn offer(&self, key: u64, window: u32) -> Option<String> {
        self.has_room().then(|| format!("{} {}{} {key:016x} {window}", frame::VERSION, self.prefix, self.offer))
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
        // Neither the stream nor the `Unanswered` in its place, if it has ended, expects an answer on level 0 now.
        self.inbox.forget(key);
        Some((accepted?, window))
    }

    /// Begins the lane of a worker that we do not know, if this is its first message.
    fn begin(&self, peer: &Subject, payload: &[u8]) -> Option<Arc<Lane>> {
        let header = Header::read(payload).ok()?;
        let is_first = header.has(frame::NEW) && header.sequence == 1 && payload.len() > frame::HEADER;
        (is_first && self.has_room() && level0::is_valid_reply_subject(peer, &self.offline_subject))
            .then(|| self.make(format!("{}-{}", self.offer, random::random_u64()), detach(peer), false))
    }

    // The worker's side -----------------------------------------------------------------------------------------------

    /// Accepts a request by the header that offers a lane: the lane, and the sender's share in it. None for one that leads
    /// nowhere.
    pub(crate) fn open(&self, offer: &str, to: &Arc<dyn StreamObserver>) -> Result<Option<(Arc<Lane>, Arc<Credit>)>> {
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
                None if self.has_room() => self.make(random::token(), inbox.into(), true),
                None => break,
            };
            if let Some(credit) = lane.open(key, window, Arc::clone(to)) {
                return Ok(Some((lane, credit)));
            }
            // It is over, or has no numbers left: requests go to another from now on.
            self.by_peer.remove_if(inbox, |_, other| Arc::ptr_eq(other, &lane));
        }
        Err(Error::new(Status::Full, format!("there are {MAX_LANES} lanes: no more are begun")))
    }

    // Both ------------------------------------------------------------------------------------------------------------

    fn has_room(&self) -> bool {
        self.own.len() < MAX_LANES
    }

    /// Makes an end, and has it run until it is over.
    fn make(&self, token: String, peer: Subject, serves: bool) -> Arc<Lane> {
        let own = format!("{}{token}", self.prefix);
        let lane =
            Lane::new(own.into(), peer, serves, self.limit, self.patience, self.max_payload.load(Ordering::Relaxed));
        self.by_peer.insert(lane.peer().to_string(), Arc::clone(&lane));
        self.own.insert(token.clone(), Arc::clone(&lane));
        let (clients, wakeups, sent) = (self.clients.subscribe(), Arc::clone(&self.wakeups), Arc::clone(&self.sent));
        let (lanes, task) = (self.this.clone(), Arc::clone(&lane));
        self.runtime.spawn(async move {
            let what = if serves { "a worker's lane" } else { "a gateway's lane" };
            let driven = runtime::catch_panic(what, task.drive(clients, &wakeups, &sent)).await;
            if let Some(lanes) = lanes.upgrade() {
                lanes.own.remove(&token);
                lanes.by_peer.remove_if(task.peer().as_str(), |_, other| Arc::ptr_eq(other, &task));
                match driven {
                    Ok(()) if serves && !task.was_heard() => lanes.nobody_answers(task.peer()),
                    Ok(()) => {}
                    Err(_) => lanes.say(task.own().clone(), task.peer().clone(), &Header::of(frame::RESET, 0, 0)),
                }
            }
            if driven.is_err() {
                task.end_here(Status::Internal);
                task.end(&wakeups);
            }
        });
        lane
    }

    /// The lane of a gateway's offer is over without a word from there.
    fn nobody_answers(&self, offer: &Subject) {
        {
            let mut unreachable = self.unreachable.lock();
            unreachable.push_back(offer.to_string());
            if unreachable.len() > MAX_UNREACHABLE {
                unreachable.pop_front();
            }
        }
        (self.log)(format!(
            "nothing was ever heard from the gateway at {offer}: it is gone, in another account, or must not be answered \
             there; from now on level 0 for its requests"
        ));
    }

    /// Answers a message of a lane that is not known here: either all of it is still to come, or it is over.
    fn reject_unknown_lane(&self, own: Subject, peer: &Subject, payload: &[u8]) {
        let Ok(header) = Header::read(payload) else { return };
        if header.has(frame::RESET) || !level0::is_valid_reply_subject(peer, &self.offline_subject) {
            return;
        }
        // Only at the offer its first message may begin it after all: from elsewhere it would be asked for it for ever.
        let is_offer = own.strip_prefix(&*self.prefix).is_some_and(|token| token == self.offer);
        let may_begin = is_offer && header.has(frame::NEW) && self.has_room();
        self.say(own, peer.clone(), &unknown(&header, may_begin));
    }

    /// Sends a message without frames, in the place of a lane that is not there.
    fn say(&self, own: Subject, peer: Subject, header: &Header) {
        let message = header.bytes().to_vec().into();
        if let Some(client) = self.clients.borrow().clone() {
            // At once or not at all: whoever sends faster than the server takes the answers would have us keep them all.
            client.try_publish(peer, own, message);
        }
    }

    fn ignore(&self) {
        self.ignored.fetch_add(1, Ordering::Relaxed);
    }
}

/// The answer to a message of a lane that is not known: that it is over, or, if it may begin, that nothing has come. A PING
/// is answered with it: else the worker would not send again.
pub(crate) fn unknown(message: &Header, may_begin: bool) -> Header {
    if !may_begin {
        return Header::of(frame::RESET, 0, 0);
    }
    let pong = if message.has(frame::PING) { frame::PONG } else { 0 };
    Header { pong: message.ping, ..Header::of(frame::GAP | pong, 0, 0) }
}

/// The entry is not held: what is done with the lane may change the map.
fn find(lanes: &DashMap<String, Arc<Lane>>, key: &str) -> Option<Arc<Lane>> {
    lanes.get(key).map(|lane| Arc::clone(&lane))
}

impl MessageHandler for Lanes {
    fn subscription_accepted(&self) {
        self.forbidden.store(false, Ordering::Relaxed);
    }

    fn message(&self, message: Message) {
        let Some(token) = message.subject.strip_prefix(&*self.prefix) else { return self.ignore() };
        if message.is_no_responders {
            return match find(&self.own, token) {
                Some(lane) => lane.nobody_there(&self.wakeups),
                None => self.ignore(),
            };
        }
        let Some(peer) = &message.reply else { return self.ignore() };
        let known = if token == self.offer {
            // A worker's message: its subject says which lane it is.
            find(&self.by_peer, peer).or_else(|| self.begin(peer, &message.payload))
        } else {
            find(&self.own, token)
        };
        let Some(lane) = known else {
            self.ignore();
            if !self.is_forbidden() {
                self.reject_unknown_lane(message.subject.clone(), peer, &message.payload);
            } else if token == self.offer {
                // The worker cannot be told, so no other answer comes to the requests that it accepts.
                let accepted = frame::accepts(&message.payload).filter_map(|(key, _)| {
                    self.pending.lock().get(&key).and_then(|pending| pending.observer.upgrade())
                });
                accepted.for_each(|observer| observer.ended_here(Status::PeerGone));
            }
            return;
        };
        // A gateway names the inbox that it offered, with the lane's number behind.
        let is_from_peer =
            peer.strip_prefix(lane.peer().as_str()).is_some_and(|rest| rest.is_empty() || rest.starts_with('-'));
        if is_from_peer && !lane.is_same_end(peer) {
            // The end that we know is over: what it had is lost.
            lane.end(&self.wakeups);
            return self.ignore();
        }
        let accept = |key, stream| self.accept(&lane, key, stream);
        if !is_from_peer || lane.receive(&message.payload, &self.wakeups, accept).is_err() {
            self.ignore();
        }
    }

    fn ended(&self, why: Status) {
        // They outlive a lost connection.
        if why == Status::Closed {
            // Streams first: those that are served on this connection, too, are not to see their senders' ends.
            let (servers, askers): (Vec<_>, Vec<_>) = self.all().into_iter().partition(|lane| lane.serves());
            askers.iter().chain(&servers).for_each(|lane| lane.end_here(why));
        }
    }
}
