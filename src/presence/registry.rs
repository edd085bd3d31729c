//! Who is online in this process, and which streams to stop when a client leaves.
//!
//! A client is online here while it is marked online, has an open session, or has a running stream. An offline mark
//! ends all three at once, in every process. The end of the last session ends what this process requested for the
//! client, and nothing that other processes requested, because the client may be connected to them.
//!
//! There is one map, and the only lock held is that of the client's entry. What must agree with the map is written
//! under that lock: the senders' status words, the order of announcements and requests, the order of ONLINE and OFFLINE
//! events. What takes longer is done after the lock is released.

use crate::error::{Error, Result, Status};
use crate::events::{EventSource, Kind, Queue};
use crate::presence::client_id;
use crate::presence::id_map::{Entry, IdMap, Lookup};
use crate::process::fork::{self, PerProcess};
use crate::process::runtime;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::sync::{RwLock, thread_local};
use smallvec::SmallVec;
use std::cell::RefCell;
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::sync::{Arc, Weak};
use std::time::Duration;
use std::{mem, ptr};

/// A sender or a stream of a client.
pub(crate) trait Stoppable: EventSource {
    /// Notifies the other end and the queue after the registry stopped it, without a lock. `is_announced`: the client
    /// is announced offline as well.
    fn stopped(&self, why: Status, is_announced: bool);
    /// The connection on which this process requested it, or `None` if another process requested it.
    fn requested_on(&self) -> Option<u64>;
    /// How its worker learns that the client has left, if this process requested it.
    fn notice(&self) -> Notice;
    /// The connection of this process whose request it answers, if it is a sender and this process is also the
    /// requester.
    fn answers_to(&self) -> Option<u64>;
}

/// How the worker of a stream learns that the client has left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// By a message to this worker, or there is no worker to notify.
    Direct,
    /// By an announcement, which every process receives.
    Announcement,
    /// The worker has not answered yet, so it is not known whether it can be notified directly.
    Unknown,
}

/// A connection that announces clients offline.
pub(crate) trait Announcer: Send + Sync {
    /// Announces the client offline if its configuration says so. `requested`: streams that were requested on this
    /// connection have workers that cannot learn of it in any other way. Returns true if the client is announced.
    ///
    /// Called with the client's entry locked: it must only queue the announcement.
    fn announce(&self, id: &str, requested: bool) -> bool;
    /// The number of the connection.
    fn number(&self) -> u64;
}

#[derive(Default)]
struct Registry {
    clients: IdMap<Presence>,
    announcers: RwLock<Vec<Arc<dyn Announcer>>>,
    /// False until the first announcer is added.
    has_announcers: AtomicBool,
    watchers: RwLock<Vec<(Weak<Queue>, u64)>>,
    is_watched: AtomicBool,
    session_grace_ms: AtomicU64,
    /// The prefixes of the inboxes of this process's connections, with the connections' numbers; for a while, those of
    /// closed connections too.
    inboxes: RwLock<VecDeque<(String, u64)>>,
}

/// How many inboxes are remembered.
const MAX_INBOXES: usize = 256;

/// Why a client is online.
enum Presence {
    /// It is marked online, and nothing else, like nearly all of a million clients.
    Marked,
    /// It has, or had, sessions or streams.
    Active(Box<ClientEntry>),
}

/// One for nearly all clients, which needs no memory of its own.
type Running = SmallVec<[Arc<dyn Stoppable>; 1]>;

/// A client from its first session or stream until it goes offline. A client that comes back gets a new one.
struct ClientEntry {
    entry_id: u64,
    is_marked: bool,
    sessions: u32,
    /// The session whose close began the grace period that runs now.
    grace: Option<NonZeroU64>,
    /// Its running streams and senders.
    running: Running,
}

impl Presence {
    fn new(is_marked: bool) -> Presence {
        let entry_id = fork::next_handle_id();
        Presence::Active(Box::new(ClientEntry {
            entry_id,
            is_marked,
            sessions: 0,
            grace: None,
            running: Running::new(),
        }))
    }

    /// The client's sessions and streams, for one more of them.
    fn activate(&mut self) -> &mut ClientEntry {
        if let Presence::Marked = self {
            *self = Presence::new(true);
        }
        match self {
            Presence::Active(client) => client,
            Presence::Marked => unreachable!("it was replaced above"),
        }
    }

    fn active(&mut self) -> Option<&mut ClientEntry> {
        match self {
            Presence::Marked => None,
            Presence::Active(client) => Some(client),
        }
    }

    /// Whether the client is online for a reason of this process's own: anything but streams that others requested.
    fn has_own_reason(&self) -> bool {
        match self {
            Presence::Marked => true,
            Presence::Active(client) => {
                client.is_marked
                    || client.sessions > 0
                    || client.grace.is_some()
                    || client.running.iter().any(|stream| stream.requested_on().is_some())
            }
        }
    }

    fn running(&self) -> &[Arc<dyn Stoppable>] {
        match self {
            Presence::Marked => &[],
            Presence::Active(client) => &client.running,
        }
    }
}

impl ClientEntry {
    /// Removes a stream or sender. Returns false if the client does not have it.
    fn remove(&mut self, handle_id: u64) -> bool {
        let found = self.running.iter().position(|stream| stream.source().handle_id == handle_id);
        found.map(|at| self.running.remove(at)).is_some()
    }

    /// Removes the streams and senders for which `is_meant` returns true, and stops and returns those that had not
    /// ended.
    fn stop(&mut self, is_meant: impl Fn(&dyn Stoppable) -> bool) -> Vec<Arc<dyn Stoppable>> {
        let mut stopped = Vec::new();
        self.running.retain(|stream| {
            let is_meant = is_meant(&**stream);
            if is_meant && stream.source().word.try_stop(Status::Offline) {
                stopped.push(Arc::clone(stream));
            }
            !is_meant
        });
        stopped
    }
}

#[cfg(not(shuttle))]
fn registry() -> &'static Registry {
    static REGISTRY: PerProcess<Registry> = PerProcess::new();
    REGISTRY.get(Registry::default)
}

/// The model checker needs a new one in each schedule.
#[cfg(shuttle)]
fn registry() -> &'static Registry {
    shuttle::lazy_static! {
        static ref REGISTRY: Registry = Registry::default();
    }
    &REGISTRY
}

/// Marks a client online. The empty id has no effect.
///
/// # Errors
/// `Status::Invalid` for an invalid id.
pub fn mark_online(id: &[u8]) -> Result<()> {
    let id = client_id::id(id)?;
    if id.is_empty() {
        return Ok(());
    }
    let registry = registry();
    registry.mark_online(&mut registry.clients.lock(id));
    Ok(())
}

/// Marks a client offline: stops its senders and streams here, ends its sessions, announces it. The empty id has no
/// effect.
///
/// # Errors
/// `Status::Invalid` for an invalid id.
pub fn mark_offline(id: &[u8]) -> Result<()> {
    let id = client_id::id(id)?;
    if id.is_empty() {
        return Ok(());
    }
    let registry = registry();
    let stopped = registry.mark_offline(&mut registry.clients.lock(id));
    notify_stopped(&stopped, true);
    Ok(())
}

/// Marks many clients online or offline, each as [`mark_online`] and [`mark_offline`] do, in less time for each. The
/// order in which different clients are marked is not defined.
///
/// # Errors
/// `Status::Invalid` if an id is invalid. The message says which one and why, and no client was marked.
pub fn mark_many<'a>(is_online: bool, ids: impl IntoIterator<Item = &'a [u8]>) -> Result<()> {
    let named = |index| move |error: Error| Error::invalid(format!("id {index}: {}", error.message));
    let ids = ids.into_iter().enumerate().map(|(index, id)| client_id::id(id).map_err(named(index)));
    let ids: Vec<&str> = ids.filter(|id| id.as_ref().map_or(true, |id| !id.is_empty())).collect::<Result<_>>()?;
    let registry = registry();
    if is_online {
        registry.clients.lock_each(&ids, |entry| registry.mark_online(entry), || {});
    } else {
        let stopped = RefCell::new(Vec::new());
        let mark = |entry: &mut Entry<'_, Presence>| stopped.borrow_mut().append(&mut registry.mark_offline(entry));
        registry.clients.lock_each(&ids, mark, || notify_stopped(&stopped.take(), true));
    }
    Ok(())
}

/// Applies another process's announcement. `missed_since`: this process missed it when it was made. Then it does not
/// concern a client whose first session or stream since is newer: its number is `missed_since` or higher.
pub(crate) fn apply_offline(id: &str, missed_since: Option<u64>) {
    let registry = registry();
    let mut entry = registry.clients.lock(id);
    let is_newer = |client: &mut ClientEntry| missed_since.is_some_and(|since| client.entry_id >= since);
    if !entry.get_mut().and_then(Presence::active).is_some_and(is_newer) {
        let stopped = registry.take_offline(&mut entry, |_| {});
        drop(entry);
        notify_stopped(&stopped, true);
    }
}

/// Applies an announcement that this process made on `connection`, when it comes back. All was done when it was made,
/// and the client may be back; but a request that was sent before the announcement may have arrived after it was made.
pub(crate) fn apply_own_offline(id: &str, connection: u64) {
    let registry = registry();
    let mut entry = registry.clients.lock(id);
    let Some(client) = entry.get_mut().and_then(Presence::active) else { return };
    let stopped = client.stop(|stream| stream.answers_to() == Some(connection));
    registry.remove_if_idle(&mut entry);
    drop(entry);
    notify_stopped(&stopped, true);
}

/// The number of this process's connection whose inbox the subject `reply` is in, if there is one.
pub(crate) fn owner_of(reply: &str) -> Option<u64> {
    let inboxes = registry().inboxes.read();
    inboxes.iter().rev().find(|(prefix, _)| reply.starts_with(prefix)).map(|(_, number)| *number)
}

/// Whether a client is online. The empty id is; an unknown or invalid one is not.
#[must_use]
pub fn is_online(id: &[u8]) -> bool {
    id.is_empty() || LAST_LOOKUP.with(|last| last.borrow_mut().is_online(registry(), id))
}

/// A thread's last lookup. If it was the second one of the same client in a row, its answer is kept for further ones:
/// they take no lock as long as no client of the same shard comes or goes. (A loop over many clients keeps nothing.)
struct LastLookup {
    hash: u64,
    /// The id of `answer` is the first `len` bytes.
    id: [u8; 64],
    len: usize,
    answer: Option<Answer>,
}

struct Answer {
    /// A forked child has another one than its parent.
    registry: &'static Registry,
    lookup: Lookup<'static>,
}

thread_local! {
    static LAST_LOOKUP: RefCell<LastLookup> =
        const { RefCell::new(LastLookup { hash: 0, id: [0; 64], len: 0, answer: None }) };
}

impl LastLookup {
    fn is_online(&mut self, registry: &'static Registry, id: &[u8]) -> bool {
        if let Some(Answer { registry: answered, lookup }) = &self.answer
            && ptr::eq(*answered, registry)
            && self.id[..self.len] == *id
            && lookup.is_current()
        {
            return lookup.has_value;
        }
        let lookup = registry.clients.look_up(id);
        let is_online = lookup.has_value;
        let is_repeated = mem::replace(&mut self.hash, lookup.hash) == lookup.hash;
        self.answer = None;
        if let (true, Some(space)) = (is_repeated, self.id.get_mut(..id.len())) {
            space.copy_from_slice(id);
            self.len = id.len();
            self.answer = Some(Answer { registry, lookup });
        }
        is_online
    }
}

/// How many clients are online.
#[must_use]
pub fn online_count() -> u64 {
    registry().clients.len() as u64
}

/// Adds an event with `tag` to the queue whenever a client comes online or goes offline. A second call changes the tag.
pub fn watch(queue: &Arc<Queue>, tag: u64) {
    let registry = registry();
    add_watcher(&mut registry.watchers.write(), queue, tag);
    registry.is_watched.store(true, Ordering::Release);
}

/// Adds a queue to a list of watchers, which has each queue once.
pub(crate) fn add_watcher(watchers: &mut Vec<(Weak<Queue>, u64)>, queue: &Arc<Queue>, tag: u64) {
    watchers.retain(|(other, _)| other.upgrade().is_some_and(|other| !Arc::ptr_eq(&other, queue)));
    watchers.push((Arc::downgrade(queue), tag));
}

/// Makes a client online as long as `stream` runs here.
pub(crate) fn attach(id: &str, stream: Arc<dyn Stoppable>) {
    if !id.is_empty() {
        let registry = registry();
        registry.enter(&mut registry.clients.lock(id)).running.push(stream);
    }
}

/// As `attach`, but only for a client that is online already: otherwise returns false, and nothing has changed.
pub(crate) fn attach_if_online(id: &str, stream: Arc<dyn Stoppable>) -> bool {
    if id.is_empty() {
        return true;
    }
    let mut entry = registry().clients.lock(id);
    let Some(presence) = entry.get_mut() else { return false };
    presence.activate().running.push(stream);
    true
}

/// Takes back `attach`, for a stream that ended by itself.
pub(crate) fn detach(id: &str, handle_id: u64) {
    if id.is_empty() {
        return;
    }
    let registry = registry();
    let mut entry = registry.clients.lock(id);
    let Some(client) = entry.get_mut().and_then(Presence::active) else { return };
    client.remove(handle_id);
    registry.remove_if_idle(&mut entry);
}

/// Takes back `attach`, for a stream that its requester gave up: if nothing else keeps the client online here, it goes
/// offline, and `connection` announces it.
pub(crate) fn give_up(id: &str, handle_id: u64, connection: &dyn Announcer) {
    if id.is_empty() {
        return;
    }
    let registry = registry();
    let mut entry = registry.clients.lock(id);
    let Some(client) = entry.get_mut().and_then(Presence::active) else { return };
    if client.remove(handle_id) {
        registry.announce_left(entry, connection);
    }
}

/// As `give_up`, for a stream that was detached before it was known that its worker needs an announcement.
pub(crate) fn give_up_detached(id: &str, connection: &dyn Announcer) {
    let registry = registry();
    registry.announce_left(registry.clients.lock(id), connection);
}

/// Adds a connection to those that announce; the subjects of its inbox begin with `inbox`.
pub(crate) fn add_announcer(announcer: Arc<dyn Announcer>, inbox: &str) {
    let registry = registry();
    {
        let mut inboxes = registry.inboxes.write();
        inboxes.push_back((inbox.into(), announcer.number()));
        if inboxes.len() > MAX_INBOXES {
            inboxes.pop_front();
        }
    }
    registry.announcers.write().push(announcer);
    registry.has_announcers.store(true, Ordering::Release);
}

/// Takes back `add_announcer`.
pub(crate) fn remove_announcer(number: u64) {
    registry().announcers.write().retain(|announcer| announcer.number() != number);
}

/// Sets how long a client stays online after its last session.
pub(crate) fn set_session_grace(grace: Duration) {
    let grace_ms = u64::try_from(grace.as_millis()).unwrap_or(u64::MAX);
    registry().session_grace_ms.store(grace_ms, Ordering::Relaxed);
}

fn notify_stopped(stopped: &[Arc<dyn Stoppable>], is_announced: bool) {
    stopped.iter().for_each(|stream| stream.stopped(Status::Offline, is_announced));
}

impl Registry {
    /// The client's sessions and streams, for one more of them: the client comes online if it is not.
    fn enter<'e>(&self, entry: &'e mut Entry<'_, Presence>) -> &'e mut ClientEntry {
        if entry.get().is_none() {
            self.notify_watchers(Kind::Online, entry.id());
        }
        entry.get_or_insert_with(|| Presence::new(false)).activate()
    }

    fn mark_online(&self, entry: &mut Entry<'_, Presence>) {
        if entry.get().is_none() {
            self.notify_watchers(Kind::Online, entry.id());
        }
        if let Some(client) = entry.get_or_insert_with(|| Presence::Marked).active() {
            client.is_marked = true;
        }
    }

    /// Also announces a client that is unknown here, as other processes may know it. Returns the streams and senders that
    /// it stopped; the caller notifies them once the entry is unlocked.
    fn mark_offline(&self, entry: &mut Entry<'_, Presence>) -> Vec<Arc<dyn Stoppable>> {
        let id = entry.id();
        self.take_offline(entry, |presence| self.announce(id, presence))
    }

    /// Ends a client's presence, if it has any.
    fn remove(&self, entry: &mut Entry<'_, Presence>) {
        if entry.get().is_some() {
            self.notify_watchers(Kind::Offline, entry.id());
            entry.remove();
        }
    }

    /// As `remove`, if nothing keeps the client online here.
    fn remove_if_idle(&self, entry: &mut Entry<'_, Presence>) {
        if entry.get().is_some_and(|presence| presence.running().is_empty() && !presence.has_own_reason()) {
            self.remove(entry);
        }
    }

    /// Stops all that runs for a client, calls `announce`, and ends its presence. The entry stays locked, so that no
    /// mark or request that follows can overtake the announcement. Returns the streams and senders that it stopped; the
    /// caller notifies them once the entry is unlocked.
    fn take_offline(
        &self,
        entry: &mut Entry<'_, Presence>,
        announce: impl FnOnce(Option<&Presence>),
    ) -> Vec<Arc<dyn Stoppable>> {
        let running = entry.get().map_or(&[][..], Presence::running).iter();
        let stopped = running.filter(|stream| stream.source().word.try_stop(Status::Offline)).cloned().collect();
        announce(entry.get());
        self.remove(entry);
        stopped
    }

    /// Takes a client offline, with an announcement by the connection whose stream was given up, unless the client is
    /// online here for another reason.
    fn announce_left(&self, mut entry: Entry<'_, Presence>, connection: &dyn Announcer) {
        if !entry.get().is_some_and(Presence::has_own_reason) {
            let id = entry.id();
            let stopped = self.take_offline(&mut entry, |_| {
                connection.announce(id, true);
            });
            drop(entry);
            notify_stopped(&stopped, true);
        }
    }

    /// Ends the streams that this process requested for a client whose last session here is over, and their senders in
    /// this process. What other processes requested goes on, because the client may be connected to them.
    ///
    /// Workers on level 0 can learn of it by an announcement only, which all processes receive and apply. So if there
    /// is one, the client is offline here too, and everything stops.
    fn end_sessions(&self, mut entry: Entry<'_, Presence>) {
        let id = entry.id();
        let Some(client) = entry.get_mut().and_then(Presence::active) else { return };
        let mut is_announced = false;
        for announcer in self.announcers.read().iter() {
            let here = Some(announcer.number());
            let mut own = client.running.iter().filter(|stream| stream.requested_on() == here);
            let is_needed = own.any(|stream| stream.notice() == Notice::Announcement);
            is_announced |= is_needed && announcer.announce(id, true);
        }
        let is_own = |stream: &dyn Stoppable| stream.requested_on().is_some() || stream.answers_to().is_some();
        let stopped = client.stop(|stream| is_announced || is_own(stream));
        if client.running.is_empty() {
            self.remove(&mut entry);
        }
        drop(entry);
        notify_stopped(&stopped, is_announced);
    }

    /// Has every open connection announce the client offline.
    fn announce(&self, id: &str, presence: Option<&Presence>) {
        if !self.has_announcers.load(Ordering::Acquire) {
            return;
        }
        let running = presence.map_or(&[][..], Presence::running);
        for announcer in self.announcers.read().iter() {
            let here = Some(announcer.number());
            // A worker that has not answered may be on level 0. An offline mark concerns all workers, so it is
            // announced.
            let mut own = running.iter().filter(|stream| stream.requested_on() == here);
            announcer.announce(id, own.any(|stream| stream.notice() != Notice::Direct));
        }
    }

    /// Adds an event to the watchers' queues. Called with the client's entry locked, so that the events come in the
    /// order of the changes.
    fn notify_watchers(&self, kind: Kind, id: &str) {
        if self.is_watched.load(Ordering::Acquire) {
            for (queue, tag) in self.watchers.read().iter() {
                if let Some(queue) = queue.upgrade() {
                    queue.push_presence(kind, *tag, id);
                }
            }
        }
    }
}

/// One of several connections of the same client. Dropping it closes it.
pub struct Session {
    pub(crate) handle_id: u64,
    client: Box<str>,
    /// The client's entry that it belongs to: an offline mark ends the entry, and with it the session.
    entry_id: u64,
    is_closed: AtomicBool,
}

impl Session {
    /// Opens a session of a client. The empty id gives one without effect.
    ///
    /// # Errors
    /// `Status::Invalid` for an invalid id.
    pub fn open(id: &[u8]) -> Result<Session> {
        let id = client_id::id(id)?;
        let mut entry_id = 0;
        if !id.is_empty() {
            let registry = registry();
            let mut entry = registry.clients.lock(id);
            let client = registry.enter(&mut entry);
            client.sessions += 1;
            client.grace = None;
            entry_id = client.entry_id;
        }
        let handle_id = fork::next_handle_id();
        Ok(Session { handle_id, client: id.into(), entry_id, is_closed: AtomicBool::new(false) })
    }

    /// Whether the client is still online by it: neither was it closed nor the client marked offline since.
    #[must_use]
    pub fn is_open(&self) -> bool {
        fork::check(self.handle_id).is_ok()
            && !self.is_closed.load(Ordering::Acquire)
            && (self.client.is_empty()
                || active_as(&mut registry().clients.lock(&self.client), self.entry_id).is_some())
    }

    /// Closes it; a second call has no effect.
    pub fn close(&self) {
        if fork::check(self.handle_id).is_err() || self.is_closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let registry = registry();
        let grace = Duration::from_millis(registry.session_grace_ms.load(Ordering::Relaxed));
        let mut entry = registry.clients.lock(&self.client);
        let Some(client) = active_as(&mut entry, self.entry_id) else { return };
        client.sessions -= 1;
        if client.sessions > 0 || client.is_marked {
            return;
        }
        if grace.is_zero() {
            return registry.end_sessions(entry);
        }
        client.grace = NonZeroU64::new(self.handle_id);
        drop(entry);
        let (client, entry_id, session) = (self.client.clone(), self.entry_id, self.handle_id);
        runtime::later(grace, move || end_grace(&client, entry_id, session));
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

/// Ends the client's sessions when the grace period is over that `session` began, unless another session has ended it.
fn end_grace(client: &str, entry_id: u64, session: u64) {
    let registry = registry();
    let mut entry = registry.clients.lock(client);
    let Some(client) = active_as(&mut entry, entry_id) else { return };
    if client.grace.is_some_and(|began| began.get() == session) {
        client.grace = None;
        if !client.is_marked {
            registry.end_sessions(entry);
        }
    }
}

/// The client's sessions and streams, if they are still those with this number.
fn active_as<'e>(entry: &'e mut Entry<'_, Presence>, entry_id: u64) -> Option<&'e mut ClientEntry> {
    entry.get_mut()?.active().filter(|client| client.entry_id == entry_id)
}

#[cfg(all(test, shuttle))]
#[path = "../../tests/interleavings/registry.rs"]
mod interleavings;

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{Event, Source};
    use crate::sync::Mutex;

    /// A stream, or a sender if nobody requested it here.
    pub(super) struct Probe {
        pub(super) source: Source,
        pub(super) requested_on: Option<u64>,
        pub(super) answers_to: Option<u64>,
        pub(super) notice: Notice,
        pub(super) stopped: AtomicBool,
    }

    impl Probe {
        pub(super) fn new(requested_on: Option<u64>, answers_to: Option<u64>, notice: Notice) -> Arc<Probe> {
            let (source, stopped) = (Source::new(0), AtomicBool::new(false));
            Arc::new(Probe { source, requested_on, answers_to, notice, stopped })
        }

        fn attach(id: &str, requested_on: Option<u64>, answers_to: Option<u64>) -> Arc<Probe> {
            let probe = Probe::new(requested_on, answers_to, Notice::Announcement);
            attach(id, Arc::clone(&probe) as _);
            probe
        }

        fn is_stopped(&self) -> bool {
            let stopped = self.stopped.load(Ordering::Relaxed);
            assert_eq!(self.source.word.check().is_err(), stopped);
            stopped
        }
    }

    impl EventSource for Probe {
        fn source(&self) -> &Source {
            &self.source
        }
    }

    impl Stoppable for Probe {
        fn stopped(&self, why: Status, _is_announced: bool) {
            assert_eq!(why, Status::Offline);
            assert!(!self.stopped.swap(true, Ordering::Relaxed), "stopped twice");
            // Waits for ever if the thread has locked an entry.
            let _ = online_count();
        }

        fn requested_on(&self) -> Option<u64> {
            self.requested_on
        }

        fn notice(&self) -> Notice {
            self.notice
        }

        fn answers_to(&self) -> Option<u64> {
            self.answers_to
        }
    }

    /// A connection that records what it has to announce.
    pub(super) struct Recorder {
        pub(super) number: u64,
        pub(super) announced: Mutex<Vec<(String, bool)>>,
    }

    impl Recorder {
        pub(super) fn new() -> Arc<Recorder> {
            let recorder = Arc::new(Recorder { number: fork::next_handle_id(), announced: Mutex::default() });
            add_announcer(Arc::clone(&recorder) as _, &format!("inbox.{}.", recorder.number));
            recorder
        }

        /// Its announcements of a client. (Other tests announce other clients.)
        fn of(&self, id: &str) -> Vec<bool> {
            self.announced.lock().iter().filter(|(other, _)| other == id).map(|(_, requested)| *requested).collect()
        }
    }

    impl Announcer for Recorder {
        fn announce(&self, id: &str, requested: bool) -> bool {
            self.announced.lock().push((id.into(), requested));
            true
        }

        fn number(&self) -> u64 {
            self.number
        }
    }

    fn online(id: &str) -> bool {
        is_online(id.as_bytes())
    }

    #[test]
    fn a_mark_lasts_until_the_opposite_mark() {
        assert!(online("") && !online("marks") && !is_online(b"\xff"));
        mark_online(b"").unwrap();
        mark_offline(b"").unwrap();
        for _ in 0..2 {
            mark_online(b"marks").unwrap();
            assert!(online("marks"));
        }
        for _ in 0..2 {
            mark_offline(b"marks").unwrap();
            assert!(!online("marks"));
        }
        assert!(mark_online(b"a\n").is_err() && mark_offline(b"a\n").is_err() && Session::open(b"a\n").is_err());
    }

    #[test]
    fn repeated_lookups_follow_the_marks() {
        let ids: Vec<_> = [1, 2, 63, 64, 65, 1024].map(|len| "é".repeat(len / 2) + &"l"[..len % 2]).into();
        for id in &ids {
            for is_online in [true, false, true] {
                mark_many(is_online, [id.as_bytes()]).unwrap();
                assert!((0..3).all(|_| online(id) == is_online), "{id}");
                let other = format!("{id}é");
                assert!(!online(&other) && online(id) == is_online, "{id}");
            }
        }
        assert!(ids.iter().chain(&ids).all(|id| online(id)));
        mark_many(false, ids.iter().map(String::as_bytes)).unwrap();
        assert!(!ids.iter().chain(&ids).any(|id| online(id)));
    }

    #[test]
    fn many_marks_do_what_single_ones_do() {
        let recorder = Recorder::new();
        let ids: Vec<_> = (0..1000).map(|number| format!("many {number}")).collect();
        let mark = |is_online| mark_many(is_online, ids.iter().map(String::as_bytes));
        mark(true).unwrap();
        assert!(ids.iter().all(|id| online(id)));
        let (session, marked) = (Session::open(b"many 7").unwrap(), Session::open(b"many 8").unwrap());
        marked.close();
        assert!(online("many 8"), "marked");
        let probes: Vec<_> = ids[..20].iter().map(|id| Probe::attach(id, None, None)).collect();
        mark(false).unwrap();
        assert!(!ids.iter().any(|id| online(id)) && !session.is_open());
        assert!(probes.iter().all(|probe| probe.is_stopped()));
        assert!(ids.iter().all(|id| recorder.of(id) == [false]), "each is announced once");
        remove_announcer(recorder.number);
    }

    #[test]
    fn one_invalid_id_among_many_changes_nothing() {
        mark_online(b"many valid").unwrap();
        for is_online in [false, true] {
            let error = mark_many(is_online, [&b"many new"[..], b"many valid", b"a\n"]).unwrap_err();
            assert!(error.message.starts_with("id 2: client id has the control character"), "{error}");
            assert!(online("many valid") && !online("many new"));
        }
        mark_offline(b"many valid").unwrap();
    }

    #[test]
    fn a_client_is_online_while_a_stream_runs() {
        let probe = Probe::attach("streams", None, None);
        let second = Probe::attach("streams", Some(1), None);
        assert!(online("streams"));
        detach("streams", probe.source.handle_id);
        assert!(online("streams"));
        detach("streams", second.source.handle_id);
        detach("streams", second.source.handle_id);
        assert!(!online("streams") && !probe.is_stopped() && !second.is_stopped());
    }

    #[test]
    fn an_offline_mark_stops_streams_and_ends_sessions_for_good() {
        let recorder = Recorder::new();
        mark_online(b"all").unwrap();
        let session = Session::open(b"all").unwrap();
        assert!(session.is_open() && Session::open(b"").unwrap().is_open());
        let (sender, stream) = (Probe::attach("all", None, None), Probe::attach("all", Some(recorder.number), None));
        mark_offline(b"all").unwrap();
        assert!(sender.is_stopped() && stream.is_stopped() && !online("all"));
        assert_eq!(recorder.of("all"), [true]);
        assert!(!session.is_open());
        // The old session does not count for the client that has come back.
        let next = Session::open(b"all").unwrap();
        session.close();
        assert!(online("all"));
        next.close();
        assert!(!online("all"));
        // The end of a session without streams is not announced, a mark of an unknown client is, and an announcement is
        // not announced again.
        mark_offline(b"all").unwrap();
        assert_eq!(recorder.of("all"), [true, false]);
        mark_online(b"all").unwrap();
        apply_offline("all", None);
        assert!(!online("all"));
        assert_eq!(recorder.of("all").len(), 2);
        remove_announcer(recorder.number);
        mark_offline(b"all").unwrap();
        assert_eq!(recorder.of("all").len(), 2);
    }

    #[test]
    fn closing_the_last_session_takes_an_unmarked_client_offline() {
        let (first, second) = (Session::open(b"tabs").unwrap(), Session::open(b"tabs").unwrap());
        let sender = Probe::attach("tabs", None, Some(1));
        first.close();
        first.close();
        assert!(online("tabs") && !sender.is_stopped());
        drop(second);
        assert!(!online("tabs") && sender.is_stopped());

        mark_online(b"marked tabs").unwrap();
        Session::open(b"marked tabs").unwrap().close();
        assert!(online("marked tabs"));
        let session = Session::open(b"later marked").unwrap();
        mark_online(b"later marked").unwrap();
        session.close();
        assert!(online("later marked"));
        Session::open(b"").unwrap().close();
    }

    #[test]
    fn closing_the_last_session_ends_only_streams_that_this_process_requested() {
        let recorder = Recorder::new();
        let attach = |id: &str, requested_on, answers_to, notice| {
            let probe = Probe::new(requested_on, answers_to, notice);
            super::attach(id, Arc::clone(&probe) as _);
            probe
        };
        let here = Some(recorder.number);
        // The client is also connected to another gateway, whose stream is served here.
        let session = Session::open(b"elsewhere").unwrap();
        let elsewhere = attach("elsewhere", None, None, Notice::Direct);
        let own = [
            attach("elsewhere", here, None, Notice::Direct),
            attach("elsewhere", here, None, Notice::Unknown),
            attach("elsewhere", None, here, Notice::Direct),
        ];
        session.close();
        assert!(own.iter().all(|probe| probe.is_stopped()) && !elsewhere.is_stopped() && online("elsewhere"));
        assert!(recorder.of("elsewhere").is_empty(), "announced, though each worker is notified directly");
        detach("elsewhere", elsewhere.source.handle_id);
        assert!(!online("elsewhere"));
        // A worker on level 0 can be notified in no other way.
        let session = Session::open(b"level 0").unwrap();
        let elsewhere = attach("level 0", None, None, Notice::Direct);
        attach("level 0", here, None, Notice::Announcement);
        session.close();
        assert!(elsewhere.is_stopped() && !online("level 0"));
        assert_eq!(recorder.of("level 0"), [true]);
        remove_announcer(recorder.number);
    }

    #[test]
    fn attach_if_online_refuses_an_offline_client() {
        let probe = Probe::new(Some(1), None, Notice::Direct);
        let attach = |id: &str| attach_if_online(id, Arc::clone(&probe) as _);
        assert!(!attach("only online") && !online("only online") && attach(""));
        mark_online(b"only online").unwrap();
        assert!(attach("only online"));
        mark_offline(b"only online").unwrap();
        assert!(probe.is_stopped() && !attach("only online"));
    }

    #[test]
    fn giving_up_a_detached_stream_announces_a_client_that_is_not_online_otherwise() {
        let recorder = Recorder::new();
        give_up_detached("detached", &*recorder);
        assert_eq!(recorder.of("detached"), [true]);
        mark_online(b"detached").unwrap();
        give_up_detached("detached", &*recorder);
        assert!(online("detached"));
        mark_offline(b"detached").unwrap();
        let sender = Probe::attach("detached", None, None);
        give_up_detached("detached", &*recorder);
        assert!(sender.is_stopped() && !online("detached"));
        assert_eq!(recorder.of("detached"), [true, false, true]);
        remove_announcer(recorder.number);
    }

    #[test]
    fn giving_up_a_stream_announces_a_client_that_is_not_online_otherwise() {
        let recorder = Recorder::new();
        let give_up = |id: &str, stream: &Probe| give_up(id, stream.source.handle_id, &*recorder);
        let stream = |id: &str| Probe::attach(id, Some(recorder.number), None);

        let (first, second) = (stream("two streams"), stream("two streams"));
        let sender = Probe::attach("two streams", None, None);
        give_up("two streams", &first);
        assert!(online("two streams") && recorder.of("two streams").is_empty());
        give_up("two streams", &second);
        assert!(!online("two streams") && sender.is_stopped(), "a stream of another requester does not keep it online");
        assert_eq!(recorder.of("two streams"), [true]);

        mark_online(b"marked").unwrap();
        give_up("marked", &stream("marked"));
        let session = Session::open(b"session").unwrap();
        give_up("session", &stream("session"));
        assert!(online("marked") && online("session"));
        assert!(recorder.of("marked").is_empty() && recorder.of("session").is_empty());
        session.close();

        // A stream that an offline mark has stopped is not announced again.
        let late = stream("late");
        mark_offline(b"late").unwrap();
        mark_online(b"late").unwrap();
        give_up("late", &late);
        assert!(online("late"));
        assert_eq!(recorder.of("late"), [true]);
        remove_announcer(recorder.number);
    }

    #[test]
    fn an_own_announcement_stops_only_senders_that_answer_its_connection() {
        let recorder = Recorder::new();
        assert_eq!(owner_of(&format!("inbox.{}.7", recorder.number)), Some(recorder.number));
        assert_eq!(owner_of("inbox.of another"), None);
        let own = Probe::attach("own", None, Some(recorder.number));
        let other = Probe::attach("own", None, None);
        apply_own_offline("own", recorder.number);
        assert!(own.is_stopped() && !other.is_stopped() && online("own"));
        detach("own", other.source.handle_id);
        let last = Probe::attach("own", None, Some(recorder.number));
        apply_own_offline("own", recorder.number);
        assert!(last.is_stopped() && !online("own"));
        mark_online(b"own").unwrap();
        apply_own_offline("own", recorder.number);
        assert!(online("own"));
        remove_announcer(recorder.number);
        assert_eq!(
            owner_of(&format!("inbox.{}.7", recorder.number)),
            Some(recorder.number),
            "late requests of a closed connection"
        );
    }

    #[test]
    fn watchers_get_each_change_once_and_in_order() {
        let queue = Queue::new();
        watch(&queue, 1);
        watch(&queue, 5);
        mark_online(b"watched").unwrap();
        mark_online(b"watched").unwrap();
        let session = Session::open(b"watched").unwrap();
        mark_offline(b"watched").unwrap();
        mark_offline(b"watched").unwrap();
        session.close();
        let sender = Probe::attach("watched", None, None);
        detach("watched", sender.source.handle_id);
        let mut kinds = Vec::new();
        let note = |event: Event<'_>| {
            if event.client == "watched" {
                assert_eq!(event.tag, 5);
                kinds.push(event.kind);
            }
        };
        queue.wait(usize::MAX, Some(Duration::ZERO), note).unwrap();
        assert_eq!(kinds, [Kind::Online, Kind::Offline, Kind::Online, Kind::Offline]);
        queue.close();
    }

    #[test]
    fn racing_marks_and_streams_leave_no_client_online() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..if cfg!(miri) { 10 } else { 2000 } {
                        let sender = Probe::attach("race", None, None);
                        mark_online(b"race").unwrap();
                        let session = Session::open(b"race").unwrap();
                        mark_offline(b"race").unwrap();
                        assert!(sender.source.word.check().is_err());
                        session.close();
                        detach("race", sender.source.handle_id);
                    }
                });
            }
        });
        assert!(!online("race"));
    }
}
