//! The worker's side: a subject that is served, and what becomes of its requests.

use crate::connection::{Connection, count};
use crate::error::{Error, Result, Status};
use crate::events::queue::{EventSource, Kind, Queue, Single, unpin};
use crate::lane::driver::StreamObserver;
use crate::nats::inbound::MessageHandler;
use crate::presence::client_id;
use crate::presence::registry;
use crate::process::fork;
use crate::status_word::StatusWord;
use crate::sync::Mutex;
use crate::wire::level0::{self, Use};
use crate::worker::sender::Sender;
use async_nats::{Message, Subject};
use dashmap::DashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

/// How many streams run at once where the caller gives no number.
const DEFAULT_MAX_STREAMS: u32 = 10_000;

/// A subject that this process serves.
pub struct Service {
    handle_id: u64,
    this: Weak<Service>,
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    tag: u64,
    subject: Box<str>,
    max_streams: usize,
    /// Senders on level 0, which end with the connection. (Lanes know theirs.)
    running: DashMap<u64, Arc<Sender>>,
    running_count: AtomicUsize,
    stopped: AtomicBool,
    subscription: Mutex<SubscriptionState>,
}

/// The state of a service's subscription at nats-server.
#[derive(Default)]
struct SubscriptionState {
    /// `serve` has returned: later refusals are reported by events.
    is_served: bool,
    is_refused: bool,
}

impl Connection {
    /// Serves a subject: each request is a `Request` event with `tag` on `queue`.
    ///
    /// `group`: requests are spread over all that serve in it; empty: each gets all. `max_streams`: run at once; 0: 10,000.
    ///
    /// # Errors
    /// `Invalid`, `Closed`, `Timeout`; where nats-server refuses the subscription, `Disconnected`, or `Full` when
    /// there are too many.
    pub fn serve(
        &self,
        queue: &Arc<Queue>,
        subject: &str,
        group: &str,
        max_streams: u32,
        tag: u64,
    ) -> Result<Arc<Service>> {
        level0::check_subject("subject", subject, Use::Subscribe)?;
        level0::check_length("group", group, level0::MAX_PREFIX)?;
        if group.contains(|c: char| c.is_whitespace() || c.is_control()) {
            return Err(Error::invalid(format!(
                "group {group:?} has white space or a control character: it may have none"
            )));
        }
        // First, so that no announcement about a request's client is missed. A worker without the right to it
        // works all the same; a LOG event reports it.
        self.subscribe_offline()?;
        let connection = self.shared()?;
        let max_streams = if max_streams == 0 { DEFAULT_MAX_STREAMS } else { max_streams };
        let service = Arc::new_cyclic(|this| Service {
            handle_id: fork::next_handle_id(),
            this: this.clone(),
            connection,
            queue: Arc::clone(queue),
            tag,
            max_streams: max_streams as usize,
            running: DashMap::new(),
            running_count: AtomicUsize::new(0),
            stopped: AtomicBool::new(false),
            subject: subject.into(),
            subscription: Mutex::default(),
        });
        self.subscribe(service.handle_id, subject.into(), group, Arc::clone(&service) as Arc<dyn MessageHandler>);
        let settled = self.flush_subscription(service.handle_id).and_then(|()| {
            let mut state = service.subscription.lock();
            // It may have come just now.
            if state.is_refused {
                return Err(self.refusal(service.handle_id).unwrap_or(Status::Disconnected.into()));
            }
            state.is_served = true;
            Ok(())
        });
        match settled {
            Ok(()) => Ok(service),
            Err(error) => {
                service.close();
                Err(error)
            }
        }
    }
}

impl Service {
    pub(crate) fn handle_id(&self) -> u64 {
        self.handle_id
    }

    pub(crate) fn connection(&self) -> &Connection {
        &self.connection
    }

    pub(crate) fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }

    pub(crate) fn tag(&self) -> u64 {
        self.tag
    }

    /// Takes no more requests. Streams that run go on.
    ///
    /// # Errors
    /// `Closed` when it was stopped before, or its connection closed.
    pub fn stop(&self) -> Result<()> {
        self.connection.check_open()?;
        if !self.close() {
            return Err(Error::new(Status::Closed, "the service was stopped before"));
        }
        Ok(())
    }

    /// `stop`, whatever there was before; false when it had no effect.
    pub fn close(&self) -> bool {
        let is_first = !self.stopped.swap(true, Ordering::AcqRel);
        if is_first {
            // A request that was not refused, because it came before, is in the queue when this returns.
            self.connection.inbound().finish_message();
            self.connection.unsubscribe(self.handle_id);
        }
        is_first
    }

    /// A sender of this service has ended: each says so once.
    pub(crate) fn forget(&self, handle_id: u64) {
        self.running.remove(&handle_id);
        self.connection.counters.senders.fetch_sub(1, Ordering::Relaxed);
    }

    /// A sender has ended, and its REQUEST does not wait in the queue any longer.
    pub(crate) fn free_place(&self) {
        self.running_count.fetch_sub(1, Ordering::AcqRel);
    }

    fn request(self: Arc<Self>, message: Message) {
        let connection = &self.connection;
        count(&connection.counters.requests);
        let Some(reply) =
            message.reply.filter(|reply| level0::is_valid_reply_subject(reply, connection.offline_subject()))
        else {
            count(&connection.counters.requests_ignored);
            connection.log(Status::Invalid, || {
                format!(
                    "a request on {} was ignored: it has no reply subject, or one that must not be answered to",
                    message.subject
                )
            });
            return;
        };
        let id = level0::header(message.headers.as_ref(), level0::CONNECT_ID).unwrap_or_default();
        let id = match client_id::id(id.as_bytes()) {
            Ok(id) => Arc::from(id),
            Err(error) => {
                count(&connection.counters.requests_ignored);
                self.refuse(&reply, &format!("invalid {}: {error}", level0::CONNECT_ID));
                return;
            }
        };
        // Only this task adds, so there is no race between the question and the answer. One that was on its way when the
        // service stopped is refused in the same way: another worker may have room.
        let is_over = self.stopped.load(Ordering::Acquire) || connection.check_open().is_err();
        if is_over || self.running_count.load(Ordering::Acquire) >= self.max_streams {
            count(&connection.counters.requests_busy);
            self.refuse(&reply, level0::BUSY);
            return;
        }
        // Copied: what came is a part of the NATS client's read buffer, all of which would be kept as long as the sender.
        let reply = Subject::from(reply.as_str().to_owned());
        let headers = level0::own_headers(message.headers.as_ref());
        let offer = level0::header(message.headers.as_ref(), level0::LANE).map(str::to_owned);
        let sender = Sender::new(Arc::clone(&self), reply, Arc::clone(&id), headers);
        self.running_count.fetch_add(1, Ordering::AcqRel);
        count(&connection.counters.senders);
        registry::attach(&id, sender.handle_id(), Arc::clone(&sender) as _);
        if let (Some(offer), Some(lanes)) = (offer, connection.lanes()) {
            let party: Arc<dyn StreamObserver> = Arc::clone(&sender) as _;
            match lanes.open(&offer, &party) {
                Ok(Some((lane, credit))) => sender.use_lane(lane, credit),
                Ok(None) => {}
                // Another version's, or nonsense: level 0 is always there.
                Err(error) => connection.log(error.status, || format!("a request is answered on level 0: {error}")),
            }
        }
        if !sender.is_on_lane() {
            self.running.insert(sender.handle_id(), Arc::clone(&sender));
        }
        if connection.check_open().is_err() {
            // Closed since it arrived: whoever closed it may not have seen this sender.
            sender.connection_ended(Status::Closed);
        }
        if sender.is_closed() {
            // Ended before it was attached.
            registry::detach(&id, sender.handle_id());
            self.running.remove(&sender.handle_id());
        }
        let event = Single {
            client: Some(id),
            subject: message.subject.into_string().into(),
            ..Single::of(Kind::Request, Status::Ok, Arc::clone(&sender) as _, unpin(message.payload))
        };
        if connection.wakeups().push(&self.queue, || Some(event)) {
            sender.request_queued();
        } else {
            EventSource::abandoned(&*sender);
        }
    }

    /// Answers a request with an error. Where so much waits that there is no room for it, it is dropped.
    fn refuse(&self, reply: &Subject, text: &str) {
        let payload = level0::error(text.as_bytes(), self.connection.max_payload());
        let _ = self.connection.outbox().send(&StatusWord::default(), reply, &payload, || None);
    }
}

impl MessageHandler for Service {
    fn message(&self, message: Message) {
        if let Some(this) = self.this.upgrade() {
            this.request(message);
        }
    }

    fn ended(&self, why: Status) {
        // Not while iterating: each forgets itself.
        let running: Vec<_> = self.running.iter().map(|entry| Arc::clone(entry.value())).collect();
        running.iter().for_each(|sender| sender.connection_ended(why));
    }

    fn subscription_refused(&self, why: &Error) {
        let mut state = self.subscription.lock();
        state.is_refused = true;
        if state.is_served {
            let text = why.message.clone().into_owned();
            self.queue.push_news_about(&self.subject, Kind::Disconnected, why.status, self.tag, text);
        }
    }

    fn subscription_accepted(&self) {
        let mut state = self.subscription.lock();
        state.is_refused = false;
        if state.is_served {
            let text = "nats-server has the subscription again";
            self.queue.push_news_about(&self.subject, Kind::Connected, Status::Ok, self.tag, text);
        }
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        let refused: Vec<_> = self
            .running
            .iter()
            .filter(|sender| sender.answers(subject))
            .map(|entry| Arc::clone(entry.value()))
            .collect();
        refused.iter().for_each(|sender| sender.refused());
        (!refused.is_empty()).then_some(
            "the answer was stopped; allow to publish to the gateways' inboxes, or allow_responses: { max: -1, expires: \"24h\" }",
        )
    }
}
