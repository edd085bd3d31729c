//! Push, wait, wake and close.

use super::*;
use crate::events::{EventSource, Source};
use crate::nats::outbox::interleavings::search;
use shuttle::sync::atomic::{AtomicU32, Ordering};
use shuttle::thread;

struct Probe {
    source: Source,
    delivered: AtomicU32,
    discarded: AtomicU32,
}

impl EventSource for Probe {
    fn source(&self) -> &Source {
        &self.source
    }
    fn left_queue(&self, _kind: Kind, count: u64, _bytes: u64, is_delivered: bool) {
        let counter = if is_delivered { &self.delivered } else { &self.discarded };
        counter.fetch_add(count as u32, Ordering::SeqCst);
    }
}

fn probe() -> Arc<Probe> {
    Arc::new(Probe { source: Source::new(0), delivered: AtomicU32::new(0), discarded: AtomicU32::new(0) })
}

/// A wait gets all events, in the order of each thread that pushes, deferred or not.
#[test]
fn all_events_arrive() {
    search(|| {
        let (queue, probe) = (Queue::new(), probe());
        let pushers: Vec<_> = (0..2)
            .map(|pusher: u64| {
                let (queue, probe) = (Arc::clone(&queue), Arc::clone(&probe));
                thread::spawn(move || {
                    for number in 0..2 {
                        let data = Bytes::from(vec![pusher as u8, number]);
                        let event = Single::of(Kind::Data, Status::Ok, Arc::clone(&probe) as _, data);
                        if pusher == 0 {
                            assert!(queue.push(event));
                        } else if queue.push_deferred(|| Some(event)) == Some(true) {
                            thread::yield_now();
                            queue.flush();
                        }
                    }
                })
            })
            .collect();
        let mut next = [0, 0];
        let mut left = 4;
        while left > 0 {
            left -= queue
                .wait(3, None, |event| {
                    assert_eq!(event.data[1], next[event.data[0] as usize]);
                    next[event.data[0] as usize] += 1;
                })
                .unwrap();
        }
        pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
        assert_eq!(probe.delivered.load(Ordering::SeqCst), 4);
    });
}

/// Close races with push and wait: the wait returns, and each request is either delivered or discarded.
#[test]
fn close_ends_every_wait() {
    search(|| {
        let (queue, probe) = (Queue::new(), probe());
        let pusher = {
            let (queue, probe) = (Arc::clone(&queue), Arc::clone(&probe));
            thread::spawn(move || {
                (0..2)
                    .filter(|_| {
                        queue.push(Single::of(Kind::Request, Status::Ok, Arc::clone(&probe) as _, Bytes::new()))
                    })
                    .count()
            })
        };
        let waiter = {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                let mut taken = 0;
                loop {
                    match queue.wait(1, None, |_| ()) {
                        Ok(count) => taken += count,
                        Err(error) => {
                            assert_eq!(error.status, Status::Closed);
                            return taken;
                        }
                    }
                }
            })
        };
        queue.close();
        assert!(queue.shown.lock().is_empty());
        let (pushed, taken) = (pusher.join().unwrap(), waiter.join().unwrap());
        assert_eq!(taken + probe.discarded.load(Ordering::SeqCst) as usize, pushed);
    });
}

/// A wait returns for a wake that came before it or during it.
#[test]
fn wake_is_not_lost() {
    let test = || {
        let queue = Queue::new();
        let other = Arc::clone(&queue);
        let waker = thread::spawn(move || other.wake());
        assert_eq!(queue.wait(1, None, |_| ()).unwrap(), 0);
        waker.join().unwrap();
    };
    shuttle::check_dfs(test, None);
}

/// One of several threads that push deferred events must flush, and its flush wakes the waiter for all of them.
#[test]
fn flush_wakes_the_waiter() {
    search(|| {
        let (queue, probe) = (Queue::new(), probe());
        let pushers: Vec<_> = (0..2)
            .map(|_| {
                let (queue, probe) = (Arc::clone(&queue), Arc::clone(&probe));
                thread::spawn(move || {
                    let event = Single::of(Kind::Data, Status::Ok, probe as _, Bytes::new());
                    if queue.push_deferred(|| Some(event)) == Some(true) {
                        queue.flush();
                    }
                })
            })
            .collect();
        let mut left = 2;
        while left > 0 {
            left -= queue.wait(1, None, |_| ()).unwrap();
        }
        pushers.into_iter().for_each(|pusher| pusher.join().unwrap());
    });
}
