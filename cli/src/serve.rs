//! `serve`: each request runs a command.

use crate::command::{Progress, Running, Wakeup, failure};
use crate::connect::ConnectArgs;
use crate::messages::Messages;
use crate::observe::{is_connection_lost, show_event, show_stats};
use crate::{Failure, environment, terminal};
use clap::Args;
use nats_presence::{Event, Kind, Queue, Sender, Status};
use signal_hook::consts::SIGCHLD;
use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Serve a subject: each request runs a command
///
/// The request is the command's standard input. Each line of its output is one message of
/// the stream. Its standard error is that of this program.
///
/// NATS_PRESENCE_CLIENT and NATS_PRESENCE_SUBJECT in its environment are the client's id
/// and the request's subject. A header such as X-Model: small is there as
/// NATS_PRESENCE_HEADER_X_MODEL: the name has upper case letters, digits, and _ for all
/// other characters. A request is refused with an error if two of its headers have the same
/// variable, if a header has a control character, or if the variables take more than
/// 65536 bytes. All of this comes from the client: a command must not trust it, nor its
/// input. In a shell, write "$NATS_PRESENCE_HEADER_X_MODEL" with quotes.
///
/// When the client leaves, the command and all processes of its process group get SIGTERM,
/// and after --grace SIGKILL. If the command fails, the stream ends with an error whose
/// code is its exit status (after a signal: 128 and its number).
///
/// SIGINT (Ctrl-C) and SIGTERM: no more requests are accepted, and the program ends when
/// the running commands have. A second signal kills them.
#[derive(Args)]
#[command(
    verbatim_doc_comment,
    after_long_help = "Examples:
  nats-presence serve upper -- tr a-z A-Z
  nats-presence serve thumbnail --raw -- convert - -resize 200 png:-
  nats-presence serve chat --max 4 --grace 30s -- ./answer --model small"
)]
pub struct ServeArgs {
    /// Subject to serve; it may have wildcards
    subject: String,
    /// Command that answers a request, with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    command: Vec<OsString>,
    /// Workers in the same group share the requests; with "" each worker gets each request
    #[arg(long, value_name = "GROUP", default_value = "workers")]
    queue: String,
    /// Number of commands that may run at once; further requests are refused as busy
    #[arg(long, value_name = "NUMBER", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    max: u32,
    /// Time from SIGTERM to SIGKILL for the command of a client that has left
    #[arg(long, value_name = "TIME", default_value = "5s", value_parser = terminal::duration)]
    grace: Duration,
    /// Send the output in pieces as it comes, not by lines
    #[arg(long)]
    raw: bool,
    /// Interval at which the statistics of the connection are logged
    #[arg(long, value_name = "TIME", value_parser = terminal::duration)]
    stats: Option<Duration>,
    /// Log errors only
    #[arg(short, long)]
    quiet: bool,
}

/// How long the end of the program waits until nats-server has all that was sent.
const CLOSE: Duration = Duration::from_secs(10);

/// What the main thread shares with the threads of commands and of signals.
struct Worker {
    queue: Arc<Queue>,
    /// The running commands, by the tags of their senders.
    jobs: Mutex<HashMap<u64, Arc<Wakeup>>>,
    /// The first signal, which drains, and the second one, which kills.
    drained_by: AtomicI32,
    killed_by: AtomicI32,
}

impl Worker {
    fn jobs(&self) -> MutexGuard<'_, HashMap<u64, Arc<Wakeup>>> {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn signal(&self, signal: i32) {
        if signal == SIGCHLD {
            return self.jobs().values().for_each(|job| job.wake());
        }
        if self.drained_by.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Acquire).is_err() {
            self.killed_by.store(signal, Ordering::Release);
            self.jobs().values().for_each(|job| job.kill());
        }
        self.queue.wake();
    }
}

pub fn run(args: &'static ServeArgs, connect: &ConnectArgs) -> Result<(), Failure> {
    check_command(&args.command[0])?;
    let connection = connect.connect(None)?;
    let worker = Arc::new(Worker {
        queue: Queue::new(),
        jobs: Mutex::default(),
        drained_by: AtomicI32::new(0),
        killed_by: AtomicI32::new(0),
    });
    connection.watch(&worker.queue, 0)?;
    let service = connection.serve(&worker.queue, &args.subject, &args.queue, args.max, 0)?;
    let on_signal = Arc::clone(&worker);
    terminal::on_signal(&[SIGCHLD], move |signal| on_signal.signal(signal))?;
    if !args.quiet {
        terminal::log(format!("serving {}; Ctrl-C ends", args.subject));
    }
    let (mut last_tag, mut next_stats, mut is_lost) = (0, Instant::now(), false);
    loop {
        let timeout = args.stats.map(|interval| {
            if next_stats <= Instant::now() {
                terminal::log(show_stats(&connection.stats()));
                next_stats = Instant::now() + interval;
            }
            next_stats.saturating_duration_since(Instant::now())
        });
        worker.queue.wait(64, timeout, |event| match event.kind {
            Kind::Request => {
                last_tag += 1;
                accept(args, &worker, &event, last_tag);
            }
            Kind::Stopped | Kind::Writable => {
                if let Some(job) = worker.jobs().get(&event.tag) {
                    job.wake();
                }
            }
            Kind::Connected if args.quiet => {}
            _ => {
                is_lost |= is_connection_lost(&event);
                show_event(&event).into_iter().for_each(terminal::log);
            }
        })?;
        if is_lost || worker.drained_by.load(Ordering::Acquire) != 0 {
            if service.stop().is_ok() && !args.quiet {
                let running = worker.jobs().len();
                terminal::log(format!("no more requests; running commands: {running}; another signal kills them"));
            }
            if worker.jobs().is_empty() {
                break;
            }
        }
    }
    let closed = connection.close(Some(CLOSE));
    match worker.killed_by.load(Ordering::Acquire) {
        0 if is_lost => Err(Status::Disconnected.into()),
        0 => Ok(closed?),
        signal => std::process::exit(128 + signal),
    }
}

/// Starts the thread that answers a request.
fn accept(args: &'static ServeArgs, worker: &Arc<Worker>, event: &Event<'_>, tag: u64) {
    let Some(sender) = event.sender() else { return };
    sender.set_tag(tag);
    let refuse = |text: &str| {
        let _ = sender.error(text.as_bytes());
        sender.free();
    };
    // Commands that are being stopped count, too, although their streams have ended.
    if worker.jobs().len() >= args.max as usize {
        return refuse("server busy");
    }
    let wakeup = match Wakeup::new() {
        Ok(wakeup) => Arc::new(wakeup),
        Err(error) => return refuse(&format!("the worker cannot start a command: {error}")),
    };
    worker.jobs().insert(tag, Arc::clone(&wakeup));
    if worker.killed_by.load(Ordering::Acquire) != 0 {
        wakeup.kill();
    }
    let job = Job {
        args,
        sender: Arc::clone(&sender),
        wakeup,
        input: event.data.to_vec(),
        client: event.client.to_owned(),
        subject: String::from_utf8_lossy(event.subject).into_owned(),
    };
    let own = Arc::clone(worker);
    let started = std::thread::Builder::new().name("command".into()).spawn(move || {
        job.answer();
        job.sender.free();
        own.jobs().remove(&tag);
        own.queue.wake();
    });
    if let Err(error) = started {
        worker.jobs().remove(&tag);
        refuse(&format!("the worker cannot start a thread: {error}"));
    }
}

/// A request and its answer.
struct Job {
    args: &'static ServeArgs,
    sender: Arc<Sender>,
    wakeup: Arc<Wakeup>,
    input: Vec<u8>,
    client: String,
    subject: String,
}

/// Why a stream ends before its command has.
enum Stop {
    /// The reader no longer wants it.
    Left(Status),
    Failed(String),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Stop {
        Stop::Failed(format!("the command's output cannot be read: {error}"))
    }
}

impl Job {
    fn answer(&self) {
        // The client's id, which comes first, has a variable of its own.
        let headers = (usize::from(!self.client.is_empty())..).map_while(|index| self.sender.header_at(index));
        let headers = match environment::header_variables(headers) {
            Ok(headers) => headers,
            Err(text) => {
                let _ = self.sender.error(text.as_bytes());
                return self.log(&text);
            }
        };
        let set = |command: &mut Command| environment::set(command, &self.client, &self.subject, &headers);
        let mut running = match Running::start(&self.args.command, self.input.clone(), set, &self.wakeup) {
            Ok(running) => running,
            Err(error) => {
                // The client need not know where the worker has its programs.
                let _ = self.sender.error(format!("the worker cannot run its command: {error}").as_bytes());
                return terminal::log(format!("{} cannot be run: {error}", self.args.command[0].display()));
            }
        };
        self.log("started");
        let why = match self.relay(&mut running) {
            Ok(None) => {
                let _ = self.sender.end();
                return self.log("ended");
            }
            Ok(Some((code, text))) => {
                let _ = self.sender.error_with_code(code, text.as_bytes());
                return self.log(&text);
            }
            Err(why) => why,
        };
        running.terminate();
        match why {
            Stop::Left(why) => self.log(&format!("stopped after {} messages: {why}", self.sender.send_count())),
            Stop::Failed(text) => {
                let _ = self.sender.error(text.as_bytes());
                self.log(&text);
            }
        }
        if let Err(error) = running.wait_for_group(self.args.grace) {
            terminal::log(format!("{}: the command cannot be stopped: {error}", self.client));
        }
        self.log("the command has ended");
    }

    /// Sends the command's output. Returns how the command has failed, if it has: a code and a text.
    fn relay(&self, running: &mut Running<'_>) -> Result<Option<(i32, String)>, Stop> {
        let mut messages = Messages::new(self.args.raw);
        loop {
            match running.next()? {
                Progress::Output(output) => {
                    messages.add(output, self.sender.max_message(), |message| self.send(message))?;
                }
                Progress::Exited(status) => {
                    messages.finish(|message| self.send(message))?;
                    return Ok(failure(status));
                }
                Progress::Woken => self.check()?,
            }
        }
    }

    /// Fails if the command is to stop.
    fn check(&self) -> Result<(), Stop> {
        if self.wakeup.kills() {
            return Err(Stop::Failed("the worker was stopped".into()));
        }
        self.sender.status_word().check().map_err(Stop::Left)
    }

    fn send(&self, message: &[u8]) -> Result<(), Stop> {
        loop {
            match self.sender.send(message) {
                Ok(()) => return Ok(()),
                Err(Status::Full) => {
                    self.check()?;
                    self.wakeup.wait();
                }
                Err(Status::TooLarge) => {
                    let limit = self.sender.max_message();
                    let text = format!("a line of the command's output is longer than {limit} bytes; serve with --raw");
                    return Err(Stop::Failed(text));
                }
                Err(Status::Reserved) => {
                    let text = "a line of the command's output looks like the end of a stream to peers on level 0";
                    return Err(Stop::Failed(text.into()));
                }
                Err(why) => return Err(Stop::Left(why)),
            }
        }
    }

    fn log(&self, text: &str) {
        if !self.args.quiet {
            let client = if self.client.is_empty() { "(no client)" } else { &self.client };
            terminal::log(format!("{client}: {text}"));
        }
    }
}

/// Fails for a command that cannot be run now, before a request does.
fn check_command(program: &OsString) -> Result<(), Failure> {
    let is_program =
        |path: &Path| path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0);
    let found = if program.as_encoded_bytes().contains(&b'/') {
        is_program(Path::new(program))
    } else {
        let folders = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&folders).any(|folder| is_program(&folder.join(program)))
    };
    if found { Ok(()) } else { Err(Failure::usage(format!("{} is not a command that can be run", program.display()))) }
}
