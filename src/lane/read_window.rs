//! The reader's side of a stream's window: when to return credit to the worker, and when the window grows.

use crate::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

/// The largest window, in bytes.
pub(crate) const MAX_WINDOW: u32 = 4 << 20;

/// The window grows if its reader takes a whole window within this time or within two round trips, whichever is longer.
/// A worker has to wait for credit for at least one round trip once the window is full.
const FAST: Duration = Duration::from_millis(10);

/// The window of a stream, at its reader.
#[derive(Debug)]
pub(crate) struct ReadWindow {
    /// 0 once the stream has ended.
    size: AtomicU32,
    /// Credit is returned for more than this.
    credit_after: u32,
    may_grow: bool,
    /// What the reader has taken and no credit was returned for.
    consumed: AtomicU32,
    /// Credit that was returned since `began_ms`, the age of the stream then, in milliseconds.
    measured: AtomicU32,
    began_ms: AtomicU32,
}

impl ReadWindow {
    pub(crate) fn new(size: u32, may_grow: bool) -> ReadWindow {
        ReadWindow {
            size: AtomicU32::new(size),
            // At most a half may be without credit: then the sender may send whatever it has. With a quarter it gets
            // the credit before its window is used up, which is a third faster with the default window. This does not
            // grow with the window, for a worker of an earlier version does not know that the window has grown.
            credit_after: size / 4,
            may_grow,
            consumed: AtomicU32::new(0),
            measured: AtomicU32::new(0),
            began_ms: AtomicU32::new(0),
        }
    }

    /// Adds what the reader has taken, and returns the credit to return now.
    pub(crate) fn consume(&self, weight: u64) -> Option<u64> {
        // No more than this is ever unread, so that the sum cannot overflow.
        let weight = weight.min(1 << 30) as u32;
        let consumed = self.consumed.fetch_add(weight, Ordering::Relaxed).saturating_add(weight);
        (consumed > self.credit_after).then(|| self.consumed.swap(0, Ordering::Relaxed).into())
    }

    /// Called with the credit that is returned and the age of the stream. Returns by how much the window should grow, if
    /// it should.
    pub(crate) fn growth(
        &self,
        credit: u64,
        age: impl FnOnce() -> Duration,
        round_trip: impl FnOnce() -> Option<Duration>,
    ) -> Option<u32> {
        let size = self.size.load(Ordering::Relaxed);
        if !self.may_grow || size >= MAX_WINDOW {
            return None;
        }
        let credit = u32::try_from(credit).unwrap_or(u32::MAX);
        if self.measured.fetch_add(credit, Ordering::Relaxed).saturating_add(credit) < size {
            return None;
        }
        self.measured.store(0, Ordering::Relaxed);
        let age_ms = age().as_millis() as u32;
        let took = age_ms.wrapping_sub(self.began_ms.swap(age_ms, Ordering::Relaxed));
        let took = Duration::from_millis(took.into());
        let is_fast = took < FAST || round_trip().is_some_and(|trip| took < 2 * trip);
        is_fast.then(|| size.min(MAX_WINDOW - size))
    }

    /// Grows by this much. Returns the new size; None if the stream has ended.
    pub(crate) fn grow(&self, by: u32) -> Option<u32> {
        let grow = |size: u32| if size == 0 { None } else { size.checked_add(by) };
        self.size.fetch_update(Ordering::Relaxed, Ordering::Relaxed, grow).ok().map(|size| size + by)
    }

    /// The stream has ended. Returns the size that it had; 0 if this was called before.
    pub(crate) fn release(&self) -> u32 {
        self.size.swap(0, Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn credit_is_returned_for_more_than_a_quarter() {
        let window = ReadWindow::new(100, false);
        assert_eq!([25, 1, 25, 50].map(|weight| window.consume(weight)), [None, Some(26), None, Some(75)]);
    }

    #[test]
    fn a_window_grows_when_its_reader_takes_all_of_it_fast() {
        let window = ReadWindow::new(1 << 20, true);
        let growth = |credit, age, trip: Option<u64>| window.growth(credit, || ms(age), || trip.map(ms));
        assert_eq!(growth(1 << 19, 1, None), None, "half of the window was taken");
        assert_eq!(growth(1 << 19, 9, None), Some(1 << 20));
        // 11 ms later: too slow, unless a round trip takes long.
        assert_eq!(growth(1 << 20, 20, Some(5)), None);
        assert_eq!(growth(1 << 20, 220, Some(101)), Some(1 << 20));
        // Twice the size needs twice as much.
        assert_eq!(window.grow(1 << 20), Some(2 << 20));
        assert_eq!(growth(1 << 20, 221, None), None);
        assert_eq!(growth(1 << 20, 222, None), Some(2 << 20));
        assert_eq!(window.grow(2 << 20), Some(MAX_WINDOW));
        assert_eq!(growth(1 << 30, 223, None), None, "it is as large as it may be");
        assert_eq!((window.release(), window.release(), window.grow(1)), (MAX_WINDOW, 0, None));
    }

    #[test]
    fn a_window_that_was_set_does_not_grow() {
        let window = ReadWindow::new(100, false);
        assert_eq!(window.growth(1 << 30, || ms(0), || None), None);
    }
}
