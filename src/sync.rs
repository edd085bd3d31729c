//! Atomics and locks: the standard library's, or the model checker's with `cfg(shuttle)` (see `tests/interleavings`).
//!
//! A panic does not poison the locks, because it is caught and reported elsewhere. Each is a futex of its own. Locks
//! that park threads in one table for the whole process (parking_lot's, and DashMap's) are not safe to use after fork:
//! the child inherits the table with entries for threads that it does not have. See *Fork* in `docs/design.md`.

#[cfg(shuttle)]
use shuttle::sync;
use std::ops::{Deref, DerefMut};
#[cfg(not(shuttle))]
use std::sync;
use std::time::{Duration, Instant};
use sync::{PoisonError, TryLockError};

#[cfg(shuttle)]
pub(crate) use shuttle::thread_local;
#[cfg(not(shuttle))]
pub(crate) use std::thread_local;
pub(crate) use sync::{MutexGuard, RwLockReadGuard, RwLockWriteGuard, atomic};

use atomic::{AtomicUsize, Ordering};

/// A mutex that a panic does not poison.
#[derive(Debug, Default)]
pub(crate) struct Mutex<T>(sync::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Mutex<T> {
        Mutex(sync::Mutex::new(value))
    }

    #[inline]
    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        match self.0.try_lock() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

/// A condition variable.
#[derive(Debug, Default)]
pub(crate) struct Condvar(sync::Condvar);

impl Condvar {
    /// Waits until `deadline` at most (`None`: without limit). Returns true if it has passed.
    #[cfg(not(shuttle))]
    pub(crate) fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, T>, bool) {
        let Some(deadline) = deadline else {
            return (self.0.wait(guard).unwrap_or_else(PoisonError::into_inner), false);
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let (guard, result) = self.0.wait_timeout(guard, left).unwrap_or_else(PoisonError::into_inner);
        (guard, result.timed_out())
    }

    /// Any deadline may pass at any moment, or never.
    #[cfg(shuttle)]
    pub(crate) fn wait_until<'a, T>(
        &self,
        guard: MutexGuard<'a, T>,
        deadline: Option<Instant>,
    ) -> (MutexGuard<'a, T>, bool) {
        let passes = deadline.is_some() && shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng());
        (if passes { guard } else { self.0.wait(guard).unwrap_or_else(PoisonError::into_inner) }, passes)
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

/// The time after `timeout`. None: without limit, also where an `Instant` cannot express it.
pub(crate) fn deadline(timeout: Option<Duration>) -> Option<Instant> {
    timeout.and_then(|timeout| Instant::now().checked_add(timeout))
}

/// A reader-writer lock that a panic does not poison.
#[derive(Debug, Default)]
pub(crate) struct RwLock<T>(sync::RwLock<T>);

impl<T> RwLock<T> {
    #[inline]
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A mutex that returns `None`, instead of a deadlock, to a thread that has locked it already.
#[derive(Default)]
pub(crate) struct OwnedMutex<T> {
    /// Identifies the thread that has locked it; 0: none.
    owner: AtomicUsize,
    inner: Mutex<T>,
}

pub(crate) struct OwnedMutexGuard<'a, T> {
    owner: &'a AtomicUsize,
    guard: MutexGuard<'a, T>,
}

impl<T> OwnedMutex<T> {
    /// Locks it. Returns None if this thread has locked it already.
    pub(crate) fn lock(&self) -> Option<OwnedMutexGuard<'_, T>> {
        let this_thread = this_thread();
        // Only this thread writes its own identity, so a relaxed load cannot be wrong about it.
        if self.owner.load(Ordering::Relaxed) == this_thread {
            return None;
        }
        let guard = self.inner.lock();
        self.owner.store(this_thread, Ordering::Relaxed);
        Some(OwnedMutexGuard { owner: &self.owner, guard })
    }
}

/// A number that no other running thread has, and not 0.
fn this_thread() -> usize {
    #[cfg(shuttle)]
    return usize::from(shuttle::current::me()) + 1;
    #[cfg(not(shuttle))]
    {
        thread_local! {
            static THREAD: u8 = const { 0 };
        }
        THREAD.with(|byte| std::ptr::from_ref(byte).addr())
    }
}

impl<T> Deref for OwnedMutexGuard<'_, T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.guard
    }
}

impl<T> DerefMut for OwnedMutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.guard
    }
}

impl<T> Drop for OwnedMutexGuard<'_, T> {
    fn drop(&mut self) {
        // Before the guard is dropped, after which another thread may be the owner.
        self.owner.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::thread;

    #[test]
    fn panic_does_not_poison() {
        let (mutex, lock, owned) = (Mutex::new(1), RwLock::default(), OwnedMutex::<u8>::default());
        let panicked = catch_unwind(AssertUnwindSafe(|| {
            let _guards = (mutex.lock(), lock.write(), owned.lock());
            panic!("with all of them locked");
        }));
        assert!(panicked.is_err());
        assert_eq!(mutex.try_lock().map(|value| *value), Some(1));
        assert_eq!((*mutex.lock(), *lock.write()), (1, 0));
        assert!(owned.lock().is_some());
    }

    #[test]
    fn owner_gets_none_and_other_threads_wait() {
        let mutex: OwnedMutex<u8> = OwnedMutex::default();
        let mut guard = mutex.lock().unwrap();
        assert!(mutex.lock().is_none());
        thread::scope(|scope| {
            let other = scope.spawn(|| *mutex.lock().unwrap());
            *guard = 7;
            drop(guard);
            assert_eq!(other.join().unwrap(), 7);
        });
        assert!(mutex.lock().is_some());
    }

    #[test]
    fn passed_deadline_is_reported() {
        let (mutex, condvar) = (Mutex::new(()), Condvar::default());
        let (_guard, timed_out) = condvar.wait_until(mutex.lock(), Some(Instant::now() - Duration::from_millis(1)));
        assert!(timed_out);
    }
}
