//! Messages in: what is subscribed on the present NATS client, and to whom each message goes.
//!
//! Each message is handled while the client hands it over, by the waker of its subscription, on the client's own task. So
//! messages of different subscriptions keep the order in which they arrived: an announcement never overtakes a request, nor the
//! other way round. (Tasks that wait for each subscription would see them in any order.)

use async_nats::{Client, Message, PublishError, Subject, Subscriber};
use bytes::Bytes;
use dashmap::DashMap;
use futures_util::{FutureExt, StreamExt};
use std::collections::HashMap;
use std::mem;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::task::{Context, Poll, Wake, Waker};
use tokio::sync::Notify;
use tokio::task::coop::unconstrained;

use crate::error::{Error, Status};
use crate::sync::{OwnedMutex, OwnedMutexGuard};

/// Whom messages are for: a service, a stream, or whoever waits for an echo.
pub(crate) trait MessageHandler: Send + Sync {
    /// A message came. Called in the order of arrival; it must not block.
    fn message(&self, message: Message);
    /// The connection was lost (`Disconnected`) or closed (`Closed`): what runs on it has ended.
    fn ended(&self, why: Status);
    /// nats-server refuses what is sent to this subject. If that ends something, what it was, and what to do about it.
    fn refused(&self, _subject: &str) -> Option<&'static str> {
        None
    }
    /// Called for what still waits for its first answer when the connection is closed: it will not come.
    fn no_answer(&self) {}
    /// nats-server refuses the subscription, or has taken it back. It is tried again.
    fn subscription_refused(&self, _why: &Error) {}
    /// nats-server has the subscription after it had refused it.
    fn subscription_accepted(&self) {}
}

/// What is to be subscribed as long as there is a connection.
#[derive(Clone)]
pub(crate) struct Subscription {
    pub(crate) subject: Subject,
    /// Empty: none.
    pub(crate) group: String,
    pub(crate) receiver: Arc<dyn MessageHandler>,
}

/// The subscriptions of the present NATS client.
#[derive(Default)]
pub(crate) struct Inbound {
    /// Locked while a message is handled. A waker may be called on the very thread that registers it, when a message comes
    /// in that instant.
    link: OwnedMutex<Link>,
    /// A wakeup arrived so, while the link was locked: poll again.
    rang: AtomicBool,
    /// The present client is dead: a subscription ended that we did not end.
    pub(crate) died: Notify,
    pub(crate) messages: AtomicU64,
}

#[derive(Default)]
struct Link {
    /// Counts the clients; wakers of an earlier one are ignored.
    generation: u64,
    is_dead: bool,
    /// The client counts its subscriptions from 1, and so do we: it does not tell.
    last_sid: u64,
    active: HashMap<u64, Active>,
}

struct Active {
    subject: Subject,
    group: String,
    /// nats-server does not have it, though the client believes that it does.
    is_refused: bool,
    subscriber: Subscriber,
    waker: Waker,
    receiver: Arc<dyn MessageHandler>,
    /// The number by which client and server call it.
    sid: u64,
}

impl Inbound {
    /// Forgets the client that was, and all its subscriptions.
    pub(crate) fn reset(&self) {
        let before = {
            let mut link = self.link();
            link.generation += 1;
            link.is_dead = false;
            link.last_sid = 0;
            mem::take(&mut link.active)
        };
        drop(before);
    }

    /// Returns when the message that is being handled now, if there is one, has been.
    pub(crate) fn finish_message(&self) {
        drop(self.link.lock());
    }

    /// Locks the link. Not to be called while a message is handled: that thread has locked it.
    fn link(&self) -> OwnedMutexGuard<'_, Link> {
        match self.link.lock() {
            Some(link) => link,
            None => unreachable!("the link is locked by this thread: it handles a message"),
        }
    }

    /// Whether the present client has died.
    pub(crate) fn is_dead(&self) -> bool {
        self.link().is_dead
    }

    /// Subscribes on the present client, once for each number.
    pub(crate) async fn subscribe(self: &Arc<Self>, client: &Client, number: u64, own: Subscription) {
        while !self.try_subscribe(client, number, &own) {
            // The client's buffer is full.
            tokio::task::yield_now().await;
        }
    }

    fn try_subscribe(self: &Arc<Self>, client: &Client, number: u64, own: &Subscription) -> bool {
        // Locked, so that the client's task, should it have a message for another subscription meanwhile, waits until this
        // one's waker is in place: else what this one has got by then could be overtaken.
        let mut link = self.link();
        if link.active.contains_key(&number) {
            return true;
        }
        link.last_sid += 1;
        let subscribed = if own.group.is_empty() {
            unconstrained(client.subscribe(own.subject.clone())).now_or_never()
        } else {
            unconstrained(client.queue_subscribe(own.subject.clone(), own.group.clone())).now_or_never()
        };
        match subscribed {
            None => return false,
            Some(Err(_)) => self.note_death(&mut link),
            Some(Ok(subscriber)) => {
                let doorbell = Doorbell { inbound: Arc::downgrade(self), number, generation: link.generation };
                let waker = Waker::from(Arc::new(doorbell));
                let (receiver, sid) = (Arc::clone(&own.receiver), link.last_sid);
                let (subject, group) = (own.subject.clone(), own.group.clone());
                let active = Active { subject, group, is_refused: false, subscriber, waker, receiver, sid };
                link.active.insert(number, active);
                self.receive(&mut link, number);
            }
        }
        true
    }

    /// Has the server end a subscription, while the client goes on to give us what is on its way.
    ///
    /// The client itself drops, from its unsubscription on, what the server had sent before it knew. A request dropped
    /// like this is never answered, and nobody learns of it. So the server is told behind the client's back, in what looks
    /// to the client like the subject of an empty message to `nowhere`.
    pub(crate) async fn end_at_server(&self, client: &Client, number: u64, nowhere: &str) -> Result<(), PublishError> {
        let sid = self.link().active.get(&number).map(|active| active.sid);
        match sid {
            Some(sid) => client.publish(format!("{nowhere} 0\r\n\r\nUNSUB {sid}\r\nPUB {nowhere}"), Bytes::new()).await,
            None => Ok(()),
        }
    }

    /// Notes that nats-server refuses a subscription, if that is what it says; the number of the subscription.
    pub(crate) fn note_refusal(&self, said: &str) -> Option<u64> {
        let refusal = Refusal::read(said)?;
        let mut link = self.link();
        let candidates = link.active.iter_mut().filter(|(_, active)| !active.is_refused);
        let (number, active) = match refusal {
            Refusal::Number(sid) => candidates.into_iter().find(|(_, active)| active.sid == sid),
            Refusal::Named { subject, group } => {
                candidates.into_iter().find(|(_, active)| *active.subject == *subject && active.group == group)
            }
            // The server takes them in our order: what is above its limit are the last ones.
            Refusal::TooMany => candidates.max_by_key(|(_, active)| active.sid),
        }?;
        active.is_refused = true;
        Some(*number)
    }

    /// Whether nats-server refuses a subscription; None: it is not subscribed now.
    pub(crate) fn is_refused(&self, number: u64) -> Option<bool> {
        self.link().active.get(&number).map(|active| active.is_refused)
    }

    /// Ends a subscription at the client.
    pub(crate) fn unsubscribe(&self, number: u64) {
        let ended = self.link().active.remove(&number);
        drop(ended);
    }

    /// Handles what a subscription has, and leaves its waker with it.
    fn receive(&self, link: &mut Link, number: u64) {
        let Some(Active { subscriber, waker, receiver, .. }) = link.active.get_mut(&number) else { return };
        let mut context = Context::from_waker(waker);
        loop {
            // Unconstrained: the budget of the task that we happen to run on is not ours.
            match pin!(unconstrained(subscriber.next())).poll(&mut context) {
                Poll::Ready(Some(message)) => {
                    self.messages.fetch_add(1, Ordering::Relaxed);
                    receiver.message(message);
                }
                Poll::Ready(None) => return self.note_death(link),
                Poll::Pending if self.rang.swap(false, Ordering::Relaxed) => {}
                Poll::Pending => return,
            }
        }
    }

    fn note_death(&self, link: &mut Link) {
        link.is_dead = true;
        self.died.notify_one();
    }
}

/// What nats-server says about a subscription that it refuses.
#[derive(Debug, PartialEq)]
enum Refusal<'a> {
    /// The one with this number, which it had until its configuration changed.
    Number(u64),
    /// One with this subject and group.
    Named { subject: &'a str, group: &'a str },
    /// `max_subscriptions` is reached.
    TooMany,
}

impl<'a> Refusal<'a> {
    fn read(said: &'a str) -> Option<Refusal<'a>> {
        if said.contains("maximum subscriptions exceeded") {
            return Some(Refusal::TooMany);
        }
        let quoted = |after: &str| said.split_once(after)?.1.split_once('"').map(|(quoted, _)| quoted);
        let subject = quoted("Permissions Violation for Subscription to \"")?;
        Some(match quoted("(sid \"").and_then(|sid| sid.parse().ok()) {
            Some(sid) => Refusal::Number(sid),
            None => Refusal::Named { subject, group: quoted("using queue \"").unwrap_or_default() },
        })
    }
}

/// The waker of a subscription, rung by the client's task for each message that it hands over.
struct Doorbell {
    inbound: Weak<Inbound>,
    number: u64,
    generation: u64,
}

impl Wake for Doorbell {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if let Some(inbound) = self.inbound.upgrade() {
            match inbound.link.lock() {
                Some(mut link) if link.generation == self.generation => inbound.receive(&mut link, self.number),
                Some(_) => {}
                None => inbound.rang.store(true, Ordering::Relaxed),
            }
        }
    }
}

/// Nobody has this number.
const NOWHERE: u64 = 0;
/// More expected answers than this are a crowd.
const MANY: usize = 1024;

/// The connection's own subject for answers, one token below it for each that is expected.
pub(crate) struct Inbox {
    /// What its subjects begin with, dot included.
    prefix: String,
    expected: DashMap<u64, Arc<dyn MessageHandler>>,
    /// How many these are, and the most that there were since there were none.
    count: AtomicUsize,
    peak: AtomicUsize,
    /// Messages that nobody expected.
    pub(crate) ignored: AtomicU64,
}

impl Inbox {
    pub(crate) fn new(prefix: String) -> Inbox {
        Inbox {
            prefix,
            expected: DashMap::new(),
            count: AtomicUsize::new(0),
            peak: AtomicUsize::new(0),
            ignored: AtomicU64::new(0),
        }
    }

    /// What its subjects begin with.
    pub(crate) fn prefix(&self) -> &str {
        &self.prefix
    }

    /// What to subscribe for all that is expected.
    pub(crate) fn wildcard(&self) -> Subject {
        format!("{}*", self.prefix).into()
    }

    /// A subject at which nothing is expected.
    pub(crate) fn nowhere(&self) -> String {
        format!("{}{NOWHERE:x}", self.prefix)
    }

    /// Gives what comes to the subject that this returns to `receiver`. The number is random: whoever has seen another such
    /// subject is not to guess this one.
    pub(crate) fn expect(&self, number: u64, receiver: Arc<dyn MessageHandler>) -> Subject {
        if self.expected.insert(number, receiver).is_none() {
            let count = self.count.fetch_add(1, Ordering::Relaxed) + 1;
            self.peak.fetch_max(count, Ordering::Relaxed);
        }
        format!("{}{number:x}", self.prefix).into()
    }

    /// Who expects answers to this number. (Its entry is not held meanwhile: it may forget itself.)
    pub(crate) fn expected(&self, number: u64) -> Option<Arc<dyn MessageHandler>> {
        self.expected.get(&number).map(|entry| Arc::clone(entry.value()))
    }

    fn all(&self) -> Vec<Arc<dyn MessageHandler>> {
        self.expected.iter().map(|entry| Arc::clone(entry.value())).collect()
    }

    /// Reports to all that still wait for a first answer that it will not come.
    pub(crate) fn give_up_answers(&self) {
        self.all().iter().for_each(|receiver| receiver.no_answer());
    }

    /// Takes back `expect`. Returns false if it was taken back before.
    pub(crate) fn forget(&self, number: u64) -> bool {
        let was_expected = self.expected.remove(&number).is_some();
        if was_expected
            && self.count.fetch_sub(1, Ordering::Relaxed) == 1
            && self.peak.swap(0, Ordering::Relaxed) > MANY
        {
            // All who were asked have answered, on lanes: the room is not needed again soon.
            self.expected.shrink_to_fit();
        }
        was_expected
    }
}

impl MessageHandler for Inbox {
    fn message(&self, message: Message) {
        let token = message.subject.strip_prefix(&*self.prefix);
        let number = token.and_then(|token| u64::from_str_radix(token, 16).ok());
        match number.and_then(|number| self.expected(number)) {
            Some(receiver) => receiver.message(message),
            // Our own: see `end_at_server`.
            None if number == Some(NOWHERE) => {}
            None => {
                self.ignored.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    fn ended(&self, why: Status) {
        self.all().iter().for_each(|receiver| receiver.ended(why));
    }

    fn refused(&self, subject: &str) -> Option<&'static str> {
        self.all().iter().fold(None, |so, receiver| receiver.refused(subject).or(so))
    }

    fn subscription_refused(&self, _why: &Error) {
        // No answer comes any longer.
        self.ended(Status::Disconnected);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    const PATIENCE: Duration = Duration::from_secs(20);

    #[test]
    fn a_bell_that_rings_while_it_is_hung_up_is_heard() {
        let inbound: Arc<Inbound> = Arc::default();
        let (sender, receiver) = mpsc::channel();
        thread::spawn(move || {
            let _handling = inbound.link();
            Arc::new(Doorbell { inbound: Arc::downgrade(&inbound), number: 1, generation: 0 }).wake();
            sender.send(inbound.rang.load(Ordering::Relaxed)).unwrap();
        });
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok(true));
    }

    #[test]
    fn refusals_of_nats_server_are_read() {
        let read = |said| Refusal::read(said);
        assert_eq!(
            read(r#"nats: Permissions Violation for Subscription to "a.b""#),
            Some(Refusal::Named { subject: "a.b", group: "" })
        );
        assert_eq!(
            read(r#"nats: Permissions Violation for Subscription to "a.b" using queue "q""#),
            Some(Refusal::Named { subject: "a.b", group: "q" })
        );
        assert_eq!(
            read(r#"nats: Permissions Violation for Subscription to "a.b" using queue "q" (sid "17")"#),
            Some(Refusal::Number(17))
        );
        assert_eq!(read("nats: maximum subscriptions exceeded"), Some(Refusal::TooMany));
        assert_eq!(read(r#"nats: Permissions Violation for Publish to "a.b""#), None);
    }

    #[test]
    fn a_message_that_is_handled_is_waited_for() {
        let inbound: Arc<Inbound> = Arc::default();
        let (sender, receiver) = mpsc::channel();
        let link = inbound.link();
        let other = Arc::clone(&inbound);
        thread::spawn(move || {
            sender.send("begun").unwrap();
            other.finish_message();
            sender.send("finished").unwrap();
        });
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("begun"));
        assert_eq!(receiver.recv_timeout(Duration::from_millis(20)), Err(mpsc::RecvTimeoutError::Timeout));
        drop(link);
        assert_eq!(receiver.recv_timeout(PATIENCE), Ok("finished"));
    }
}
