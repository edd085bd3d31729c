//! What a forked child may use: nothing that its parent made, and a new instance of what each process has.
//!
//! A child inherits memory but no threads, so that locks may stay locked for ever by threads that it does not have. It
//! uses none of its parent's state. It knows that it is a child without a lock or a system call, because
//! `pthread_atfork` (see `ffi`) calls [`child`].

use crate::error::{Error, Result, Status};
use once_cell::sync::OnceCell;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// The number of forks between the process that loaded the library and this one.
static GENERATION: AtomicU32 = AtomicU32::new(0);
/// The next handle id, and the first one of this process.
static NEXT: AtomicU64 = AtomicU64::new(1);
static FIRST: AtomicU64 = AtomicU64::new(1);
/// 1 + the generation of the process that started the runtime; 0: no process has.
static RUNTIME: AtomicU32 = AtomicU32::new(0);

/// Returns the id of a new handle. Ids rise, and none is used twice.
pub(crate) fn next_handle_id() -> u64 {
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Fails for a handle that the parent of this process made.
pub(crate) fn check(handle_id: u64) -> Result<(), Status> {
    if handle_id < FIRST.load(Ordering::Relaxed) { Err(Status::Forked) } else { Ok(()) }
}

/// Must be called in a forked child before anything else. It only stores to atomics.
pub(crate) fn child() {
    GENERATION.fetch_add(1, Ordering::Relaxed);
    FIRST.store(NEXT.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// Returns true if a parent of this process had loaded the library.
#[cfg(any(debug_assertions, test))]
pub(crate) fn is_child() -> bool {
    GENERATION.load(Ordering::Relaxed) > 0
}

/// Must be called before the runtime is started. Fails if a parent of this process had one, for tokio does not survive
/// a fork.
pub(crate) fn claim_runtime() -> Result<()> {
    let own = GENERATION.load(Ordering::Relaxed) + 1;
    match RUNTIME.compare_exchange(0, own, Ordering::Relaxed, Ordering::Relaxed) {
        Ok(_) => Ok(()),
        Err(started) if started == own => Ok(()),
        Err(_) => Err(Error::new(
            Status::Forked,
            "the parent of this process connected before the fork; connect in the child only, or start it by spawn",
        )),
    }
}

/// A value that each process makes for itself, when it first needs it, and never frees.
pub(crate) struct PerProcess<T: 'static> {
    value: OnceCell<T>,
    child: OnceCell<Box<PerProcess<T>>>,
}

impl<T> PerProcess<T> {
    pub(crate) const fn new() -> PerProcess<T> {
        PerProcess { value: OnceCell::new(), child: OnceCell::new() }
    }

    /// Returns the value of this process. Takes no lock once it is made.
    pub(crate) fn get(&'static self, make: impl FnOnce() -> T) -> &'static T {
        let mut own = self;
        for _ in 0..GENERATION.load(Ordering::Relaxed) {
            own = own.child.get_or_init(|| Box::new(PerProcess::new()));
        }
        own.value.get_or_init(make)
    }
}
