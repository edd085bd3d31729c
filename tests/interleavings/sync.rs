//! The interface of `src/sync.rs` over shuttle's locks.

use shuttle::sync as inner;
use std::time::Instant;

pub(crate) use inner::{MutexGuard, RwLockReadGuard, RwLockWriteGuard};

#[derive(Default)]
pub(crate) struct Mutex<T>(inner::Mutex<T>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Mutex(inner::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        self.0.lock().unwrap()
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok()
    }
}

#[derive(Default)]
pub(crate) struct Condvar(inner::Condvar);

impl Condvar {
    pub(crate) fn wait<'a, T>(&self, guard: MutexGuard<'a, T>) -> MutexGuard<'a, T> {
        self.0.wait(guard).unwrap()
    }

    /// A deadline may pass at any moment, however far away it is, or not at all.
    pub(crate) fn wait_until<'a, T>(&self, guard: MutexGuard<'a, T>, _deadline: Instant) -> (MutexGuard<'a, T>, bool) {
        let passes: bool = shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng());
        (if passes { guard } else { self.wait(guard) }, passes)
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

#[derive(Default)]
pub(crate) struct RwLock<T>(inner::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) fn read(&self) -> RwLockReadGuard<'_, T> {
        self.0.read().unwrap()
    }

    pub(crate) fn write(&self) -> RwLockWriteGuard<'_, T> {
        self.0.write().unwrap()
    }
}

/// No thread that is searched asks twice.
#[derive(Default)]
pub(crate) struct OwnedMutex<T>(Mutex<T>);

pub(crate) type OwnedMutexGuard<'a, T> = MutexGuard<'a, T>;

impl<T> OwnedMutex<T> {
    pub(crate) fn lock(&self) -> Option<OwnedMutexGuard<'_, T>> {
        Some(self.0.lock())
    }
}
