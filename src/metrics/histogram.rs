//! Histograms of durations with fixed buckets.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How many bounds a histogram has. The last bucket has none.
const BOUNDS: usize = 12;

/// The upper bounds of a histogram's buckets, in microseconds.
pub(crate) type Bounds = [u64; BOUNDS];

const MS: u64 = 1000;
const SECOND: u64 = 1000 * MS;
const MINUTE: u64 = 60 * SECOND;

/// From an answer that is ready to one that takes an hour.
pub(super) const STREAM_DURATION: Bounds = [
    10 * MS,
    100 * MS,
    500 * MS,
    SECOND,
    5 * SECOND,
    10 * SECOND,
    30 * SECOND,
    MINUTE,
    5 * MINUTE,
    10 * MINUTE,
    30 * MINUTE,
    60 * MINUTE,
];
/// From a round trip on one machine to half a minute of computing.
pub(super) const FIRST_MESSAGE: Bounds = [
    MS,
    5 * MS,
    10 * MS,
    50 * MS,
    100 * MS,
    250 * MS,
    500 * MS,
    SECOND,
    2 * SECOND + 500 * MS,
    5 * SECOND,
    10 * SECOND,
    30 * SECOND,
];
/// From a thread that is woken at once to a worker that does not look.
pub(super) const STOP_LATENCY: Bounds =
    [100, 250, MS, 5 * MS, 10 * MS, 50 * MS, 100 * MS, 500 * MS, SECOND, 5 * SECOND, 10 * SECOND, MINUTE];

/// How many durations fell into each bucket, and their sum.
pub(crate) struct Histogram {
    bounds: &'static Bounds,
    counts: [AtomicU64; BOUNDS + 1],
    /// In microseconds, which last for 58 years with 10,000 streams at a time.
    sum: AtomicU64,
}

impl Histogram {
    pub(super) fn new(bounds: &'static Bounds) -> Histogram {
        Histogram { bounds, counts: Default::default(), sum: AtomicU64::new(0) }
    }

    pub(super) fn observe(&self, duration: Duration) {
        let micros = u64::try_from(duration.as_micros()).unwrap_or(u64::MAX);
        let bucket = self.bounds.iter().position(|bound| micros <= *bound).unwrap_or(BOUNDS);
        self.counts[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum.fetch_add(micros, Ordering::Relaxed);
    }

    pub(super) fn add(&self, other: &Histogram) {
        for (own, other) in self.counts.iter().zip(&other.counts) {
            own.fetch_add(other.load(Ordering::Relaxed), Ordering::Relaxed);
        }
        self.sum.fetch_add(other.sum.load(Ordering::Relaxed), Ordering::Relaxed);
    }

    /// Returns for each bound, in seconds, how many durations were not longer. The last bound is infinite, so its
    /// number is that of all.
    pub(super) fn cumulative(&self) -> impl Iterator<Item = (f64, u64)> {
        let bounds = self.bounds.iter().map(|micros| seconds(*micros)).chain([f64::INFINITY]);
        bounds.zip(self.counts.iter().scan(0, |sum, count| {
            *sum += count.load(Ordering::Relaxed);
            Some(*sum)
        }))
    }

    /// Returns how many durations there are, and their sum in nanoseconds.
    pub(crate) fn count_and_nanos(&self) -> (u64, u64) {
        let count = self.counts.iter().map(|count| count.load(Ordering::Relaxed)).sum();
        (count, self.sum.load(Ordering::Relaxed).saturating_mul(1000))
    }

    /// Returns the sum of all durations, in seconds.
    pub(super) fn sum(&self) -> f64 {
        seconds(self.sum.load(Ordering::Relaxed))
    }
}

fn seconds(micros: u64) -> f64 {
    micros as f64 / SECOND as f64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_duration_falls_into_the_first_bucket_whose_bound_it_does_not_exceed() {
        let histogram = Histogram::new(&STOP_LATENCY);
        for micros in [0, 100, 101, MINUTE, MINUTE + 1, u64::MAX / 2] {
            histogram.observe(Duration::from_micros(micros));
        }
        let cumulative: Vec<_> = histogram.cumulative().collect();
        assert_eq!(cumulative[..3], [(0.0001, 2), (0.00025, 3), (0.001, 3)]);
        assert_eq!(cumulative[11..], [(60.0, 4), (f64::INFINITY, 6)]);
    }

    #[test]
    fn bounds_rise() {
        for bounds in [&STREAM_DURATION, &FIRST_MESSAGE, &STOP_LATENCY] {
            assert!(bounds.is_sorted_by(|a, b| a < b), "{bounds:?}");
        }
    }

    #[test]
    fn sums_add_up() {
        let (one, two) = (Histogram::new(&FIRST_MESSAGE), Histogram::new(&FIRST_MESSAGE));
        one.observe(Duration::from_millis(1500));
        two.observe(Duration::from_millis(250));
        two.add(&one);
        assert_eq!((two.sum(), two.cumulative().last()), (1.75, Some((f64::INFINITY, 2))));
    }
}
