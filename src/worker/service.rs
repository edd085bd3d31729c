//! The worker's side: a subject that is served, and its requests.

use crate::connection::Connection;
use crate::connection::discovery::Endpoint;
use crate::error::{Error, Result, Status};
use crate::events::{EventSource, Kind, Queue, Single, unpin};
use crate::lane::driver::StreamObserver;
use crate::metrics::{ServiceCounters, count};
use crate::nats::inbound::MessageHandler;
use crate::nats::{Message, Subject};
use crate::presence::client_id;
use crate::presence::registry;
use crate::process::fork;
use crate::status_word::StatusWord;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use crate::wire::level0::{self, Use};
use crate::worker::sender::{Sender, SenderObserver};
use dashmap::DashMap;
use std::sync::{Arc, Weak};

/// How many streams may run at once if the caller sets no limit.
const DEFAULT_MAX_STREAMS: u32 = 10_000;

/// A subject that this process serves.
pub struct Service {
    pub(crate) handle_id: u64,
    this: Weak<Service>,
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    tag: u64,
    subject: Box<str>,
    max_streams: usize,
    /// Senders on level 0, which end with the connection. (Lanes keep their own.)
    running: DashMap<u64, Arc<Sender>, ahash::RandomState>,
    running_count: AtomicUsize,
    endpoint: Arc<Endpoint>,
    stopped: AtomicBool,
    subscription: Mutex<SubscriptionState>,
}

/// The state of a service's subscription at nats-server.
#[derive(Default)]
struct SubscriptionState {
    /// `serve` has returned, so later refusals are reported by events.
    is_served: bool,
    is_refused: bool,
}

impl Connection {
    /// Serves a subject: each request becomes a `Request` event with `tag` in `queue`.
    ///
    /// `group`: each request goes to one of the processes that serve in the same group; with the empty group, to all
    /// processes that serve. `max_streams`: how many streams may run at once; 0 stands for 10,000.
    ///
    /// # Errors `Invalid`, `Closed`, `Timeout`; if nats-server refuses the subscription, `Disconnected`, or `Full` when
    /// it has too many.
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
                "group {group:?} has white space or a control character, which are not allowed"
            )));
        }
        // First, so that no announcement about a request's client is missed. A worker that may not subscribe to it
        // works all the same; a LOG event reports it.
        self.subscribe_offline()?;
        let (connection, has_discovery) = (self.shared()?, self.has_discovery());
        let max_streams = if max_streams == 0 { DEFAULT_MAX_STREAMS } else { max_streams };
        let service = Arc::new_cyclic(|this| Service {
            handle_id: fork::next_handle_id(),
            this: this.clone(),
            connection,
            queue: Arc::clone(queue),
            tag,
            max_streams: max_streams as usize,
            running: DashMap::default(),
            running_count: AtomicUsize::new(0),
            endpoint: Arc::new(Endpoint::new(subject, group, self.counters.service(subject))),
            stopped: AtomicBool::new(false),
            subject: subject.into(),
            subscription: Mutex::default(),
        });
        self.subscribe(service.handle_id, subject.into(), group, Arc::clone(&service) as Arc<dyn MessageHandler>);
        let accepted = self.flush_subscription(service.handle_id).and_then(|()| {
            let mut state = service.subscription.lock();
            // It may have been refused just now.
            if state.is_refused {
                return Err(self.refusal(service.handle_id).unwrap_or(Status::Disconnected.into()));
            }
            state.is_served = true;
            Ok(())
        });
        match accepted {
            Ok(()) => {
                self.add_endpoint(&service.endpoint);
                Ok(service)
            }
            Err(error) => {
                service.close();
                if error.status == Status::Full && has_discovery {
                    // Without the subscriptions of the service protocol there may be room for it.
                    self.end_discovery();
                    return self.serve(queue, subject, group, max_streams, tag);
                }
                Err(error)
            }
        }
    }
}

impl Service {
    /// Takes no more requests. Streams that run go on.
    ///
    /// # Errors
    /// `Closed` if it was stopped before, or its connection was closed.
    pub fn stop(&self) -> Result<()> {
        self.connection.check_open()?;
        if !self.close() {
            return Err(Error::new(Status::Closed, "the service was stopped before"));
        }
        Ok(())
    }

    /// As `stop`, also on a closed connection. Returns false if it was stopped before.
    pub fn close(&self) -> bool {
        let is_first = !self.stopped.swap(true, Ordering::AcqRel);
        if is_first {
            // A request that came before this call, and so is not refused, is in the queue when this returns.
            self.connection.inbound.finish_message();
            self.connection.remove_endpoint(&self.endpoint);
            self.connection.unsubscribe(self.handle_id);
        }
        is_first
    }

    fn request(self: Arc<Self>, message: Message) {
        let connection = &self.connection;
        count(&self.endpoint.counters.requests);
        let Some(reply) = message
            .reply
            .as_ref()
            .filter(|reply| level0::is_valid_reply_subject(reply, &connection.options.offline_subject))
        else {
            count(&self.endpoint.counters.requests_ignored);
            connection.log(Status::Invalid, || {
                format!(
                    "a request on {} was ignored: it has no reply subject, or an answer to it is not allowed",
                    message.subject
                )
            });
            return;
        };
        let id = message.header(level0::CONNECT_ID).unwrap_or_default();
        let id = match client_id::id(id.as_bytes()) {
            Ok(id) => Arc::from(id),
            Err(error) => {
                count(&self.endpoint.counters.requests_ignored);
                self.refuse(reply, &format!("invalid {}: {error}", level0::CONNECT_ID));
                return;
            }
        };
        // Only this task adds senders, so the check is not outdated. A request that was on its way when the service
        // stopped is refused in the same way, as another worker may have capacity.
        let is_over = self.stopped.load(Ordering::Acquire) || connection.check_open().is_err();
        if is_over || self.running_count.load(Ordering::Acquire) >= self.max_streams {
            count(&self.endpoint.counters.requests_busy);
            self.refuse(reply, level0::BUSY);
            return;
        }
        let headers = message.copy_headers(&[level0::CONNECT_ID, level0::LANE]);
        let offer = message.header(level0::LANE).map(str::to_owned);
        // A copy, because a slice would keep the NATS client's whole read buffer as long as the sender exists.
        let sender = Sender::new(
            Arc::clone(&self) as _,
            Arc::clone(connection),
            Arc::clone(&self.queue),
            self.tag,
            reply.as_str().into(),
            Arc::clone(&id),
            headers,
        );
        self.running_count.fetch_add(1, Ordering::AcqRel);
        registry::attach(&id, Arc::clone(&sender) as _);
        if let (Some(offer), Some(lanes)) = (offer, connection.lanes()) {
            let observer: Arc<dyn StreamObserver> = Arc::clone(&sender) as _;
            match lanes.open(&offer, &observer) {
                Ok(Some((lane, window))) => sender.use_lane(lane, window),
                Ok(None) => {}
                // The offer is of another version, or malformed. Level 0 always works.
                Err(error) => connection.log(error.status, || format!("a request is answered on level 0: {error}")),
            }
        }
        if !sender.is_on_lane() {
            self.running.insert(sender.source().handle_id, Arc::clone(&sender));
        }
        if connection.check_open().is_err() {
            // The connection was closed since the request arrived, and `close` may not have seen this sender.
            sender.connection_ended(Status::Closed);
        }
        if sender.is_closed() {
            // It may have ended before it was attached.
            registry::detach(&id, sender.source().handle_id);
            self.running.remove(&sender.source().handle_id);
        }
        let event = Single {
            client: Some(id),
            subject: message.subject.into_string().into(),
            ..Single::of(Kind::Request, Status::Ok, Arc::clone(&sender) as _, unpin(message.payload))
        };
        if connection.wakeups.push(&self.queue, || Some(event)) {
            sender.request_queued();
        } else {
            sender.left_queue(Kind::Request, 1, 0, false);
        }
    }

    /// Answers a request with an error. The answer is dropped if the outbox is full.
    fn refuse(&self, reply: &Subject, text: &str) {
        let payload = level0::error(text.as_bytes(), self.connection.max_payload());
        let _ = self.connection.outbox.send(&StatusWord::default(), reply, &payload, || None);
    }
}

impl SenderObserver for Service {
    fn counters(&self) -> &ServiceCounters {
        &self.endpoint.counters
    }

    fn sender_ended(&self, handle_id: u64) {
        self.running.remove(&handle_id);
    }

    fn capacity_freed(&self) {
        self.running_count.fetch_sub(1, Ordering::AcqRel);
    }
}

impl MessageHandler for Service {
    fn message(&self, message: Message) {
        if let Some(this) = self.this.upgrade() {
            this.request(message);
        }
    }

    fn ended(&self, why: Status) {
        // Collected first, because each removes itself from the map.
        let running: Vec<_> = self.running.iter().map(|entry| Arc::clone(entry.value())).collect();
        running.iter().for_each(|sender| sender.connection_ended(why));
    }

    fn subscription_refused(&self, why: &Error) {
        let mut state = self.subscription.lock();
        state.is_refused = true;
        if state.is_served {
            let text = why.message.clone().into_owned();
            self.queue.push_connection(&self.subject, Kind::Disconnected, why.status, self.tag, text);
        }
    }

    fn subscription_accepted(&self) {
        let mut state = self.subscription.lock();
        state.is_refused = false;
        if state.is_served {
            let text = "nats-server has the subscription again";
            self.queue.push_connection(&self.subject, Kind::Connected, Status::Ok, self.tag, text);
        }
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        let refused: Vec<_> = self
            .running
            .iter()
            .filter(|sender| sender.sends_to(subject))
            .map(|entry| Arc::clone(entry.value()))
            .collect();
        refused.iter().for_each(|sender| sender.refused());
        (!refused.is_empty()).then_some(
            "the answer was stopped; allow to publish to the gateways' inboxes, or allow_responses: { max: -1, expires: \"24h\" }",
        )
    }
}
