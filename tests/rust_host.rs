//! A Rust program as the host.

use nats_presence::{Config, Connection};
use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

static SEEN: AtomicUsize = AtomicUsize::new(0);

/// Also on a thread with the name of the library's threads.
#[test]
fn panic_hook_of_a_rust_host_is_left_alone() {
    panic::set_hook(Box::new(|_| {
        SEEN.fetch_add(1, Ordering::SeqCst);
    }));
    // No server listens there, but this starts the runtime.
    assert!(Connection::connect("nats://127.0.0.1:1", &Config::new()).is_err());
    for name in ["presence", "another"] {
        let panics = thread::Builder::new().name(name.into()).spawn(|| panic!("of the host")).unwrap();
        assert!(panics.join().is_err());
    }
    assert_eq!(SEEN.load(Ordering::SeqCst), 2);
}
