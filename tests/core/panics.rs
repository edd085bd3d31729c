//! A panic in each task of the runtime: what depends on that task ends with an error, and everything else goes on.

use super::Server;
use crate::Config;
use crate::Connection;
use crate::Sender;
use crate::Status;
use crate::events::{Kind, Queue};
use crate::is_online;
use crate::mark_online;
use crate::sync::Mutex;
use std::future::poll_fn;
use std::panic;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

static FORCED: Mutex<Option<&str>> = Mutex::new(None);

/// Does the same work, but panics in the first poll after `force` was called with `what`.
pub(crate) async fn forcible<T>(what: &'static str, work: impl Future<Output = T>) -> T {
    let mut work = pin!(work);
    poll_fn(|context| {
        if FORCED.lock().take_if(|forced| *forced == what).is_some() {
            panic::panic_any("forced".to_owned());
        }
        work.as_mut().poll(context)
    })
    .await
}

fn force(what: &'static str) {
    *FORCED.lock() = Some(what);
}

fn was_forced() -> bool {
    FORCED.lock().is_none()
}

/// Returns the next event of one of these kinds, and drops the events before it.
fn next(queue: &Queue, kinds: &[Kind]) -> (Kind, Status, String, Option<Arc<Sender>>) {
    loop {
        let mut found = None;
        let show = |event: crate::Event<'_>| {
            if kinds.contains(&event.kind) {
                found = Some((event.kind, event.status, String::from_utf8_lossy(event.data).into(), event.sender()));
            }
        };
        let count = queue.wait(1, Some(Duration::from_secs(20)), show).unwrap();
        assert_ne!(count, 0, "none of {kinds:?} in 20 s");
        if let Some(found) = found {
            return found;
        }
    }
}

/// A gateway and a worker, each with its connection.
struct World {
    server: Server,
    gateway: End,
    worker: End,
}

struct End {
    queue: Arc<Queue>,
    connection: Arc<Connection>,
}

impl End {
    fn new(url: &str, lanes: &str) -> End {
        let mut config = Config::new();
        for (key, value) in [("lanes", lanes), ("announce", "never")] {
            config.set(key, value).unwrap();
        }
        let (queue, connection) = (Queue::new(), Connection::connect(url, &config).unwrap());
        connection.watch(&queue, 0).unwrap();
        End { queue, connection }
    }
}

impl World {
    fn new(lanes: &str) -> World {
        let server = Server::start();
        let (gateway, worker) = (End::new(&server.1, lanes), End::new(&server.1, lanes));
        worker.connection.serve(&worker.queue, "work", "", 0, 0).unwrap();
        World { server, gateway, worker }
    }

    /// Starts a stream, and returns its sender.
    fn stream(&self) -> Arc<Sender> {
        let End { queue, connection } = &self.gateway;
        connection.request(queue, "work", b"", b"somebody", &Config::new(), 0).unwrap();
        let sender = next(&self.worker.queue, &[Kind::Request]).3.unwrap();
        sender.send(b"first").unwrap();
        assert_eq!(next(queue, &[Kind::Data]).2, "first");
        sender
    }

    /// Checks that everything works.
    fn check(&self) {
        let sender = self.stream();
        sender.end().unwrap();
        assert_eq!(next(&self.gateway.queue, &[Kind::End, Kind::Error]).0, Kind::End);
    }

    fn close(self) {
        for End { connection, queue } in [&self.gateway, &self.worker] {
            connection.close(Some(Duration::from_secs(10))).unwrap();
            queue.close();
        }
        drop(self.server);
    }
}

const ENDS: [Kind; 2] = [Kind::End, Kind::Error];

/// One test, because `force` is for the whole process.
#[test]
#[ignore = "starts a nats-server"]
fn panic_in_a_task_ends_what_depends_on_it_and_nothing_else() {
    mark_online(b"bystander").unwrap();

    // The worker's end of a lane.
    let world = World::new("true");
    let sender = world.stream();
    force("a worker's lane");
    let _ = sender.send(b"second");
    let (_, status, ..) = next(&world.worker.queue, &[Kind::Stopped]);
    assert!(was_forced());
    assert_eq!((status, sender.send(b"third")), (Status::Internal, Err(Status::Internal)));
    assert_eq!(next(&world.gateway.queue, &ENDS).0, Kind::Error);
    world.check();

    // The gateway's end of a lane.
    let sender = world.stream();
    let stream = {
        let End { queue, connection } = &world.gateway;
        connection.request(queue, "work", b"", b"somebody", &Config::new(), 0).unwrap()
    };
    let second = next(&world.worker.queue, &[Kind::Request]).3.unwrap();
    second.send(b"x").unwrap();
    next(&world.gateway.queue, &[Kind::Data]);
    force("a gateway's lane");
    stream.cancel().unwrap();
    let mut ends = [next(&world.gateway.queue, &ENDS).1, next(&world.gateway.queue, &ENDS).1];
    ends.sort_by_key(|status| status.code());
    assert_eq!(ends, [Status::Internal, Status::Cancelled]);
    assert!(was_forced());
    for _ in 0..2 {
        next(&world.worker.queue, &[Kind::Stopped]);
    }
    assert!(sender.is_closed() && second.is_closed());
    world.check();
    world.close();

    // The task that sends, on level 0.
    let world = World::new("false");
    let sender = world.stream();
    force("sending");
    let _ = sender.send(b"second");
    let (_, _, text, _) = next(&world.worker.queue, &[Kind::Disconnected]);
    assert!(was_forced() && text.contains("sending has failed: forced"), "{text}");
    assert_eq!(sender.send(b"third"), Err(Status::Disconnected));
    assert_eq!(next(&world.gateway.queue, &ENDS).0, Kind::Error);
    next(&world.worker.queue, &[Kind::Connected]);
    world.worker.connection.flush_subscriptions().unwrap();
    world.check();

    // The parts of making a connection, which is tried again.
    for what in ["the NATS client", "subscribing"] {
        force("sending");
        world.worker.connection.listen_offline().unwrap();
        force(what);
        next(&world.worker.queue, &[Kind::Disconnected]);
        next(&world.worker.queue, &[Kind::Connected]);
        assert!(was_forced(), "{what}");
        world.worker.connection.flush_subscriptions().unwrap();
        world.check();
    }

    // Waking threads that wait for events.
    force("calling wakeups");
    while !was_forced() {
        world.check();
    }
    world.check();
    assert!(is_online(b"bystander"));
    world.close();
}
