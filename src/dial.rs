//! How nats-server is reached: which servers, with which options, and a NATS client that does not outlive its connection.

use crate::config::ConnectOptions;
use crate::error::{Error, Result, Status};
use crate::sync::Mutex;
use crate::{random, runtime};
use async_nats::{Client, ConnectErrorKind, ServerAddr};
use std::fs;
use std::panic::resume_unwind;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::time::timeout;

/// How many messages the NATS client buffers.
const CLIENT_CAPACITY: usize = 2048;

/// The servers that may be connected to.
pub(crate) struct Dialer {
    options: ConnectOptions,
    servers: Vec<ServerAddr>,
    /// The others of their cluster, as the last one that took us named them.
    learned: Mutex<Vec<ServerAddr>>,
    /// Is told what a server complains of.
    on_complaint: Arc<dyn Fn(String) + Send + Sync>,
}

impl Dialer {
    pub(crate) fn new(
        servers: Vec<ServerAddr>,
        options: ConnectOptions,
        on_complaint: Arc<dyn Fn(String) + Send + Sync>,
    ) -> Dialer {
        Dialer { options, servers, learned: Mutex::default(), on_complaint }
    }

    /// Tries each server once, beginning with a random one.
    pub(crate) async fn dial(&self) -> Result<Client> {
        let mut servers = self.servers.clone();
        servers.extend_from_slice(&self.learned.lock());
        let start = random::number() % servers.len().max(1) as u64;
        servers.rotate_left(start as usize);
        let mut failures = Vec::new();
        let mut status = Status::Timeout;
        for server in servers {
            let name = format!("{}:{}", server.host(), server.port());
            let options = self.client_options(&server).await?;
            // The client limits each of its steps, but not the lookup of the name.
            let attempt = runtime::contain("the NATS client", options.connect(server));
            match timeout(self.options.connect_timeout * 2, attempt).await {
                Ok(Ok(Ok(client))) => return Ok(client),
                // It does not survive everything that a server may say.
                Ok(Err(panic)) => {
                    status = Status::Disconnected;
                    failures.push(format!("{name}: {panic}"));
                }
                Ok(Ok(Err(error))) => {
                    if error.kind() != ConnectErrorKind::TimedOut {
                        status = Status::Disconnected;
                    }
                    failures.push(format!("{name}: {}", explain(&error.to_string(), &self.options)));
                }
                Err(_) => failures.push(format!("{name}: timed out")),
            }
        }
        Err(Error::new(status, failures.join("; ")))
    }

    /// The servers of a cluster, as the one we are connected to names them, in place of those that were named before: some
    /// of these may be gone for good. One that names none may not know the others yet.
    pub(crate) fn learn(&self, hosts: &[String]) {
        let Some(first) = self.servers.first().filter(|_| !hosts.is_empty()) else { return };
        let first = first.clone().into_inner();
        let mut learned: Vec<ServerAddr> = Vec::new();
        for host in hosts {
            // With the first one's scheme and credentials.
            let mut url = first.clone();
            let Ok(other) = host.parse::<ServerAddr>() else { continue };
            let name = if other.host().contains(':') { format!("[{}]", other.host()) } else { other.host().into() };
            if url.set_host(Some(&name)).is_ok()
                && url.set_port(Some(other.port())).is_ok()
                && let Ok(server) = ServerAddr::from_url(url)
                && !self.servers.iter().chain(&learned).any(|known| is_same(known, &server))
            {
                learned.push(server);
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
            check_pem("tls_ca_file", file, "CERTIFICATE")?;
            options = options.add_root_certificates(file.clone());
        }
        if let (Some(cert), Some(key)) = (&own.tls_cert_file, &own.tls_key_file) {
            check_pem("tls_cert_file", cert, "CERTIFICATE")?;
            check_pem("tls_key_file", key, "PRIVATE KEY")?;
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

/// Fails for a file that cannot be read or has nothing of this kind in it, which the client would not tell clearly.
fn check_pem(option: &str, file: &Path, kind: &str) -> Result<()> {
    let wrong = |why: String| Error::invalid(format!("{option} {}: {why}", file.display()));
    let text = fs::read_to_string(file).map_err(|error| wrong(error.to_string()))?;
    let is_begin = |line: &str| line.starts_with("-----BEGIN ") && line.trim_end().ends_with(&format!("{kind}-----"));
    if !text.lines().any(is_begin) {
        return Err(wrong(format!("there is no {} in it, as PEM", kind.to_lowercase())));
    }
    Ok(())
}

/// Adds to an error of TLS what people make of it.
fn explain(error: &str, options: &ConnectOptions) -> String {
    let hint = if error.contains("InvalidContentType") {
        if options.tls_first {
            "the server does not speak TLS, or not from the beginning (tls_first)"
        } else {
            "the server does not speak TLS"
        }
    } else if error.contains("could not add certificate or key") {
        "tls_cert_file and tls_key_file do not belong together"
    } else if error.contains("failed signing nonce") {
        "nkey_seed or creds_file has no seed of a user"
    } else if error.contains("received fatal alert") {
        "the server refuses our certificate, or that we have none (tls_cert_file, tls_key_file)"
    } else if error.contains("timed out") && options.wants_tls() && !options.tls_first {
        "a server with handshake_first needs tls_first"
    } else {
        return error.to_owned();
    };
    format!("{error}: {hint}")
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

    #[test]
    fn servers_of_a_cluster_are_learned_once_with_the_credentials_of_the_first() {
        let options = Config::new().for_connect().unwrap().clone();
        let dialer = Dialer::new(parse_servers("nats://u:p@a:1").unwrap(), options, Arc::new(|_| {}));
        dialer.learn(&["a:1".into(), "b:2".into(), "[::1]:3".into(), "".into(), "b:2".into()]);
        let learned = || {
            let servers = dialer.learned.lock();
            let shown =
                servers.iter().map(|server| (server.host().to_owned(), server.port(), server.password().is_some()));
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
}
