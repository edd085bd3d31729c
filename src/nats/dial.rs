//! How nats-server is reached: which servers, in which order, with which options, and a NATS client that does not outlive
//! its connection.
//!
//! Servers, and the addresses of a server's name, are tried as in Happy Eyeballs (RFC 8305): the next one while the one
//! before has not answered, and the first that answers is taken.

use crate::config::ConnectOptions;
use crate::error::{Error, Result, Status};
use crate::nats::tls::{self, Files};
use crate::process::random;
use crate::process::runtime;
use crate::sync::Mutex;
use async_nats::rustls::ClientConfig;
use async_nats::{Client, ConnectErrorKind, ServerAddr};
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::panic::resume_unwind;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::net::lookup_host;
use tokio::time::{Instant, sleep_until, timeout};

/// How many messages the NATS client buffers.
const CLIENT_CAPACITY: usize = 2048;
/// The next server, or address, is tried when the one before has not answered for so long.
pub(crate) const STAGGER: Duration = Duration::from_millis(250);
/// One that was lost or failed is tried after the others for so long.
const AVOIDED_FOR: Duration = Duration::from_secs(60);

/// How a name becomes addresses. Tests have a way of their own.
type Lookup = fn(String, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>;

/// The servers that may be connected to.
pub(crate) struct Dialer {
    options: ConnectOptions,
    servers: Vec<Target>,
    /// The others of their cluster, as the last one that took us named them.
    learned: Mutex<Vec<Target>>,
    /// The servers and addresses that were lost or failed a moment ago.
    avoided: Mutex<HashMap<String, Avoided>>,
    /// The server that took us last.
    current: Mutex<Option<Current>>,
    lookup: Lookup,
    /// Is told what a server complains of.
    on_complaint: Arc<dyn Fn(String) + Send + Sync>,
}

/// Why a server is tried after the others, in the order of preference. One that answered before may do so again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Avoided {
    Lost(Instant),
    Failed(Instant),
}

/// A server to try.
#[derive(Clone)]
struct Target {
    server: ServerAddr,
    /// For an address that another server named: the host name in the URL that led there, which may be all that the
    /// certificates of the cluster are for.
    tls_name: Option<String>,
}

impl Target {
    fn key(&self) -> String {
        format!("{}:{}", self.server.host(), self.server.port())
    }

    /// The name that its certificate may be for, though it is reached by an address.
    fn name(&self) -> Option<&str> {
        match self.server.host().parse::<IpAddr>() {
            Ok(_) => self.tls_name.as_deref(),
            Err(_) => Some(self.server.host()),
        }
    }
}

struct Current {
    target: Target,
    address: Option<String>,
}

impl Dialer {
    pub(crate) fn new(
        servers: Vec<ServerAddr>,
        options: ConnectOptions,
        on_complaint: Arc<dyn Fn(String) + Send + Sync>,
    ) -> Dialer {
        let servers = servers.into_iter().map(|server| Target { server, tls_name: None }).collect();
        Dialer {
            options,
            servers,
            learned: Mutex::default(),
            avoided: Mutex::default(),
            current: Mutex::default(),
            lookup: |host, port| Box::pin(async move { Ok(lookup_host((host, port)).await?.collect()) }),
            on_complaint,
        }
    }

    /// Tries each server once, in random order, those that were lost or failed a moment ago after the others.
    pub(crate) async fn dial(&self) -> Result<Client> {
        let files = Files::read(&self.options)?;
        let now = Instant::now();
        let last = self.current.lock().take();
        {
            let mut avoided = self.avoided.lock();
            avoided.retain(|_, (Avoided::Lost(at) | Avoided::Failed(at))| now.duration_since(*at) < AVOIDED_FOR);
            // The connection to it is lost: that is why we are here.
            if let Some(Current { target, address }) = last {
                let keys = [Some(target.key()), address].into_iter().flatten();
                avoided.extend(keys.map(|key| (key, Avoided::Lost(now))));
            }
        }
        let mut targets = self.servers.clone();
        targets.extend_from_slice(&self.learned.lock());
        self.arrange(&mut targets, Target::key);
        let attempts = targets.into_iter().map(|target| self.dial_server(target, &files));
        race(attempts).await.map_err(|failures| {
            let failures: Vec<Error> = failures.into_iter().flatten().collect();
            // What is wrong here comes before what is wrong elsewhere.
            let is_any = |status| failures.iter().any(|error| error.status == status);
            let status =
                [Status::Invalid, Status::Full, Status::Disconnected].into_iter().find(|status| is_any(*status));
            let texts: Vec<_> = failures.iter().map(|error| &*error.message).collect();
            Error::new(status.unwrap_or(Status::Timeout), texts.join("; "))
        })
    }

    /// Shuffles, and puts those to avoid behind the others, the one that failed last at the end.
    fn arrange<T>(&self, list: &mut [T], key: impl Fn(&T) -> String) {
        let avoided = self.avoided.lock();
        list.sort_by_cached_key(|one| (avoided.get(&key(one)).copied(), random::random_u64()));
    }

    /// Tries the addresses of a server's name, or its only one.
    async fn dial_server(&self, target: Target, files: &Files) -> Result<Client, Vec<Error>> {
        let trial = Trial::begin(self, target.key());
        let addresses = self.addresses(&target).await.map_err(|error| vec![error])?;
        let by_address = target.name().filter(|_| addresses.len() > 1 || target.tls_name.is_some());
        let mut failures = match by_address {
            Some(name) => {
                let attempts = addresses.into_iter().map(|address| self.dial_address(&target, address, name, files));
                match race(attempts).await {
                    Ok((client, address)) => {
                        trial.succeed();
                        *self.current.lock() = Some(Current { target, address: Some(address) });
                        return Ok(client);
                    }
                    Err(failures) => failures,
                }
            }
            None => Vec::new(),
        };
        // By its name, or where that did not work by its addresses: a server with a certificate for each of its names, or
        // what stands before it, may want to hear the name first (SNI), which TLS does not say to an address.
        if failures.iter().any(|error| error.status == Status::Timeout) {
            return Err(failures);
        }
        match self.connect(target.server.clone(), &target.key(), None).await {
            Ok(client) => {
                trial.succeed();
                *self.current.lock() = Some(Current { target, address: None });
                Ok(client)
            }
            Err(error) => {
                failures.push(error);
                Err(failures)
            }
        }
    }

    /// The addresses of a server, in the order in which to try them.
    async fn addresses(&self, target: &Target) -> Result<Vec<SocketAddr>> {
        let (host, port) = (target.server.host(), target.server.port());
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let late = || Error::new(Status::Timeout, format!("{}: the name was not resolved in time", target.key()));
        let found = timeout(self.options.connect_timeout, (self.lookup)(host.to_owned(), port)).await;
        let found = found.map_err(|_| late())?;
        let mut addresses = found.map_err(|error| {
            let status = if is_out_of_files(&error) { Status::Full } else { Status::Disconnected };
            Error::new(status, format!("{}: the name cannot be resolved: {error}", target.key()))
        })?;
        self.arrange(&mut addresses, ToString::to_string);
        Ok(addresses)
    }

    async fn dial_address(
        &self,
        target: &Target,
        address: SocketAddr,
        name: &str,
        files: &Files,
    ) -> Result<(Client, String), Error> {
        let trial = Trial::begin(self, address.to_string());
        let shown = format!("{} for {name}", address);
        let server = with_address(&target.server, address)
            .ok_or_else(|| Error::new(Status::Disconnected, format!("{shown}: the address cannot be used")))?;
        let client = self.connect(server, &shown, files.config_for(name)).await?;
        trial.succeed();
        Ok((client, address.to_string()))
    }

    /// Tries one server, or address. `tls`: how its certificate is checked, if not against the host in `server`.
    async fn connect(&self, server: ServerAddr, shown: &str, tls: Option<ClientConfig>) -> Result<Client> {
        let mut options = self.client_options(&server).await?;
        if let Some(tls) = tls {
            options = options.tls_client_config(tls);
        }
        // The client limits each of its steps, but not the lookup of the name.
        let attempt = runtime::catch_panic("the NATS client", options.connect(server));
        match timeout(self.options.connect_timeout * 2, attempt).await {
            Ok(Ok(Ok(client))) => Ok(client),
            // It does not survive everything that a server may say.
            Ok(Err(panic)) => Err(Error::new(Status::Disconnected, format!("{shown}: {panic}"))),
            Ok(Ok(Err(error))) => {
                let status = match error.kind() {
                    ConnectErrorKind::TimedOut => Status::Timeout,
                    _ if is_out_of_files(&error) => Status::Full,
                    _ => Status::Disconnected,
                };
                Err(Error::new(status, format!("{shown}: {}", tls::explain(&error.to_string(), &self.options))))
            }
            Err(_) => Err(Error::new(Status::Timeout, format!("{shown}: timed out"))),
        }
    }

    /// The servers of a cluster, as the one we are connected to names them, in place of those that were named before: some
    /// of these may be gone for good. One that names none may not know the others yet.
    pub(crate) fn learn(&self, hosts: &[String]) {
        let current = self.current.lock();
        let from = current.as_ref().map(|current| &current.target).or(self.servers.first());
        let Some(from) = from.filter(|_| !hosts.is_empty()) else { return };
        let mut learned: Vec<Target> = Vec::new();
        for host in hosts {
            // With the scheme and the credentials of the one that names it.
            let mut url = from.server.clone().into_inner();
            let Ok(other) = host.parse::<ServerAddr>() else { continue };
            let name = if other.host().contains(':') { format!("[{}]", other.host()) } else { other.host().into() };
            if url.set_host(Some(&name)).is_ok()
                && url.set_port(Some(other.port())).is_ok()
                && let Ok(server) = ServerAddr::from_url(url)
                && !self.servers.iter().chain(&learned).any(|known| is_same(&known.server, &server))
            {
                let is_address = server.host().parse::<IpAddr>().is_ok();
                let tls_name = from.name().filter(|_| is_address).map(str::to_owned);
                learned.push(Target { server, tls_name });
            }
        }
        *self.learned.lock() = learned;
    }

    async fn client_options(&self, server: &ServerAddr) -> Result<async_nats::ConnectOptions> {
        let own = &self.options;
        let on_complaint = Arc::clone(&self.on_complaint);
        let dialed = AtomicBool::new(false);
        let mut options = async_nats::ConnectOptions::new()
            .name(&own.name)
            .connection_timeout(own.connect_timeout)
            .ping_interval(own.ping_interval)
            .client_capacity(CLIENT_CAPACITY)
            .require_tls(own.wants_tls())
            // One client, one server: all the others are ours to try.
            .ignore_discovered_servers()
            // What callers and peers name is checked where it comes in.
            .skip_subject_validation(true)
            .event_callback(move |event| {
                match event {
                    async_nats::Event::ServerError(error) => on_complaint(error.to_string()),
                    async_nats::Event::LameDuckMode => {
                        on_complaint("it is a lame duck: it will close this connection soon".into())
                    }
                    _ => {}
                }
                std::future::ready(())
            })
            // Called before each attempt. The second is the client's own reconnect, which must not be (see `connection`):
            // there is no option against it, so its task is ended here. This unwinds silently, and tokio contains it.
            .reconnect_delay_callback(move |_| {
                if dialed.swap(true, Ordering::Relaxed) {
                    resume_unwind(Box::new("the connection is lost"));
                }
                Duration::ZERO
            });
        if own.tls_first {
            options = options.tls_first();
        }
        if let Some(file) = &own.tls_ca_file {
            options = options.add_root_certificates(file.clone());
        }
        if let (Some(cert), Some(key)) = (&own.tls_cert_file, &own.tls_key_file) {
            options = options.add_client_certificate(cert.clone(), key.clone());
        }
        if let Some(seed) = &own.nkey_seed {
            options = options.nkey(seed.0.clone());
        }
        if let Some(file) = &own.creds_file {
            options = options
                .credentials_file(file)
                .await
                .map_err(|error| Error::invalid(format!("creds_file {}: {error}", file.display())))?;
        }
        let decode = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
        if let Some(user) = server.username() {
            options = match server.password() {
                Some(password) => options.user_and_password(decode(user), decode(password)),
                None => options.token(decode(user)),
            };
        } else if let Some(token) = &own.token {
            options = options.token(token.0.clone());
        } else if let Some(user) = &own.user {
            let password = own.password.as_ref().map_or("", |password| &password.0);
            options = options.user_and_password(user.clone(), password.into());
        }
        Ok(options)
    }
}

fn is_same(one: &ServerAddr, other: &ServerAddr) -> bool {
    (one.host(), one.port()) == (other.host(), other.port())
}

/// Whether the process, or the machine, may open no more files, and so no sockets.
fn is_out_of_files(error: &(dyn std::error::Error + 'static)) -> bool {
    let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
    matches!(code, Some(libc::EMFILE | libc::ENFILE)) || error.source().is_some_and(is_out_of_files)
}

/// The same server at one of its addresses.
fn with_address(server: &ServerAddr, address: SocketAddr) -> Option<ServerAddr> {
    let mut url = server.clone().into_inner();
    let host = match address.ip() {
        IpAddr::V4(ip) => ip.to_string(),
        IpAddr::V6(ip) => format!("[{ip}]"),
    };
    url.set_host(Some(&host)).ok()?;
    url.set_port(Some(address.port())).ok()?;
    ServerAddr::from_url(url).ok()
}

/// A server or address that is being tried. Unless it succeeds, it counts as one that failed: also where it has not
/// answered when another one did.
struct Trial<'a> {
    dialer: &'a Dialer,
    key: String,
}

impl<'a> Trial<'a> {
    fn begin(dialer: &'a Dialer, key: String) -> Trial<'a> {
        Trial { dialer, key }
    }

    fn succeed(mut self) {
        let key = std::mem::take(&mut self.key);
        self.dialer.avoided.lock().remove(&key);
    }
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if !self.key.is_empty() {
            let key = std::mem::take(&mut self.key);
            self.dialer.avoided.lock().insert(key, Avoided::Failed(Instant::now()));
        }
    }
}

/// Begins one attempt after the other, each when the one before has failed or has not answered for `STAGGER`. The first
/// that succeeds ends all others.
async fn race<T, E>(attempts: impl IntoIterator<Item = impl Future<Output = Result<T, E>>>) -> Result<T, Vec<E>> {
    let mut attempts = attempts.into_iter();
    let mut next = attempts.next();
    let mut running = FuturesUnordered::new();
    let mut failures = Vec::new();
    let mut due = Instant::now();
    loop {
        tokio::select! {
            biased;
            Some(done) = running.next() => match done {
                Ok(done) => return Ok(done),
                Err(error) => {
                    failures.push(error);
                    due = Instant::now();
                }
            },
            () = sleep_until(due), if next.is_some() => {
                running.extend(next.take());
                next = attempts.next();
                due = Instant::now() + STAGGER;
            }
            else => return Err(failures),
        }
    }
}

/// Reads one URL, or several with commas between.
pub(crate) fn parse_servers(url: &str) -> Result<Vec<ServerAddr>> {
    let has_secrets = url.contains('@');
    url.split(',').map(|url| parse_server(url.trim_matches(' '), has_secrets)).collect()
}

fn parse_server(url: &str, has_secrets: bool) -> Result<ServerAddr> {
    // What stands before an @ may be a secret, and may have a comma in it.
    let shown = match url.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None if has_secrets => "…".to_owned(),
        None => url.to_owned(),
    };
    let wrong =
        |why: &str| Error::invalid(format!("server URL {shown:?} {why}; right is nats://host:port or tls://host:port"));
    if url.is_empty() {
        return Err(wrong("is empty"));
    }
    // The parser would leave some of them out.
    if url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(wrong("has white space or a control character"));
    }
    let server: ServerAddr = url.parse().map_err(|_| wrong("cannot be read"))?;
    if !matches!(server.scheme(), "nats" | "tls") {
        return Err(wrong("has another scheme than nats and tls"));
    }
    if server.host().is_empty() {
        return Err(wrong("has no host"));
    }
    let parsed = server.clone().into_inner();
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() || parsed.fragment().is_some() {
        return Err(wrong("has something behind the port (in a password, @ is %40 and / is %2F)"));
    }
    Ok(server)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use std::collections::HashSet;
    use std::io::Write;
    use std::net::TcpListener;
    use std::sync::atomic::AtomicUsize;
    use std::thread;

    #[test]
    fn server_urls() {
        assert_eq!(parse_servers("nats://a:1, tls://u:p@b ,c:3").unwrap().len(), 3);
        for bad in [
            "",
            "nats://",
            "http://a",
            "nats://a,",
            "nats://[::1",
            "nats://a:99999",
            "ws://a",
            "nats://a b",
            "nats://a\r\n",
        ] {
            let error = parse_servers(bad).unwrap_err();
            assert_eq!(error.status, Status::Invalid, "{bad}");
        }
        let error = parse_servers("http://user:hunter2@a").unwrap_err();
        assert!(!error.message.contains("hunter2") && error.message.contains("…@a"), "{error}");
        for bad in ["nats://user:hun,ter2@a:1", "nats://user:hun@ter2/x@a:1", "nats://a:1?hunter2@b"] {
            let error = parse_servers(bad).unwrap_err();
            assert!(!error.message.contains("hun") && !error.message.contains("ter2"), "{error}");
        }
    }

    /// A server that answers as nats-server does, as often as it is asked, or one that never answers; its address, and how
    /// many connections it has had.
    fn server(address: &str, answers: bool) -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind((address, 0)).unwrap();
        let (own, count) = (listener.local_addr().unwrap(), Arc::new(AtomicUsize::new(0)));
        let counted = Arc::clone(&count);
        thread::spawn(move || {
            let mut kept = Vec::new();
            for connection in listener.incoming() {
                let mut connection = connection.unwrap();
                counted.fetch_add(1, Ordering::SeqCst);
                if answers {
                    let info = r#"{"server_id":"x","version":"2.10.0","max_payload":1048576,"headers":true}"#;
                    let _ = connection.write_all(format!("INFO {info}\r\nPONG\r\n").as_bytes());
                }
                kept.push(connection);
            }
        });
        (own, count)
    }

    fn dialer(url: &str, lookup: Option<Lookup>) -> Dialer {
        let mut dialer =
            Dialer::new(parse_servers(url).unwrap(), Config::new().for_connect().unwrap().clone(), Arc::new(|_| {}));
        dialer.lookup = lookup.unwrap_or(dialer.lookup);
        dialer
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let done = runtime.block_on(work);
        runtime.shutdown_background();
        done
    }

    /// Less than `connect_timeout_ms` of one that does not answer.
    const SOON: Duration = Duration::from_secs(3);

    #[test]
    fn a_server_that_does_not_answer_holds_no_other_up_and_is_tried_last() {
        let ((dead, tried), (live, _)) = (server("127.0.0.1", false), server("127.0.0.1", true));
        let (dead_too, tried_too) = server("127.0.0.1", false);
        let dialer = dialer(&format!("{dead},{live},{dead_too}"), None);
        run(async {
            for _ in 0..20 {
                let begun = Instant::now();
                dialer.dial().await.unwrap();
                assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            }
        });
        // About once: from then on the one that answered before is asked first, which a busy machine may hold up.
        assert!(tried.load(Ordering::SeqCst) + tried_too.load(Ordering::SeqCst) < 8);
    }

    #[test]
    fn each_address_of_a_name_is_tried() {
        static ADDRESSES: Mutex<Vec<SocketAddr>> = Mutex::new(Vec::new());
        let others: Vec<_> = (0..3).map(|_| server("127.0.0.1", false)).collect();
        let (live, count) = server("127.0.0.1", true);
        *ADDRESSES.lock() = others.iter().map(|(address, _)| *address).chain([live]).collect();
        let dialer = dialer("many:1", Some(|_, _| Box::pin(async { Ok(ADDRESSES.lock().clone()) })));
        run(async {
            let begun = Instant::now();
            dialer.dial().await.unwrap();
            assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            // In another order each time: others come first, too, when none is to be avoided.
            dialer.avoided.lock().clear();
            let target = dialer.servers[0].clone();
            let mut firsts = HashSet::new();
            while firsts.len() < ADDRESSES.lock().len() {
                firsts.insert(dialer.addresses(&target).await.unwrap()[0]);
            }
        });
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn what_failed_is_named_for_each_server_and_address() {
        let refuses = |address: &str| TcpListener::bind((address, 0)).unwrap().local_addr().unwrap();
        let one = refuses("127.0.0.1");
        let lookup: Lookup = |_, port| {
            Box::pin(async move {
                Ok(["127.0.0.2", "127.0.0.3"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).into())
            })
        };
        let error = run(dialer(&format!("{one},many:{}", one.port()), Some(lookup)).dial()).unwrap_err();
        assert_eq!(error.status, Status::Disconnected);
        for address in
            [one.to_string(), format!("127.0.0.2:{} for many", one.port()), format!("127.0.0.3:{}", one.port())]
        {
            assert!(error.message.contains(&address), "{error}");
        }
        let error =
            run(dialer("many:1", Some(|_, _| Box::pin(async { Err(io::Error::other("no such name")) }))).dial());
        assert!(error.unwrap_err().message.contains("many:1: the name cannot be resolved: no such name"));
        let error = run(dialer("many:1", Some(|_, _| Box::pin(async { Ok(Vec::new()) }))).dial()).unwrap_err();
        assert!(error.message.contains("many:1"), "{error}");
    }

    #[test]
    fn servers_of_a_cluster_are_learned_once_with_the_credentials_of_the_first() {
        let options = Config::new().for_connect().unwrap().clone();
        let dialer = Dialer::new(parse_servers("nats://u:p@a:1").unwrap(), options, Arc::new(|_| {}));
        dialer.learn(&["a:1".into(), "b:2".into(), "[::1]:3".into(), "".into(), "b:2".into()]);
        let learned = || {
            let servers = dialer.learned.lock();
            let shown = servers
                .iter()
                .map(|Target { server, .. }| (server.host().to_owned(), server.port(), server.password().is_some()));
            shown.collect::<Vec<_>>()
        };
        assert_eq!(learned(), [("b".into(), 2, true), ("::1".into(), 3, true)]);
        // One that is named no longer is forgotten.
        dialer.learn(&["c:4".into()]);
        assert_eq!(learned(), [("c".into(), 4, true)]);
        dialer.learn(&[]);
        assert_eq!(learned().len(), 1);
        dialer.learn(&["a:1".into()]);
        assert_eq!(learned(), []);
    }

    #[test]
    fn learned_addresses_keep_the_name_that_led_to_them() {
        let dialer = dialer("tls://u:p@a:1,tls://b:1", None);
        let second = dialer.servers[1].clone();
        *dialer.current.lock() = Some(Current { target: second, address: None });
        dialer.learn(&["10.0.0.1:4222".into(), "[::1]:4222".into(), "c:4222".into()]);
        let learned = dialer.learned.lock().clone();
        let names: Vec<_> = learned.iter().map(|target| (target.tls_name.as_deref(), target.name())).collect();
        assert_eq!(names, [(Some("b"), Some("b")), (Some("b"), Some("b")), (None, Some("c"))]);
        assert!(learned.iter().all(|target| target.server.username().is_none()), "not those of another server");
        // And so do those that one of these names.
        *dialer.current.lock() = Some(Current { target: learned[0].clone(), address: None });
        dialer.learn(&["10.0.0.2:4222".into()]);
        assert_eq!(dialer.learned.lock()[0].tls_name.as_deref(), Some("b"));
    }
}
