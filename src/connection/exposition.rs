//! The metrics of the process, as OpenMetrics text.
//!
//! They are those of all connections together, for an endpoint that Prometheus scrapes belongs to a process. What a
//! connection has counted stays in the sums after its end, so that no counter ever decreases.

use crate::connection::Connection;
use crate::error::Status;
use crate::lane::lanes::LaneGauges;
use crate::metrics::{Counters, Histogram, Kind, StreamCounters, Text};
use crate::presence::registry;
use crate::process::fork::PerProcess;
use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// How the streams that a worker served may have ended, and those that a gateway requested. They are written even if
/// there are none: a counter that appears with the value 1 has not increased for Prometheus.
const WORKER_ENDS: [Status; 9] = [
    Status::Ok,
    Status::Remote,
    Status::Offline,
    Status::Cancelled,
    Status::Busy,
    Status::PeerGone,
    Status::Disconnected,
    Status::Closed,
    Status::Internal,
];
const GATEWAY_ENDS: [Status; 12] = [
    Status::Ok,
    Status::Remote,
    Status::Offline,
    Status::Cancelled,
    Status::Busy,
    Status::NoResponders,
    Status::Timeout,
    Status::Full,
    Status::PeerGone,
    Status::Disconnected,
    Status::Closed,
    Status::Internal,
];

/// The connections of the process, and what those before them have counted.
#[derive(Default)]
struct Connections {
    present: Vec<(Weak<Connection>, Arc<Counters>)>,
    ended: Counters,
}

fn connections() -> &'static Mutex<Connections> {
    static CONNECTIONS: PerProcess<Mutex<Connections>> = PerProcess::new();
    CONNECTIONS.get(Mutex::default)
}

impl Connections {
    /// Adds up the counters of connections that have ended. No one else has them, so they do not change any more.
    fn add_up_ended(&mut self) {
        let ended = &self.ended;
        self.present.retain_mut(|(_, counters)| match Arc::get_mut(counters) {
            None => true,
            Some(last) => {
                ended.add(last);
                false
            }
        });
    }
}

/// Adds a connection to the metrics.
pub(super) fn add_connection(connection: &Arc<Connection>) {
    let mut connections = connections().lock();
    connections.add_up_ended();
    connections.present.push((Arc::downgrade(connection), Arc::clone(&connection.counters)));
}

/// Returns the metrics of this process as OpenMetrics text: those of all its connections together.
#[must_use]
pub fn metrics() -> String {
    let (sum, present) = {
        let mut connections = connections().lock();
        connections.add_up_ended();
        let sum = Counters::default();
        sum.add(&connections.ended);
        connections.present.iter().for_each(|(_, counters)| sum.add(counters));
        let present: Vec<_> = connections.present.iter().filter_map(|(connection, _)| connection.upgrade()).collect();
        (sum, present)
    };
    let mut text = Text::default();
    connection_metrics(&mut text, &sum, &present);
    stream_metrics(&mut text, &sum);
    request_metrics(&mut text, &sum);
    lane_metrics(&mut text, &sum, &present);
    message_metrics(&mut text, &sum);
    text.finish()
}

fn get(counter: &AtomicU64) -> u64 {
    counter.load(Ordering::Relaxed)
}

fn connection_metrics(text: &mut Text, sum: &Counters, present: &[Arc<Connection>]) {
    text.metric("connections", Kind::Gauge, "Connections to nats-server that are not closed, by state.");
    for (state, is_connected) in [("connected", true), ("disconnected", false)] {
        let is_meant = |connection: &&Arc<Connection>| {
            connection.check_open().is_ok() && connection.is_connected() == is_connected
        };
        text.value(&[("state", state)], present.iter().filter(is_meant).count());
    }
    text.metric("reconnects", Kind::Counter, "Connections to nats-server that were made in place of lost ones.");
    text.value(&[], get(&sum.reconnects));
    text.metric("clients_online", Kind::Gauge, "Clients that are online in this process.");
    text.value(&[], registry::online_count());
}

/// The streams of each role, with labels. The subject is that of the service; requested streams have none.
struct Role<'a> {
    labels: [(&'static str, &'a str); 2],
    ends: &'static [Status],
    streams: &'a StreamCounters,
}

fn stream_metrics(text: &mut Text, sum: &Counters) {
    let services = sum.services();
    let requested =
        Role { labels: [("role", "gateway"), ("subject", "")], ends: &GATEWAY_ENDS, streams: &sum.requested };
    let served = services.iter().map(|(subject, service)| Role {
        labels: [("role", "worker"), ("subject", subject)],
        ends: &WORKER_ENDS,
        streams: &service.streams,
    });
    let roles: Vec<Role<'_>> = [requested].into_iter().chain(served).collect();
    text.metric("streams_running", Kind::Gauge, "Streams that run now.");
    for role in &roles {
        text.value(&role.labels, get(&role.streams.running));
    }
    text.metric("streams_started", Kind::Counter, "Streams that were requested (gateway) or accepted (worker).");
    for role in &roles {
        text.value(&role.labels, get(&role.streams.started));
    }
    text.metric("streams_ended", Kind::Counter, "Streams that have ended, by status: ok, or why.");
    for role in &roles {
        for status in role.ends {
            let [own, subject] = role.labels;
            text.value(&[own, subject, ("status", label(*status))], role.streams.ended(*status));
        }
    }
    let mut histogram = |name, help, histogram: fn(&StreamCounters) -> &Histogram| {
        text.metric(name, Kind::Histogram, help);
        for role in &roles {
            text.histogram(&role.labels, histogram(role.streams));
        }
    };
    histogram("stream_duration_seconds", "From the beginning of a stream in this process to its end.", |streams| {
        &streams.duration
    });
    histogram(
        "first_message_seconds",
        "From the beginning of a stream in this process to its first message, sent (worker) or received (gateway).",
        |streams| &streams.first_message,
    );
    text.metric(
        "stop_latency_seconds",
        Kind::Histogram,
        "In a worker, from the moment a stream was stopped to the call by which the worker ended its sender.",
    );
    for (subject, service) in &services {
        text.histogram(&[("subject", subject)], &service.streams.stop_latency);
    }
}

fn request_metrics(text: &mut Text, sum: &Counters) {
    let services = sum.services();
    text.metric("requests", Kind::Counter, "Requests that services received.");
    for (subject, service) in &services {
        text.value(&[("subject", subject)], get(&service.requests));
    }
    let help =
        "Requests that got no stream: the limit of running streams was reached (busy), or the request was invalid.";
    text.metric("requests_refused", Kind::Counter, help);
    for (subject, service) in &services {
        for (status, counter) in [(Status::Busy, &service.requests_busy), (Status::Invalid, &service.requests_ignored)]
        {
            text.value(&[("subject", subject), ("status", label(status))], get(counter));
        }
    }
}

fn lane_metrics(text: &mut Text, sum: &Counters, present: &[Arc<Connection>]) {
    let gauges: Vec<LaneGauges> = present.iter().map(|connection| connection.lanes.gauges()).collect();
    text.metric("lanes", Kind::Gauge, "Lanes: processes with this library that this one exchanges streams with.");
    text.value(&[("role", "gateway")], gauges.iter().map(|own| own.gateways).sum::<u64>());
    text.value(&[("role", "worker")], gauges.iter().map(|own| own.workers).sum::<u64>());
    let help = "The longest of the lanes' smoothed round trips; 0 if none is measured.";
    text.metric("lane_round_trip_max_seconds", Kind::Gauge, help);
    let longest = gauges.iter().filter_map(|own| own.round_trip).max().unwrap_or_default();
    text.value(&[], format_args!("{:?}", longest.as_secs_f64()));
    text.metric("lane_messages_resent", Kind::Counter, "Messages of lanes, each with many frames, sent again.");
    text.value(&[], get(&sum.resent));
    text.metric("waiting_bytes", Kind::Gauge, "Bytes that wait to be sent or, on lanes, to be acknowledged.");
    let lanes: usize = gauges.iter().map(|own| own.backlog).sum();
    let outboxes: usize = present.iter().map(|connection| connection.outbox.weight()).sum();
    text.value(&[], lanes + outboxes);
}

fn message_metrics(text: &mut Text, sum: &Counters) {
    for (name, help, counter) in [
        ("nats_messages_sent", "NATS messages of all kinds that were handed to the NATS client.", &sum.messages_out),
        ("nats_messages_received", "NATS messages of all kinds that were received.", &sum.messages_in),
        (
            "nats_messages_ignored",
            "NATS messages that were received for no running stream, or that no peer should have sent.",
            &sum.messages_ignored,
        ),
        ("offline_announcements_sent", "Announcements that a client is offline, sent.", &sum.offline_out),
        (
            "offline_announcements_received",
            "Announcements that a client is offline, received from other processes.",
            &sum.offline_in,
        ),
    ] {
        text.metric(name, Kind::Counter, help);
        text.value(&[], get(counter));
    }
}

/// The constant of a status in the header, in small letters and without its prefix.
fn label(status: Status) -> &'static str {
    match status {
        Status::Ok => "ok",
        Status::Invalid => "invalid",
        Status::Offline => "offline",
        Status::Closed => "closed",
        Status::Cancelled => "cancelled",
        Status::Full => "full",
        Status::TooLarge => "too_large",
        Status::Reserved => "reserved",
        Status::Disconnected => "disconnected",
        Status::PeerGone => "peer_gone",
        Status::NoResponders => "no_responders",
        Status::Busy => "busy",
        Status::Timeout => "timeout",
        Status::Remote => "remote",
        Status::Forked => "forked",
        Status::Internal => "internal",
    }
}
