//! Settings from the environment. The service does not start if one is invalid. The error names it.
//!
//! One table, [`SETTINGS`], feeds parsing, `--help` and docs/configuration.md.

use std::env;
use std::fmt::{self, Display};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio_postgres::Config;

pub struct Setting {
    pub name: &'static str,
    pub meaning: &'static str,
    /// The value that is parsed if none is set, or the rule that makes it.
    pub default: &'static str,
}

const fn setting(name: &'static str, meaning: &'static str, default: &'static str) -> Setting {
    Setting {
        name,
        meaning,
        default,
    }
}

#[rustfmt::skip]
pub const SETTINGS: [Setting; 17] = [
    setting("DATABASE_URL", "postgres://user:password@host:port/database; for several hosts host:port,host:port/database?target_session_attrs=read-write", "required"),
    setting("DATABASE_READ_URL", "read replicas, in the same form", "none"),
    setting("REPLICA_LAG_MS", "maximum lag of a replica that may answer reads", "5000"),
    setting("DATABASE_CA_FILE", "PEM file of the certificate authorities for TLS to the database", "authorities of the system"),
    setting("LISTEN_ADDR", "address and port of the API", "127.0.0.1:8080"),
    setting("ADMIN_ADDR", "address and port of /health/live, /health/ready and /metrics", "127.0.0.1:8081"),
    setting("AUTH", "keys (a write needs an API key) or off (anyone can write)", "off on a loopback address, otherwise required"),
    setting("WORKERS", "threads that serve requests", "one per core, at most 8"),
    setting("POOL_SIZE", "pooled connections per server for writes and lists, divided among the workers", "4 per worker, at least 16"),
    setting("POOL_WAIT_MS", "queue timeout per stage: unavailable primary, connection pool, row queue", "2000"),
    setting("QUEUE_SIZE", "maximum number of waiting requests per worker, for each queue", "5000"),
    setting("CONNECT_TIMEOUT_MS", "timeout for connecting to a database server", "3000"),
    setting("STATEMENT_TIMEOUT_MS", "timeout for a statement", "5000"),
    setting("SHUTDOWN_DELAY_MS", "delay between SIGTERM and closing the listener", "0"),
    setting("SHUTDOWN_TIMEOUT_MS", "time limit for requests in flight, after that delay", "30000"),
    setting("CORS_ORIGINS", "origins whose pages may use the API, separated by commas", "*"),
    setting("RUST_LOG", "log filter, in the syntax of env_logger", "info,actix_server=warn,actix_http=off"),
];

/// The table for `--help`.
#[must_use]
pub fn help() -> String {
    let line = |setting: &Setting| {
        let Setting {
            name,
            meaning,
            default,
        } = setting;
        format!("{name:20}  {meaning}\n{:20}  default: {default}\n", "")
    };
    SETTINGS.iter().map(line).collect()
}

#[must_use]
pub fn default_of(name: &str) -> &'static str {
    let setting = SETTINGS.iter().find(|setting| setting.name == name);
    setting.map_or("", |setting| setting.default)
}

pub struct Settings {
    /// The URL once for each of its hosts, here and below.
    pub database: Vec<Config>,
    pub replicas: Vec<Config>,
    pub replica_lag: Duration,
    pub ca_file: Option<PathBuf>,
    pub listen: SocketAddr,
    pub admin: SocketAddr,
    pub auth: AuthMode,
    pub workers: usize,
    pub pool_size: usize,
    pub pool_wait: Duration,
    pub queue_size: usize,
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub shutdown_delay: Duration,
    pub shutdown_timeout: Duration,
    /// Empty: any origin.
    pub cors_origins: Vec<String>,
}

#[derive(Clone, Copy, PartialEq)]
pub enum AuthMode {
    Off,
    Keys,
}

impl Display for AuthMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "AUTH=off: anyone can write",
            Self::Keys => "AUTH=keys: a write needs an API key",
        })
    }
}

impl Settings {
    pub fn from_env() -> Result<Self> {
        let listen = parsed("LISTEN_ADDR", "an address and a port")?;
        // An instance fits into the 100 connections that PostgreSQL allows by default.
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = count("WORKERS", cores.min(8))?;
        Ok(Self {
            database: database("DATABASE_URL")?,
            replicas: match value("DATABASE_READ_URL")? {
                Some(_) => database("DATABASE_READ_URL")?,
                None => Vec::new(),
            },
            replica_lag: milliseconds("REPLICA_LAG_MS", 1)?,
            ca_file: env::var_os("DATABASE_CA_FILE")
                .filter(|file| !file.is_empty())
                .map(PathBuf::from),
            listen,
            admin: parsed("ADMIN_ADDR", "an address and a port")?,
            auth: auth(listen)?,
            workers,
            // Enough that one locked listing and one long list leave a worker connections.
            pool_size: count("POOL_SIZE", (4 * workers).clamp(16, 10_000))?,
            pool_wait: milliseconds("POOL_WAIT_MS", 1)?,
            queue_size: count("QUEUE_SIZE", default_of("QUEUE_SIZE").parse()?)?,
            connect_timeout: milliseconds("CONNECT_TIMEOUT_MS", 1)?,
            statement_timeout: milliseconds("STATEMENT_TIMEOUT_MS", 1)?,
            shutdown_delay: milliseconds("SHUTDOWN_DELAY_MS", 0)?,
            shutdown_timeout: milliseconds("SHUTDOWN_TIMEOUT_MS", 1)?,
            cors_origins: cors_origins()?,
        })
    }
}

/// Empty means not set.
fn value(name: &str) -> Result<Option<String>> {
    match env::var(name) {
        Ok(value) => Ok(Some(value).filter(|value| !value.is_empty())),
        Err(env::VarError::NotPresent) => Ok(None),
        Err(env::VarError::NotUnicode(_)) => bail!("{name} is invalid: must be UTF-8"),
    }
}

fn parsed<T: FromStr>(name: &str, rule: &str) -> Result<T> {
    let default = default_of(name);
    let value = value(name)?.unwrap_or_else(|| default.to_owned());
    let parsed = value.parse().ok();
    parsed.with_context(|| format!("{name}={value} is invalid: must be {rule}, such as {default}"))
}

fn count(name: &str, default: usize) -> Result<usize> {
    let value = value(name)?.unwrap_or_else(|| default.to_string());
    let count = value.parse().ok();
    count
        .filter(|count| (1..=10_000).contains(count))
        .with_context(|| {
            format!(
                "{name}={value} is invalid: must be an integer from 1 to 10000, such as {default}"
            )
        })
}

fn milliseconds(name: &str, min: u64) -> Result<Duration> {
    let default = default_of(name);
    let value = value(name)?.unwrap_or_else(|| default.to_owned());
    let number = value.parse().ok();
    let number = number.filter(|number| (min..=3_600_000).contains(number));
    let number = number.with_context(|| {
        format!(
            "{name}={value} is invalid: must be {min} to 3600000 milliseconds, such as {default}"
        )
    })?;
    Ok(Duration::from_millis(number))
}

/// The URL once for each host. It contains a password, so no message repeats it.
fn database(name: &str) -> Result<Vec<Config>> {
    const FORM: &str = "must be postgres://user:password@host:port/database";
    let url = value(name)?.with_context(|| format!("{name} is not set: {FORM}"))?;
    let configs: Result<Vec<Config>, _> = url_of_each_host(&url)
        .iter()
        .map(|url| url.parse())
        .collect();
    let configs = configs.map_err(|_| anyhow!("{name} is not a valid URL: {FORM}"))?;
    for config in &configs {
        ensure!(!config.get_hosts().is_empty(), "{name} has no host: {FORM}");
        ensure!(
            config.get_dbname().is_some(),
            "{name} has no database: {FORM}"
        );
    }
    Ok(configs)
}

/// `postgres://user@one,two/database` as one URL for each host.
fn url_of_each_host(url: &str) -> Vec<String> {
    let start = url.find("://").map_or(0, |scheme| scheme + 3);
    let (scheme, rest) = url.split_at(start);
    let (authority, path) = rest.split_at(rest.find(['/', '?']).unwrap_or(rest.len()));
    let hosts = authority.rfind('@').map_or(0, |at| at + 1);
    let (login, hosts) = authority.split_at(hosts);
    let url = |host| format!("{scheme}{login}{host}{path}");
    hosts.split(',').map(url).collect()
}

/// Off by default, but only if no other machine can reach the service.
fn auth(listen: SocketAddr) -> Result<AuthMode> {
    const CHOICES: &str = "must be keys (a write needs an API key) or off (anyone can write)";
    match value("AUTH")?.as_deref() {
        Some("keys") => Ok(AuthMode::Keys),
        Some("off") => Ok(AuthMode::Off),
        None if is_loopback(listen) => Ok(AuthMode::Off),
        None => bail!(
            "AUTH is not set, but LISTEN_ADDR={listen} can be reached from other machines: {CHOICES}"
        ),
        Some(value) => bail!("AUTH={value} is invalid: {CHOICES}"),
    }
}

fn is_loopback(address: SocketAddr) -> bool {
    address.ip().to_canonical().is_loopback()
}

fn cors_origins() -> Result<Vec<String>> {
    let Some(value) = value("CORS_ORIGINS")?.filter(|value| value != "*") else {
        return Ok(Vec::new());
    };
    let origin = |origin: &str| {
        let mut schemes = ["https://", "http://"].iter();
        let host = schemes.find_map(|scheme| origin.strip_prefix(scheme))?;
        let is_host_character = |c: char| c.is_ascii_alphanumeric() || ".-:[]".contains(c);
        let is_valid = !host.is_empty() && host.chars().all(is_host_character);
        is_valid.then(|| origin.to_owned())
    };
    let origins: Option<Vec<_>> = value.split(',').map(|entry| origin(entry.trim())).collect();
    origins.with_context(|| {
        format!(
            "CORS_ORIGINS={value} is invalid: must be * or origins such as https://example.com, separated by commas"
        )
    })
}
