//! Stop, send, end, wait and receive on a lane, with both ends and the messages between them.

use super::*;
use crate::events::{Kind, Single, Source};
use crate::nats::outbox::interleavings::search;
use shuttle::sync::atomic::{AtomicBool, AtomicU32};
use shuttle::thread;

/// The lane's view of a sender or a stream.
struct Probe {
    queue: Arc<Queue>,
    source: Source,
    ended: AtomicU32,
    cancelled: AtomicU32,
    writable: AtomicU32,
    gone: AtomicU32,
}

impl Probe {
    fn new() -> Arc<Probe> {
        let zero = || AtomicU32::new(0);
        Arc::new(Probe {
            queue: Queue::new(),
            source: Source::new(0),
            ended: zero(),
            cancelled: zero(),
            writable: zero(),
            gone: zero(),
        })
    }

    fn end(&self) {
        assert_eq!(self.ended.fetch_add(1, Ordering::SeqCst), 0, "ended twice");
        self.queue.push(Single::new(Kind::End, Status::Ok, 0, "E"));
    }

    /// Everything that the reader receives, up to the end.
    fn read(&self) -> String {
        let mut all = String::new();
        while !all.ends_with('E') {
            self.queue.wait(8, None, |event| all += str::from_utf8(event.data).unwrap()).unwrap();
        }
        all
    }
}

impl EventSource for Probe {
    fn source(&self) -> &Source {
        &self.source
    }
}

impl StreamObserver for Probe {
    fn queue(&self) -> &Arc<Queue> {
        &self.queue
    }
    fn notify(&self, event: LaneEvent) {
        let counter = match event {
            LaneEvent::Ended | LaneEvent::Failed(..) => return self.end(),
            LaneEvent::Cancelled(_) => &self.cancelled,
            LaneEvent::Writable => &self.writable,
            LaneEvent::PeerGone { .. } => &self.gone,
            // The stream has ended already.
            LaneEvent::AcceptUndelivered => return,
            other => panic!("{other:?} was not expected"),
        };
        counter.fetch_add(1, Ordering::SeqCst);
    }
    fn closed_here(&self, _why: Status) {
        panic!("no stream ends on this side");
    }
}

struct World {
    worker: Arc<Lane>,
    gateway: Arc<Lane>,
    window: Arc<SendWindow>,
    sender: Arc<Probe>,
    stream: Arc<Probe>,
    over: Arc<AtomicBool>,
}

/// The task of one end: passes the messages of its state to the other end. Timers fire when nothing else is left to do.
async fn carry(from: Arc<Lane>, to: Arc<Lane>, stream: Arc<Probe>, over: Arc<AtomicBool>, window: u32) {
    let readers = Wakeups::default();
    let mut now = Instant::now();
    loop {
        now = now.max(Instant::now());
        let mut events = Vec::new();
        let message = {
            let mut state = from.state.lock();
            state.poll(now, &mut events).or_else(|| {
                let soon = state.deadline().filter(|at| *at < now + Duration::from_millis(100))?;
                now = now.max(soon);
                state.poll(now, &mut events)
            })
        };
        from.deliver(events, &Bytes::new(), &readers);
        match message {
            Some(message) => {
                let accept = |_, _| Some((Arc::clone(&stream) as Arc<dyn StreamObserver>, window));
                to.receive(&message, &readers, accept).unwrap();
                readers.wake_all();
            }
            None if over.load(Ordering::SeqCst) => return,
            None => from.changed.notified().await,
        }
    }
}

impl World {
    /// A world in which no task connects the ends.
    fn apart(window: u32) -> World {
        let timeouts = PeerTimeouts {
            heartbeat_interval: Duration::from_secs(3600),
            local_grace: Duration::from_secs(3600),
            remote_grace: Duration::from_secs(3600),
            peer_reconnect: Duration::from_secs(3600),
        };
        let lane = |own: &str, peer: &str, role| Lane::new(own.into(), peer.into(), role, 1 << 20, timeouts, 1 << 20);
        let (worker, gateway) = (lane("w", "g", Role::Worker), lane("g", "w", Role::Gateway));
        worker.state.lock().connected(1);
        gateway.state.lock().connected(1);
        let (sender, stream) = (Probe::new(), Probe::new());
        let window = worker.open(7, window, Arc::clone(&sender) as _).unwrap();
        World { worker, gateway, window, sender, stream, over: Arc::default() }
    }

    fn new(window: u32) -> World {
        let world = World::apart(window);
        for (from, to) in [(&world.worker, &world.gateway), (&world.gateway, &world.worker)] {
            let (from, to) = (Arc::clone(from), Arc::clone(to));
            shuttle::future::spawn(carry(from, to, Arc::clone(&world.stream), Arc::clone(&world.over), window));
        }
        world
    }

    fn spawn<T: Send + 'static>(&self, work: impl FnOnce(World) -> T + Send + 'static) -> thread::JoinHandle<T> {
        let own = World {
            worker: Arc::clone(&self.worker),
            gateway: Arc::clone(&self.gateway),
            window: Arc::clone(&self.window),
            sender: Arc::clone(&self.sender),
            stream: Arc::clone(&self.stream),
            over: Arc::clone(&self.over),
        };
        thread::spawn(move || work(own))
    }

    fn send(&self, letters: &[&str]) -> String {
        let send =
            |letter: &&&str| self.worker.send(&self.sender.source.word, &self.window, letter.as_bytes(), || {}).is_ok();
        letters.iter().filter(send).copied().collect()
    }

    fn try_stop(&self) -> bool {
        self.sender.source.word.try_stop(Status::Offline)
    }

    fn close(self) {
        self.over.store(true, Ordering::SeqCst);
        self.worker.changed.notify_one();
        self.gateway.changed.notify_one();
    }
}

/// What was accepted arrives in order, then one end, and nothing after it, whichever thread ends it and when.
#[test]
fn nothing_follows_the_end() {
    search(|| {
        let world = World::new(1 << 16);
        let sender = world.spawn(|world| world.send(&["a", "b"]));
        let ender = world.spawn(|world| world.worker.finish(&world.sender.source.word, &world.window, None).is_ok());
        let stopped = world.try_stop();
        let late = world.send(&["c"]);
        if stopped {
            world.worker.stop(&world.window, b"stopped");
        }
        assert_eq!(late, "", "sent after the stop was seen");
        let read = world.stream.read();
        let (sent, ended) = (sender.join().unwrap(), ender.join().unwrap());
        assert!(stopped != ended);
        assert_eq!(read, sent + "E");
        world.close();
    });
}

/// A blocked send returns: the reader gives credit, or the stream is stopped. (Otherwise shuttle reports a deadlock.)
#[test]
fn blocked_send_returns() {
    for case in 0..2 {
        search(move || {
            let world = if case == 0 { World::new(1) } else { World::apart(1) };
            assert_eq!(world.send(&["a"]), "a");
            let waiters: Vec<_> = (0..2)
                .map(|_| {
                    world.spawn(|world| {
                        world.worker.send_wait(&world.sender.source.word, &world.window, b"b", None, || {})
                    })
                })
                .collect();
            if case == 0 {
                // The reader takes one event at a time.
                let mut all = String::new();
                while all.len() < 3 {
                    world.stream.queue.wait(1, None, |event| all += str::from_utf8(event.data).unwrap()).unwrap();
                    world.gateway.return_credit(1, 65, None);
                }
                assert_eq!(all, "abb");
            } else {
                assert!(world.try_stop());
                world.worker.stop(&world.window, b"stopped");
            }
            for waiter in waiters {
                let sent = waiter.join().unwrap();
                assert!(case == 1 || sent == Ok(()), "{sent:?}");
            }
            world.close();
        });
    }
}

/// A sender that was refused is notified when it is writable.
#[test]
fn refused_sender_is_notified() {
    search(|| {
        let world = World::new(1);
        assert_eq!(world.send(&["a"]), "a");
        let reader = world.spawn(|world| {
            world.stream.queue.wait(1, None, |_| ()).unwrap();
            world.gateway.return_credit(1, 65, None);
        });
        let mut notified = 0;
        while world.send(&["b"]).is_empty() {
            let mut spins = 0;
            while world.sender.writable.load(Ordering::SeqCst) == notified {
                spins += 1;
                assert!(spins < 5000, "the sender is never notified");
                thread::yield_now();
            }
            notified = world.sender.writable.load(Ordering::SeqCst);
        }
        reader.join().unwrap();
        world.close();
    });
}

/// A cancel races an end: the stream gets its end, or the sender the cancel, or both.
#[test]
fn cancel_races_an_end() {
    search(|| {
        let world = World::new(1 << 16);
        let ender = world.spawn(|world| {
            world.send(&["a"]);
            world.worker.finish(&world.sender.source.word, &world.window, None).unwrap();
        });
        // It is stream 1, the first of the lane.
        world.gateway.cancel(1, Status::Cancelled);
        ender.join().unwrap();
        world.worker.changed.notify_one();
        assert!(world.sender.cancelled.load(Ordering::SeqCst) <= 1);
        assert!(world.stream.ended.load(Ordering::SeqCst) <= 1);
        world.close();
    });
}

/// The end of a lane races a send and an end: a sender that was notified that its peer is gone cannot end the stream
/// successfully, and one that ended it successfully is not notified.
#[test]
fn lane_end_races_a_stream_end() {
    search(|| {
        let world = World::apart(1 << 16);
        let sender = world.spawn(|world| {
            let sent = world.worker.send(&world.sender.source.word, &world.window, b"a", || {});
            let ended = world.worker.finish(&world.sender.source.word, &world.window, None);
            (sent, ended)
        });
        world.worker.close(&Wakeups::default());
        let (sent, ended) = sender.join().unwrap();
        assert!(
            matches!((sent, ended), (Ok(()), _) | (Err(Status::PeerGone), Err(Status::PeerGone))),
            "{sent:?} {ended:?}"
        );
        assert_eq!(world.sender.gone.load(Ordering::SeqCst), u32::from(ended.is_err()));
        world.close();
    });
}
