//! The counters of a connection, of its services, and of the streams of both roles.

use crate::error::Status;
use crate::metrics::histogram::{FIRST_MESSAGE, Histogram, STOP_LATENCY, STREAM_DURATION};
use crate::process::fork::PerProcess;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// How many subjects have metrics of their own in a process. Each has about 60 time series.
const MAX_SUBJECTS: usize = 100;
/// Stands for all further ones. It has a space, which no subject has.
const OTHER_SUBJECTS: &str = "other subjects";

/// What the parts of a connection count.
#[derive(Default)]
pub(crate) struct Counters {
    /// How often a connection to nats-server was made, and how often another one.
    pub(crate) connects: AtomicU64,
    pub(crate) reconnects: AtomicU64,
    pub(crate) messages_out: AtomicU64,
    pub(crate) messages_in: AtomicU64,
    pub(crate) messages_ignored: AtomicU64,
    pub(crate) offline_out: AtomicU64,
    pub(crate) offline_in: AtomicU64,
    /// Lane messages that were sent again.
    pub(crate) resent: AtomicU64,
    /// The windows of all streams requested here, in bytes.
    pub(crate) windows: AtomicU64,
    /// On level 0, the bytes that wait for the readers of streams.
    pub(crate) unread: AtomicU64,
    pub(crate) requested: Arc<StreamCounters>,
    /// By subject. The lock is taken when a service begins and when the counters are read.
    served: Mutex<BTreeMap<Arc<str>, Arc<ServiceCounters>>>,
}

impl Counters {
    /// Returns the counters of the services of a subject.
    pub(crate) fn service(&self, subject: &str) -> Arc<ServiceCounters> {
        self.service_by_label(subject_label(subject))
    }

    fn service_by_label(&self, label: Arc<str>) -> Arc<ServiceCounters> {
        Arc::clone(self.served.lock().entry(label).or_default())
    }

    /// Returns the counters of all services, each with its subject.
    pub(crate) fn services(&self) -> Vec<(Arc<str>, Arc<ServiceCounters>)> {
        self.served.lock().iter().map(|(subject, service)| (Arc::clone(subject), Arc::clone(service))).collect()
    }

    /// Adds what another connection has counted.
    pub(crate) fn add(&self, other: &Counters) {
        for (own, other) in [
            (&self.reconnects, &other.reconnects),
            (&self.messages_out, &other.messages_out),
            (&self.messages_in, &other.messages_in),
            (&self.messages_ignored, &other.messages_ignored),
            (&self.offline_out, &other.offline_out),
            (&self.offline_in, &other.offline_in),
            (&self.resent, &other.resent),
        ] {
            add(own, other);
        }
        self.requested.add(&other.requested);
        for (subject, service) in other.services() {
            self.service_by_label(subject).add(&service);
        }
    }
}

/// What the services of a subject count.
#[derive(Default)]
pub(crate) struct ServiceCounters {
    pub(crate) requests: AtomicU64,
    pub(crate) requests_busy: AtomicU64,
    pub(crate) requests_ignored: AtomicU64,
    pub(crate) streams: Arc<StreamCounters>,
}

impl ServiceCounters {
    fn add(&self, other: &ServiceCounters) {
        add(&self.requests, &other.requests);
        add(&self.requests_busy, &other.requests_busy);
        add(&self.requests_ignored, &other.requests_ignored);
        self.streams.add(&other.streams);
    }
}

/// What is counted for the streams of one role.
pub(crate) struct StreamCounters {
    pub(crate) running: AtomicU64,
    pub(crate) started: AtomicU64,
    /// By status, as in `Status::ALL`.
    ended: [AtomicU64; Status::ALL.len()],
    pub(crate) duration: Histogram,
    pub(crate) first_message: Histogram,
    pub(crate) stop_latency: Histogram,
}

impl Default for StreamCounters {
    fn default() -> StreamCounters {
        StreamCounters {
            running: AtomicU64::new(0),
            started: AtomicU64::new(0),
            ended: Default::default(),
            duration: Histogram::new(&STREAM_DURATION),
            first_message: Histogram::new(&FIRST_MESSAGE),
            stop_latency: Histogram::new(&STOP_LATENCY),
        }
    }
}

impl StreamCounters {
    /// Returns how many streams ended with this status; `Ok` if the worker ended them.
    pub(crate) fn ended(&self, status: Status) -> u64 {
        self.ended[index(status)].load(Ordering::Relaxed)
    }

    fn add(&self, other: &StreamCounters) {
        add(&self.running, &other.running);
        add(&self.started, &other.started);
        self.ended.iter().zip(&other.ended).for_each(|(own, other)| add(own, other));
        self.duration.add(&other.duration);
        self.first_message.add(&other.first_message);
        self.stop_latency.add(&other.stop_latency);
    }
}

fn index(status: Status) -> usize {
    status.code().unsigned_abs() as usize
}

/// Counts one stream while it runs.
pub(crate) struct StreamTimes {
    counters: Arc<StreamCounters>,
    begun: Instant,
}

impl StreamTimes {
    /// The stream runs from now on.
    pub(crate) fn begin(counters: &Arc<StreamCounters>) -> StreamTimes {
        counters.running.fetch_add(1, Ordering::Relaxed);
        StreamTimes { counters: Arc::clone(counters), begun: Instant::now() }
    }

    /// How long it has run.
    pub(crate) fn age(&self) -> Duration {
        self.begun.elapsed()
    }

    /// The stream is not taken back any more.
    pub(crate) fn started(&self) {
        count(&self.counters.started);
    }

    /// Its first message was sent, or came.
    #[cold]
    pub(crate) fn first_message(&self) {
        self.counters.first_message.observe(self.begun.elapsed());
    }

    /// The stream was taken back: nothing began and nothing ended.
    pub(crate) fn withdrawn(&self) {
        self.counters.running.fetch_sub(1, Ordering::Relaxed);
    }

    /// The stream has ended. Returns how long it ran.
    pub(crate) fn ended(&self, status: Status) -> Duration {
        let duration = self.begun.elapsed();
        self.withdrawn();
        count(&self.counters.ended[index(status)]);
        self.counters.duration.observe(duration);
        duration
    }
}

/// Measures how long a worker goes on with a stream that was stopped: from the stop to the call by which the worker ends
/// its sender. The two may happen at the same time, and each stop is measured once.
#[derive(Default)]
pub(crate) struct StopTimer(AtomicU64);

/// The worker has ended its sender. Other numbers than 0 are when the stream was stopped, in microseconds after 1 µs
/// before it began.
const RELEASED: u64 = u64::MAX;

impl StopTimer {
    /// The stream was stopped after it had run so long.
    pub(crate) fn stopped(&self, times: &StreamTimes, after: Duration) {
        if self.0.compare_exchange(0, micros(after), Ordering::Relaxed, Ordering::Relaxed).is_err() {
            times.counters.stop_latency.observe(Duration::ZERO);
        }
    }

    /// The worker ends its sender. A second call has no effect.
    pub(crate) fn released(&self, times: &StreamTimes) {
        match self.0.swap(RELEASED, Ordering::Relaxed) {
            0 | RELEASED => {}
            stopped => {
                let latency = Duration::from_micros(micros(times.begun.elapsed()).saturating_sub(stopped));
                times.counters.stop_latency.observe(latency);
            }
        }
    }
}

fn micros(after: Duration) -> u64 {
    u64::try_from(after.as_micros()).map_or(RELEASED - 1, |micros| micros + 1)
}

/// Adds one to a counter.
pub(crate) fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn add(own: &AtomicU64, other: &AtomicU64) {
    own.fetch_add(other.load(Ordering::Relaxed), Ordering::Relaxed);
}

/// Returns the label of a served subject: the subject itself, for the first ones of the process.
fn subject_label(subject: &str) -> Arc<str> {
    static SUBJECTS: PerProcess<Mutex<Vec<Arc<str>>>> = PerProcess::new();
    label_of(&mut SUBJECTS.get(Mutex::default).lock(), subject)
}

fn label_of(known: &mut Vec<Arc<str>>, subject: &str) -> Arc<str> {
    if let Some(label) = known.iter().find(|known| ***known == *subject) {
        return Arc::clone(label);
    }
    let is_further = known.len() == MAX_SUBJECTS;
    let label = Arc::from(if is_further { OTHER_SUBJECTS } else { subject });
    if !is_further {
        known.push(Arc::clone(&label));
    }
    label
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::thread;

    fn total(histogram: &Histogram) -> u64 {
        histogram.cumulative().last().unwrap().1
    }

    #[test]
    fn subjects_are_told_apart_up_to_a_limit() {
        let mut known = Vec::new();
        for number in 0..MAX_SUBJECTS {
            assert_eq!(*label_of(&mut known, &format!("s{number}")), *format!("s{number}"));
        }
        assert_eq!(*label_of(&mut known, "one more"), *OTHER_SUBJECTS);
        assert_eq!((&*label_of(&mut known, "s7"), known.len()), ("s7", MAX_SUBJECTS));
    }

    #[test]
    fn a_stop_is_measured_once_whoever_comes_first() {
        let counters = Arc::default();
        let times = StreamTimes::begin(&counters);
        let (late, early, never) = (StopTimer::default(), StopTimer::default(), StopTimer::default());
        late.stopped(&times, Duration::ZERO);
        assert_eq!(total(&counters.stop_latency), 0);
        late.released(&times);
        late.released(&times);
        assert_eq!(total(&counters.stop_latency), 1);
        early.released(&times);
        early.stopped(&times, Duration::ZERO);
        assert_eq!(total(&counters.stop_latency), 2);
        never.released(&times);
        assert_eq!(total(&counters.stop_latency), 2);
        for _ in 0..200 {
            let timer = StopTimer::default();
            thread::scope(|scope| {
                scope.spawn(|| timer.stopped(&times, Duration::ZERO));
                scope.spawn(|| timer.released(&times));
            });
        }
        assert_eq!(total(&counters.stop_latency), 202);
    }

    #[test]
    fn a_stream_is_counted_while_it_runs_and_when_it_ends() {
        let counters = Arc::default();
        let streams: [StreamTimes; 3] = std::array::from_fn(|_| StreamTimes::begin(&counters));
        streams[0].started();
        streams[1].started();
        streams[2].withdrawn();
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!((get(&counters.running), get(&counters.started)), (2, 2));
        streams[0].ended(Status::Ok);
        streams[1].ended(Status::PeerGone);
        assert_eq!((get(&counters.running), get(&counters.started)), (0, 2));
        assert_eq!([Status::Ok, Status::PeerGone, Status::Internal].map(|why| counters.ended(why)), [1, 1, 0]);
        assert_eq!(total(&counters.duration), 2);
    }

    #[test]
    fn what_connections_count_adds_up() {
        let (one, sum) = (Counters::default(), Counters::default());
        count(&one.messages_in);
        count(&one.service("add.up").requests);
        StreamTimes::begin(&one.requested).ended(Status::Offline);
        sum.add(&one);
        sum.add(&one);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        assert_eq!((get(&sum.messages_in), get(&sum.service("add.up").requests)), (2, 2));
        assert_eq!((sum.requested.ended(Status::Offline), total(&sum.requested.duration)), (2, 2));
    }
}
