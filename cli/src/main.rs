//! The command line of nats-presence. `docs/tutorial-shell.md` shows it at work.

mod bench;
mod command;
mod connect;
mod environment;
mod messages;
mod observe;
mod request;
mod serve;
mod terminal;

use clap::{CommandFactory, Parser, Subcommand};
use connect::ConnectArgs;
use nats_presence::{Error, Status};
use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

/// Stop work for clients that have left: streams over NATS, from the shell
///
/// A worker serves a subject and answers each request with a stream of messages. When the
/// client that requested it leaves, the worker stops at once. In two terminals:
///
///   nats-presence serve count -- sh -c 'i=0; while sleep 1; do echo $((i+=1)); done'
///   nats-presence request count
///
/// Press Ctrl-C in the second one, and the command in the first one ends.
#[derive(Parser)]
#[command(name = "nats-presence", version, verbatim_doc_comment, after_long_help = exit_codes())]
struct Cli {
    #[command(flatten)]
    connect: ConnectArgs,
    #[command(subcommand)]
    action: Action,
}

#[derive(Subcommand)]
enum Action {
    Serve(serve::ServeArgs),
    Request(request::RequestArgs),
    Offline(observe::OfflineArgs),
    Watch(observe::WatchArgs),
    Stats(observe::StatsArgs),
    Bench(bench::BenchArgs),
    /// Print a script that completes this command in a shell
    ///
    /// For bash: source <(nats-presence completions bash)
    Completions {
        shell: clap_complete::Shell,
    },
    /// Write the manual pages into a folder
    #[command(hide = true)]
    Man {
        folder: PathBuf,
    },
}

/// Why the program ends with a message.
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure { code: USAGE, message: message.into() }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Failure {
        Failure { code: exit_code(error.status), message: error.message.into() }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Failure {
        Error::from(status).into()
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Failure {
        Failure { code: 1, message: error.to_string() }
    }
}

const USAGE: u8 = 2;

/// The exit code of a stream or call that ended with this status.
pub fn exit_code(status: Status) -> u8 {
    match status {
        Status::Ok => 0,
        Status::Invalid => USAGE,
        other => 10 + other.code().unsigned_abs() as u8,
    }
}

fn exit_codes() -> String {
    let mut text =
        "Exit codes:\n  0   success, or the reader of the standard output has closed it\n  1   another error\n  \
                    2   an argument is invalid\n"
            .to_owned();
    for status in Status::ALL.into_iter().filter(|status| exit_code(*status) > USAGE) {
        text += &format!("  {}  {status}\n", exit_code(status));
    }
    text + "  130 interrupted with Ctrl-C (another signal: 128 and its number)"
}

fn main() -> ExitCode {
    // The threads of `serve` and `request` use the arguments until the end.
    let cli: &'static Cli = Box::leak(Box::new(Cli::parse()));
    let done = match &cli.action {
        Action::Serve(args) => serve::run(args, &cli.connect),
        Action::Request(args) => request::run(args, &cli.connect),
        Action::Offline(args) => observe::offline(args, &cli.connect),
        Action::Watch(args) => observe::watch(args, &cli.connect),
        Action::Stats(args) => observe::stats(args, &cli.connect),
        Action::Bench(args) => bench::run(args, &cli.connect),
        Action::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(*shell, &mut Cli::command(), "nats-presence", &mut script);
            // clap's issue 6421: after a subcommand, bash completes nothing if the program's name has a hyphen.
            let script = String::from_utf8_lossy(&script).replace("nats__subcmd__presence", "nats__presence");
            terminal::print(script.as_bytes()).map_err(Failure::from)
        }
        Action::Man { folder } => std::fs::create_dir_all(folder)
            .and_then(|()| clap_mangen::generate_to(Cli::command(), folder))
            .map_err(Failure::from),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(Failure { code, message }) => {
            // The error is ignored: the standard error may be closed.
            let _ = writeln!(io::stderr(), "nats-presence: {}", terminal::printable(message.as_bytes()));
            ExitCode::from(code)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn each_status_has_its_exit_code() {
        let mut codes: Vec<u8> = Status::ALL.into_iter().map(exit_code).collect();
        codes.sort_unstable();
        codes.dedup();
        assert_eq!(codes.len(), Status::ALL.len());
        assert!(codes.iter().all(|code| *code < 126), "these are codes of shells");
    }
}
