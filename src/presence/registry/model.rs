//! Compares the registry with a simple model of it, by random calls, sequential and from several threads.

use super::tests::{Probe, Recorder};
use super::*;
use crate::events::Event;
use std::env;
use std::process::Command;
use std::thread;

/// Runs a test again in a process of its own, because all tests of a process share the registry. Returns true in that
/// process.
fn is_alone(test: &str) -> bool {
    if env::var_os("PRESENCE_ALONE").is_some() {
        return true;
    }
    let again = Command::new(env::current_exe().unwrap()).args([test, "--exact"]).env("PRESENCE_ALONE", "1").output();
    let output = again.unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && said.contains("1 passed"), "{said}{}", String::from_utf8_lossy(&output.stderr));
    false
}

/// A client who is online.
#[derive(Default)]
struct OnlineClient {
    number: u64,
    marked: bool,
    sessions: u32,
    /// The closed session that began its grace period.
    grace: Option<u64>,
    /// Indexes in `World::streams`.
    running: Vec<usize>,
}

/// A sender or a stream, and its expected state.
struct Stream {
    probe: Arc<Probe>,
    client: usize,
    is_over: bool,
    is_stopped: bool,
}

/// An open connection, and its expected announcements.
struct Connected {
    recorder: Arc<Recorder>,
    expected: Vec<(String, bool)>,
}

struct World {
    random: u64,
    ids: [String; 3],
    has_grace: bool,
    online: [Option<OnlineClient>; 3],
    begun: u64,
    /// Sessions, also closed ones, with their client and the number of its entry.
    sessions: Vec<(Session, usize, u64)>,
    streams: Vec<Stream>,
    connected: Vec<Connected>,
    queue: Arc<Queue>,
    events: Vec<(Kind, String)>,
}

impl World {
    fn new(name: &str, seed: u64, has_grace: bool, queue: &Arc<Queue>) -> World {
        World {
            random: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            ids: ["a", "b", "c"].map(|id| format!("{name} {id}")),
            has_grace,
            online: [None, None, None],
            begun: 0,
            sessions: Vec::new(),
            streams: Vec::new(),
            connected: Vec::new(),
            queue: Arc::clone(queue),
            events: Vec::new(),
        }
    }

    /// A number below `limit` (xorshift).
    fn below(&mut self, limit: usize) -> usize {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        (self.random >> 20) as usize % limit
    }

    fn enter(&mut self, client: usize) -> &mut OnlineClient {
        if self.online[client].is_none() {
            self.events.push((Kind::Online, self.ids[client].clone()));
            self.begun += 1;
        }
        let number = self.begun;
        self.online[client].get_or_insert_with(|| OnlineClient { number, ..OnlineClient::default() })
    }

    /// Whether nothing but streams that others requested keeps it online.
    fn is_left(&self, client: usize) -> bool {
        let is_own = |stream: &usize| self.streams[*stream].probe.requested_on.is_some();
        self.online[client].as_ref().is_some_and(|entry| {
            !entry.marked && entry.sessions == 0 && entry.grace.is_none() && !entry.running.iter().any(is_own)
        })
    }

    fn runs_something(&self, client: usize) -> bool {
        self.online[client].as_ref().is_some_and(|entry| !entry.running.is_empty())
    }

    fn leave(&mut self, client: usize) {
        let Some(entry) = self.online[client].take() else { return };
        self.events.push((Kind::Offline, self.ids[client].clone()));
        entry.running.into_iter().for_each(|stream| self.stop(stream));
    }

    fn stop(&mut self, stream: usize) {
        let stream = &mut self.streams[stream];
        stream.is_stopped |= !stream.is_over;
        stream.is_over = true;
    }

    fn announce(&mut self, client: usize) {
        let running = self.online[client].iter().flat_map(|entry| &entry.running);
        let probes: Vec<_> = running.map(|stream| Arc::clone(&self.streams[*stream].probe)).collect();
        for Connected { recorder, expected } in &mut self.connected {
            let is_meant =
                |probe: &Arc<Probe>| probe.requested_on == Some(recorder.number) && probe.notice != Notice::Direct;
            expected.push((self.ids[client].clone(), probes.iter().any(is_meant)));
        }
    }

    /// The last session of a client ends the streams that this process requested for it, and the senders that answer
    /// them.
    fn end_sessions(&mut self, client: usize) {
        let Some(entry) = &self.online[client] else { return };
        let probes = entry.running.iter().map(|stream| (*stream, Arc::clone(&self.streams[*stream].probe)));
        let running: Vec<_> = probes.collect();
        let mut is_announced = false;
        for Connected { recorder, expected } in &mut self.connected {
            let is_level_0 =
                |probe: &Probe| probe.requested_on == Some(recorder.number) && probe.notice == Notice::Announcement;
            if running.iter().any(|(_, probe)| is_level_0(probe)) {
                expected.push((self.ids[client].clone(), true));
                is_announced = true;
            }
        }
        for (stream, probe) in &running {
            if is_announced || probe.requested_on.is_some() || probe.answers_to.is_some() {
                self.take_out(*stream);
                self.stop(*stream);
            }
        }
        if !self.runs_something(client) {
            self.leave(client);
        }
    }

    /// Removes a stream from its client. Returns false if the client does not have it.
    fn take_out(&mut self, stream: usize) -> bool {
        let Some(entry) = &mut self.online[self.streams[stream].client] else { return false };
        let before = entry.running.len();
        entry.running.retain(|other| *other != stream);
        entry.running.len() < before
    }

    fn step(&mut self) {
        let (step, client) = (self.below(20), self.below(3));
        let id = self.ids[client].clone();
        match step {
            0 => {
                if self.below(2) == 0 {
                    mark_online(id.as_bytes()).unwrap();
                } else {
                    mark_many(true, [id.as_bytes(), b"", id.as_bytes()]).unwrap();
                }
                self.enter(client).marked = true;
            }
            1 => {
                if self.below(2) == 0 {
                    mark_offline(id.as_bytes()).unwrap();
                } else {
                    mark_many(false, [&b""[..], id.as_bytes()]).unwrap();
                }
                self.announce(client);
                self.leave(client);
            }
            2 => {
                apply_offline(&id, None);
                self.leave(client);
            }
            3 | 4 => {
                let at = self.below(4);
                let Some(number) = self.connected.get(at).map(|connected| connected.recorder.number) else { return };
                apply_own_offline(&id, number);
                let Some(entry) = &mut self.online[client] else { return };
                let answers = |stream: &usize| self.streams[*stream].probe.answers_to == Some(number);
                let (late, kept) = entry.running.iter().partition(|stream| answers(stream));
                entry.running = kept;
                Vec::into_iter(late).for_each(|stream| self.stop(stream));
                if !self.runs_something(client) && self.is_left(client) {
                    self.leave(client);
                }
            }
            5..=7 => {
                let session = Session::open(id.as_bytes()).unwrap();
                let entry = self.enter(client);
                (entry.sessions, entry.grace) = (entry.sessions + 1, None);
                let number = entry.number;
                self.sessions.push((session, client, number));
            }
            8..=10 if !self.sessions.is_empty() => {
                let at = self.below(self.sessions.len());
                self.close(at);
            }
            11 | 12 if !self.sessions.is_empty() => {
                let at = self.below(self.sessions.len());
                let (session, client, _) = &self.sessions[at];
                let (client, number) = (*client, session.handle_id);
                // As the session's timer does, also if it has nothing to end.
                end_grace(&session.client, session.entry_id, number);
                let Some(entry) = self.online[client].as_mut().filter(|entry| entry.grace == Some(number)) else {
                    return;
                };
                entry.grace = None;
                if !entry.marked {
                    self.end_sessions(client);
                }
            }
            13..=15 => self.attach(client),
            16 | 17 if !self.streams.is_empty() => {
                let stream = self.below(self.streams.len());
                let probe = Arc::clone(&self.streams[stream].probe);
                let client = self.streams[stream].client;
                if self.below(2) == 0 {
                    // The stream ends by itself, and is detached at once or later.
                    assert_eq!(probe.source.word.try_stop(Status::Closed), !self.streams[stream].is_over);
                    self.streams[stream].is_over = true;
                }
                if self.below(3) > 0 {
                    detach(&self.ids[client], probe.source.handle_id);
                    if self.take_out(stream) && !self.runs_something(client) && self.is_left(client) {
                        self.leave(client);
                    }
                }
            }
            18 if !self.streams.is_empty() => {
                let stream = self.below(self.streams.len());
                let probe = Arc::clone(&self.streams[stream].probe);
                let client = self.streams[stream].client;
                let is_here = |connected: &Connected| probe.requested_on == Some(connected.recorder.number);
                let Some(at) = self.connected.iter().position(is_here) else { return };
                give_up(&self.ids[client], probe.source.handle_id, &*self.connected[at].recorder);
                if self.take_out(stream) && self.is_left(client) {
                    self.connected[at].expected.push((self.ids[client].clone(), true));
                    self.leave(client);
                }
            }
            19 => {
                let at = self.below(4);
                if at < self.connected.len() {
                    remove_announcer(self.connected.swap_remove(at).recorder.number);
                } else if self.connected.len() < 3 {
                    self.connected.push(Connected { recorder: Recorder::new(), expected: Vec::new() });
                }
            }
            _ => {}
        }
    }

    fn close(&mut self, at: usize) {
        let (session, client, entry) = &self.sessions[at];
        let (client, entry, number) = (*client, *entry, session.handle_id);
        let was_closed = session.is_closed.load(Ordering::Relaxed);
        session.close();
        let has_grace = self.has_grace;
        let Some(own) = self.online[client].as_mut().filter(|own| own.number == entry && !was_closed) else { return };
        own.sessions -= 1;
        if own.sessions == 0 && !own.marked {
            if has_grace {
                own.grace = Some(number);
            } else {
                self.end_sessions(client);
            }
        }
    }

    fn attach(&mut self, client: usize) {
        let at = self.below(6);
        let recorder = self.connected.get(at % 3).map(|connected| connected.recorder.number);
        let (requested_on, answers_to) = if at < 3 { (recorder, None) } else { (None, recorder) };
        let notice = [Notice::Direct, Notice::Announcement, Notice::Unknown][self.below(3)];
        let probe = Probe::new(requested_on, answers_to, notice);
        attach(&self.ids[client], Arc::clone(&probe) as _);
        let stream = self.streams.len();
        self.streams.push(Stream { probe, client, is_over: false, is_stopped: false });
        self.enter(client).running.push(stream);
    }

    fn check(&mut self) {
        for (id, entry) in self.ids.iter().zip(&self.online) {
            assert_eq!(is_online(id.as_bytes()), entry.is_some(), "{id}");
        }
        for stream in &self.streams {
            let (probe, is_over) = (&stream.probe, stream.probe.source.word.check().is_err());
            assert_eq!([is_over, probe.stopped.load(Ordering::Relaxed)], [stream.is_over, stream.is_stopped]);
        }
        for Connected { recorder, expected } in &mut self.connected {
            let mut heard = recorder.announced.lock();
            // Other threads use other clients.
            heard.retain(|(id, _)| self.ids.contains(id));
            assert_eq!(*heard, *expected);
            heard.clear();
            expected.clear();
        }
        let mut events = Vec::new();
        let note = |event: Event<'_>| {
            if self.ids.iter().any(|id| id == event.client) {
                events.push((event.kind, event.client.to_owned()));
            }
        };
        self.queue.wait(usize::MAX, Some(Duration::ZERO), note).unwrap();
        assert_eq!(events, self.events);
        self.events.clear();
    }

    fn end(mut self) {
        for (session, ..) in std::mem::take(&mut self.sessions) {
            drop(session);
        }
        self.ids.iter().for_each(|id| mark_offline(id.as_bytes()).unwrap());
        self.connected.iter().for_each(|connected| remove_announcer(connected.recorder.number));
        self.queue.wait(usize::MAX, Some(Duration::ZERO), |_| {}).unwrap();
    }
}

/// Compares after each random call. A failure prints its seed and step.
fn compare(name: &str, seeds: u64, has_grace: bool) {
    let queue = Queue::new();
    watch(&queue, 0);
    for seed in 1..=seeds {
        let mut world = World::new(name, seed, has_grace, &queue);
        for step in 0..100 {
            let checked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                world.step();
                world.check();
                if name == "alone" {
                    assert_eq!(online_count(), world.online.iter().flatten().count() as u64);
                }
            }));
            if let Err(panic) = checked {
                eprintln!("{name}: seed {seed}, step {step}, with grace: {has_grace}");
                std::panic::resume_unwind(panic);
            }
        }
        world.end();
    }
    queue.close();
}

#[test]
fn agrees_with_the_model() {
    if is_alone("presence::registry::model::agrees_with_the_model") {
        for grace in [0, 1000] {
            set_session_grace(Duration::from_millis(grace));
            compare("alone", 500, grace > 0);
        }
        assert_eq!(online_count(), 0);
    }
}

/// Each thread has its own clients; all share the map, the watchers and the connections.
#[test]
fn agrees_with_the_model_in_four_threads() {
    if is_alone("presence::registry::model::agrees_with_the_model_in_four_threads") {
        thread::scope(|scope| {
            for name in ["first", "second", "third", "fourth"] {
                scope.spawn(move || compare(name, 100, false));
            }
        });
        assert_eq!(online_count(), 0);
    }
}

#[test]
fn the_last_inboxes_are_remembered() {
    if is_alone("presence::registry::model::the_last_inboxes_are_remembered") {
        let recorders: Vec<_> = (0..=MAX_INBOXES).map(|_| Recorder::new()).collect();
        let known =
            |recorder: &Arc<Recorder>| owner_of(&format!("inbox.{}.1", recorder.number)) == Some(recorder.number);
        assert!(!known(&recorders[0]) && recorders[1..].iter().all(known));
    }
}
