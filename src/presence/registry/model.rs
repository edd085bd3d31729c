//! The registry against a model of it that is only maps and lists: random calls, sequential and from several threads.

use super::tests::{Ear, Probe};
use super::*;
use crate::events::Event;
use std::env;
use std::process::Command;
use std::thread;

/// Runs a test once more in a process of its own, for what all tests of a process share; true in that process.
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
struct Life {
    number: u64,
    marked: bool,
    sessions: u32,
    /// The closed session that its grace is of.
    grace: Option<u64>,
    /// Places in `World::streams`.
    running: Vec<usize>,
}

/// A sender or a stream, and what must have been told to it.
struct Stream {
    probe: Arc<Probe>,
    client: usize,
    is_over: bool,
    is_stopped: bool,
}

/// An open connection, and what it must have been told to announce.
struct Connected {
    ear: Arc<Ear>,
    expected: Vec<(String, bool)>,
}

struct World {
    random: u64,
    ids: [String; 3],
    has_grace: bool,
    lives: [Option<Life>; 3],
    begun: u64,
    /// With its client and that one's life; closed ones, too.
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
            lives: [None, None, None],
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

    fn enter(&mut self, client: usize) -> &mut Life {
        if self.lives[client].is_none() {
            self.events.push((Kind::Online, self.ids[client].clone()));
            self.begun += 1;
        }
        let number = self.begun;
        self.lives[client].get_or_insert_with(|| Life { number, ..Life::default() })
    }

    /// Whether nothing but what others requested keeps it online.
    fn is_left(&self, client: usize) -> bool {
        let is_own = |stream: &usize| self.streams[*stream].probe.requested_on.is_some();
        self.lives[client].as_ref().is_some_and(|life| {
            !life.marked && life.sessions == 0 && life.grace.is_none() && !life.running.iter().any(is_own)
        })
    }

    fn runs_something(&self, client: usize) -> bool {
        self.lives[client].as_ref().is_some_and(|life| !life.running.is_empty())
    }

    fn leave(&mut self, client: usize) {
        let Some(life) = self.lives[client].take() else { return };
        self.events.push((Kind::Offline, self.ids[client].clone()));
        life.running.into_iter().for_each(|stream| self.stop(stream));
    }

    fn stop(&mut self, stream: usize) {
        let stream = &mut self.streams[stream];
        stream.is_stopped |= !stream.is_over;
        stream.is_over = true;
    }

    fn announce(&mut self, client: usize) {
        let running = self.lives[client].iter().flat_map(|life| &life.running);
        let probes: Vec<_> = running.map(|stream| Arc::clone(&self.streams[*stream].probe)).collect();
        for Connected { ear, expected } in &mut self.connected {
            let is_meant =
                |probe: &Arc<Probe>| probe.requested_on == Some(ear.number) && probe.notice != Notice::Direct;
            expected.push((self.ids[client].clone(), probes.iter().any(is_meant)));
        }
    }

    /// The last session of a client ends what this process requested for it, and the senders that answer that.
    fn end_sessions(&mut self, client: usize) {
        let Some(life) = &self.lives[client] else { return };
        let probes = life.running.iter().map(|stream| (*stream, Arc::clone(&self.streams[*stream].probe)));
        let running: Vec<_> = probes.collect();
        let mut is_announced = false;
        for Connected { ear, expected } in &mut self.connected {
            let is_level_0 =
                |probe: &Probe| probe.requested_on == Some(ear.number) && probe.notice == Notice::Announcement;
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

    /// Takes a stream out of its client's life; false if it is not in that.
    fn take_out(&mut self, stream: usize) -> bool {
        let Some(life) = &mut self.lives[self.streams[stream].client] else { return false };
        let before = life.running.len();
        life.running.retain(|other| *other != stream);
        life.running.len() < before
    }

    fn step(&mut self) {
        let (step, client) = (self.below(20), self.below(3));
        let id = self.ids[client].clone();
        match step {
            0 => {
                mark_online(id.as_bytes()).unwrap();
                self.enter(client).marked = true;
            }
            1 => {
                mark_offline(id.as_bytes()).unwrap();
                self.announce(client);
                self.leave(client);
            }
            2 => {
                apply_offline(&id);
                self.leave(client);
            }
            3 | 4 => {
                let at = self.below(4);
                let Some(number) = self.connected.get(at).map(|connected| connected.ear.number) else { return };
                apply_own_offline(&id, number);
                let Some(life) = &mut self.lives[client] else { return };
                let answers = |stream: &usize| self.streams[*stream].probe.answers_to == Some(number);
                let (late, kept) = life.running.iter().partition(|stream| answers(stream));
                life.running = kept;
                Vec::into_iter(late).for_each(|stream| self.stop(stream));
                if !self.runs_something(client) && self.is_left(client) {
                    self.leave(client);
                }
            }
            5..=7 => {
                let session = Session::open(id.as_bytes()).unwrap();
                let life = self.enter(client);
                (life.sessions, life.grace) = (life.sessions + 1, None);
                let number = life.number;
                self.sessions.push((session, client, number));
            }
            8..=10 if !self.sessions.is_empty() => {
                let at = self.below(self.sessions.len());
                self.close(at);
            }
            11 | 12 if !self.sessions.is_empty() => {
                let at = self.below(self.sessions.len());
                let (session, client, _) = &self.sessions[at];
                let (client, number) = (*client, session.handle_id());
                // As its timer does, now or never, also when it has nothing to end.
                end_grace(&session.client, session.entry_id, number);
                let Some(life) = self.lives[client].as_mut().filter(|life| life.grace == Some(number)) else { return };
                life.grace = None;
                if !life.marked {
                    self.end_sessions(client);
                }
            }
            13..=15 => self.attach(client),
            16 | 17 if !self.streams.is_empty() => {
                let stream = self.below(self.streams.len());
                let probe = Arc::clone(&self.streams[stream].probe);
                let client = self.streams[stream].client;
                if self.below(2) == 0 {
                    // It ends by itself, and is detached at once or later.
                    assert_eq!(probe.word.try_stop(Status::Closed), !self.streams[stream].is_over);
                    self.streams[stream].is_over = true;
                }
                if self.below(3) > 0 {
                    detach(&self.ids[client], probe.handle_id);
                    if self.take_out(stream) && !self.runs_something(client) && self.is_left(client) {
                        self.leave(client);
                    }
                }
            }
            18 if !self.streams.is_empty() => {
                let stream = self.below(self.streams.len());
                let probe = Arc::clone(&self.streams[stream].probe);
                let client = self.streams[stream].client;
                let is_here = |connected: &Connected| probe.requested_on == Some(connected.ear.number);
                let Some(at) = self.connected.iter().position(is_here) else { return };
                give_up(&self.ids[client], probe.handle_id, &*self.connected[at].ear);
                if self.take_out(stream) && self.is_left(client) {
                    self.connected[at].expected.push((self.ids[client].clone(), true));
                    self.leave(client);
                }
            }
            19 => {
                let at = self.below(4);
                if at < self.connected.len() {
                    remove_announcer(self.connected.swap_remove(at).ear.number);
                } else if self.connected.len() < 3 {
                    self.connected.push(Connected { ear: Ear::new(), expected: Vec::new() });
                }
            }
            _ => {}
        }
    }

    fn close(&mut self, at: usize) {
        let (session, client, life) = &self.sessions[at];
        let (client, life, number) = (*client, *life, session.handle_id());
        let was_closed = session.is_closed.load(Ordering::Relaxed);
        session.close();
        let has_grace = self.has_grace;
        let Some(own) = self.lives[client].as_mut().filter(|own| own.number == life && !was_closed) else { return };
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
        let ear = self.connected.get(at % 3).map(|connected| connected.ear.number);
        let (requested_on, answers_to) = if at < 3 { (ear, None) } else { (None, ear) };
        let notice = [Notice::Direct, Notice::Announcement, Notice::Unknown][self.below(3)];
        let probe = Probe::new(requested_on, answers_to, notice);
        attach(&self.ids[client], probe.handle_id, Arc::clone(&probe) as _);
        let stream = self.streams.len();
        self.streams.push(Stream { probe, client, is_over: false, is_stopped: false });
        self.enter(client).running.push(stream);
    }

    fn check(&mut self) {
        for (id, life) in self.ids.iter().zip(&self.lives) {
            assert_eq!(is_online(id.as_bytes()), life.is_some(), "{id}");
        }
        for stream in &self.streams {
            let (probe, is_over) = (&stream.probe, stream.probe.word.check().is_err());
            assert_eq!([is_over, probe.stopped.load(Ordering::Relaxed)], [stream.is_over, stream.is_stopped]);
        }
        for Connected { ear, expected } in &mut self.connected {
            let mut heard = ear.heard.lock();
            // Other threads have other clients.
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
        self.connected.iter().for_each(|connected| remove_announcer(connected.ear.number));
        self.queue.wait(usize::MAX, Some(Duration::ZERO), |_| {}).unwrap();
    }
}

/// Random calls; a failure says of which seed and step.
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
                    assert_eq!(online_count(), world.lives.iter().flatten().count() as u64);
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

/// Each thread has clients of its own; the map, the watchers and the connections are everybody's.
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
        let ears: Vec<_> = (0..=MAX_INBOXES).map(|_| Ear::new()).collect();
        let known = |ear: &Arc<Ear>| owner_of(&format!("inbox.{}.1", ear.number)) == Some(ear.number);
        assert!(!known(&ears[0]) && ears[1..].iter().all(known));
    }
}
