//! The network path to the peer: the round trip, and how many bytes may be in flight.
//!
//! The round trip is measured by PINGs and their PONGs, and smoothed as in RFC 6298. The congestion window follows the
//! delay, as in TCP Vegas and LEDBAT: nothing is lost on the way to a slow reader, so a queue shows only as a longer
//! round trip. The window grows while the round trip is at most `QUEUE` longer than the shortest one, and shrinks when
//! it is longer. So the queue in front of a slow link stays short, however many lanes share the link.

use std::time::{Duration, Instant};

/// The window of a new lane, and after a reconnect. It is never smaller.
const MIN_WINDOW: usize = 16 << 10;
/// Once the window has stopped doubling, it grows by this and a sixteenth of itself in each round trip.
const STEP: usize = 4 << 10;
/// The window shrinks when a round trip takes this much longer than the shortest one.
const QUEUE: Duration = Duration::from_millis(100);
/// If so many round trips were too long with the smallest window, this lane does not cause the delay.
const MAX_LONG_TRIPS: u32 = 8;
/// How long sent messages may stay unacknowledged before a PING asks for them: while the round trip is not known, at
/// least, and at most. It doubles with each PING that was not answered. To ask early costs one small message, since
/// only the answer decides what is sent again. To ask late delays everything that follows a loss, so one long round
/// trip must not slow it down.
pub(crate) const FIRST_ASK: Duration = Duration::from_millis(500);
const MIN_ASK: Duration = Duration::from_millis(200);
const MAX_ASK: Duration = Duration::from_secs(1);
/// A peer that is there answers a PING within this time.
pub(crate) const MAX_ANSWER: Duration = Duration::from_secs(10);
/// The same while the round trip is not known.
pub(crate) const FIRST_ANSWER: Duration = Duration::from_secs(3);

/// The path to the peer.
#[derive(Debug)]
pub(crate) struct Path {
    max_window: usize,
    window: usize,
    /// The smoothed round trip, and its mean deviation.
    smoothed: Option<(Duration, Duration)>,
    shortest: Option<Duration>,
    /// The window doubles with each round trip until one is too long.
    is_doubling: bool,
    /// When the window last changed: PINGs that were sent before do not show the effect.
    changed_at: Option<Instant>,
    /// How many round trips in a row were too long with the smallest window, and the shortest of them.
    long_trips: u32,
    shortest_long_trip: Duration,
}

impl Path {
    /// `limit`: how many bytes of the lane may be unacknowledged.
    pub(crate) fn new(limit: usize) -> Path {
        Path {
            max_window: limit.max(MIN_WINDOW),
            window: MIN_WINDOW,
            smoothed: None,
            shortest: None,
            is_doubling: true,
            changed_at: None,
            long_trips: 0,
            shortest_long_trip: Duration::MAX,
        }
    }

    /// There is another connection, and nothing is known about its path.
    pub(crate) fn reset(&mut self) {
        *self = Path::new(self.max_window);
    }

    /// The smoothed round trip. None: it is not known.
    pub(crate) fn round_trip(&self) -> Option<Duration> {
        self.smoothed.map(|(smoothed, _)| smoothed)
    }

    /// How many bytes may be in flight.
    pub(crate) fn window(&self) -> usize {
        self.window
    }

    /// A PING was answered. `used_window`: more than half of the window was in flight when it was sent.
    pub(crate) fn answered(&mut self, sent_at: Instant, now: Instant, used_window: bool) {
        let trip = now.saturating_duration_since(sent_at);
        self.smoothed = Some(match self.smoothed {
            None => (trip, trip / 2),
            Some((smoothed, deviation)) => ((smoothed * 7 + trip) / 8, (deviation * 3 + smoothed.abs_diff(trip)) / 4),
        });
        let shortest = self.shortest.map_or(trip, |shortest| shortest.min(trip));
        self.shortest = Some(shortest);
        if self.changed_at.is_some_and(|at| sent_at < at) {
            return;
        }
        let longest = shortest + QUEUE;
        if trip > longest {
            // What passes within `longest` at the present rate, but never less than half.
            let share = (longest.as_secs_f64() / trip.as_secs_f64()).max(0.5);
            self.is_doubling = false;
            self.set_window((self.window as f64 * share) as usize, now);
            self.count_long_trip(trip);
        } else {
            self.long_trips = 0;
            if used_window {
                let more = if self.is_doubling { self.window } else { STEP + self.window / 16 };
                self.set_window(self.window + more, now);
            }
        }
    }

    fn set_window(&mut self, window: usize, now: Instant) {
        self.window = window.clamp(MIN_WINDOW, self.max_window);
        self.changed_at = Some(now);
    }

    /// If round trips stay long with the smallest window, the path has become longer, or other traffic fills it: then
    /// the shortest of them counts from now on. Otherwise the lane would keep the smallest window until the next
    /// reconnect.
    fn count_long_trip(&mut self, trip: Duration) {
        if self.window > MIN_WINDOW {
            self.long_trips = 0;
            return;
        }
        self.shortest_long_trip = if self.long_trips == 0 { trip } else { self.shortest_long_trip.min(trip) };
        self.long_trips += 1;
        if self.long_trips == MAX_LONG_TRIPS {
            self.long_trips = 0;
            self.shortest = Some(self.shortest_long_trip);
        }
    }

    /// The longest that an answer should take (the timeout of RFC 6298, without bounds). None: the round trip is not
    /// known.
    fn timeout(&self) -> Option<Duration> {
        self.smoothed.map(|(smoothed, deviation)| smoothed + 4 * deviation)
    }

    /// How long sent messages may stay unacknowledged before a PING asks for them, after so many PINGs without an
    /// answer.
    pub(crate) fn ask_after(&self, asked: u32) -> Duration {
        let first = self.timeout().map_or(FIRST_ASK, |timeout| timeout.clamp(MIN_ASK, MAX_ASK));
        (first * (1 << asked.min(10))).min(MAX_ASK)
    }

    /// How long a peer that is there may be silent on this path. None: the round trip is not known.
    pub(crate) fn silence(&self) -> Option<Duration> {
        self.timeout().map(|timeout| (2 * timeout).min(MAX_ANSWER))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    /// Answers one PING after another, each sent when the one before was answered.
    fn answer(path: &mut Path, now: &mut Instant, trips: impl IntoIterator<Item = Duration>) {
        for trip in trips {
            let sent_at = *now;
            *now += trip;
            path.answered(sent_at, *now, true);
        }
    }

    #[test]
    fn window_doubles_on_a_short_path_up_to_the_limit() {
        let (mut path, mut now) = (Path::new(4 << 20), Instant::now());
        assert_eq!(path.window(), MIN_WINDOW);
        answer(&mut path, &mut now, [ms(1)]);
        assert_eq!(path.window(), 2 * MIN_WINDOW);
        answer(&mut path, &mut now, [ms(1); 10]);
        assert_eq!(path.window(), 4 << 20);
        path.reset();
        assert_eq!((path.window(), path.ask_after(0)), (MIN_WINDOW, FIRST_ASK));
    }

    #[test]
    fn window_grows_only_while_it_is_used() {
        let (mut path, now) = (Path::new(4 << 20), Instant::now());
        for n in 0..10 {
            path.answered(now + ms(n), now + ms(n + 1), false);
        }
        assert_eq!(path.window(), MIN_WINDOW);
    }

    #[test]
    fn window_grows_on_a_long_path_too() {
        let (mut path, mut now) = (Path::new(4 << 20), Instant::now());
        answer(&mut path, &mut now, [ms(2500); 8]);
        assert_eq!(path.window(), 4 << 20);
    }

    #[test]
    fn one_queue_shrinks_the_window_once() {
        let (mut path, mut now) = (Path::new(4 << 20), Instant::now());
        answer(&mut path, &mut now, [ms(10); 4]);
        let before = path.window();
        let early = now;
        answer(&mut path, &mut now, [ms(1000)]);
        assert_eq!(path.window(), before / 2);
        // This PING was sent before the window shrank.
        path.answered(early + ms(1), now + ms(100), true);
        assert_eq!(path.window(), before / 2);
    }

    /// The queue stays short, each lane goes on, and the link is used.
    #[test]
    fn lanes_share_a_slow_link() {
        for (lanes, rate, base) in
            [(1, 400_000, ms(1)), (6, 400_000, ms(1)), (10, 12_500_000, ms(20)), (6, 400_000, ms(600))]
        {
            let mut now = Instant::now();
            let mut paths: Vec<Path> = (0..lanes).map(|_| Path::new(4 << 20)).collect();
            let mut longest = Duration::ZERO;
            for round in 0..400 {
                let in_flight: usize = paths.iter().map(Path::window).sum();
                let trip = base.max(Duration::from_secs_f64(in_flight as f64 / f64::from(rate)));
                if round >= 200 {
                    longest = longest.max(trip);
                }
                paths.iter_mut().for_each(|path| path.answered(now, now + trip, true));
                now += trip + ms(1);
            }
            // All lanes together may add the smallest windows to what one lane adds.
            let bound = base + 2 * QUEUE + Duration::from_secs_f64(2.0 * (lanes * MIN_WINDOW) as f64 / f64::from(rate));
            assert!(longest < bound, "{lanes} lanes: {longest:?}, {bound:?}");
            let in_flight: usize = paths.iter().map(Path::window).sum();
            assert!(in_flight as f64 > 0.9 * f64::from(rate) * base.as_secs_f64(), "{lanes} lanes: {in_flight}");
        }
    }

    #[test]
    fn window_grows_again_when_the_path_has_become_longer() {
        let (mut path, mut now) = (Path::new(4 << 20), Instant::now());
        answer(&mut path, &mut now, [ms(10); 10]);
        answer(&mut path, &mut now, [ms(400); 40]);
        assert!(path.window() > 100_000, "{}", path.window());
    }

    #[test]
    fn timeouts_follow_the_round_trip() {
        let (mut path, mut now) = (Path::new(1), Instant::now());
        assert_eq!((path.ask_after(0), path.ask_after(1), path.silence()), (FIRST_ASK, 2 * FIRST_ASK, None));
        assert_eq!(path.ask_after(99), MAX_ASK);
        answer(&mut path, &mut now, [ms(1); 20]);
        assert_eq!(path.ask_after(0), MIN_ASK);
        assert!(path.silence().unwrap() < ms(10));
        answer(&mut path, &mut now, [ms(2500); 40]);
        assert_eq!((path.ask_after(0), path.ask_after(9)), (MAX_ASK, MAX_ASK));
        assert!(path.silence().unwrap() >= ms(5000));
    }
}
