//! A Rust program as the host: what belongs to it and not to us.

use nats_presence::{Config, Connection};
use std::panic;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

static SEEN: AtomicUsize = AtomicUsize::new(0);

/// Even on a thread that is called as ours are.
#[test]
fn its_panic_hook_stays_as_it_is() {
    panic::set_hook(Box::new(|_| {
        SEEN.fetch_add(1, Ordering::SeqCst);
    }));
    // Nothing listens there; but the runtime is started.
    assert!(Connection::connect("nats://127.0.0.1:1", &Config::new()).is_err());
    for name in ["presence", "another"] {
        let panics = thread::Builder::new().name(name.into()).spawn(|| panic!("of the host")).unwrap();
        assert!(panics.join().is_err());
    }
    assert_eq!(SEEN.load(Ordering::SeqCst), 2);
}
