//! `offline`, `watch` and `stats`.

use crate::connect::ConnectArgs;
use crate::{Failure, terminal};
use clap::Args;
use nats_presence::{Event, Kind, Queue, Stats, Status, mark_offline};
use std::time::{Duration, Instant};

/// Mark clients offline and announce it
///
/// The workers of these clients' streams stop. Ends when nats-server has the announcements.
#[derive(Args)]
#[command(after_long_help = "Example:
  nats-presence offline client-1 client-2")]
pub struct OfflineArgs {
    /// Ids of the clients
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

/// Print announcements that clients are offline, and what happens to the connection
///
/// That a client is online is not announced, so it cannot be watched. Ctrl-C ends.
#[derive(Args)]
#[command(after_long_help = "Examples:
  nats-presence watch
  nats-presence watch | grep --line-buffered 'offline client-1$'")]
pub struct WatchArgs {}

/// Print the statistics of a connection that listens to announcements
///
/// To see those of a worker, use `serve --stats`. Ctrl-C ends.
#[derive(Args)]
pub struct StatsArgs {
    /// Time between two lines
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = terminal::duration)]
    interval: Duration,
    /// Number of lines after which to end [default: no limit]
    #[arg(long, value_name = "NUMBER")]
    count: Option<u64>,
}

/// How long the end of `offline` waits for nats-server.
const CLOSE: Duration = Duration::from_secs(5);

pub fn offline(args: &OfflineArgs, connect: &ConnectArgs) -> Result<(), Failure> {
    if args.ids.iter().any(String::is_empty) {
        return Err(Failure::usage("a client's id is empty"));
    }
    let connection = connect.connect(None)?;
    for id in &args.ids {
        mark_offline(id.as_bytes())?;
    }
    Ok(connection.close(Some(CLOSE))?)
}

pub fn watch(_args: &WatchArgs, connect: &ConnectArgs) -> Result<(), Failure> {
    let connection = connect.connect(None)?;
    let queue = Queue::new();
    connection.watch(&queue, 0)?;
    connection.watch_announcements(&queue, 0);
    connection.listen_offline()?;
    terminal::on_reader_gone(|| std::process::exit(0))?;
    terminal::print(b"watching; Ctrl-C ends\n")?;
    let mut is_lost = false;
    while !is_lost {
        let mut out = String::new();
        queue.wait(256, None, |event| {
            is_lost |= is_connection_lost(&event);
            out.extend(show_event(&event).map(|text| terminal::printable(text.as_bytes()) + "\n"));
        })?;
        terminal::print(out.as_bytes())?;
    }
    Err(Status::Disconnected.into())
}

pub fn stats(args: &StatsArgs, connect: &ConnectArgs) -> Result<(), Failure> {
    let connection = connect.connect(None)?;
    connection.listen_offline()?;
    let mut next = Instant::now();
    for _ in 0..args.count.unwrap_or(u64::MAX) {
        std::thread::sleep(next.saturating_duration_since(Instant::now()));
        next += args.interval;
        terminal::print((show_stats(&connection.stats()) + "\n").as_bytes())?;
    }
    Ok(())
}

/// The statistics in one line.
pub fn show_stats(stats: &Stats) -> String {
    let Stats { connected, connects, streams, senders, requests, requests_busy, requests_ignored, .. } = stats;
    let Stats { messages_out, messages_in, messages_ignored, offline_out, offline_in, bytes_waiting, lanes, .. } =
        stats;
    format!(
        "connected={connected} connects={connects} streams={streams} senders={senders} lanes={lanes} \
         requests={requests} busy={requests_busy} ignored={requests_ignored} messages_in={messages_in} \
         messages_out={messages_out} messages_ignored={messages_ignored} offline_in={offline_in} \
         offline_out={offline_out} bytes_waiting={bytes_waiting}"
    )
}

/// Returns true if the connection has ended for good: so many attempts have failed as max_reconnects allows.
pub fn is_connection_lost(event: &Event<'_>) -> bool {
    event.kind == Kind::Disconnected && event.status == Status::Closed && event.subject.is_empty()
}

/// An event of a connection in one line.
pub fn show_event(event: &Event<'_>) -> Option<String> {
    let text = String::from_utf8_lossy(event.data);
    let subject = String::from_utf8_lossy(event.subject);
    let of = if subject.is_empty() { String::new() } else { format!(" ({subject})") };
    Some(match event.kind {
        Kind::Offline => format!("offline {}", event.client),
        Kind::Connected => format!("connected {text}{of}"),
        Kind::Disconnected if is_connection_lost(event) => format!("disconnected for good: {text}"),
        Kind::Disconnected => format!("disconnected{of}: {text}"),
        Kind::Log => format!("log: {text}"),
        _ => return None,
    })
}
