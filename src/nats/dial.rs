//! Which nats-server to connect to: the servers of the URLs, the others of their cluster, and the addresses of their
//! names.
//!
//! Servers, and the addresses of a server's name, are tried as in Happy Eyeballs (RFC 8305): an attempt starts when the
//! one before it has failed or has not answered for some time, and the first that succeeds is used.

use crate::config::ConnectOptions;
use crate::error::{Error, Result, Status};
use crate::nats::client::{self, Client, OnServerError};
use crate::nats::tls::Files;
use crate::process::random;
use crate::sync::Mutex;
use async_nats::ServerAddr;
use async_nats::rustls::ClientConfig;
use futures_util::StreamExt;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use std::collections::HashMap;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::lookup_host;
use tokio::time::{Instant, sleep_until, timeout};

/// The next server, or address, is tried when the one before has not answered for this long.
pub(crate) const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// A server or address that was lost or failed is tried after the others for this long.
const AVOIDED_FOR: Duration = Duration::from_secs(60);

/// Resolves a name. Tests replace it.
type Lookup = fn(String, u16) -> BoxFuture<'static, io::Result<Vec<SocketAddr>>>;

/// The servers to connect to.
pub(crate) struct ServerPool {
    options: ConnectOptions,
    /// Those of the URLs.
    servers: Vec<Target>,
    /// The others of their cluster, as the last connected server named them.
    learned: Mutex<Vec<Target>>,
    /// The servers and addresses that were recently lost or failed.
    avoided: Mutex<HashMap<String, Avoided>>,
    /// The last connected server.
    current: Mutex<Option<Current>>,
    lookup: Lookup,
    on_server_error: OnServerError,
}

/// Why a server is tried after the others, in the order of preference: one that answered before may answer again.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Avoided {
    Lost(Instant),
    Failed(Instant),
}

/// A server to try.
#[derive(Clone)]
struct Target {
    server: ServerAddr,
    /// For an address that another server named: the host name in the URL that led there, which may be the only name in
    /// the certificates of the cluster.
    tls_name: Option<String>,
}

impl Target {
    fn key(&self) -> String {
        format!("{}:{}", self.server.host(), self.server.port())
    }

    /// Returns the name that its certificate may have instead of its address.
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

impl ServerPool {
    pub(crate) fn new(servers: Vec<ServerAddr>, options: ConnectOptions, on_server_error: OnServerError) -> ServerPool {
        let servers = servers.into_iter().map(|server| Target { server, tls_name: None }).collect();
        ServerPool {
            options,
            servers,
            learned: Mutex::default(),
            avoided: Mutex::default(),
            current: Mutex::default(),
            lookup: |host, port| Box::pin(async move { Ok(lookup_host((host, port)).await?.collect()) }),
            on_server_error,
        }
    }

    /// Tries each server once, in random order, but those that were recently lost or failed after the others.
    pub(crate) async fn connect(&self) -> Result<Client> {
        let files = Files::read(&self.options)?;
        let now = Instant::now();
        let last = self.current.lock().take();
        {
            let mut avoided = self.avoided.lock();
            avoided.retain(|_, (Avoided::Lost(at) | Avoided::Failed(at))| now.duration_since(*at) < AVOIDED_FOR);
            // The connection to the last one was lost, or there would be no other now.
            if let Some(Current { target, address }) = last {
                let keys = [Some(target.key()), address].into_iter().flatten();
                avoided.extend(keys.map(|key| (key, Avoided::Lost(now))));
            }
        }
        let mut targets = self.servers.clone();
        targets.extend_from_slice(&self.learned.lock());
        self.sort(&mut targets, Target::key);
        let attempts = targets.into_iter().map(|target| self.try_server(target, &files));
        race(attempts).await.map_err(|failures| {
            let failures: Vec<Error> = failures.into_iter().flatten().collect();
            // An error of this side comes before an error of a server.
            let is_any = |status| failures.iter().any(|error| error.status == status);
            let status =
                [Status::Invalid, Status::Full, Status::Disconnected].into_iter().find(|status| is_any(*status));
            let texts: Vec<_> = failures.iter().map(|error| &*error.message).collect();
            Error::new(status.unwrap_or(Status::Timeout), texts.join("; "))
        })
    }

    /// Shuffles a list, and moves those to avoid to its end, the failed ones last.
    fn sort<T>(&self, list: &mut [T], key: impl Fn(&T) -> String) {
        let avoided = self.avoided.lock();
        list.sort_by_cached_key(|one| (avoided.get(&key(one)).copied(), random::random_u64()));
    }

    /// Tries the addresses of a server's name, or its only one.
    async fn try_server(&self, target: Target, files: &Files) -> Result<Client, Vec<Error>> {
        let attempt = Attempt { pool: self, key: target.key() };
        let addresses = self.addresses(&target).await.map_err(|error| vec![error])?;
        let by_address = target.name().filter(|_| addresses.len() > 1 || target.tls_name.is_some());
        let mut failures = match by_address {
            Some(name) => {
                let attempts = addresses.into_iter().map(|address| self.try_address(&target, address, name, files));
                match race(attempts).await {
                    Ok((client, address)) => {
                        attempt.succeed();
                        *self.current.lock() = Some(Current { target, address: Some(address) });
                        return Ok(client);
                    }
                    Err(failures) => failures,
                }
            }
            None => Vec::new(),
        };
        // Then by its name: a server with a certificate for each of its names, or a proxy before it, may need the name
        // first (SNI), which TLS does not send to an address.
        if failures.iter().any(|error| error.status == Status::Timeout) {
            return Err(failures);
        }
        match self.try_connect(target.server.clone(), &target.key(), None).await {
            Ok(client) => {
                attempt.succeed();
                *self.current.lock() = Some(Current { target, address: None });
                Ok(client)
            }
            Err(error) => {
                failures.push(error);
                Err(failures)
            }
        }
    }

    /// Returns the addresses of a server, in the order in which to try them.
    async fn addresses(&self, target: &Target) -> Result<Vec<SocketAddr>> {
        let (host, port) = (target.server.host(), target.server.port());
        if let Ok(address) = host.parse::<IpAddr>() {
            return Ok(vec![SocketAddr::new(address, port)]);
        }
        let limit = self.options.connect_timeout;
        let late =
            || Error::new(Status::Timeout, format!("{}: the name was not resolved within {limit:?}", target.key()));
        let found = timeout(limit, (self.lookup)(host.to_owned(), port)).await.map_err(|_| late())?;
        let mut addresses = found.map_err(|error| {
            let status = if client::is_out_of_files(&error) { Status::Full } else { Status::Disconnected };
            Error::new(status, format!("{}: the name cannot be resolved: {error}", target.key()))
        })?;
        self.sort(&mut addresses, ToString::to_string);
        Ok(addresses)
    }

    async fn try_address(
        &self,
        target: &Target,
        address: SocketAddr,
        name: &str,
        files: &Files,
    ) -> Result<(Client, String), Error> {
        let attempt = Attempt { pool: self, key: address.to_string() };
        let shown = format!("{address} for {name}");
        let server = at(&target.server, &address.ip().to_string(), address.port())
            .ok_or_else(|| Error::new(Status::Disconnected, format!("{shown}: this is no address to connect to")))?;
        let client = self.try_connect(server, &shown, files.config_for(name)).await?;
        attempt.succeed();
        Ok((client, address.to_string()))
    }

    async fn try_connect(&self, server: ServerAddr, shown: &str, tls: Option<ClientConfig>) -> Result<Client> {
        Client::connect(&self.options, server, shown, tls, Arc::clone(&self.on_server_error)).await
    }

    /// Replaces the known servers of the cluster by those that the connected server names: some of the others may be
    /// gone for good. Keeps them if it names none, for then it may not know the others yet.
    pub(crate) fn learn(&self, hosts: &[String]) {
        let current = self.current.lock();
        let from = current.as_ref().map(|current| &current.target).or(self.servers.first());
        let Some(from) = from.filter(|_| !hosts.is_empty()) else { return };
        let mut learned: Vec<Target> = Vec::new();
        for host in hosts {
            if let Ok(other) = host.parse::<ServerAddr>()
                && let Some(server) = at(&from.server, other.host(), other.port())
            {
                let is_address = server.host().parse::<IpAddr>().is_ok();
                let tls_name = from.name().filter(|_| is_address).map(str::to_owned);
                let target = Target { server, tls_name };
                if !self.servers.iter().chain(&learned).any(|known| known.key() == target.key()) {
                    learned.push(target);
                }
            }
        }
        *self.learned.lock() = learned;
    }
}

/// A server at another host and port, with the scheme and the credentials of this one.
fn at(server: &ServerAddr, host: &str, port: u16) -> Option<ServerAddr> {
    let mut url = server.clone().into_inner();
    let host = if host.contains(':') { format!("[{host}]") } else { host.into() };
    url.set_host(Some(&host)).ok()?;
    url.set_port(Some(port)).ok()?;
    ServerAddr::from_url(url).ok()
}

/// An attempt to connect to a server or address. Unless it succeeds it counts as failed, even if another one was merely
/// faster.
struct Attempt<'a> {
    pool: &'a ServerPool,
    key: String,
}

impl Attempt<'_> {
    fn succeed(mut self) {
        self.pool.avoided.lock().remove(&std::mem::take(&mut self.key));
    }
}

impl Drop for Attempt<'_> {
    fn drop(&mut self) {
        if !self.key.is_empty() {
            let key = std::mem::take(&mut self.key);
            self.pool.avoided.lock().insert(key, Avoided::Failed(Instant::now()));
        }
    }
}

/// Starts the attempts one after the other, each when the one before has failed or has not answered for
/// `ATTEMPT_DELAY`. The first that succeeds ends the others.
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
                due = Instant::now() + ATTEMPT_DELAY;
            }
            else => return Err(failures),
        }
    }
}

/// Parses one URL, or several separated by commas.
pub(crate) fn parse_servers(url: &str) -> Result<Vec<ServerAddr>> {
    let has_secrets = url.contains('@');
    url.split(',').map(|url| parse_server(url.trim_matches(' '), has_secrets)).collect()
}

fn parse_server(url: &str, has_secrets: bool) -> Result<ServerAddr> {
    // The text before an @ may be a secret, and may have a comma in it.
    let shown = match url.rsplit_once('@') {
        Some((_, host)) => format!("…@{host}"),
        None if has_secrets => "…".to_owned(),
        None => url.to_owned(),
    };
    let wrong =
        |why: &str| Error::invalid(format!("server URL {shown:?} {why}; use nats://host:port or tls://host:port"));
    if url.is_empty() {
        return Err(wrong("is empty"));
    }
    // The parser would ignore some of them.
    if url.contains(|c: char| c.is_whitespace() || c.is_control()) {
        return Err(wrong("has white space or a control character"));
    }
    let server: ServerAddr = url.parse().map_err(|_| wrong("is not a URL"))?;
    if !matches!(server.scheme(), "nats" | "tls") {
        return Err(wrong("has another scheme than nats or tls"));
    }
    if server.host().is_empty() {
        return Err(wrong("has no host"));
    }
    let parsed = server.clone().into_inner();
    if !matches!(parsed.path(), "" | "/") || parsed.query().is_some() || parsed.fragment().is_some() {
        return Err(wrong("has text after the port (in a password, write %40 for @ and %2F for /)"));
    }
    Ok(server)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Config;
    use crate::sync::atomic::{AtomicUsize, Ordering};
    use std::collections::HashSet;
    use std::io::Write;
    use std::net::TcpListener;
    use std::thread;

    #[test]
    fn server_urls_are_parsed_and_secrets_are_not_in_errors() {
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

    /// Starts a server that answers each client as nats-server does, or one that never answers. Returns its address,
    /// and how many connections it has had.
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

    fn pool(url: &str, lookup: Option<Lookup>) -> ServerPool {
        let mut pool = ServerPool::new(
            parse_servers(url).unwrap(),
            Config::new().for_connect().unwrap().clone(),
            Arc::new(|_| {}),
        );
        pool.lookup = lookup.unwrap_or(pool.lookup);
        pool
    }

    fn run<T>(work: impl Future<Output = T>) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let done = runtime.block_on(work);
        runtime.shutdown_background();
        done
    }

    /// Less than `connect_timeout_ms`.
    const SOON: Duration = Duration::from_secs(3);

    #[test]
    fn silent_server_delays_no_other_and_is_tried_last() {
        let ((dead, tried), (live, _)) = (server("127.0.0.1", false), server("127.0.0.1", true));
        let (dead_too, tried_too) = server("127.0.0.1", false);
        let pool = pool(&format!("{dead},{live},{dead_too}"), None);
        run(async {
            for _ in 0..20 {
                let begun = Instant::now();
                pool.connect().await.unwrap();
                assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            }
        });
        // Each about once: from then on the one that answered is tried first. A busy machine may delay that.
        assert!(tried.load(Ordering::SeqCst) + tried_too.load(Ordering::SeqCst) < 8);
    }

    #[test]
    fn each_address_of_a_name_is_tried() {
        static ADDRESSES: Mutex<Vec<SocketAddr>> = Mutex::new(Vec::new());
        let others: Vec<_> = (0..3).map(|_| server("127.0.0.1", false)).collect();
        let (live, count) = server("127.0.0.1", true);
        *ADDRESSES.lock() = others.iter().map(|(address, _)| *address).chain([live]).collect();
        let pool = pool("many:1", Some(|_, _| Box::pin(async { Ok(ADDRESSES.lock().clone()) })));
        run(async {
            let begun = Instant::now();
            pool.connect().await.unwrap();
            assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
            // In another order each time: each comes first sometimes when none is avoided.
            pool.avoided.lock().clear();
            let target = pool.servers[0].clone();
            let mut firsts = HashSet::new();
            while firsts.len() < ADDRESSES.lock().len() {
                firsts.insert(pool.addresses(&target).await.unwrap()[0]);
            }
        });
        assert_eq!(count.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn error_names_each_server_and_address_that_failed() {
        let refuses = |address: &str| TcpListener::bind((address, 0)).unwrap().local_addr().unwrap();
        let one = refuses("127.0.0.1");
        let lookup: Lookup = |_, port| {
            Box::pin(async move {
                Ok(["127.0.0.2", "127.0.0.3"].map(|ip| SocketAddr::new(ip.parse().unwrap(), port)).into())
            })
        };
        let error = run(pool(&format!("{one},many:{}", one.port()), Some(lookup)).connect()).unwrap_err();
        assert_eq!(error.status, Status::Disconnected);
        for address in
            [one.to_string(), format!("127.0.0.2:{} for many", one.port()), format!("127.0.0.3:{}", one.port())]
        {
            assert!(error.message.contains(&address), "{error}");
        }
        let error =
            run(pool("many:1", Some(|_, _| Box::pin(async { Err(io::Error::other("no such name")) }))).connect());
        assert!(error.unwrap_err().message.contains("many:1: the name cannot be resolved: no such name"));
        let error = run(pool("many:1", Some(|_, _| Box::pin(async { Ok(Vec::new()) }))).connect()).unwrap_err();
        assert!(error.message.contains("many:1"), "{error}");
    }

    #[test]
    fn servers_of_a_cluster_are_learned_once_with_the_credentials_of_the_url() {
        let options = Config::new().for_connect().unwrap().clone();
        let pool = ServerPool::new(parse_servers("nats://u:p@a:1").unwrap(), options, Arc::new(|_| {}));
        pool.learn(&["a:1".into(), "b:2".into(), "[::1]:3".into(), "".into(), "b:2".into()]);
        let learned = || {
            let servers = pool.learned.lock();
            let shown = servers
                .iter()
                .map(|Target { server, .. }| (server.host().to_owned(), server.port(), server.password().is_some()));
            shown.collect::<Vec<_>>()
        };
        assert_eq!(learned(), [("b".into(), 2, true), ("::1".into(), 3, true)]);
        // A server that is not named any longer is forgotten.
        pool.learn(&["c:4".into()]);
        assert_eq!(learned(), [("c".into(), 4, true)]);
        pool.learn(&[]);
        assert_eq!(learned().len(), 1);
        pool.learn(&["a:1".into()]);
        assert_eq!(learned(), []);
    }

    #[test]
    fn learned_addresses_keep_the_name_that_led_to_them() {
        let pool = pool("tls://u:p@a:1,tls://b:1", None);
        let second = pool.servers[1].clone();
        *pool.current.lock() = Some(Current { target: second, address: None });
        pool.learn(&["10.0.0.1:4222".into(), "[::1]:4222".into(), "c:4222".into()]);
        let learned = pool.learned.lock().clone();
        let names: Vec<_> = learned.iter().map(|target| (target.tls_name.as_deref(), target.name())).collect();
        assert_eq!(names, [(Some("b"), Some("b")), (Some("b"), Some("b")), (None, Some("c"))]);
        assert!(
            learned.iter().all(|target| target.server.username().is_none()),
            "has the credentials of another server"
        );
        // So do the addresses that one of these servers names.
        *pool.current.lock() = Some(Current { target: learned[0].clone(), address: None });
        pool.learn(&["10.0.0.2:4222".into()]);
        assert_eq!(pool.learned.lock()[0].tls_name.as_deref(), Some("b"));
    }
}
