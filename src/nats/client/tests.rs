//! For each workaround: `…_works`, and where a test can show it, `…_is_needed`, which fails when async-nats has changed
//! so that the workaround can go. The server is a socket of the test, so that it can send what nats-server sends at a
//! bad moment.

use super::*;
use crate::Config;
use crate::nats::dial::parse_servers;
use crate::nats::inbound::{Inbound, MessageHandler, Subscription};
use crate::sync::Mutex;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;
use tokio::runtime::{Builder, Runtime};

const TIMEOUT: Duration = Duration::from_secs(20);
/// Long enough for what must not happen.
const SHORT: Duration = Duration::from_millis(200);

/// The server's end of one connection.
struct Server {
    listener: TcpListener,
    input: BufReader<TcpStream>,
}

impl Server {
    fn accept(listener: TcpListener) -> Server {
        let socket = listener.accept().unwrap().0;
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        let mut server = Server { listener, input: BufReader::new(socket) };
        server.send(r#"INFO {"server_id":"x","version":"2.12.0","max_payload":1048576,"headers":true}"#);
        server.expect("CONNECT ");
        server.expect("PING");
        server.send("PONG");
        server
    }

    fn send(&mut self, text: &str) {
        self.input.get_mut().write_all(format!("{text}\r\n").as_bytes()).unwrap();
    }

    /// Reads lines up to one that begins so.
    fn expect(&mut self, begin: &str) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.input.read_line(&mut line).unwrap(), 0, "closed before {begin:?}");
            if line.starts_with(begin) {
                return line.trim_end().to_owned();
            }
        }
    }

    /// Reads the next line that is no PING: the client may probe at any time.
    fn next_line(&mut self) -> String {
        loop {
            let line = self.expect("");
            if line != "PING" {
                return line;
            }
        }
    }

    /// Closes this connection. Returns true if the client makes another one.
    fn sees_reconnect(self, within: Duration) -> bool {
        drop(self.input);
        self.listener.set_nonblocking(true).unwrap();
        let begun = std::time::Instant::now();
        while begun.elapsed() < within {
            if self.listener.accept().is_ok() {
                return true;
            }
            thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

fn connected<T>(connect: impl AsyncFnOnce(ServerAddr) -> T) -> (Runtime, T, Server) {
    let runtime = Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = parse_servers(&listener.local_addr().unwrap().to_string()).unwrap().remove(0);
    let server = thread::spawn(|| Server::accept(listener));
    let client = runtime.block_on(connect(address));
    (runtime, client, server.join().unwrap())
}

/// With this library's client.
fn own() -> (Runtime, Client, Server) {
    own_with(Arc::new(|_| {}))
}

fn own_with(on_server_error: OnServerError) -> (Runtime, Client, Server) {
    let config = Config::new();
    connected(async |server| {
        Client::connect(config.for_connect().unwrap(), server, "test", None, on_server_error).await.unwrap()
    })
}

/// With async-nats as it is.
fn plain() -> (Runtime, async_nats::Client, Server) {
    connected(async |server| async_nats::ConnectOptions::new().max_reconnects(1).connect(server).await.unwrap())
}

fn next(runtime: &Runtime, subscriber: &mut async_nats::Subscriber) -> Option<async_nats::Message> {
    runtime.block_on(async { timeout(TIMEOUT, subscriber.next()).await.unwrap() })
}

#[test]
fn never_reconnects_works() {
    let (runtime, client, server) = own();
    assert!(!server.sees_reconnect(SHORT));
    assert!(runtime.block_on(client.flush()).is_err());
    assert!(matches!(runtime.block_on(client.publish("a".into(), Bytes::new())), Err(PublishError::Closed)));
}

#[test]
fn never_reconnects_is_needed() {
    let (_runtime, _client, server) = plain();
    assert!(server.sees_reconnect(TIMEOUT), "max_reconnects(1) is no reconnect: use it");
}

#[test]
fn unsub_in_a_subject_works() {
    let (runtime, client, mut server) = own();
    let mut subscriber = runtime.block_on(async { client.try_subscribe("a".into(), "").unwrap().unwrap() });
    runtime.block_on(client.send_unsub(subscriber.sid, "unserved")).unwrap();
    server.expect("SUB a 1");
    for line in ["PUB unserved 0", "", "UNSUB 1", "PUB unserved 0", ""] {
        assert_eq!(server.next_line(), line);
    }
    // The server had sent this before it processed UNSUB.
    server.send("MSG a 1 1\r\nx");
    let received = runtime.block_on(async {
        timeout(TIMEOUT, std::future::poll_fn(|context| subscriber.poll_next(context.waker()))).await.unwrap()
    });
    assert_eq!(received.unwrap().payload, "x");
}

#[test]
fn unsub_in_a_subject_is_needed() {
    let (runtime, client, mut server) = plain();
    let mut subscriber = runtime.block_on(client.subscribe("a")).unwrap();
    runtime.block_on(subscriber.unsubscribe()).unwrap();
    server.expect("UNSUB 1");
    server.send("MSG a 1 1\r\nx");
    assert!(next(&runtime, &mut subscriber).is_none(), "`unsubscribe` delivers what was on its way: use it");

    let mut subscriber = runtime.block_on(client.subscribe("a")).unwrap();
    runtime.block_on(subscriber.drain()).unwrap();
    server.expect("UNSUB 2");
    // Anything that wakes the client's task before the message comes.
    runtime.block_on(client.publish("b", Bytes::new())).unwrap();
    server.expect("PUB b");
    server.send("MSG a 2 1\r\nx\r\nPONG");
    assert!(next(&runtime, &mut subscriber).is_none(), "`drain` waits for the PONG: use it");
}

#[test]
fn encoded_messages_works() {
    let (runtime, client, mut server) = own();
    let messages = |count| {
        let mut messages = EncodedMessages::default();
        for _ in 0..count {
            messages.push("a", "reply", b"NATS/1.0\r\nN: v\r\n\r\n", b"x");
            messages.push("b", "", b"", &[0xff, 0x80]);
        }
        messages
    };
    let mut expect = |lines: &[&[u8]]| {
        for expected in lines {
            let mut line = b"PING\r\n".to_vec();
            while line == b"PING\r\n" {
                line.clear();
                server.input.read_until(b'\n', &mut line).unwrap();
            }
            assert_eq!(line.strip_suffix(b"\r\n"), Some(*expected), "{line:?}");
        }
    };
    let with_headers = &[&b"HPUB a reply 18 19"[..], b"NATS/1.0", b"N: v", b"", b"x"];
    let without = &[&b"PUB b 2"[..], &[0xff, 0x80]];
    let encoded = 4 * (messages(1).bytes.len() + 2) - 2;

    runtime.block_on(client.publish_encoded(messages(4), "unserved")).unwrap();
    expect(&[b"PUB unserved 0", b"", format!("UNSUB none {encoded}").as_bytes()]);
    for _ in 0..4 {
        expect(with_headers);
        expect(without);
    }

    // A few messages, and messages that are too large together.
    runtime.block_on(client.publish_encoded(messages(1), "unserved")).unwrap();
    expect(with_headers);
    expect(without);
    let mut large = messages(4);
    large.push("c", "", b"", &vec![b'y'; 1 << 20]);
    runtime.block_on(client.publish_encoded(large, "unserved")).unwrap();
    for _ in 0..4 {
        expect(with_headers);
        expect(without);
    }
    expect(&[b"PUB c 1048576"]);
}

#[test]
fn equal_headers_come_in_the_same_order() {
    let block = "NATS/1.0\r\nA: 1\r\nB: 2\r\nC: 3\r\nD: 4\r\nB: 5\r\n\r\n";
    let order = || -> Vec<_> {
        header_map(block).iter().map(|(name, values)| (name.to_string(), format!("{values:?}"))).collect()
    };
    let first = order();
    assert!(first.len() == 4 && (0..100).all(|_| order() == first));
}

#[test]
fn counted_sids_works() {
    let (runtime, client, mut server) = own();
    let subscribe = |subject: &'static str, group| {
        runtime.block_on(async { client.try_subscribe(subject.into(), group).unwrap().unwrap() })
    };
    let subscribers = [subscribe("a", ""), subscribe("b", "group"), subscribe("a", "")];
    for subscriber in subscribers {
        let sub = server.expect("SUB ");
        assert_eq!(sub.rsplit(' ').next().unwrap(), subscriber.sid.to_string(), "{sub}");
    }
}

#[test]
fn refusals_are_read_works() {
    let (sender, errors) = std::sync::mpsc::channel();
    let (_runtime, _client, mut server) = own_with(Arc::new(move |text| sender.send(text).unwrap()));
    server.send(r#"-ERR 'Permissions Violation for Subscription to "a"'"#);
    let text = errors.recv_timeout(TIMEOUT).unwrap();
    assert!(text.contains(r#"Permissions Violation for Subscription to "a""#), "{text}");
}

#[test]
fn refusals_are_read_is_needed() {
    let (runtime, client, mut server) = plain();
    let mut subscriber = runtime.block_on(client.subscribe("a")).unwrap();
    server.expect("SUB a");
    server.send("-ERR 'Permissions Violation for Subscription to \"a\"'");
    let ended = runtime.block_on(async { timeout(SHORT, subscriber.next()).await });
    assert!(ended.is_err(), "the subscription of a refused subject ends: use that");
}

/// Records what comes, in the order in which it comes.
struct Recorder(Mutex<Vec<String>>);

impl MessageHandler for Recorder {
    fn message(&self, message: Message) {
        self.0.lock().push(String::from_utf8_lossy(&message.payload).into());
    }

    fn ended(&self, _why: Status) {}
}

fn subscribe(runtime: &Runtime, client: &Client, inbound: &Arc<Inbound>, recorder: &Arc<Recorder>, id: u64) {
    let subject = format!("subject.{id}").into();
    let subscription = Subscription { subject, group: String::new(), handler: Arc::clone(recorder) as _ };
    runtime.block_on(inbound.subscribe(client, id, subscription));
}

#[test]
fn wakers_are_the_message_loop_works() {
    const MESSAGES: usize = 1000;
    let (runtime, client, mut server) = own();
    let (inbound, recorder) = (Arc::<Inbound>::default(), Arc::new(Recorder(Mutex::default())));
    (1..=3).for_each(|id| subscribe(&runtime, &client, &inbound, &recorder, id));
    server.expect("SUB subject.3");
    let all: String = (0..MESSAGES).map(|i| format!("MSG subject.x {} 4\r\n{i:04}\r\n", i * 7 % 3 + 1)).collect();
    server.send(all.trim_end());
    let begun = std::time::Instant::now();
    while recorder.0.lock().len() < MESSAGES {
        assert!(begun.elapsed() < TIMEOUT);
        thread::sleep(Duration::from_millis(1));
    }
    assert!(recorder.0.lock().is_sorted());
}

#[test]
fn force_reconnect_closes_the_socket_works() {
    let (runtime, client, mut server) = own();
    let _kept = client.clone();
    runtime.block_on(client.close());
    let mut rest = Vec::new();
    server.input.read_to_end(&mut rest).unwrap();
    assert!(!server.sees_reconnect(SHORT));
}

#[test]
fn flush_is_no_round_trip_is_needed() {
    let (runtime, client, mut server) = plain();
    runtime.block_on(client.publish("a", Bytes::new())).unwrap();
    let flushed = runtime.block_on(async { timeout(TIMEOUT, client.flush()).await });
    assert!(flushed.is_ok(), "`flush` waits for the server's PONG: use it in place of echoes");
    server.expect("PUB a");
}

#[test]
fn a_malformed_message_ends_the_client_works() {
    let (runtime, client, mut server) = own();
    let (inbound, recorder) = (Arc::<Inbound>::default(), Arc::new(Recorder(Mutex::default())));
    subscribe(&runtime, &client, &inbound, &recorder, 1);
    server.expect("SUB subject.1");
    server.send("HMSG subject.1 1 20 20\r\nNATS/1.0\r\nA: a\rb\r\n\r\n");
    let ended = runtime.block_on(async { timeout(TIMEOUT, inbound.client_ended.notified()).await });
    assert!(ended.is_ok(), "async-nats survives a lone CR in a header: say so in the table");
    assert!(inbound.has_client_ended() && recorder.0.lock().is_empty());
    assert_eq!(client.inner.connection_state(), async_nats::connection::State::Connected, "the state tells: use it");
}

#[test]
fn messages_share_the_read_buffer_is_needed() {
    let (runtime, client, mut server) = plain();
    let mut subscriber = runtime.block_on(client.subscribe("a")).unwrap();
    server.expect("SUB a");
    server.send("MSG a 1 1\r\nx\r\nMSG a 1 1\r\ny");
    let [one, other] = [(); 2].map(|()| next(&runtime, &mut subscriber).unwrap());
    let distance = one.payload.as_ptr().addr().abs_diff(other.payload.as_ptr().addr());
    assert_eq!(distance, "x\r\nMSG a 1 1\r\n".len(), "each message has memory of its own: `detach` can go");
}
