//! Who is online in this process, and whose streams to stop when they leave.
//!
//! A client is online here while it is marked online, or has an open session, or has a running stream. An offline mark ends
//! all three at once, everywhere. The end of the last session ends what this process requested for the client, and nothing
//! that other processes requested: the client may be connected to them. One map, and no lock held but its shard's: what must agree with the map (a sender's status
//! word, the order of announcements and requests, of ONLINE and OFFLINE events) is written under that lock; what takes
//! longer comes after.

use crate::error::{Result, Status};
use crate::events::queue::{Kind, Queue};
use crate::presence::client_id;
use crate::presence::id_map::IdMap;
use crate::process::fork::{self, PerProcess};
use crate::process::runtime;
use crate::sync::RwLock;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// A sender or a stream of a client.
pub(crate) trait Stoppable: Send + Sync {
    /// Makes it refuse from now on; false if it had ended already. Called with the client's entry locked: only atomics.
    fn try_stop(&self, why: Status) -> bool;
    /// Notifies the other end and the queue, after `forbid`. `is_announced`: the client is announced offline as well.
    fn stopped(&self, why: Status, is_announced: bool);
    /// The number of the connection that it was requested on, if this process requested it.
    fn requested_on(&self) -> Option<u64>;
    /// How its worker learns that the client has left, if this process requested it.
    fn notice(&self) -> Notice;
    /// The number of this process's connection whose request it answers, if it is a sender and this process asked itself.
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

/// A connection, as seen from here.
pub(crate) trait Announcer: Send + Sync {
    /// Announces the client offline if its configuration says so. `requested`: it has streams that were requested on this
    /// connection and whose workers learn of it in no other way. Called with the client's entry locked: it must only queue the announcement.
    /// Returns whether it does.
    fn announce(&self, id: &str, requested: bool) -> bool;
    /// The number of the connection.
    fn number(&self) -> u64;
}

#[derive(Default)]
struct Registry {
    clients: IdMap<Presence>,
    announcers: RwLock<Vec<Arc<dyn Announcer>>>,
    /// There was ever one.
    has_announcers: AtomicBool,
    watchers: RwLock<Vec<(Weak<Queue>, u64)>>,
    is_watched: AtomicBool,
    session_grace_ms: AtomicU64,
    /// What the inboxes of this process's connections begin with, and their numbers; of closed ones too, for a while.
    inboxes: RwLock<VecDeque<(String, u64)>>,
}

/// How many inboxes are remembered.
const MAX_INBOXES: usize = 256;

/// Why a client is online.
enum Presence {
    /// It is marked online, and nothing else, as nearly all of a million clients are.
    Marked,
    /// It has, or had, sessions or streams.
    Life(Box<Life>),
}

/// From a client's first session or stream to its going offline. A client that comes back has a new one.
struct Life {
    number: u64,
    marked: bool,
    sessions: u32,
    /// The session whose close began the grace that runs now.
    grace: Option<NonZeroU64>,
    running: Streams,
}

/// What runs for a client: one stream for nearly all of them, which takes no memory of its own.
#[derive(Default)]
struct Streams {
    first: Option<(u64, Arc<dyn Stoppable>)>,
    others: BTreeMap<u64, Arc<dyn Stoppable>>,
}

impl Streams {
    fn insert(&mut self, number: u64, running: Arc<dyn Stoppable>) {
        if self.first.is_none() {
            self.first = Some((number, running));
        } else {
            self.others.insert(number, running);
        }
    }

    fn remove(&mut self, number: u64) -> bool {
        self.first.take_if(|(first, _)| *first == number).is_some() || self.others.remove(&number).is_some()
    }

    fn is_empty(&self) -> bool {
        self.first.is_none() && self.others.is_empty()
    }

    fn iter(&self) -> impl Iterator<Item = &Arc<dyn Stoppable>> {
        self.first.iter().map(|(_, running)| running).chain(self.others.values())
    }

    /// Takes out what `is_meant` says.
    fn extract(&mut self, is_meant: impl Fn(&Arc<dyn Stoppable>) -> bool) -> Vec<Arc<dyn Stoppable>> {
        let first = self.first.take_if(|(_, running)| is_meant(running)).map(|(_, running)| running);
        let mut extracted: Vec<_> = first.into_iter().collect();
        self.others.retain(|_, running| {
            let is_kept = !is_meant(running);
            if !is_kept {
                extracted.push(Arc::clone(running));
            }
            is_kept
        });
        extracted
    }
}

impl Presence {
    fn life(&mut self) -> &mut Life {
        if let Presence::Marked = self {
            *self = Presence::new(true);
        }
        match self {
            Presence::Life(life) => life,
            Presence::Marked => unreachable!("made one above"),
        }
    }

    fn new(marked: bool) -> Presence {
        let life =
            Life { number: fork::next_handle_id(), marked, sessions: 0, grace: None, running: Streams::default() };
        Presence::Life(Box::new(life))
    }

    fn running(&self) -> impl Iterator<Item = &Arc<dyn Stoppable>> {
        let running = match self {
            Presence::Marked => None,
            Presence::Life(life) => Some(life.running.iter()),
        };
        running.into_iter().flatten()
    }
}

impl Life {
    /// Whether nothing but streams that others requested keeps the client online here.
    fn is_left(&self) -> bool {
        !self.marked
            && self.sessions == 0
            && self.grace.is_none()
            && self.running.iter().all(|stream| stream.requested_on().is_none())
    }
}

static REGISTRY: PerProcess<Registry> = PerProcess::new();

fn registry() -> &'static Registry {
    REGISTRY.get(Registry::default)
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
    let mark = |presence: &mut Presence, was_online: bool| match presence {
        Presence::Life(life) => life.marked = true,
        Presence::Marked if was_online => {}
        Presence::Marked => registry.tell(Kind::Online, id),
    };
    registry.clients.enter(id, || Presence::Marked, mark);
    Ok(())
}

/// Marks a client offline: stops its senders and streams here, ends its sessions, announces it. The empty id has no effect.
///
/// # Errors
/// `Status::Invalid` for an invalid id.
pub fn mark_offline(id: &[u8]) -> Result<()> {
    let id = client_id::id(id)?;
    let registry = registry();
    if !id.is_empty() {
        let announce = |presence: &Presence| registry.announce(id, presence);
        // Who is unknown here may be known elsewhere. With the entry locked as well, or a mark and a request that follow
        // could overtake the announcement.
        registry.leave_or(id, |_| true, announce, || announce(&Presence::Marked));
    }
    Ok(())
}

/// Applies another process's announcement.
pub(crate) fn apply_offline(id: &str) {
    registry().leave(id, |_| true, |_| {});
}

/// Applies an announcement of another process that was missed at its time. A life that began later, with a number from
/// `since` on, is not meant.
pub(crate) fn apply_missed_offline(id: &str, since: u64) {
    let is_meant = |presence: &mut Presence| match presence {
        Presence::Marked => true,
        Presence::Life(life) => life.number < since,
    };
    registry().leave(id, is_meant, |_| {});
}

/// Applies an announcement that this process made on `connection`, when it comes back. What was to be done here was done
/// when it was made, and the client may be back; but a request sent before it may have arrived after that.
pub(crate) fn apply_own_offline(id: &str, connection: u64) {
    let mut late = Vec::new();
    let is_over = |presence: &mut Presence| match presence {
        Presence::Marked => false,
        Presence::Life(life) => {
            late = life.running.extract(|running| running.answers_to() == Some(connection));
            late.retain(|running| running.try_stop(Status::Offline));
            life.running.is_empty() && life.is_left()
        }
    };
    registry().leave(id, is_over, |_| {});
    for running in late {
        running.stopped(Status::Offline, true);
    }
}

/// The number of this process's connection that asks for answers at `reply`, if one does.
pub(crate) fn owner_of(reply: &str) -> Option<u64> {
    let inboxes = registry().inboxes.read();
    inboxes.iter().rev().find(|(prefix, _)| reply.starts_with(prefix)).map(|(_, number)| *number)
}

/// Whether a client is online. The empty id is; an unknown or invalid one is not.
#[must_use]
pub fn is_online(id: &[u8]) -> bool {
    id.is_empty() || std::str::from_utf8(id).is_ok_and(|id| registry().clients.contains(id))
}

/// How many clients are online.
#[must_use]
pub fn online_count() -> u64 {
    registry().clients.len() as u64
}

/// Has the queue tell when clients come online and go offline. A second call changes its tag.
pub fn watch(queue: &Arc<Queue>, tag: u64) {
    let registry = registry();
    add_watcher(&mut registry.watchers.write(), queue, tag);
    registry.is_watched.store(true, Ordering::Release);
}

/// Adds a queue to a list of watchers, each of which is in it once.
pub(crate) fn add_watcher(watchers: &mut Vec<(Weak<Queue>, u64)>, queue: &Arc<Queue>, tag: u64) {
    watchers.retain(|(other, _)| other.upgrade().is_some_and(|other| !Arc::ptr_eq(&other, queue)));
    watchers.push((Arc::downgrade(queue), tag));
}

/// Makes a client online as long as `running` runs here.
pub(crate) fn attach(id: &str, number: u64, running: Arc<dyn Stoppable>) {
    if !id.is_empty() {
        registry().enter(id, |life| life.running.insert(number, running));
    }
}

/// As `attach`, but only for a client that is online already: false, and nothing has changed, if it is not.
pub(crate) fn attach_if_online(id: &str, number: u64, running: Arc<dyn Stoppable>) -> bool {
    if id.is_empty() {
        return true;
    }
    let mut is_online = true;
    let attach = |presence: &mut Presence| {
        presence.life().running.insert(number, running);
        false
    };
    registry().clients.remove_or(id, attach, || is_online = false);
    is_online
}

/// Takes back `attach`, for a stream that ended by itself.
pub(crate) fn detach(id: &str, number: u64) {
    let is_over = |presence: &mut Presence| match presence {
        Presence::Marked => false,
        Presence::Life(life) => {
            life.running.remove(number);
            life.running.is_empty() && life.is_left()
        }
    };
    if !id.is_empty() {
        registry().leave(id, is_over, |_| {});
    }
}

/// Takes back `attach`, for a stream that its requester gave up: where nothing else keeps the client online here, it goes
/// offline, and `connection` announces it.
pub(crate) fn give_up(id: &str, number: u64, connection: &dyn Announcer) {
    let is_left = |presence: &mut Presence| match presence {
        Presence::Marked => false,
        Presence::Life(life) => life.running.remove(number) && life.is_left(),
    };
    if !id.is_empty() {
        let announce = |_: &Presence| {
            connection.announce(id, true);
        };
        registry().leave(id, is_left, announce);
    }
}

/// As `give_up`, for a stream that was detached before it was known that its worker needs an announcement.
pub(crate) fn give_up_detached(id: &str, connection: &dyn Announcer) {
    let is_left = |presence: &mut Presence| match presence {
        Presence::Marked => false,
        Presence::Life(life) => life.is_left(),
    };
    let announce = || {
        connection.announce(id, true);
    };
    registry().leave_or(id, is_left, |_| announce(), announce);
}

/// Adds a connection to those that announce; its inbox's subjects begin with `inbox`.
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

impl Registry {
    /// Changes a client's life, beginning one if it has none.
    fn enter<T>(&self, id: &str, change: impl FnOnce(&mut Life) -> T) -> T {
        let change = |presence: &mut Presence, was_online: bool| {
            if !was_online {
                self.tell(Kind::Online, id);
            }
            change(presence.life())
        };
        self.clients.enter(id, || Presence::new(false), change)
    }

    /// Takes a client offline if it is known and `applies` says so, and stops what runs for it. False if it did not.
    fn leave(&self, id: &str, applies: impl FnOnce(&mut Presence) -> bool, announce: impl FnOnce(&Presence)) -> bool {
        self.leave_or(id, applies, announce, || {})
    }

    /// As `leave`; calls `absent`, with the entry locked, too, if the client is not known.
    fn leave_or(
        &self,
        id: &str,
        applies: impl FnOnce(&mut Presence) -> bool,
        announce: impl FnOnce(&Presence),
        absent: impl FnOnce(),
    ) -> bool {
        let mut stopped = Vec::new();
        let is_left = |presence: &mut Presence| {
            if !applies(presence) {
                return false;
            }
            stopped.extend(presence.running().filter(|running| running.try_stop(Status::Offline)).cloned());
            announce(presence);
            self.tell(Kind::Offline, id);
            true
        };
        let left = self.clients.remove_or(id, is_left, absent);
        for running in stopped {
            running.stopped(Status::Offline, true);
        }
        left.is_some()
    }

    /// Ends the streams that this process requested for a client, and their senders in this process, if `is_over` says that
    /// the client's last session here is over. What other processes requested goes on: the client may be connected to them.
    ///
    /// Workers on level 0 learn of it by an announcement only, which all processes receive and apply. So then the client is
    /// offline here, too, and everything stops.
    fn end_sessions(&self, id: &str, is_over: impl FnOnce(&mut Life) -> bool) {
        let mut stopped = Vec::new();
        let mut is_announced = false;
        let ends = |presence: &mut Presence| {
            let Presence::Life(life) = presence else { return false };
            if !is_over(life) {
                return false;
            }
            is_announced = self.announce_where(id, |here| {
                life.running.iter().any(|it| it.requested_on() == here && it.notice() == Notice::Announcement)
            });
            let is_own =
                |running: &Arc<dyn Stoppable>| running.requested_on().is_some() || running.answers_to().is_some();
            stopped = life.running.extract(|running| is_announced || is_own(running));
            stopped.retain(|running| running.try_stop(Status::Offline));
            let is_left = life.running.is_empty();
            if is_left {
                self.tell(Kind::Offline, id);
            }
            is_left
        };
        self.clients.remove_or(id, ends, || {});
        for running in stopped {
            running.stopped(Status::Offline, is_announced);
        }
    }

    /// Has each open connection for which `is_needed` is true announce the client offline. Returns whether one does.
    fn announce_where(&self, id: &str, is_needed: impl Fn(Option<u64>) -> bool) -> bool {
        let announcers = self.announcers.read();
        let needed = announcers.iter().filter(|announcer| is_needed(Some(announcer.number())));
        needed.filter(|announcer| announcer.announce(id, true)).count() > 0
    }

    /// Has every open connection announce the client offline.
    fn announce(&self, id: &str, presence: &Presence) {
        if !self.has_announcers.load(Ordering::Acquire) {
            return;
        }
        for announcer in self.announcers.read().iter() {
            let here = Some(announcer.number());
            announcer.announce(
                id,
                // A worker that has not answered may be on level 0. This is meant for everybody, so it is announced.
                presence.running().any(|running| running.requested_on() == here && running.notice() != Notice::Direct),
            );
        }
    }

    /// Tells the watchers. Called with the client's entry locked, so that their events come in the order of the changes.
    fn tell(&self, kind: Kind, id: &str) {
        if self.is_watched.load(Ordering::Acquire) {
            for (queue, tag) in self.watchers.read().iter() {
                if let Some(queue) = queue.upgrade() {
                    queue.push_watch(kind, *tag, id);
                }
            }
        }
    }
}

/// One of several connections of the same client. Dropping it closes it.
pub struct Session {
    number: u64,
    id: Box<str>,
    /// The client's life that it belongs to: an offline mark ends it, and with it the session.
    life: u64,
    closed: AtomicBool,
}

impl Session {
    /// Opens a session of a client. The empty id gives one without effect.
    ///
    /// # Errors
    /// `Status::Invalid` for an invalid id.
    pub fn open(id: &[u8]) -> Result<Session> {
        let id = client_id::id(id)?;
        let open = |life: &mut Life| {
            life.sessions += 1;
            life.grace = None;
            life.number
        };
        let life = if id.is_empty() { 0 } else { registry().enter(id, open) };
        Ok(Session { number: fork::next_handle_id(), id: id.into(), life, closed: AtomicBool::new(false) })
    }

    pub(crate) fn number(&self) -> u64 {
        self.number
    }

    /// Closes it; once more has no effect.
    pub fn close(&self) {
        if fork::check(self.number).is_err() || self.closed.swap(true, Ordering::AcqRel) {
            return;
        }
        let registry = registry();
        let grace = Duration::from_millis(registry.session_grace_ms.load(Ordering::Relaxed));
        let mut begins_grace = false;
        registry.end_sessions(&self.id, |life| {
            if life.number != self.life {
                return false;
            }
            life.sessions -= 1;
            if life.sessions > 0 || life.marked {
                return false;
            }
            begins_grace = !grace.is_zero();
            life.grace = NonZeroU64::new(self.number).filter(|_| begins_grace);
            !begins_grace
        });
        if begins_grace {
            let (id, life, number) = (self.id.clone(), self.life, self.number);
            runtime::later(grace, move || end_grace(&id, life, number));
        }
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.close();
    }
}

/// Takes a client offline whose grace is over, unless something happened in the meantime.
fn end_grace(id: &str, life: u64, session: u64) {
    registry().end_sessions(id, |own| {
        let is_over = own.number == life && own.grace.is_some_and(|own| own.get() == session);
        if is_over {
            own.grace = None;
        }
        is_over && !own.marked
    });
}

#[cfg(test)]
mod model;

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::queue::Event;
    use crate::sync::Mutex;

    /// A stream, or a sender if nobody requested it here.
    pub(super) struct Probe {
        pub(super) number: u64,
        pub(super) requested_on: Option<u64>,
        pub(super) answers_to: Option<u64>,
        pub(super) notice: Notice,
        pub(super) forbidden: AtomicBool,
        pub(super) stopped: AtomicBool,
    }

    impl Probe {
        pub(super) fn new(requested_on: Option<u64>, answers_to: Option<u64>, notice: Notice) -> Arc<Probe> {
            let (forbidden, stopped) = (AtomicBool::new(false), AtomicBool::new(false));
            let number = fork::next_handle_id();
            Arc::new(Probe { number, requested_on, answers_to, notice, forbidden, stopped })
        }

        fn attach(id: &str, requested_on: Option<u64>, answers_to: Option<u64>) -> Arc<Probe> {
            let probe = Probe::new(requested_on, answers_to, Notice::Announcement);
            attach(id, probe.number, Arc::clone(&probe) as _);
            probe
        }

        fn is_stopped(&self) -> bool {
            let stopped = self.stopped.load(Ordering::Relaxed);
            assert_eq!(self.forbidden.load(Ordering::Relaxed), stopped);
            stopped
        }
    }

    impl Stoppable for Probe {
        fn try_stop(&self, _why: Status) -> bool {
            !self.forbidden.swap(true, Ordering::Relaxed)
        }

        fn stopped(&self, why: Status, _is_announced: bool) {
            assert_eq!(why, Status::Offline);
            assert!(!self.stopped.swap(true, Ordering::Relaxed), "stopped twice");
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

    /// A connection that notes what it is told to announce.
    pub(super) struct Ear {
        pub(super) number: u64,
        pub(super) heard: Mutex<Vec<(String, bool)>>,
    }

    impl Ear {
        pub(super) fn new() -> Arc<Ear> {
            let ear = Arc::new(Ear { number: fork::next_handle_id(), heard: Mutex::default() });
            add_announcer(Arc::clone(&ear) as _, &format!("inbox.{}.", ear.number));
            ear
        }

        /// What it heard of a client: other tests announce theirs.
        fn of(&self, id: &str) -> Vec<bool> {
            self.heard.lock().iter().filter(|(other, _)| other == id).map(|(_, requested)| *requested).collect()
        }
    }

    impl Announcer for Ear {
        fn announce(&self, id: &str, requested: bool) -> bool {
            self.heard.lock().push((id.into(), requested));
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
    fn marks() {
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
    fn a_stream_keeps_its_client_online_and_leaves_nothing_behind() {
        let probe = Probe::attach("streams", None, None);
        let second = Probe::attach("streams", Some(1), None);
        assert!(online("streams"));
        detach("streams", probe.number);
        assert!(online("streams"));
        detach("streams", second.number);
        detach("streams", second.number);
        assert!(!online("streams") && !probe.is_stopped() && !second.is_stopped());
    }

    #[test]
    fn an_offline_mark_stops_all_and_revives_none() {
        let ear = Ear::new();
        mark_online(b"all").unwrap();
        let session = Session::open(b"all").unwrap();
        let (sender, stream) = (Probe::attach("all", None, None), Probe::attach("all", Some(ear.number), None));
        mark_offline(b"all").unwrap();
        assert!(sender.is_stopped() && stream.is_stopped() && !online("all"));
        assert_eq!(ear.of("all"), [true]);
        // The old session belongs to the old life.
        let next = Session::open(b"all").unwrap();
        session.close();
        assert!(online("all"));
        next.close();
        assert!(!online("all"));
        // The end of a session with no streams is not announced; a mark of an unknown client is, and an announcement is not announced again.
        mark_offline(b"all").unwrap();
        assert_eq!(ear.of("all"), [true, false]);
        mark_online(b"all").unwrap();
        apply_offline("all");
        assert!(!online("all"));
        assert_eq!(ear.of("all").len(), 2);
        remove_announcer(ear.number);
        mark_offline(b"all").unwrap();
        assert_eq!(ear.of("all").len(), 2);
    }

    #[test]
    fn the_last_session_takes_the_client_offline_unless_it_is_marked() {
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
    fn the_last_session_ends_only_what_this_process_requested() {
        let ear = Ear::new();
        let attach = |id: &str, requested_on, answers_to, notice| {
            let probe = Probe::new(requested_on, answers_to, notice);
            super::attach(id, probe.number, Arc::clone(&probe) as _);
            probe
        };
        let here = Some(ear.number);
        // The client is at another gateway as well, whose stream is served here.
        let session = Session::open(b"elsewhere").unwrap();
        let elsewhere = attach("elsewhere", None, None, Notice::Direct);
        let own = [
            attach("elsewhere", here, None, Notice::Direct),
            attach("elsewhere", here, None, Notice::Unknown),
            attach("elsewhere", None, here, Notice::Direct),
        ];
        session.close();
        assert!(own.iter().all(|probe| probe.is_stopped()) && !elsewhere.is_stopped() && online("elsewhere"));
        assert!(ear.of("elsewhere").is_empty(), "announced, though each worker is notified directly");
        detach("elsewhere", elsewhere.number);
        assert!(!online("elsewhere"));
        // A worker on level 0 cannot be notified otherwise.
        let session = Session::open(b"level 0").unwrap();
        let elsewhere = attach("level 0", None, None, Notice::Direct);
        attach("level 0", here, None, Notice::Announcement);
        session.close();
        assert!(elsewhere.is_stopped() && !online("level 0"));
        assert_eq!(ear.of("level 0"), [true]);
        remove_announcer(ear.number);
    }

    #[test]
    fn a_stream_can_be_attached_to_an_online_client_only() {
        let probe = Probe::new(Some(1), None, Notice::Direct);
        let attach = |id: &str| attach_if_online(id, probe.number, Arc::clone(&probe) as _);
        assert!(!attach("only online") && !online("only online") && attach(""));
        mark_online(b"only online").unwrap();
        assert!(attach("only online"));
        mark_offline(b"only online").unwrap();
        assert!(probe.is_stopped() && !attach("only online"));
    }

    #[test]
    fn a_stream_that_was_detached_is_announced_unless_its_client_is_online() {
        let ear = Ear::new();
        give_up_detached("detached", &*ear);
        assert_eq!(ear.of("detached"), [true]);
        mark_online(b"detached").unwrap();
        give_up_detached("detached", &*ear);
        assert!(online("detached"));
        mark_offline(b"detached").unwrap();
        let sender = Probe::attach("detached", None, None);
        give_up_detached("detached", &*ear);
        assert!(sender.is_stopped() && !online("detached"));
        assert_eq!(ear.of("detached"), [true, false, true]);
        remove_announcer(ear.number);
    }

    #[test]
    fn who_gives_up_a_stream_announces_only_a_client_without_other_reasons() {
        let ear = Ear::new();
        let give_up = |id: &str, stream: &Probe| give_up(id, stream.number, &*ear);
        let stream = |id: &str| Probe::attach(id, Some(ear.number), None);

        let (first, second) = (stream("two streams"), stream("two streams"));
        let sender = Probe::attach("two streams", None, None);
        give_up("two streams", &first);
        assert!(online("two streams") && ear.of("two streams").is_empty());
        give_up("two streams", &second);
        assert!(!online("two streams") && sender.is_stopped(), "what others requested does not keep it");
        assert_eq!(ear.of("two streams"), [true]);

        mark_online(b"marked").unwrap();
        give_up("marked", &stream("marked"));
        let session = Session::open(b"session").unwrap();
        give_up("session", &stream("session"));
        assert!(online("marked") && online("session"));
        assert!(ear.of("marked").is_empty() && ear.of("session").is_empty());
        session.close();

        // One that an offline mark has stopped is not announced once more.
        let late = stream("late");
        mark_offline(b"late").unwrap();
        mark_online(b"late").unwrap();
        give_up("late", &late);
        assert!(online("late"));
        assert_eq!(ear.of("late"), [true]);
        remove_announcer(ear.number);
    }

    #[test]
    fn an_own_announcement_stops_only_what_answers_to_its_connection() {
        let ear = Ear::new();
        assert_eq!(owner_of(&format!("inbox.{}.7", ear.number)), Some(ear.number));
        assert_eq!(owner_of("inbox.of another"), None);
        let own = Probe::attach("own", None, Some(ear.number));
        let other = Probe::attach("own", None, None);
        apply_own_offline("own", ear.number);
        assert!(own.is_stopped() && !other.is_stopped() && online("own"));
        detach("own", other.number);
        let last = Probe::attach("own", None, Some(ear.number));
        apply_own_offline("own", ear.number);
        assert!(last.is_stopped() && !online("own"));
        mark_online(b"own").unwrap();
        apply_own_offline("own", ear.number);
        assert!(online("own"));
        remove_announcer(ear.number);
        assert_eq!(
            owner_of(&format!("inbox.{}.7", ear.number)),
            Some(ear.number),
            "late requests of a closed connection"
        );
    }

    #[test]
    fn watchers_hear_each_change_once_and_in_order() {
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
        detach("watched", sender.number);
        let mut heard = Vec::new();
        let note = |event: Event<'_>| {
            if event.client == "watched" {
                assert_eq!(event.tag, 5);
                heard.push(event.kind);
            }
        };
        queue.wait(usize::MAX, Some(Duration::ZERO), note).unwrap();
        assert_eq!(heard, [Kind::Online, Kind::Offline, Kind::Online, Kind::Offline]);
        queue.close();
    }

    #[test]
    fn racing_marks_and_streams_leave_nothing() {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..2000 {
                        let sender = Probe::attach("race", None, None);
                        mark_online(b"race").unwrap();
                        let session = Session::open(b"race").unwrap();
                        mark_offline(b"race").unwrap();
                        assert!(sender.forbidden.load(Ordering::Relaxed));
                        session.close();
                        detach("race", sender.number);
                    }
                });
            }
        });
        assert!(!online("race"));
    }
}
