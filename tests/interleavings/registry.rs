//! Marks, sessions and streams of one client at the same time.

use super::*;
use crate::events::Source;
use crate::nats::outbox::interleavings::search;
use shuttle::thread;

struct Probe {
    source: Source,
    stopped: AtomicU64,
}

impl Probe {
    fn attach(id: &str) -> Arc<Probe> {
        let probe = Arc::new(Probe { source: Source::new(0), stopped: AtomicU64::new(0) });
        attach(id, Arc::clone(&probe) as _);
        probe
    }

    fn is_stopped(&self) -> bool {
        self.source.word.check().is_err()
    }
}

impl EventSource for Probe {
    fn source(&self) -> &Source {
        &self.source
    }
}

impl Stoppable for Probe {
    fn stopped(&self, _why: Status, _is_announced: bool) {
        assert_eq!(self.stopped.fetch_add(1, Ordering::SeqCst), 0, "stopped twice");
        assert!(self.is_stopped());
    }
    fn requested_on(&self) -> Option<u64> {
        None
    }
    fn notice(&self) -> Notice {
        Notice::Direct
    }
    fn answers_to(&self) -> Option<u64> {
        None
    }
}

/// A lookup that begins after a mark returned gives the new answer, though its thread remembers the old one.
#[test]
fn lookup_after_a_mark_gives_the_new_answer() {
    for to in [false, true] {
        search(move || {
            mark_many(!to, [&b"a"[..]]).unwrap();
            let is_marked = Arc::new(AtomicBool::new(false));
            let reader = thread::spawn({
                let is_marked = Arc::clone(&is_marked);
                move || {
                    for _ in 0..4 {
                        let is_marked = is_marked.load(Ordering::Acquire);
                        assert!(is_online(b"a") == to || !is_marked);
                    }
                }
            });
            mark_many(to, [&b"a"[..]]).unwrap();
            is_marked.store(true, Ordering::Release);
            assert_eq!(is_online(b"a"), to);
            reader.join().unwrap();
        });
    }
}

/// Streams attached before a mark began are stopped when it returns; two marks stop each once; nothing is left.
#[test]
fn mark_stops_every_attached_stream() {
    search(|| {
        let probe = Probe::attach("a");
        let marker = thread::spawn({
            let probe = Arc::clone(&probe);
            move || {
                mark_offline(b"a").unwrap();
                assert!(probe.is_stopped());
            }
        });
        let late = thread::spawn(|| {
            let late = Probe::attach("a");
            mark_online(b"a").unwrap();
            late
        });
        mark_offline(b"a").unwrap();
        assert!(probe.is_stopped());
        marker.join().unwrap();
        let late = late.join().unwrap();
        mark_offline(b"a").unwrap();
        assert!(late.is_stopped());
        assert_eq!(probe.stopped.load(Ordering::SeqCst), 1);
        assert_eq!(late.stopped.load(Ordering::SeqCst), 1);
        detach("a", probe.source.handle_id);
        detach("a", late.source.handle_id);
        assert!(!is_online(b"a") && online_count() == 0);
    });
}

/// A stream's own end races the mark: one of them takes effect.
#[test]
fn end_races_a_mark() {
    let test = || {
        let probe = Probe::attach("a");
        let ender = thread::spawn({
            let probe = Arc::clone(&probe);
            move || {
                let ended = probe.source.word.try_stop(Status::Closed);
                detach("a", probe.source.handle_id);
                ended
            }
        });
        mark_offline(b"a").unwrap();
        let ended = ender.join().unwrap();
        assert_eq!(probe.stopped.load(Ordering::SeqCst), u64::from(!ended));
        assert!(!is_online(b"a") && online_count() == 0);
    };
    shuttle::check_dfs(test, None);
}

/// Two sessions close at once while one opens: the last one to close takes the client offline.
#[test]
fn last_session_takes_the_client_offline() {
    search(|| {
        let first = Session::open(b"a").unwrap();
        let second = Session::open(b"a").unwrap();
        let closers = [thread::spawn(move || first.close()), thread::spawn(move || second.close())];
        let third = Session::open(b"a").unwrap();
        assert!(is_online(b"a"));
        closers.into_iter().for_each(|closer| closer.join().unwrap());
        assert!(is_online(b"a"));
        third.close();
        assert!(!is_online(b"a") && online_count() == 0);
    });
}

/// Watchers receive ONLINE and OFFLINE alternately, whatever causes them.
#[test]
fn watchers_receive_alternating_events() {
    search(|| {
        let queue = Queue::new();
        watch(&queue, 1);
        let other = thread::spawn(|| {
            mark_online(b"a").unwrap();
            mark_offline(b"a").unwrap();
        });
        Session::open(b"a").unwrap().close();
        mark_offline(b"a").unwrap();
        other.join().unwrap();
        let mut online = false;
        let note = |event: crate::events::Event<'_>| {
            assert_eq!(event.kind, if online { Kind::Offline } else { Kind::Online });
            online = !online;
        };
        queue.wait(100, Some(Duration::ZERO), note).unwrap();
        assert!(!online && !is_online(b"a"));
    });
}
