//! `bench`: a short measurement of what this machine and this nats-server can do.

use crate::connect::ConnectArgs;
use crate::{Failure, terminal};
use clap::Args;
use nats_presence::{Config, Connection, Kind, Queue, Status, Stream, mark_offline};
use std::env;
use std::io::{self, BufRead, BufReader, Read};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

/// Measure streams, messages, and how fast a worker stops
///
/// Starts a worker in a process of its own and requests streams from it over nats-server.
/// The figures are those of this machine at this moment.
#[derive(Args)]
#[command(verbatim_doc_comment)]
pub struct BenchArgs {
    /// Time of each measurement but the last
    #[arg(long, value_name = "TIME", default_value = "2s", value_parser = terminal::duration)]
    time: Duration,
    /// Number of bytes of a message
    #[arg(long, value_name = "BYTES", default_value_t = 128, value_parser = clap::value_parser!(u32).range(1..=65536))]
    size: u32,
}

/// The subject, in the environment of the process that is the worker.
const WORKER: &str = "NATS_PRESENCE_BENCH_WORKER";
/// How many streams run at once in the second measurement.
const STREAMS: u64 = 64;
/// How many clients leave in the last one.
const MARKS: usize = 200;
const TIMEOUT: Duration = Duration::from_secs(10);

pub fn run(args: &BenchArgs, connect: &ConnectArgs) -> Result<(), Failure> {
    if let Ok(subject) = env::var(WORKER) {
        return work(&subject, args.size as usize, connect);
    }
    let connection = connect.connect(None)?;
    let subject = format!("nats-presence.bench.{}", crate::request::random_id()?);
    let (mut worker, mut output) = start_worker(&subject)?;
    let mut gateway = Gateway { connection, queue: Queue::new(), subject };
    let done = gateway.measure(args, &mut output);
    let _ = gateway.connection.close(Some(TIMEOUT));
    // It ends when its standard input does.
    drop(worker.stdin.take());
    worker.wait()?;
    done
}

fn start_worker(subject: &str) -> Result<(Child, BufReader<ChildStdout>), Failure> {
    let mut command = Command::new(env::current_exe()?);
    command.args(env::args_os().skip(1)).env(WORKER, subject).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut worker = command.spawn()?;
    let mut output = BufReader::new(worker.stdout.take().ok_or_else(|| io::Error::other("the worker has no output"))?);
    if line(&mut output)? != "serving" {
        return Err(io::Error::other("the worker of the benchmark has failed").into());
    }
    Ok((worker, output))
}

/// Answers each request with a message, which the end follows if the request is empty, and further messages until the
/// client leaves if it is "many". Otherwise prints when its client leaves.
fn work(subject: &str, size: usize, connect: &ConnectArgs) -> Result<(), Failure> {
    let connection = connect.connect(None)?;
    let queue = Queue::new();
    let _service = connection.serve(&queue, subject, "", 0, 0)?;
    terminal::print(b"serving\n")?;
    std::thread::Builder::new().spawn(|| {
        let _ = io::stdin().read_to_end(&mut Vec::new());
        std::process::exit(0);
    })?;
    let message = vec![b'x'; size];
    loop {
        let mut stopped = Vec::new();
        queue.wait(256, None, |event| {
            let Some(sender) = event.sender() else { return };
            if event.kind == Kind::Stopped {
                stopped.push(now());
                sender.free();
            } else if event.kind == Kind::Request {
                let _ = sender.send(&message);
                if event.data == b"many" {
                    while sender.send_wait(&message, None).is_ok() {}
                    sender.free();
                } else if event.data.is_empty() {
                    let _ = sender.end();
                    sender.free();
                }
            }
        })?;
        for at in stopped {
            terminal::print(format!("{}\n", at.as_nanos()).as_bytes())?;
        }
    }
}

struct Gateway {
    connection: Arc<Connection>,
    queue: Arc<Queue>,
    subject: String,
}

impl Gateway {
    fn measure(&mut self, args: &BenchArgs, worker: &mut impl BufRead) -> Result<(), Failure> {
        let show = |what: &str, figure: String| terminal::print(format!("{what:<32}{figure}\n").as_bytes());
        show("streams, one at a time", format!("{:>9} /s", self.streams(args.time, 1)?))?;
        show("streams, 64 at once", format!("{:>9} /s", self.streams(args.time, STREAMS)?))?;
        show(&format!("messages of {} bytes", args.size), format!("{:>9} /s", self.messages(args.time)?))?;
        let mut times = (0..MARKS).map(|number| self.mark(number, worker)).collect::<Result<Vec<_>, _>>()?;
        times.sort_unstable();
        let millis = |part: usize| times[part * (MARKS - 1) / 100].as_secs_f64() * 1000.0;
        show("offline mark to worker's event", format!("{:>9.2} ms (median)", millis(50)))?;
        show("", format!("{:>9.2} ms (99th percentile)", millis(99)))?;
        Ok(())
    }

    fn request(&self, data: &[u8], client: &[u8]) -> Result<Arc<Stream>, Failure> {
        Ok(self.connection.request(&self.queue, &self.subject, data, client, &Config::new(), 0)?)
    }

    /// Waits for events. Returns how many messages and how many ends of streams there were.
    fn wait(&self) -> Result<(u64, u64), Failure> {
        let (mut messages, mut ends, mut failed) = (0, 0, None);
        let taken = self.queue.wait(256, Some(TIMEOUT), |event| match event.kind {
            Kind::Data => messages += 1,
            Kind::Error if !matches!(event.status, Status::Offline | Status::Cancelled) => failed = Some(event.status),
            _ => ends += 1,
        })?;
        match failed {
            Some(status) => Err(status.into()),
            None if taken == 0 => Err(Status::Timeout.into()),
            None => Ok((messages, ends)),
        }
    }

    /// Returns how many streams with one message each there are in a second, so many of them at once.
    fn streams(&self, time: Duration, at_once: u64) -> Result<u64, Failure> {
        let (start, mut done, mut running) = (Instant::now(), 0, 0);
        while running > 0 || start.elapsed() < time {
            while running < at_once && start.elapsed() < time {
                self.request(b"", b"")?;
                running += 1;
            }
            let (_, ends) = self.wait()?;
            done += ends;
            running -= ends;
        }
        Ok(per_second(done, start.elapsed()))
    }

    /// Returns how many messages of one stream there are in a second.
    fn messages(&self, time: Duration) -> Result<u64, Failure> {
        let stream = self.request(b"many", b"")?;
        self.wait()?;
        let (start, mut done) = (Instant::now(), 0);
        while start.elapsed() < time {
            done += self.wait()?.0;
        }
        let elapsed = start.elapsed();
        stream.cancel()?;
        while self.wait()?.1 == 0 {}
        Ok(per_second(done, elapsed))
    }

    /// Returns the time from a client's offline mark to the event in its worker.
    fn mark(&self, number: usize, worker: &mut impl BufRead) -> Result<Duration, Failure> {
        let client = format!("bench-{number}");
        let _stream = self.request(b"hold", client.as_bytes())?;
        self.wait()?;
        let start = now();
        mark_offline(client.as_bytes())?;
        let stopped = line(worker)?.parse().map_err(io::Error::other)?;
        while self.wait()?.1 == 0 {}
        Ok(Duration::from_nanos(stopped).saturating_sub(start))
    }
}

fn per_second(count: u64, time: Duration) -> u64 {
    (count as f64 / time.as_secs_f64()) as u64
}

/// The time of a clock that both processes share.
fn now() -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

fn line(input: &mut impl BufRead) -> io::Result<String> {
    let mut text = String::new();
    input.read_line(&mut text)?;
    Ok(text.trim_end().into())
}
