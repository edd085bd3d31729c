//! Messages in: the subscriptions of the current NATS client, and the handler of each.
//!
//! async-nats gives each subscription a channel of its own. Tasks that read these channels would see an announcement and a
//! request in any order. So the *waker* of a subscription is the message loop: async-nats calls it on its own task while it
//! hands a message over, and it handles that message before it returns. Messages of different subscriptions are handled in
//! the order in which they arrive, with no task switch between the socket and the handler.

use crate::error::{Error, Status};
use crate::metrics::{Counters, count};
use crate::nats::client::{Client, PublishError, Subscriber};
use crate::nats::message::{Message, Subject};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{OwnedMutex, OwnedMutexGuard};
use std::collections::HashMap;
use std::mem;
use std::sync::{Arc, Weak};
use std::task::{Poll, Wake, Waker};
use tokio::sync::Notify;

/// Handles the messages of a subscription, or of one subject of the inbox: a service, a stream, all lanes, an echo.
pub(crate) trait MessageHandler: Send + Sync {
    /// A message came. Called in the order of arrival; it must not block.
    fn message(&self, message: Message);
    /// The connection was lost (`Disconnected`) or closed (`Closed`): what runs on it has ended.
    fn ended(&self, _why: Status) {}
    /// nats-server refuses what is published to this subject. If that ends something, returns what that was, and what to do
    /// about it.
    fn refused(&self, _subject: &str) -> Option<&'static str> {
        None
    }
    /// The connection is closed: a first answer that is still expected will not come.
    fn no_answer(&self) {}
    /// nats-server refuses the subscription, or has taken it back. It is tried again.
    fn subscription_refused(&self, _why: &Error) {}
    /// nats-server has the subscription after it had refused it.
    fn subscription_accepted(&self) {}
}

/// Calls a function when a message comes, or with the reason when what runs on the connection ends.
pub(crate) struct OnMessage<F>(pub(crate) F);

impl<F: Fn(Result<(), Status>) + Send + Sync> MessageHandler for OnMessage<F> {
    fn message(&self, _message: Message) {
        (self.0)(Ok(()));
    }

    fn ended(&self, why: Status) {
        (self.0)(Err(why));
    }
}

/// A subject that stays subscribed across connections.
#[derive(Clone)]
pub(crate) struct Subscription {
    pub(crate) subject: Subject,
    /// The queue group; empty: none.
    pub(crate) group: String,
    pub(crate) handler: Arc<dyn MessageHandler>,
}

/// The subscriptions of the current NATS client.
#[derive(Default)]
pub(crate) struct Inbound {
    /// Locked while a message is handled.
    active: OwnedMutex<Active>,
    /// A waker was called by the thread that has locked `active`: async-nats calls a waker from `poll_next`, too, when a
    /// message comes in that instant. That thread polls again.
    woken_while_locked: AtomicBool,
    /// Notified when the client has ended: a subscription ended that was not unsubscribed.
    pub(crate) client_ended: Notify,
    counters: Arc<Counters>,
}

#[derive(Default)]
struct Active {
    /// Counts the clients. Wakers of an earlier client do nothing.
    generation: u64,
    has_client_ended: bool,
    subscriptions: HashMap<u64, ActiveSubscription, ahash::RandomState>,
}

struct ActiveSubscription {
    subject: Subject,
    group: String,
    /// nats-server does not have it, though async-nats believes that it does.
    is_refused: bool,
    subscriber: Subscriber,
    waker: Waker,
    handler: Arc<dyn MessageHandler>,
}

impl Inbound {
    pub(crate) fn new(counters: Arc<Counters>) -> Inbound {
        Inbound { counters, ..Inbound::default() }
    }

    /// Forgets the client and all its subscriptions.
    pub(crate) fn reset(&self) {
        let previous = {
            let mut active = self.lock();
            active.generation += 1;
            active.has_client_ended = false;
            mem::take(&mut active.subscriptions)
        };
        drop(previous);
    }

    /// Waits until the message that is being handled now, if there is one, has been handled.
    pub(crate) fn finish_message(&self) {
        drop(self.active.lock());
    }

    /// Must not be called by a message handler: its thread has locked this already.
    fn lock(&self) -> OwnedMutexGuard<'_, Active> {
        match self.active.lock() {
            Some(active) => active,
            None => unreachable!("called by a message handler"),
        }
    }

    /// Returns true if the current client has ended.
    pub(crate) fn has_client_ended(&self) -> bool {
        self.lock().has_client_ended
    }

    /// Subscribes at the current client, unless it has this subscription.
    pub(crate) async fn subscribe(self: &Arc<Self>, client: &Client, id: u64, subscription: Subscription) {
        while !self.try_subscribe(client, id, &subscription) {
            // The client's buffer is full.
            tokio::task::yield_now().await;
        }
    }

    fn try_subscribe(self: &Arc<Self>, client: &Client, id: u64, subscription: &Subscription) -> bool {
        // Locked until this subscription has its waker. If the client's task has a message for another subscription meanwhile,
        // it waits; else that message could overtake the first ones of this subscription.
        let mut active = self.lock();
        if active.subscriptions.contains_key(&id) {
            return true;
        }
        let Subscription { subject, group, handler } = subscription.clone();
        match client.try_subscribe(subject.clone(), &group) {
            None => return false,
            Some(Err(_)) => self.end_client(&mut active),
            Some(Ok(subscriber)) => {
                let waker = SubscriptionWaker {
                    inbound: Arc::downgrade(self),
                    subscription: id,
                    generation: active.generation,
                };
                let waker = Waker::from(Arc::new(waker));
                let new = ActiveSubscription { subject, group, is_refused: false, subscriber, waker, handler };
                active.subscriptions.insert(id, new);
                self.handle_messages(&mut active, id);
            }
        }
        true
    }

    /// Ends a subscription at the server. Messages that the server sends before it processes this still come.
    ///
    /// If a request was dropped, it would never be answered.
    pub(crate) async fn send_unsub(&self, client: &Client, id: u64, unserved: &str) -> Result<(), PublishError> {
        let sid = self.lock().subscriptions.get(&id).map(|active| active.subscriber.sid);
        match sid {
            Some(sid) => client.send_unsub(sid, unserved).await,
            None => Ok(()),
        }
    }

    /// Marks a subscription as refused if that is what this error of nats-server says, and returns its id.
    pub(crate) fn mark_refused(&self, server_error: &str) -> Option<u64> {
        let refusal = Refusal::parse(server_error)?;
        let mut active = self.lock();
        let candidates = active.subscriptions.iter_mut().filter(|(_, active)| !active.is_refused);
        let (id, refused) = match refusal {
            Refusal::Sid(sid) => candidates.into_iter().find(|(_, active)| active.subscriber.sid == sid),
            Refusal::Named { subject, group } => {
                candidates.into_iter().find(|(_, active)| *active.subject == *subject && active.group == group)
            }
            // The server processes them in our order: those above its limit are the last ones.
            Refusal::TooMany => candidates.max_by_key(|(_, active)| active.subscriber.sid),
        }?;
        refused.is_refused = true;
        Some(*id)
    }

    /// Returns true if nats-server refuses a subscription; None if the current client does not have it.
    pub(crate) fn is_refused(&self, id: u64) -> Option<bool> {
        self.lock().subscriptions.get(&id).map(|active| active.is_refused)
    }

    /// Ends a subscription at the client, which drops what comes for it from now on.
    pub(crate) fn unsubscribe(&self, id: u64) {
        let removed = self.lock().subscriptions.remove(&id);
        drop(removed);
    }

    /// Handles all messages that a subscription has, and leaves its waker with it.
    fn handle_messages(&self, active: &mut Active, id: u64) {
        let Some(ActiveSubscription { subscriber, waker, handler, .. }) = active.subscriptions.get_mut(&id) else {
            return;
        };
        loop {
            match subscriber.poll_next(waker) {
                Poll::Ready(Some(message)) => {
                    count(&self.counters.messages_in);
                    handler.message(message);
                }
                Poll::Ready(None) => return self.end_client(active),
                Poll::Pending if self.woken_while_locked.swap(false, Ordering::Relaxed) => {}
                Poll::Pending => return,
            }
        }
    }

    fn end_client(&self, active: &mut Active) {
        active.has_client_ended = true;
        self.client_ended.notify_one();
    }
}

/// An error of nats-server about a subscription that it refuses.
#[derive(Debug, PartialEq)]
enum Refusal<'a> {
    /// The one with this sid, which the server had until its configuration changed.
    Sid(u64),
    /// The one with this subject and group.
    Named { subject: &'a str, group: &'a str },
    /// `max_subscriptions` is reached.
    TooMany,
}

impl<'a> Refusal<'a> {
    fn parse(server_error: &'a str) -> Option<Refusal<'a>> {
        if server_error.contains("maximum subscriptions exceeded") {
            return Some(Refusal::TooMany);
        }
        let quoted = |after: &str| server_error.split_once(after)?.1.split_once('"').map(|(quoted, _)| quoted);
        let subject = quoted("Permissions Violation for Subscription to \"")?;
        Some(match quoted("(sid \"").and_then(|sid| sid.parse().ok()) {
            Some(sid) => Refusal::Sid(sid),
            None => Refusal::Named { subject, group: quoted("using queue \"").unwrap_or_default() },
        })
    }
}

/// The waker of a subscription: handles the message that the client's task is handing over.
struct SubscriptionWaker {
    inbound: Weak<Inbound>,
    subscription: u64,
    generation: u64,
}

impl Wake for SubscriptionWaker {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(inbound) = self.inbound.upgrade() {
            match inbound.active.lock() {
                Some(mut active) if active.generation == self.generation => {
                    inbound.handle_messages(&mut active, self.subscription);
                }
                Some(_) => {}
                None => inbound.woken_while_locked.store(true, Ordering::Relaxed),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    const TIMEOUT: Duration = Duration::from_secs(20);

    #[test]
    fn wakeup_during_subscribe_is_not_lost() {
        let inbound: Arc<Inbound> = Arc::default();
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let _handling = inbound.lock();
            Arc::new(SubscriptionWaker { inbound: Arc::downgrade(&inbound), subscription: 1, generation: 0 }).wake();
            sender.send(inbound.woken_while_locked.load(Ordering::Relaxed)).unwrap();
        });
        assert_eq!(receiver.recv_timeout(TIMEOUT), Ok(true));
    }

    #[test]
    fn refusals_of_nats_server_are_parsed() {
        let parse = |server_error| Refusal::parse(server_error);
        assert_eq!(
            parse(r#"nats: Permissions Violation for Subscription to "a.b""#),
            Some(Refusal::Named { subject: "a.b", group: "" })
        );
        assert_eq!(
            parse(r#"nats: Permissions Violation for Subscription to "a.b" using queue "q""#),
            Some(Refusal::Named { subject: "a.b", group: "q" })
        );
        assert_eq!(
            parse(r#"nats: Permissions Violation for Subscription to "a.b" using queue "q" (sid "17")"#),
            Some(Refusal::Sid(17))
        );
        assert_eq!(parse("nats: maximum subscriptions exceeded"), Some(Refusal::TooMany));
        assert_eq!(parse(r#"nats: Permissions Violation for Publish to "a.b""#), None);
    }

    #[test]
    fn finish_message_waits_for_the_message_being_handled() {
        let inbound: Arc<Inbound> = Arc::default();
        let (sender, receiver) = mpsc::channel();
        let active = inbound.lock();
        let other = Arc::clone(&inbound);
        thread::spawn(move || {
            sender.send("begun").unwrap();
            other.finish_message();
            sender.send("finished").unwrap();
        });
        assert_eq!(receiver.recv_timeout(TIMEOUT), Ok("begun"));
        assert_eq!(receiver.recv_timeout(Duration::from_millis(20)), Err(mpsc::RecvTimeoutError::Timeout));
        drop(active);
        assert_eq!(receiver.recv_timeout(TIMEOUT), Ok("finished"));
    }
}
