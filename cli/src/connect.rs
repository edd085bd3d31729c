//! Options of the connection, with the names and environment variables of the nats command.

use crate::Failure;
use clap::Args;
use nats_presence::{Config, Connection, option_keys};
use std::sync::Arc;

#[derive(Args)]
#[command(next_help_heading = "Connection")]
pub struct ConnectArgs {
    /// URL of nats-server, or several separated by commas
    ///
    /// A URL may contain user and password, or a token: prefer NATS_URL then, because other users of this machine can
    /// see arguments.
    #[arg(short, long, value_name = "URL", env = "NATS_URL", default_value = "nats://127.0.0.1:4222")]
    #[arg(global = true, hide_env_values = true)]
    server: String,
    /// User to sign in as
    #[arg(long, value_name = "NAME", env = "NATS_USER", global = true, hide_env_values = true, hide_short_help = true)]
    user: Option<String>,
    /// Password of the user; prefer the environment variable
    #[arg(long, value_name = "TEXT", env = "NATS_PASSWORD", global = true, hide_env_values = true)]
    #[arg(hide_short_help = true)]
    password: Option<String>,
    /// Token to sign in with; prefer the environment variable
    #[arg(long, value_name = "TEXT", env = "NATS_TOKEN", global = true, hide_env_values = true)]
    #[arg(hide_short_help = true)]
    token: Option<String>,
    /// Credentials file, with a JWT and a seed
    #[arg(long, value_name = "FILE", env = "NATS_CREDS", global = true, hide_env_values = true)]
    #[arg(hide_short_help = true)]
    creds: Option<String>,
    /// File with the seed of an nkey
    #[arg(long, value_name = "FILE", env = "NATS_NKEY", global = true, hide_env_values = true)]
    #[arg(hide_short_help = true)]
    nkey: Option<String>,
    /// Certificates of the authorities that nats-server's certificate may come from (PEM)
    #[arg(long, value_name = "FILE", env = "NATS_CA", global = true, hide_env_values = true, hide_short_help = true)]
    tlsca: Option<String>,
    /// Certificate of this client (PEM)
    #[arg(long, value_name = "FILE", env = "NATS_CERT", global = true, hide_env_values = true, hide_short_help = true)]
    tlscert: Option<String>,
    /// Private key of this client (PEM)
    #[arg(long, value_name = "FILE", env = "NATS_KEY", global = true, hide_env_values = true, hide_short_help = true)]
    tlskey: Option<String>,
    /// Begin with TLS, before nats-server has introduced itself
    #[arg(long, global = true, hide_short_help = true)]
    tlsfirst: bool,
    /// Set any option of the library, such as -o heartbeat_ms=1000
    ///
    /// `presence_config_set` in nats_presence.h documents them. Those of a request apply to `request` only.
    #[arg(short, long = "option", value_name = "KEY=VALUE", global = true)]
    options: Vec<String>,
}

impl ConnectArgs {
    /// Connects. Options of a request go into `request`, if there is one, and are refused otherwise.
    pub fn connect(&self, request: Option<&mut Config>) -> Result<Arc<Connection>, Failure> {
        let config = self.config(request)?;
        Ok(Connection::connect(&self.server, &config)?)
    }

    fn config(&self, mut request: Option<&mut Config>) -> Result<Config, Failure> {
        let mut config = Config::new();
        config.set("name", "nats-presence command")?;
        let values = [
            ("user", &self.user),
            ("password", &self.password),
            ("token", &self.token),
            ("creds_file", &self.creds),
            ("tls_ca_file", &self.tlsca),
            ("tls_cert_file", &self.tlscert),
            ("tls_key_file", &self.tlskey),
        ];
        for (key, value) in values {
            if let Some(value) = value {
                config.set(key, value)?;
            }
        }
        if let Some(file) = &self.nkey {
            config.set("nkey_seed", &seed(file)?)?;
        }
        if self.tlsfirst {
            config.set("tls_first", "true")?;
        }
        for (index, option) in self.options.iter().enumerate() {
            // The text is not repeated, because it may be a secret.
            let (key, value) = option
                .split_once('=')
                .ok_or_else(|| Failure::usage(format!("-o number {} has no \"=\": it must be KEY=VALUE", index + 1)))?;
            // Not manual_credit: `request` returns no credit itself.
            let is_for_request =
                (option_keys::REQUEST.contains(&key) && key != "manual_credit") || key.starts_with(option_keys::HEADER);
            match &mut request {
                Some(request) if is_for_request => request.set(key, value)?,
                _ => config.set(key, value)?,
            }
        }
        Ok(config)
    }
}

/// Reads the seed of an nkey: the line that begins with S, as in files that nsc and nk write.
fn seed(file: &str) -> Result<String, Failure> {
    let text = std::fs::read_to_string(file).map_err(|error| Failure::usage(format!("{file}: {error}")))?;
    let seed = text.lines().map(str::trim).find(|line| line.starts_with('S'));
    seed.map(str::to_owned).ok_or_else(|| Failure::usage(format!("{file}: no line begins with S, as a seed does")))
}
