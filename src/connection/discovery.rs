//! NATS's service protocol (ADR-32 of nats-architecture-and-design): what `nats micro ls`, `info` and `stats` show.
//!
//! A connection that serves subjects is one service of that protocol, and each subject is one of its endpoints. It
//! answers requests on `$SRV.PING`, `$SRV.INFO` and `$SRV.STATS`, and on the same with its name, or its name and its id.
//!
//! Nothing else depends on it. If nats-server refuses its subscriptions, or has room for other subscriptions only
//! without them, the connection goes on without them.

use crate::connection::Connection;
use crate::error::Status;
use crate::metrics::ServiceCounters;
use crate::nats::inbound::MessageHandler;
use crate::nats::outbox::OutgoingItem;
use crate::nats::{Message, Subject};
use crate::process::random;
use crate::status_word::StatusWord;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use crate::wire::level0;
use serde_json::{Value, json};
use std::sync::{Arc, Weak};
use std::time::{SystemTime, UNIX_EPOCH};

/// The ids of the subscriptions. The highest ones: if nats-server has too few subscriptions for all, it refuses those
/// that are made last.
const SUBSCRIPTIONS: [u64; 3] = [u64::MAX - 2, u64::MAX - 1, u64::MAX];

/// The connection as a service of NATS's service protocol.
pub(crate) struct Discovery {
    connection: Weak<Connection>,
    name: String,
    id: String,
    started: SystemTime,
    endpoints: Mutex<Vec<Arc<Endpoint>>>,
    is_subscribed: AtomicBool,
}

/// A served subject. Its counters are those of presence_metrics, so services of one subject share them.
pub(crate) struct Endpoint {
    subject: Box<str>,
    group: Box<str>,
    pub(crate) counters: Arc<ServiceCounters>,
}

impl Endpoint {
    pub(crate) fn new(subject: &str, group: &str, counters: Arc<ServiceCounters>) -> Endpoint {
        Endpoint { subject: subject.into(), group: group.into(), counters }
    }

    fn info(&self) -> Value {
        json!({
            "name": to_name(&self.subject),
            "subject": self.subject,
            "queue_group": self.group,
            "metadata": {},
        })
    }

    fn stats(&self) -> Value {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let ServiceCounters { requests, requests_busy, requests_ignored, streams } = &*self.counters;
        let failed = streams.ended(Status::Remote) + streams.ended(Status::Busy);
        let (ended, duration) = streams.duration.count_and_nanos();
        json!({
            "name": to_name(&self.subject),
            "subject": self.subject,
            "queue_group": self.group,
            "num_requests": get(requests),
            "num_errors": get(requests_busy) + get(requests_ignored) + failed,
            // The texts of errors are meant for those who requested the streams, not for everybody.
            "last_error": "",
            "processing_time": duration,
            "average_processing_time": duration.checked_div(ended).unwrap_or_default(),
        })
    }
}

impl Discovery {
    pub(super) fn new(connection: Weak<Connection>, name: &str) -> Discovery {
        Discovery {
            connection,
            name: to_name(name),
            id: random::token(),
            started: SystemTime::now(),
            endpoints: Mutex::default(),
            is_subscribed: AtomicBool::new(false),
        }
    }

    /// Returns the answer to a request on this subject, or None if it asks for another service.
    fn answer(&self, subject: &str) -> Option<Value> {
        let mut words = subject.split('.').skip(1);
        let verb = words.next()?;
        let is_other =
            words.next().is_some_and(|name| name != self.name) || words.next().is_some_and(|id| id != self.id);
        let endpoints = self.endpoints.lock();
        if is_other || words.next().is_some() || endpoints.is_empty() {
            return None;
        }
        let mut answer = json!({
            "name": self.name,
            "id": self.id,
            "version": env!("CARGO_PKG_VERSION"),
            "metadata": {"library": "nats-presence"},
        });
        let (kind, fields) = match verb {
            "PING" => ("ping", vec![]),
            "INFO" => {
                let endpoints: Vec<Value> = endpoints.iter().map(|endpoint| endpoint.info()).collect();
                ("info", vec![("description", "".into()), ("endpoints", endpoints.into())])
            }
            "STATS" => {
                let endpoints: Vec<Value> = endpoints.iter().map(|endpoint| endpoint.stats()).collect();
                ("stats", vec![("started", rfc3339(self.started).into()), ("endpoints", endpoints.into())])
            }
            _ => return None,
        };
        answer["type"] = format!("io.nats.micro.v1.{kind}_response").into();
        fields.into_iter().for_each(|(name, value)| answer[name] = value);
        Some(answer)
    }
}

impl Connection {
    /// Shows a subject that this connection serves from now on.
    pub(crate) fn add_endpoint(&self, endpoint: &Arc<Endpoint>) {
        if !self.options.discovery {
            return;
        }
        self.discovery.endpoints.lock().push(Arc::clone(endpoint));
        if !self.discovery.is_subscribed.swap(true, Ordering::AcqRel) {
            let Discovery { name, id, .. } = &*self.discovery;
            let subjects = ["$SRV.*".into(), format!("$SRV.*.{name}"), format!("$SRV.*.{name}.{id}")];
            for (id, subject) in SUBSCRIPTIONS.into_iter().zip(subjects) {
                self.subscribe(id, subject.into(), "", Arc::clone(&self.discovery) as Arc<dyn MessageHandler>);
            }
        }
    }

    /// Shows a subject no longer.
    pub(crate) fn remove_endpoint(&self, endpoint: &Arc<Endpoint>) {
        self.discovery.endpoints.lock().retain(|other| !Arc::ptr_eq(other, endpoint));
    }

    /// nats-server refuses this subscription: ends it, without a report, if it is one of the service protocol. Returns
    /// false for others.
    pub(super) fn discovery_refused(&self, id: u64) -> bool {
        let is_own = SUBSCRIPTIONS.contains(&id);
        if is_own {
            self.subscriptions.lock().remove(&id);
            self.outbox.push(OutgoingItem::Unsubscribe(id));
        }
        is_own
    }

    /// Returns true if nats-server has, or gets, subscriptions of the service protocol.
    pub(crate) fn has_discovery(&self) -> bool {
        let subscriptions = self.subscriptions.lock();
        SUBSCRIPTIONS.iter().any(|id| subscriptions.contains_key(id))
    }

    /// Makes room for other subscriptions: ends those of the service protocol.
    pub(crate) fn end_discovery(&self) {
        SUBSCRIPTIONS.into_iter().for_each(|id| self.unsubscribe(id));
    }
}

impl MessageHandler for Discovery {
    fn message(&self, message: Message) {
        let Some(connection) = self.connection.upgrade() else { return };
        let is_valid = |reply: &&Subject| level0::is_valid_reply_subject(reply, &connection.options.offline_subject);
        let Some(reply) = message.reply.as_ref().filter(is_valid) else { return };
        if connection.check_open().is_ok()
            && let Some(answer) = self.answer(&message.subject)
        {
            // Dropped if the outbox is full: it is needed for streams.
            let _: Result<(), Status> =
                connection.outbox.send(&StatusWord::default(), reply, answer.to_string().as_bytes(), || None);
        }
    }
}

/// Makes a name of the service protocol, which has letters, digits, `-` and `_` only.
fn to_name(text: &str) -> String {
    let name: String = text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    if name.is_empty() { "_".into() } else { name }
}

/// A time as RFC 3339 has it, in UTC.
fn rfc3339(time: SystemTime) -> String {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let (days, time) = (seconds / 86_400, seconds % 86_400);
    // The date by the days since 1 March of the year 0: then the leap day is the last one of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * month + 2) / 5 + 1, if month < 10 { month + 3 } else { month - 9 });
    let year = 400 * era + year_of_era + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}T{:02}:{:02}:{:02}Z", time / 3600, time / 60 % 60, time % 60)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::StreamTimes;
    use std::time::Duration;

    fn discovery() -> Discovery {
        let discovery = Discovery::new(Weak::new(), "my worker.1");
        let served = [("llm.\"generate\"", "workers"), ("a.*.>", "")];
        let endpoints = served.map(|(subject, group)| Arc::new(Endpoint::new(subject, group, Arc::default())));
        discovery.endpoints.lock().extend(endpoints);
        discovery
    }

    #[test]
    fn times_are_written_as_rfc_3339_has_them() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00Z"),
            (951_782_399, "2000-02-28T23:59:59Z"),
            (951_782_400, "2000-02-29T00:00:00Z"),
            (951_868_800, "2000-03-01T00:00:00Z"),
            (1_798_761_599, "2026-12-31T23:59:59Z"),
            (4_107_542_400, "2100-03-01T00:00:00Z"),
        ] {
            assert_eq!(rfc3339(UNIX_EPOCH + Duration::from_secs(seconds)), text);
        }
    }

    #[test]
    fn only_requests_for_this_service_are_answered() {
        let discovery = discovery();
        let id = discovery.id.clone();
        for verb in ["PING", "INFO", "STATS"] {
            for subject in
                [format!("$SRV.{verb}"), format!("$SRV.{verb}.my_worker_1"), format!("$SRV.{verb}.my_worker_1.{id}")]
            {
                let answer = discovery.answer(&subject).unwrap();
                let kind = verb.to_lowercase();
                assert_eq!(answer["type"], format!("io.nats.micro.v1.{kind}_response"), "{subject}");
                assert_eq!((&answer["name"], &answer["id"]), (&json!("my_worker_1"), &json!(id)), "{subject}");
            }
        }
        for subject in [
            "$SRV",
            "$SRV.SCHEMA",
            "$SRV.ping",
            "$SRV.PING.other",
            "$SRV.PING.my_worker_1.x",
            "$SRV.PING.my_worker_1.x.y",
        ] {
            assert_eq!(discovery.answer(subject), None, "{subject}");
        }
        discovery.endpoints.lock().clear();
        assert_eq!(discovery.answer("$SRV.PING"), None, "it serves nothing");
    }

    #[test]
    fn statistics_are_those_of_the_endpoint() {
        let discovery = discovery();
        {
            let endpoints = discovery.endpoints.lock();
            let counters = &endpoints[0].counters;
            counters.requests.fetch_add(5, Ordering::Relaxed);
            counters.requests_busy.fetch_add(1, Ordering::Relaxed);
            counters.requests_ignored.fetch_add(1, Ordering::Relaxed);
            for status in [Status::Ok, Status::Remote, Status::Cancelled] {
                StreamTimes::begin(&counters.streams).ended(status);
            }
        }
        let stats = discovery.answer("$SRV.STATS").unwrap();
        let duration = stats["endpoints"][0]["processing_time"].as_u64().unwrap();
        let expected = json!({
            "name": "llm__generate_", "subject": "llm.\"generate\"", "queue_group": "workers", "num_requests": 5,
            "num_errors": 3, "last_error": "", "processing_time": duration, "average_processing_time": duration / 3,
        });
        assert_eq!(stats["endpoints"][0], expected);
        assert_eq!(
            (&stats["endpoints"][1]["average_processing_time"], &stats["endpoints"][1]["name"]),
            (&json!(0), &json!("a____"))
        );
        let info = discovery.answer("$SRV.INFO").unwrap();
        assert_eq!(
            info["endpoints"][1],
            json!({"name": "a____", "subject": "a.*.>", "queue_group": "", "metadata": {}})
        );
    }
}
