//! The part of parking_lot that the library uses, over shuttle's locks.

use shuttle::sync as inner;
use std::ops::{Deref, DerefMut};
use std::time::Instant;

/// Not reentrant here: nothing that is searched locks it twice.
pub(crate) type ReentrantMutex<T> = Mutex<T>;

#[derive(Default)]
pub(crate) struct Mutex<T>(inner::Mutex<T>);

/// None only while it waits.
pub(crate) struct MutexGuard<'a, T>(Option<inner::MutexGuard<'a, T>>);

impl<T> Mutex<T> {
    pub(crate) const fn new(value: T) -> Self {
        Mutex(inner::Mutex::new(value))
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, T> {
        MutexGuard(Some(self.0.lock().unwrap()))
    }

    pub(crate) fn try_lock(&self) -> Option<MutexGuard<'_, T>> {
        self.0.try_lock().ok().map(|guard| MutexGuard(Some(guard)))
    }
}

impl<T> Deref for MutexGuard<'_, T> {
    type Target = T;
    fn deref(&self) -> &T {
        self.0.as_ref().unwrap()
    }
}

impl<T> DerefMut for MutexGuard<'_, T> {
    fn deref_mut(&mut self) -> &mut T {
        self.0.as_mut().unwrap()
    }
}

pub(crate) struct Condvar(inner::Condvar);

impl Condvar {
    pub(crate) fn new() -> Self {
        Condvar(inner::Condvar::new())
    }

    pub(crate) fn wait<T>(&self, guard: &mut MutexGuard<'_, T>) {
        guard.0 = guard.0.take().map(|guard| self.0.wait(guard).unwrap());
    }

    /// A deadline may pass at any moment, however far away it is, or not at all.
    pub(crate) fn wait_until<T>(&self, guard: &mut MutexGuard<'_, T>, _deadline: Instant) -> Waited {
        let passes: bool = shuttle::rand::Rng::r#gen(&mut shuttle::rand::thread_rng());
        if !passes {
            self.wait(guard);
        }
        Waited(passes)
    }

    pub(crate) fn notify_one(&self) {
        self.0.notify_one();
    }

    pub(crate) fn notify_all(&self) {
        self.0.notify_all();
    }
}

pub(crate) struct Waited(bool);

impl Waited {
    pub(crate) fn timed_out(&self) -> bool {
        self.0
    }
}

#[derive(Default)]
pub(crate) struct RwLock<T>(inner::RwLock<T>);

impl<T> RwLock<T> {
    pub(crate) fn read(&self) -> inner::RwLockReadGuard<'_, T> {
        self.0.read().unwrap()
    }

    pub(crate) fn write(&self) -> inner::RwLockWriteGuard<'_, T> {
        self.0.write().unwrap()
    }
}
