//! What a forked child may still use: nothing that its parent made, and fresh instances of what belongs to a process.
//!
//! A child inherits memory but no threads: locks may be held for ever by threads that it does not have. So it touches
//! none of its parent's state, and finds out without a lock or a system call: `pthread_atfork` (see `ffi`) calls [`child`].

use crate::error::{Error, Result, Status};
use once_cell::sync::OnceCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// How many forks lie between this process and the one that loaded the library.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// The next handle's number, and the first one that this process gave.
static NEXT: AtomicU64 = AtomicU64::new(1);
static FIRST: AtomicU64 = AtomicU64::new(1);
/// 1 + the generation that started the runtime; 0: none did.
static RUNTIME: AtomicU32 = AtomicU32::new(0);

/// A number for a handle: never given twice.
pub(crate) fn next_handle_id() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Fails for a handle that the parent made.
pub(crate) fn check(number: u64) -> Result<(), Status> {
    if number < FIRST.load(Ordering::Relaxed) { Err(Status::Forked) } else { Ok(()) }
}

/// To be called in the child of a fork, before anything else; only stores to atomics.
pub(crate) fn child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    FIRST.store(NEXT.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// Whether a parent of this process had loaded the library.
#[cfg(any(debug_assertions, test))]
pub(crate) fn is_child() -> bool {
    GENERATION.load(Ordering::Relaxed) > 0
}

/// Notes that the runtime runs in this process; fails where its parent had one, for tokio does not survive a fork.
pub(crate) fn claim_runtime() -> Result<()> {
    let own = GENERATION.load(Ordering::Relaxed) + 1;
    match RUNTIME.compare_exchange(0, own, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok(()),
        Err(started) if started == own => Ok(()),
        Err(_) => Err(Error::new(
            Status::Forked,
            "the parent of this process had connected before the fork: connect in the child only, or start it anew (spawn)",
        )),
    }
}

/// A value of which each process has its own. It is made when first asked for, and never freed.
pub(crate) struct PerProcess<T: 'static> {
    value: OnceCell<T>,
    child: OnceCell<Box<PerProcess<T>>>,
}

impl<T> PerProcess<T> {
    pub(crate) const fn new() -> PerProcess<T> {
        PerProcess { value: OnceCell::new(), child: OnceCell::new() }
    }

    /// This process's value. Lock-free once it is made.
    pub(crate) fn get(&'static self, make: impl FnOnce() -> T) -> &'static T {
        let mut own = self;
        for _ in 0..GENERATION.load(Ordering::Relaxed) {
            own = own.child.get_or_init(|| Box::new(PerProcess::new()));
        }
        own.value.get_or_init(make)
    }
}
