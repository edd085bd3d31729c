//! Calls of the ABI in any order, valid and invalid, compared with a model of who is online.

use super::*;
use crate::error::Status;
use crate::fuzz::Choices;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{CString, c_char};
use std::mem::MaybeUninit;
use std::ptr::{null, null_mut};

const IDS: [&str; 4] = ["fuzz a", "fuzz b", "fuzz-\u{e9}", "fuzz d"];

/// A client who is online.
#[derive(Default)]
struct Life {
    number: usize,
    marked: bool,
    sessions: usize,
}

struct Watched {
    queue: *mut presence_queue,
    tag: u64,
    watches: bool,
    expected: VecDeque<(bool, &'static str)>,
}

#[derive(Default)]
struct World {
    lives: BTreeMap<&'static str, Life>,
    begun: usize,
    sessions: Vec<(*mut presence_session, &'static str, usize)>,
    queues: Vec<Watched>,
    stale: Vec<*mut presence_queue>,
}

impl World {
    fn expect_event(&mut self, is_online: bool, id: &'static str) {
        for watched in self.queues.iter_mut().filter(|watched| watched.watches) {
            watched.expected.push_back((is_online, id));
        }
    }

    fn enter(&mut self, id: &'static str) -> &mut Life {
        if !self.lives.contains_key(id) {
            self.begun += 1;
            self.lives.insert(id, Life { number: self.begun, ..Life::default() });
            self.expect_event(true, id);
        }
        self.lives.entry(id).or_default()
    }

    fn leave(&mut self, id: &'static str) {
        if self.lives.remove(id).is_some() {
            self.expect_event(false, id);
        }
    }

    fn close(&mut self, index: usize) {
        let (session, id, life) = self.sessions.swap_remove(index);
        presence_session_close(session);
        // A second call has no effect.
        presence_session_close(session);
        if let Some(own) = self.lives.get_mut(id).filter(|own| own.number == life) {
            own.sessions -= 1;
            if own.sessions == 0 && !own.marked {
                self.leave(id);
            }
        }
    }

    /// Takes the events of a queue, and compares them.
    fn drain(&mut self, index: usize) {
        let Watched { queue, tag, expected, .. } = &mut self.queues[index];
        let mut events = [const { MaybeUninit::<presence_event>::uninit() }; 3];
        loop {
            // SAFETY: there is memory for three.
            let count = unsafe { presence_queue_wait(*queue, events.as_mut_ptr().cast(), 3, 0) };
            assert!((0..=3).contains(&count));
            for event in &events[..count as usize] {
                // SAFETY: the wait has filled so many, and their pointers are valid until the next one.
                let (event, client) = unsafe {
                    let event = event.assume_init_ref();
                    (event, std::slice::from_raw_parts(event.client.cast::<u8>(), event.client_len))
                };
                // Other tests in this process use other clients.
                if !client.starts_with(b"fuzz") {
                    continue;
                }
                let is_online = event.kind == presence_event_kind::Online as i32;
                let (expects_online, id) = expected.pop_front().unwrap_or((false, "nothing"));
                assert_eq!((is_online, client), (expects_online, id.as_bytes()));
                assert_eq!(event.tag, *tag);
            }
            if count == 0 {
                assert!(expected.is_empty(), "missing: {expected:?}");
                return;
            }
        }
    }

    fn step(&mut self, choices: &mut Choices<'_>) {
        let (step, id) = (choices.below(16), IDS[usize::from(choices.below(4))]);
        let (text, length) = (id.as_ptr().cast::<c_char>(), id.len());
        let name = CString::new(id).unwrap_or_default();
        let (ok, invalid) = (Status::Ok, Status::Invalid);
        // SAFETY: pointers are NULL where that is allowed, or point to values that exist here, with their lengths.
        unsafe {
            match step {
                0 => {
                    assert_eq!(mark_client_online(name.as_ptr()), ok);
                    self.enter(id).marked = true;
                }
                1 => {
                    assert_eq!(presence_mark_online(text, length), ok);
                    assert_eq!(presence_mark_many(true, text, &raw const length, 1, null_mut()), ok);
                    self.enter(id).marked = true;
                }
                2 => {
                    assert_eq!(mark_client_offline(name.as_ptr()), ok);
                    self.leave(id);
                }
                3 => {
                    assert_eq!(presence_mark_offline(text, length), ok);
                    self.leave(id);
                }
                4 | 5 => {
                    let mut session = null_mut();
                    assert_eq!(presence_session_open(text, length, &raw mut session), ok);
                    let life = self.enter(id);
                    life.sessions += 1;
                    let number = life.number;
                    self.sessions.push((session, id, number));
                }
                6 | 7 => {
                    if !self.sessions.is_empty() {
                        self.close(usize::from(choices.byte()) % self.sessions.len());
                    }
                }
                8 if self.queues.len() < 4 => {
                    let mut queue = null_mut();
                    assert_eq!(presence_queue_new(&raw mut queue), ok);
                    let tag = choices.byte().into();
                    self.queues.push(Watched { queue, tag, watches: false, expected: VecDeque::new() });
                }
                9 => {
                    if let Some(watched) = self.queues.get_mut(usize::from(choices.below(4))) {
                        assert_eq!(presence_watch(watched.queue, watched.tag), ok);
                        watched.watches = true;
                    }
                }
                10 => {
                    let index = usize::from(choices.below(4));
                    if index < self.queues.len() {
                        self.drain(index);
                        let queue = self.queues.swap_remove(index).queue;
                        presence_queue_free(queue);
                        self.stale.push(queue);
                    }
                }
                11 => {
                    if let Some(queue) = self.stale.last().copied() {
                        let mut event = MaybeUninit::uninit();
                        assert_eq!(
                            presence_queue_wait(queue, event.as_mut_ptr(), 1, -1),
                            i64::from(Status::Closed.code())
                        );
                        assert_eq!(presence_watch(queue, 0), Status::Closed);
                        presence_queue_wake(queue);
                        presence_queue_free(queue);
                    }
                }
                12 => {
                    assert_eq!(presence_mark_online(null(), 3), invalid);
                    assert_eq!(presence_mark_offline(c"\n".as_ptr(), 1), invalid);
                    assert_eq!(presence_mark_many(false, null(), &1, 1, null_mut()), invalid);
                    assert_eq!(presence_session_open(text, length, null_mut()), invalid);
                    assert_eq!(presence_queue_new(null_mut()), invalid);
                    assert!(!is_client_online(null()));
                }
                13 => {
                    let config = presence_config_new();
                    let (key, value) = (CString::new(choices.slice()), CString::new(choices.slice()));
                    if let (Ok(key), Ok(value)) = (key, value) {
                        let set = presence_config_set(config, key.as_ptr(), value.as_ptr());
                        let mut error = MaybeUninit::<presence_error>::zeroed();
                        assert_eq!(presence_config_error(config, error.as_mut_ptr()), set);
                        assert_eq!(error.assume_init_ref().status, set as i32);
                    }
                    presence_config_free(config);
                }
                14 => {
                    if let Some(watched) = self.queues.get(usize::from(choices.below(4))) {
                        presence_queue_wake(watched.queue);
                        assert!(presence_queue_fd(watched.queue) >= 0);
                    }
                }
                _ => {
                    // A number that is no handle, as a handle of each kind.
                    let nonsense = std::ptr::without_provenance_mut::<u8>(usize::MAX - usize::from(choices.byte()));
                    assert_eq!(presence_watch(nonsense.cast(), 0), Status::Closed);
                    assert_eq!(presence_close(nonsense.cast(), 0), Status::Closed);
                    assert_eq!(presence_stream_cancel(nonsense.cast()), Status::Closed);
                    assert_eq!(presence_service_stop(nonsense.cast()), Status::Closed);
                    presence_session_close(nonsense.cast());
                }
            }
            assert_eq!(is_client_online(name.as_ptr()), self.lives.contains_key(id));
            assert_eq!(presence_is_online(text, length), self.lives.contains_key(id));
            #[cfg(fuzzing)]
            assert_eq!(presence_online_count(), self.lives.len() as u64);
        }
    }
}

/// A sequence of calls.
pub fn abi(data: &[u8]) {
    let (mut world, mut choices) = (World::default(), Choices(data));
    while !choices.is_over() {
        world.step(&mut choices);
    }
    while !world.sessions.is_empty() {
        world.close(0);
    }
    for id in IDS {
        // SAFETY: a text with its length.
        assert_eq!(unsafe { presence_mark_offline(id.as_ptr().cast(), id.len()) }, Status::Ok);
        world.leave(id);
    }
    for index in 0..world.queues.len() {
        world.drain(index);
        presence_queue_free(world.queues[index].queue);
    }
}
