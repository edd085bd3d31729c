//! A lane at work: its state under a lock, and a task that gives the NATS client what the state has to send.
//!
//! Batching is natural: the task takes what has gathered as one message as soon as the client has written the last one.

use crate::error::Status;
use crate::events::{EventSource, LaneBatch, Queue, Wakeups};
use crate::lane::state::{Credit, LaneEvent, PeerTimeouts, Refusal, State};
use crate::nats::Subject;
use crate::nats::client::{Client, PublishError};
use crate::status_word::StatusWord;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex};
use crate::wire::frame::{self, Malformed};
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// A stream or sender at the end of a lane.
pub(crate) trait StreamObserver: EventSource {
    /// Where its messages go.
    fn queue(&self) -> &Arc<Queue>;
    /// A worker accepted the request as this stream of the lane. Returns false if the stream is no longer wanted.
    fn accepted(&self, _lane: &Arc<Lane>, _stream: u32) -> bool {
        false
    }
    /// The worker ended it.
    fn ended(&self) {}
    /// The worker ended it with an error.
    fn failed(&self, _text: Bytes) {}
    /// The worker sent more than there was room for; it is cancelled already.
    fn overrun(&self) {}
    /// The gateway cancelled it.
    fn cancelled(&self, _why: Status) {}
    /// There may be room for what was refused.
    fn room(&self) {}
    /// The other end is gone; `knew`: unless it never heard of it.
    fn peer_gone(&self, knew: bool);
    /// As `peer_gone`, for one that had ended, but of which the other end may never have heard.
    fn unheard(&self) {}
    /// It ends on this side: the connection is closed (`Closed`), or the lane has failed (`Internal`).
    fn ended_here(&self, why: Status);
}

/// The stream that a worker accepted, and its window; None if nobody wants it.
pub(crate) type Accepted = Option<(Arc<dyn StreamObserver>, u32)>;

/// One end of a lane.
pub(crate) struct Lane {
    /// The subjects of both ends.
    own: Subject,
    peer: Subject,
    /// The worker's end: what the gateway's end calls itself. Should it be lost and made anew, that is another lane.
    known_as: OnceCell<Box<str>>,
    state: Mutex<State<Arc<dyn StreamObserver>>>,
    changed: Notify,
    /// Threads wait for room.
    waiting: AtomicUsize,
    room: Condvar,
    /// Nothing waits for its acknowledgement any longer.
    drained: Notify,
}

impl Lane {
    pub(crate) fn new(
        own: Subject,
        peer: Subject,
        serves: bool,
        limit: usize,
        patience: PeerTimeouts,
        max_payload: usize,
    ) -> Arc<Lane> {
        let mut state = State::new(serves, limit, patience, Instant::now());
        state.set_max_payload(max_payload);
        Arc::new(Lane {
            own,
            peer,
            known_as: OnceCell::new(),
            state: Mutex::new(state),
            changed: Notify::new(),
            waiting: AtomicUsize::new(0),
            room: Condvar::default(),
            drained: Notify::new(),
        })
    }

    pub(crate) fn own(&self) -> &Subject {
        &self.own
    }

    pub(crate) fn peer(&self) -> &Subject {
        &self.peer
    }

    /// Whether it is the worker's end.
    pub(crate) fn serves(&self) -> bool {
        self.state.lock().serves()
    }

    /// Whether a message that names `end` as its sender is from the end that was there from the beginning.
    pub(crate) fn is_same_end(&self, end: &str) -> bool {
        end == self.peer.as_str() || **self.known_as.get_or_init(|| end.into()) == *end
    }

    pub(crate) fn is_over(&self) -> bool {
        self.state.lock().is_over()
    }

    /// Whether the other end ever said anything.
    pub(crate) fn was_heard(&self) -> bool {
        self.state.lock().was_heard()
    }

    pub(crate) fn backlog(&self) -> usize {
        self.state.lock().backlog()
    }

    /// Runs `change`, and wakes the task if there is something for it now.
    fn change<T>(&self, change: impl FnOnce(&mut State<Arc<dyn StreamObserver>>) -> T) -> T {
        let (result, must_wake) = {
            let mut state = self.state.lock();
            let result = change(&mut state);
            (result, state.must_wake())
        };
        if must_wake {
            self.changed.notify_one();
        }
        result
    }

    // The worker's calls ----------------------------------------------------------------------------------------------

    /// Accepts a request. None when the lane is over, or has no numbers left.
    pub(crate) fn open(&self, key: u64, window: u32, to: Arc<dyn StreamObserver>) -> Option<Arc<Credit>> {
        self.change(|state| state.open(key, window, to, Instant::now()))
    }

    /// Sends a message if `word` is 0 and there is room; else the status in the word, or `Full`, and then the party
    /// hears when there may be room.
    ///
    /// The word is read with the lane locked: whoever ends the stream sets it under the same lock, so that no message
    /// follows the end.
    #[inline]
    pub(crate) fn send(&self, word: &StatusWord, credit: &Credit, data: &[u8]) -> Result<(), Status> {
        self.change(|state| {
            word.check()?;
            state.send(credit, data).map_err(|refusal| refused(state, credit, refusal))
        })
    }

    /// As `send` for messages one behind the other: how many were sent before one was refused, or why the first was.
    pub(crate) fn send_many(
        &self,
        word: &StatusWord,
        credit: &Credit,
        data: &[u8],
        lengths: &[usize],
    ) -> Result<usize, Status> {
        self.change(|state| {
            word.check()?;
            match state.send_many(credit, data, lengths) {
                (0, Err(refusal)) => Err(refused(state, credit, refusal)),
                (sent, _) => Ok(sent),
            }
        })
    }

    /// As `send`, waiting for room (`None`: without limit).
    pub(crate) fn send_wait(
        &self,
        word: &StatusWord,
        credit: &Credit,
        data: &[u8],
        timeout: Option<Duration>,
    ) -> Result<(), Status> {
        let mut deadline = None;
        let mut state = self.state.lock();
        loop {
            word.check()?;
            match state.send(credit, data) {
                Ok(()) => break,
                Err(Refusal::Over) => return Err(Status::PeerGone),
                Err(Refusal::TooLarge) => return Err(Status::TooLarge),
                Err(Refusal::Full) => {}
            }
            let now = Instant::now();
            let deadline = *deadline.get_or_insert_with(|| timeout.and_then(|timeout| now.checked_add(timeout)));
            self.waiting.fetch_add(1, Ordering::SeqCst);
            let mut timed_out = false;
            match deadline {
                Some(deadline) => (state, timed_out) = self.room.wait_until(state, deadline),
                None => state = self.room.wait(state),
            }
            self.waiting.fetch_sub(1, Ordering::SeqCst);
            if timed_out {
                return Err(Status::Timeout);
            }
        }
        if state.must_wake() {
            drop(state);
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Ends a stream, with an error if there is a text, if `word` is 0, and puts `why` into the word.
    pub(crate) fn finish(
        &self,
        word: &StatusWord,
        why: Status,
        credit: &Credit,
        error: Option<&[u8]>,
    ) -> Result<(), Status> {
        self.change(|state| -> Result<(), Status> {
            word.check()?;
            if state.is_over() {
                // As a send has it: whoever is to hear of this has not set the word yet.
                return Err(Status::PeerGone);
            }
            // An offline mark may set it at the same time: it holds no lock of ours.
            if !word.try_stop(why) {
                return word.check();
            }
            state.finish(credit, error);
            Ok(())
        })?;
        self.call_waiters();
        Ok(())
    }

    /// Ends a stream whose word was set before.
    pub(crate) fn stop(&self, credit: &Credit, error: &[u8]) {
        self.change(|state| state.finish(credit, Some(error)));
        self.call_waiters();
    }

    // The gateway's calls ---------------------------------------------------------------------------------------------

    /// Gives a stream's worker room.
    pub(crate) fn grant(&self, stream: u32, weight: u64) {
        self.change(|state| state.grant(stream, weight));
    }

    /// Ends a stream from this side.
    pub(crate) fn cancel(&self, stream: u32, why: Status) {
        self.change(|state| state.cancel(stream, why.code().unsigned_abs() as u8));
    }

    // What comes in ---------------------------------------------------------------------------------------------------

    /// A message came from the other end.
    pub(crate) fn receive(
        &self,
        message: &Bytes,
        wakeups: &Wakeups,
        accept: impl FnMut(u64, u32) -> Accepted,
    ) -> Result<(), Malformed> {
        let mut tells = Vec::new();
        let received = self.change(|state| state.receive(message, Instant::now(), &mut tells, accept));
        self.tell(tells, message, wakeups);
        received
    }

    /// nats-server says that nobody is there.
    pub(crate) fn nobody_there(&self, wakeups: &Wakeups) {
        let mut tells = Vec::new();
        self.change(|state| state.nobody_there(Instant::now(), &mut tells));
        self.tell(tells, &Bytes::new(), wakeups);
    }

    fn tell(&self, tells: Vec<LaneEvent<Arc<dyn StreamObserver>>>, message: &Bytes, wakeups: &Wakeups) {
        // It may be room, or an end.
        self.call_waiters();
        if self.state.lock().is_drained() {
            self.drained.notify_waiters();
        }
        let mut batch: Option<(Arc<Queue>, LaneBatch)> = None;
        for tell in tells {
            if let LaneEvent::Data(to, run) = tell {
                if batch.as_ref().is_none_or(|(queue, _)| !Arc::ptr_eq(queue, to.queue()))
                    && let Some((queue, full)) =
                        batch.replace((Arc::clone(to.queue()), LaneBatch::new(message.clone())))
                {
                    wakeups.push_batch(&queue, full);
                }
                if let Some((_, batch)) = &mut batch {
                    batch.add(to, run);
                }
                continue;
            }
            if let Some((queue, full)) = batch.take() {
                wakeups.push_batch(&queue, full);
            }
            match tell {
                LaneEvent::Data(..) => {}
                LaneEvent::End(to) => to.ended(),
                LaneEvent::Error(to, text) => to.failed(text),
                LaneEvent::Overrun(to) => to.overrun(),
                LaneEvent::Cancelled(to, reason) => {
                    to.cancelled(if reason == Status::Offline.code().unsigned_abs() as u8 {
                        Status::Offline
                    } else {
                        Status::Cancelled
                    });
                }
                LaneEvent::Room(to) => to.room(),
                LaneEvent::Gone(to, knew) => to.peer_gone(knew),
                LaneEvent::Unheard(to) => to.unheard(),
            }
        }
        if let Some((queue, rest)) = batch {
            wakeups.push_batch(&queue, rest);
        }
    }

    /// Has those who wait look again. Called after a change, with which nobody is between looking and waiting.
    fn call_waiters(&self) {
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.room.notify_all();
        }
    }

    // The connection's task -------------------------------------------------------------------------------------------

    /// Waits until the other end has all that was sent, or is gone.
    pub(crate) async fn drain(&self) {
        self.change(|state| state.ask(Instant::now()));
        loop {
            let drained = self.drained.notified();
            if self.state.lock().is_drained() {
                return;
            }
            drained.await;
        }
    }

    /// Tells all that runs on it that this side ends it.
    pub(crate) fn end_here(&self, why: Status) {
        let parties = self.state.lock().parties();
        parties.iter().for_each(|party| party.ended_here(why));
    }

    /// Ends it now.
    pub(crate) fn end(&self, wakeups: &Wakeups) {
        let mut tells = Vec::new();
        self.change(|state| state.end(&mut tells));
        self.tell(tells, &Bytes::new(), wakeups);
    }

    /// Sends what is to be sent, until the lane is over. `clients`: the present NATS client, whenever there is another.
    pub(crate) async fn drive(
        &self,
        mut clients: watch::Receiver<Option<Client>>,
        wakeups: &Wakeups,
        sent: &AtomicU64,
    ) {
        let mut client = clients.borrow_and_update().clone();
        if let Some(client) = &client {
            let mut state = self.state.lock();
            state.set_max_payload(client.max_payload());
            state.begin(frame::server(&client.server_id()));
        }
        loop {
            // Before there is something to send: what is sealed for a dead client is sent again.
            if clients.has_changed().is_ok_and(|has_changed| has_changed) {
                client = self.relink(&mut clients);
            }
            let mut tells = Vec::new();
            let (message, deadline, is_over) = {
                let mut state = self.state.lock();
                let message = state.poll(Instant::now(), &mut tells);
                (message, state.deadline(), state.is_over())
            };
            if !tells.is_empty() || is_over {
                self.tell(tells, &Bytes::new(), wakeups);
            }
            match (message, &client) {
                (Some(message), Some(present)) => {
                    sent.fetch_add(1, Ordering::Relaxed);
                    tokio::select! {
                        biased;
                        sent = self.publish(present, message) => {
                            if sent.is_err() {
                                self.end(wakeups);
                            }
                        }
                        changed = clients.changed() => {
                            if changed.is_err() {
                                return;
                            }
                            client = self.relink(&mut clients);
                        }
                    }
                }
                // Not linked any longer: the state keeps it.
                (Some(_), None) => {}
                (None, _) if is_over => return,
                (None, _) => {
                    let sleep = async {
                        match deadline {
                            Some(at) => tokio::time::sleep_until(at.into()).await,
                            None => std::future::pending().await,
                        }
                    };
                    tokio::select! {
                        () = self.changed.notified() => {}
                        changed = clients.changed() => {
                            if changed.is_err() {
                                return;
                            }
                            client = self.relink(&mut clients);
                        }
                        () = sleep => {}
                    }
                }
            }
        }
    }

    fn relink(&self, clients: &mut watch::Receiver<Option<Client>>) -> Option<Client> {
        let client = clients.borrow_and_update().clone();
        let mut state = self.state.lock();
        state.link_down();
        if let Some(client) = &client {
            state.set_max_payload(client.max_payload());
            state.link_up(frame::server(&client.server_id()), Instant::now());
        }
        client
    }

    /// Fails when the message can never be sent; one that a lost connection took with it is sent again later.
    async fn publish(&self, client: &Client, message: Bytes) -> Result<(), ()> {
        match client.publish_with(self.peer.clone(), Some(self.own.clone()), None, message).await {
            Ok(()) => {
                // Only what was written has made room for the next batch.
                let _ = client.flush().await;
                Ok(())
            }
            Err(PublishError::Closed) => {
                // The client is dead; its supervisor replaces it.
                std::future::pending().await
            }
            Err(PublishError::Rejected(_)) => Err(()),
        }
    }
}

/// What a refusal is to the caller, who hears of room if that is what was missing.
fn refused(state: &mut State<Arc<dyn StreamObserver>>, credit: &Credit, refusal: Refusal) -> Status {
    match refusal {
        Refusal::Full => {
            state.want_room(credit);
            Status::Full
        }
        Refusal::Over => Status::PeerGone,
        Refusal::TooLarge => Status::TooLarge,
    }
}

#[cfg(all(test, shuttle))]
#[path = "../../tests/interleavings/driver.rs"]
mod interleavings;
