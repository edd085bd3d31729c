//! A lane at work: its state under a lock, and a task that gives the NATS client what the state has to send.
//!
//! The task batches naturally: it takes the frames that have gathered as soon as the client has written the last
//! message.

use crate::error::Status;
use crate::events::{EventSource, LaneBatch, Queue, Wakeups};
use crate::lane::event::{LaneEvent, LaneEvents, Role};
use crate::lane::liveness::PeerTimeouts;
use crate::lane::state::State;
use crate::lane::streams::SendWindow;
use crate::metrics::{Counters, count};
use crate::nats::Subject;
use crate::nats::client::{Client, PublishError};
use crate::status_word::StatusWord;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::{Condvar, Mutex, deadline};
use crate::wire::frame::{self, Malformed};
use crate::wire::stream_error::StreamError;
use bytes::Bytes;
use once_cell::sync::OnceCell;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Notify, watch};

/// A stream or sender at the end of a lane.
pub(crate) trait StreamObserver: EventSource {
    /// The queue for the stream's messages.
    fn queue(&self) -> &Arc<Queue>;
    /// A worker accepted the request as this stream of the lane. Returns false if the stream is no longer wanted.
    fn accepted(&self, _lane: &Arc<Lane>, _stream: u32) -> bool {
        false
    }
    /// The stream's first message came.
    fn first_message(&self) {}
    /// Something happened to it, other than data, which goes to its queue.
    fn notify(&self, event: LaneEvent);
    /// The stream ends on this side: the connection is closed (`Closed`), or the lane has failed (`Internal`).
    fn closed_here(&self, why: Status);
}

/// How many bytes of full batches are given to the NATS client before it is flushed.
const MAX_UNWRITTEN: usize = 128 << 10;

type Owner = Arc<dyn StreamObserver>;

/// The stream that a worker accepted, and its window; None if nobody wants it.
pub(crate) type Accepted = Option<(Owner, u32)>;

/// One end of a lane.
pub(crate) struct Lane {
    /// The subjects of both ends.
    pub(super) subject: Subject,
    pub(super) peer_subject: Subject,
    pub(super) role: Role,
    /// At the worker's end: the subject that the gateway's end names as its own. Another one belongs to another end.
    gateway_end: OnceCell<Box<str>>,
    state: Mutex<State<Owner>>,
    changed: Notify,
    /// Threads that wait in `send_wait`.
    blocked_threads: AtomicUsize,
    writable: Condvar,
    /// Everything is acknowledged.
    drained: Notify,
}

impl Lane {
    pub(crate) fn new(
        subject: Subject,
        peer_subject: Subject,
        role: Role,
        limit: usize,
        timeouts: PeerTimeouts,
        max_payload: usize,
    ) -> Arc<Lane> {
        let mut state = State::new(role, limit, timeouts, Instant::now());
        state.set_max_payload(max_payload);
        Arc::new(Lane {
            subject,
            peer_subject,
            role,
            gateway_end: OnceCell::new(),
            state: Mutex::new(state),
            changed: Notify::new(),
            blocked_threads: AtomicUsize::new(0),
            writable: Condvar::default(),
            drained: Notify::new(),
        })
    }

    /// Whether a message that names `end` as its sender comes from the end that was there from the beginning.
    pub(super) fn is_same_end(&self, end: &str) -> bool {
        end == self.peer_subject.as_str() || **self.gateway_end.get_or_init(|| end.into()) == *end
    }

    pub(super) fn is_closed(&self) -> bool {
        self.state.lock().is_closed()
    }

    /// Whether the peer ever sent anything.
    pub(super) fn was_heard(&self) -> bool {
        self.state.lock().was_heard()
    }

    /// Bytes that are not sent or not acknowledged, and the smoothed round trip.
    pub(super) fn gauges(&self) -> (usize, Option<Duration>) {
        let state = self.state.lock();
        (state.backlog(), state.round_trip())
    }

    /// Runs `change`, and wakes the task if there is something for it to do now.
    fn update<T>(&self, change: impl FnOnce(&mut State<Owner>) -> T) -> T {
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

    /// As `update`, and delivers the events that `change` causes.
    fn update_and_deliver<T>(
        &self,
        message: &Bytes,
        wakeups: &Wakeups,
        change: impl FnOnce(&mut State<Owner>, &mut LaneEvents<Owner>) -> T,
    ) -> T {
        let mut events = Vec::new();
        let result = self.update(|state| change(state, &mut events));
        self.deliver(events, message, wakeups);
        result
    }

    // The worker's calls ----------------------------------------------------------------------------------------------

    /// Accepts a request. None if the lane is closed, or has no stream ids left.
    pub(super) fn open(&self, key: u64, window: u32, owner: Owner) -> Option<Arc<SendWindow>> {
        self.update(|state| state.open(key, window, owner, Instant::now()))
    }

    /// Sends a message if `word` is 0; else returns the status in the word. If the window or the lane is full it
    /// returns `Full`, and the observer is notified when the sender may send. Calls `first_sent` if the message is the
    /// first of its stream.
    ///
    /// The word is read with the lane locked: whoever ends the stream sets it under the same lock, so that no message
    /// follows the end.
    #[inline]
    pub(crate) fn send(
        &self,
        word: &StatusWord,
        window: &SendWindow,
        data: &[u8],
        first_sent: impl FnOnce(),
    ) -> Result<(), Status> {
        self.update(|state| {
            word.check()?;
            state.send(window, data).inspect_err(|why| notify_if_full(state, window, *why))?;
            if window.sent() == 1 {
                first_sent();
            }
            Ok(())
        })
    }

    /// As `send` for messages one behind the other. Returns how many were sent before one was refused, or why the first
    /// was.
    pub(crate) fn send_many(
        &self,
        word: &StatusWord,
        window: &SendWindow,
        data: &[u8],
        lengths: &[usize],
        first_sent: impl FnOnce(),
    ) -> Result<usize, Status> {
        self.update(|state| {
            word.check()?;
            let is_first = window.sent() == 0;
            match state.send_many(window, data, lengths) {
                (0, Err(why)) => {
                    notify_if_full(state, window, why);
                    Err(why)
                }
                (sent, _) => {
                    if is_first {
                        first_sent();
                    }
                    Ok(sent)
                }
            }
        })
    }

    /// As `send`, but waits while the window or the lane is full (`None`: without limit).
    pub(crate) fn send_wait(
        &self,
        word: &StatusWord,
        window: &SendWindow,
        data: &[u8],
        timeout: Option<Duration>,
        first_sent: impl FnOnce(),
    ) -> Result<(), Status> {
        let mut until = None;
        let mut state = self.state.lock();
        loop {
            word.check()?;
            match state.send(window, data) {
                Ok(()) => break,
                Err(Status::Full) => {}
                Err(refused) => return Err(refused),
            }
            let deadline = *until.get_or_insert_with(|| deadline(timeout));
            self.blocked_threads.fetch_add(1, Ordering::SeqCst);
            let timed_out;
            (state, timed_out) = self.writable.wait_until(state, deadline);
            self.blocked_threads.fetch_sub(1, Ordering::SeqCst);
            if timed_out {
                return Err(Status::Timeout);
            }
        }
        if window.sent() == 1 {
            first_sent();
        }
        if state.must_wake() {
            drop(state);
            self.changed.notify_one();
        }
        Ok(())
    }

    /// Ends a stream, with an error if there is one, if `word` is 0, and sets the word to `Closed`.
    pub(crate) fn finish(
        &self,
        word: &StatusWord,
        window: &SendWindow,
        error: Option<StreamError<'_>>,
    ) -> Result<(), Status> {
        self.update(|state| -> Result<(), Status> {
            word.check()?;
            if state.is_closed() {
                // As for a send: whoever delivers the peer's death has not set the word yet.
                return Err(Status::PeerGone);
            }
            // An offline mark may set it at the same time: it does not hold this lock.
            if !word.try_stop(Status::Closed) {
                return word.check();
            }
            state.finish(window, error);
            Ok(())
        })?;
        self.wake_blocked_threads();
        Ok(())
    }

    /// Ends a stream whose word was set before.
    pub(crate) fn stop(&self, window: &SendWindow, text: &[u8]) {
        self.update(|state| state.finish(window, Some(StreamError::new(text))));
        self.wake_blocked_threads();
    }

    // The gateway's calls ---------------------------------------------------------------------------------------------

    /// Lets a stream's worker send so much more, and enlarges the window if there is a new size.
    pub(crate) fn return_credit(&self, stream: u32, weight: u64, window: Option<u32>) {
        self.update(|state| {
            // First, so that a worker that the credit wakes has the larger window already.
            if let Some(size) = window {
                state.set_window(stream, size);
            }
            state.return_credit(stream, weight);
        });
    }

    /// The smoothed round trip. None: it is not known.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.state.lock().round_trip()
    }

    /// Ends a stream from this side.
    pub(crate) fn cancel(&self, stream: u32, why: Status) {
        self.update(|state| state.cancel(stream, why.code().unsigned_abs() as u8));
    }

    // What comes in ---------------------------------------------------------------------------------------------------

    /// A message came from the peer.
    pub(super) fn receive(
        &self,
        message: &Bytes,
        wakeups: &Wakeups,
        accept: impl FnMut(u64, u32) -> Accepted,
    ) -> Result<(), Malformed> {
        let now = Instant::now();
        self.update_and_deliver(message, wakeups, |state, events| state.receive(message, now, events, accept))
    }

    /// nats-server has answered 503.
    pub(super) fn no_responders(&self, wakeups: &Wakeups) {
        self.update_and_deliver(&Bytes::new(), wakeups, |state, events| state.no_responders(Instant::now(), events));
    }

    fn deliver(&self, events: LaneEvents<Owner>, message: &Bytes, wakeups: &Wakeups) {
        self.wake_blocked_threads();
        if self.state.lock().is_drained() {
            self.drained.notify_waiters();
        }
        let mut batch: Option<(Arc<Queue>, LaneBatch)> = None;
        for (owner, event) in events {
            if let LaneEvent::Data { run, is_first } = event {
                if is_first {
                    owner.first_message();
                }
                if batch.as_ref().is_none_or(|(queue, _)| !Arc::ptr_eq(queue, owner.queue()))
                    && let Some((queue, full)) =
                        batch.replace((Arc::clone(owner.queue()), LaneBatch::new(message.clone())))
                {
                    wakeups.push_batch(&queue, full);
                }
                if let Some((_, batch)) = &mut batch {
                    batch.add(owner, run);
                }
            } else {
                if let Some((queue, full)) = batch.take() {
                    wakeups.push_batch(&queue, full);
                }
                owner.notify(event);
            }
        }
        if let Some((queue, rest)) = batch {
            wakeups.push_batch(&queue, rest);
        }
    }

    /// Wakes the threads in `send_wait`, to try again. Called after a change of the state: since the lock was free in
    /// between, no thread is about to wait without having seen the change.
    fn wake_blocked_threads(&self) {
        if self.blocked_threads.load(Ordering::SeqCst) > 0 {
            self.writable.notify_all();
        }
    }

    // The connection's calls ------------------------------------------------------------------------------------------

    /// Waits until the peer has all that was sent, or is gone.
    pub(super) async fn drain(&self) {
        self.update(|state| state.request_ack(Instant::now()));
        loop {
            let drained = self.drained.notified();
            if self.state.lock().is_drained() {
                return;
            }
            drained.await;
        }
    }

    /// Notifies all streams that this side ends them.
    pub(super) fn close_streams(&self, why: Status) {
        let owners = self.state.lock().owners();
        owners.iter().for_each(|owner| owner.closed_here(why));
    }

    /// Closes the lane now: its streams end as if the peer was gone.
    pub(super) fn close(&self, wakeups: &Wakeups) {
        self.update_and_deliver(&Bytes::new(), wakeups, State::close);
    }

    /// The lane's task: sends what is to be sent until the lane is closed. `clients`: the present NATS client, whenever
    /// there is another.
    pub(super) async fn run(
        &self,
        mut clients: watch::Receiver<Option<Client>>,
        wakeups: &Wakeups,
        counters: &Counters,
    ) {
        let mut client = clients.borrow_and_update().clone();
        let mut unwritten = 0;
        if let Some(client) = &client {
            let mut state = self.state.lock();
            state.set_max_payload(client.max_payload());
            state.connected(frame::server(&client.server_id()));
        }
        loop {
            // Before anything is sent: what was sealed for a dead client is sent again.
            if clients.has_changed().is_ok_and(|has_changed| has_changed) {
                client = self.change_client(&mut clients);
            }
            let mut events = Vec::new();
            let (message, has_full_batch, deadline, is_closed, resent) = {
                let mut state = self.state.lock();
                let message = state.poll(Instant::now(), &mut events);
                (message, state.has_full_batch(), state.deadline(), state.is_closed(), state.take_resent())
            };
            if resent > 0 {
                counters.resent.fetch_add(resent, Ordering::Relaxed);
            }
            if !events.is_empty() || is_closed {
                self.deliver(events, &Bytes::new(), wakeups);
            }
            // Until a message is written, or until there is something to do.
            let next = async {
                match (message, &client) {
                    (Some(message), Some(client)) => {
                        count(&counters.messages_out);
                        unwritten += message.len();
                        if self.publish(client, message).await.is_err() {
                            self.close(wakeups);
                        }
                        if !has_full_batch || unwritten >= MAX_UNWRITTEN {
                            // The next batch gathers until these were written.
                            let _ = client.flush().await;
                            unwritten = 0;
                        }
                    }
                    // There is no connection any longer: the state keeps it.
                    (Some(_), None) => {}
                    (None, _) if is_closed => return true,
                    (None, _) => {
                        let sleep = async {
                            match deadline {
                                Some(at) => tokio::time::sleep_until(at.into()).await,
                                None => std::future::pending().await,
                            }
                        };
                        tokio::select! {
                            () = self.changed.notified() => {}
                            () = sleep => {}
                        }
                    }
                }
                false
            };
            tokio::select! {
                biased;
                is_over = next => {
                    if is_over {
                        return;
                    }
                }
                changed = clients.changed() => match changed {
                    Ok(()) => client = self.change_client(&mut clients),
                    Err(_) => return,
                }
            }
        }
    }

    fn change_client(&self, clients: &mut watch::Receiver<Option<Client>>) -> Option<Client> {
        let client = clients.borrow_and_update().clone();
        let mut state = self.state.lock();
        state.disconnected();
        if let Some(client) = &client {
            state.set_max_payload(client.max_payload());
            state.reconnected(frame::server(&client.server_id()), Instant::now());
        }
        client
    }

    /// Fails if the message can never be sent. A message that is lost with the connection is sent again later.
    async fn publish(&self, client: &Client, message: Bytes) -> Result<(), ()> {
        match client.publish_with(self.peer_subject.clone(), Some(self.subject.clone()), None, message).await {
            Ok(()) => Ok(()),
            // The client is dead; its supervisor replaces it.
            Err(PublishError::Closed) => std::future::pending().await,
            Err(PublishError::Rejected(_)) => Err(()),
        }
    }
}

/// If a message was refused because the window or the lane is full, notifies the observer when the sender may send.
fn notify_if_full(state: &mut State<Owner>, window: &SendWindow, why: Status) {
    if why == Status::Full {
        state.notify_when_writable(window);
    }
}

#[cfg(all(test, shuttle))]
#[path = "../../tests/interleavings/driver.rs"]
mod interleavings;
