//! Settings from the environment. The service does not start if one is invalid. The error names it.
//!
//! One table, [`SETTINGS`], feeds parsing, `--help` and docs/configuration.md.

use std::env;
use std::error::Error;
use std::fmt::{self, Display};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use tokio_postgres::Config;
use tokio_postgres::config::{Host, SslMode, TargetSessionAttrs};

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
pub const SETTINGS: [Setting; 24] = [
    setting("DATABASE_URL", "postgres://user:password@host:port/database; for several hosts host:port,host:port/database?target_session_attrs=read-write", "required, or DATABASE_URL_FILE"),
    setting("DATABASE_READ_URL", "read replicas, in the same form", "none"),
    setting("DATABASE_URL_FILE", "file that contains the DATABASE_URL", "none"),
    setting("DATABASE_READ_URL_FILE", "file that contains the DATABASE_READ_URL", "none"),
    setting("DATABASE_PASSWORD_FILE", "file that contains the password, if the URLs have none", "none"),
    setting("SHARDING_PROXY", "on if DATABASE_URL is a proxy in front of several databases with ranges of listings", "off"),
    setting("REPLICA_LAG_MS", "maximum lag of a replica that may answer reads", "5000"),
    setting("DATABASE_CA_FILE", "PEM file of the certificate authorities for TLS to the database", "authorities of the system"),
    setting("LISTEN_ADDR", "address and port of the API", "127.0.0.1:8080"),
    setting("ADMIN_ADDR", "address and port of /health/live, /health/ready and /metrics", "127.0.0.1:8081"),
    setting("AUTH", "keys (a write needs an API key) or off (anyone can write)", "off on a loopback address, otherwise required"),
    setting("WORKERS", "threads that serve requests", "one per core, at most 8"),
    setting("POOL_SIZE", "pooled connections per server for writes and lists, divided among the workers", "4 per worker, at least 16"),
    setting("POOL_WAIT_MS", "queue timeout per stage: unavailable primary, connection pool, row queue", "2000"),
    setting("QUEUE_SIZE", "maximum number of waiting requests per worker, for each queue", "5000"),
    setting("BATCH_SIZE", "maximum number of reads by id that share one statement", "64, or 1 with SHARDING_PROXY=on"),
    setting("CONNECT_TIMEOUT_MS", "timeout for connecting to a database server", "3000"),
    setting("STATEMENT_TIMEOUT_MS", "timeout for a statement", "5000"),
    setting("SHUTDOWN_DELAY_MS", "delay between SIGTERM and closing the listener", "0"),
    setting("SHUTDOWN_TIMEOUT_MS", "time limit for requests in flight, after that delay", "30000"),
    setting("CORS_ORIGINS", "origins whose pages may use the API, separated by commas", "*"),
    setting("TRUSTED_PROXIES", "proxies (addresses or networks) whose X-Forwarded-For names the client in the log, separated by commas", "none"),
    setting("LOG_FORMAT", "text, or json (each line is an object)", "text"),
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
        format!("{name:22}  {meaning}\n{:22}  default: {default}\n", "")
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
    pub batch_size: usize,
    pub sharding_proxy: bool,
    pub connect_timeout: Duration,
    pub statement_timeout: Duration,
    pub shutdown_delay: Duration,
    pub shutdown_timeout: Duration,
    /// Empty: any origin.
    pub cors_origins: Vec<String>,
    pub trusted_proxies: Vec<Network>,
}

/// An address, or a network such as 10.0.0.0/8.
pub struct Network {
    address: IpAddr,
    prefix: u32,
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
        let ca_file = path("DATABASE_CA_FILE");
        let database = |name| database(name, ca_file.is_some());
        let primary = database("DATABASE_URL")?
            .with_context(|| format!("DATABASE_URL is not set: {URL_FORM}"))?;
        let replicas = database("DATABASE_READ_URL")?.unwrap_or_default();
        let sharding_proxy = sharding_proxy()?;
        // The driver would ask a server for it, up or down, before each session.
        let asks_servers = |url: &Config| url.get_target_session_attrs() != TargetSessionAttrs::Any;
        ensure!(
            !sharding_proxy || !primary.iter().any(asks_servers),
            "SHARDING_PROXY=on and DATABASE_URL has target_session_attrs: remove it from the URL"
        );
        ensure!(
            !sharding_proxy || replicas.is_empty(),
            "SHARDING_PROXY=on and DATABASE_READ_URL is set: unset it, and let the proxy read from replicas"
        );
        let batch_size = count("BATCH_SIZE", if sharding_proxy { 1 } else { 64 })?;
        ensure!(
            !sharding_proxy || batch_size == 1,
            "SHARDING_PROXY=on and BATCH_SIZE={batch_size}: unset BATCH_SIZE, a statement must name one listing"
        );
        Ok(Self {
            database: primary,
            replicas,
            replica_lag: milliseconds("REPLICA_LAG_MS", 1)?,
            ca_file,
            listen,
            admin: admin_addr()?,
            auth: auth(listen)?,
            workers,
            // Enough that one locked listing and one long list leave a worker connections.
            pool_size: count("POOL_SIZE", (4 * workers).clamp(16, 10_000))?,
            pool_wait: milliseconds("POOL_WAIT_MS", 1)?,
            queue_size: count("QUEUE_SIZE", default_of("QUEUE_SIZE").parse()?)?,
            batch_size,
            sharding_proxy,
            connect_timeout: milliseconds("CONNECT_TIMEOUT_MS", 1)?,
            statement_timeout: milliseconds("STATEMENT_TIMEOUT_MS", 1)?,
            shutdown_delay: milliseconds("SHUTDOWN_DELAY_MS", 0)?,
            shutdown_timeout: milliseconds("SHUTDOWN_TIMEOUT_MS", 1)?,
            cors_origins: cors_origins()?,
            trusted_proxies: trusted_proxies()?,
        })
    }
}

pub fn admin_addr() -> Result<SocketAddr> {
    parsed("ADMIN_ADDR", "an address and a port")
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

fn path(name: &str) -> Option<PathBuf> {
    let path = env::var_os(name).filter(|path| !path.is_empty());
    path.map(PathBuf::from)
}

/// The content of the file that a setting names, without one newline at its end. It is a secret, so no message repeats it.
fn content(name: &str) -> Result<Option<Vec<u8>>> {
    let Some(path) = path(name) else {
        return Ok(None);
    };
    let name = || format!("{name}={}", path.display());
    let mut content = fs::read(&path).with_context(|| format!("cannot read {}", name()))?;
    if content.pop_if(|last| *last == b'\n').is_some() {
        content.pop_if(|last| *last == b'\r');
    }
    ensure!(!content.is_empty(), "{} is an empty file", name());
    Ok(Some(content))
}

const URL_FORM: &str = "must be postgres://user:password@host:port/database";

/// The URL once for each host, from a setting or its file. It contains a password, so no message repeats it.
fn database(name: &str, has_ca_file: bool) -> Result<Option<Vec<Config>>> {
    let file = format!("{name}_FILE");
    let url = match (value(name)?, content(&file)?) {
        (None, None) => return Ok(None),
        (Some(_), Some(_)) => bail!("{name} and {file} are both set: unset one of them"),
        (Some(url), None) => url,
        (None, Some(url)) => {
            String::from_utf8(url).map_err(|_| anyhow!("{file} is invalid: must be UTF-8"))?
        }
    };
    let password = content("DATABASE_PASSWORD_FILE")?;
    let (url, ssl_mode) = take_ssl_mode(name, &url)?;
    let config = |url: String| {
        let scheme = ["postgres://", "postgresql://"].iter();
        let is_url = scheme.into_iter().any(|scheme| url.starts_with(scheme));
        let config = url.parse().map_err(|error| option_at_fault(&url, &error));
        let mut config: Config =
            config.map_err(|option| anyhow!("{name} is not a valid URL{option}: {URL_FORM}"))?;
        ensure!(is_url, "{name} is not a valid URL: {URL_FORM}");
        ensure!(
            !config.get_hosts().is_empty(),
            "{name} has no host: {URL_FORM}"
        );
        ensure!(
            config.get_dbname().is_some(),
            "{name} has no database: {URL_FORM}"
        );
        if let Some(password) = &password {
            let conflict =
                "contains a password and DATABASE_PASSWORD_FILE is set: remove one of them";
            ensure!(config.get_password().is_none(), "{name} {conflict}");
            config.password(password);
        }
        let default = if has_ca_file || !is_local(&config) {
            SslMode::Require
        } else {
            SslMode::Prefer
        };
        config.ssl_mode(ssl_mode.unwrap_or(default));
        Ok(config)
    };
    let configs: Result<_> = url_of_each_host(&url).into_iter().map(config).collect();
    configs.map(Some)
}

/// Removes `sslmode` from a URL: the driver does not know all its values. With TLS, the service always verifies the certificate
/// chain and the host name. So `require` and `verify-ca` mean the same as `verify-full`.
fn take_ssl_mode(name: &str, url: &str) -> Result<(String, Option<SslMode>)> {
    let Some((address, options)) = url.split_once('?') else {
        return Ok((url.to_owned(), None));
    };
    let (modes, others): (Vec<_>, Vec<_>) = options
        .split('&')
        .partition(|option| option.starts_with("sslmode="));
    let mode = match modes.last().copied() {
        None => None,
        Some("sslmode=disable") => Some(SslMode::Disable),
        Some("sslmode=prefer") => Some(SslMode::Prefer),
        Some("sslmode=require" | "sslmode=verify-ca" | "sslmode=verify-full") => {
            Some(SslMode::Require)
        }
        Some(_) => bail!(
            "{name} has an invalid sslmode: must be disable, prefer, require, verify-ca or verify-full"
        ),
    };
    Ok((format!("{address}?{}", others.join("&")), mode))
}

/// The option that a URL must not have, as part of a sentence. Empty if the name could be a piece of a password.
fn option_at_fault(url: &str, error: &tokio_postgres::Error) -> String {
    let reason = error.source().map(ToString::to_string).unwrap_or_default();
    let names_option = reason.contains(" option `");
    let is_clear = ["@", "?"].iter().all(|mark| url.matches(mark).count() <= 1);
    if names_option && is_clear {
        format!(" ({})", reason.replace('`', ""))
    } else {
        String::new()
    }
}

/// Whether every host is this machine.
fn is_local(config: &Config) -> bool {
    let is_local = |host: &Host| match host {
        Host::Tcp(name) => {
            name == "localhost" || name.parse().is_ok_and(|address| is_loopback(&address))
        }
        Host::Unix(_) => true,
    };
    config.get_hosts().iter().all(is_local) && config.get_hostaddrs().iter().all(is_loopback)
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
        None if is_loopback(&listen.ip()) => Ok(AuthMode::Off),
        None => bail!(
            "AUTH is not set, but LISTEN_ADDR={listen} can be reached from other machines: {CHOICES}"
        ),
        Some(value) => bail!("AUTH={value} is invalid: {CHOICES}"),
    }
}

fn sharding_proxy() -> Result<bool> {
    match value("SHARDING_PROXY")?.as_deref() {
        None | Some("off") => Ok(false),
        Some("on") => Ok(true),
        Some(value) => bail!("SHARDING_PROXY={value} is invalid: must be on or off"),
    }
}

fn is_loopback(address: &IpAddr) -> bool {
    address.to_canonical().is_loopback()
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

fn trusted_proxies() -> Result<Vec<Network>> {
    let Some(value) = value("TRUSTED_PROXIES")? else {
        return Ok(Vec::new());
    };
    let networks: Option<_> = value
        .split(',')
        .map(|entry| network(entry.trim()))
        .collect();
    networks.with_context(|| {
        format!(
            "TRUSTED_PROXIES={value} is invalid: must be addresses or networks such as 10.0.0.0/8, separated by commas"
        )
    })
}

fn network(text: &str) -> Option<Network> {
    let (address, prefix) = match text.split_once('/') {
        None => (text, None),
        Some((address, prefix)) => (address, Some(prefix.parse().ok()?)),
    };
    let address: IpAddr = address.parse().ok()?;
    if address != address.to_canonical() {
        return None;
    }
    let bits = if address.is_ipv4() { 32 } else { 128 };
    let prefix = prefix.unwrap_or(bits);
    (prefix <= bits).then_some(Network { address, prefix })
}

impl Network {
    pub fn contains(&self, address: IpAddr) -> bool {
        let common = match (self.address, address) {
            (IpAddr::V4(network), IpAddr::V4(address)) => {
                (network.to_bits() ^ address.to_bits()).leading_zeros()
            }
            (IpAddr::V6(network), IpAddr::V6(address)) => {
                (network.to_bits() ^ address.to_bits()).leading_zeros()
            }
            _ => return false,
        };
        common >= self.prefix
    }
}

/// Whether each line of the log is an object.
///
/// # Errors
///
/// Fails if `LOG_FORMAT` is invalid.
pub fn logs_json() -> Result<bool> {
    match value("LOG_FORMAT")?.as_deref() {
        None | Some("text") => Ok(false),
        Some("json") => Ok(true),
        Some(value) => bail!("LOG_FORMAT={value} is invalid: must be text or json"),
    }
}
