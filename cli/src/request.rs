//! `request`: prints a stream, and leaves when asked to.

use crate::connect::ConnectArgs;
use crate::{Failure, exit_code, terminal};
use clap::Args;
use nats_presence::{Config, Connection, Kind, Queue, Status, Stream, mark_offline};
use std::io::{self, Read};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

/// Request a stream and print its messages
///
/// Each message is printed on a line of its own. The program ends when the worker ends
/// the stream. If the worker ends it with an error, its text goes to the standard error,
/// after its code if it has one ("error 3: ...").
///
/// On Ctrl-C or SIGTERM, and when the reader of the output has gone, the client leaves: it
/// is marked offline, and this is announced to all workers. The worker of this stream
/// stops. A second Ctrl-C does not wait for that.
#[derive(Args)]
#[command(
    verbatim_doc_comment,
    after_long_help = "Examples:
  nats-presence request upper 'some text'
  nats-presence request upper - < file
  nats-presence request logs.web | grep --line-buffered error
  nats-presence request chat 'a question' --timeout 30s -H 'X-Model: small'"
)]
pub struct RequestArgs {
    /// Subject of the request
    subject: String,
    /// Content of the request; - reads it from the standard input
    #[arg(default_value = "")]
    data: String,
    /// Id of the client for which the stream is; "" for no client [default: a random id]
    #[arg(long, value_name = "ID")]
    client: Option<String>,
    /// Time until the stream must have ended
    #[arg(short, long, value_name = "TIME", value_parser = terminal::duration)]
    timeout: Option<Duration>,
    /// How often to try again while no worker serves the subject or the worker is busy
    #[arg(long, value_name = "NUMBER")]
    retries: Option<u32>,
    /// Header of the request, for workers that read it
    #[arg(short = 'H', long = "header", value_name = "NAME:VALUE")]
    headers: Vec<String>,
    /// Print the messages as they are, without newlines between them
    #[arg(long)]
    raw: bool,
}

/// How long leaving waits until nats-server and the worker have the mark.
const LEAVE: Duration = Duration::from_secs(2);
/// How many messages are taken at once, and printed together.
const MAX_MESSAGES: usize = 256;

/// What is needed to leave, from any thread.
struct Client {
    id: String,
    connection: Arc<Connection>,
    stream: Arc<Stream>,
    /// The first one to leave ends the program; with this set, a second signal ends it at once.
    has_left: Arc<AtomicBool>,
}

impl Client {
    /// Leaves, and ends the program.
    fn leave(&self, code: i32) -> ! {
        if self.has_left.swap(true, Ordering::AcqRel) {
            wait_for_end();
        }
        // Neither fails but for a stream that has just ended.
        let _ = if self.id.is_empty() { self.stream.cancel() } else { mark_offline(self.id.as_bytes()) };
        let _ = self.connection.close(Some(LEAVE));
        std::process::exit(code)
    }
}

/// Waits until another thread has ended the program.
fn wait_for_end() -> ! {
    loop {
        thread::park();
    }
}

pub fn run(args: &RequestArgs, connect: &ConnectArgs) -> Result<(), Failure> {
    let mut config = Config::new();
    if let Some(timeout) = args.timeout {
        config.set("timeout_ms", &timeout.as_millis().to_string())?;
    }
    if let Some(retries) = args.retries {
        config.set("retries", &retries.to_string())?;
    }
    for header in &args.headers {
        let (name, value) = header.split_once(':').ok_or_else(|| {
            Failure::usage(format!("header {header:?} has no \":\": it must be NAME:VALUE, such as X-Model:small"))
        })?;
        config.set(&format!("header.{name}"), value.trim_start())?;
    }
    let mut data = Vec::new();
    if args.data == "-" {
        io::stdin().read_to_end(&mut data)?;
    } else {
        data.extend_from_slice(args.data.as_bytes());
    }
    let id = match &args.client {
        Some(id) => id.clone(),
        None => random_id()?,
    };
    let connection = connect.connect(Some(&mut config))?;
    let queue = Queue::new();
    let stream = connection.request(&queue, &args.subject, &data, id.as_bytes(), &config, 0)?;
    let client = Arc::new(Client { id, connection, stream, has_left: Arc::default() });
    leave_when_asked(&client)?;
    let mut out = Vec::new();
    loop {
        out.clear();
        let mut end = None;
        queue.wait(MAX_MESSAGES, None, |event| match event.kind {
            Kind::Data => {
                out.extend_from_slice(event.data);
                out.extend_from_slice(if args.raw { b"" } else { b"\n" });
            }
            Kind::End => end = Some((Status::Ok, 0, String::new())),
            Kind::Error => end = Some((event.status, event.error_code, terminal::printable(event.data))),
            _ => {}
        })?;
        if let Err(error) = terminal::write(&out) {
            let code = if error.kind() == io::ErrorKind::BrokenPipe { 0 } else { 1 };
            if code != 0 {
                terminal::log(format!("nats-presence: the standard output cannot be written: {error}"));
            }
            client.leave(code);
        }
        let Some((status, code, text)) = end else { continue };
        // From here on a signal ends the program at once. If one came before, the stream may have ended by it.
        if client.has_left.swap(true, Ordering::AcqRel) {
            wait_for_end();
        }
        let _ = client.connection.close(Some(LEAVE));
        if status == Status::Ok {
            return Ok(());
        }
        let text = if text.is_empty() { status.to_string() } else { text };
        let message = if code == 0 { text } else { format!("error {code}: {text}") };
        return Err(Failure { code: exit_code(status), message });
    }
}

/// Leaves on a signal, and when nobody reads the standard output any longer, even if there is nothing to write.
fn leave_when_asked(client: &Arc<Client>) -> io::Result<()> {
    // Before the other handler, whose thread sets the flag.
    for signal in terminal::ending_signals()? {
        signal_hook::flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&client.has_left))?;
    }
    let own = Arc::clone(client);
    terminal::on_signal(&[], move |signal| own.leave(128 + signal))?;
    let own = Arc::clone(client);
    terminal::on_reader_gone(move || own.leave(0))
}

pub fn random_id() -> io::Result<String> {
    Ok(format!("cli-{:016x}", getrandom::u64()?))
}
